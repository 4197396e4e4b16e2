"""`weft.resize`: an adapter -> the same adapter of smaller rank, as near as any of that rank."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.core import dtypes, units
from weft.core.errors import OutputError, PlanError, WeftError
from weft.formats.adapters import open_adapter
from weft.formats.hub import resolve
from weft.formats.identity import identify
from weft.plan.resize import groups_of, resized_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weft.core.specs import Adapter, Shape, TensorRef
    from weft.execute._blocks import Files
    from weft.execute.resize import Resized
    from weft.plan.resize import Group, Pair
    from weft.write.adapter import Made, Piece


@dataclass(frozen=True, slots=True)
class ResizedModule:
    """What became of one module (or of the fused experts of one).

    Attributes:
        name: Its path.
        before, rank: Its rank, as it was and as it is.
        energy: ‖ΔW‖².
        kept: The share of it that the rank holds.
        relative_error: ‖ΔW − ΔW′‖ / ‖ΔW‖ with the factors as they are stored.
    """

    name: str
    before: int
    rank: int
    energy: float
    kept: float
    relative_error: float


@dataclass(frozen=True, slots=True)
class ResizeReport:
    """What `resize` did.

    Attributes:
        output: The folder.
        modules: In the adapter's order.
        kept: The share of ‖ΔW‖² that is left, over all modules together.
        relative_error: ‖ΔW − ΔW′‖ / ‖ΔW‖ over all of them.
        before, nbytes: Size of the weights' file, as it was and as it is.
        manifest: The content of `weft.json`.
        warnings: What the user should know before using the output.
    """

    output: Path
    modules: tuple[ResizedModule, ...] = field(repr=False)
    kept: float
    relative_error: float
    before: int
    nbytes: int
    manifest: dict[str, Any] = field(repr=False)
    warnings: tuple[str, ...]

    @property
    def worst(self) -> list[ResizedModule]:
        """The five modules that lost most."""
        return sorted(self.modules, key=lambda m: -m.relative_error)[:5]


def resize(
    adapter: str | Path,
    *,
    output: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    size: str | int | None = None,
    dtype: str | None = None,
    force: bool = False,
    cache_dir: str | None = None,
    command: str | None = None,
) -> ResizeReport:
    """Make the factors of a LoRA smaller: the best of the rank, in float64, without the base.

    Exactly one of `rank`, `energy` and `size` says how small. Scaling becomes 1; tensors trained in
    full, and biases, are copied as they are (a bias of `lora_B` takes the old scaling in).

    Args:
        adapter: Folder or hub id of a LoRA of PEFT's.
        output: Folder to create.
        rank: Of every module that has more.
        energy: The smallest rank per module that keeps this share of ‖ΔW‖², such as 0.95.
        size: The best ranks for which the weights' file has at most so many bytes, such as `50MB`.
        dtype: `bfloat16`, `float16` or `float32` for the factors; None keeps each one's own.
        force: Replace an adapter that is there already, or what an interrupted run left.
        cache_dir: The hub's cache, in place of HF_HOME's.
        command: What the card and the manifest quote; None writes the Python call.

    Raises:
        WeftError: See `weft.core.errors`; the output is not there.
    """
    from weft.execute._blocks import Files
    from weft.write.adapter import check_places

    rule = {"rank": rank, "energy": energy, "size": size}
    _check(rule)
    kind = dtypes.parse(dtype) if dtype else None
    opened = open_adapter(resolve(str(adapter), cache_dir=cache_dir), str(adapter))
    groups = groups_of(opened)
    check_places(Path(output), opened.files, force=force)
    warnings = _examined(opened)
    options = {
        name: value for name, value in (*rule.items(), ("dtype", dtype)) if value is not None
    }
    given = "".join(f", {name}={value!r}" for name, value in options.items())
    call = f"weft.resize({opened.given!r}, output={str(output)!r}{given})"
    files = Files()
    try:
        work = _Work(opened, groups, kind, files)
        ranks = work.choose(rule)
        return work.write(ranks, Path(output), command or call, warnings, force=force)
    finally:
        files.close()


def _check(rule: Mapping[str, Any]) -> None:
    given = [name for name, value in rule.items() if value is not None]
    if len(given) != 1:
        what = f"{' and '.join(given)} are given" if given else "nothing says how small"
        raise WeftError(f"{what}: one of rank, energy and size is needed", "such as --rank 16")
    if rule["rank"] is not None and rule["rank"] < 1:
        raise WeftError(f"a rank of {rule['rank']} makes no sense", "PEFT has ranks from 1 on")
    if rule["energy"] is not None and not 0 < rule["energy"] <= 1:
        raise WeftError(f"energy is a share, and {rule['energy']} is none", "such as --energy 0.95")


def _examined(adapter: Adapter) -> list[str]:
    """What the numbers give cause to say; NaN and infinity forbid going on."""
    from weft.execute.health import examine

    problems, warnings = examine(adapter)
    if problems:
        raise PlanError(f"the adapter {adapter.given}", problems)
    return warnings


class _Work:
    """One run, after everything that can be refused was refused."""

    def __init__(
        self, adapter: Adapter, groups: list[Group], dtype: str | None, files: Files
    ) -> None:
        self.begin = time.perf_counter()
        self.adapter = adapter
        self.groups = groups
        self.dtype = dtype
        self.files = files
        self.lost: dict[Pair, tuple[float, float, float]] = {}  # ‖ΔW‖², of it cut, and the error²
        self._last: tuple[Pair, Resized] | None = None

    # ------------------------------------------------------------------------------------- ranks

    def choose(self, rule: Mapping[str, Any]) -> dict[str, int]:
        """Group -> rank; at least 1, since PEFT has no rank of 0."""
        from weft.decompose.ranks import rank_for_energy
        from weft.execute.resize import spectrum

        if rule["rank"] is not None:
            return {group.name: min(rule["rank"], group.pairs[0].rank) for group in self.groups}
        spectra = [spectrum(group, self.files) for group in self.groups]
        if rule["size"] is not None:
            return self._within(units.parse_size(str(rule["size"])), spectra)
        ranks = {}
        for group, values in zip(self.groups, spectra, strict=True):
            whole = math.fsum(value * value for value in values)
            # A share of 1 is reached but for the last bit of the sum.
            share = rule["energy"] * (1 - 1e-12)
            ranks[group.name] = max(rank_for_energy(values, whole, share) or 0, 1)
        return ranks

    def _within(self, budget: int, spectra: Sequence[Sequence[float]]) -> dict[str, int]:
        from weft.decompose.ranks import Candidate, ranks_for_size

        least = {group.name: 1 for group in self.groups}
        most = {group.name: group.pairs[0].rank for group in self.groups}
        # The header of the largest is no shorter than that of any other.
        head = self._size(most)[0]
        fixed = sum(self._size(least)) - self._size(least)[0]
        modules = []
        for group, values in zip(self.groups, spectra, strict=True):
            cost = sum(self._unit(pair) for pair in group.pairs)
            modules.append(Candidate(values or [0.0], cost, 1))
            fixed -= cost
        found = ranks_for_size(modules, budget - head - fixed)
        if found is None:
            smallest = sum(self._size(least))
            raise WeftError(
                f"{self.adapter.given} takes {smallest:,} bytes with rank 1 everywhere, and "
                f"--size allows {budget:,}",
                f"give at least {head - self._size(least)[0] + smallest:,} bytes"
                + ("" if self.dtype == "bfloat16" else ", or --dtype bfloat16"),
            )
        return {group.name: rank for group, rank in zip(self.groups, found, strict=True)}

    def _unit(self, pair: Pair) -> int:
        """Bytes that one more rank takes."""
        kinds = self._dtypes(pair)
        rows, columns = pair.A.numel // pair.A.shape[0], pair.B.numel // pair.B.shape[1]
        each = rows * dtypes.itemsize(kinds[0]) + columns * dtypes.itemsize(kinds[1])
        return each * pair.experts

    def _size(self, ranks: Mapping[str, int]) -> tuple[int, int]:
        """Bytes of the head and of the data of `adapter_model.safetensors`."""
        from weft.write.adapter import Made, head_of

        tensors = self._tensors(ranks)
        data = sum(
            math.prod(piece.shape) * dtypes.itemsize(piece.dtype)
            if isinstance(piece, Made)
            else piece.ref.nbytes
            for piece in tensors.values()
        )
        return len(head_of(tensors)), data

    # ----------------------------------------------------------------------------------- tensors

    def _dtypes(self, pair: Pair) -> tuple[str, str]:
        return self.dtype or pair.A.dtype, self.dtype or pair.B.dtype

    def _tensors(self, ranks: Mapping[str, int]) -> dict[str, Made | Piece]:
        """Every tensor of the output, in the order of the file that is read."""
        from weft.write.adapter import Piece

        new: dict[TensorRef, Made] = {}
        for group in self.groups:
            for pair in group.pairs:
                rank = ranks[group.name]
                wide = rank * pair.experts
                shapes = ((wide, *pair.A.shape[1:]), (pair.B.shape[0], wide, *pair.B.shape[2:]))
                for ref, dtype, shape in zip(
                    (pair.A, pair.B), self._dtypes(pair), shapes, strict=True
                ):
                    new[ref] = self._made(group, pair, rank, ref, dtype, shape)
                if pair.bias is not None and pair.scaling != 1:
                    bias = pair.bias
                    new[bias] = self._made(group, pair, rank, bias, bias.dtype, bias.shape)
        refs = {key: self.adapter.tensors[old] for key, old in self.adapter.keys.items()}
        return {key: new[ref] if ref in new else Piece(ref, ref.shape) for key, ref in refs.items()}

    def _made(
        self, group: Group, pair: Pair, rank: int, ref: TensorRef, dtype: str, shape: Shape
    ) -> Made:
        from weft.execute.resize import resized
        from weft.write.adapter import Made

        def values() -> bytes:
            # A and B of a pair follow each other in the file: what was made last is kept.
            if self._last is None or self._last[0] is not pair:
                found = resized(pair, rank, self._dtypes(pair), self.files)
                self._last = pair, found
                self.lost[pair] = (found.energy, found.cut, found.error)
            return self._last[1].tensors[ref]

        return Made(dtype, shape, values)

    # ----------------------------------------------------------------------------------- writing

    def write(
        self,
        ranks: Mapping[str, int],
        output: Path,
        command: str,
        warnings: Sequence[str],
        *,
        force: bool,
    ) -> ResizeReport:
        from weft.write.adapter import write_adapter
        from weft.write.adapter_card import resized_card

        weights = {ref.file for ref in self.adapter.tensors.values()}
        before = sum(s.identity.size for s in self.adapter.sources if s.path in weights)
        nbytes = sum(self._size(ranks))
        reports: list[ResizeReport] = []

        def texts() -> dict[str, str]:
            self._unchanged()
            modules = tuple(self._module(group, ranks[group.name]) for group in self.groups)
            report = self._report(output, modules, before, nbytes, warnings, command)
            reports.append(report)
            manifest = json.dumps(report.manifest, indent=2, ensure_ascii=False) + "\n"
            card = resized_card(self.adapter, report.manifest)
            return {"weft.json": manifest, "README.md": card}

        beside = {name: Path(self.adapter.folder, name) for name in self.adapter.side_files}
        config = resized_config(self.adapter, self.groups, ranks)
        write_adapter(output, self._tensors(ranks), config, beside, texts=texts, force=force)
        return reports[0]

    def _unchanged(self) -> None:
        for source in self.adapter.sources:
            path = Path(source.path)
            if not path.exists() or identify(path) != source.identity:
                raise OutputError(f"{path} changed while it was being read", "run again")

    def _module(self, group: Group, rank: int) -> ResizedModule:
        lost = [self.lost[pair] for pair in group.pairs]
        energy, cut, error = (math.fsum(column) for column in zip(*lost, strict=True))
        before = group.pairs[0].rank
        return ResizedModule(group.name, before, rank, energy, *_shares(energy, cut, error))

    def _report(
        self,
        output: Path,
        modules: tuple[ResizedModule, ...],
        before: int,
        nbytes: int,
        warnings: Sequence[str],
        command: str,
    ) -> ResizeReport:
        energy, cut, error = (math.fsum(column) for column in zip(*self.lost.values(), strict=True))
        kept, relative = _shares(energy, cut, error)
        report = ResizeReport(output, modules, kept, relative, before, nbytes, {}, tuple(warnings))
        report.manifest.update(
            {
                "schema": 1,
                "weft": version("weft"),
                "operation": "resize",
                "command": command,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - self.begin, 3),
                "inputs": [
                    {"role": "adapter", "file": s.path, "bytes": s.identity.size,
                     "header_sha256": s.header}
                    for s in self.adapter.sources
                ],
                "repairs": [str(repair) for repair in self.adapter.repairs],
                "warnings": list(warnings),
                "totals": {
                    "modules": len(modules),
                    "kept": kept,
                    "relative_error": relative,
                    "bytes_before": before,
                    "bytes": nbytes,
                },
                "worst": [module.name for module in report.worst],
                "modules": {
                    module.name: {
                        "rank_before": module.before,
                        "rank": module.rank,
                        "norm": math.sqrt(module.energy),
                        "kept": module.kept,
                        "relative_error": module.relative_error,
                    }
                    for module in modules
                },
            }
        )  # fmt: skip
        return report


def _shares(energy: float, cut: float, error: float) -> tuple[float, float]:
    """The share of the energy that is kept, and the relative error; of nothing, all and none."""
    return (1 - cut / energy, math.sqrt(error / energy)) if energy else (1.0, 0.0)
