"""The sink for a checkpoint: every byte at its final offset, and the folder appears last of all.

Until then all is in `OUT.partial/`, where the shards bear names that no tool takes for a model.
Interrupted at any moment, a run leaves that folder and a journal, and `resume` goes on from there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from weft.core.dtypes import itemsize
from weft.core.errors import FormatError, OutputError
from weft.core.specs import Plan, Receipt, TensorJob, job_bytes
from weft.core.units import show_size
from weft.formats.safetensors import build_header
from weft.write._journal import NAME as JOURNAL
from weft.write._journal import Journal
from weft.write._open_files import allow_open_files
from weft.write._replace import put_in_place, replaced, sync
from weft.write._shard_file import Flusher, ShardFile
from weft.write.manifest import NAME as MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

INDEX = "model.safetensors.index.json"


class CheckpointSink:
    """Writes the tensors of `plan` to `out`, in any order and from any thread."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        *,
        force: bool = False,
        resume: bool = False,
        setting: str = "",
    ) -> None:
        """Claim the output and lay out its shards; nothing is computed yet.

        Raises:
            OutputError: The output is there already, belongs to another run, or cannot be written.
        """
        self.plan = plan
        self.out, self.partial = _places(out)
        self._force = force
        self._sources: dict[str, int] = {}
        self._shards: dict[str, ShardFile] = {}
        self._lock = threading.Lock()
        self._flusher = Flusher()
        self._headers: dict[str, bytes] = {}
        self._offsets: dict[str, int] = {}
        by_shard: dict[str, list[TensorJob]] = defaultdict(list)
        for job in plan.jobs:
            by_shard[job.shard].append(job)
        self._jobs = dict(by_shard)
        for shard, jobs in self._jobs.items():
            specs = [(job.name, job.dtype, job.shape) for job in aligned(jobs)]
            self._headers[shard], offsets = build_header(specs, dict(plan.metadata))
            self._offsets |= offsets
        check_output(self.out, plan, force=force, resume=resume)
        try:
            self._claim(resume, setting)
        except OSError as error:
            raise output_error(error, self.partial, begun=False) from None

    @property
    def receipts(self) -> dict[str, Receipt]:
        """Of every finished tensor, by name; those of a resumed run included."""
        return self._journal.receipts

    # ------------------------------------------------------------------- the executor's side

    def offset(self, name: str) -> int:
        return self._offsets[name]

    def write(self, job: TensorJob, offset: int, data: memoryview) -> None:
        try:
            self._shards[job.shard].write(data, offset)
        except OSError as error:
            raise output_error(error, self.partial) from None

    def copy(self, job: TensorJob, offset: int, file: str, start: int, count: int) -> None:
        with self._lock:
            if file not in self._sources:
                try:
                    self._sources[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise FormatError(f"cannot read {file}: {error.strerror}") from None
        try:
            self._shards[job.shard].copy(self._sources[file], start, offset, count)
        except OSError as error:
            raise output_error(error, self.partial) from None

    def finish(self, receipts: Sequence[Receipt]) -> None:
        try:
            with self._lock:
                self._journal.add(receipts)
        except OSError as error:
            raise output_error(error, self.partial) from None

    # -------------------------------------------------------------------- begin and end

    def pending(self) -> list[TensorJob]:
        """The jobs without a receipt, in the order of the plan."""
        return [job for job in self.plan.jobs if job.name not in self.receipts]

    def commit(self, texts: dict[str, str], before_rename: Callable[[], None]) -> None:
        """Write the files beside the shards, make all of it durable, and give it its name.

        Args:
            texts: File name -> content, for what is known only now: the card and the manifest.
            before_rename: Called when everything is written; raises if the inputs have changed.

        Raises:
            OutputError: Something could not be written; a resumed run does it again.
        """
        self._flusher.stop()
        try:
            self._make_durable()
            for side in self.plan.side_files:
                target = self.partial / side.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if side.source is not None:
                    shutil.copyfile(side.source, target)
                else:
                    self._write_text(side.name, side.text or "")
            for name, text in texts.items():
                self._write_text(name, text)
            before_rename()
            # Only now do the weights get their names, and the index last: whatever a kill leaves,
            # what can be loaded is whole.
            for shard in self._shards:
                (self.partial / (shard + ".partial")).rename(self.partial / shard)
            if list(self._jobs) != ["model.safetensors"]:
                self._write_text(INDEX, self._index())
            for path in [*self.partial.rglob("*"), self.partial]:
                sync(path)
            (self.partial / JOURNAL).unlink()
            put_in_place(self.partial, self.out)
            if self._force:
                self._clear_replaced()
        except OSError as error:
            raise output_error(error, self.partial) from None
        self.close()

    def leftovers(self) -> list[Path]:
        """What is left of models that had the output's name, and is not deleted."""
        return replaced(self.out)

    def close(self) -> None:
        """Let go of every file; without `commit`, the partial folder stays for a resumed run."""
        self._flusher.stop()
        for shard in self._shards.values():
            shard.close()
        for handle in self._sources.values():
            os.close(handle)
        self._shards, self._sources = {}, {}
        with contextlib.suppress(OSError):
            self._journal.close()

    def _claim(self, resume: bool, setting: str) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.partial, self.plan, resume=resume, setting=setting)
        try:
            _clear(self.partial, keep=self._headers if self.receipts else ())
            for shard, header in self._headers.items():
                jobs = self._jobs[shard]
                path = self.partial / (shard + ".partial")
                if (self.partial / shard).exists():  # killed while committing
                    (self.partial / shard).rename(path)
                size = len(header) + sum(job_bytes(job) for job in jobs)
                if not path.exists() or path.stat().st_size != size:
                    self._journal.forget([job.name for job in jobs])
                self._shards[shard] = ShardFile(path, header, size, self._flusher)
        except BaseException:
            self.close()
            raise

    def _make_durable(self) -> None:
        try:
            self._flusher.check()
            for shard in self._shards.values():
                shard.sync()
        except OSError:
            # The system forgets what it could not write: none of it may count for a resumed run.
            self._journal.forget([job.name for job in self.plan.jobs])
            raise

    def discard(self) -> None:
        """Let go, and leave nothing: what was begun cannot be finished."""
        self.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def _write_text(self, name: str, text: str) -> None:
        # A folder's name may be no UTF-8, and the manifest quotes it.
        (self.partial / name).write_text(text, encoding="utf-8", errors="backslashreplace")

    def _index(self) -> str:
        weight_map = {job.name: job.shard for job in self.plan.jobs}
        content = {
            "metadata": {"total_size": self.plan.nbytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        return json.dumps(content, indent=2) + "\n"

    def _clear_replaced(self) -> None:
        """Finish what killed runs were about to do, now that there is a whole model in the place.

        What is left of a model that was half deleted may be anything: the user is told of it.
        """
        for folder in replaced(self.out):
            if _is_model(folder):
                shutil.rmtree(folder, ignore_errors=True)


def aligned(jobs: Sequence[TensorJob]) -> list[TensorJob]:
    """The base's order, unless a tensor would then begin where its dtype cannot be read from."""
    offset = 0
    for job in jobs:
        if offset % itemsize(job.dtype):
            return sorted(jobs, key=lambda job: -itemsize(job.dtype))
        offset += job_bytes(job)
    return list(jobs)


def check_output(out: Path, plan: Plan, *, force: bool, resume: bool) -> None:
    """Whether a run of `plan` can write to `out`; looks, and touches nothing on the disk.

    Raises:
        OutputError: It cannot or must not, and why.
    """
    try:
        allow_open_files(plan)
        _check_output(*_places(out), plan, force=force, resume=resume)
    except OSError as error:
        raise output_error(error, out, begun=False) from None


def _places(out: Path) -> tuple[Path, Path]:
    """The output, without links, and the folder beside it in which it is made."""
    out = Path(os.path.realpath(out))
    if not out.name:
        raise OutputError(f"{out} cannot be the output", "give a folder that does not exist yet")
    return out, out.with_name(out.name + ".partial")


def _check_output(out: Path, partial: Path, plan: Plan, *, force: bool, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", "give a folder that does not exist yet")
    for entry in plan.inputs:
        # Both where the input lies and where its link leads: the hub's cache is made of links.
        folder = Path(os.path.realpath(Path(entry.path).parent))
        places = (folder, Path(os.path.realpath(entry.path)))
        for ours in (out, partial):
            if any(place.is_relative_to(ours) for place in places):
                raise OutputError(f"{ours} holds the input {entry.path}", "write to another folder")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            cure = (
                "--force replaces it, or give another -o" if _is_model(out) else "give another -o"
            )
            begun = partial.exists() or not resume
            so = "" if begun else ", so there is nothing to resume"
            raise OutputError(f"{out} exists and is not empty{so}", cure)
        if not _is_model(out):
            raise OutputError(
                f"{out} does not look like a model, so --force does not delete it",
                "remove it yourself, or give another -o",
            )
    check_partial(partial, force=force, resume=resume)
    above = existing(out.parent)
    if not above.is_dir():
        raise OutputError(f"{above} is a file, and {out} would lie in it", "give another -o")
    free = shutil.disk_usage(above).free
    # A resumed run has claimed part of it already.
    held = sum(f.stat().st_blocks * 512 for f in partial.glob("*")) if partial.is_dir() else 0
    if plan.nbytes > free + held:
        raise OutputError(
            f"{out.parent} has {show_size(free)} free, the output takes {show_size(plan.nbytes)}",
            "free some space, or give another -o",
        )


def check_partial(partial: Path, *, force: bool, resume: bool) -> None:
    """Whether a run may go on in the folder `partial`, or begin there.

    Raises:
        OutputError: It is something else, or what is in it was not to be touched.
    """
    if partial.is_dir() and any(partial.iterdir()) and not _is_ours(partial):
        raise OutputError(
            f"{partial} is not what a run of weft left, and a run would have to replace it",
            "move it away, or give another -o",
        )
    if partial.exists() and not (force or resume):
        raise OutputError(
            f"{partial} is what an interrupted run left",
            "--resume goes on from there, --force starts over",
        )


def _is_model(folder: Path) -> bool:
    """Written by weft, or a config with weights: something that --force may replace."""
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return (folder / MANIFEST).exists() or ((folder / "config.json").exists() and weights)


def _is_ours(partial: Path) -> bool:
    return any((partial / name).exists() for name in (JOURNAL, MANIFEST))


def _clear(partial: Path, keep: Iterable[str]) -> None:
    """Remove all but the journal and the shards `keep`: nothing stale may end up in the output."""
    kept = {JOURNAL, *keep, *(f"{shard}.partial" for shard in keep)}
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in kept:
            path.unlink()


def existing(folder: Path) -> Path:
    """The first folder above `folder`, or itself, that is there."""
    return folder if folder.exists() else existing(folder.parent)


def output_error(error: OSError, partial: Path, *, begun: bool = True) -> OutputError:
    """An operating system's error as an answer: what, where, and what next."""
    then = "then run the same command with --resume" if begun else "then run the command again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full: cannot write {partial}", f"free some space, {then}")
    if error.errno == errno.EFBIG:
        return OutputError(
            f"{partial}: a file would pass the file-size limit",
            f"raise it (ulimit -f) or write smaller shards (--max-shard-size); {then}",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return OutputError(
            f"cannot write {partial}: {error.strerror}", "give an -o that you may write to"
        )
    cure = f"see that its disk is there and sound, {then}" if begun else "give another -o"
    return OutputError(f"cannot write {partial}: {error.strerror or error}", cure)
