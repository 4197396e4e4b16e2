"""Receipts on disk: what of an interrupted run is done and need not be done again.

One JSON object a line: first what the run is (plan, inputs, this boot of the machine), then one
receipt per finished tensor, written after its bytes. It lives in the output's `.partial` folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.core.errors import OutputError
from weft.core.specs import Plan, Receipt
from weft.write._lock import lock

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "weft-journal.jsonl"
_START_OVER = "--force starts over"


class Journal:
    """The journal of one `.partial` folder, locked: two runs into one output are refused."""

    def __init__(self, folder: Path, plan: Plan, *, resume: bool, setting: str) -> None:
        self.path = folder / NAME
        self.receipts: dict[str, Receipt] = {}
        self._handle = -1
        self._folder = lock(folder)
        try:
            mode = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._handle = os.open(self.path, mode, 0o644)
            head = _head(plan, setting)
            if resume and self.path.stat().st_size:
                self._read(head, plan)
            if not self.receipts:
                os.ftruncate(self._handle, 0)
                self._append([head])
        except BaseException:
            self.close()
            raise

    def add(self, receipts: Sequence[Receipt]) -> None:
        """Note that these tensors are written."""
        self._append([asdict(receipt) for receipt in receipts])
        self.receipts.update({receipt.name: receipt for receipt in receipts})

    def forget(self, names: Sequence[str]) -> None:
        """Drop receipts whose bytes turned out to be lost, and write down what is left."""
        lost = set(names) & set(self.receipts)
        if lost:
            head = self.path.read_text().splitlines()[0]
            self.receipts = {n: r for n, r in self.receipts.items() if n not in lost}
            os.ftruncate(self._handle, 0)
            self._append([json.loads(head), *(asdict(r) for r in self.receipts.values())])

    def close(self) -> None:
        for handle in (self._handle, self._folder):
            if handle >= 0:
                os.close(handle)
        self._handle = self._folder = -1

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        data = text.encode()
        while data:
            data = data[os.write(self._handle, data) :]

    def _read(self, head: dict[str, Any], plan: Plan) -> None:
        found, *lines = self.path.read_text(errors="replace").splitlines() or [""]
        try:
            old = json.loads(found)
            inputs = old["inputs"]
        except (ValueError, TypeError, KeyError):
            return  # killed before the first line was out: nothing is done yet
        if old.get("plan") != head["plan"]:
            raise OutputError(
                f"{self.path.parent} was begun with other inputs or options",
                f"give the ones it was begun with, or {_START_OVER}",
            )
        if old.get("setting") != head["setting"]:
            raise OutputError(
                f"{self.path.parent} was begun with {old.get('setting')}, "
                f"and this is {head['setting']}",
                f"the bits could differ: go on with that, or {_START_OVER}",
            )
        for entry, was in zip(plan.inputs, inputs, strict=True):
            if list(entry.identity) != was:
                raise OutputError(
                    f"{entry.path} has changed since {self.path.parent} was begun", _START_OVER
                )
        if old.get("boot") != head["boot"]:
            return  # the bytes may have died with the machine's memory, whatever the journal says
        for line in lines:
            try:
                receipt = Receipt(**json.loads(line))
                self.receipts[receipt.name] = receipt
            except (ValueError, TypeError):
                break  # the line that the kill tore
        self._rewrite(old)

    def _rewrite(self, head: dict[str, Any]) -> None:
        """Without the torn line, so that the next one begins on a line of its own."""
        if self.receipts:
            os.ftruncate(self._handle, 0)
            self._append([head, *(asdict(receipt) for receipt in self.receipts.values())])


def _head(plan: Plan, setting: str) -> dict[str, Any]:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "schema": 1,
        "plan": plan.hash,
        "setting": setting,
        "inputs": [list(entry.identity) for entry in plan.inputs],
        "boot": boot.read_text().strip() if boot.exists() else "",
    }
