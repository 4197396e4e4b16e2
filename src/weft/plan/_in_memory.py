"""What transformers calls, in memory, what its files call otherwise.

Since 4.52 the parts of vision-language models have other names in memory than in the files, which
kept theirs; PEFT goes by those in memory. So an adapter has the one or the other, and both fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# Read off transformers 5.23: model types whose files have `language_model.model.layers…`, the
# head inside it, and the towers beside it; all of that is under `model` in memory.
_WITH_TOWERS = {
    *("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "video_llava"),
    *("aria", "aya_vision", "fuyu", "gemma3", "got_ocr2", "internvl", "mistral3", "mllama"),
    *("paligemma", "pp_chart2table", "qwen2_audio", "voxtral"),
}
_TOWERS = {
    *("language_model", "vision_tower", "vision_model", "image_tower", "video_tower"),
    *("audio_tower", "multi_modal_projector", "image_newline", "vision_embed_tokens"),
}
# And those whose files have `model.layers…` and, beside it, `visual…`.
_WITH_VISUAL = {"qwen2_vl", "qwen2_5_vl"}


def in_memory(name: str, config: Mapping[str, Any]) -> str:
    """`model.language_model.layers…` for `language_model.model.layers…` or `model.layers…`."""
    kind = config.get("model_type")
    first, _, rest = name.partition(".")
    if kind in _WITH_TOWERS and first in _TOWERS:
        if name.startswith("language_model.lm_head."):
            return rest
        return f"model.{first}.{rest.removeprefix('model.') if first == 'language_model' else rest}"
    if kind in _WITH_VISUAL and first == "visual":
        return f"model.{name}"
    if kind in _WITH_VISUAL and first == "model" and not rest.startswith(("language_", "visual.")):
        return f"model.language_model.{rest}"
    return name
