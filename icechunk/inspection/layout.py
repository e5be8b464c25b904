"""Where the snapshots of a history and the lines between them go in a drawing.

Rows go from the newest snapshot to the oldest, children before their parents. Each line of descent keeps to a lane (a
column) from its tip down to the snapshot that it shares with a lane further left; a lane that has ended is used again.
``main`` has the leftmost one for itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.repo_values import SnapshotRecord

__all__ = ["Drawing", "Row", "lay_out"]

_ID_CHARS = 8
_MESSAGE_CHARS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One snapshot."""

    lane: int
    """Where it stands."""
    colours: tuple[int | None, ...]
    """By lane, the number of the line that runs there beside or through this snapshot; None: nothing does."""
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
    """From top to bottom."""
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
    """Arrange what the ``tips`` descend from.

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
