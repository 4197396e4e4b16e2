"""The compiled loops against float64 and torch."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import native
from weft.native import Keep, Operand, build

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 511, 512, 513, 4099]

needs_library = pytest.mark.skipif(
    native.library() is None, reason="no C compiler was there when weft was installed"
)
pytestmark = needs_library


def numbers(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator) * 0.5).to(dtype)


def every_bit_pattern() -> Tensor:
    """Float32 of every upper half, with lower halves that are near to a tie."""
    high = np.arange(2**16, dtype=np.uint32) << 16
    lows = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    bits = (high[:, None] | lows).reshape(-1)
    return torch.from_numpy(bits.view(np.float32).copy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_that_of_torch_for_all_kinds_of_numbers(dtype: torch.dtype) -> None:
    values = every_bit_pattern()
    if dtype == torch.float16:  # and the ties of half precision
        halves = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
        middle = (halves[:-1].double() + halves[1:].double()) / 2
        values = torch.cat([values, middle.float(), -middle.float()])
    out = torch.empty(len(values), dtype=dtype)
    native.finish(values, None, None, out, exact=True)
    expected = values.to(dtype)
    nan = expected.isnan()
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(out[~nan], expected[~nan])
    assert torch.equal(out[~nan].signbit(), expected[~nan].signbit())


@pytest.mark.parametrize("dtype", DTYPES)
def test_widened_as_by_torch(dtype: torch.dtype) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = every_bit_pattern() if dtype == torch.float32 else bits.view(dtype)
    out = torch.empty(len(values))
    native.widen(Operand(values), out)
    assert torch.equal(out.view(torch.int32), values.float().view(torch.int32)) or torch.equal(
        out.nan_to_num(), values.float().nan_to_num()
    )
    native.widen(Operand(values, values), out)
    assert torch.equal(out.nan_to_num(), (values.float() - values.float()).nan_to_num())


@pytest.mark.parametrize("size", SIZES)
def test_an_operand_is_values_less_others_with_more(size: int) -> None:
    values, less = numbers(size, 0, torch.bfloat16), numbers(size, 1, torch.float16)
    more, out = numbers(size, 2), torch.empty(size)
    operand = Operand(values, less, more)
    native.widen(operand, out)
    assert torch.equal(out, values.float() - less.float() + more)
    here = slice(size // 3, size)
    native.widen(operand.part(here), out[here])
    assert torch.equal(out[here], (values.float() - less.float() + more)[here])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram(dtype: torch.dtype, size: int) -> None:
    base, x, y = (numbers(size, seed, dtype) for seed in range(3))
    found = native.gram([Operand(x, base), Operand(y), Operand(base)])
    wide = [x.double() - base.double(), y.double(), base.double()]
    for i, row in enumerate(found):
        for j, value in enumerate(row):
            room = float(wide[i].norm() * wide[j].norm())
            assert value == pytest.approx(float(wide[i] @ wide[j]), abs=1e-6 * room)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", ["both", "out", "rough", "neither"])
def test_difference(wanted: str, dtype: torch.dtype, size: int) -> None:
    tuned, base = numbers(size, 0, dtype), numbers(size, 1, torch.bfloat16)
    out = torch.empty(size) if wanted in ("both", "out") else None
    rough = torch.empty(size, dtype=torch.bfloat16) if wanted in ("both", "rough") else None
    found = native.difference(Operand(tuned, base), out, rough)
    exact, wide = tuned.float() - base.float(), base.double()
    assert out is None or torch.equal(out, exact)
    assert rough is None or torch.equal(rough, exact.bfloat16())
    apart = tuned.double() - wide
    for value, expected in zip(found, (apart @ apart, apart @ wide, wide @ wide), strict=True):
        assert value == pytest.approx(
            float(expected), abs=1e-6 * float(apart.norm() + wide.norm()) ** 2
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 1.0, 0.3])
def test_combine(dtype: torch.dtype, size: int, share: float) -> None:
    base, x = (numbers(size, seed, dtype) for seed in range(2))
    delta = 1e-2 * numbers(size, 2)
    out = torch.empty(size, dtype=dtype)
    proof = native.combine(
        [Operand(x, base), Operand(delta)], [0.25, -0.7], Operand(base), share, out
    )
    value = 0.25 * (x.double() - base.double()) - 0.7 * delta.double() + share * base.double()
    assert bool(((out.double() - value).abs() <= spacing(value, dtype)).all())
    check_proof(proof, base, value - base.double(), out.double() - value, out)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_finish_of_an_update(dtype: torch.dtype, size: int) -> None:
    """W + ΔW; the error is against ΔW itself, and not against a sum that was rounded."""
    base, delta = numbers(size, 0, dtype), 1e-3 * numbers(size, 1)
    out = torch.empty(size, dtype=dtype)
    proof = native.finish(None, Operand(base), delta, out, exact=False)
    assert torch.equal(out, (base.float() + delta).to(dtype))
    error = out.double() - base.double() - delta.double()
    check_proof(proof, base, delta.double(), error, out)


def check_proof(
    proof: native.Proof, base: Tensor, delta: Tensor, error: Tensor, out: Tensor
) -> None:
    assert proof.base == pytest.approx(float(base.double().square().sum()), rel=1e-6)
    assert proof.delta == pytest.approx(float(delta.square().sum()), rel=1e-4)
    # Of a few ulps of float32 nothing is left to compare.
    least = 5e-7 * float(base.double().norm() + delta.norm())
    assert proof.error**0.5 == pytest.approx(float(error.norm()), rel=1e-4, abs=least)
    assert bool(proof.changed) is not torch.equal(out, base)
    assert not proof.not_finite


def spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place, and a little for float32's own arithmetic."""
    half = torch.finfo(dtype).eps / 2
    return value.abs() * half + 3e-7 * value.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 511, 512, 1000])
