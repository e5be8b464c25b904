"""The snapshots of a repo info, each decoded when it is requested.

A repository with ten thousand commits is usually opened to read one of them, so opening does no work for the others.
The first lookup by id reads and checks the ids and the numbers of the parents of all snapshots with numpy, in a
fraction of a microsecond each. The rest stays in the bytes of the file, in a tenth of the memory that objects would
take.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from itertools import pairwise
from typing import Final, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from icechunk.format.flat.flatbuffers import Buffer, Run, Table, required
from icechunk.format.flat.vectors import LazyTables, Vectors, all_of, any_of, extremes, gather, text_traits
from icechunk.format.ids import ObjectId
from icechunk.format.metadata import metadata_from_tables
from icechunk.format.repo.repo_info import SnapshotRecord

__all__ = [
    "FLUSHED_AT",
    "ID",
    "MESSAGE",
    "MESSAGE_AT",
    "METADATA",
    "METADATA_AT",
    "NO_PARENT",
    "NO_SNAPSHOTS",
    "PARENT",
    "PLAIN",
    "PRUNED",
    "TABLE_BYTES",
    "TABLE_OFFSETS",
    "RecordsView",
    "SnapshotIndex",
    "SnapshotRun",
    "StoredSnapshots",
]

ID, PARENT, FLUSHED_AT, MESSAGE, METADATA, PRUNED = range(6)
"""Slots of the table SnapshotInfo."""
NO_PARENT: Final = -1
TABLE_OFFSETS: Final = {PARENT: 4, ID: 8, FLUSHED_AT: 20, MESSAGE: 28, METADATA: 32}
"""Offsets at which this package writes the fields of a snapshot's table, by slot: first those that differ among
snapshots, then those that do not, so that zstd finds one long match in each."""
TABLE_BYTES: Final = 36
PLAIN: Final = struct.Struct("<ii12sQIIII")
"""A table without metadata as this package writes it: vtable, parent, id, time, message, metadata; then the empty
vector of metadata, and the length of the message, which follows."""
_NUMBERS_AT: Final = PLAIN.size - 16
MESSAGE_AT, METADATA_AT = 12, 4
"""Values of the offset fields of message and metadata in such a table."""
_PLAIN_FIELDS: Final = (TABLE_BYTES, *(TABLE_OFFSETS[slot] for slot in (ID, PARENT, FLUSHED_AT, MESSAGE, METADATA)))
_ID_SIZE: Final = 12
_LARGEST_TIME: Final = 2**64 - 1
_FEW_IDS: Final = 32
"""So many ids are found sooner one by one."""
_NO_PARENTS: Final = np.empty(0, np.int32)


class _HasRecords(Protocol):
    def records(self) -> Iterator[SnapshotRecord]: ...
    def __len__(self) -> int: ...


class RecordsView(ValuesView[SnapshotRecord]):
    """The values of a mapping that can return all of them faster than one by one."""

    def __init__(self, owner: _HasRecords) -> None:
        self._owner = owner

    def __len__(self) -> int:
        return len(self._owner)

    def __iter__(self) -> Iterator[SnapshotRecord]:
        return self._owner.records()

    def __contains__(self, record: object) -> bool:
        return any(one == record for one in self)


def _heads(ids: bytes) -> npt.NDArray[np.uint64]:
    """uint64[n]: the first 8 bytes of concatenated ids, which compare as the ids do."""
    return np.ndarray((len(ids) // _ID_SIZE,), ">u8", ids, strides=(_ID_SIZE,)).astype(np.uint64)


def _words(ids: bytes) -> npt.NDArray[np.uint32]:
    """uint32[n, 3]: concatenated ids, to be compared whether they are equal."""
    return np.frombuffer(ids, np.uint32).reshape(-1, _ID_SIZE // 4)


class SnapshotIndex:
    """Ids and parents of all snapshots of a file.

    Parameters
    ----------
    ids
        Of all rows, concatenated. Each occurs once.
    parents
        int32[n]: the row of each row's parent, or `NO_PARENT`.
    """

    __slots__ = ("by_id", "heads", "ids", "parents")

    def __init__(self, ids: bytes = b"", parents: npt.NDArray[np.int32] = _NO_PARENTS) -> None:
        self.by_id: list[int] | None = None
        """Rows in the order of their ids; None if that is the order of the file."""
        self.ids: bytes = ids
        self.heads: array[int] = array("Q")
        """The first 8 bytes of all ids as numbers, ascending."""
        self.parents: array[int] = array("i", parents.tobytes())
        if not self._ascends(range(len(parents))):
            self.by_id = np.argsort(self.column(), kind="stable").tolist()
            if not self._ascends(self.by_id):
                raise _TwiceError(next(id for id, after in pairwise(map(self.id, self.by_id)) if id == after))

    @classmethod
    def read(cls, tables: LazyTables) -> Self:
        """Read the tables of a file.

        Raises
        ------
        FormatError
            If a table is not within the buffer, an id is missing or occurs twice, or a parent's number is out of range.
        """
        count = len(tables)
        if not count:
            return cls()
        own, columns = tables.columns()
        column = columns.column(ID, _ID_SIZE)
        if column is None or column.rows is not None:
            raise own.fail("a snapshot has no id")
        parents = columns.numbers(PARENT, "<i4")
        try:
            found = cls(columns.numbers(ID, f"V{_ID_SIZE}").tobytes(), parents.astype(np.int32))
        except _TwiceError as error:
            raise own.fail(f"snapshot {error.id.hex()} is in it twice") from None
        lowest, highest = extremes(parents)
        if lowest < NO_PARENT or highest >= count:
            wrong = int(np.flatnonzero((parents < NO_PARENT) | (parents >= count))[0])
            raise own.fail(f"snapshot {found.id(wrong).hex()} has parent number {parents[wrong]} of {count}")
        return found

    def _ascends(self, rows: Sequence[int]) -> bool:
        """Use this order of all rows for searches; returns whether their ids are strictly ascending in it."""
        heads = _heads(self.ids)
        if not isinstance(rows, range):
            heads = heads[rows]
        self.heads = array("Q", heads.tobytes())
        if all_of(heads[1:] > heads[:-1]):
            return True
        # Ids are random, so two of them rarely agree in their first eight bytes.
        return all(id < after for id, after in pairwise(map(self.id, rows)))

    def column(self) -> npt.NDArray[np.bytes_]:
        """S12[n], by row; such items compare as ids do, but lose trailing zero bytes when taken out one by one."""
        return np.frombuffer(self.ids, f"S{_ID_SIZE}")

    def id(self, row: int) -> ObjectId:
        """The id of a row."""
        return ObjectId(self.ids[_ID_SIZE * row : _ID_SIZE * row + _ID_SIZE])


class _TwiceError(ValueError):
    def __init__(self, id: ObjectId) -> None:
        super().__init__(id)
        self.id = id


class SnapshotRun(NamedTuple):
    """All tables of a vector of snapshots in consecutive bytes, so that the next file can copy them."""

    run: Run
    parents: npt.NDArray[np.int64]
    """int64[n]: position of each parent's number, relative to the run."""
    known: SnapshotIndex
    """The index of these tables."""


