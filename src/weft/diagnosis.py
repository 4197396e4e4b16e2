"""`weft doctor`: what an adapter is, whether it fits a base, and the cure of each problem."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weft import api
from weft.core.errors import FormatError, PlanError, Unsupported, WeftError, as_problems
from weft.core.names import match
from weft.core.specs import Repair
from weft.core.units import clean, some
from weft.formats.adapters import describe_adapter
from weft.formats.adapters._peft_config import matching
from weft.formats.adapters._repairs import PREFIX
from weft.formats.hub import resolve
from weft.plan._coverage import unnamed
from weft.plan._in_memory import in_memory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weft.core.errors import Problem
    from weft.core.specs import Adapter, Checkpoint, Plan


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know of an adapter.

    Attributes:
        level: `note` changes nothing; `repaired` has one reading, and is read so; `warning` may be
            meant; a `problem` keeps the adapter from being merged.
        what: The fact.
        cure: What to do, where there is more to do than to know it.
    """

    level: Literal["note", "repaired", "warning", "problem"]
    what: str
    cure: str | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `doctor` found.

    Attributes:
        given: What the user wrote.
        adapter: As it was read, with its repairs; None if not even its header could be.
        plan: The merge into the base, if one was given and it fits.
        base: What the user wrote for the base.
        findings: In the order in which they matter: problems first.
        fits: The base, where the adapter fits it.
        rewritten: What `fix` wrote otherwise than it is in the file, so that PEFT reads it right.
    """

    given: str
    adapter: Adapter | None
    plan: Plan | None
    base: str | None
    findings: tuple[Finding, ...]
    fits: Checkpoint | None = field(default=None, repr=False)
    rewritten: tuple[str, ...] = ()

    @property
    def verdict(self) -> Literal["sound", "problems", "unusable"]:
        """Nothing found but notes; something that is repaired or doubtful; no merge possible."""
        levels = {finding.level for finding in self.findings}
        if "problem" in levels:
            return "unusable"
        return "problems" if levels & {"repaired", "warning"} else "sound"


def doctor(
    adapter: str | Path,
    base: str | Path | None = None,
    *,
    fix: str | Path | None = None,
    force: bool = False,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> Diagnosis:
    """Examine an adapter, against `base` if there is one; nothing is merged.

    Args:
        adapter: Folder, file or `org/name@revision`.
        base: The model that it should fit.
        fix: Folder for a sound copy: a PEFT folder that PEFT loads without a warning. Of another
            tool's adapter it needs `base`.
        force: Replace an adapter that is there already, or what an interrupted run left.
        revision: Of the base on the hub.
        cache_dir: The hub's cache, in place of HF_HOME's.

    Raises:
        NotFound: There is no adapter, or no base.
        WeftError: `fix`, for an adapter that cannot be used.
        OutputError: `fix` is there already, or cannot be written.
    """
    given = str(adapter)
    path = resolve(given, cache_dir=cache_dir)
    try:
        opened = describe_adapter(path, given)
    except (FormatError, Unsupported, PlanError) as error:
        found = Diagnosis(given, None, None, None, tuple(_problems(as_problems(error))))
    else:
        found = _examine(opened, path, base, revision=revision, cache_dir=cache_dir)
    if fix is not None:
        found = replace(found, rewritten=_fix(found, Path(fix), force=force))
    return found


def _examine(
    adapter: Adapter,
    path: Path,
    base: str | Path | None,
    *,
    revision: str | None,
    cache_dir: str | None,
) -> Diagnosis:
    from weft.execute.health import examine

    if adapter.obstacles:
        return Diagnosis(adapter.given, adapter, None, None, tuple(_problems(adapter.obstacles)))
    problems, warnings = examine(adapter)
    findings = _problems(problems)
    plan = fits = None
    if base is not None:
        try:
            made = api.plan_merge(base, [path], revision=revision, cache_dir=cache_dir)
            plan, fits = made.plan, made.inputs.base
            warnings = list(made.warnings)
            findings += [Finding("repaired", str(repair)) for repair in plan.repairs]
            findings += _named_as_before(adapter, plan, fits)
        except PlanError as error:
            findings = _problems(error.problems)
    if plan is None:
        findings += [Finding("repaired", str(repair)) for repair in adapter.repairs]
    findings += [Finding("warning", warning) for warning in warnings]
    if base is None:
        findings += _without_base(adapter)
    findings += _caught_more(adapter)
    findings += _no_expressions(adapter)
    findings += [Finding("note", note) for note in adapter.notes]
    order = ("problem", "warning", "repaired", "note")
    findings.sort(key=lambda finding: order.index(finding.level))
    given = None if base is None else str(base)
    return Diagnosis(adapter.given, adapter, plan, given, tuple(findings), fits)


def _no_expressions(adapter: Adapter) -> list[Finding]:
    """Patterns of the config that Python's `re` does not compile, nor then PEFT's loader."""
    found = []
    for name in ("target_modules", "exclude_modules"):
        pattern = adapter.config.get(name)
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except re.error as error:
            what = (
                f"{name} = {clean(repr(pattern))} in {adapter.given} is no regular expression "
                f"({error}): PEFT cannot load the adapter; weft merges what is in the file"
            )
            cure = f"correct {name} in adapter_config.json"
            found.append(Finding("warning", what, cure))
    return found


def _problems(problems: Iterable[Problem]) -> list[Finding]:
    return [Finding("problem", problem.what, problem.hint) for problem in problems]


def _without_base(adapter: Adapter) -> list[Finding]:
    """What the config alone says against the file; with a base the plan says it."""
    found = []
    if adapter.moved_base:
        what = (
            f"{adapter.given} was initialised with {adapter.moved_base}, which moved the base: ΔW "
            "does not belong to the one that it names"
        )
        cure = "weft merge needs --init-adapter: the initial adapter, or none for the moved base"
        found.append(Finding("warning", what, cure))
    if others := unnamed(adapter):
        what = (
            f"{adapter.given} adapts {some(others, 'module')}, which its config does not name in "
            "target_modules: PEFT would leave it out"
        )
        found.append(Finding("warning", what, "--base BASE says whether the base has it"))
    return found


def _named_as_before(adapter: Adapter, plan: Plan, base: Checkpoint) -> list[Finding]:
    """Names that the base's files have to this day, and the model has no more."""
    names = {job.name for job in plan.jobs}
    old = [e.target for e in adapter.entries if e.target in names]
    new = [in_memory(name, base.config) for name in old]
    if old == new:
        return []
    first = next(pair for pair in zip(old, new, strict=True) if pair[0] != pair[1])
    what = "modules named as transformers before 4.52 did, and as the base's files are; since then "
    repair = Repair(what + "PEFT may find none of them", *first, len(old))
    return [Finding("repaired", str(repair))]


