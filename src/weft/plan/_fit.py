"""Whether the models of a recipe fit each other: of each that does not, one problem.

Which one that is the others say: what most of them have counts as right, or what the base has where
as many have the one as the other. Where neither tells, all are named and none is blamed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weft.core.errors import Problem
from weft.plan._tables import is_table
from weft.plan.preflight import config_value

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from weft.core.specs import TensorJob
    from weft.plan._views import View
    from weft.recipes.records import ModelName, Recipe, Source

    Values = Sequence[tuple[Source, str]]

_WIDTHS = ("hidden_size", "n_embd", "d_model")
# Numbers in a config that shapes follow from.
_CAUSES = (
    *(*_WIDTHS, "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_experts", "num_local_experts", "vocab_size"),
)
_ONE_SIZE = "only models of one architecture and size can be merged"
_ROWS = (
    "the models have different vocabularies: write `tokenizer: {source: base}`, or `union`, and "
    "the rows are brought in one order"
)
_DEPTH = "choose as many layers of each with slices and layer_range"


@dataclass(frozen=True, slots=True)
class Side:
    """A model that differs from others; or several, of which nobody can tell who is right.

    Attributes:
        odd: The one, or all of them.
        right: What it should be like; none where nobody can tell.
        said: `64 in place of 48`, or `64 and 48`.
    """

    odd: tuple[Source, ...]
    right: tuple[Source, ...]
    said: str

    @property
    def models(self) -> tuple[ModelName, ...]:
        return tuple(source.model for source in self.odd)


def sides(
    values: Values, base: ModelName | None, blamed: Collection[tuple[ModelName, ...]] = ()
) -> list[Side]:
    """Who differs from whom, if anybody does.

    Args:
        values: Of every model.
        base: The reference where as many models have the one as the other.
        blamed: Models that are known to be at fault, and have no say.
    """
    if len({value for _, value in values}) < 2:
        return []
    heard = [each for each in values if (each[0].model,) not in blamed] or values
    counts = Counter(value for _, value in heard)
    most = [value for value, count in counts.items() if count == max(counts.values())]
    of_base = [value for source, value in heard if source.model == base and value in most]
    if len(most) > 1 and not of_base:
        said = listed([value for _, value in heard])
        return [Side(tuple(source for source, _ in heard), (), said)]
    right = (of_base or most)[0]
    others = tuple(source for source, value in heard if value == right)
    return [
        Side((source,), others, f"{value} in place of {right}")
        for source, value in values
        if value != right
    ]


def architectures(
    recipe: Recipe, views: Mapping[ModelName, View]
) -> tuple[list[Problem], set[ModelName]]:
    """Models of another architecture, as far as their configs tell."""
    found = [(s, views[s.model].config.get("architectures")) for s in _models(recipe, views)]
    told = [(source, str(names[0])) for source, names in found if isinstance(names, list) and names]
    kinds = {source.model: kind for source, kind in told}
    problems = []
    odd: set[ModelName] = set()
    for side in sides(told, recipe.base_model):
        odd |= set(side.models)
        groups: dict[str, list[Source]] = {}
        for source in (*side.odd, *side.right):
            groups.setdefault(kinds[source.model], []).append(source)
        kept = (side.right or side.odd)[0]
        renamed = next(s for s in side.odd if kinds[s.model] != kinds[kept.model])
        hint = (
            "if they are one architecture under two names, write\n"
            f"model:\n  model: {{path: {renamed.model.path}}}\n"
            f"  override_architecture: {kinds[kept.model]}"
        )
        what = ", and ".join(_are(group, kind) for kind, group in groups.items())
        problems.append(Problem(f"{what}  @ {renamed.where}", hint))
    return problems, odd


def _are(models: Sequence[Source], kind: str) -> str:
    """`a is a LlamaForCausalLM`."""
    names = listed([str(source.model) for source in models])
    return f"{names} {'is a' if len(models) == 1 else 'are each a'} {kind}"


def _models(recipe: Recipe, views: Mapping[ModelName, View]) -> list[Source]:
    """Where the recipe first takes something of each model that there is a view of."""
    found: dict[ModelName, Source] = {}
    for source in (s for module in recipe.modules for each in module.slices for s in each.sources):
        if source.model in views:
            found.setdefault(source.model, source)
    return list(found.values())


@dataclass(slots=True)
class _Misfit:
    """What is known of one side."""

    side: Side
    layers: dict[str, None] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    only_rows: bool = True


class Fit:
    """What of the models of a recipe has been compared so far."""

    def __init__(self, recipe: Recipe, views: Mapping[ModelName, View]) -> None:
        self._views = views
        self._base = recipe.base_model
        self._in_one_order = recipe.tokenizer is not None
        self._compared = False  # any shapes
        self._is_stack = any(len(module.slices) > 1 for module in recipe.modules)
        self._found: dict[tuple[ModelName, ...], _Misfit] = {}
        self._widths(recipe)

    def layers(self, path: str, counts: Sequence[tuple[Source, int]]) -> bool:
        """Whether all have as many layers under `path`."""
        found = self._differ([(source, str(count)) for source, count in counts])
        for misfit, side in found:
            misfit.layers[f"{side.said} layers in {path}"] = None
        return not found

    def shapes(self, name: str, tensors: Sequence[tuple[Source, TensorJob]]) -> bool:
        """Whether the tensor has one shape in all, or will have when its rows are in one order."""
        self._compared = True
        shapes = {source.model: job.shape for source, job in tensors}
        if len(set(shapes.values())) < 2:
            return True
        tables = [is_table(self._views[source.model], name, job) for source, job in tensors]
        if self._in_one_order and all(tables):
            return True
        found = self._differ([(source, str(list(job.shape))) for source, job in tensors])
        for misfit, side in found:
            misfit.tensors[name] = side.said
            widths = {shapes[source.model][1:] for source in (*side.odd, *side.right)}
            misfit.only_rows &= any(tables) and len(widths) == 1
        return not found

    def problems(self) -> list[Problem]:
        """One for each model that does not fit."""
        found = self._found.values()
        # Where shapes agree, what a config alone says is wrong with the config; but the layers of a
        # stack are compared with nothing else, nor is anything of models with other layers.
        known = self._compared and not self._is_stack
        told = [each for each in found if each.layers or each.tensors or not known]
        return [self._problem(misfit) for misfit in told]

    def _widths(self, recipe: Recipe) -> None:
        """All layers of a model are as wide, whichever slice they come from."""
        if [module.name for module in recipe.modules] != [None]:
            return  # towers have widths of their own
        for key in _WIDTHS:
            for misfit, _ in self._differ(self._told(key, _models(recipe, self._views))):
                misfit.only_rows = False

    def _told(self, key: str, sources: Iterable[Source]) -> Values:
        """What those configs say that say it."""
        found = [(s, config_value(dict(self._views[s.model].config), key)) for s in sources]
        return [(source, str(value)) for source, value in found if isinstance(value, int)]

    def _differ(self, values: Values) -> list[tuple[_Misfit, Side]]:
        found = sides(values, self._base, self._found)
        return [(self._found.setdefault(side.models, _Misfit(side)), side) for side in found]

    def _problem(self, misfit: _Misfit) -> Problem:
        side = misfit.side
        facts = [f"{key} {said}" for key, said in self._causes(side)]
        facts += misfit.layers
        if misfit.tensors:
            name, said = next(iter(misfit.tensors.items()))
            count = len(misfit.tensors)
            many = f"{count} tensors differ, such as {name}" if count > 1 else name
            facts.append(f"{many}: {said}")
        names = listed([str(model) for model in side.models])
        others = listed([str(source.model) for source in side.right]) or "each other"
        if others == str(self._base):
            others = f"the base {others}"
        does = "does" if len(side.odd) == 1 else "do"
        where = side.odd[0 if side.right else 1].where
        what = f"{names} {does} not fit {others}: {'; '.join(facts)}  @ {where}"
        return Problem(what, _hint(misfit))

    def _causes(self, side: Side) -> Iterable[tuple[str, str]]:
        """What the configs say that shapes follow from, where it differs."""
        for key in _CAUSES:
            values = [value for _, value in self._told(key, side.odd)]
            right = {value for _, value in self._told(key, side.right)}
            if len(values) < len(side.odd) or (side.right and len(right) != 1):
                continue  # not all say it, or those that are right in this do not agree in it
            values += right
            if len(set(values)) < 2:
                continue
            if key != "vocab_size" or not self._in_one_order:
                yield key, " in place of ".join(values) if side.right else listed(values)


def _hint(misfit: _Misfit) -> str:
    if not misfit.only_rows:
        return _ONE_SIZE
    return _DEPTH if misfit.layers else _ROWS


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if names[1:] else "".join(names)
