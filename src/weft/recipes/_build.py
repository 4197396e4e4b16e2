"""From the keys of a document to the records of a recipe."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from weft import methods
from weft.recipes import _checks, _names, schema
from weft.recipes._faults import position, unknown
from weft.recipes._settings import SettingsReader
from weft.recipes._yaml import place
from weft.recipes.records import (
    ModelName,
    Module,
    Recipe,
    Slice,
    Source,
    Token,
    Tokenizer,
)

if TYPE_CHECKING:
    from weft.recipes._faults import Faults
    from weft.recipes._yaml import Document, Loc
    from weft.recipes.records import Settings

_DTYPES = ("float32", "float16", "bfloat16", "float64")
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")


class Builder:
    """Makes one recipe; what is wrong goes to `faults`."""

    def __init__(
        self,
        document: Document,
        faults: Faults,
        parsed: schema.Document,
        popped: set[str],
        notes: list[str],
    ) -> None:
        self.document, self.faults, self.parsed, self.notes = document, faults, parsed, notes
        self.no_names: set[str] = set()  # what should name models and does not
        self.method = self._method()
        self.settings = SettingsReader(document, faults, self.method)
        self.settings.meant |= popped
        if "parameters" in popped:
            self.settings.meant |= set(self.settings.known or ())
        self.base = self._model(parsed.base_model, ("base_model",))
        self.places: list[_checks.Place] = []
        self.by_model = self._by_model()

    def build(self) -> Recipe:
        """The recipe; of use only if no fault was added."""
        parsed = self.parsed
        recipe = Recipe(
            name=(parsed.name or "").rstrip("/") or None,
            method=self.method or parsed.merge_method,
            modules=self._modules(),
            base_model=self.base,
            parameters=self.settings.read(parsed.parameters, ("parameters",)),
            dtype=self._dtype("dtype", parsed.dtype),
            out_dtype=self._dtype("out_dtype", parsed.out_dtype),
            tokenizer=self._tokenizer(),
            chat_template=self._chat_template(),
            text=self.document.text,
            positions={place(loc): at for loc, at in self.document.positions.items() if loc},
        )
        self._strangers(recipe)
        if self.method:
            self.notes += _checks.check(
                recipe, self.places, self.document, self.faults, self.settings.meant
            )
        return replace(recipe, notes=(*self.notes, *self.settings.notes))

    def _method(self) -> str | None:
        name = self.parsed.merge_method
        if name in methods.names():
            return name
        what = unknown("merge_method", name, methods.names())
        cure = "known: " + ", ".join(methods.names())
        self.faults.add(self.document, ("merge_method",), what, cure)
        return None

    def _model(self, found: str | schema.ModelMapping | None, loc: Loc) -> ModelName | None:
        if found is None:
            return None
        try:
            return _names.model(found)
        except _names.NoName as error:
            what, cure = error.args
            self.faults.add(self.document, loc, what, cure)
            self.no_names.add(str(found))
            return ModelName(str(found))

    def _modules(self) -> tuple[Module, ...]:
        parsed = self.parsed
        layouts = [key for key in parsed.LAYOUTS if getattr(parsed, key)]
        if len(layouts) != 1:
            said = " and ".join(f'"{key}"' for key in layouts)
            what = (
                f"{said} in one recipe: only one of them can say what is merged"
                if layouts
                else "nothing to merge: neither models, nor slices, nor modules"
            )
            cure = None if layouts else "models:\n  - model: org/name\n  - model: org/other"
            self.faults.add(self.document, (layouts[1],) if layouts else (), what, cure, key=True)
        parts = (parsed.modules or {}).items()
        modules = [self._module(name, each, ("modules", name)) for name, each in parts]
        modules = modules or [self._module(None, parsed, ())]
        if len(layouts) != 1:
            self.places.clear()  # nobody can tell what the method would work on
        return tuple(modules)

    def _module(
        self, name: str | None, found: schema.OutputModule | schema.Document, loc: Loc
    ) -> Module:
        if name is not None and bool(found.models) == bool(found.slices):
            what = f'module "{name}" has ' + ("both" if found.models else "neither of")
            self.faults.add(self.document, loc, what + ' "models" and "slices"', key=True)
        whole = name is None
        settings = {} if whole else self.settings.read(found.parameters, (*loc, "parameters"))
        made = []
        if found.models:
            made.append(self._models(found.models, (*loc, "models")))
        for number, each in enumerate(found.slices or []):
            made.append(self._slice(each, (*loc, "slices", number)))
        module = Module(name, tuple(slice for slice, _ in made), settings, place(loc))
        for slice, locs in made:
            at = locs[0][:-2] if not found.models else (*loc, "models")
            self.places.append(_checks.Place(module, slice, at, locs, bool(found.models)))
        return module

    def _models(self, found: list[schema.InputModel], loc: Loc) -> tuple[Slice, tuple[Loc, ...]]:
        locs: list[Loc] = [(*loc, number) for number in range(len(found))]
        sources = [self._source(each, at, None, {}) for each, at in zip(found, locs, strict=True)]
        if self.base and all(source.model != self.base for source in sources):
            own = self._own(self.base, {}, {})
            sources.append(Source(self.base, None, own, "base_model"))
            locs.append(("base_model",))
        return Slice(tuple(sources), None, {}, place(loc)), tuple(locs)

    def _slice(self, found: schema.OutputSlice, loc: Loc) -> tuple[Slice, tuple[Loc, ...]]:
        if found.residual_weight is not None:
            self.notes.append(
                f"`residual_weight` is used by nothing ({place(loc)}, line "
                f"{position(self.document, (*loc, 'residual_weight'))[0]})"
            )
        settings = self.settings.read(found.parameters, (*loc, "parameters"))
        locs = tuple((*loc, "sources", number) for number in range(len(found.sources)))
        sources = tuple(
            self._source(each, at, each.layer_range, settings)
            for each, at in zip(found.sources, locs, strict=True)
        )
        base = self._model(found.base_model, (*loc, "base_model"))
        return Slice(sources, base, settings, place(loc)), locs

    def _source(
        self,
        found: schema.InputModel,
        loc: Loc,
        layers: tuple[int, int] | None,
        of_slice: Settings,
    ) -> Source:
        model = self._model(found.model, (*loc, "model"))
        assert model is not None
        own = self.settings.read(found.parameters, (*loc, "parameters"), of_model=True)
        return Source(model, layers, self._own(model, own, of_slice), place(loc))

    def _own(self, model: ModelName, own: Settings, of_slice: Settings) -> Settings:
        """With what `input_model_parameters` says, which counts after the slice's parameters.

        The conditions of all three follow each other in one list: the first that matches counts.
        """
        for name, conditions in self.by_model.get(model, {}).items():
            own[name] = (*own.get(name, ()), *of_slice.get(name, ()), *conditions)
        return own

    def _by_model(self) -> dict[ModelName, Settings]:
        found = {}
        for text, settings in (self.parsed.input_model_parameters or {}).items():
            loc: Loc = ("input_model_parameters", text)
            model = self._model(text, loc)
            assert model is not None
            found[model] = self.settings.read(settings, loc, of_model=True)
        return found

    def _strangers(self, recipe: Recipe) -> None:
        for text in self.parsed.input_model_parameters or {}:
            if self._model(text, ("input_model_parameters", text)) not in recipe.models():
                self.faults.add(
                    self.document,
                    ("input_model_parameters", text),
                    f'"{text}" is none of the models',
                    "the models are: " + ", ".join(str(each) for each in recipe.models()),
                    key=True,
                )

    def _dtype(self, key: str, found: str | None) -> str | None:
        if found is None:
            return None
        name = _SHORT.get(found.lower(), found.removeprefix("torch."))
        if name in _DTYPES:
            if found.lower() in _SHORT:
                self.notes.append(f"`{key}: {found}` is read as `{key}: {name}`")
            return name
        what = unknown("dtype", found, _DTYPES)
        if re.fullmatch(r"bool|u?int\d*", name):  # int64 is one to MergeKit
            what = f"{key}: {found} would make whole numbers of the weights, and most of them 0"
        cure = "one of " + ", ".join(_DTYPES)
        self.faults.add(self.document, (key,), what, cure)
        return None

    def _chat_template(self) -> str | None:
        found = self.parsed.chat_template
        if not found or found in _TEMPLATES or (len(found) >= 20 and "{" in found):
            return found or None
        what = unknown("chat_template", found, _TEMPLATES)
        cure = f"one of {', '.join(_TEMPLATES)}, or a Jinja template of 20 characters and more"
        self.faults.add(self.document, ("chat_template",), what, cure)
        return None

    def _tokenizer(self) -> Tokenizer | None:
        mapping, source = self.parsed.tokenizer, self.parsed.tokenizer_source
        if mapping is not None and source is not None:
            what = '"tokenizer" and "tokenizer_source" in one recipe'
            cure = "keep `tokenizer`, with the other as its `source`"
            self.faults.add(self.document, ("tokenizer_source",), what, cure, key=True)
        if mapping is None:
            loc: Loc = ("tokenizer_source",)
            return None if source is None else Tokenizer(self._tokens_from(source, loc))
        tokens = {
            name: self._token(each, ("tokenizer", "tokens", name))
            for name, each in (mapping.tokens or {}).items()
        }
        whole = self._tokens_from(mapping.source, ("tokenizer", "source"))
        return Tokenizer(whole, tokens, mapping.pad_to_multiple_of)

    def _tokens_from(self, found: str | schema.ModelMapping, loc: Loc) -> str | ModelName:
        if found in ("union", "base"):
            return str(found)
        model = self._model(found, loc)
        assert model is not None
        return model

    def _token(self, found: schema.TokenSource, loc: Loc) -> Token:
        source = found.source
        if not isinstance(source, schema.TokenKind):
            return Token(self._model(source, (*loc, "source")), force=found.force)
        if source.kind == "zero":
            return Token(zero=True, force=found.force)
        if source.model is None or (source.token is None) == (source.token_id is None):
            what = "`kind: model_token` needs a model, and either token or token_id"
            cure = "source:\n  kind: model_token\n  model: org/name\n  token: <|end|>"
            self.faults.add(self.document, (*loc, "source"), what, cure)
        model = self._model(source.model, (*loc, "source", "model"))
        return Token(model, False, source.token, source.token_id, found.force)
