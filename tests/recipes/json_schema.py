"""As much of JSON Schema as the recipe's schema uses, by its specification."""

from __future__ import annotations

import re
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}
# Said about a value, and not asked of it.
WORDS = {"title", "description", "default", "deprecated", "enumDescriptions", "$schema", "$defs"}


def problems(schema: dict[str, Any], data: Any) -> list[str]:
    return _problems(schema, data, schema, "")


def _problems(schema: Any, data: Any, root: Any, at: str) -> list[str]:
    found = []
    for word, want in schema.items():
        if word in WORDS or word in ("properties", "additionalProperties", "prefixItems"):
            continue
        found += CHECKS[word](want, data, root, at)
    if isinstance(data, dict):
        own = schema.get("properties", {})
        for key, value in data.items():
            rest = schema.get("additionalProperties", True)
            if key in own:
                found += _problems(own[key], value, root, f"{at}.{key}")
            elif rest is False:
                found.append(f"{at}: {key}")
            elif rest is not True:
                found += _problems(rest, value, root, f"{at}.{key}")
    if isinstance(data, list):
        first = schema.get("prefixItems", [])
        for number, (want, value) in enumerate(zip(first, data, strict=False)):
            found += _problems(want, value, root, f"{at}[{number}]")
    return found


def _one_of(number: Any) -> Any:
    def check(want: Any, data: Any, root: Any, at: str) -> list[str]:
        fits = sum(not _problems(each, data, root, at) for each in want)
        return [] if number(fits) else [f"{at}: fits {fits} of {len(want)} forms"]

    return check


def _type(want: Any, data: Any, root: Any, at: str) -> list[str]:
    wanted = want if isinstance(want, list) else [want]
    fits = any(
        isinstance(data, TYPES[each]) and (each == "boolean" or not isinstance(data, bool))
        for each in wanted
    )
    return [] if fits else [f"{at}: no {want}"]


def _reference(want: str, data: Any, root: Any, at: str) -> list[str]:
    return _problems(root["$defs"][want.removeprefix("#/$defs/")], data, root, at)


def _items(want: Any, data: Any, root: Any, at: str) -> list[str]:
    if not isinstance(data, list):
        return []
    return [each for value in data for each in _problems(want, value, root, f"{at}[]")]


def _if(holds: Any) -> Any:
    def check(want: Any, data: Any, root: Any, at: str) -> list[str]:
        return [] if holds(want, data) else [f"{at}: {want}"]

    return check


CHECKS: dict[str, Any] = {
    "type": _type,
    "$ref": _reference,
    "anyOf": _one_of(lambda fits: fits > 0),
    "oneOf": _one_of(lambda fits: fits == 1),
    "items": _items,
    "enum": _if(lambda want, data: data in want),
    "const": _if(lambda want, data: data == want),
    "required": _if(lambda want, data: not isinstance(data, dict) or set(want) <= set(data)),
    "minItems": _if(lambda want, data: not isinstance(data, list) or len(data) >= want),
    "maxItems": _if(lambda want, data: not isinstance(data, list) or len(data) <= want),
    "minimum": _if(lambda want, data: not isinstance(data, int | float) or data >= want),
    "maximum": _if(lambda want, data: not isinstance(data, int | float) or data <= want),
    "pattern": _if(lambda want, data: not isinstance(data, str) or re.search(want, data)),
}