class StoredSnapshots(Mapping[ObjectId, SnapshotRecord]):
    """Snapshots by id, in the order of the file, which is that of their ids.

    The first lookup or iteration reads the ids and parents of all snapshots, once. Every method except ``len`` raises
    `FormatError` if the data that it reads are corrupt.

    Parameters
    ----------
    buffer
        The payload.
    start, count
        Position and length of the vector of tables, as `Table.vector` returns them.
    run
        Where the tables are, if this process wrote them.

    Raises
    ------
    FormatError
        If there are more than the buffer has room for.
    """

    __slots__ = ("_known", "_last", "_plain_rows", "run", "tables")

    def __init__(self, buffer: Buffer, start: int, count: int, run: SnapshotRun | None = None) -> None:
        self.tables: LazyTables = LazyTables(buffer, start, count)
        """Tables in the order of the file; a row is the number of a table."""
        self.run: SnapshotRun | None = run
        self._known: SnapshotIndex | None = None if run is None else run.known
        self._plain_rows: bytes | None = None
        self._last: tuple[int, SnapshotRecord] | None = None

    @property
    def _index(self) -> SnapshotIndex:
        if self._known is None:
            self._known = SnapshotIndex.read(self.tables)
        return self._known

    @property
    def parent_rows(self) -> npt.NDArray[np.int32]:
        """int32[n], by row: the row of its parent, or `NO_PARENT`."""
        return np.frombuffer(self._index.parents, np.int32)

    @property
    def ids(self) -> npt.NDArray[np.bytes_]:
        """S12[n], by row; such items compare as ids do, but lose trailing zero bytes when taken out one by one."""
        return self._index.column()

    def id(self, row: int) -> ObjectId:
        """The id of a row."""
        if self._known is not None:
            return self._known.id(row)
        # Opening a repository needs the tip of one branch, and no other id.
        table = self.tables.table(row)
        return ObjectId(required(table.inline(ID, _ID_SIZE), table, "id"))

    def all_ids(self) -> list[ObjectId]:
        """The ids of all rows, in much less time than one by one."""
        ids: list[ObjectId] = np.frombuffer(self._index.ids, f"V{_ID_SIZE}").tolist()
        return ids

    @property
    def is_sorted(self) -> bool:
        """Whether the rows are in the order of their ids, as every writer should leave them."""
        return self._index.by_id is None

    def rows_by_id(self) -> npt.NDArray[np.intp]:
        """All rows in the order of their ids."""
        by_id = self._index.by_id
        return np.arange(len(self.tables)) if by_id is None else np.array(by_id, np.intp)

    def parent_row(self, row: int) -> int | None:
        """The row of a row's parent; None if it has none."""
        parent = self._index.parents[row]
        return None if parent == NO_PARENT else parent

    def parents(self) -> Iterator[tuple[ObjectId, ObjectId | None]]:
        """The id of every snapshot and of its parent, by row; nothing else is decoded."""
        ids = self.all_ids()
        return zip(ids, [None if parent == NO_PARENT else ids[parent] for parent in self._index.parents], strict=True)

    def times(self) -> list[int]:
        """The time at which each snapshot was written, by row, µs."""
        _, columns = self.tables.columns()
        times: list[int] = columns.numbers(FLUSHED_AT, "<u8").tolist()
        return times

    def roots(self) -> set[ObjectId]:
        """The ids of the rows without a parent."""
        return set(self._ids_where(self.parent_rows == NO_PARENT)) if len(self) else set()

    def older_than(self, time_us: int) -> list[ObjectId]:
        """The ids of the rows that were written before a time, µs, in the order of the file."""
        if not len(self):
            return []
        _, columns = self.tables.columns()
        written = columns.numbers(FLUSHED_AT, "<u8")
        return self._ids_where(written < np.uint64(min(max(time_us, 0), _LARGEST_TIME)))

    def _ids_where(self, rows: npt.NDArray[np.bool_]) -> list[ObjectId]:
        ids: list[ObjectId] = np.frombuffer(self._index.ids, f"V{_ID_SIZE}")[rows].tolist()
        return ids

    def pruned_transactions(self) -> Iterator[tuple[int, list[ObjectId]]]:
        """The rows that list transaction logs of expired ancestors, and these logs, oldest first."""
        if not self.tables:
            return
        buffer, columns = self.tables.columns()
        vectors = columns.vectors(PRUNED, _ID_SIZE)
        if vectors is None:
            return
        buffer.charge(int(vectors.counts.sum()) * _ID_SIZE)
        rows = range(len(self.tables)) if vectors.rows is None else vectors.rows.tolist()
        for row, start, count in zip(rows, vectors.starts.tolist(), vectors.counts.tolist(), strict=True):
            raw = buffer.data[start : start + count * _ID_SIZE]
            yield row, [ObjectId(raw[i : i + _ID_SIZE]) for i in range(0, len(raw), _ID_SIZE)]

    def are_plain(self) -> bytes:
        """For each row 1 if its table has the layout (`PLAIN`) that this package writes for snapshots without metadata,
        all that it holds is within the file, and its message is ASCII, so that reading it later cannot fail; else 0."""
        if self._plain_rows is None:
            self._plain_rows = _plain_rows(self.tables)
        return self._plain_rows

    def plain(self, row: int) -> tuple[ObjectId, ObjectId | None, int, str]:
        """Id, parent, time in µs and message of a row that `are_plain` has checked."""
        index, data, pos = self._index, self.tables.payload, self.tables.position(row)
        _, parent, _, flushed_at_us, _, _, _, nbytes = PLAIN.unpack_from(data, pos)
        message = data[pos + PLAIN.size : pos + PLAIN.size + nbytes].decode()
        return index.id(row), None if parent == NO_PARENT else index.id(parent), flushed_at_us, message

    def find(self, id: object) -> int | None:
        """The row of an id; None if it is not there."""
        if not isinstance(id, bytes):
            return None
        index = self._index
        head = int.from_bytes(id[:8])
        place = bisect_left(index.heads, head)
        while place < len(index.heads) and index.heads[place] == head:
            row = place if index.by_id is None else index.by_id[place]
            if index.id(row) == id:
                return row
            place += 1
        return None

    def find_all(self, ids: Collection[ObjectId]) -> npt.NDArray[np.intp]:
        """intp[n]: the row of each id; −1 if it is not there."""
        if len(ids) <= _FEW_IDS or not len(self):
            found = map(self.find, ids)
            return np.array([-1 if row is None else row for row in found], np.intp)
        joined = b"".join(ids)
        heads, asked = np.frombuffer(self._index.heads, np.uint64), _heads(joined)
        at = np.minimum(np.searchsorted(heads, asked), len(heads) - 1)
        rows: npt.NDArray[np.intp] = self.rows_by_id()[at]
        missed = (_words(self._index.ids)[rows] != _words(joined)).any(axis=1)
        rows[missed] = -1
        if any_of(again := missed & (heads[at] == asked)):
            # Another id begins with the same bytes.
            every = list(ids)
            for i in np.flatnonzero(again).tolist():
                row = self.find(every[i])
                rows[i] = -1 if row is None else row
        return rows

    def rows_of(self, ids: AbstractSet[ObjectId]) -> npt.NDArray[np.intp]:
        """intp[k]: the rows of these ids, without those that are not there, in any order."""
        rows = self.find_all(ids)
        return rows[rows >= 0]

    def at(self, row: int) -> SnapshotRecord:
        """The snapshot of a row. Raises `FormatError` if its table is corrupt."""
        index, table = self._index, self.tables.table(row)
        if table.fields == _PLAIN_FIELDS:
            record = _plain(index, row, table)
            if record is not None:
                return record
        parent = table.i32(PARENT)
        pruned = table.items(PRUNED, _ID_SIZE) or b""
        return SnapshotRecord(
            id=index.id(row),
            parent=None if parent == NO_PARENT else index.id(parent),
            flushed_at_us=table.u64(FLUSHED_AT),
            message=required(table.string(MESSAGE), table, "message"),
            metadata=metadata_from_tables(table.tables(METADATA) or (), 2),
            pruned_ancestor_tx_logs=tuple(ObjectId(pruned[i : i + _ID_SIZE]) for i in range(0, len(pruned), _ID_SIZE)),
        )

    def records(self) -> Iterator[SnapshotRecord]:
        """All snapshots, by row."""
        return map(self.at, range(len(self.tables)))

    def values(self) -> ValuesView[SnapshotRecord]:
        """All snapshots, without a search for each."""
        return RecordsView(self)

    def __len__(self) -> int:
        return len(self.tables)

    def __iter__(self) -> Iterator[ObjectId]:
        return iter(self.all_ids())

    def __contains__(self, id: object) -> bool:
        return self.find(id) is not None

    def __getitem__(self, id: ObjectId) -> SnapshotRecord:
        row = self.find(id)
        if row is None:
            raise KeyError(id)
        # The tip of a branch is looked up several times for one change.
        last = self._last
        if last is None or last[0] != row:
            last = self._last = row, self.at(row)
        return last[1]

    def __repr__(self) -> str:
        return f"<{len(self)} stored snapshots>"


