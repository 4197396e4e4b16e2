"""Every test of the methods runs with the compiled loops, and with torch in their place."""

from __future__ import annotations

import pytest

from weft import native


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler was there when weft was installed")
    return str(request.param)
