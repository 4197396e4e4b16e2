"""Which modules of a model an adapter's config names: what its tensors can be held against."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Whole paths or their ends from a dot on; or one regular expression that a whole path must match.
Modules = frozenset[str] | str


@dataclass(frozen=True, slots=True)
class Selection:
    """The modules that were adapted, as the config has it.

    Attributes:
        targets: The modules.
        others: Regular expressions of paths that the config speaks of elsewhere.
        excluded: Left out, though `targets` names them.
        whole: Parts of paths: what is inside of them is trained in full.
        layers: Numbers of the layers to which all of this is restricted, if it is.
        tied: What is outside the layers may be there unnamed: an output that follows the input.
    """

    targets: Modules
    others: tuple[str, ...] = ()
    excluded: Modules = frozenset()
    whole: frozenset[str] = frozenset()
    layers: frozenset[int] = frozenset()
    tied: bool = False

    def names(self, module: str) -> bool:
        """Whether the config may mean `module`: false only where it cannot."""
        elsewhere = any(re.match(pattern, module) for pattern in self.others)
        return elsewhere or _among(module, self.targets) or (self.tied and not numbers(module))

    def promises(self, module: str) -> bool:
        """Whether the config must mean `module`: true only where no field could have spared it."""
        if not _among(module, self.targets) or _among(module, self.excluded):
            return False
        if any(f".{part}." in f".{module}." for part in self.whole):
            return False
        # Releases of PEFT differ in which of several numbers is the layer's.
        return not self.layers or self.layers.issuperset(numbers(module))


def numbers(name: str) -> list[int]:
    """The parts of a dotted name that are numbers: layers, experts."""
    return [int(part) for part in name.split(".") if part.isdecimal() and len(part) < 10]


def _among(module: str, modules: Modules) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    parts = module.split(".")
    return any(".".join(parts[n:]) in modules for n in range(len(parts)))
