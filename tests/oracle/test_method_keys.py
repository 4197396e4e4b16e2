"""Disturbed keys of every method of PEFT: read as the sound ones, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from tests.oracle.methods import Case
from tests.oracle.test_all_methods import METHODS
from tests.oracle.test_all_methods import pytestmark as quiet
from weft.core.errors import WeftError
from weft.formats.adapters import open_adapter
from weft.formats.adapters._peft_methods import methods

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from weft.core.specs import Adapter

pytestmark = [pytest.mark.oracle, *quiet]
P = "base_model.model."


def named(key: str, name: str, endings: list[str]) -> str:
    """As the key is in memory: the adapter's name behind that of the parameter."""
    ending = next((e for e in sorted(endings, key=len, reverse=True) if key.endswith(e)), None)
    if ending is None:  # of the whole model
        return key
    stem, _, last = key.rpartition(".")
    if last in ("weight", "bias") and ending.endswith(last):
        return f"{stem}.{name}.{last}"
    return f"{key}.{name}"


def inside(key: str, what: str) -> str:
    return key.replace(P, P + what)


DISTURBED: dict[str, Callable[[str, list[str]], str]] = {
    "adapter name": lambda k, e: named(k, "default", e),
    "another name": lambda k, e: named(k, "my_run", e),
    "twice named": lambda k, e: named(k, "default.default", e),
    "no prefix": lambda k, e: k.removeprefix(P),
    "doubled prefix": lambda k, e: P + k,
    "torch.compile": lambda k, e: inside(k, "_orig_mod."),
    "torch.compile in front": lambda k, e: "_orig_mod." + k,
    "data parallel": lambda k, e: "module." + k,
    "data parallel inside": lambda k, e: inside(k, "module."),
    "no weight": lambda k, e: k.removesuffix(".weight"),
    "base layer": lambda k, e: next(
        (k.removesuffix(end) + ".base_layer" + end for end in e if k.endswith(end)), k
    ),
}


def what_it_does(adapter: Adapter) -> list[Any]:
    return sorted(
        (e.target, e.kind, e.scaling, e.params, [(role, ref.shape) for role, ref in e.tensors])
        for e in adapter.entries
    )


@pytest.mark.parametrize("name", METHODS)
def test_disturbed(tmp_path: Path, name: str) -> None:
    config, model = METHODS[name]
    Case(config(), model=model).merge(tmp_path)
    folder = tmp_path / "adapter"
    file = folder / "adapter_model.safetensors"
    sound = load_file(file)
    want = what_it_does(open_adapter(folder, "adapter"))
    endings = list(methods()[name.split()[0]].SUFFIXES)
    of_the_whole = not all(key.startswith(P) for key in sound)
    for disturbance, change in DISTURBED.items():
        tensors = {change(key, endings): value for key, value in sound.items()}
        if tensors.keys() == sound.keys():
            continue
        save_file(tensors, file, {"format": "pt"})
        try:
            found = open_adapter(folder, "adapter")
        except WeftError:
            assert disturbance == "doubled prefix"
            assert of_the_whole
            continue
        assert what_it_does(found) == want, disturbance
        assert found.repairs, disturbance
        # `base_model.model.base_model.…` could be a module of a model that calls a part so.
        assert not (of_the_whole and disturbance == "doubled prefix")
