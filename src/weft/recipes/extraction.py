"""Extraction recipes: `finetune`, `base_model`, and what `weft extract` has as options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weft.core.errors import WeftError
from weft.core.wishes import Wishes, wishes_of
from weft.recipes import _yaml
from weft.recipes._faults import Faults, unknown
from weft.recipes._names import NoName, parse
from weft.recipes._others import is_extraction

if TYPE_CHECKING:
    from weft.recipes._yaml import Document, Loc


@dataclass(frozen=True, slots=True)
class Extraction:
    """What a recipe asks for.

    Attributes:
        tuned: The model that was tuned.
        base: The one before.
        wishes: All else.
        text: Of the recipe.
    """

    tuned: str
    base: str
    wishes: Wishes
    text: str


# Key -> the argument of `wishes_of`, and the types that it takes.
_PLAIN: dict[str, tuple[str, tuple[type, ...], str]] = {
    "rank": ("rank", (int, str, list), "a number, auto, or a list of filters with values"),
    "energy": ("energy", (int, float), "a share such as 0.95"),
    "size": ("size", (int, str), "bytes, such as 50MB"),
    "alpha": ("alpha", (int, float), "a number"),
    "dtype": ("dtype", (str,), "bfloat16, float16 or float32"),
    "exclude": ("exclude", (str, list, dict), "a filter"),
    "embed": ("embed", (str,), "lora, save or skip"),
    "uniform_rank": ("uniform_rank", (bool,), "true or false"),
    "seed": ("seed", (int,), "a whole number"),
}
_FILTERS = {"targeted_modules": "target", "saved_modules": "save"}
_KEYS = ("finetune", "base_model", *_PLAIN, *_FILTERS)
_ENTRY = ("filter", "value")
_LIST = "rank:\n  - filter: self_attn\n    value: 64\n  - value: 32"


def find(text: str, name: str) -> Document | None:
    """The one document of `text`, if it is an extraction recipe."""
    documents = _yaml.load(text, name)
    alone = len(documents) == 1 and is_extraction(documents[0].data)
    return documents[0] if alone else None


def read(document: Document, name: str) -> Extraction:
    """The recipe that `find` found in the file `name`.

    Raises:
        RecipeError: What is wrong with it, all of it, each with its place.
    """
    faults = Faults(name)
    for loc, what in document.mistakes:
        faults.add(document, loc, what)
    reader = _Reader(document, faults)
    found = reader.read()
    faults.check()
    assert found is not None
    return found


class _Reader:
    def __init__(self, document: Document, faults: Faults) -> None:
        self.document, self.faults = document, faults
        self.data: dict[str, Any] = document.data

    def read(self) -> Extraction | None:
        for key in self.data:
            if key not in _KEYS:
                known = f"known here: {', '.join(_KEYS)}"
                self._fault((key,), unknown("key", key, _KEYS), known, key=True)
        models = [self._model(key) for key in ("finetune", "base_model")]
        arguments: dict[str, Any] = {}
        for key, (argument, types, form) in _PLAIN.items():
            value = self.data.get(key)
            if value is None:
                continue
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                self._fault((key,), f'"{key}" should be {form}, not {value!r}')
                continue
            if key == "exclude":
                value = self._filter(key, value)
            elif isinstance(value, list):
                arguments |= self._ranks(value)
                continue
            self._add(arguments, argument, value, (key,))
        for key, argument in _FILTERS.items():
            if self.data.get(key) is not None:
                self._add(arguments, argument, self._filter(key, self.data[key]), (key,))
        if len(self.faults) or None in models:
            return None
        try:
            wishes = wishes_of(**arguments)
        except WeftError as error:
            self._fault((), str(error), error.hint)
            return None
        tuned, base = models
        assert tuned is not None
        assert base is not None
        return Extraction(tuned, base, wishes, self.document.text)

    def _fault(self, loc: Loc, what: str, cure: str | None = None, *, key: bool = False) -> None:
        self.faults.add(self.document, loc, what, cure, key=key)

    def _add(self, arguments: dict[str, Any], name: str, value: Any, loc: Loc) -> None:
        """If it makes sense by itself."""
        try:
            wishes_of(**{name: value})
        except WeftError as error:
            self._fault(loc, str(error), error.hint)
        else:
            arguments[name] = value

    def _model(self, key: str) -> str | None:
        text = self.data.get(key)
        if not isinstance(text, str):
            said = f", and is {text!r}" if text is not None else ""
            what = f'"{key}" should name a model{said}'
            self._fault((key,), what, f"{key}: path or org/name, or model+adapter")
            return None
        try:
            parse(text)
        except NoName as error:
            self._fault((key,), *error.args)
        return text

    def _filter(self, key: str, value: Any) -> str:
        """`filter: a, b`, or the list or text alone."""
        if isinstance(value, dict):
            for each in value:
                if each != "filter":
                    what = unknown("key", each, ("filter",))
                    self._fault((key, each), what, "known here: filter", key=True)
            value = value.get("filter", "")
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            self._fault(
                (key,), f'"{key}" takes names of modules', f"{key}:\n  filter: mlp, lm_head"
            )
            return ""
        return ", ".join(parts)

    def _ranks(self, entries: list[Any]) -> dict[str, Any]:
        """A list of `filter` and `value`; the one without a filter is for all other modules."""
        own: list[tuple[str, int]] = []
        rest: dict[str, Any] = {}
        for number, entry in enumerate(entries):
            loc: Loc = ("rank", number)
            if not isinstance(entry, dict) or not {"value"} <= set(entry) <= {"filter", "value"}:
                odd = [key for key in entry if key not in _ENTRY] if isinstance(entry, dict) else ()
                for key in odd:
                    self._fault((*loc, key), unknown("key", key, _ENTRY), _LIST, key=True)
                if not odd:
                    what = 'an entry of `rank` has a "value", and mostly a "filter"'
                    self._fault(loc, what, _LIST)
            elif entry.get("filter") in (None, "*"):
                if "rank" in rest:
                    what = "a second entry of `rank` without a filter: one is for all other modules"
                    self._fault(loc, what, _LIST)
                self._add(rest, "rank", entry["value"], loc)
            elif type(entry["value"]) is not int or not isinstance(entry["filter"], str):
                self._fault(loc, "an entry of `rank` has a filter of text and a number", _LIST)
            else:
                before = len(self.faults)
                self._add({}, "ranks", [(entry["filter"], entry["value"])], loc)
                if len(self.faults) == before:
                    own.append((entry["filter"], entry["value"]))
        return rest | {"ranks": own}
