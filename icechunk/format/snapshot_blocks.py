"""Snapshots of one repo info, copied into another without a Python step for each.

A snapshot is written as one block of bytes, which nothing but vtables lies outside of::

    its table | count of metadata, offset of each | message | table of each metadata | names and values | pruned logs

Blocks and what is in them have any length, so their places are sums over columns of lengths. Texts and values are
copied as they are: whether a message is UTF-8, and a value can be decoded, is looked at by who reads it.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from icechunk.format.flat_columns import Positions, TableColumns, copy_spans, gather, put
from icechunk.format.flat_reader import Buffer
from icechunk.format.flat_writer import FlatWriter
from icechunk.format.stored_snapshots import (
    FLUSHED_AT,
    ID,
    MESSAGE,
    METADATA,
    PARENT,
    PRUNED,
    TABLE_BYTES,
    TABLE_OFFSETS,
    StoredSnapshots,
)

__all__ = ["write_blocks"]

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
"""A table, which has the last field only where something was pruned."""
_ITEM: Final = np.dtype([("vtable", "<i4"), ("name", "<u4"), ("value", "<u4")])
_ID_BYTES: Final = 12


class _Spans(NamedTuple):
    """Vectors in the older file."""

    starts: Positions
    """Where the first item of each stands; nothing is said where there is none."""
    counts: Positions
    """Items of each; 0 where there is no vector."""


class _Items(NamedTuple):
    """Metadata of all snapshots, one after another."""

    owners: npt.NDArray[np.intp]
    """Which of the snapshots each belongs to; ascending."""
    within: Positions
    """Its number among those of its snapshot."""
    names: _Spans
    values: _Spans


def write_blocks(
    writer: FlatWriter, stored: StoredSnapshots, rows: npt.NDArray[np.intp], moved: npt.NDArray[np.int64]
) -> Positions:
    """Write the tables of some rows of an older file, and all below them; returns where each table stands.

    Parameters
    ----------
    rows
        Which, and in which order; not none.
    moved
        int64[rows of the older file + 1]: the new number of each, where it may be a parent; the last is "none".

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

    # Places within each block, then those of the blocks.
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
    # The last field of those that do not have it is written over by what stands behind the table.
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
    """Write vectors into the bytes: the number of items, then the items."""
    put(block, at, spans.counts.astype("<u4"))
    copy_spans(block, at + 4, buffer.data, spans.starts, spans.counts * item_bytes)
