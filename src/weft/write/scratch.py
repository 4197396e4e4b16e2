"""What an extraction has found so far, on disk: one file for each tensor that is decomposed.

It lies in `OUT.partial/` with the journal; `resume` goes on from there. The adapter is made from it
at the end, when every module's rank is known.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from weft.core.errors import OutputError
from weft.write._journal import NAME as JOURNAL
from weft.write._journal import Journal
from weft.write._replace import sync
from weft.write.adapter import check_folder
from weft.write.checkpoint import check_partial, output_error

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

    from weft.core.specs import Plan, Receipt


def check_place(out: Path, plan: Plan, *, force: bool, resume: bool) -> Path:
    """The folder beside `out` in which it is made, if it may be; touches nothing.

    Raises:
        OutputError: It cannot or must not.
    """
    files = [entry.path for entry in plan.inputs]
    out = check_folder(out, files, force=force, resume=resume)
    partial = out.with_name(out.name + ".partial")
    for file in files:
        if Path(os.path.realpath(file)).is_relative_to(partial):
            raise OutputError(f"{partial} holds the input {file}", "write to another folder")
    check_partial(partial, force=force, resume=resume)
    return partial


class Scratch:
    """The folder of one run, locked."""

    def __init__(
        self,
        out: Path,
        plan: Plan,
        names: Sequence[str],
        *,
        force: bool,
        resume: bool,
        setting: str,
    ) -> None:
        self.folder = check_place(out, plan, force=force, resume=resume)
        self._numbers = {name: number for number, name in enumerate(names)}
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self.folder, plan, resume=resume, setting=setting)
            if not self.receipts:
                self._clear()
        except OSError as error:
            raise output_error(error, self.folder, begun=False) from None

    @property
    def receipts(self) -> dict[str, Receipt]:
        """Of every tensor that has been read."""
        return self._journal.receipts

    def finish(self, receipt: Receipt, tensors: Mapping[str, Tensor] | None) -> None:
        """The tensor is read, and decomposed where `tensors` say how.

        Raises:
            OutputError: The disk is full, or gone.
        """
        try:
            if tensors is not None:
                path = self.path(receipt.name)
                new = path.with_suffix(".new")
                from safetensors.torch import save  # which loads torch

                new.write_bytes(save(dict(tensors)))
                new.rename(path)
            with self._lock:
                self._journal.add([receipt])
        except OSError as error:
            raise output_error(error, self.folder) from None

    def path(self, name: str) -> Path:
        return self.folder / f"{self._numbers[name]:06}.scratch"

    def load(self, name: str, only: Collection[str] = ()) -> dict[str, Tensor]:
        """What `finish` was given; or what of it is called as in `only`."""
        with safe_open(self.path(name), "pt") as file:
            keys = [key for key in file.keys() if not only or key in only]  # noqa: SIM118
            return {key: file.get_tensor(key) for key in keys}

    def forget(self, names: list[str]) -> None:
        """These are to be read again."""
        self._journal.forget(names)

    def close(self) -> None:
        """Let go, and leave what is there for a resumed run."""
        self._journal.close()

    def discard(self) -> None:
        """Let go, and leave nothing."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        sync(self.folder.parent)

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != JOURNAL:
                path.unlink()