def test_what_is_not_finite_is_seen(bad: float, at: int) -> None:
    value, base = numbers(1001), numbers(1001, 1)
    out = torch.empty(1001, dtype=torch.bfloat16)
    assert not native.finish(value, Operand(base), None, out, exact=True).not_finite
    value[at] = bad
    assert native.finish(value, Operand(base), None, out, exact=True).not_finite
    assert native.finish(value, None, None, out, exact=True).not_finite
    overflow = torch.full((1001,), 1.0)
    overflow[at] = 1e5
    assert native.finish(
        overflow, None, None, torch.empty(1001, dtype=torch.float16), exact=True
    ).not_finite


@pytest.mark.parametrize("first", [0, 1, 7, 8, 13])
@pytest.mark.parametrize("size", SIZES)
def test_norms_of_what_bits_keep(size: int, first: int) -> None:
    x, base = numbers(size, 0, torch.bfloat16), numbers(size, 1, torch.bfloat16)
    kept = np.random.default_rng(first).random(first + size) < 0.4
    packed = np.packbits(kept)
    before, after = native.norms(Operand(x, base), Keep(bits=packed, first=first))
    d = (x.double() - base.double()).abs()
    assert before == pytest.approx(float(d.sum()), rel=1e-6)
    expected = float(d[torch.from_numpy(kept[first:])].sum())
    assert after == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_bits_beyond_the_last_byte_are_not_read() -> None:
    """The page behind the bits cannot be read: a look at it would end the process."""
    text = (
        "import ctypes, mmap, numpy as np, torch\n"
        "from weft import native\n"
        "pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(pages))\n"
        "libc = ctypes.CDLL(None)\n"
        "assert not libc.mprotect(ctypes.c_void_p(at + mmap.PAGESIZE), mmap.PAGESIZE, 0)\n"
        "bits = np.frombuffer(pages, np.uint8)[mmap.PAGESIZE - 100 : mmap.PAGESIZE]\n"
        "for first in range(8):\n"
        "    x = torch.ones(800 - first)\n"
        "    native.norms(native.Operand(x), native.Keep(bits=bits, first=first))\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def vote_in_float64(
    deltas: list[Tensor], factors: list[float], weights: list[float] | None, consensus: bool
) -> Tensor:
    """The merged task vector, element by element."""
    rows = torch.stack([f * d.double() for f, d in zip(factors, deltas, strict=True)])
    if not consensus:
        return rows.sum(0)
    sign = torch.where(rows.sum(0) >= 0, 1.0, -1.0).double()
    counts = rows * sign > 0
    total = (rows * counts).sum(0)
    if weights is None:
        return total
    share = (torch.tensor(weights, dtype=torch.float64)[:, None] * counts).sum(0)
    return total / torch.where(share == 0, 1.0, share)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("consensus", [True, False])
