"""What a method needs of a recipe: how many models, a base, parameters, layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft import methods
from weft.recipes._faults import to_write
from weft.recipes.parameters import base_of, example, levels

if TYPE_CHECKING:
    from collections.abc import Collection

    from weft.methods import Method, Parameter
    from weft.recipes._faults import Faults
    from weft.recipes._yaml import Document, Loc
    from weft.recipes.records import ModelName, Module, Recipe, Settings, Slice, Source


@dataclass(frozen=True, slots=True)
class Place:
    """A slice, with the places in the YAML of what it is made of."""

    module: Module
    slice: Slice
    loc: Loc
    sources: tuple[Loc, ...]
    whole_models: bool  # a list of `models`


def check(
    recipe: Recipe,
    places: list[Place],
    document: Document,
    faults: Faults,
    meant: Collection[str],
) -> list[str]:
    """Adds to `faults` whatever the method could not work with; lines to say even if it can."""
    own = methods.method(recipe.method)
    checker = _Checker(recipe, own, document, faults, meant)
    for place in places:
        checker.check(place)
    return list(dict.fromkeys(checker.notes))


def _no_layers(start: int, stop: int) -> tuple[str, str]:
    """What is wrong with a range of layers, and what to write."""
    if min(start, stop) < 0:
        return (
            f"layer {min(start, stop)} is none: layers are counted from 0 on, not from the end",
            "layer_range: [0, 8] are the first eight; write their number for the end",
        )
    what = f"layers {start} to {stop} go backwards: the first comes first, then the one after the"
    return f"{what} last", f"layer_range: [{stop}, {start}]"


class _Checker:
    def __init__(
        self,
        recipe: Recipe,
        own: Method,
        document: Document,
        faults: Faults,
        meant: Collection[str],
    ) -> None:
        self.recipe, self.own, self.document = recipe, own, document
        self.faults, self.meant = faults, meant
        self.notes: list[str] = []

    def check(self, place: Place) -> None:
        base = base_of(self.recipe, place.slice)
        self._twice(place)
        self._base(place, base)
        self._count(place, base)
        self._lengths(place)
        self._required(place, base)
        self._densities(place, base)
        self._selection(place)
        self._way(place)
        if self.recipe.method.startswith("della"):
            self._della(place, base)

    def _twice(self, place: Place) -> None:
        seen: set[ModelName] = set()
        for source, loc in zip(place.slice.sources, place.sources, strict=True):
            if source.model in seen:
                self.faults.add(
                    self.document,
                    loc,
                    f"{source.model} stands twice in what is merged into one tensor",
                    "name it once, with the sum of the weights",
                )
            seen.add(source.model)

    def _base(self, place: Place, base: ModelName | None) -> None:
        method, models = self.recipe.method, [source.model for source in place.slice.sources]
        if base is None:
            if self.own.BASE == "required":
                self.faults.add(
                    self.document,
                    ("merge_method",),
                    f"{method} needs a base_model",
                    "name the model that the merge starts from, which may be one of them:\n"
                    f"base_model: {next((m.path for m in models if m.adapters), 'path/or/id')}",
                )
        elif self.own.BASE == "none":
            if place.whole_models and place.sources[-1] == ("base_model",):
                self.notes.append(
                    f"{base} is merged like the others: to {method} a base is a model like any "
                    "other, and it is not among the models"
                )
        elif base not in models:
            layers = place.slice.sources[0].layers or (0, 0)
            self.faults.add(
                self.document,
                place.loc,
                f"the base {base} is not among the sources of the slice, and {method} takes "
                "task vectors against it",
                f"add to `sources`:\n- model: {base}\n  layer_range: [{layers[0]}, {layers[1]}]",
            )

    def _count(self, place: Place, base: ModelName | None) -> None:
        apart = self.own.BASE != "none"
        models = [s for s in place.slice.sources if not apart or s.model != base]
        least, most = self.own.INPUTS
        # Where the base is missing, it may be one of them: that has been said.
        counts = {len(models), len(models) - (self.own.BASE == "required" and base is None)}
        if any(least <= count and (most is None or count <= most) for count in counts):
            return
        wanted = f"{least} or more" if most is None else f"{least} to {most}"
        wanted = f"exactly {least}" if least == most else wanted
        beside = " beside the base" if apart and base else ""
        cure = None
        if len(models) == 1 and not (apart and base) and self.recipe.method != "passthrough":
            cure = "to copy one model, or layers of it, write `merge_method: passthrough`"
        elif most is not None and len(models) > most:
            cure = self._for_more(len(models))
        self.faults.add(
            self.document,
            place.loc,
            f"{self.recipe.method} takes {wanted} model{'s' if wanted[-1] != '1' else ''}{beside}, "
            f"and there {'is' if len(models) == 1 else 'are'} {len(models)}",
            cure,
        )

    def _for_more(self, count: int) -> str | None:
        able = [
            name
            for name in methods.names()
            for least, most in [methods.method(name).INPUTS]
            if least <= count and (most is None or count <= most)
        ]
        return f"of {count} models: {', '.join(able)}" if able else None

    def _lengths(self, place: Place) -> None:
        lengths = [s.layers[1] - s.layers[0] for s in place.slice.sources if s.layers]
        for source, loc in zip(place.slice.sources, place.sources, strict=True):
            if source.layers is None:
                continue
            start, stop = source.layers
            if not 0 <= start <= stop:
                what, cure = _no_layers(start, stop)
                self.faults.add(self.document, (*loc, "layer_range"), what, cure)
            elif stop - start != lengths[0]:
                self.faults.add(
                    self.document,
                    (*loc, "layer_range"),
                    f"{stop - start} layers of {source.model}, but {lengths[0]} of "
                    f"{place.slice.sources[0].model} in the same slice",
                    "every source of a slice gives as many layers",
                )

    def _required(self, place: Place, base: ModelName | None) -> None:
        for name, parameter in self.own.PARAMETERS.items():
            if not parameter.required or name in self.meant:
                continue
            if not parameter.each:
                if not self._said(name, place, None):
                    line = f"{name}: {example(parameter)}"
                    self.faults.add(
                        self.document,
                        ("merge_method",),
                        f'{self.recipe.method} needs "{name}": {parameter.what}',
                        to_write(self.document, (), line, "of the recipe"),
                    )
                continue
            for source, loc in zip(place.slice.sources, place.sources, strict=True):
                is_base = source.model == base
                if is_base and not parameter.base_too:
                    continue
                if not self._said(name, place, source.model):
                    self._missing(name, parameter, place, source, loc)

    def _missing(
        self, name: str, parameter: Parameter, place: Place, source: Source, loc: Loc
    ) -> None:
        method = self.recipe.method
        cure = to_write(self.document, loc, f"{name}: {example(parameter)}", f"of {source.model}")
        if loc == ("base_model",):
            cure = (
                f"{method} takes a base for one more model: leave `base_model` out, or list it "
                f"among the models with\nparameters:\n  {name}: {example(parameter)}"
            )
        elif len(place.slice.sources) == 1:
            cure += (
                "\nbut of one model nothing is merged: "
                "to copy it, or layers of it, write `merge_method: passthrough`"
            )
        self.faults.add(
            self.document,
            loc,
            f'{source.model} has no "{name}", and {method} needs one of every model'
            + (": the list under it is empty" if source.parameters.get(name) == () else ""),
            cure,
        )

    def _said(self, name: str, place: Place, model: ModelName | None) -> bool:
        return any(
            condition.value != ()
            for level in levels(self.recipe, place.module, place.slice, model)
            for condition in level.get(name, ())
        )

    def _densities(self, place: Place, base: ModelName | None) -> None:
        models = [source.model for source in place.slice.sources]
        if self.recipe.method == "task_arithmetic":
            idle = [
                name
                for name in ("density", "rescale")
                if any(self._said(name, place, model) for model in [None, *models])
            ]
            if idle:
                what = f"{' and '.join(idle)} change{'s' * (len(idle) == 1)} nothing"
                self.notes.append(
                    f"task_arithmetic keeps all of a task vector: {what}, here as in "
                    "MergeKit; ties, dare_linear and others drop some"
                )
            return
        for source in place.slice.sources:
            density = self._constant("density", place, source.model)
            if (
                "density" in self.own.PARAMETERS
                and density
                and density > 1
                and source.model != base
            ):
                self.notes.append(
                    f"a density of {density:g} keeps all of {source.model}: it is a share, up to 1"
                )

    def _selection(self, place: Place) -> None:
        share = self._constant("select_topk", place, None)
        if share and share > 1:
            self.notes.append(f"a select_topk of {share:g} selects all: it is a share, up to 1")

    def _way(self, place: Place) -> None:
        """Slerp beyond its two ends is a formula, too, and hardly ever meant."""
        beyond = [t for t in self._values("t", place) if not 0 <= t <= 1]
        if self.recipe.method == "slerp" and beyond:
            self.notes.append(
                f"a t of {beyond[0]:g} goes beyond the two models, the base at 0 and the other at "
                "1: slerp extrapolates, here as in MergeKit"
            )

    def _della(self, place: Place, base: ModelName | None) -> None:
        """MagPrune drops with probabilities from density − ε to density + ε: both inside (0, 1)."""
        for source, loc in zip(place.slice.sources, place.sources, strict=True):
            if source.model == base:
                continue
            density = self._constant("density", place, source.model)
            epsilon = self._constant("epsilon", place, source.model)
            if density is None or epsilon is None:
                continue
            if not 0 < density < 1:
                if epsilon > 0.5:
                    what = f"an epsilon of {epsilon:g} changes nothing where the density is"
                    self.notes.append(f"{what} {density:g}")
                continue
            if density + epsilon >= 1 or density - epsilon <= 0:
                room = min(density, 1 - density)
                self.faults.add(
                    self.document,
                    loc,
                    f"density {density:g} ± epsilon {epsilon:g} of {source.model} leaves what is "
                    "between 0 and 1",
                    f"write an epsilon below {room:g}, such as\n"
                    f"parameters:\n  epsilon: {room / 2:g}",
                )

    def _values(self, name: str, place: Place) -> list[float]:
        """All values of a parameter of all, those of gradients and filters too."""
        found = [
            value
            for level in levels(self.recipe, place.module, place.slice, None)
            for condition in level.get(name, ())
            for value in (
                condition.value if isinstance(condition.value, tuple) else (condition.value,)
            )
        ]
        return [float(value) for value in found]

    def _constant(self, name: str, place: Place, model: ModelName | None) -> float | None:
        """The parameter (of all, if `model` is None), if it is one number for all tensors."""
        for level in levels(self.recipe, place.module, place.slice, model):
            settings: Settings = level
            for condition in settings.get(name, ()):
                plain = condition.filter in (None, "*") and isinstance(condition.value, int | float)
                return float(condition.value) if plain else None  # type: ignore[arg-type]
        parameter = self.own.PARAMETERS.get(name)
        return float(parameter.default) if parameter and parameter.default is not None else None  # type: ignore[arg-type]
