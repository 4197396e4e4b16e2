"""A chart with two logarithmic axes, as SVG, in the few lines that it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 74, 84, 46, 56  # labels stand right of their points


@dataclass(frozen=True)
class Series:
    """Points (x, y, label) of one colour; joined by a line if `joined`."""

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
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "#e4e4e4"))
        parts.append(_text(LEFT - 8, at + 4, f"{value:g}", anchor="end"))
    height = rows.at(level[0])
    parts.append(_line(LEFT, height, WIDTH - RIGHT, height, "#888", 'stroke-dasharray="5 4"'))
    parts.append(_text(WIDTH - RIGHT - 4, height - 6, level[1], anchor="end"))
    for number, one in enumerate(series):
        parts += _drawn(one, columns, rows)
        legend = HEIGHT - BOTTOM - 14 - 18 * (len(series) - 1 - number)
        parts.append(_mark(one, LEFT + 16, legend - 4))
        parts.append(_text(LEFT + 27, legend, one.name, anchor="start"))
    return "\n".join([*parts, "</svg>", ""])


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
    places = [(columns.at(x), rows.at(y), label) for x, y, label in series.points]
    found = []
    if series.joined:
        path = " ".join(f"{x},{y}" for x, y, _ in places)
        found.append(f'<polyline points="{path}" fill="none" stroke="{series.colour}"/>')
    for x, y, label in places:
        found.append(_mark(series, x, y))
        if not series.hollow:
            found.append(_text(x + 11, y + 4, label, anchor="start"))
    return found


def _mark(series: Series, x: float, y: float) -> str:
    if series.hollow:
        return f'<circle cx="{x}" cy="{y}" r="7" fill="none" stroke="{series.colour}"/>'
    return f'<circle cx="{x}" cy="{y}" r="4" fill="{series.colour}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" {more}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12) -> str:
    place = f'x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place}>{escape(text)}</text>"
