"""The chat template that a recipe asks for, in the files where transformers looks for it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.core.errors import PlanError, Problem
from weft.core.specs import SideFile
from weft.formats.checkpoint import read_json
from weft.formats.side_files import TEMPLATE, TOKENIZER, part_of
from weft.formats.tokenizer import CONFIG, dumped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weft.recipes.records import ModelName

TEMPLATE_FILE = "chat_template.jinja"
_OWN = Path(__file__).with_name("chat_templates")
_SHORTEST = 20


def names() -> list[str]:
    """The templates that come with Weft."""
    return sorted(path.stem for path in _OWN.glob("*.jinja"))


def with_chat_template(
    wanted: str, folders: Mapping[ModelName, Path], files: Sequence[SideFile]
) -> tuple[list[SideFile], list[str]]:
    """The output's files with a chat template, and notes on what was chosen and replaced.

    It goes to chat_template.jinja and, for older releases of transformers, which read nothing
    else, to tokenizer_config.json.

    Args:
        wanted: `auto` for the most common one of the models, a name, or a Jinja template.
        folders: Where the tokenizer files of each model lie, in the order of the recipe.
        files: The output's.

    Raises:
        PlanError: It is no template and names none, or is no Jinja.
    """
    if not any(part_of(file.name) == TOKENIZER for file in files):
        return list(files), ["the output has no tokenizer, and so no chat template"]
    template, note = _auto(folders) if wanted == "auto" else _given(wanted)
    if template is None:
        return list(files), [note]
    kept = {file.name: file for file in files if part_of(file.name) != TEMPLATE}
    replaced = sorted(file.name for file in files if part_of(file.name) == TEMPLATE)
    if CONFIG in kept:
        config = _content(kept[CONFIG])
        if config.get("chat_template") not in (None, template):
            replaced.append(f"that in {CONFIG}")
        kept[CONFIG] = SideFile(CONFIG, text=dumped(config | {"chat_template": template}))
    kept[TEMPLATE_FILE] = SideFile(TEMPLATE_FILE, text=template)
    if replaced:
        note += f"; it takes the place of {', '.join(replaced)}"
    return list(kept.values()), [note]


def _given(wanted: str) -> tuple[str, str]:
    if wanted in names():
        text = (_OWN / f"{wanted}.jinja").read_text(encoding="utf-8").strip()
        return text, f"chat template: {wanted}"
    if len(wanted) < _SHORTEST or "{" not in wanted:
        what = f"`chat_template`: {wanted!r} is neither a template in Jinja nor the name of one"
        hint = f"names: auto, {', '.join(names())}"
        raise PlanError("the chat template", [Problem(what, hint)])
    _check(wanted)
    return wanted, "chat template: that of the recipe"


def _check(template: str) -> None:
    """Refuse what Jinja cannot read; torch has brought Jinja, and without it nothing is checked."""
    try:
        from jinja2 import Environment, TemplateSyntaxError
    except ImportError:
        return
    # A tag that transformers adds to the language.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateSyntaxError as error:
        what = f"`chat_template` is no Jinja: line {error.lineno}: {error.message}"
        raise PlanError("the chat template", [Problem(what, "correct it there")]) from None


def _auto(folders: Mapping[ModelName, Path]) -> tuple[str | None, str]:
    found = {model: _template_of(folder) for model, folder in folders.items()}
    having = [template for template in found.values() if template]
    if not having:
        return None, "`chat_template: auto`, and no model has a chat template: the output has none"
    chosen, count = Counter(having).most_common(1)[0]  # of equals, that of the first model
    first = next(model for model, template in found.items() if template == chosen)
    return chosen, f"chat template: that of {first}, which {count} of {len(found)} models have"


def _template_of(folder: Path) -> str | None:
    """The default template of a tokenizer, without the spaces around it; None if it has none."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8").strip() or None
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    template: Any = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in named}
    if isinstance(template, dict):
        template = template.get("default")
    return template.strip() or None if isinstance(template, str) else None


def _content(file: SideFile) -> dict[str, Any]:
    if file.text is None:
        return read_json(Path(file.source or ""))
    content: dict[str, Any] = json.loads(file.text)
    return content
