"""Recipes of other tools, recognised by their keys, and the spellings of older MergeKits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import Unsupported

if TYPE_CHECKING:
    from weft.recipes._yaml import Document, Loc

# Keys that no recipe has -> whose they are.
_TOOLS = {
    "mergekit-moe": ("experts", "gate_mode", "shared_experts"),
    "bakllama": ("layer_slices", "embedding_source", "lm_head_source"),
    "mergekit-evolve": ("genome",),
    "mergekit-tokensurgeon": ("approximation_method", "donor"),
    "mergekit-layershuffle": ("full_random",),
}
EXTRACTION = (
    *("finetune", "finetuned", "finetuned_model", "rank", "max_rank"),
    *("targeted_modules", "saved_modules"),
)

# Parameters that MergeKit once read, and what became of them.
OBSOLETE = {
    "consensus_method": "is no longer read by MergeKit either: signs are elected by the sum",
    "embed_slerp": "is no longer read by MergeKit either: embeddings are merged like all else",
}


def refuse(data: Any, name: str) -> None:
    """Raises Unsupported for a recipe of another tool."""
    if not isinstance(data, dict) or "merge_method" in data:
        return
    for tool, keys in _TOOLS.items():
        if own := next((key for key in keys if key in data), None):
            raise Unsupported(
                f'{name} is a recipe for {tool} (it has "{own}"), which Weft does not run',
                "weft run takes what mergekit-yaml, mergekit-multi and mergekit-pytorch take",
            )
    if is_extraction(data):
        raise Unsupported(
            f"{name} has an extraction recipe among other documents",
            "give it a file of its own: weft run extraction.yml -o ADAPTER",
        )


def is_extraction(data: Any) -> bool:
    """Whether a document asks for an adapter (see `weft.recipes.extraction`)."""
    mapping = isinstance(data, dict) and "merge_method" not in data
    return mapping and any(key in data for key in EXTRACTION)


def modernise(document: Document) -> list[str]:
    """Rewrites old spellings in place; a line about each."""
    data = document.data
    if not isinstance(data, dict):
        return []
    notes = []
    if "model_parameters" in data and "input_model_parameters" not in data:
        rename(document, (), data, "model_parameters", "input_model_parameters")
        notes.append("`model_parameters` is read as `input_model_parameters`")
    if data.get("input_model_parameters"):
        notes.append(
            "`input_model_parameters` counts after a slice's own parameters and before the recipe's"
        )
    if "out_path" in data:
        named = "name" not in data and isinstance(data["out_path"], str)
        if named:
            rename(document, (), data, "out_path", "name")
            data["name"] = data["name"].rstrip("/") or data["name"]
        else:
            del data["out_path"]
        notes.append(
            "`out_path` is not written to: "
            + ("other documents may name the model by it" if named else "the output is given by -o")
        )
    source = data.get("tokenizer_source")
    if isinstance(source, str) and source.startswith("model:"):
        data["tokenizer_source"] = source.removeprefix("model:")
        notes.append(f"`tokenizer_source: {source}` is read as `{data['tokenizer_source']}`")
    if count := _patterns(document, data, ()):
        notes.append(f"`pattern` is read as `filter` ({count} of them)")
    return notes


def _patterns(document: Document, data: Any, loc: Loc) -> int:
    """Calls `pattern` beside `value` what it is called today."""
    if isinstance(data, list):
        return sum(_patterns(document, each, (*loc, i)) for i, each in enumerate(data))
    if not isinstance(data, dict):
        return 0
    old = set(data) == {"value", "pattern"}
    if old:
        rename(document, loc, data, "pattern", "filter")
    return old + sum(_patterns(document, each, (*loc, key)) for key, each in data.items())


def rename(document: Document, loc: Loc, data: dict[str, Any], old: str, new: str) -> None:
    """Another key for the same value, which keeps its place in the file."""
    data[new] = data.pop(old)
    start = (*loc, old)
    moved = {
        (*loc, new, *at[len(start) :]): position
        for at, position in document.positions.items()
        if at[: len(start)] == start
    }
    document.positions.update(moved)
