"""Bone, what MiSS was called up to PEFT 0.18: `bone_block`, without the variant mini."""

from __future__ import annotations

from weft.formats.adapters._peft_methods._forms import one_of
from weft.formats.adapters._peft_methods.miss import read

__all__ = ["FIELDS", "FORMS", "PEFT_TYPE", "SUFFIXES", "read"]

PEFT_TYPE = "BONE"
SUFFIXES = {".bone_block": "block"}
FIELDS = frozenset({"init_weights"})
FORMS = {"init_weights": one_of("bat")}
