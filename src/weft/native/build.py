"""Compile `kernels.c` beside it: `python -m weft.native.build`, and what the wheel is built with.

Standard library alone: the build of the package runs this file before there is a package.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
# No product is contracted with a sum: the bits of a result do not depend on the processor.
FLAGS = (
    *("-O3", "-std=c11", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"),
    *("-fopenmp-simd", "-shared", "-fPIC"),
)


def library() -> Path:
    """Where the compiled form is; by the source's hash, so that none of another source is taken."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    return SOURCE.with_name(f"kernels-{digest[:16]}.so")


def compile_kernels() -> str | None:
    """Compile into `library()`; -> what was in the way, if it could not be done."""
    target = library()
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    problem = ""
    for more in ((), ("-DONE_PROCESSOR",)):
        command = [*shlex.split(compiler)[:1], *FLAGS, *more, str(SOURCE), "-o", str(partial)]
        try:
            done = subprocess.run([*command, "-lm"], capture_output=True, text=True, check=False)
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        if not done.returncode:
            break
        problem = problem or done.stderr.strip() or f"{command[0]} ended with {done.returncode}"
    else:
        partial.unlink(missing_ok=True)
        return problem
    for old in SOURCE.parent.glob("kernels-*.so"):
        old.unlink()  # whoever has it open keeps it
    partial.replace(target)
    return None


if __name__ == "__main__":
    if problem := compile_kernels():
        sys.exit(f"weft's kernels could not be compiled, and torch does their work:\n{problem}")
