"""The manifests that snapshots use, and the arrays that find them there, read from many files at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from icechunk.errors import FormatError
from icechunk.format.envelope import FileType, unseal
from icechunk.format.flat.vectors import (
    JoinedBuffer,
    Positions,
    TableColumns,
    Vectors,
    gather,
    joined,
    targets,
    text_traits,
)
from icechunk.format.ids import ObjectId
from icechunk.format.snapshot.codec import decode_snapshot
from icechunk.format.snapshot.node_decoding import decode_texts, node_columns
from icechunk.format.snapshot.node_region import below_nodes

__all__ = ["SnapshotUses", "manifest_uses"]

# Slots of the table Snapshot, and of the tables of its manifests and metadata.
_ID, _PARENT, _NODES, _MESSAGE, _METADATA, _FILES_V1, _FILES = 0, 1, 2, 4, 5, 6, 7
_FILE_ID, _SIZE, _COUNT = range(3)
_NAME, _VALUE = range(2)
_ID_SIZE: Final = 12
_FILE_V1: Final = np.dtype({"names": ["id", "size", "count"], "formats": ["S12", "<u8", "<u4"], "offsets": [0, 16, 24]})
_FILE_V1_SIZE: Final = 32
_FILE: Final = np.dtype([("id", "S12"), ("size", "<u8"), ("count", "<u4")])
_LONGEST_TEXT: Final = 4096
"""Bytes; longer texts are not looked at in columns."""


class SnapshotUses(NamedTuple):
    """The references of several snapshots, in columns; snapshots are numbered."""

    parents: Sequence[ObjectId | None]
    """Parent by snapshot, as format 1 stores it."""
    ref_snapshots: npt.NDArray[np.int64]
    """int64[r]: for each manifest of each array of each snapshot, the snapshot."""
    ref_manifests: npt.NDArray[np.bytes_]
    """S12[r]: ids of these manifests."""
    ref_nodes: npt.NDArray[np.bytes_]
    """S8[r]: ids of these arrays."""
    file_snapshots: npt.NDArray[np.int64]
    """int64[f]: for each manifest that a snapshot lists, the snapshot."""
    files: npt.NDArray[np.void]
    """Structured[f]: ``id`` S12, ``size`` in bytes, ``count`` of references."""


def manifest_uses(files: Sequence[tuple[ObjectId, bytes]]) -> SnapshotUses:
    """Read the references of snapshots of formats 1 and 2.

    Parameters
    ----------
    files
        The whole files, each with the id that it must hold; at least one.

    Raises
    ------
    FormatError
        As `decode_snapshot` for the first file that it refuses, or where a node in one of them is corrupt.
    """
    try:
        return _read(files)
    except FormatError:
        # It raises an error that names the file and the reason.
        for id, data in files:
            list(decode_snapshot(data, expected_id=id).nodes.values())
        raise


def _read(files: Sequence[tuple[ObjectId, bytes]]) -> SnapshotUses:
    payloads = [unseal(data, FileType.SNAPSHOT)[1] for _, data in files]
    found = []
    for which, buffer in joined(payloads, "snapshots"):
        some = _read_joined(buffer, files[which])
        found.append(
            some._replace(
                ref_snapshots=some.ref_snapshots + which.start, file_snapshots=some.file_snapshots + which.start
            )
        )
    columns = [np.concatenate(parts) for parts in zip(*[some[1:] for some in found], strict=True)]
    return SnapshotUses([parent for some in found for parent in some.parents], *columns)


def _read_joined(buffer: JoinedBuffer, files: Sequence[tuple[ObjectId, bytes]]) -> SnapshotUses:
    roots = TableColumns(buffer, buffer.roots)
    roots.require_ids(_ID, [id for id, _ in files])
    _check_texts(buffer, _required(buffer, roots.vectors(_MESSAGE, 1)))
    for items in _tables(buffer, _required(buffer, roots.vectors(_METADATA, 4))):
        _check_texts(buffer, _required(buffer, items[0].vectors(_NAME, 1)))
        _required(buffer, items[0].vectors(_VALUE, 1))
    refs = np.empty(0, np.int64), np.empty(0, "S12"), np.empty(0, "S8")
    for nodes, snapshots in _tables(buffer, _required(buffer, roots.vectors(_NODES, 4))):
        paths, ids = node_columns(buffer, nodes)
        if not paths.counts.all() or (gather(buffer, paths.starts, "u1") != ord("/")).any():
            raise buffer.fail("a path is not absolute")
        _check_texts(buffer, paths)
        manifests, rows = below_nodes(buffer, nodes, None)
        refs = snapshots[rows], manifests, ids[rows].astype(">u8").view("S8")
    return SnapshotUses(_parents(buffer, roots, len(files)), *refs, *_files(buffer, roots))


def _parents(buffer: JoinedBuffer, roots: TableColumns, count: int) -> list[ObjectId | None]:
    parents: list[ObjectId | None] = [None] * count
    column = roots.column(_PARENT, _ID_SIZE)
    if column is not None:
        raw = gather(buffer, column.positions, f"V{_ID_SIZE}").tobytes()
        for i, row in enumerate(range(count) if column.rows is None else column.rows.tolist()):
            parents[row] = ObjectId(raw[_ID_SIZE * i : _ID_SIZE * (i + 1)])
    return parents


def _files(buffer: JoinedBuffer, roots: TableColumns) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.void]]:
    older = _required(buffer, roots.vectors(_FILES_V1, _FILE_V1_SIZE))
    owner, places = _items(buffer, older, _FILE_V1_SIZE)
    owners: list[npt.NDArray[np.int64]] = [owner]
    raw = gather(buffer, places, f"V{_FILE_V1_SIZE}").tobytes()
    items = np.ndarray((len(owner),), _FILE_V1, raw, strides=(_FILE_V1_SIZE,))
    found: list[npt.NDArray[Any]] = [items.astype(_FILE)]
    for tables, owner in _tables(buffer, roots.vectors(_FILES, 4)):
        column = tables.column(_FILE_ID, _ID_SIZE)
        if column is None or column.rows is not None:
            raise buffer.fail("a manifest in one of them has no id")
        rows = np.zeros(len(tables), _FILE)
        rows["id"] = gather(buffer, column.positions, f"S{_ID_SIZE}")
        rows["size"], rows["count"] = tables.numbers(_SIZE, "<u8"), tables.numbers(_COUNT, "<u4")
        owners.append(owner)
        found.append(rows)
    return np.concatenate(owners), np.concatenate(found)


def _required(buffer: JoinedBuffer, vectors: Vectors | None) -> Vectors:
    if vectors is None or vectors.rows is not None:
        raise buffer.fail("a table in one of them lacks a required field")
    return vectors


def _check_texts(buffer: JoinedBuffer, texts: Vectors) -> None:
    buffer.charge(int(texts.counts.sum()))
    if int(texts.counts.max()) > _LONGEST_TEXT or not text_traits(buffer, texts).is_ascii:
        decode_texts(buffer, texts)


def _items(buffer: JoinedBuffer, vectors: Vectors, size: int) -> tuple[npt.NDArray[np.int64], Positions]:
    """The table that each item of vectors belongs to, and its position."""
    count = int(vectors.counts.sum())
    buffer.charge(size * count)
    owner = np.repeat(np.arange(len(vectors.counts)), vectors.counts)
    firsts = vectors.starts - size * (np.cumsum(vectors.counts) - vectors.counts)
    tables = owner if vectors.rows is None else vectors.rows[owner]
    return tables, firsts[owner] + size * np.arange(count, dtype=np.int64)


def _tables(buffer: JoinedBuffer, vectors: Vectors | None) -> list[tuple[TableColumns, npt.NDArray[np.int64]]]:
    """The tables in vectors of tables, if there are any, and the table that each vector belongs to."""
    if vectors is None:
        return []
    owner, fields = _items(buffer, vectors, 4)
    buffer.charge_tables(len(fields))
    return [(TableColumns(buffer, targets(buffer, fields)), owner)] if len(fields) else []
