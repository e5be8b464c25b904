"""The snapshots of a repository as a persistent (immutable) value: those of a file, plus the changes since.

Adding a snapshot takes time logarithmic in the number of changes since the file was written. All versions share the
file's snapshots, and none of those is decoded for it. Each added snapshot is an object of a few hundred bytes:
`SnapshotGraph.compacted` converts them into the file's form before they become many.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from typing import Final

import numpy as np
import numpy.typing as npt

from icechunk.errors import FormatError
from icechunk.format.flat.flatbuffers import Buffer, FlatWriter
from icechunk.format.ids import ObjectId
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.format.repo.snapshot_encoding import SameRows, SnapshotRows
from icechunk.format.repo.stored_snapshots import NO_SNAPSHOTS, RecordsView, StoredSnapshots
from icechunk.runtime.persistent_map import Map

__all__ = ["ChildrenLeftError", "SnapshotGraph"]

_MANY: Final = 256
_SHARE: Final = 64


class ChildrenLeftError(ValueError):
    """A snapshot would lose its parent; its id is the argument."""


class SnapshotGraph(Mapping[ObjectId, SnapshotRecord]):
    """Snapshots by id. Immutable; made by `SnapshotGraph.of`. Reading one may raise `FormatError`."""

    __slots__ = ("_changed", "_count", "_stored")

    def __init__(self, stored: StoredSnapshots, changed: Map[ObjectId, SnapshotRecord | None], count: int) -> None:
        self._stored = stored
        self._changed = changed
        """Snapshots that differ from the stored ones; None: the snapshot was deleted."""
        self._count = count

    @staticmethod
    def of(snapshots: Mapping[ObjectId, SnapshotRecord]) -> SnapshotGraph:
        """A graph of these snapshots."""
        if isinstance(snapshots, SnapshotGraph):
            return snapshots
        if isinstance(snapshots, StoredSnapshots):
            return SnapshotGraph(snapshots, Map(), len(snapshots))
        return SnapshotGraph(NO_SNAPSHOTS, Map(snapshots), len(snapshots))

    @property
    def stored(self) -> StoredSnapshots:
        """The snapshots that were read from a file, unchanged."""
        return self._stored

    @property
    def changed_count(self) -> int:
        """Number of snapshots that were added, changed or deleted since the file was written."""
        return len(self._changed)

    def set(self, id: ObjectId, record: SnapshotRecord) -> SnapshotGraph:
        """The graph with this snapshot; it replaces one with the same id."""
        return SnapshotGraph(self._stored, self._changed.set(id, record), self._count + (id not in self))

    def delete(self, id: ObjectId) -> SnapshotGraph:
        """The graph without this snapshot. Raises `KeyError` if it has none with that id."""
        if id not in self:
            raise KeyError(id)
        return SnapshotGraph(self._stored, self._changed.set(id, None), self._count - 1)

    def rows(self) -> SnapshotRows:
        """The snapshots in the form in which a file is written from them."""
        stored = self._stored
        if self._changed or stored.run is None:
            return SnapshotRows(stored, self._changed)
        return SameRows(stored, stored.run)

    def compacted(self) -> SnapshotGraph:
        """The same graph, in less memory if many snapshots have changed.

        Every parent must be in it. If this is called after every change, its amortised cost per change is that of
        writing 64 stored snapshots.
        """
        if len(self._changed) <= max(_MANY, len(self._stored) // _SHARE):
            return self
        try:
            return _rewritten(self.rows())
        except FormatError:
            # Some part of the file is corrupt. That does not hinder a caller that only adds snapshots.
            return self

    def based_on(self, stored: StoredSnapshots, before: SnapshotGraph) -> SnapshotGraph:
        """The same graph over the file that ``before``, an earlier version of it, was written to.

        If this graph has been compacted since, it is returned as it is.
        """
        if before._stored is not self._stored:
            return self
        known = before._changed
        newer = {id: one for id, one in self._changed.items() if id not in known or known[id] is not one}
        return SnapshotGraph(stored, Map(newer), self._count)

    def lineage(self, id: ObjectId) -> Iterator[SnapshotRecord]:
        """A snapshot and its ancestors, newest first, as far as they are in the graph."""
        stored, changed = self._stored, self._changed
        row: int | None = None
        for _ in range(self._count):
            if id in changed:
                record, row = changed[id], None
            else:
                row = stored.find(id) if row is None else row
                record = None if row is None else stored.at(row)
            if record is None:
                return
            yield record
            if record.parent is None:
                return
            # Most of history is read from the file, where a parent is known by its row.
            row, id = None if row is None else stored.parent_row(row), record.parent
        if id in self:
            raise FormatError(f"cannot read the history: the ancestors of snapshot {id.hex()} form a cycle")

    def lineage_rows(self, id: ObjectId) -> Iterator[int | SnapshotRecord]:
        """As `lineage`; of snapshots that `StoredSnapshots.plain` reads only the row, without reading them."""
        stored, changed = self._stored, self._changed
        parents, are_plain = stored.parent_rows.tolist(), stored.are_plain()
        replaced = {row for row in map(stored.find, changed) if row is not None}
        row: int | None = None
        for passed in range(self._count + 1):
            record: SnapshotRecord | None = None
            if row is None or row in replaced:
                id = id if row is None else stored.id(row)
                record, row = (changed[id], None) if id in changed else (None, stored.find(id))
            if record is None and row is None:
                return
            if passed == self._count:
                break
            if row is not None:
                yield row if are_plain[row] else stored.at(row)
                row = parents[row]
                if row < 0:
                    return
            elif record is not None:
                yield record
                if record.parent is None:
                    return
                id = record.parent
        raise FormatError(f"cannot read the history: the ancestors of snapshot {id.hex()} form a cycle")

    def parents(self) -> Iterator[tuple[ObjectId, ObjectId | None]]:
        """The id of every snapshot and of its parent, in any order; cheaper than reading every snapshot."""
        if not self._changed:
            return self._stored.parents()
        found = dict(self._stored.parents())
        for id, record in self._changed.items():
            if record is None:
                found.pop(id, None)
            else:
                found[id] = record.parent
        return iter(found.items())

    def pruned_transactions(self) -> dict[ObjectId, Sequence[ObjectId]]:
        """The snapshots that list transaction logs of expired ancestors, and these logs, oldest first."""
        stored, changed = self._stored, self._changed
        found: dict[ObjectId, Sequence[ObjectId]] = {stored.id(row): ids for row, ids in stored.pruned_transactions()}
        for id, record in changed.items():
            found.pop(id, None)
            if record is not None and record.pruned_ancestor_tx_logs:
                found[id] = record.pruned_ancestor_tx_logs
        return found

    def roots(self) -> AbstractSet[ObjectId]:
        """The ids of the snapshots that have no parent."""
        found = self._stored.roots().difference(self._changed)
        return found | {id for id, record in self._changed.items() if record is not None and record.parent is None}

    def older_than(self, time_us: int) -> list[ObjectId]:
        """The ids of the snapshots that were written before a time, µs, ascending."""
        found, changed = self._stored.older_than(time_us), self._changed
        if changed:
            found = [id for id in found if id not in changed]
            found += [id for id, one in changed.items() if one is not None and one.flushed_at_us < time_us]
        # In a file they ascend already.
        found.sort()
        return found

    def times(self) -> Iterator[tuple[ObjectId, int]]:
        """The id of every snapshot and the time at which it was written, µs, in any order; nothing else is decoded."""
        changed, stored = self._changed, self._stored
        times = zip(stored, stored.times(), strict=True) if stored else iter(())
        yield from ((id, time) for id, time in times if id not in changed) if changed else times
        yield from ((id, record.flushed_at_us) for id, record in changed.items() if record is not None)

    def without(self, ids: Collection[ObjectId]) -> SnapshotGraph:
        """The graph without these snapshots, all of which are in it."""
        changed = self._changed.update(dict.fromkeys(ids))
        return SnapshotGraph(self._stored, changed, self._count - len(ids))

    def released(self, ids: AbstractSet[ObjectId]) -> SnapshotGraph:
        """The graph without these snapshots; `compacted`, if they are many. Every parent must be in the graph.

        Raises
        ------
        KeyError
            One of them, which is the argument, is not in it.
        ChildrenLeftError
            A snapshot that stays has one of them as its parent.
        """
        stored, changed = self._stored, self._changed
        dropped = stored.rows_of(ids)
        for id in ids if len(dropped) < len(ids) else ():
            if id not in changed and id not in stored:
                raise KeyError(id)
        for id, record in changed.items():
            if record is None and id in ids:
                raise KeyError(id)
        for id in self._children_of(ids, dropped):
            raise ChildrenLeftError(id)
        if len(ids) <= max(_MANY, len(stored) // _SHARE):
            return self.without(ids)
        for id in [id for id in changed if id in ids]:
            changed = changed.delete(id)
        try:
            return _rewritten(SnapshotRows(stored, changed, dropped))
        except FormatError:
            return self.without(ids)

    def _children_of(self, ids: AbstractSet[ObjectId], rows: npt.NDArray[np.intp]) -> Iterator[ObjectId]:
        """The snapshots that are not among these, and whose parent is; ``rows`` are those of the stored among these."""
        stored, changed = self._stored, self._changed
        if len(stored):
            # One more than there are rows, for those without a parent.
            among = np.zeros(len(stored) + 1, np.bool_)
            among[rows] = True
            for row in np.flatnonzero(among[stored.parent_rows] & ~among[:-1]).tolist():
                if (id := stored.id(row)) not in changed:
                    yield id
        for id, record in changed.items():
            if record is not None and record.parent in ids and id not in ids:
                yield id

    def children_of(self, ids: AbstractSet[ObjectId]) -> Iterator[tuple[ObjectId, Iterator[ObjectId]]]:
        """The snapshots that are not among these, and whose parent is, in any order; each with its ancestors' ids.

        The nearest ancestor is first. Every parent must be in the graph.

        Raises
        ------
        FormatError
            Ancestors form a cycle.
        """
        stored, changed = self._stored, self._changed
        parents, names = stored.parent_rows.tolist(), stored.all_ids()
        replaced = {row for row in map(stored.find, changed) if row is not None}

        def ancestors(child: ObjectId) -> Iterator[ObjectId]:
            id, row = child, None if child in changed else stored.find(child)
            for _ in range(self._count):
                if row is not None and row not in replaced:
                    row = parents[row]
                    if row < 0:
                        return
                    id = names[row]
                else:
                    parent = self[id].parent
                    if parent is None:
                        return
                    id, row = parent, None if parent in changed else stored.find(parent)
                yield id
            raise FormatError(f"cannot read the history: the ancestors of snapshot {child.hex()} form a cycle")

        for child in self._children_of(ids, stored.rows_of(ids)):
            yield child, ancestors(child)

    def records(self) -> Iterator[SnapshotRecord]:
        """All snapshots, in any order."""
        changed = self._changed
        for row, id in enumerate(self._stored):
            if id not in changed:
                yield self._stored.at(row)
        yield from (record for record in changed.values() if record is not None)

    def values(self) -> ValuesView[SnapshotRecord]:
        """All snapshots, without a search for each."""
        return RecordsView(self)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ObjectId]:
        changed = self._changed
        yield from (id for id in self._stored if id not in changed) if changed else self._stored
        yield from (id for id, record in changed.items() if record is not None)

    def __contains__(self, id: object) -> bool:
        if not isinstance(id, bytes):
            return False
        key = ObjectId(id)
        return self._changed[key] is not None if key in self._changed else key in self._stored

    def __getitem__(self, id: ObjectId) -> SnapshotRecord:
        if id in self._changed:
            record = self._changed[id]
            if record is None:
                raise KeyError(id)
            return record
        return self._stored[id]

    def __repr__(self) -> str:
        return f"<{len(self)} snapshots, {len(self._changed)} of them changed since they were stored>"


def _rewritten(rows: SnapshotRows) -> SnapshotGraph:
    writer = FlatWriter()
    start = rows.write(writer)
    # The next checkpoint copies the tables as they are here.
    return SnapshotGraph.of(StoredSnapshots(Buffer(bytes(writer.out), "repo info"), start + 4, len(rows), rows.run()))
