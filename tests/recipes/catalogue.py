"""MergeKit's methods by name, without their arithmetic: what a recipe is checked against."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from weft import methods

GOLDENS = json.loads((Path(__file__).parent / "goldens.json").read_text())
TYPES = {"float": float, "int": int, "bool": bool, "str": str}
BASES = {"required": "required", "optional": "optional", "ignored": "none"}


def parameter(method: str, name: str, spec: dict[str, Any]) -> methods.Parameter:
    """With Weft's range, for MergeKit has none."""
    known = methods.method(method).PARAMETERS if method in methods.names() else {}
    own = known.get(name, methods.Parameter(""))
    return methods.Parameter(
        "as in MergeKit",
        TYPES[spec["type"]],
        spec["default"],
        each=spec["scope"] != "shared",
        base_too=spec["scope"] == "input",
        optional=not spec["required"],
        low=own.low,
        high=own.high,
    )


def stand_in(method: str, spec: dict[str, Any]) -> SimpleNamespace:
    """What a file of `weft.methods` says, made from MergeKit's own specification."""
    base = BASES[spec["base"]]
    least, most = spec["inputs"]
    if base == "required":
        least, most = max(least - 1, 1), most and most - 1
    elif base == "optional":
        least, most = spec["non_base"]
    return SimpleNamespace(
        USE_WHEN="never",
        PARAMETERS={
            name: parameter(method, name, each) for name, each in spec["parameters"].items()
        },
        BASE=base,
        INPUTS=(least, most),
    )


def all_of_mergekit() -> dict[str, SimpleNamespace]:
    """Stand-ins for all of MergeKit's methods, by name."""
    return {name: stand_in(name, spec) for name, spec in GOLDENS["specs"].items()}
