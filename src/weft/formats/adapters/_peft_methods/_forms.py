"""What a field of `adapter_config.json` may hold: a test of the value, and how to call it.

None (the field is not used) passes where PEFT has it as a default.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Form = tuple[Callable[[Any], bool], str]


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # false for NaN, too


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_expression(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_patterns(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not all(map(is_number, value.values())):
        return False
    return all(isinstance(p, str) and _is_expression(anywhere(p)) for p in value)


def anywhere(pattern: str) -> str:
    """A regular expression for whole paths of modules that end so."""
    return rf"(.*\.)?({pattern})$"


NUMBER: Form = (is_number, "a number")
COUNT: Form = (_is_count, "a whole number")
POSITIVE: Form = (lambda value: _is_count(value) and 0 < value < 2**31, "a whole number above 0")
INTEGER: Form = (lambda value: type(value) is int and abs(value) < 2**63, "an integer")
FLAG: Form = (_is_flag, "true or false")
TEXT: Form = (_is_text, "a string")
NAMES: Form = (is_names, "a list of names")
NAMES_OR_EXPRESSION: Form = (
    lambda value: is_names(value) or _is_expression(value),
    "a list of names or a regular expression",
)
PATTERNS: Form = (_is_patterns, "a mapping of regular expressions to numbers")


def or_none(form: Form) -> Form:
    fits, what = form
    return lambda value: value is None or fits(value), f"{what}, or null"


def choice(*values: str) -> Form:
    """One of `values`, said in the config."""
    return lambda value: value in values, f"one of {', '.join(map(repr, values))}"


def one_of(*values: Any) -> Form:
    """One of `values`, true, false or nothing: what else a newer PEFT may know is not guessed."""
    names = ", ".join(["true", "false", *map(repr, values)])
    return lambda value: _is_flag(value) or value in values, f"one of {names}"