@pytest.mark.parametrize("weights", [None, [0.5, 0.25, 1.0], [1.0, -1.0, 1.0]])
def test_vote(size: int, consensus: bool, weights: list[float] | None) -> None:
    base = numbers(size, 0, torch.bfloat16)
    tuned = [numbers(size, seed, torch.bfloat16) for seed in (1, 2)]
    low, high, kept = 0.2, 0.9, np.random.default_rng(0).random(size) < 0.5
    third = 0.3 * numbers(size, 3)
    keeps = [Keep(low, high), Keep(bits=np.packbits(kept)), Keep()]
    factors = [0.7, -0.4, 0.9]
    out, proof = torch.empty(size), native.Proof()
    operands = [*(Operand(each, base) for each in tuned), Operand(third)]
    native.vote(
        operands, keeps, factors, weights, 1.3, Operand(base), out, consensus=consensus, proof=proof
    )
    deltas = [each.float() - base.float() for each in tuned] + [third]
    within = (deltas[0].abs() > np.float32(low)) & (deltas[0].abs() <= np.float32(high))
    deltas[0] = deltas[0] * within
    deltas[1] = deltas[1] * torch.from_numpy(kept)
    merged = vote_in_float64(deltas, factors, weights, consensus)
    value = base.double() + 1.3 * merged
    # Where the sum of all is next to zero, float32 and float64 may see different signs.
    clear = torch.stack([f * d.double() for f, d in zip(factors, deltas, strict=True)]).sum(0)
    clear = (clear.abs() > 1e-6) | (torch.stack(deltas).abs().sum(0) == 0)
    assert float(clear.double().mean()) > 0.95 or size < 8
    assert torch.allclose(out.double()[clear], value[clear], rtol=2e-6, atol=2e-6)
    assert proof.base == pytest.approx(float(base.double().square().sum()), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 1500), st.integers(0, 2**32 - 1), st.floats(0.01, 1), st.floats(0, 2),
)  # fmt: skip
def test_between(size: int, seed: int, low: float, more: float) -> None:
    keys = np.abs(np.random.default_rng(seed).standard_normal(size)).astype(np.float32)
    keys = np.where(keys < 0.5, np.round(keys * 8) / 8, keys)  # some are equal
    low, high = float(np.float32(low)), float(np.float32(low + more))
    room = np.empty_like(keys)
    inside, above = native.between(keys, low, high, room)
    chosen = keys[(keys >= np.float32(low)) & (keys <= np.float32(high))]
    assert room[:inside].tolist() == chosen.tolist()
    assert above == int((keys > np.float32(high)).sum())


@pytest.mark.parametrize("key", [0, 12345, 2**64 - 1, 2**64, 2**128 - 1])
@pytest.mark.parametrize("counter", [0, 1, 10**12])
def test_random_numbers_are_those_of_numpy(key: int, counter: int) -> None:
    out = np.empty(400, np.uint64)
    native.philox(key, counter, out)
    assert out.tolist() == np.random.Philox(key=key, counter=counter).random_raw(400).tolist()


# ------------------------------------------------------------------------------- how it is built


