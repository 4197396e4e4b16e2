"""What stands where a model is expected: a checkpoint, an adapter on its base, `model+adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from weft.api import find_base, names_adapter
from weft.core.errors import PlanError, Problem, WeftError
from weft.formats import checkpoint as checkpoints
from weft.formats.adapters import open_adapter
from weft.formats.hub import resolve

if TYPE_CHECKING:
    from weft.core.specs import Adapter, Checkpoint
    from weft.plan._views import View
    from weft.recipes.records import ModelName


def named(text: str) -> ModelName:
    """What `text` means: the path that it is, or `path[@revision][+adapter[@revision][:weight]]…`.

    Raises:
        WeftError: It names no model.
    """
    from weft.recipes import _names
    from weft.recipes.records import ModelName

    try:
        if Path(text).expanduser().exists():  # a folder may have a + or an @ in its name
            return ModelName(text)
        return _names.parse(text)
    except _names.NoName as error:
        raise WeftError(*error.args) from None
    except OSError:
        raise WeftError(f"{text[:60]}… is too long for a name", "give a path or org/name") from None


class Models:
    """Checkpoints and adapters, each opened once, whatever stands on them.

    Args:
        cache_dir: The hub's cache, in place of HF_HOME's.
        dequantise: Float8 weights with scales are taken as what they stand for, where no adapters
            are added; without it they are refused.
    """

    def __init__(self, cache_dir: str | None, *, dequantise: bool = False) -> None:
        self._cache_dir = cache_dir
        self._dequantise = dequantise
        self._bases: dict[tuple[str, str | None], Checkpoint] = {}
        self._adapters: dict[tuple[str, str | None], Adapter] = {}

    def view(self, name: ModelName, made: View | None = None) -> View:
        """A model with its adapters, as a plan.

        Args:
            name: Which.
            made: What an earlier document of a recipe makes, if the name is that of one.

        Raises:
            WeftError: It does not exist, or its adapters do not fit it.
        """
        from weft.plan._views import adapted, renamed, view
        from weft.plan.float8 import dequantised
        from weft.plan.merge import plan_merge

        adapters = [(self._adapter(p, revision), weight) for p, revision, weight in name.adapters]
        if made is not None:
            found = adapted(str(name), made, adapters) if adapters else made
            return renamed(found, name.override_architecture)
        path, revision = name.path, name.revision
        if names_adapter(path, revision=revision, cache_dir=self._cache_dir):
            first = self._adapter(path, revision)
            if first.base_model is None:
                what = f"{path} is an adapter, and does not say of which base model"
                raise WeftError(what, f"write where its base is: path/of/the/base+{path}")
            adapters.insert(0, (first, 1.0))
            base = self._base_of(first, path)
        else:
            base = self.base(path, revision)
        if self._dequantise and not adapters:
            base, plan = dequantised(base)
        else:
            plan = plan_merge(base, adapters)
        given = (base.given, *(adapter.given for adapter, _ in adapters))
        return view(str(name), plan, base, given, name.override_architecture)

    def _base_of(self, adapter: Adapter, path: str) -> Checkpoint:
        """What an adapter stands on that stands where a model should."""
        cure = f"write where its base is: path/of/the/base+{path}"
        find_base(adapter, cure, cache_dir=self._cache_dir)
        return self.base(adapter.base_model or "", adapter.revision)

    def examine(self) -> list[str]:
        """Warnings that the adapters' numbers give rise to.

        Raises:
            PlanError: Numbers that forbid a merge.
        """
        if not self._adapters:
            return []
        from weft.execute.health import examine

        problems: list[Problem] = []
        warnings: list[str] = []
        for adapter in self._adapters.values():
            found, said = examine(adapter)
            problems += found
            warnings += said
        if problems:
            raise PlanError(", ".join(a.given for a in self._adapters.values()), problems)
        return warnings

    def credits(self) -> tuple[str, ...]:
        """Everything that was opened, in that order."""
        bases = [base.given for base in self._bases.values()]
        return tuple(dict.fromkeys([*bases, *(a.given for a in self._adapters.values())]))

    def opened(self, name: ModelName) -> Checkpoint | None:
        """The checkpoint that `view` took for a name without adapters, if it is none itself."""
        return self._bases.get((name.path, name.revision))

    def base(self, path: str, revision: str | None) -> Checkpoint:
        """A checkpoint without adapters."""
        key = (path, revision)
        if key not in self._bases:
            folder = resolve(path, revision=revision, cache_dir=self._cache_dir)
            given = f"{path}@{revision}" if revision else path
            self._bases[key] = checkpoints.open_checkpoint(folder, given)
        return self._bases[key]

    def _adapter(self, path: str, revision: str | None) -> Adapter:
        key = (path, revision)
        if key not in self._adapters:
            folder = resolve(path, revision=revision, cache_dir=self._cache_dir)
            self._adapters[key] = open_adapter(folder, f"{path}@{revision}" if revision else path)
        return self._adapters[key]
