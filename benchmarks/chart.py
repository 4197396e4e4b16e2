"""A chart with two logarithmic axes, as SVG, in the few lines that it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 74, 34, 46, 56
_HALO = 'stroke="#fff" stroke-width="4" stroke-linejoin="round" paint-order="stroke"'


@dataclass(frozen=True)
class Series:
    """Points (x, y, label) of one colour: joined by a line, or diamonds with labels at the left."""

    name: str
    colour: str
    points: tuple[tuple[float, float, str], ...]
    joined: bool = True
    hollow: bool = False  # rings without labels, around the points of another series


def chart(title: str, x: str, y: str, series: Sequence[Series], level: tuple[float, str]) -> str:
    """The SVG of `series`, with a dashed line at the height of `level` and its name."""
    points = [point for one in series for point in one.points]
    columns = _axis([p[0] for p in points], LEFT, WIDTH - RIGHT)
    rows = _axis([*(p[1] for p in points), level[0]], HEIGHT - BOTTOM, TOP)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(WIDTH / 2, 20, title, size=14),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x),
        f'<g transform="rotate(-90 18 {HEIGHT / 2})">{_text(18, HEIGHT / 2, y)}</g>',
    ]
    for value, at in columns.ticks():
        parts.append(_line(at, TOP, at, HEIGHT - BOTTOM, "#e4e4e4"))
        parts.append(_text(at, HEIGHT - BOTTOM + 18, f"{value:g}"))
    for value, at in rows.ticks():
        power = math.log10(value)
        whole = abs(power - round(power)) < 1e-9
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "#ccc" if whole else "#f0f0f0"))
        if whole:
            parts.append(_text(LEFT - 8, at + 4, _power(round(power)), anchor="end"))
    height = rows.at(level[0])
    parts.append(_line(LEFT, height, WIDTH - RIGHT, height, "#888", 'stroke-dasharray="5 4"'))
    parts.append(_text(WIDTH - RIGHT - 4, height - 6, level[1], anchor="end"))
    for one in series:
        parts += _drawn(one, columns, rows)
    return "\n".join([*parts, *_legend(series), "</svg>", ""])


def _legend(series: Sequence[Series]) -> list[str]:
    """At the lower left, on white, so that no line of the grid runs through it."""
    top = HEIGHT - BOTTOM - 10 - 18 * len(series)
    width = 44 + 7 * max(len(one.name) for one in series)
    place = f'x="{LEFT + 6}" y="{top - 4}" width="{width}" height="{18 * len(series) + 8}"'
    parts = [f'<rect {place} fill="#fff"/>']
    for number, one in enumerate(series):
        at = top + 14 + 18 * number
        parts.append(_mark(one, LEFT + 18, at - 4))
        parts.append(_text(LEFT + 32, at, one.name, anchor="start"))
    return parts


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


@dataclass(frozen=True)
class Axis:
    """A logarithmic scale from `low` to `high`, drawn from `begin` to `end`."""

    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        """Where a value stands."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.begin + share * (self.end - self.begin), 1)

    def ticks(self) -> list[tuple[float, float]]:
        """1, 2 and 5 times the powers of ten, and where they stand."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
        return [(v, self.at(v)) for v in values if self.low <= v <= self.high]


def _axis(values: Sequence[float], begin: float, end: float) -> Axis:
    return Axis(min(values) / 1.25, max(values) * 1.25, begin, end)


def _drawn(series: Series, columns: Axis, rows: Axis) -> list[str]:
    places = [
        (columns.at(x), rows.at(y), "" if series.hollow else label) for x, y, label in series.points
    ]
    found = []
    if series.joined and not series.hollow:
        path = " ".join(f"{x},{y}" for x, y, _ in places)
        found.append(f'<polyline points="{path}" fill="none" stroke="{series.colour}"/>')
    for x, y, label in places:
        found.append(_mark(series, x, y))
        if series.joined and label:
            found.append(_text(x + 9, y - 6, label, anchor="start", more=_HALO))
        elif label:
            found.append(_text(x - 10, y + 4, label, anchor="end", more=_HALO))
    return found


def _mark(series: Series, x: float, y: float) -> str:
    if series.hollow:
        return f'<circle cx="{x}" cy="{y}" r="8" fill="none" stroke="{series.colour}"/>'
    if not series.joined:
        points = f"{x - 7},{y} {x},{y - 7} {x + 7},{y} {x},{y + 7}"
        return f'<polygon points="{points}" fill="none" stroke="{series.colour}"/>'
    return f'<circle cx="{x}" cy="{y}" r="4" fill="{series.colour}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" {more}/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12, more: str = ""
) -> str:
    place = f'x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place} {more}>{escape(text)}</text>"