NO_SNAPSHOTS: Final = StoredSnapshots(Buffer(bytes(4), "repo info"), 4, 0)

_LONGEST_MESSAGE: Final = 4096
"""Bytes; snapshots with longer ones are not looked at in columns."""


def _plain_rows(tables: LazyTables) -> bytes:
    """As `StoredSnapshots.are_plain`."""
    if not tables:
        return b""
    buffer, positions = Buffer(tables.payload, tables.name), tables.positions()
    vtables = positions - gather(buffer, positions, "<i4")
    fitting = [at for at in set(vtables.tolist()) if buffer.vtable(at) == _PLAIN_FIELDS]
    plain = np.isin(vtables, fitting) & (positions + PLAIN.size <= buffer.size)
    rows = np.flatnonzero(plain)
    if len(rows):
        numbers = gather(buffer, positions[rows] + _NUMBERS_AT, "V16").view("<u4").reshape(-1, 4).astype(np.int64)
        good = (numbers[:, :3] == (MESSAGE_AT, METADATA_AT, 0)).all(axis=1) & (numbers[:, 3] <= _LONGEST_MESSAGE)
        good &= positions[rows] + PLAIN.size + numbers[:, 3] <= buffer.size
        plain[rows[~good]] = False
        messages = Vectors(None, positions[rows[good]] + PLAIN.size, numbers[good, 3])
        if len(messages.starts) and not text_traits(buffer, messages).is_ascii:
            return bytes(len(tables))
    return plain.tobytes()


def _plain(index: SnapshotIndex, row: int, table: Table) -> SnapshotRecord | None:
    """The snapshot, if its table has the layout (`PLAIN`) that this package writes for those without metadata; else
    None."""
    data, pos = table.buffer.data, table.pos
    if pos + PLAIN.size > len(data):
        return None
    _, parent, _, flushed_at_us, message, metadata, count, nbytes = PLAIN.unpack_from(data, pos)
    end = pos + PLAIN.size + nbytes
    if (message, metadata, count) != (MESSAGE_AT, METADATA_AT, 0) or end > len(data):
        return None
    table.buffer.charge(nbytes)
    try:
        text = data[pos + PLAIN.size : end].decode()
    except UnicodeDecodeError:
        return None
    return SnapshotRecord(
        id=index.id(row),
        parent=None if parent == NO_PARENT else index.id(parent),
        flushed_at_us=flushed_at_us,
        message=text,
    )
