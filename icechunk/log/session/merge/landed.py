"""The changes of commits in a row, so that a session can ask what happened since its base, whichever base that is."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from icechunk.format.by_node import Coords
from icechunk.format.ids import NodeId
from icechunk.format.values import TransactionLog
from icechunk.log.session.columns import CoordIndex

__all__ = ["Landed", "LandedSince"]

_FEW_ROWS: Final = 1024
"""Rows of one array in one commit up to which each is kept as a key; more are searched as a column."""


_UNDONE: Final = 1024
"""Number of commits that can be taken back, at the most: those that were expected to land, and did not."""


class Landed:
    """The changes of commits in a row, added one by one; for each thing that they changed, the last commit that did.

    A look at all commits since any of them costs in proportion to the session's changes, for any number of commits.
    Only `add` and `take_back` change anything.
    """

    __slots__ = ("_before", "_columns", "_keys", "_moved", "_touched", "_updated", "count", "num_rows")

    def __init__(self) -> None:
        self.count: int = 0
        """Number of commits."""
        self.num_rows: int = 0
        """Number of rows of chunks that were added."""
        self._updated: dict[NodeId, int] = {}
        """Nodes with other metadata, and the number of the last commit that changed it."""
        self._moved: dict[str, int] = {}
        """Former paths of nodes that moved."""
        self._touched: dict[NodeId, int] = {}
        """Arrays with other chunks."""
        self._keys: dict[NodeId, dict[bytes, int]] = {}
        """Coordinates of chunks by array, as bytes: four for each dimension."""
        self._columns: dict[NodeId, list[tuple[int, int, CoordIndex]]] = {}
        """By array, of commits that changed many of its chunks: number of the commit, rank and rows."""
        self._before: deque[list[tuple[dict[Any, int], Hashable, int]]] = deque(maxlen=_UNDONE)
        """The numbers that each of the last commits replaced: in which of the others, for which key; 0: none."""

    @staticmethod
    def of(transactions: Iterable[TransactionLog]) -> Landed:
        """The changes of transaction logs, as those of one commit."""
        landed = Landed()
        landed.add(transactions)
        return landed

    def add(self, transactions: Iterable[TransactionLog]) -> None:
        """Add the changes of one more commit."""
        number = self.count + 1
        before: list[tuple[dict[Any, int], Hashable, int]] = []

        def note(numbers: dict[Any, int], keys: Iterable[Hashable]) -> None:
            for key in keys:
                before.append((numbers, key, numbers.get(key, 0)))
                numbers[key] = number

        for log in transactions:
            note(self._updated, log.updated_groups | log.updated_arrays)
            note(self._moved, [move.source for move in log.moved_nodes])
            for node_id, coords in log.updated_chunks.items():
                if not len(coords):
                    continue
                note(self._touched, [node_id])
                if len(coords) > _FEW_ROWS:
                    self._columns.setdefault(node_id, []).append((number, coords.shape[1], CoordIndex(coords)))
                else:
                    note(self._keys.setdefault(node_id, {}), _row_keys(coords))
                self.num_rows += len(coords)
        self._before.append(before)
        self.count = number

    def take_back(self) -> bool:
        """Take back the last commit; False: it is too long ago."""
        if not self._before:
            return False
        for numbers, key, number in reversed(self._before.pop()):
            if number:
                numbers[key] = number
            else:
                del numbers[key]
        for columns in self._columns.values():
            while columns and columns[-1][0] == self.count:
                columns.pop()
        self.count -= 1
        return True

    def since(self, number: int) -> LandedSince:
        """The changes of the commits after that one; 0: of all."""
        return LandedSince(self, number)


class LandedSince(NamedTuple):
    """The changes of the commits after one of several in a row, those included that are added later."""

    landed: Landed
    after: int
    """Number of that commit; 0: all."""

    @property
    def moved(self) -> Collection[str]:
        """Former paths of nodes that moved."""
        return [path for path, number in self.landed._moved.copy().items() if number > self.after]

    def has_updated(self, node_id: NodeId) -> bool:
        """Whether the metadata of a node was changed."""
        return self.landed._updated.get(node_id, 0) > self.after

    def has_touched(self, node_id: NodeId) -> bool:
        """Whether any chunk of an array was added, replaced or deleted."""
        return self.landed._touched.get(node_id, 0) > self.after

    def written(self, node_id: NodeId, coords: Coords) -> Coords:
        """The coordinates that were changed, in the same order."""
        landed, after = self.landed, self.after
        both = np.zeros(len(coords), np.bool_)
        if not self.has_touched(node_id):
            return coords[both]
        keys: Mapping[bytes, int] = landed._keys.get(node_id, {})
        if keys:
            both |= np.fromiter((keys.get(key, 0) > after for key in _row_keys(coords)), np.bool_, len(coords))
        for number, rank, index in landed._columns.get(node_id, ()):
            # An array may have changed its rank.
            if number > after and rank == coords.shape[1]:
                both |= index.find_rows(coords) >= 0
        return coords[both]


def _row_keys(coords: Coords) -> list[bytes]:
    data, size = np.ascontiguousarray(coords, np.uint32).tobytes(), 4 * coords.shape[1]
    return [data[at : at + size] for at in range(0, len(data), size)] if size else [b""] * len(coords)
