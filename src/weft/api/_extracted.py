"""What an extraction came to: per module and in all, for the manifest and for people."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from weft.api._execution import outweighing
from weft.core.units import show_share, some
from weft.formats.safetensors import build_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from weft.core.specs import Receipt
    from weft.execute._decomposed import Spectrum
    from weft.plan._adapter_form import AdapterForm
    from weft.plan.extract import Change, ExtractPlan

_WORST = 5


class Extracted:
    """The sums of a finished run."""

    def __init__(
        self,
        plan: ExtractPlan,
        form: AdapterForm,
        ranks: Mapping[str, int],
        receipts: Mapping[str, Receipt],
        errors: Mapping[str, Sequence[float]],
        spectra: Mapping[str, Spectrum],
    ) -> None:
        self.plan, self.form, self.ranks = plan, form, ranks
        self.receipts, self.errors, self.spectra = receipts, errors, spectra
        read = [change for change in plan.changes if change.is_read]
        self.changed = [change for change in read if receipts[change.name].changed]
        self.same = len(plan.changes) - len(self.changed)
        self.low = [change for change in self.changed if change.name in form.ranks]
        self.saved = [c for c in self.changed if c.name in form.saved]
        kept = {change.name for change in (*self.low, *self.saved)}
        self.left = [change for change in self.changed if change.name not in kept]

    def manifest(
        self, *, tuned: str, base: str, command: str, warnings: Sequence[str], begin: float
    ) -> dict[str, Any]:
        """The content of `weft.json`; every field is described in docs/reference/files.md."""
        modules = {change.path: self._module(change) for change in self.low}
        worst = sorted(modules, key=lambda path: -modules[path]["relative_error"])[:_WORST]
        return {
            "schema": 1,
            "weft": version("weft"),
            "operation": "extract",
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "plan": self.plan.reads.hash,
            "seconds": round(time.perf_counter() - begin, 3),
            "tuned": tuned,
            "base": base,
            "inputs": [
                {"role": e.role, "file": e.path, "bytes": e.size}
                | {
                    name: digest
                    for name, digest in (("header_sha256", e.header), ("sha256", e.content))
                    if digest
                }
                for e in self.plan.reads.inputs
            ],
            "notes": list(self.plan.notes),
            "warnings": [*warnings, *self._warnings()],
            "rule": str(self.plan.wishes.rule),
            "dtype": self.plan.dtype,
            "totals": self._totals(),
            "serving": _serving(self.form),
            "worst": worst,
            "modules": modules,
            "saved": {c.path: {"why": c.why or _SMALLER} | self._size(c) for c in self.saved},
            "left_out": {c.path: {"why": self._why_left(c)} | self._size(c) for c in self.left},
            "tensors": {
                entry.key: {"dtype": entry.dtype, "shape": entry.shape}
                for entry in self.form.entries
            },
        }

    def _module(self, change: Change) -> dict[str, Any]:
        spectrum, rank = self.spectra[change.name], self.form.ranks[change.name]
        energy, error = float(spectrum.energy.sum()), math.fsum(self.errors[change.name])
        left_out = math.fsum(spectrum.errors(rank))
        signals = [spectrum.signal(n) for n in range(change.form.count)]
        fits = [signal.fits for signal in signals if signal.fits is not None]
        bound = spectrum.bound(rank)
        return {
            "kind": change.form.kind,
            "rank": rank,
            "norm": math.sqrt(energy),
            "relative": _ratio(energy, self.receipts[change.name].base or 0.0),
            "kept": 1 - left_out / energy,
            "relative_error": _ratio(error, energy),
            "bound": bound if math.isfinite(bound) else None,
            "noise": {
                "edge": max(spectrum.edge(n) for n in range(change.form.count)),
                "rank_above": max(signal.rank for signal in signals),
                "kept_above": min(signal.kept for signal in signals),
                "fits": all(fits) if fits else None,
            },
        }

    def _size(self, change: Change) -> dict[str, Any]:
        """How far a tensor moved, if it was there before."""
        receipt = self.receipts[change.name]
        if change.fresh:
            return {"norm": None, "relative": None}
        delta = receipt.delta or 0.0
        return {"norm": math.sqrt(delta), "relative": _ratio(delta, receipt.base or 0.0)}

    def _why_left(self, change: Change) -> str:
        if change.action == "decompose":
            if self.plan.wishes.rule.kind == "size":
                return "others keep more of ΔW for the bytes that there are"
            return "no singular value stands above the noise of rounding"
        return change.why

    def _energy(self, changes: Iterable[Change]) -> float:
        """Their ‖ΔW‖²; what the base lacks, or has in another shape, has no ΔW."""
        return math.fsum(self.receipts[c.name].delta or 0.0 for c in changes if not c.fresh)

    def _totals(self) -> dict[str, Any]:
        receipts = self.receipts
        energy, left = self._energy(self.changed), self._energy(self.left)
        errors = [error for change in self.low for error in self.errors[change.name]]
        error = math.fsum(errors) + left
        tuned = math.fsum(receipts[c.name].base or 0.0 for c in self.plan.changes if c.is_read)
        entries = [(e.key, e.dtype, e.shape) for e in self.form.entries]
        head, _ = build_header(entries, {"format": "pt"})
        return {
            "tensors": len(self.plan.changes),
            "changed": len(self.changed),
            "unchanged": self.same,
            "modules": len(self.low),
            "saved": len(self.saved),
            "left_out": len(self.left),
            "kept": max(0.0, 1 - error / energy) if energy else 1.0,
            "relative_error": _ratio(error, energy),
            "model_error": _ratio(error, tuned),
            "bytes": len(head) + sum(_bytes(e.dtype, e.shape) for e in self.form.entries),
        }

    def _warnings(self) -> list[str]:
        found = [*self.form.notes]
        if self.left:
            # Noise alone is no loss; what a filter leaves out may be one.
            lost, whole = self._energy(self.left), self._energy(self.changed)
            reasons = "; ".join(dict.fromkeys(self._why_left(c) for c in self.left))
            fresh = [c.path for c in self.left if c.fresh]
            beside = f" (not counting {some(fresh, 'tensor')}: no ΔW)" if fresh else ""
            found.append(
                f"{some([c.path for c in self.left], 'changed tensor')} left as in the base, "
                f"{show_share(lost / whole if whole else 0.0)} of ‖ΔW‖²{beside}: {reasons}"
            )
        sizes = [(self._size(c)["relative"] or 0.0, c.path) for c in self.low]
        found += outweighing(sizes, "check that TUNED was tuned from this BASE")
        loose = [c.path for c in self.low if self._is_loose(c)]
        if loose:
            found.append(
                f"it is not proved that the error of {some(loose, 'tensor')} is within 0.2 % of "
                "the least that a matrix of that rank has: `bound` in weft.json says what is"
            )
        kind = self.plan.wishes.rule.kind
        auto = kind == "auto"
        if auto:
            found += self._doubts()
        elif kind == "rank":
            found += self._noisy()
        large = [c.path for c in self.low if c.form.numbers(self.form.ranks[c.name]) > _count(c)]
        if large:
            why = "rounding hides so little of the update that " if auto else ""
            found.append(
                f"{why}the factors of {some(large, 'tensor')} are larger than the tensor: "
                f"{'--rank or' if auto else 'a lower --rank or'} --energy makes them smaller, "
                "--save keeps it in full"
            )
        return found

    def _is_loose(self, change: Change) -> bool:
        """Whether the proof failed, and not for float32 alone."""
        from weft.decompose.krylov import ROUNDING, TOLERANCE

        spectrum, rank = self.spectra[change.name], self.form.ranks[change.name]
        left = _ratio(math.fsum(spectrum.errors(rank)), float(spectrum.energy.sum()))
        # What a bound grants to rounding is about ROUNDING / left.
        return left > _TELLING * ROUNDING and spectrum.bound(rank) > TOLERANCE + 2 * ROUNDING / left

    def _noisy(self) -> list[str]:
        """About ranks that hold more than the update."""
        above = {c.path: self._above(c) for c in self.low}
        noisy = [c.path for c in self.low if above[c.path] < self.form.ranks[c.name]]
        if not noisy:
            return []
        most = max(above[path] for path in noisy)
        standing = f"{most} singular value{'s' if most != 1 else ''} at most"
        noise = "above the noise of rounding, and a higher rank holds that noise"
        return [f"of {some(noisy, 'tensor')} {standing} stand {noise}: --rank auto leaves it out"]

    def _above(self, change: Change) -> float:
        """How many singular values are the update's; infinite where that is not seen."""
        signals = [self.spectra[change.name].signal(n) for n in range(change.form.count)]
        if any(not signal.known or signal.fits is False for signal in signals):
            return math.inf
        return max(signal.rank for signal in signals)

    def _doubts(self) -> list[str]:
        """About what auto took for noise."""
        found = []
        odd = [c.path for c in self.low if _unfit(self.spectra[c.name], c)]
        if odd:
            found.append(
                f"what auto takes for noise is not as large as that of rounding in "
                f"{some(odd, 'tensor')}: weak parts of the update are in it, or TUNED or BASE was "
                "rounded otherwise than it is stored; --rank and --energy do not depend on it"
            )
        return found


