"""What a parameter is for one tensor: precedence, filters and gradients, as MergeKit has them.

Highest first: the source's own, the slice's, the module's, the recipe's, the method's default. A
level whose conditions match nothing, or whose list is empty, says nothing, and the next is asked.
What an input has of its own is matched against the name of *its* tensor; what all share, against
the output's, and a source is not asked for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.core.errors import WeftError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from weft.core.specs import Params
    from weft.methods import Parameter
    from weft.recipes.records import (
        Condition,
        ModelName,
        Module,
        Recipe,
        Scalar,
        Settings,
        Slice,
        Source,
    )


class MissingParameter(WeftError):
    """Nothing in the recipe says what a required parameter is for one tensor.

    Attributes:
        name: Of the parameter.
        model: Whose it is; None if all share it.
        tensor: Its name.
    """

    def __init__(
        self, name: str, parameter: Parameter, model: ModelName | None, tensor: str
    ) -> None:
        self.name, self.model, self.tensor = name, model, tensor
        whose = f" of {model}" if model else ""
        super().__init__(
            f'no "{name}" for {tensor}{whose}: every filter that the recipe has for it is '
            "of other tensors",
            f"a last entry without a filter, such as `- value: {example(parameter)}`, "
            "holds for the rest",
        )


def matches(condition: Condition, tensor_name: str) -> bool:
    """Whether the condition holds for the tensor: its filter is a plain part of the name."""
    wanted = condition.filter
    return wanted is None or wanted == "*" or bool(tensor_name and wanted in tensor_name)


def value(conditions: Sequence[Condition], tensor_name: str, t: float) -> Scalar | None:
    """What the first condition that matches says at `t`, or None.

    A gradient v of n numbers is interpolated at s = t · (n − 1):
    (1 − (s − ⌊s⌋)) · v[⌊s⌋] + (s − ⌊s⌋) · v[min(n − 1, ⌊s⌋ + 1)]. Of a list of anything else, the
    entry at ⌊s⌋ counts.
    """
    for condition in conditions:
        if not matches(condition, tensor_name):
            continue
        if not isinstance(condition.value, tuple):
            return condition.value
        return _at(condition.value, t) if condition.value else None
    return None


def _at(values: tuple[Scalar, ...], t: float) -> Scalar:
    place = t * (len(values) - 1)
    start = int(place)
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values):
        return values[start]
    end = min(len(values) - 1, start + 1)
    share = place - start
    return (1 - share) * numbers[start] + share * numbers[end]


def base_of(recipe: Recipe, slice: Slice | None) -> ModelName | None:
    """The base of a slice: its own, or else the recipe's."""
    return (slice.base_model if slice else None) or recipe.base_model


def levels(
    recipe: Recipe, module: Module, slice: Slice, model: ModelName | None
) -> Iterator[Settings]:
    """The settings that count, from the highest on; for a parameter of all, `model` is None."""
    if model is not None:
        yield from (source.parameters for source in slice.sources if source.model == model)
    yield slice.parameters
    yield module.parameters
    yield recipe.parameters


def place_of(
    recipe: Recipe, module: Module, slice: Slice, name: str, model: ModelName | None
) -> str:
    """Where in the YAML the highest level stands that says anything of a parameter."""
    said = [(s.parameters, s.where) for s in slice.sources if s.model == model]
    said += [(slice.parameters, slice.where), (module.parameters, module.where)]
    where = next((where for settings, where in said if settings.get(name)), "")
    return f"{where}.parameters.{name}" if where else f"parameters.{name}"


def resolve(
    recipe: Recipe,
    module: Module,
    slice: Slice,
    method_parameters: Mapping[str, Parameter],
    sources: Sequence[Source],
    *,
    input_names: Sequence[str],
    output_name: str,
    t: float,
) -> tuple[Params, tuple[Params, ...]]:
    """The parameters of one tensor: those that all share, and those of every source.

    All of them are there; None is the value of an optional one that nothing says.

    Args:
        recipe: All of it.
        module: The part that the tensor belongs to.
        slice: The part of that.
        method_parameters: The method's `PARAMETERS`.
        sources: What is merged, the base among them if it is; it has only what is `base_too`.
        input_names: The tensor's name in each source.
        output_name: Its name in the output.
        t: Its place in the slice: 0 for the first layer, 1 for the last.

    Raises:
        MissingParameter: One that is required is not said, or only for other tensors.
        WeftError: A gradient makes a fraction of what must be whole.
    """
    base = base_of(recipe, slice)

    def ask(names: list[str], tensor: str, model: ModelName | None) -> Params:
        return tuple(
            (name, _one(name, method_parameters[name], settings, tensor, t, model))
            for name in names
            for settings in [levels(recipe, module, slice, model)]
        )

    shared = [name for name, each in method_parameters.items() if not each.each]
    own = [name for name, each in method_parameters.items() if each.each]
    of_base = [name for name in own if method_parameters[name].base_too]
    return ask(shared, output_name, None), tuple(
        ask(of_base if source.model == base else own, tensor, source.model)
        for source, tensor in zip(sources, input_names, strict=True)
    )


def _one(
    name: str,
    parameter: Parameter,
    settings: Iterator[Settings],
    tensor: str,
    t: float,
    model: ModelName | None,
) -> Any:
    for level in settings:
        found = value(level.get(name, ()), tensor, t)
        if found is not None:
            return _typed(name, parameter, found, tensor, t)
    if parameter.required:
        raise MissingParameter(name, parameter, model, tensor)
    return parameter.default


def _typed(name: str, parameter: Parameter, found: Scalar, tensor: str, t: float) -> Scalar:
    if parameter.type is not int or isinstance(found, int):
        return found
    if isinstance(found, float) and found.is_integer():
        return int(found)
    raise WeftError(
        f'the gradient of "{name}" is {found:g} for {tensor} (at t = {t:g}), and it must be whole',
        "give one number for all layers, or one for each part of the layers by slices",
    )


def example(parameter: Parameter) -> str:
    """A value to show where the recipe must say one."""
    if parameter.default is not None:
        return str(parameter.default).lower() if parameter.type is bool else str(parameter.default)
    return {float: "0.5", int: "1", bool: "true"}.get(parameter.type, "...")
