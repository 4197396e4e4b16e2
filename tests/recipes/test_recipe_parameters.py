"""Precedence, filters and gradients against MergeKit's own, recorded in goldens.json."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.recipes.catalogue import BASES, GOLDENS, TYPES, parameter
from weft import methods
from weft.core.errors import WeftError
from weft.recipes import mergekit, parameters
from weft.recipes._settings import convert
from weft.recipes.parameters import MissingParameter, resolve, value
from weft.recipes.records import Condition, ModelName, Module, Recipe, Slice, Source

if TYPE_CHECKING:
    from types import SimpleNamespace

    from weft.recipes.records import Scalar, Settings

NUMBERS = st.floats(-1e6, 1e6)
HERE = Path(__file__).parent


def conditions(kind: type, setting: Any) -> tuple[Condition, ...]:
    """A setting as YAML has it, read by hand."""

    def typed(found: Any) -> Scalar | tuple[Scalar, ...]:
        if isinstance(found, list):
            return tuple(typed(each) for each in found)  # type: ignore[misc]
        made = convert(kind, found)
        assert made is not None
        return made

    entries = setting if isinstance(setting, list) else [setting]
    if not any(isinstance(each, dict) for each in entries):
        return (Condition(typed(setting)),)
    return tuple(Condition(typed(each["value"]), each.get("filter")) for each in entries)


def compare_settings(goldens: Any) -> int:
    compared = 0
    for kind, setting, tensor, t, expected in goldens["settings"]:
        found = value(conditions(TYPES[kind], setting), tensor, t)
        if expected == "refused":  # an integer that is none between two entries of a gradient
            assert kind == "int"
            assert found != int(found)
            continue
        assert found == expected, (kind, setting, tensor, t)
        assert type(found) is type(expected) or kind == "int"
        compared += found is not None
    return compared


def compare_recipes(goldens: Any) -> tuple[int, int]:
    compared = refused = 0
    for text, output, inputs, t, expected in goldens["recipes"]:
        try:
            (recipe,) = mergekit.read(text, "golden.yml")
            (module,) = recipe.modules
            (part,) = module.slices
            found = resolve(
                recipe,
                module,
                part,
                methods.method(recipe.method).PARAMETERS,
                part.sources,
                input_names=inputs[: len(part.sources)],
                output_name=output,
                t=t,
            )
        except WeftError:
            assert expected == "refused", text
            refused += 1
            continue
        assert expected != "refused", text
        shared, each = expected
        assert dict(found[0]) == shared, text
        has_any = [dict(params) for params in found[1] if params]
        assert has_any == [params for params in each if params], text
        compared += 1
    return compared, refused


def test_settings_are_evaluated_as_by_mergekit() -> None:
    assert compare_settings(GOLDENS) > 100


@pytest.mark.usefixtures("mergekit_methods")
def test_recipes_are_resolved_as_by_mergekit() -> None:
    compared, refused = compare_recipes(GOLDENS)
    assert compared > 60
    assert refused > 3


@pytest.mark.usefixtures("mergekit_methods")
def test_against_a_mergekit_that_is_here() -> None:
    """With WEFT_MERGEKIT=/path/to/python and other random recipes than the recorded ones."""
    python = os.environ.get("WEFT_MERGEKIT")
    if not python:
        pytest.skip("WEFT_MERGEKIT does not name a Python with mergekit 0.1.5")
    for seed in ("1", "2"):
        command = [python, HERE / "make_goldens.py", seed]
        made = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert made["specs"] == GOLDENS["specs"]
        compare_settings(made)
        compare_recipes(made)


@pytest.mark.parametrize("name", sorted(set(methods.names()) & set(GOLDENS["specs"])))
def test_the_catalogue_has_mergekits_parameters(name: str) -> None:
    spec, own = GOLDENS["specs"][name], methods.method(name)
    assert BASES[spec["base"]] == own.BASE
    for key, each in spec["parameters"].items():
        found, expected = own.PARAMETERS[key], parameter(name, key, each)
        assert (found.type, found.each, found.required) == (
            expected.type,
            expected.each,
            expected.required,
        )
        assert found.default == expected.default
        if found.each:
            assert found.base_too == expected.base_too


@given(st.lists(NUMBERS, min_size=2, max_size=9), st.floats(0, 1))
def test_a_gradient_is_piecewise_linear(numbers: list[float], t: float) -> None:
    found = value((Condition(tuple(numbers)),), "any", t)
    truth = np.interp(t, np.linspace(0, 1, len(numbers)), numbers)
    scale = max(abs(each) for each in numbers)
    # Where the slope is steep, t itself is only known to its last bit.
    np.testing.assert_allclose(found, truth, atol=1e-13 * scale + 1e-300, rtol=0)


@given(st.lists(st.sampled_from(["a", "b", True, False]), min_size=1), st.floats(0, 1))
def test_what_is_no_number_steps(labels: list[Any], t: float) -> None:
    assert value((Condition(tuple(labels)),), "any", t) == labels[int(t * (len(labels) - 1))]


def make(own: Settings, of_slice: Settings, module: Settings, recipe: Settings) -> tuple[Any, ...]:
    source = Source(ModelName("m"), None, own, "models[0]")
    part = Slice((source,), None, of_slice, "models")
    whole = Module(None, (part,), module, "")
    head = (None, "linear", (whole,), None, recipe, None, None, None, None)
    return Recipe(*head, text="", positions={}), whole, part


@given(st.lists(st.sampled_from(["match", "other", "empty", "nothing"]), min_size=4, max_size=4))
def test_the_highest_level_that_says_anything_counts(said: list[str]) -> None:
    """By hand: the first of the four levels whose filter matches, else the default."""
    levels = []
    for number, what in enumerate(said):
        here = {
            "match": (Condition(-1.0, "mlp"), Condition(float(number), "head")),
            "other": (Condition(float(number), "mlp"),),
            "empty": (Condition(()),),
            "nothing": (),
        }[what]
        levels.append({"x": here, "y": here})
    recipe, module, part = make(*levels)
    catalogue = {
        "x": methods.Parameter("", each=True, default=9.0),
        "y": methods.Parameter("", default=9.0),
    }
    shared, (own,) = resolve(
        recipe,
        module,
        part,
        catalogue,
        part.sources,
        input_names=["head"],
        output_name="head",
        t=0,
    )
    expected = next((float(i) for i, what in enumerate(said) if what == "match"), 9.0)
    assert own == (("x", expected),)
    below = next((float(i) for i, what in enumerate(said) if what == "match" and i > 0), 9.0)
    assert shared == (("y", below),)


def test_each_input_by_its_own_name_and_the_rest_by_the_outputs() -> None:
    by_layer = (Condition(1.0, "layers.1."), Condition(2.0))
    recipe, module, part = make({}, {}, {}, {"x": by_layer, "y": by_layer})
    catalogue = {"x": methods.Parameter("", each=True), "y": methods.Parameter("")}
    shared, (own,) = resolve(
        recipe,
        module,
        part,
        catalogue,
        part.sources,
        input_names=["layers.1.mlp"],
        output_name="layers.7.mlp",
        t=0,
    )
    assert (own, shared) == ((("x", 1.0),), (("y", 2.0),))


def test_what_no_filter_covers_is_missing() -> None:
    recipe, module, part = make({"x": (Condition(1.0, "mlp"),)}, {}, {}, {})
    catalogue = {"x": methods.Parameter("", each=True)}
    with pytest.raises(MissingParameter, match=r'no "x" for lm_head of m') as caught:
        resolve(
            recipe,
            module,
            part,
            catalogue,
            part.sources,
            input_names=["lm_head"],
            output_name="lm_head",
            t=0,
        )
    assert "- value: 0.5" in str(caught.value.hint)


def test_a_whole_number_stays_whole() -> None:
    recipe, module, part = make({}, {}, {}, {"n": (Condition((1, 4)),)})
    catalogue = {"n": methods.Parameter("", int, 3)}

    def at(t: float) -> Any:
        return resolve(
            recipe,
            module,
            part,
            catalogue,
            part.sources,
            input_names=["w"],
            output_name="w",
            t=t,
        )[0]

    assert at(1 / 3) == (("n", 2),)
    assert isinstance(at(1 / 3)[0][1], int)
    with pytest.raises(WeftError, match=r'gradient of "n" is 2\.5 for w'):
        at(0.5)


def test_an_empty_filter_is_part_of_every_name() -> None:
    assert parameters.matches(Condition(1.0, ""), "w")
    assert not parameters.matches(Condition(1.0, "w"), "")


def test_the_stand_ins_are_mergekits(mergekit_methods: dict[str, SimpleNamespace]) -> None:
    assert len(mergekit_methods) > 15
    assert mergekit_methods["slerp"].INPUTS == (1, 1)
