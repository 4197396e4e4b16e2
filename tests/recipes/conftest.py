"""MergeKit's methods in the place of Weft's, whichever of them are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.recipes.catalogue import all_of_mergekit
from weft import methods

if TYPE_CHECKING:
    from types import SimpleNamespace


@pytest.fixture
def mergekit_methods(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimpleNamespace]:
    made = all_of_mergekit()
    monkeypatch.setattr(methods, "names", lambda: sorted(made))
    monkeypatch.setattr(methods, "method", made.__getitem__)
    return made