def test_numbers_do_not_depend_on_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for the least of processors, what is written has the same bits."""
    plain = tmp_path / "plain.so"
    monkeypatch.setattr(build, "library", lambda: plain)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DONE_PROCESSOR"))
    monkeypatch.setattr(build, "SOURCE", copied(build.SOURCE, tmp_path))
    assert build.compile_kernels() is None
    found = []
    for fresh in (True, False):
        if fresh:
            native.library.cache_clear()
        else:
            monkeypatch.undo()
            native.library.cache_clear()
        base, x, y = (numbers(5000, seed, torch.bfloat16) for seed in range(3))
        out = torch.empty(5000)
        native.combine([Operand(x, base), Operand(y, base)], [0.3, 0.7], Operand(base), 1.0, out)
        keeps = [Keep(low=0.3), Keep(high=0.7)]
        voted = torch.empty(5000)
        native.vote(
            [Operand(x, base), Operand(y, base)], keeps, [0.3, 0.7], [0.5, 0.5], 1.0,
            Operand(base), voted, consensus=True, proof=native.Proof(),
        )  # fmt: skip
        sums = torch.tensor(native.gram([Operand(x, base), Operand(y)])[1], dtype=torch.float64)
        sizes = torch.tensor(native.norms(Operand(x, base), Keep(low=0.3)), dtype=torch.float64)
        found.append((out, voted, sums, sizes))
    for one, other in pairwise(found):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def copied(source: Path, folder: Path) -> Path:
    """Apart from the real one: building removes what an older source had made."""
    target = folder / source.name
    target.write_bytes(source.read_bytes())
    return target


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_the_reason_is_told(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "SOURCE", copied(build.SOURCE, tmp_path))
    monkeypatch.setenv("CC", compiler)
    problem = build.compile_kernels()
    assert problem is not None
    assert compiler in problem
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.c"]


@pytest.mark.parametrize("compiler", ["env cc", "no-such-compiler"])
def test_any_compiler_will_do(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CC may have arguments; where Python's own compiler is not there, `cc` may be."""
    monkeypatch.setattr(build, "SOURCE", copied(build.SOURCE, tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if " " in compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.setattr(build.sysconfig, "get_config_var", lambda name: compiler)
    assert build.compile_kernels() is None
    assert build.library().exists()


def test_a_library_of_other_flags_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.library()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-ffast-math"))
    assert build.library() != before


def test_as_many_operands_as_there_may_be() -> None:
    rows = [numbers(700, seed) for seed in range(native.MOST)]
    found = native.gram([Operand(each) for each in rows])
    assert found[-1][0] == pytest.approx(float(rows[-1].double() @ rows[0].double()), abs=1e-4)
    out, base = torch.empty(700), numbers(700, 99)
    shares = [1 / native.MOST] * native.MOST
    native.vote(
        [Operand(each) for each in rows], [Keep()] * native.MOST, shares, None, 1.0,
        Operand(base), out, consensus=False, proof=native.Proof(),
    )  # fmt: skip
    expected = base.double() + torch.stack(rows).double().mean(0)
    assert torch.allclose(out.double(), expected, atol=1e-6)


def test_a_sum_of_negative_zeros_is_one() -> None:
    zero, out = torch.full((5,), -0.0), torch.empty(5)
    native.vote(
        [Operand(zero)], [Keep()], [0.5], None, 1.0, Operand(zero), out, consensus=False,
        proof=native.Proof(),
    )  # fmt: skip
    assert bool(out.signbit().all())


def test_a_library_of_another_source_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copied(build.SOURCE, tmp_path)
    monkeypatch.setattr(build, "SOURCE", source)
    assert build.compile_kernels() is None
    assert build.library().exists()
    source.write_text(source.read_text() + "\n/* changed */\n")
    assert not build.library().exists()
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert not native.takes(torch.ones(3))
        assert not native.reads("bfloat16")
    finally:
        native.library.cache_clear()
    assert build.compile_kernels() is None
    assert [path.name for path in tmp_path.glob("*.so")] == [build.library().name]
