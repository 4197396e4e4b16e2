"""Every method against MergeKit 0.1.5, whose results `make_method_goldens.py` has written down."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from memory_blocks import merge_case
from merge_cases import APART, DETERMINISTIC, DRAWS, RANDOM, Case, tensors
from test_formulas import nuslerp

from weft import methods

GOLDENS = dict(np.load(Path(__file__).parent / "goldens.npz"))
METHODS = [str(name) for name in GOLDENS["methods"]]


# MergeKit's float32 finds these two not quite opposite, and divides by the sine of the rest.
NOISE = {"nuslerp: opposite"}
COMPARED = [case for case in DETERMINISTIC if case.name not in NOISE]


def tied(case: Case) -> torch.Tensor:
    """Elements where a change is as large as the last one that is kept.

    MergeKit sorts in no stable order, and so takes any of them; ours are the first.
    """
    found = np.zeros(case.shape, bool)
    base, inputs = tensors(case)
    for number, density in enumerate(case.each.get("density", [])):
        assert base is not None
        size = np.abs(inputs[number] - base)
        order = np.sort(size.ravel())
        gamma = case.each.get("gamma", [0.01] * 2)[number]
        kept, n = int(density * size.size), size.size
        top = max(n - int(gamma * n), kept) if case.method.startswith("breadcrumbs") else n
        for edge in (top - kept, top):
            if 0 < edge < n and order[edge - 1] == order[edge]:
                found |= size == order[edge]
    return torch.from_numpy(found)


def test_few_elements_are_left_out() -> None:
    for case in COMPARED:
        share = float(tied(case).double().mean())
        assert share < 0.2, case.name
        assert share == 0 or case.kind == "bfloat16", case.name


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
@pytest.mark.parametrize("size", [10**6, 50])
def test_agrees_with_mergekit(case: Case, size: int) -> None:
    theirs = torch.from_numpy(GOLDENS[case.name])
    ours = merge_case(case, size=size)
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs() * ~tied(case)
    assert float(error.norm()) <= 1e-6 * float(theirs.norm())
    assert float(error.max()) <= 2e-6 * float(theirs.abs().max())


@pytest.mark.parametrize("case", RANDOM, ids=lambda case: case.name)
def test_random_methods_have_mergekits_distribution(case: Case) -> None:
    """Mean and standard deviation of every element, by Bonferroni at about 1 in 1000 in all."""
    drawn = torch.stack([merge_case(case, key=str(n)).double() for n in range(DRAWS)])
    mean, std = (
        torch.from_numpy(GOLDENS[f"{case.name} {what}"]).double() for what in ("mean", "std")
    )
    off = (drawn.mean(0) - mean).abs() / (std / DRAWS**0.5 + 1e-6)
    assert float(off.max()) < 5.5
    assert float(off.square().mean().sqrt()) < 2
    assert float((drawn.std(0, correction=0) - std).abs().max()) < 0.25 * float(std.max())


def test_columns_of_a_stack() -> None:
    """The columns of every expert, as where they lie apart; MergeKit's go across the experts."""
    (case,) = APART
    base, inputs = tensors(case)
    assert base is not None
    wide = base.astype(np.float64)
    changes = [each - wide for each in inputs]
    across = nuslerp(case, wide, changes)
    apart = np.stack([nuslerp(case, wide[n], [d[n] for d in changes]) for n in range(3)])
    assert (
        np.abs(GOLDENS[case.name] - across).max() < 1e-4
    )  # of three elements each, nearly parallel
    for size in (10**6, 50):
        assert np.abs(merge_case(case, size=size).numpy() - apart).max() < 1e-6
    assert np.abs(across - apart).max() > 0.01


def test_every_method_of_mergekit_is_here() -> None:
    assert set(METHODS) <= set(methods.names())


def test_every_parameter_of_mergekit_is_here_with_its_default() -> None:
    ours = []
    for name in METHODS:
        for parameter, own in methods.method(name).PARAMETERS.items():
            scope = "shared" if not own.each else "input" if own.base_too else "non_base"
            default = "required" if own.required else repr(own.default)
            ours.append(f"{name} {parameter} {scope} {default}")
    assert sorted(ours) == [str(each) for each in GOLDENS["parameters"]]


@pytest.mark.parametrize("name", METHODS)
def test_a_base_is_asked_for_where_mergekit_asks(name: str) -> None:
    """In every case that MergeKit has merged, Weft takes as many inputs."""
    own = methods.method(name)
    least, most = own.INPUTS
    cases = [case for case in DETERMINISTIC if case.method == name]
    assert cases
    for case in cases:
        assert case.count >= least
        assert most is None or case.count <= most
        assert own.BASE != "required" or case.base
        assert own.BASE != "none" or not case.base
    assert len(tensors(cases[0])[1]) == cases[0].count
