"""Drawings of a repository's history: layout, colours, text and SVG.

Rows go from the newest snapshot to the oldest, children before their parents. Each line of descent keeps to a lane (a
column) from its tip down to the snapshot that it shares with a lane further left; a lane that has ended is used again.
``main`` has the leftmost lane for itself. The colours of the lines are legible on light and on dark backgrounds.

The text drawing uses box-drawing characters, with or without ANSI colours. The picture is one self-contained SVG
element without scripts, page styles or links.
"""

from __future__ import annotations

import heapq
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final, final

from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["TAG", "AncestryGraph", "Drawing", "Row", "colour", "draw_svg", "draw_text", "lay_out", "rgb"]

_ID_CHARS = 8
_MESSAGE_CHARS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One snapshot."""

    lane: int
    """Number of its lane, from 0."""
    colours: tuple[int | None, ...]
    """Number by lane of the line that passes beside or through this snapshot; None: no line."""
    joining: tuple[int, ...]
    """Lanes right of it, ascending, whose lines end at it: their snapshots have it as parent."""
    continues: bool
    """Whether its own line goes on to a parent below."""
    short_id: str
    branches: tuple[str, ...]
    """Names of the branches that point to it: ``main`` first, the others ascending."""
    tags: tuple[str, ...]
    """Names of the tags, ascending."""
    message: str
    """First line of the commit's message, at most 60 characters, all of them printable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A history, laid out."""

    rows: tuple[Row, ...]
    """Rows from top to bottom."""
    lanes: int
    """Columns that the lines need."""


def lay_out(
    snapshots: Mapping[ObjectId, SnapshotRecord],
    tips: Sequence[ObjectId],
    *,
    branches: Mapping[str, ObjectId],
    tags: Mapping[str, ObjectId],
    main: ObjectId | None = None,
) -> Drawing:
    """Arrange the ``tips`` and their ancestors.

    Parameters
    ----------
    snapshots
        The graph. A parent that is not in it (it was expired) ends its line.
    tips
        Snapshots to draw, with all their ancestors; those that are not in the graph are left out.
    branches, tags
        Names to put beside the snapshots that they point to.
    main
        Tip of the line that gets the leftmost lane.
    """
    order = _newest_first(snapshots, tips)
    names = _labels(branches), _labels(tags)
    lanes: list[ObjectId | None] = []
    colours: list[int | None] = []
    if main is not None and main in snapshots:
        lanes.append(main)
        colours.append(None)
    lines = 0
    rows = []
    for record in order:
        waiting = [lane for lane, expected in enumerate(lanes) if expected == record.id]
        if not waiting:
            waiting = [_free_lane(lanes)]
            if waiting[0] == len(lanes):
                lanes.append(None)
                colours.append(None)
        lane, joining = waiting[0], tuple(waiting[1:])
        if colours[lane] is None:
            colours[lane] = lines
            lines += 1
        parent = record.parent if record.parent in snapshots else None
        lanes[lane] = parent
        row_colours = tuple(colours)
        for ended in joining:
            lanes[ended] = colours[ended] = None
        if parent is None:
            colours[lane] = None
        rows.append(
            Row(
                lane=lane,
                colours=row_colours,
                joining=joining,
                continues=parent is not None,
                short_id=encode_id(record.id)[:_ID_CHARS],
                branches=names[0].get(record.id, ()),
                tags=names[1].get(record.id, ()),
                message=_headline(record.message),
            )
        )
    return Drawing(rows=tuple(rows), lanes=len(lanes))


def _newest_first(snapshots: Mapping[ObjectId, SnapshotRecord], tips: Sequence[ObjectId]) -> list[SnapshotRecord]:
    """The tips and their ancestors: each before its parent, and otherwise by time."""
    found: dict[ObjectId, SnapshotRecord] = {}
    children: dict[ObjectId, int] = {}
    for tip in tips:
        record = snapshots.get(tip)
        while record is not None and record.id not in found:
            found[record.id] = record
            if record.parent is None:
                break
            children[record.parent] = children.get(record.parent, 0) + 1
            record = snapshots.get(record.parent)
    ready = [(-record.flushed_at_us, id) for id, record in found.items() if not children.get(id)]
    heapq.heapify(ready)
    order = []
    while ready:
        record = found[heapq.heappop(ready)[1]]
        order.append(record)
        parent = None if record.parent is None else found.get(record.parent)
        if parent is not None:
            children[parent.id] -= 1
            if not children[parent.id]:
                heapq.heappush(ready, (-parent.flushed_at_us, parent.id))
    return order


def _free_lane(lanes: Sequence[ObjectId | None]) -> int:
    return next((lane for lane, expected in enumerate(lanes) if expected is None), len(lanes))


