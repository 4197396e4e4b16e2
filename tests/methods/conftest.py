"""Every test of the methods runs with the compiled loops, and with torch in their place."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _both(loops: str) -> str:
    return loops
