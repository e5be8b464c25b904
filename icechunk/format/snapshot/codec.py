"""Snapshots: encode and decode, formats 1 and 2."""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Final, NamedTuple

import numpy as np

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.documents import parse_document
from icechunk.format.envelope import DEFAULT_LEVEL, FileType, seal, unseal
from icechunk.format.flat.flatbuffers import (
    Buffer,
    FlatTable,
    FlatWriter,
    Items,
    Table,
    Value,
    Written,
    id_struct,
    required,
    u64,
)
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.metadata import metadata_from_tables, metadata_tables
from icechunk.format.snapshot.node_encoding import CopiedNodes, write_files, write_nodes
from icechunk.format.snapshot.node_region import is_dense, region_of
from icechunk.format.snapshot.nodes import SnapshotNodes, read_nodes
from icechunk.format.snapshot.stored_nodes import stored_nodes
from icechunk.format.values import ManifestFile, NodeKind, NodeSnapshot, Snapshot

__all__ = ["EncodedSnapshot", "decode_snapshot", "encode_and_keep", "encode_snapshot"]

# Slots of the table Snapshot.
_ID, _PARENT, _NODES, _FLUSHED_AT, _MESSAGE, _METADATA, _FILES_V1, _FILES, _EXTRA = range(9)

_ARRAY, _GROUP = 1, 2
_ID_SIZE: Final = 12
_NODE_ID_SIZE: Final = 8
_DIMENSION_V1: Final = struct.Struct("<QQ")
_FILE_V1: Final = struct.Struct("<12s4xQI4x")
_RANGE: Final = struct.Struct("<II")


class EncodedSnapshot(NamedTuple):
    """A snapshot and its file."""

    data: bytes
    """The whole file."""
    snapshot: Snapshot
    """Equal to the encoded one; many nodes that were encoded for it are in the file's bytes, from which the next
    snapshot's file can copy them."""


_MANY: Final = 256
"""Number of nodes from which copying those that are unchanged takes less time than encoding all."""
_MOST_CHANGED: Final = 32
"""The share of the nodes, as its reciprocal, up to which changed ones are encoded beside the copied others."""
_MOST_COPIED: Final = 2**30
"""Largest number of bytes that are copied."""


def encode_snapshot(snapshot: Snapshot, spec_version: int = 2, level: int = DEFAULT_LEVEL) -> bytes:
    """The whole file of a snapshot.

    Parameters
    ----------
    snapshot
        The snapshot to write; the order of its mappings has no meaning.
    spec_version
        1 or 2. Format 1 stores ``parent_id`` and not ``extra``; format 2 stores ``extra`` and not ``parent_id``.
    level
        Compression level of zstd.

    Raises
    ------
    InvalidInputError
        If a value cannot be encoded; in format 1 also for an array without a regular chunk grid.
    FormatError
        If nodes are copied from another file, which is corrupt.
    """
    return seal(FileType.SNAPSHOT, spec_version, _payload(snapshot, spec_version)[0], level)


def encode_and_keep(snapshot: Snapshot, spec_version: int = 2, level: int = DEFAULT_LEVEL) -> EncodedSnapshot:
    """As `encode_snapshot`; also returns the same snapshot in the form from which the next one is encoded."""
    payload, encoded = _payload(snapshot, spec_version)
    data = seal(FileType.SNAPSHOT, spec_version, payload, level)
    if encoded is None:
        return EncodedSnapshot(data, snapshot)
    nodes: Mapping[str, NodeSnapshot] = {node.path: node for node in encoded}
    if len(encoded) >= _MANY:
        stored = stored_nodes(Buffer(bytes(payload), "snapshot").root(), _NODES, spec_version)
        if stored is not None:
            stored.known.update(enumerate(encoded))
            nodes = SnapshotNodes(stored)
    return EncodedSnapshot(data, snapshot.with_nodes(nodes))


def _payload(snapshot: Snapshot, spec_version: int) -> tuple[bytearray, list[NodeSnapshot] | None]:
    """The file's payload, and its nodes, in ascending order of paths, unless some of them were copied."""
    if spec_version not in (1, 2):
        raise InvalidInputError(f"cannot encode a snapshot in spec version {spec_version}", ErrorKind.SERIALIZATION)
    newer = spec_version == 2
    files = [snapshot.manifest_files[id] for id in sorted(snapshot.manifest_files)]
    # Python compares text by code point, which is the order of its UTF-8 bytes.
    copied = _copied(snapshot.nodes, spec_version)
    if copied is None or not isinstance(snapshot.nodes, SnapshotNodes):
        nodes = sorted(snapshot.nodes.values(), key=_path)
    else:
        nodes = sorted(filter(None, snapshot.nodes.changes.values()), key=_path)
    shapes_v1 = None if newer else [_shape_v1(node) for node in nodes]
    root: dict[int, Value] = {
        _ID: id_struct(snapshot.id),
        _PARENT: None if newer or snapshot.parent_id is None else id_struct(snapshot.parent_id),
        _NODES: Written(lambda writer: write_nodes(writer, nodes, shapes_v1, copied)),
        _FLUSHED_AT: u64(snapshot.flushed_at_us),
        _MESSAGE: snapshot.message,
        _METADATA: metadata_tables(snapshot.metadata, spec_version),
        _FILES_V1: Items(
            b"" if newer else b"".join(_FILE_V1.pack(*file) for file in files), 0 if newer else len(files), 8
        ),
        _FILES: Written(lambda writer: write_files(writer, files)) if newer else None,
        _EXTRA: snapshot.extra if newer else None,
    }
    return FlatWriter().finish(FlatTable(root)), nodes if copied is None else None


