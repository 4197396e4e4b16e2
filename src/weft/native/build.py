"""Compile `kernels.c` beside it: `python -m weft.native`, and what the wheel is built with.

Standard library alone: the build of the package runs this file before there is a package.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
MOST = 32  # operands of one call
# No product is contracted with a sum: the bits of a result do not depend on the processor.
FLAGS = (
    *("-O3", "-std=c11", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"),
    *("-fopenmp-simd", "-shared", "-fPIC", f"-DMOST={MOST}"),
)


def library() -> Path:
    """Where the compiled form is: named by what it is made of, so that no other is taken."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()
    return SOURCE.with_name(f"kernels-{sysconfig.get_platform()}-{digest[:16]}.so")


def compile_kernels() -> str | None:
    """Compile into `library()`; -> what was in the way, if it could not be done."""
    own = os.environ.get("CC")
    compilers = [own] if own else [sysconfig.get_config_var("CC") or "cc", "cc"]
    problems = []
    for compiler in dict.fromkeys(compilers):
        # Not every compiler makes a function for each kind of processor.
        for more in ((), ("-DONE_PROCESSOR",)):
            try:
                problem = _compile([*shlex.split(compiler), *FLAGS, *more])
            except OSError as error:
                problem = f"{error.filename or compiler}: {error.strerror or error}"
            if problem is None:
                return None
            problems.append(problem)
    return problems[0]


def _compile(command: list[str]) -> str | None:
    target = library()
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        done = subprocess.run(
            [*command, str(SOURCE), "-o", str(partial), "-lm"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return done.stderr.strip() or f"{command[0]} ended with {done.returncode}"
        ctypes.CDLL(str(partial))  # as it will be
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    for old in SOURCE.parent.glob(f"kernels-{sysconfig.get_platform()}-*.so"):
        if old != target:
            old.unlink(missing_ok=True)  # whoever has it open keeps it
    return None
