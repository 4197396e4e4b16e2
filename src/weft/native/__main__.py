"""`python -m weft.native` compiles the loops, or says what is in the way."""

from __future__ import annotations

import sys

from weft.native import build

if problem := build.compile_kernels():
    sys.exit(f"weft's loops could not be compiled, and torch does their work:\n{problem}")
sys.stdout.write(f"compiled {build.library().name}\n")