def _labels(refs: Mapping[str, ObjectId]) -> dict[ObjectId, tuple[str, ...]]:
    labels: dict[ObjectId, tuple[str, ...]] = {}
    for name in sorted(refs, key=lambda name: (name != "main", name)):
        labels[refs[name]] = (*labels.get(refs[name], ()), name)
    return labels


def _headline(message: str) -> str:
    lines = message.strip().splitlines()
    line = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in lines[0]) if lines else ""
    return line if len(line) <= _MESSAGE_CHARS else line[: _MESSAGE_CHARS - 3] + "..."


_LINES: Final = ("#3a9d5d", "#8b63d9", "#d9822b", "#2f8fbf", "#cf4f6b", "#a08c1c", "#2fa39a", "#c05fae")
TAG: Final = "#4a8fe0"
"""Colour of the names of tags."""


def colour(number: int) -> str:
    """The colour of a line, ``#rrggbb``; neighbours differ, and they repeat after eight."""
    return _LINES[number % len(_LINES)]


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue of ``#rrggbb``, 0 to 255 each."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


_BOLD, _DIM, _ITALIC, _RESET = "\x1b[1m", "\x1b[2m", "\x1b[3m", "\x1b[0m"


def draw_text(drawing: Drawing, *, plain: bool) -> str:
    """Two lines for each snapshot (one for the last), the final one ended by a newline; empty for an empty history."""
    pen = _Pen(plain)
    lines: list[str] = []
    for i, row in enumerate(drawing.rows):
        lines.append(pen.snapshot(row, drawing.lanes))
        if i + 1 < len(drawing.rows):
            lines.append(pen.between(row, drawing.lanes))
    return "".join(f"{line}\n" for line in lines)


class _Pen:
    def __init__(self, plain: bool) -> None:
        self._plain = plain

    def snapshot(self, row: Row, lanes: int) -> str:
        cells = []
        last = row.joining[-1] if row.joining else row.lane
        for lane in range(lanes):
            number = row.colours[lane] if lane < len(row.colours) else None
            # The part up to the next joining lane has its colour, as the bend at its end.
            towards = next((row.colours[end] for end in row.joining if end > lane), None)
            if lane == row.lane:
                cells.append(self._line(number, "●"))
            elif row.lane < lane <= last:
                crossed = "╯" if lane == last else "┴" if lane in row.joining else "─" if number is None else "┼"
                cells.append(self._line(towards if crossed == "─" else number, crossed))
            else:
                cells.append(" " if number is None else self._line(number, "│"))
            cells.append(self._line(towards, "─") if row.lane <= lane < last else " ")
        names = [self._styled(name, _BOLD + self._code(row.colours[row.lane])) for name in row.branches]
        names += [self._styled(name, _BOLD + _ITALIC + _ansi(TAG)) for name in row.tags]
        refs = f"({', '.join(names)}) " if names else ""
        return "".join(cells) + self._styled(row.short_id, _DIM) + f" {refs}{row.message}"

    def between(self, row: Row, lanes: int) -> str:
        cells = []
        for lane in range(lanes):
            number = row.colours[lane] if lane < len(row.colours) else None
            ends = lane in row.joining or (lane == row.lane and not row.continues)
            cells.append("  " if number is None or ends else self._line(number, "│") + " ")
        return "".join(cells)

    def _line(self, number: int | None, text: str) -> str:
        return self._styled(text, self._code(number))

    def _code(self, number: int | None) -> str:
        return "" if number is None else _ansi(colour(number))

    def _styled(self, text: str, codes: str) -> str:
        return text if self._plain or not codes else f"{codes}{text}{_RESET}"


def _ansi(colour: str) -> str:
    return "\x1b[38;2;{};{};{}m".format(*rgb(colour))


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
    """Snapshots as circles, lines of descent between them, and the texts of each `Row`; all text is escaped."""
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
    return _INK if plain or number is None else colour(number)


def _x(lane: int) -> int:
    return _MARGIN + _LANE * lane


def _y(row: int) -> int:
    return _MARGIN + _ROW * row


def _columns(row: Row) -> int:
    """Width of a row's text in characters; wide East Asian characters count twice."""
    names = [*row.branches, *row.tags]
    text = f"{row.short_id} {'(' + ', '.join(names) + ') ' if names else ''}{row.message}"
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


@final
class AncestryGraph:
    """A drawing of history: text when printed, a picture in a notebook.

    Made by `Repository.ancestry_graph`. Names and messages are shown without control characters, and escaped in the
    picture, so that they cannot affect a terminal or a page.
    """

    __slots__ = ("_drawing", "_plain")

    def __init__(self, drawing: Drawing, *, plain: bool = False) -> None:
        self._drawing = drawing
        self._plain = plain

    def __repr__(self) -> str:
        return draw_text(self._drawing, plain=self._plain)

    __str__ = __repr__

    def _repr_svg_(self) -> str:
        return draw_svg(self._drawing, plain=self._plain)
