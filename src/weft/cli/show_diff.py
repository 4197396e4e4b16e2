"""What `weft diff` found -> one screen of text, and a dict for programs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from weft.cli.show import SCHEMA, columns, count_of
from weft.core.units import clean, show_count, show_share, show_time, some

if TYPE_CHECKING:
    from weft.core.differences import Diff, TensorDifference, Together

_ROWS = 16  # of the table, so that all of it fits a screen
_WIDTH = 64  # layers of a profile, one letter each
_LEVELS = "▁▂▃▄▅▆▇█"


def diff_as_text(found: Diff, top: int) -> str:
    """What `weft diff` prints: types, layers, the tensors that differ most, the verdict."""
    totals = found.totals
    lines = []
    if totals.different:
        lines += [*_table(found), ""]
        if profiles := _profiles(found):
            lines += [*profiles, ""]
        lines += [*_most(found, top), ""] if top else []
    told = [*_lacking(found), *_of_dtypes(found), *_of_nan(found), *found.notes]
    lines += [*(f"note: {clean(text)}" for text in told), ""] if told else []
    return "\n".join([*lines, *_verdict(found)])


def _verdict(found: Diff) -> list[str]:
    totals = found.totals
    size = f"{show_count(totals.elements)} elements, {show_time(found.seconds)}"
    if found.equal:
        lines = [f"{found.a} equals {found.b}: {count_of(totals.tensors, 'tensor')}, {size}"]
        if found.merged:
            lines.append("hint: the merge changed nothing: weft doctor says what its adapter is")
        return lines
    apart = len(found.tensors) - totals.tensors
    verb = "differs" if totals.tensors == 1 else "differ"
    parts = [f"{totals.different} of {count_of(totals.tensors, 'tensor')} {verb}"]
    parts += [f"{apart} cannot be compared"] if apart else []
    if apart and not totals.tensors:
        parts = [f"none of {count_of(apart, 'tensor')} can be compared"]
    return [f"{found.a} differs from {found.b}: {', '.join(parts)}; {size}"]


def _table(found: Diff) -> list[str]:
    """A row for each type of module that differs, and the sums."""
    types = [each for each in found.types if each.different]
    same = [each.name for each in found.types if each.tensors and not each.different]
    ranked = any(each.rank is not None for each in types)
    shown = types if len(types) <= _ROWS else types[: _ROWS - 1]
    head = ("tensors", "differ", "‖A − B‖/‖B‖", "max |A − B|", "elements")
    rows = [(*head, *(("stable rank",) if ranked else ()))]
    rows += [_row(each, ranked=ranked) for each in shown]
    if len(types) > 1:
        rows.append(_row(found.totals, ranked=ranked))
    lines = columns(rows)
    if len(shown) < len(types):
        lines.insert(-1, f"… {len(types) - len(shown)} more types: --json has them all")
    return [*lines, *([f"equal: {some(same, 'type', 6)}"] if same else [])]


def _row(each: Together, *, ranked: bool) -> tuple[str, ...]:
    cells = (
        each.name,
        f"{each.different} of {each.tensors}",
        show_share(each.relative),
        f"{each.largest:.3g}",
        show_share(each.share),
    )
    return (*cells, "—" if each.rank is None else f"{each.rank:.3g}") if ranked else cells


def _profiles(found: Diff) -> list[str]:
    """A line for each list of layers: how much each of them differs, and the ends."""
    rows = []
    for stack, layers in found.layers.items():
        known = [(each.relative or 0.0, each.name) for each in layers]
        (low, least), (high, most) = min(known), max(known, key=lambda item: item[0])
        if high == 0 or len(known) < 2:
            continue
        step = -(-len(known) // _WIDTH)
        values = [max(v for v, _ in known[n : n + step]) for n in range(0, len(known), step)]
        bars = "".join(_level(value / high) for value in values)
        ends = f"{show_share(low)} (layer {least}) to {show_share(high)} (layer {most})"
        rows.append((stack, bars, ends))
    return columns(rows) if rows else []


def _level(share: float) -> str:
    return _LEVELS[min(int(share * len(_LEVELS)), len(_LEVELS) - 1)] if share else "·"


def _most(found: Diff, top: int) -> list[str]:
    """The tensors that differ most, relative to what they are."""
    changed = [each for each in found.tensors if each.changed]
    changed.sort(key=lambda each: -(math.inf if each.relative is None else each.relative))
    rows = [
        (
            each.name,
            show_share(each.relative),
            f"max {each.largest:.3g}",
            f"{show_share(each.share)} of {show_count(each.elements)}",
            "" if each.rank is None else f"stable rank {each.rank:.3g}",
        )
        for each in changed[:top]
    ]
    return [f"most, of {len(changed)}:", *columns(rows)]


def _lacking(found: Diff) -> list[str]:
    lines = []
    for side, name in ((0, found.a), (1, found.b)):
        only = [each.name for each in found.tensors if each.shapes[1 - side] is None]
        lines += [f"only in {name}: {some(only, 'tensor')}"] if only else []
    shapes = [
        f"{each.name} {each.shapes[0]} and {each.shapes[1]}"
        for each in found.tensors
        if not each.compared and None not in each.shapes
    ]
    return lines + ([f"other shapes: {some(shapes, 'tensor')}"] if shapes else [])


def _of_dtypes(found: Diff) -> list[str]:
    """What differs in its dtype alone, and what the change of dtype accounts for."""
    equal, rounded, others = Counter[str](), Counter[str](), Counter[str]()
    for each in found.tensors:
        if each.compared and each.dtypes[0] != each.dtypes[1]:
            kind = f"{each.dtypes[0]} and {each.dtypes[1]}"
            (equal if each.equal else rounded if each.rounds else others)[kind] += 1
    said = (
        (equal, "with equal values"),
        (rounded, "and nothing but rounding between them"),
        (others, "and their values differ"),
    )
    return [
        f"{count_of(count, 'tensor')}: {kind}, {what}"
        for kinds, what in said
        for kind, count in kinds.items()
    ]


def _of_nan(found: Diff) -> list[str]:
    lines = []
    for side, name in ((0, found.a), (1, found.b)):
        bad = [each for each in found.tensors if each.not_finite[side]]
        count = sum(each.not_finite[side] for each in bad)
        if bad:
            where = some([each.name for each in bad], "tensor")
            lines.append(f"{name} has {count_of(count, 'element')} NaN or infinite in {where}")
    return lines


# --------------------------------------------------------------------------------------- programs


def diff_as_dict(found: Diff) -> dict[str, Any]:
    """`weft diff --json`."""
    return {
        "schema": SCHEMA,
        "a": found.a,
        "b": found.b,
        "equal": found.equal,
        "seconds": round(found.seconds, 3),
        "totals": _together(found.totals),
        "types": [_together(each) for each in found.types],
        "layers": {
            stack: [_together(each) for each in layers] for stack, layers in found.layers.items()
        },
        "tensors": {each.name: _tensor(each) for each in found.tensors},
        "notes": list(found.notes),
        "warnings": list(found.warnings),
    }


def _together(each: Together) -> dict[str, Any]:
    return _plain(asdict(each) | {"relative": each.relative, "share": each.share})


def _tensor(each: TensorDifference) -> dict[str, Any]:
    content = asdict(each) | {"equal": each.equal, "relative": each.relative, "share": each.share}
    del content["name"]
    return _plain(content)


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {key: None if _infinite(value) else value for key, value in content.items()}


def _infinite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
