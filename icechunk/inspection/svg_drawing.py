"""A history as a picture: one SVG element that stands by itself, without scripts, styles of the page or links."""

from __future__ import annotations

import unicodedata
from html import escape
from typing import Final

from icechunk.inspection.colours import TAG
from icechunk.inspection.colours import colour as line_colour
from icechunk.inspection.layout import Drawing, Row

__all__ = ["draw_svg"]

_ROW: Final = 28
"""Pixels from one snapshot to the next."""
_LANE: Final = 20
"""Pixels from one lane to the next."""
_MARGIN: Final = 15
_RADIUS: Final = 5
_CHARACTER: Final = 8.2
"""Width of a character in pixels; a little more than that of common monospaced fonts at 13 px."""
_INK: Final = "currentColor"
"""Follows the page: dark on light grounds, and light on dark ones."""


def draw_svg(drawing: Drawing, *, plain: bool) -> str:
    """Snapshots as circles, lines of descent between them, and beside each what `Row` says; all text is escaped."""
    text_x = _MARGIN + _LANE * max(drawing.lanes - 1, 0) + 24
    width = text_x + _MARGIN + max((_columns(row) for row in drawing.rows), default=0) * _CHARACTER
    height = 2 * _MARGIN + _ROW * max(len(drawing.rows) - 1, 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" role="img" aria-label="history of snapshots" '
        'style="font-family: monospace; font-size: 13px;">'
    ]
    parts += _lines(drawing, plain)
    for i, row in enumerate(drawing.rows):
        fill = _paint(row.colours[row.lane], plain)
        parts.append(f'  <circle cx="{_x(row.lane)}" cy="{_y(i)}" r="{_RADIUS}" fill="{fill}" />')
        parts.append(
            f'  <text x="{text_x}" y="{_y(i) + 4}" fill="{_INK}" xml:space="preserve">{_text(row, plain)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _lines(drawing: Drawing, plain: bool) -> list[str]:
    """Lines of descent, each from where it begins to where it bends into another one, or ends."""
    parts = []
    begun: dict[int, int] = {}
    for i, row in enumerate(drawing.rows):
        for lane, number in enumerate(row.colours):
            ends = lane in row.joining or (lane == row.lane and not row.continues)
            if number is None:
                continue
            top = begun.setdefault(lane, i)
            if not ends:
                continue
            del begun[lane]
            paint = _paint(number, plain)
            x, bottom = _x(lane), i - 1 if lane in row.joining else i
            if bottom > top:
                parts.append(
                    f'  <line x1="{x}" y1="{_y(top)}" x2="{x}" y2="{_y(bottom)}" stroke="{paint}" stroke-width="2" />'
                )
            if lane in row.joining:
                start, end, target = _y(i - 1), _y(i), _x(row.lane)
                middle = (start + end) // 2
                parts.append(
                    f'  <path d="M {x} {start} C {x} {middle}, {target} {middle}, {target} {end}" fill="none" '
                    f'stroke="{paint}" stroke-width="2" />'
                )
    return parts


def _text(row: Row, plain: bool) -> str:
    names = [
        f'<tspan font-weight="bold" fill="{_paint(row.colours[row.lane], plain)}">{escape(name)}</tspan>'
        for name in row.branches
    ]
    tag_paint = _INK if plain else TAG
    names += [
        f'<tspan font-weight="bold" font-style="italic" fill="{tag_paint}">{escape(name)}</tspan>' for name in row.tags
    ]
    refs = f"({', '.join(names)}) " if names else ""
    return f'<tspan fill-opacity="0.6">{row.short_id}</tspan> {refs}{escape(row.message)}'


def _paint(number: int | None, plain: bool) -> str:
    return _INK if plain or number is None else line_colour(number)


def _x(lane: int) -> int:
    return _MARGIN + _LANE * lane


def _y(row: int) -> int:
    return _MARGIN + _ROW * row


def _columns(row: Row) -> int:
    """Width of a row's text in characters; the wide ones of East Asia count twice."""
    names = [*row.branches, *row.tags]
    text = f"{row.short_id} {'(' + ', '.join(names) + ') ' if names else ''}{row.message}"
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
