"""Writing the snapshots of a repo info: those of an older file as columns, new ones one by one.

Every checkpoint, and in the layout without a log every commit, writes all of history. What stands in an older file is
neither decoded nor encoded for that: numbers are read as columns, texts and values are spans of the older file's
bytes, and the new bytes are put together from both with numpy.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from icechunk.errors import InvalidInputError
from icechunk.format.flat_writer import FlatTable, FlatWriter, Items, Scalar, id_struct, u64
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.metadata import metadata_tables
from icechunk.format.repo_values import SnapshotRecord
from icechunk.format.snapshot_blocks import write_blocks
from icechunk.format.stored_snapshots import (
    FLUSHED_AT,
    ID,
    MESSAGE,
    MESSAGE_AT,
    METADATA,
    METADATA_AT,
    NO_PARENT,
    PARENT,
    PLAIN,
    PRUNED,
    TABLE_BYTES,
    TABLE_OFFSETS,
    StoredSnapshots,
)

__all__ = ["SnapshotRows"]

_FEW = 32
"""As many are written one by one in less time than columns take."""


class SnapshotRows:
    """The snapshots of a file to be written, each with its number.

    Parameters
    ----------
    stored
        Those of an older file.
    changed
        What has another value now; None: it is gone.
    """

    __slots__ = ("_moved", "_new", "_numbers", "_old_numbers", "_records", "_rows", "_stored")

    def __init__(self, stored: StoredSnapshots, changed: Mapping[ObjectId, SnapshotRecord | None]) -> None:
        fresh = [changed[id] for id in sorted(changed)]
        self._stored = stored
        self._records = [record for record in fresh if record is not None]
        if not stored:
            self._rows = self._old_numbers = np.empty(0, np.intp)
            self._numbers = np.arange(len(self._records))
            self._moved = np.full(1, NO_PARENT, np.int64)
            self._new = {record.id: number for number, record in enumerate(self._records)}
            return
        replaced = [row for row in map(stored.find, changed) if row is not None]
        kept = np.ones(len(stored), np.bool_)
        kept[replaced] = False
        order = stored.rows_by_id()
        self._rows = order[kept[order]]
        old_ids = stored.ids[self._rows]
        new_ids = np.array([record.id for record in self._records], "S12")
        self._numbers = np.arange(len(self._records)) + np.searchsorted(old_ids, new_ids)
        self._old_numbers = np.arange(len(self._rows)) + np.searchsorted(new_ids, old_ids)
        self._new = {record.id: int(number) for record, number in zip(self._records, self._numbers, strict=True)}
        # One more than there are rows, so that "no parent" leads to itself.
        self._moved = np.full(len(stored) + 1, NO_PARENT, np.int64)
        self._moved[self._rows] = self._old_numbers
        for row in replaced:
            self._moved[row] = self._new.get(stored.id(row), NO_PARENT)

    def __len__(self) -> int:
        return len(self._rows) + len(self._records)

    def number(self, id: ObjectId | None) -> int:
        """The number of a snapshot; −1 where it is not among them."""
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
            A value that cannot be encoded.
        FormatError
            The older file is corrupt.
        """
        count = len(self)
        writer.align(4)
        out = writer.out
        vector = len(out)
        out += count.to_bytes(4, "little") + bytes(4 * count)
        positions: npt.NDArray[np.int64] = np.empty(count, np.int64)
        if 0 < len(self._rows) <= _FEW:
            old = [self._stored.at(row) for row in self._rows.tolist()]
            positions[self._old_numbers] = self._write_records(writer, old)
        elif len(self._rows):
            positions[self._old_numbers] = write_blocks(writer, self._stored, self._rows, self._moved)
        if self._records:
            positions[self._numbers] = self._write_records(writer, self._records)
        fields = vector + 4 + 4 * np.arange(count, dtype=np.int64)
        out[vector + 4 : vector + 4 + 4 * count] = (positions - fields).astype("<u4").tobytes()
        return vector

    def _write_records(self, writer: FlatWriter, records: Sequence[SnapshotRecord]) -> list[int]:
        """Those that have no metadata, as most have none, are laid out by hand: a tenth of the time of a table."""
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
                raise InvalidInputError(f"cannot encode snapshot {encode_id(record.id)}: {error}") from error
            out += message
            out += b"\0"
            positions.append(start)
        return positions


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
