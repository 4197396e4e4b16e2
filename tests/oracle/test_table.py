"""The table of `docs/reference/adapters.md`: every row is true, and every test is a row."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest

from tests.oracle.table import ROWS
from weft.formats.adapters._peft_methods import methods

pytestmark = [
    pytest.mark.oracle,
    *map(pytest.mark.filterwarnings, helpers.WARNINGS),
    # What PEFT says while it makes these adapters is no part of what they are.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "adapters.md"


def table() -> dict[str, tuple[str, str]]:
    """Row -> the two columns, without what is explained behind a colon."""
    section = PAGE.read_text(encoding="utf-8").partition("## At a glance")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({row for row, _, _ in cells}) == len(cells)
    return {row: (ours.partition(":")[0], theirs.partition(":")[0]) for row, ours, theirs in cells}


@pytest.mark.parametrize("row", ROWS)
def test_row(tmp_path: Path, row: str) -> None:
    ours, theirs = table()[row]
    scene = ROWS[row](tmp_path)
    assert scene.weft() == ours
    # A processor on which two sums agree to the last bit takes nothing from "to rounding".
    also = {"the same bits"} if theirs == "the same to rounding" else set()
    assert scene.peft() in {theirs} | also


def test_every_row_is_a_test_and_every_test_a_row() -> None:
    assert list(table()) == list(ROWS)


def test_every_method_is_a_row() -> None:
    """BONE is read by PEFT's older releases alone."""
    assert {f"`{name}`" for name in methods()} - {"`BONE`"} <= set(ROWS)
