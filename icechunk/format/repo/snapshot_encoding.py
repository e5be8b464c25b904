"""Encoding of the snapshots of a repo info: those of an older file are copied as columns, new ones encoded one by one.

Every checkpoint, and in the layout without a log every commit, writes the whole history. Snapshots of an older file are
neither decoded nor encoded for that, and take no Python step each: their numbers are read as columns, their texts and
values are spans of the older file's bytes, and numpy assembles the new bytes from both. If this process wrote the older
file, and no snapshot of it was changed or deleted, its bytes are copied as they are, and only the numbers of parents
are replaced (`icechunk.format.flat.flatbuffers.Run`).

A snapshot is written as one block of bytes; only its vtable is outside of it::

    its table | count of metadata, offset of each | message | table of each metadata | names and values | pruned logs

Blocks and their parts have any length, so their positions are cumulative sums over columns of lengths. Texts and values
are copied as they are: the reader checks whether a message is UTF-8 and a value can be decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.flat.flatbuffers import Buffer, FlatTable, FlatWriter, Items, Run, Scalar, id_struct, u64
from icechunk.format.flat.vectors import Positions, TableColumns, copy_spans, gather, put
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.metadata import metadata_tables
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.format.repo.stored_snapshots import (
    FLUSHED_AT,
    ID,
    MESSAGE,
    MESSAGE_AT,
    METADATA,
    METADATA_AT,
    NO_PARENT,
    NO_SNAPSHOTS,
    PARENT,
    PLAIN,
    PRUNED,
    TABLE_BYTES,
    TABLE_OFFSETS,
    SnapshotIndex,
    SnapshotRun,
    StoredSnapshots,
)

__all__ = ["SameRows", "SnapshotRows", "write_blocks"]

_TABLE: Final = np.dtype(
    [
        ("vtable", "<i4"),
        ("parent", "<i4"),
        ("id", "V12"),
        ("flushed_at", "<u8"),
        ("message", "<u4"),
        ("metadata", "<u4"),
        ("pruned", "<u4"),
    ]
)
"""Layout of a table; the last field exists only if something was pruned."""
_ITEM: Final = np.dtype([("vtable", "<i4"), ("name", "<u4"), ("value", "<u4")])
_ID_BYTES: Final = 12


class _Spans(NamedTuple):
    """Vectors in the older file."""

    starts: Positions
    """Position of the first item of each vector; meaningless if there is no vector."""
    counts: Positions
    """Number of items of each vector; 0 if there is no vector."""


class _Items(NamedTuple):
    """Metadata items of all snapshots, concatenated."""

    owners: npt.NDArray[np.intp]
    """Index of the snapshot that each item belongs to; ascending."""
    within: Positions
    """Index of each item among those of its snapshot."""
    names: _Spans
    values: _Spans


def write_blocks(
    writer: FlatWriter, stored: StoredSnapshots, rows: npt.NDArray[np.intp], moved: npt.NDArray[np.int64]
) -> Positions:
    """Write the tables of some rows of an older file, and everything below them; returns the position of each table.

    Parameters
    ----------
    rows
        The rows to write, in this order; at least one.
    moved
        int64[rows of the older file + 1]: the new number of each row that may be a parent; the last is "none".

    Raises
    ------
    FormatError
        The older file is corrupt.
    """
    buffer, columns = stored.tables.columns(rows)
    messages = _spans(buffer, columns, MESSAGE, 1, required="message")
    metadata = _spans(buffer, columns, METADATA, 4)
    pruned = _spans(buffer, columns, PRUNED, _ID_BYTES)
    items = _items(buffer, metadata)

    # Positions within each block, then those of the blocks.
    has_pruned = pruned.counts > 0
    count_at = TABLE_BYTES + 4 * has_pruned.astype(np.int64)
    message_at = count_at + 4 + 4 * metadata.counts
    items_at = message_at + _padded(messages.counts + 5, 4)
    name_bytes = _padded(items.names.counts + 5, 4)
    ends = np.concatenate(([0], np.cumsum(name_bytes + _padded(items.values.counts + 4, 4))))
    last = np.cumsum(metadata.counts)
    before = ends[last - metadata.counts]
    texts_at = items_at + _ITEM.itemsize * metadata.counts
    pruned_at = texts_at + ends[last] - before
    sizes = _padded(pruned_at + np.where(has_pruned, 4 + _ID_BYTES * pruned.counts, 0), 8)
    starts = np.cumsum(sizes) - sizes

    vtable = writer.vtable(TABLE_OFFSETS, TABLE_BYTES)
    pruned_vtable = writer.vtable({**TABLE_OFFSETS, PRUNED: TABLE_BYTES}, _TABLE.itemsize)
    item_vtable = writer.vtable({0: 4, 1: 8}, _ITEM.itemsize)
    writer.align(8, 4)
    base = len(writer.out)
    block = np.zeros(int(sizes.sum()), np.uint8)

    tables = np.zeros(len(rows), _TABLE)
    tables["vtable"] = base + starts - np.where(has_pruned, pruned_vtable, vtable)
    tables["flushed_at"] = columns.numbers(FLUSHED_AT, "<u8")
    tables["parent"] = moved[columns.numbers(PARENT, "<i4")]
    tables["message"] = message_at - TABLE_OFFSETS[MESSAGE]
    tables["id"] = columns.numbers(ID, f"V{_ID_BYTES}")
    tables["metadata"] = count_at - TABLE_OFFSETS[METADATA]
    tables["pruned"] = pruned_at - TABLE_BYTES
    # Tables without the last field are shorter: the data after the table overwrite that field.
    put(block, starts, tables)
    put(block, starts + count_at, metadata.counts.astype("<u4"))
    _put_spans(block, starts + message_at, buffer, messages, 1)
    if has_pruned.any():
        logs = _Spans(pruned.starts[has_pruned], pruned.counts[has_pruned])
        _put_spans(block, (starts + pruned_at)[has_pruned], buffer, logs, _ID_BYTES)
    if len(items.owners):
        fields = (starts + count_at + 4)[items.owners] + 4 * items.within
        at = (starts + items_at)[items.owners] + _ITEM.itemsize * items.within
        names_at = (starts + texts_at - before)[items.owners] + ends[:-1]
        values_at = names_at + name_bytes
        item_tables = np.zeros(len(at), _ITEM)
        item_tables["vtable"] = base + at - item_vtable
        item_tables["name"] = names_at - at - 4
        item_tables["value"] = values_at - at - 8
        put(block, fields, (at - fields).astype("<u4"))
        put(block, at, item_tables)
        _put_spans(block, names_at, buffer, items.names, 1)
        _put_spans(block, values_at, buffer, items.values, 1)
    writer.out += block.data
    return base + starts


def _spans(buffer: Buffer, columns: TableColumns, slot: int, item_bytes: int, *, required: str = "") -> _Spans:
    found = columns.vectors(slot, item_bytes)
    if required and (found is None or found.rows is not None):
        raise buffer.fail(f"required field {required!r} is missing")
    starts, counts = np.zeros(len(columns), np.int64), np.zeros(len(columns), np.int64)
    if found is not None:
        rows: Any = slice(None) if found.rows is None else found.rows
        starts[rows], counts[rows] = found.starts, found.counts
        buffer.charge(int(found.counts.sum()) * item_bytes)
    return _Spans(starts, counts)


def _items(buffer: Buffer, metadata: _Spans) -> _Items:
    total = int(metadata.counts.sum())
    buffer.charge_tables(total)
    owners = np.repeat(np.arange(len(metadata.counts)), metadata.counts)
    firsts = np.cumsum(metadata.counts) - metadata.counts
    within = np.arange(total, dtype=np.int64) - firsts[owners]
    fields = metadata.starts[owners] + 4 * within
    tables = TableColumns(buffer, fields + gather(buffer, fields, "<u4"))
    if not total:
        return _Items(owners, within, _Spans(within, within), _Spans(within, within))
    return _Items(
        owners,
        within,
        _spans(buffer, tables, 0, 1, required="name"),
        _spans(buffer, tables, 1, 1, required="value"),
    )


def _padded(sizes: Positions, align: int) -> Positions:
    return (sizes + (align - 1)) & -align


def _put_spans(block: npt.NDArray[np.uint8], at: Positions, buffer: Buffer, spans: _Spans, item_bytes: int) -> None:
    """Write vectors into ``block``: the number of items, then the items."""
    put(block, at, spans.counts.astype("<u4"))
    copy_spans(block, at + 4, buffer.data, spans.starts, spans.counts * item_bytes)


_FEW = 32
"""Up to this number, writing one by one takes less time than writing columns."""


class SnapshotRows:
    """The snapshots of a file that is about to be written, each with its number.

    Parameters
    ----------
    stored
        The snapshots of an older file.
    changed
        New values by id; None: the snapshot was deleted.
    dropped
        Rows of the older file that are not written.

    Raises
    ------
    FormatError
        If the older file is corrupt.
    """

    __slots__ = ("_moved", "_new", "_numbers", "_old_numbers", "_picked", "_records", "_rows", "_stored", "_written")

    def __init__(
        self,
        stored: StoredSnapshots,
        changed: Mapping[ObjectId, SnapshotRecord | None],
        dropped: npt.NDArray[np.intp] | None = None,
    ) -> None:
        if 0 < len(stored) <= _FEW and stored.run is None and dropped is None:
            # Nothing of the older file can be copied, and of few the columns take longer to make than all else.
            stored, changed = NO_SNAPSHOTS, {record.id: record for record in stored.records()} | dict(changed)
        fresh = [changed[id] for id in sorted(changed)]
        self._picked: Any = slice(0)
        """`_rows` as an index; of a whole column no copy is made."""
        self._written: tuple[Run, npt.NDArray[np.int64]] | None = None
        """The tables' place in the file, and those of their parents' numbers, once they are written."""
        self._stored = stored
        self._records = [record for record in fresh if record is not None]
        if not stored:
            self._rows = self._old_numbers = np.empty(0, np.intp)
            self._numbers = np.arange(len(self._records))
            self._moved = np.full(1, NO_PARENT, np.int64)
            self._new = {record.id: number for number, record in enumerate(self._records)}
            return
        rows = stored.find_all(changed.keys())
        replaced = rows[rows >= 0]
        self._rows = stored.rows_by_id()
        if len(replaced) or dropped is not None:
            kept = np.ones(len(stored), np.bool_)
            kept[replaced] = False
            if dropped is not None:
                kept[dropped] = False
            self._rows = self._rows[kept[self._rows]]
        self._picked = slice(None) if stored.is_sorted and len(self._rows) == len(stored) else self._rows
        new_ids = np.array([record.id for record in self._records], "S12")
        places = np.searchsorted(stored.ids[self._picked], new_ids)
        self._numbers = np.arange(len(self._records)) + places
        before = np.bincount(places, minlength=len(self._rows) + 1)[:-1]
        self._old_numbers = np.arange(len(self._rows)) + np.cumsum(before)
        self._new = {record.id: number for record, number in zip(self._records, self._numbers.tolist(), strict=True)}
        # One more than there are rows, so that "no parent" maps to itself.
        self._moved = np.full(len(stored) + 1, NO_PARENT, np.int64)
        self._moved[self._rows] = self._old_numbers
        if len(replaced):
            again = stored.find_all(self._new.keys())
            self._moved[again[again >= 0]] = self._numbers[again >= 0]

    def __len__(self) -> int:
        return len(self._rows) + len(self._records)

    def number(self, id: ObjectId | None) -> int:
        """The number of a snapshot; −1 if it is not among them."""
        if id is None:
            return NO_PARENT
        number = self._new.get(id)
        if number is not None:
            return number
        row = self._stored.find(id)
        return NO_PARENT if row is None else int(self._moved[row])

    def write(self, writer: FlatWriter) -> int:
        """Write the vector; returns its position.

        Raises
        ------
        InvalidInputError
            If a value cannot be encoded.
        FormatError
            If the older file is corrupt.
        """
        count = len(self)
        writer.align(4)
        out = writer.out
        vector = len(out)
        out += count.to_bytes(4, "little") + bytes(4 * count)
        offsets = self._write_tables(writer) - np.arange(vector + 4, vector + 4 + 4 * count, 4)
        out[vector + 4 : vector + 4 + 4 * count] = offsets.astype("<u4").tobytes()
        return vector

    def _write_tables(self, writer: FlatWriter) -> npt.NDArray[np.int64]:
        """Write the tables, as a run; returns their positions."""
        out, count = writer.out, len(self)
        positions: npt.NDArray[np.int64] = np.empty(count, np.int64)
        parents: npt.NDArray[np.int64] = np.empty(count, np.int64)
        old, former = self._old_numbers, self._stored.run
        if former is not None and len(self._rows) == len(self._stored):
            start = writer.begin_run(self._stored.tables.payload, former.run)
            positions[old] = start + former.run.tables[self._picked]
            fields = start + former.parents[self._picked]
            parents[old] = fields
            numbers = np.frombuffer(out, "<i4", len(out) // 4)
            numbers[fields >> 2] = self._moved[self._stored.parent_rows[self._picked]]
            del numbers  # the bytes cannot grow while numpy has a view of them
        else:
            start = writer.begin_run()
            if 0 < len(self._rows) <= _FEW:
                records = [self._stored.at(row) for row in self._rows.tolist()]
                positions[old] = self._write_records(writer, records)
                parents[old] = _parent_fields(out, positions[old].tolist())
            elif len(self._rows):
                positions[old] = write_blocks(writer, self._stored, self._rows, self._moved)
                parents[old] = positions[old] + TABLE_OFFSETS[PARENT]
        if self._records:
            positions[self._numbers] = self._write_records(writer, self._records)
            parents[self._numbers] = _parent_fields(out, positions[self._numbers].tolist())
        self._written = writer.end_run(start, positions), parents - start
        return positions

    def run(self) -> SnapshotRun | None:
        """The values from which the next file copies the tables; None: they are not written yet."""
        return None if self._written is None else SnapshotRun(*self._written, self._index())

    def _index(self) -> SnapshotIndex:
        """The index of the file, which is known without reading it."""
        ids = np.empty(len(self), "V12")
        parents = np.empty(len(self), np.int32)
        if len(self._rows):
            ids[self._old_numbers] = self._stored.ids.view("V12")[self._picked]
            parents[self._old_numbers] = self._moved[self._stored.parent_rows[self._picked]]
        if self._records:
            ids[self._numbers] = np.frombuffer(b"".join(record.id for record in self._records), "V12")
            parents[self._numbers] = [self.number(record.parent) for record in self._records]
        return SnapshotIndex(ids.tobytes(), parents)

    def _write_records(self, writer: FlatWriter, records: Sequence[SnapshotRecord]) -> list[int]:
        """Write the records one by one. Records without metadata, which are most, are packed directly: that takes a
        tenth of the time of writing a table."""
        out = writer.out
        plain = writer.vtable(TABLE_OFFSETS, TABLE_BYTES)
        positions = []
        for record in records:
            parent = self.number(record.parent)
            if record.metadata or record.pruned_ancestor_tx_logs:
                positions.append(writer.table(_table(record, parent)))
                continue
            # The 8-byte field follows five words of the table.
            out += bytes((4 - len(out)) % 8)
            start = len(out)
            try:
                message = record.message.encode()
                # The message is behind the table and the empty vector of metadata, to which they point.
                out += PLAIN.pack(
                    start - plain,
                    parent,
                    record.id,
                    record.flushed_at_us,
                    MESSAGE_AT,
                    METADATA_AT,
                    0,
                    len(message),
                )
            except (struct.error, UnicodeEncodeError) as error:
                raise InvalidInputError(
                    f"cannot encode snapshot {encode_id(record.id)}: {error}", ErrorKind.SERIALIZATION
                ) from error
            out += message
            out += b"\0"
            positions.append(start)
        return positions


class SameRows(SnapshotRows):
    """The snapshots of an older file that this process wrote, none of them changed: as after a new branch or tag.

    Their bytes are copied with the numbers of parents. The bytes of the new file are those that `SnapshotRows` writes.
    """

    __slots__ = ("_again", "_former")

    def __init__(self, stored: StoredSnapshots, former: SnapshotRun) -> None:
        self._stored = stored
        self._former = former
        self._again: Run | None = None

    def __len__(self) -> int:
        return len(self._stored)

    def number(self, id: ObjectId | None) -> int:
        row = None if id is None else self._stored.find(id)
        return NO_PARENT if row is None else row

    def _write_tables(self, writer: FlatWriter) -> npt.NDArray[np.int64]:
        start = writer.begin_run(self._stored.tables.payload, self._former.run)
        positions = start + self._former.run.tables
        self._again = writer.end_run(start, positions)
        return positions

    def run(self) -> SnapshotRun | None:
        return None if self._again is None else self._former._replace(run=self._again)


def _parent_fields(out: bytearray, tables: Sequence[int]) -> list[int]:
    """Position of the parent's number in each of these tables."""
    fields = []
    for table in tables:
        vtable = table - int.from_bytes(out[table : table + 4], "little", signed=True)
        slot = vtable + 4 + 2 * PARENT
        fields.append(table + int.from_bytes(out[slot : slot + 2], "little"))
    return fields


def _table(record: SnapshotRecord, parent: int) -> FlatTable:
    pruned = record.pruned_ancestor_tx_logs
    return FlatTable(
        {
            ID: id_struct(record.id),
            PARENT: Scalar("i", parent),
            FLUSHED_AT: u64(record.flushed_at_us),
            MESSAGE: record.message,
            METADATA: metadata_tables(record.metadata, 2),
            PRUNED: Items(b"".join(pruned), len(pruned)) if pruned else None,
        }
    )
