"""Plots as inline SVG, without a library: bars, cumulative distributions and lines. Colours are CSS variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Line", "bars", "curves", "log_ticks", "nice_ticks"]

WIDTH = 540
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 12, 38


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar."""

    colour: str
    """A CSS colour."""
    label: str
    """Left of it."""
    value: float
    """Its length, not negative."""
    low: float
    """Whisker from here …"""
    high: float
    """… to here."""
    text: str
    """Right of it, strong."""
    aside: str
    """After that, weak."""
    failed: bool = False
    """Drawn faded: the figure is of a run with errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a plot."""

    colour: str
    """A CSS colour."""
    label: str
    """Text of the tooltip."""
    points: Sequence[tuple[float, float]]
    """Ascending in x."""
    strong: bool = False
    """Drawn thicker, on top."""
    dashed: bool = False
    """Drawn with gaps."""
    marks: bool = False
    """A dot with a tooltip at every point."""


def bars(rows: Sequence[Bar], *, title: str) -> str:
    """Horizontal bars, one below the other, each with its figure."""
    step, height = 30, 18
    start, room = 112, 222
    longest = max((row.high for row in rows), default=0) or 1
    out = []
    for index, row in enumerate(rows):
        y = 4 + index * step
        middle = y + height / 2
        length = max(row.value / longest * room, 1.5)
        out.append(f'<text class="name" x="{start - 10}" y="{middle}" text-anchor="end">{escape(row.label)}</text>')
        out.append(f'<rect x="{start}" y="{y}" width="{room}" height="{height}" rx="3" class="track"/>')
        tip = escape(f"{row.label}: {row.text} {row.aside}")
        faded = ' opacity="0.35"' if row.failed else ""
        out.append(
            f'<rect x="{start}" y="{y}" width="{_n(length)}" height="{height}" rx="3" fill="{row.colour}"{faded}>'
            f"<title>{tip}</title></rect>"
        )
        if row.high > row.low:
            low, high = (start + value / longest * room for value in (row.low, row.high))
            ends = f"M{_n(low)} {middle - 4}v8M{_n(high)} {middle - 4}v8"
            out.append(f'<path class="whisker" d="M{_n(low)} {middle}H{_n(high)}{ends}"/>')
        out.append(
            f'<text class="value" x="{start + room + 10}" y="{middle}">{escape(row.text)}'
            f'<tspan class="aside" dx="7">{escape(row.aside)}</tspan></text>'
        )
    return _svg(out, step * len(rows) + 2, title)


def curves(
    lines: Sequence[Line],
    *,
    title: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    x_label: str,
    y_label: str,
    x_log: bool = False,
    x_values: Sequence[float] | None = None,
    y_max: float | None = None,
    y_log: bool = False,
    height: int = 230,
) -> str:
    """Lines in one frame, with ticks at round numbers.

    Parameters
    ----------
    x_text, y_text
        Tick labels and tooltips.
    x_values
        The x axis is these values at equal distances, not a scale (for sweeps).
    x_log
        The x axis is logarithmic; all x must be positive.
    y_max
        Upper end of the y axis; where None it follows from the data. The lower end is 0.
    y_log
        The y axis is logarithmic, from the least to the greatest value; all y must be positive.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if not xs:
        return ""
    bottom = min(ys) * 0.9 if y_log else 0.0
    ticks_y = log_ticks(bottom, max(ys) * 1.1) if y_log else nice_ticks(0, y_max if y_max is not None else max(ys) or 1)
    top = y_max if y_max is not None else max(ys) * 1.1 if y_log else max(ticks_y[-1], max(ys))
    inner_width, inner_height = WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    if x_values is not None:
        places = list(x_values)
        ticks_x = places
        span = max(len(places) - 1, 1)

        def at_x(x: float) -> float:
            return _LEFT + 14 + places.index(x) / span * (inner_width - 28)
    else:
        low, high = min(xs), max(xs)
        if x_log:
            low, high = low * 0.92, high * 1.08
            ticks_x = log_ticks(low, high)
        else:
            low = 0.0
            high = high or 1
            ticks_x = [tick for tick in nice_ticks(low, high) if tick <= high]
        scale: Callable[[float], float] = math.log if x_log else float

        def at_x(x: float) -> float:
            return _LEFT + (scale(x) - scale(low)) / (scale(high) - scale(low)) * inner_width

    def at_y(y: float) -> float:
        if y_log:
            return _TOP + math.log(top / y) / math.log(top / bottom) * inner_height
        return _TOP + (1 - y / top) * inner_height

    floor = _TOP + inner_height
    out = []
    for tick in ticks_y:
        if tick <= top:
            out.append(
                f'<path class="{"base" if tick == 0 else "grid"}" d="M{_LEFT} {_n(at_y(tick))}H{WIDTH - _RIGHT}"/>'
            )
            out.append(_tick(_LEFT - 8, at_y(tick), y_text(tick), "end"))
    for tick in ticks_x:
        out.append(f'<path class="grid" d="M{_n(at_x(tick))} {_TOP}V{_n(floor)}"/>')
        out.append(_tick(at_x(tick), floor + 14, x_text(tick), "middle"))
    out.append(f'<text class="axis" x="{WIDTH - _RIGHT}" y="{height - 5}" text-anchor="end">{escape(x_label)}</text>')
    out.append(f'<text class="axis" x="{_LEFT}" y="{height - 5}">{escape(y_label)}</text>')
    for line in sorted(lines, key=lambda each: each.strong):
        if not line.points:
            continue
        path = "M" + "L".join(f"{_n(at_x(x))} {_n(at_y(y))}" for x, y in line.points)
        style = f'stroke="{line.colour}" stroke-width="{2.6 if line.strong else 1.7}"' + (
            ' stroke-dasharray="2 4"' if line.dashed else ""
        )
        out.append(f'<path class="line" {style} d="{path}"><title>{escape(line.label)}</title></path>')
        if line.marks:
            for x, y in line.points:
                radius = 3.6 if line.strong else 2.8
                out.append(
                    f'<circle cx="{_n(at_x(x))}" cy="{_n(at_y(y))}" r="{radius}" fill="{line.colour}" class="mark">'
                    f"<title>{escape(f'{line.label}: {y_text(y)} at {x_text(x)}')}</title></circle>"
                )
    return _svg(out, height, title)


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers from `low` that reach `high` or the step after it."""
    raw = (high - low) / wanted or 1
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step)
    return [index * step for index in range(first, math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between the two, and 2 and 5 times those where there is room."""
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 2.5 else (1,)
    if decades < 0.5:
        factors = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)  # type: ignore[assignment]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(text)}</text>'


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _svg(parts: Sequence[str], height: float, title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {_n(height)}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
