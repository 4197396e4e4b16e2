"""Notes and warnings of a plan and of its result: which, and in which order."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from weft.cli.show import report_as_text
from weft.core.units import show_share

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Folders


def zero(adapter: Path) -> Path:
    """An adapter that was never trained."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t * (".lora_B." not in n) for n, t in tensors.items()}, file)
    return adapter


def test_order_of_notes(folders: Folders) -> None:
    """What was done to match the two, then what is odd, then whose tokenizer it is."""
    embed = {"embed.weight": torch.ones(12, 8)}
    files = {"tokenizer.json": "{}", "weights.h5": ""}
    base = folders.base(tensors=embed, name="llama-8b-instruct", files=files, vocab_size=12)
    adapter = folders.adapter(
        ["model.layers.0.q_proj"],
        {"model.embed.weight": torch.ones(14, 8)},
        files={"other.bin": "", "chat_template.jinja": ""},
        base_model_name_or_path="meta-llama/Llama-3.1-8B",
        some_key=5,
    )
    plan = weft.plan_merge(base, adapter).plan
    notes = (*plan.notes, *plan.beside)
    parts = [
        "'model.' taken off the adapter's names",
        "embed.weight goes from [12, 8] to [14, 8]",
        "is called otherwise",
        "has keys that weft does not know",
        "chat template from",
        "the tokenizer is still the base's",
        "not copied from",
        "left out of the output: weights.h5",
    ]
    assert len(notes) == len(parts)
    assert [part in note for part, note in zip(parts, notes, strict=True)] == [True] * len(parts)
    again = weft.plan_merge(base, adapter).plan
    assert (*again.notes, *again.beside) == notes


def test_base_without_config(folders: Folders) -> None:
    base = folders.base()
    folders.adapter()
    (base / "config.json").unlink()
    for given in (base, base / "model.safetensors"):
        (warning,) = weft.plan_merge(given, folders.root / "adapter").warnings
        assert warning.startswith(f"{given} has no config.json, and so the output has none")
        assert "put the model's config.json beside the weights" in warning


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("how", ["weight 0", "zero", "alpha 0"])
def test_adapters_that_change_nothing(how: str, dtype: str | None, folders: Folders) -> None:
    """One rule, however it comes about: a warning of the adapter, and one of the output."""
    base = folders.base()
    adapter = folders.adapter(lora_alpha=0 if how == "alpha 0" else 4)
    given = f"{zero(adapter) if how == 'zero' else adapter}{':0' if how == 'weight 0' else ''}"
    report = weft.merge(base, given, output=folders.root / "out", dtype=dtype)
    why = "its weight is 0" if how == "weight 0" else "a factor or the scaling is zero in all"
    assert report.warnings[0].startswith(f"{adapter} changes nothing: {why}")
    equal = "the output equals the base: no element of any tensor changed"
    cast = "ΔW is zero in every tensor: the output is the base, in another dtype"
    said = () if how == "weight 0" else (cast,)
    assert report.warnings[1:] == (said if dtype else (equal,))
    assert not any("weight" in note for note in report.manifest["notes"])


def test_one_of_two_that_changes_nothing(folders: Folders) -> None:
    base, adapter = folders.base(), folders.adapter()
    report = weft.merge(base, [adapter, f"{adapter}:0"], output=folders.root / "out")
    assert report.warnings == (f"{adapter} changes nothing: its weight is 0",)
    assert json.loads((folders.root / "out/weft.json").read_text())["warnings"] == [
        f"{adapter} changes nothing: its weight is 0"
    ]


# --------------------------------------------------------------------------------- of the result


def large(warnings: tuple[str, ...]) -> list[str]:
    return [warning for warning in warnings if warning.startswith("‖ΔW‖ is ")]


