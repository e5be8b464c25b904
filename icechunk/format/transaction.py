"""Transaction logs: encode and decode, formats 1 and 2, and their division into several objects.

Readers of the format accept a limited number of tables in one file (the official library 50 million), and no file holds
more than 2 GiB. A snapshot of format 2 can name further transaction logs that count as its own: those of ancestors that
have expired. Changes that do not fit into a commit's own log are written to such logs. Every reader that handles
history after an expiration reads them, so differences and conflicts are the same as with a single log.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

import numpy as np

from icechunk.errors import ErrorKind, FormatError, InvalidInputError
from icechunk.format.by_node import (
    ByNode,
    Coords,
    Part,
    by_rank,
    coords_by_node,
    grouped_coords,
    is_twice,
    num_rows,
    owners,
)
from icechunk.format.envelope import DEFAULT_LEVEL, FileType, seal, unseal
from icechunk.format.flat.flatbuffers import (
    MAX_BYTES,
    MAX_TABLES,
    Buffer,
    FlatTable,
    FlatWriter,
    Items,
    Table,
    Value,
    Written,
    id_struct,
    required,
    u8,
)
from icechunk.format.flat.vectors import (
    JoinedBuffer,
    Positions,
    TableColumns,
    first_rows,
    gather,
    is_ascending,
    joined,
    lexicographic_order,
    read_coords,
    regular_vectors,
    targets,
)
from icechunk.format.ids import NodeId, ObjectId, encode_id
from icechunk.format.node_tables import write_node_tables
from icechunk.format.values import Move, NodeKind, TransactionLog

__all__ = [
    "MAX_CHUNKS",
    "decode_transaction_log",
    "decode_transaction_logs",
    "encode_transaction_log",
    "in_parts",
    "require_room",
]

# Slots of the table TransactionLog.
_ID, _NEW_GROUPS, _NEW_ARRAYS, _DELETED_GROUPS, _DELETED_ARRAYS = range(5)
_UPDATED_ARRAYS, _UPDATED_GROUPS, _UPDATED_CHUNKS, _MOVES, _EXTRA = range(5, 10)

_CHUNK_BYTES: Final = 16
"""Bytes that a changed chunk takes besides its coordinates."""
_SURELY_FEW: Final = 100_000
_ROOM: Final = 2**26
"""Bytes reserved for everything that is not a changed chunk."""
_BLOCK: Final = 2**20
_FEW: Final = 64
"""Number of changed chunks up to which they are written one by one."""
_MANY: Final = 4096
"""Number of changed chunks of one array from which they are worth reading by their regular places."""
_ID_SIZE: Final = 12
_NODE_ID_SIZE: Final = 8


def encode_transaction_log(log: TransactionLog, spec_version: int = 2, level: int = DEFAULT_LEVEL) -> bytes:
    """The whole file of a transaction log.

    Parameters
    ----------
    log
        The log to write; its coordinates are sorted and repeated ones dropped.
    spec_version
        1 or 2; format 1 has neither moves nor ``extra``.
    level
        Compression level of zstd.

    Raises
    ------
    InvalidInputError
        If a path is not Unicode, the format is 1 and there are moves, or more chunks changed than readers accept.
    """
    if spec_version not in (1, 2):
        raise InvalidInputError(
            f"cannot encode a transaction log in spec version {spec_version}", ErrorKind.SERIALIZATION
        )
    require_room(log)
    newer = spec_version == 2
    if log.moved_nodes and not newer:
        raise InvalidInputError(
            "cannot encode moves in a transaction log of format 1; use format 2",
            ErrorKind.UNSUPPORTED_OPERATION_FOR_VERSION,
        )
    moves = sorted(log.moved_nodes, key=lambda move: move.source.split("/"))
    root: dict[int, Value] = {
        _ID: id_struct(log.id),
        _NEW_GROUPS: _ids(log.new_groups),
        _NEW_ARRAYS: _ids(log.new_arrays),
        _DELETED_GROUPS: _ids(log.deleted_groups),
        _DELETED_ARRAYS: _ids(log.deleted_arrays),
        _UPDATED_ARRAYS: _ids(log.updated_arrays),
        _UPDATED_GROUPS: _ids(log.updated_groups),
        _UPDATED_CHUNKS: Written(lambda writer: _write_updated(writer, grouped_coords(log.updated_chunks))),
        _MOVES: [_move_table(move) for move in moves] if newer else None,
        _EXTRA: log.extra if newer else None,
    }
    return seal(FileType.TRANSACTION_LOG, spec_version, FlatWriter().finish(FlatTable(root)), level)


def require_room(log: TransactionLog) -> None:
    """Refuse a log that is larger than readers accept.

    Raises
    ------
    InvalidInputError
        If it is too large; the message has the number of changed chunks.
    """
    chunks = num_rows(log.updated_chunks)
    if chunks < _SURELY_FEW:
        return
    size = sum(coords.size * 4 + len(coords) * _CHUNK_BYTES for coords in log.updated_chunks.values())
    if chunks + len(log.updated_chunks) >= MAX_TABLES or size > MAX_BYTES - _ROOM:
        raise InvalidInputError(
            f"cannot write a transaction log of {chunks} changed chunks: no reader accepts more than {MAX_TABLES}, or "
            f"{MAX_BYTES} bytes, in one; commit the changes in several steps, with fewer chunks each",
            ErrorKind.SERIALIZATION,
        )


def _ids(ids: frozenset[NodeId]) -> Items:
    return Items(b"".join(sorted(ids)), len(ids))


def _move_table(move: Move) -> FlatTable:
    return FlatTable({0: move.source, 1: move.target, 2: id_struct(move.node_id), 3: u8(move.kind)})


def _sorted_unique(part: Part[Coords]) -> Part[Coords]:
    """The same part with the rows of each array in ascending order and without duplicates."""
    rows, edges = part.rows, part.edges
    first = first_rows(edges)
    if is_ascending(rows, first):
        return part
    owner = owners(edges)
    rows = rows[lexicographic_order(rows, owner)]
    keep = first.copy()
    keep[1:] |= (rows[1:] != rows[:-1]).any(axis=1)
    sizes = np.bincount(owner[keep], minlength=len(part.nodes))
    return Part(part.nodes, np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]), rows[keep])


def _write_updated(writer: FlatWriter, chunks: ByNode[Coords]) -> int:
    """Write the vector of arrays with updated chunks and all below it; returns its position."""

    def write_rows(part: Part[Coords]) -> Positions:
        ordered = _sorted_unique(part)
        return _write_chunk_indices(writer, ordered.rows, np.diff(ordered.edges))

    return write_node_tables(writer, chunks, write_rows) if chunks else writer.items(b"", 0, 4)


def _write_chunk_indices(writer: FlatWriter, rows: Coords, sizes: Positions) -> Positions:
    """Write a vector of coordinates for each array, given the rows of all arrays and the number of rows of each;
    returns the positions of the vectors."""
    count, ndim = rows.shape
    vtable = writer.vtable({0: 4}, 8)
    writer.align(4)
    start = len(writer.out)
    if count <= _FEW:
        return _write_few(writer, rows, sizes.tolist(), vtable)
    # A row is its table (offset to the vtable, offset to the vector), and the vector: length, coordinates.
    block = np.dtype([("vtable", "<i4"), ("vector", "<u4"), ("ndim", "<u4"), ("coords", "<u4", (ndim,))])
    words = count + len(sizes)
    first = start + 4 * words
    writer.out += bytes(4 * words + block.itemsize * count)
    # A vector is its length and an offset for each row.
    ends = np.cumsum(sizes)
    heads = ends - sizes + np.arange(len(sizes))
    index = np.frombuffer(writer.out, "<u4", words, start)
    index[heads] = sizes
    blocks = np.frombuffer(writer.out, block, count, first)
    blocks["vector"] = 4
    blocks["ndim"] = ndim
    blocks["coords"] = rows
    # One block at a time: positions take several times the memory of the bytes that are written.
    for begin in range(0, count, _BLOCK):
        numbers = np.arange(begin, min(begin + _BLOCK, count), dtype=np.int64)
        tables = first + block.itemsize * numbers
        at = numbers + np.searchsorted(ends, numbers, side="right") + 1
        index[at] = tables - (start + 4 * at)
        blocks["vtable"][begin : begin + _BLOCK] = tables - vtable
    vectors: Positions = start + 4 * heads
    return vectors


def _write_few(writer: FlatWriter, rows: Coords, sizes: Sequence[int], vtable: int) -> Positions:
    """As `_write_chunk_indices`, row by row: for few rows the calls of numpy take the most time."""
    count, ndim = rows.shape
    todo = iter(rows.tolist())
    at = len(writer.out)
    table = at + 4 * (count + len(sizes))
    index: list[int] = []
    blocks: list[int] = []
    vectors: list[int] = []
    for size in sizes:
        vectors.append(at)
        index.append(size)
        at += 4
        for _ in range(size):
            index.append(table - at)
            blocks += (table - vtable, 4, ndim, *next(todo))
            table += 12 + 4 * ndim
            at += 4
    writer.out += struct.pack(f"<{len(index) + len(blocks)}I", *index, *blocks)
    return np.array(vectors, np.int64)


def decode_transaction_log(data: bytes, *, expected_id: ObjectId | None = None) -> TransactionLog:
    """Read a transaction log of format 1 or 2.

    Parameters
    ----------
    data
        The whole file.
    expected_id
        The id that the file must hold; None: any.

    Raises
    ------
    FormatError
        If the file is not a transaction log, is corrupt, or has another id.
    """
    name = "transaction log" if expected_id is None else f"transaction log {encode_id(expected_id)}"
    _, payload = unseal(data, FileType.TRANSACTION_LOG, what=name)
    buffer = Buffer(payload, name)
    root = buffer.root()
    id = ObjectId(required(root.inline(_ID, _ID_SIZE), root, "id"))
    if expected_id is not None and id != expected_id:
        raise buffer.fail(f"its id is {encode_id(id)}")
    start, count = required(root.vector(_UPDATED_CHUNKS, 4), root, "updated_chunks")
    return TransactionLog(
        id=id,
        new_groups=_id_set(root, _NEW_GROUPS, "new_groups"),
        new_arrays=_id_set(root, _NEW_ARRAYS, "new_arrays"),
        deleted_groups=_id_set(root, _DELETED_GROUPS, "deleted_groups"),
        deleted_arrays=_id_set(root, _DELETED_ARRAYS, "deleted_arrays"),
        updated_groups=_id_set(root, _UPDATED_GROUPS, "updated_groups"),
        updated_arrays=_id_set(root, _UPDATED_ARRAYS, "updated_arrays"),
        updated_chunks=_updated(buffer, np.array([start]), np.array([count]))[0],
        moved_nodes=tuple([_move(table) for table in root.tables(_MOVES) or ()]),
        extra=root.blob(_EXTRA),
    )


def _id_set(root: Table, slot: int, field: str) -> frozenset[NodeId]:
    items = required(root.items(slot, _NODE_ID_SIZE), root, field)
    return frozenset([NodeId(items[i : i + _NODE_ID_SIZE]) for i in range(0, len(items), _NODE_ID_SIZE)])


def _move(table: Table) -> Move:
    kind = table.u8(3)
    if kind not in (NodeKind.GROUP, NodeKind.ARRAY):
        raise table.buffer.fail(f"a move is of unknown node type {kind}")
    return Move(
        required(table.string(0), table, "from"),
        required(table.string(1), table, "to"),
        NodeId(required(table.inline(2, _NODE_ID_SIZE), table, "node_id")),
        NodeKind(kind),
    )


def decode_transaction_logs(files: Sequence[tuple[ObjectId, bytes]]) -> list[TransactionLog]:
    """Read several transaction logs at once, which for many small ones takes a fraction of the time.

    Parameters
    ----------
    files
        The whole files, each with the id that it must hold.

    Raises
    ------
    FormatError
        As `decode_transaction_log` for the first file that it refuses.
    """
    try:
        return _decode_together(files)
    except FormatError:
        # It raises an error that names the file and the reason.
        return [decode_transaction_log(data, expected_id=id) for id, data in files]


def _decode_together(files: Sequence[tuple[ObjectId, bytes]]) -> list[TransactionLog]:
    payloads = [unseal(data, FileType.TRANSACTION_LOG)[1] for _, data in files]
    found: list[TransactionLog] = []
    for which, buffer in joined(payloads, "transaction logs"):
        found += _decode_joined(buffer, files[which])
    return found


def _decode_joined(buffer: JoinedBuffer, files: Sequence[tuple[ObjectId, bytes]]) -> list[TransactionLog]:
    tables = TableColumns(buffer, buffer.roots)
    tables.require_ids(_ID, [id for id, _ in files])
    new_groups, new_arrays, deleted_groups, deleted_arrays, updated_groups, updated_arrays = (
        _id_sets(buffer, tables, slot)
        for slot in (_NEW_GROUPS, _NEW_ARRAYS, _DELETED_GROUPS, _DELETED_ARRAYS, _UPDATED_GROUPS, _UPDATED_ARRAYS)
    )
    chunks = tables.vectors(_UPDATED_CHUNKS, 4)
    if chunks is None or chunks.rows is not None:
        raise buffer.fail("one of them lacks the required field 'updated_chunks'")
    updated = _updated(buffer, chunks.starts, chunks.counts)
    logs = [
        TransactionLog(
            id=id,
            new_groups=new_groups[i],
            new_arrays=new_arrays[i],
            deleted_groups=deleted_groups[i],
            deleted_arrays=deleted_arrays[i],
            updated_groups=updated_groups[i],
            updated_arrays=updated_arrays[i],
            updated_chunks=updated[i],
            moved_nodes=(),
            extra=None,
        )
        for i, (id, _) in enumerate(files)
    ]
    # Few logs have either of these.
    for slot, item_size in ((_MOVES, 4), (_EXTRA, 1)):
        vectors = tables.vectors(slot, item_size)
        if vectors is None:
            continue
        rows = np.arange(len(files)) if vectors.rows is None else vectors.rows
        for i in rows[vectors.counts > 0].tolist() if slot == _MOVES else rows.tolist():
            id, data = files[i]
            logs[i] = decode_transaction_log(data, expected_id=id)
    return logs


def _id_sets(buffer: Buffer, tables: TableColumns, slot: int) -> list[frozenset[NodeId]]:
    vectors = tables.vectors(slot, _NODE_ID_SIZE)
    if vectors is None or vectors.rows is not None:
        raise buffer.fail(f"one of them lacks the required field {slot}")
    buffer.charge(_NODE_ID_SIZE * int(vectors.counts.sum()))
    return [
        frozenset([NodeId(buffer.data[at : at + _NODE_ID_SIZE]) for at in range(start, start + 8 * count, 8)])
        if count
        else frozenset[NodeId]()
        for start, count in zip(vectors.starts.tolist(), vectors.counts.tolist(), strict=True)
    ]


def _updated(buffer: Buffer, starts: Positions, counts: Positions) -> list[ByNode[Coords]]:
    """Coordinates by array, of each transaction log; all arrays of one rank are read at once.

    Parameters
    ----------
    starts, counts
        int64[n]: of the vector of arrays with updated chunks in each log, position of its first item and their number.
    """
    count = int(counts.sum())
    buffer.charge_tables(count)
    if not count:
        return [coords_by_node([]) for _ in counts]
    ends = np.cumsum(counts)
    log_of = np.repeat(np.arange(len(counts)), counts)
    fields = starts[log_of] + 4 * (np.arange(count, dtype=np.int64) - (ends - counts)[log_of])
    arrays = TableColumns(buffer, targets(buffer, fields))
    ids, vectors = arrays.column(0, _NODE_ID_SIZE), arrays.vectors(1, 4)
    if ids is None or ids.rows is not None:
        raise buffer.fail("an array with updated chunks lacks the required field 'node_id'")
    if vectors is None or vectors.rows is not None:
        raise buffer.fail("an array with updated chunks lacks the required field 'chunks'")
    own_ids = gather(buffer, ids.positions, f"V{_NODE_ID_SIZE}")
    nodes: list[NodeId] = own_ids.tolist()
    if is_twice(own_ids.view(">u8"), log_of):
        raise buffer.fail("an array is in its updated chunks twice")
    sizes = vectors.counts
    buffer.charge_tables(int(sizes.sum()))
    if count == 1 and (many := _many_chunks(buffer, int(vectors.starts[0]), int(sizes[0]))) is not None:
        part = _sorted_unique(Part((nodes[0],), np.array([0, len(many)], np.int64), many))
        return _by_log([part], [np.zeros(1, np.int64)], np.concatenate([np.zeros(1, np.int64), ends]))
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    owner = owners(edges)
    logs = np.concatenate([np.zeros(1, np.int64), ends])
    places = vectors.starts[owner] + 4 * (np.arange(len(owner)) - edges[:-1][owner])
    coords = TableColumns(buffer, targets(buffer, places)).vectors(0, 4)
    if not len(owner):
        parts = [Part(tuple(nodes), edges, np.empty((0, 0), np.uint32))]
        return _by_log(parts, [np.arange(count)], logs)
    if coords is None or coords.rows is not None:
        raise buffer.fail("an updated chunk lacks its coordinates")
    parts, numbers = [], []
    for ndim, members, own_edges, own in by_rank(owner, coords.counts, sizes):
        rows = read_coords(buffer, coords.starts[own], ndim)
        present = tuple(nodes) if len(members) == count else tuple([nodes[i] for i in members.tolist()])
        parts.append(_sorted_unique(Part(present, own_edges, rows)))
        numbers.append(members)
    return _by_log(parts, numbers, logs)


def _many_chunks(buffer: Buffer, start: int, count: int) -> Coords | None:
    """Coordinates of the chunks of one array, if there are many of the same rank that lie in the file at equal
    distances."""
    if count < _MANY:
        return None
    first = targets(buffer, np.array([start], np.int64))
    vectors = TableColumns(buffer, first).vectors(0, 4)
    return None if vectors is None else regular_vectors(buffer, start, count, 0, int(vectors.counts[0]))


def _by_log(parts: Sequence[Part[Coords]], members: Sequence[Positions], logs: Positions) -> list[ByNode[Coords]]:
    """Divide parts, whose arrays have ascending numbers, among the transaction logs that have these arrays.

    Parameters
    ----------
    members
        Of each part the numbers of its arrays.
    logs
        int64[n + 1]: number of the first array of each log, and the end of the last log's.
    """
    if len(logs) == 2:
        return [coords_by_node(parts)]
    found: list[list[Part[Coords]]] = [[] for _ in logs[1:]]
    for part, numbers in zip(parts, members, strict=True):
        bounds = np.searchsorted(numbers, logs)
        rows = part.edges[bounds].tolist()
        for log, (first, last) in enumerate(pairwise(bounds.tolist())):
            if last > first:
                edges = part.edges[first : last + 1] - rows[log]
                found[log].append(Part(part.nodes[first:last], edges, part.rows[rows[log] : rows[log + 1]]))
    return [coords_by_node(own) for own in found]


MAX_CHUNKS: Final = 2**23
"""Largest number of changed chunks in one log."""


def in_parts(
    log: TransactionLog, new_object_id: Callable[[], ObjectId], max_chunks: int = MAX_CHUNKS
) -> tuple[TransactionLog, list[TransactionLog]]:
    """Split a transaction log if it has too many changed chunks.

    Parameters
    ----------
    log
        The transaction log of a commit.
    new_object_id
        Source of the ids of further logs.
    max_chunks
        Largest number of changed chunks in each log.

    Returns
    -------
    own
        The log with the same id and everything except the chunks in ``others``.
    others
        Further logs, which the snapshot names before its own; empty if all chunks fit into one log.
    """
    if num_rows(log.updated_chunks) <= max_chunks:
        return log, []
    groups: list[dict[NodeId, Coords]] = [{}]
    room = max_chunks
    for node_id, coords in log.updated_chunks.items():
        first = 0
        while first < len(coords):
            if not room:
                groups.append({})
                room = max_chunks
            some = coords[first : first + room]
            groups[-1][node_id] = some
            first += len(some)
            room -= len(some)
    own = replace(log, updated_chunks=groups.pop())
    return own, [_chunks_only(new_object_id(), chunks) for chunks in groups]


def _chunks_only(id: ObjectId, chunks: Mapping[NodeId, Coords]) -> TransactionLog:
    return TransactionLog(id=id, updated_chunks=chunks)