# How much more is left than float32 rounds off, where a bound says something of the rank.
_TELLING = 1000
_SMALLER = "it is smaller in full than as factors"


def _count(change: Change) -> int:
    return math.prod(change.job.shape)


def _unfit(spectrum: Spectrum, change: Change) -> bool:
    fits = [spectrum.signal(n).fits for n in range(change.form.count)]
    return False in fits


def _ratio(part: float, whole: float) -> float:
    """√(part / whole); 0 of nothing."""
    return math.sqrt(part / whole) if whole else 0.0


def _bytes(dtype: str, shape: Iterable[int]) -> int:
    from weft.core.dtypes import itemsize

    return math.prod(shape) * itemsize(dtype)


_MOST_SERVED = 512  # vLLM's largest --max-lora-rank
# Kind of a module -> what it is called; servers have layers with LoRA for none of them.
_PEFTS_ALONE = {"conv1d": "Conv1D", "kernel": "convolutions"}


def _serving(form: AdapterForm) -> str:
    """Which servers take the adapter as it is, and which do not."""
    config, reasons = form.config, []
    kinds = {entry.change.form.kind for entry in form.entries if entry.role != "value"}
    if config["rank_pattern"]:
        reasons.append("the ranks differ")
    if config["modules_to_save"] or config["bias"] != "none":
        reasons.append("some tensors are saved in full")
    if config["target_parameters"]:
        reasons.append("target_parameters are PEFT's alone")
    others = [name for kind, name in _PEFTS_ALONE.items() if kind in kinds]
    if others:
        reasons.append(f"they have no LoRA for {' and '.join(others)}")
    if max(form.ranks.values(), default=0) > _MOST_SERVED:
        reasons.append(f"vLLM has no rank above {_MOST_SERVED}")
    if not reasons:
        return "PEFT, vLLM and others: one rank, and nothing saved in full"
    rest = "" if config["target_parameters"] or others else " (--uniform-rank)"
    servers = f"vLLM, SGLang and TGI refuse it or leave parts out: {', '.join(reasons)}{rest}"
    return f"{_in_peft(form)}; {servers}"


def _in_peft(form: AdapterForm) -> str:
    """What PEFT needs for it, and what it leaves out."""
    kept = {entry.change.path: entry.change for entry in form.entries if entry.role == "value"}
    rows = {c.job.shape[0] for c in kept.values() if c.rows_before is not None}
    new = [path for path, change in kept.items() if change.new]
    after = f" after model.resize_token_embeddings({rows.pop()})" if rows else ""
    if not new:
        return f"PEFT{after}"
    return f"weft merge; in PEFT{after} without {some(new, 'tensor')}, which BASE has no module for"
