"""The form of a document: what the schema refuses, in words, and put right where that is safe.

What was put right is wrong all the same; it only keeps one mistake from hiding the others, or from
causing more.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from weft import methods
from weft.recipes import schema
from weft.recipes._faults import nearest, unknown
from weft.recipes._others import EXTRACTION, rename

if TYPE_CHECKING:
    from weft.recipes._faults import Faults
    from weft.recipes._yaml import Document, Loc
    from weft.recipes.schema import Mistake

# Without these nothing more can be said about a recipe.
_VITAL = {"merge_method", "models", "slices", "sources", "modules", "model", "layer_range"}
# What MergeKit's programs take on the command line, and people write into the file.
_OPTIONS = (
    *("random_seed", "lazy_unpickle", "low_cpu_memory", "trust_remote_code", "allow_crimes"),
    *("copy_tokenizer", "clone_tensors", "out_shard_size", "write_model_card", "cuda", "device"),
    *("lora_merge_cache", "lora_merge_dtype", "transformers_cache", "async_write", "verbose"),
    *("safe_serialization", "read_to_gpu", "multi_gpu", "num_threads", "gpu_rich"),
)
_SHAPES = {
    "tokenizer": "tokenizer:\n  source: base",
    "layer_range": "layer_range: [0, 32]",
    "model": "- model: org/name",
    "sources": "sources:\n  - model: org/name\n    layer_range: [0, 32]",
    "merge_method": "merge_method: linear",
    "value": "- filter: mlp\n  value: 0.5",
    "path": "model:\n  model: {path: ./folder}",
}


def form(document: Document, faults: Faults) -> tuple[schema.Document | None, set[str]]:
    """The document by its keys, or None; and the parameters whose values were refused."""
    popped: set[str] = set()
    if not isinstance(document.data, dict):
        what = "a recipe is a mapping: `merge_method: …`, `models: …`, one on a line"
        faults.add(document, (), what)
        return None, popped
    if _extraction(document, faults):
        return None, popped
    while True:
        parsed, mistakes = schema.check(document.data)
        if parsed is not None:
            return parsed, popped
        doubled = {
            each.loc[: n + 1]
            for each in mistakes
            for n, pair in enumerate(pairwise(each.loc), 1)
            if pair == ("parameters", "parameters")
        }
        for loc in doubled:
            _hoist(document, faults, loc)
        if doubled:
            continue
        unknowns = [each for each in mistakes if each.kind == "unknown"]
        rest = [each for each in mistakes if each.kind != "unknown"]
        for each in unknowns:
            _unknown(document, faults, each)
        if unknowns:
            continue  # a misspelt key is missing, too
        right = [_put_right(document, faults, each, popped) for each in rest]
        if not all(right):
            return None, popped


def _extraction(document: Document, faults: Faults) -> bool:
    """An extraction recipe with a merge_method; true if nothing of a merge is left without it."""
    data = document.data
    if "merge_method" not in data:
        return False
    own = [key for key in EXTRACTION if key in data]
    for key in own:
        faults.add(
            document,
            (key,),
            f'"{key}" asks for an adapter, and "merge_method" for a merge of models',
            "for an adapter leave `merge_method` out; for a merge, this",
            key=True,
        )
        data.pop(key)
    return bool(own) and not any(key in data for key in schema.Document.LAYOUTS)


def _hoist(document: Document, faults: Faults, loc: Loc) -> None:
    """`parameters` within `parameters`: read as if its lines stood where they belong."""
    outer = _parent(document.data, loc)
    inner = outer.pop("parameters")
    lines = inner.items() if isinstance(inner, dict) else ()
    cure = "\n".join(["parameters:", *(f"  {name}: {_short(each)}" for name, each in lines)])
    faults.add(document, loc, '"parameters" stands within `parameters`', cure, key=True)
    for name, each in lines:
        outer.setdefault(name, each)


def _parent(data: Any, loc: Loc) -> Any:
    for each in loc[:-1]:
        data = data[each]
    return data


def _unknown(document: Document, faults: Faults, mistake: Mistake) -> None:
    """A key that does not belong: read as the one that was meant, if that is clear."""
    *_, key = mistake.loc
    mapping = _parent(document.data, mistake.loc)
    assert isinstance(key, str)
    what, cure = unknown("key", key, mistake.known), None
    parameters = {name for each in methods.names() for name in methods.method(each).PARAMETERS}
    meant = nearest(key, mistake.known)
    if meant:
        if meant not in mapping:
            rename(document, mistake.loc[:-1], mapping, key, meant)
    elif key in parameters and "parameters" in mistake.known:
        what = f'"{key}" is a parameter'
        cure = "write it under `parameters`:\n"
        cure += "" if "parameters" in mapping else "parameters:\n"
        cure += f"  {key}: {_short(mapping[key])}"
        inside = mapping.setdefault("parameters", {})
        if isinstance(inside, dict):
            inside.setdefault(key, mapping[key])
    elif key in ("model", "layer_range") and "sources" in mistake.known:
        cure = _SHAPES["sources"]
    elif key in ("path", "revision"):
        cure = _SHAPES["path"]
    elif key == "layer_range":
        what = '"layer_range" belongs to the sources of a slice; `models` takes all layers'
        cure = f"slices:\n  - sources:\n      - model: …\n        layer_range: {mapping[key]}"
    elif key in _OPTIONS:
        what = f'"{key}" is an option of the command line'
        cure = "leave it out, and see weft run --help"
    else:
        cure = f"known here: {', '.join(mistake.known)}"
    mapping.pop(key, None)
    faults.add(document, mistake.loc, what, cure, key=True)


def _put_right(document: Document, faults: Faults, mistake: Mistake, popped: set[str]) -> bool:
    """Says what is wrong with a value, and takes it away; False if nothing is left to look at."""
    loc = mistake.loc
    key = next((each for each in reversed(loc) if isinstance(each, str)), "")
    if mistake.kind == "missing":
        faults.add(document, loc[:-1], f'"{key}" is missing', _SHAPES.get(key))
        return False
    if not loc:
        faults.add(document, loc, f"the recipe {mistake.what}")
        return False
    try:
        parent = _parent(document.data, loc)
        found = parent[loc[-1]]
    except KeyError:  # taken away with another mistake in the same setting
        return True
    cure = _SHAPES.get(key)
    ends = re.findall(r"\d+", str(found)) if key == "layer_range" else []
    ends = ["0", *ends] if len(ends) == 1 else ends
    if len(ends) == 2 and int(ends[0]) < int(ends[1]):
        cure = f"layer_range: [{', '.join(ends)}]"
    named = f'"{key}"' if loc[-1] == key else f"an entry of `{key}`"
    if isinstance(found, str) and loc[-2:-1] in (("models",), ("sources",)):
        cure = f"- model: {found}"
        faults.add(document, loc, f"{named} should be a mapping, not {_short(found)}", cure)
        parent[loc[-1]] = {"model": found}
        return loc[-2] == "models"
    what = f"{named} {mistake.what}"
    if found is not None and "empty" not in mistake.what:
        what += f", not {_short(found)}"
    entry = isinstance(loc[-1], int) and "mapping" in mistake.what
    faults.add(document, loc, what, f"- value: {_short(found)}" if entry and not cure else cure)
    while loc[-1] == "value" or not isinstance(loc[-1], str):
        loc = loc[:-1]
    if loc[-1] in _VITAL:
        return False
    popped.add(str(loc[-1]))
    _parent(document.data, loc).pop(loc[-1], None)
    return True


def _short(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = f'"{text}"' if isinstance(value, str) else text
    return text if len(text) < 60 else text[:57] + "..."