def _copied(nodes: Mapping[str, NodeSnapshot], spec_version: int) -> CopiedNodes | None:
    """The nodes whose bytes are copied from the file that they are in; None if all nodes are to be encoded."""
    if not isinstance(nodes, SnapshotNodes) or nodes.stored.version != spec_version or len(nodes) < _MANY:
        return None
    stored, changes = nodes.stored, nodes.changes
    if len(changes) * _MOST_CHANGED > len(stored):
        return None
    region = region_of(stored)
    if region is None or not is_dense(region) or region.last - region.first > _MOST_COPIED:
        return None
    kept = np.ones(len(stored), np.bool_)
    kept[[row for row in map(stored.find, changes) if row >= 0]] = False
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
    added = sorted(path for path, node in changes.items() if node is not None)
    return CopiedNodes(
        data=memoryview(stored.data)[region.first : region.last],
        tables=(stored.positions() - region.first)[kept],
        others=[int(before[bisect_left(stored.paths, path)]) for path in added],
    )


_path: Final = attrgetter("path")


def _shape_v1(node: NodeSnapshot) -> list[tuple[int, int]]:
    if node.kind is not NodeKind.ARRAY:
        return []
    lengths = _regular_chunk_lengths(node)
    if len(lengths) != len(node.shape):
        # A document that the official library took, and whose grid it counted in its own way: the counts stay.
        lengths = [-(-dim.array_length // dim.num_chunks) if dim.num_chunks else 0 for dim in node.shape]
    return [(dim.array_length, length) for dim, length in zip(node.shape, lengths, strict=True)]


def _regular_chunk_lengths(node: NodeSnapshot) -> list[int]:
    try:
        grid: Any = parse_document(node.user_data)["chunk_grid"]
        if grid["name"] == "regular":
            return [int(length) for length in grid["configuration"]["chunk_shape"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"cannot encode {node.path}: its metadata names no chunk grid", ErrorKind.SERIALIZATION
        ) from error
    raise InvalidInputError(
        f"cannot encode {node.path}: format 1 has only regular chunk grids; use format 2",
        ErrorKind.UNSUPPORTED_OPERATION_FOR_VERSION,
    )


def decode_snapshot(data: bytes, *, expected_id: ObjectId | None = None) -> Snapshot:
    """Read a snapshot of format 1 or 2.

    Parameters
    ----------
    data
        The whole file.
    expected_id
        The id that the file must hold; None: any.

    Raises
    ------
    FormatError
        If the file is not a snapshot, is corrupt, or has another id.
    """
    name = "snapshot" if expected_id is None else f"snapshot {encode_id(expected_id)}"
    version, payload = unseal(data, FileType.SNAPSHOT, what=name)
    buffer = Buffer(payload, name)
    root = buffer.root()
    id = ObjectId(required(root.inline(_ID, _ID_SIZE), root, "id"))
    if expected_id is not None and id != expected_id:
        raise buffer.fail(f"its id is {encode_id(id)}")
    parent = root.inline(_PARENT, _ID_SIZE)
    return Snapshot(
        id=id,
        parent_id=None if parent is None else ObjectId(parent),
        nodes=read_nodes(root, _NODES, version),
        flushed_at_us=root.u64(_FLUSHED_AT),
        message=required(root.string(_MESSAGE), root, "message"),
        metadata=metadata_from_tables(required(root.tables(_METADATA), root, "metadata"), version),
        manifest_files=_files(root),
        extra=root.blob(_EXTRA),
    )


def _files(root: Table) -> dict[ObjectId, ManifestFile]:
    old: bytes = required(root.items(_FILES_V1, _FILE_V1.size), root, "manifest_files")
    files = [ManifestFile(ObjectId(id), size, count) for id, size, count in _FILE_V1.iter_unpack(old)]
    for table in root.tables(_FILES) or ():
        id = ObjectId(required(table.inline(0, _ID_SIZE), table, "id"))
        files.append(ManifestFile(id, table.u64(1), table.u32(2)))
    return {file.object_id: file for file in files}