def _caught_more(adapter: Adapter) -> list[Finding]:
    """PEFT takes every module whose name ends in one of `modules_to_save`, dot or no dot."""
    named = adapter.config.get("modules_to_save") or []
    saved = dict.fromkeys(entry.saved_as for entry in adapter.entries if entry.saved_as)
    caught = [m for m in saved if not any(m == name or m.endswith("." + name) for name in named)]
    if not caught:
        return []
    what = (
        f"modules_to_save names {', '.join(named)}, and caught {len(caught)} modules more by the "
        f"end of their names: {', '.join(caught[:3])}{' …' if len(caught) > 3 else ''}"
    )
    cure = "they were trained and are merged; name modules with a dot before to avoid it"
    return [Finding("warning", what, cure)]


# -------------------------------------------------------------------------------------------- fix


def _fix(found: Diagnosis, output: Path, *, force: bool) -> tuple[str, ...]:
    """Write the copy; -> what is otherwise in it than in the file."""
    from weft.write.adapter import Piece, write_adapter
    from weft.write.peft_form import peft_form
    from weft.write.present_form import Form, bring_up_to_date

    if found.adapter is None or found.verdict == "unusable":
        first = next(f for f in found.findings if f.level == "problem")
        raise WeftError(
            f"{found.given} cannot be fixed: {first.what}",
            first.cure or "weft doctor without --fix lists all that is wrong",
        )
    adapter = found.adapter
    beside = {name: Path(adapter.folder, name) for name in adapter.side_files}
    if adapter.keys:
        moved = _moved(adapter, found.plan, found.fits)
        refs = {_renamed(key, moved): adapter.tensors[old] for key, old in adapter.keys.items()}
        pieces = {key: Piece(ref, ref.shape) for key, ref in refs.items()}
        form = Form(adapter, dict(pieces), _config(adapter, moved), found.fits, found.plan)
        bring_up_to_date(form)
        write_adapter(output, form.tensors, form.config, beside, force=force)
        return tuple(form.done)
    if found.plan is None or found.fits is None:
        raise WeftError(
            f"{found.given} is an adapter of {adapter.format}, and what its modules are called in "
            "PEFT and how they lie there a base says",
            "weft doctor ADAPTER --base BASE --fix -o FIXED",
        )
    tensors, config = peft_form(found.fits, adapter, found.plan)
    write_adapter(output, tensors, config, beside, force=force)
    return ()


def _moved(adapter: Adapter, plan: Plan | None, base: Checkpoint | None) -> dict[str, str]:
    """Modules that the model has under other names in memory, which PEFT goes by, and these."""
    if plan is None or base is None:
        return {}
    found = match([e.target for e in adapter.entries], {job.name for job in plan.jobs})
    strayed = {want for wants in found.moves.values() for want in wants}
    moved = {}
    for entry in adapter.entries:
        there = found.names.get(entry.target, entry.target)
        name = in_memory(there, base.config)
        if name != entry.target and (entry.target in strayed or name != there):
            moved[entry.module] = name.removesuffix(f".{entry.parameter}")
    return moved


def _config(adapter: Adapter, moved: dict[str, str]) -> dict[str, Any]:
    """The config, of the modules under their new names.

    Raises:
        WeftError: A pattern would match other modules than it did.
    """
    config = dict(adapter.config)
    for patterns in ("alpha_pattern", "rank_pattern"):
        for old, new in moved.items():
            if matching(config.get(patterns), old) != matching(config.get(patterns), new):
                raise WeftError(
                    f"{adapter.given} cannot be fixed: {patterns} names {old!r}, which {new!r} is "
                    "called in the base",
                    f"write {patterns} so that it matches both, such as by the module's last name",
                )
    for names in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(names), list):
            config[names] = [moved.get(name, name) for name in config[names]]
    return config


def _renamed(key: str, modules: dict[str, str]) -> str:
    path = key.removeprefix(PREFIX)
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        module = ".".join(parts[:n])
        if module in modules:
            return PREFIX + ".".join([modules[module], *parts[n:]])
    return key
