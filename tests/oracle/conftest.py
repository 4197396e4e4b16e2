"""Bases, adapters and merges that several tests look at, each made once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Lab:
    """Folders by name: what is asked for again is already there."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Path] = {}

    def make(self, name: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Path:
        """The folder `name`, filled by `work(*args, folder, **kwargs)` on the first call."""
        if name not in self._made:
            folder = self._root / name.replace("/", "--")
            work(*args, folder, **kwargs)
            self._made[name] = folder
        return self._made[name]

    def base(self, model: str, dtype: str = "float32") -> Path:
        """A checkpoint of the tiny `model`."""
        from helpers import save_base  # which skips the module where PEFT is missing

        return self.make(f"{model}-{dtype}", save_base, model, dtype)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Matrices as small as these take longer to share out than to multiply."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
