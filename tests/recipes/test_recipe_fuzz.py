"""Whatever a file holds, the answer is a recipe or an error that says what is wrong."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.core.errors import WeftError
from weft.recipes.mergekit import read

if TYPE_CHECKING:
    import random

pytestmark = pytest.mark.usefixtures("mergekit_methods")
CORPUS = [path.read_text() for path in sorted((Path(__file__).parent / "corpus").glob("*.yml"))]
# The stand-ins are the same for every example.
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

KEYS = st.sampled_from(
    [
        *("name", "merge_method", "models", "slices", "modules", "base_model", "parameters"),
        *("input_model_parameters", "model_parameters", "dtype", "tokenizer", "tokenizer_source"),
        *("chat_template", "model", "layer_range", "sources", "weight", "density", "t", "x"),
        *("normalize", "filter", "value", "pattern", "source", "tokens", "kind", "lora", "path"),
        *("revision", "out_path", "epsilon", "residual_weight", "force", "token_id", "modles"),
    ]
)
WORDS = ["linear", "ties", "org/a", "a+b:2", "a@b@c", "union", "base", "zero", "model_token"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 50),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=5),
)
DATA = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(KEYS | st.integers(), inner, max_size=5)
    ),
    max_leaves=25,
)


def answered(text: str) -> None:
    with contextlib.suppress(WeftError):
        assert read(text, "merge.yml")


@QUICK
@given(st.text())
def test_any_text(text: str) -> None:
    answered(text)


@QUICK
@given(st.text(alphabet="a:-[]{}&*!|>'\"%@`#,?<~ \n\t0.1eE+"))
def test_any_text_of_yamls_own_signs(text: str) -> None:
    answered(text)


@QUICK
@given(st.dictionaries(KEYS, DATA, max_size=8), st.sampled_from(["linear", "ties", "della", "x"]))
def test_any_data_under_known_keys(data: dict[str, object], method: str) -> None:
    answered(yaml.safe_dump({"merge_method": method, **data}, allow_unicode=True))


@QUICK
@given(st.sampled_from(CORPUS), st.randoms(use_true_random=False), st.integers(1, 4))
def test_damaged_recipes(text: str, chance: random.Random, times: int) -> None:
    for _ in range(times):
        lines = text.split("\n")
        here, there = chance.randrange(len(lines)), chance.randrange(len(lines))
        match chance.randrange(5):
            case 0:
                del lines[here]
            case 1:
                lines.insert(there, lines[here])
            case 2:
                lines[here] = " " + lines[here]
            case 3:
                lines[here] = lines[here][: chance.randrange(len(lines[here]) + 1)]
            case _:
                lines[here], lines[there] = lines[there], lines[here]
        text = "\n".join(lines)
    answered(text)