def test_an_absurd_update(folders: Folders) -> None:
    """Of the worst module, and how many more there are."""
    modules = [f"layers.{n}.q_proj" for n in range(4)]
    base, adapter = folders.base(modules), folders.adapter(modules, lora_alpha=4e6)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.layers.2.q_proj.lora_B.weight"] *= 10
    tensors["base_model.model.layers.3.q_proj.lora_B.weight"] *= 1e-9
    save_file(tensors, file)
    report = weft.merge(base, adapter, output=folders.root / "out")
    (warning,) = large(report.warnings)
    assert " of ‖W‖ in layers.2.q_proj.weight and over 100 % in 2 more: " in warning
    assert "check lora_alpha and r" in warning
    share = float(warning.split()[2])
    worst = report.manifest["tensors"]["layers.2.q_proj.weight"]["relative"]
    assert share == pytest.approx(100 * worst, rel=0.05)
    assert "e+" in warning.split()[2]


@pytest.mark.parametrize(("alpha", "count"), [(4, 0), (60, 0), (300, 1)])
def test_a_large_update(alpha: float, count: int, folders: Folders) -> None:
    report = weft.merge(
        folders.base(), folders.adapter(lora_alpha=alpha), output=folders.root / "out"
    )
    assert len(large(report.warnings)) == count
    assert report.totals.relative is not None
    assert (report.totals.relative > 1) == bool(count)


def test_a_new_head_may_be_large(folders: Folders) -> None:
    """What is replaced is no update of what was there."""
    base = folders.base(["layers.0.q_proj", "score"])
    score = {"score.weight": torch.full((8, 8), 1000.0)}
    adapter = folders.adapter(tensors=score, modules_to_save=["score"])
    report = weft.merge(base, adapter, output=folders.root / "out")
    assert report.manifest["tensors"]["score.weight"]["relative"] > 100
    assert report.warnings == ()


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "—"),
        (0.0, "0.0 %"),
        (0.0004, "0.040 %"),
        (4e-6, "4.0e-04 %"),
        (0.5, "50.0 %"),
        (0.9996, "99.960 %"),
        (1.0, "100.0 %"),
        (9.994, "999.4 %"),
        (9.9996, "1000 %"),
        (12.72, "1272 %"),
        (9999.0, "999900 %"),
        (3.2e6, "3.2e+08 %"),
        (-0.5, "-50.0 %"),
    ],
)
def test_shares_can_be_read(share: float | None, text: str) -> None:
    assert show_share(share) == text


def test_survival_below_zero(folders: Folders) -> None:
    """Narrowing a float32 base moves its weights more than a small update does.

    People read 0 %, and why; the manifest has the number.
    """
    base, adapter = folders.base(), folders.adapter(lora_alpha=0.001)
    report = weft.merge(base, adapter, output=folders.root / "out", dtype="bfloat16")
    survival = report.totals.survival
    assert survival is not None
    assert survival < -1
    (warning,) = report.warnings
    assert warning.startswith("the update is smaller than the rounding of the weights themselves")
    assert f"as bfloat16 moves them {1 - survival:.3g} times as far" in warning
    assert "--dtype float32 keeps all of it" in warning
    summary = report_as_text(report).splitlines()[-1]
    assert "survival 0.0 %, worst 0.0 % in layers.0.q_proj.weight" in summary
    card = (folders.root / "out/README.md").read_text()
    assert "left after rounding: 0.0 %; least in `layers.0.q_proj.weight`: 0.0 %." in card
    assert "-" not in summary.partition("survival")[2]
    manifest = json.loads((folders.root / "out/weft.json").read_text())
    assert manifest["totals"]["survival"] == survival
    assert manifest["warnings"] == [warning]


def test_survival_of_a_half(folders: Folders) -> None:
    """A small part that is left is what it was: the rounding is of the update."""
    base, adapter = folders.base(), folders.adapter(lora_alpha=0.35)
    report = weft.merge(base, adapter, output=folders.root / "out", dtype="bfloat16")
    assert report.totals.survival is not None
    assert 0 < report.totals.survival < 0.5
    assert report.warnings[0].startswith("only ")
