"""`parameters:` of one place, with the values in the types that the method asks for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from weft import methods
from weft.recipes._faults import nearest, position, to_write, unknown
from weft.recipes._others import OBSOLETE
from weft.recipes._yaml import place
from weft.recipes.parameters import example
from weft.recipes.records import Condition

if TYPE_CHECKING:
    from weft.methods import Parameter
    from weft.recipes import schema
    from weft.recipes._faults import Faults
    from weft.recipes._yaml import Document, Loc
    from weft.recipes.records import Scalar, Settings

_TRUE = {"true", "yes", "on", "y", "t", "1"}
_FALSE = {"false", "no", "off", "n", "f", "0"}


class SettingsReader:
    """Reads settings for one method.

    Attributes:
        meant: Parameters that are not missing, though no value of them could be read.
        notes: What is of no use, by line.
    """

    def __init__(self, document: Document, faults: Faults, method: str | None) -> None:
        self.document, self.faults, self.method = document, faults, method
        self.known = methods.method(method).PARAMETERS if method else None
        self.meant: set[str] = set()
        self.notes: dict[str, None] = {}

    def read(
        self, found: schema.Parameters | None, loc: Loc, *, of_model: bool = False
    ) -> Settings:
        """The settings at `loc`; `of_model`: of one model, which cannot set what all share."""
        settings: Settings = {}
        for name, setting in (found or {}).items():
            parameter = self.known.get(name) if self.known is not None else None
            if parameter is None:
                meant = self._unknown(name, (*loc, name))
                if meant:  # whoever wrote `wieght` has not forgotten `weight`
                    settings.setdefault(meant, (Condition(1.0),))
            elif of_model and not parameter.each:
                self._shared(name, setting, (*loc, name))
            else:
                settings[name] = self._conditions(name, parameter, setting, (*loc, name))
        return settings

    def _unknown(self, name: str, loc: Loc) -> str | None:
        """Says that nothing reads it; returns what was probably meant."""
        if self.known is None:
            return None
        if name in OBSOLETE:
            self.notes[f"`{name}` {OBSOLETE[name]}"] = None
            return None
        others = [each for each in methods.names() if name in methods.method(each).PARAMETERS]
        if others:
            self.notes[
                f"`{name}` is a parameter of {_some(others)}; "
                f"{self.method} does not read it, here as in MergeKit"
            ] = None
            return None
        own = ", ".join(self.known) or "none"
        what = unknown("parameter", name, self.known)
        self.faults.add(
            self.document, loc, what, f"{self.method} has: {own}" if self.known else None, key=True
        )
        return nearest(name, self.known)

    def _shared(self, name: str, setting: schema.Setting, loc: Loc) -> None:
        self.meant.add(name)
        value = setting if isinstance(setting, bool | int | float | str) else "..."
        shown = str(value).lower() if isinstance(value, bool) else value
        self.faults.add(
            self.document,
            loc,
            f'"{name}" is one for all models in {self.method}, and would not be read under a model',
            to_write(self.document, (), f"{name}: {shown}", "of the recipe or of a slice"),
            key=True,
        )

    def _conditions(
        self, name: str, parameter: Parameter, setting: schema.Setting, loc: Loc
    ) -> tuple[Condition, ...]:
        if setting == []:
            self._nothing(name, loc)
            return ()
        entries = setting if isinstance(setting, list) else [setting]
        made = []
        for number, each in enumerate(entries):
            at = (*loc, number) if isinstance(setting, list) else loc
            if isinstance(each, bool | int | float | str):
                return (Condition(self._values(name, parameter, setting, loc)),)
            value = self._values(name, parameter, each.value, (*at, "value"))
            if value == ():
                self._nothing(name, (*at, "value"))
            made.append(Condition(value, each.filter))
        return tuple(made)

    def _nothing(self, name: str, loc: Loc) -> None:
        """An empty list: MergeKit takes it for nothing said."""
        line, _ = position(self.document, loc)
        at = f"{place(loc)}, line {line}"
        self.notes[f"`{name}` is an empty list, which says nothing, as in MergeKit ({at})"] = None

    def _values(
        self, name: str, parameter: Parameter, value: object, loc: Loc
    ) -> Scalar | tuple[Scalar, ...]:
        if isinstance(value, list):
            return tuple(
                self._scalar(name, parameter, each, (*loc, i)) for i, each in enumerate(value)
            )
        return self._scalar(name, parameter, value, loc)

    def _scalar(self, name: str, parameter: Parameter, value: object, loc: Loc) -> Scalar:
        made = convert(parameter.type, value)
        words = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
        if made is None:
            what = f'"{name}" should be {words[parameter.type]}, not {_shown(value)}'
            self.faults.add(self.document, loc, what, f"such as {name}: {example(parameter)}")
            return 0
        if not parameter.allows(made):
            allowed = parameter.range or "a number that float32 knows, up to 3.4e38"
            what = f'"{name}" should be {allowed}, not {made:g}'
            self.faults.add(
                self.document, loc, what, f"{parameter.what}: {_possible(name, parameter)}"
            )
        return made


def convert(kind: type, value: object) -> Scalar | None:
    """`value` as `kind`, or None; numbers may be text, as `1e-3` is in YAML 1.1."""
    if kind is str:
        return value if isinstance(value, str) else None
    if kind is bool:
        word = f"{value:g}" if isinstance(value, float) else str(value).lower()
        return (word in _TRUE) if word in _TRUE | _FALSE else None
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    if kind is int:
        return int(number) if number.is_integer() else None
    return number


def _possible(name: str, parameter: Parameter) -> str:
    """A value to write, in the range of the parameter."""
    shown = parameter.default if parameter.default is not None else max(parameter.low, 0.0) + 0.001
    return f"such as {name}: {shown:g}"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
