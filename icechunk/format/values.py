"""The values that the format's files hold, independent of their encoding.

Chunk references are columns (`ChunkRefs`), never one object per reference. Everything here is immutable by
convention: shared arrays are marked read-only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from enum import IntEnum
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.format.by_node import ByNode
from icechunk.format.ids import NodeId, ObjectId
from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "INLINE",
    "NATIVE",
    "VIRTUAL",
    "ChunkRef",
    "ChunkRefs",
    "DimensionShape",
    "Extents",
    "Manifest",
    "ManifestFile",
    "ManifestRef",
    "Move",
    "NodeKind",
    "NodeSnapshot",
    "Snapshot",
    "TransactionLog",
]

Json: TypeAlias = Any
"""None, bool, int, float, str, bytes, or a list or dict of these."""

INLINE: Final = 1
NATIVE: Final = 2
VIRTUAL: Final = 3

NO_CHECKSUM: Final = 0
ETAG: Final = 1
LAST_MODIFIED: Final = 2

ID12: Final = np.dtype("V12")


class ChunkRef(NamedTuple):
    """One reference, for code that handles one chunk at a time."""

    kind: int
    """`INLINE`, `NATIVE` or `VIRTUAL`."""
    data: bytes | None = None
    """The bytes of the chunk, if inline."""
    chunk_id: ObjectId | None = None
    """The id of the chunk object, if native."""
    location: str | None = None
    """URL of the object, if virtual."""
    offset: int = 0
    length: int = 0
    """Bytes of the chunk, also if inline."""
    etag: str | None = None
    last_modified: int | None = None
    """Seconds since the epoch: a virtual object with a later time has changed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChunkRefs:
    """References of one array as columns; row i of every column is one chunk."""

    coords: npt.NDArray[np.uint32]
    """uint32[n, ndim]: chunk grid coordinates; ascending lexicographically and unique in a manifest."""
    kind: npt.NDArray[np.uint8]
    """uint8[n]: `INLINE`, `NATIVE` or `VIRTUAL`."""
    offset: npt.NDArray[np.uint64]
    """uint64[n]: bytes into the object (native, virtual), or into ``inline_data`` (inline)."""
    length: npt.NDArray[np.uint64]
    """uint64[n]: bytes."""
    chunk_id: npt.NDArray[np.void]
    """V12[n]: object id of native rows; zero bytes elsewhere."""
    location: npt.NDArray[np.int32]
    """int32[n]: row of ``locations`` for virtual rows; −1 elsewhere."""
    locations: tuple[str, ...] = ()
    """Distinct URLs; order has no meaning."""
    checksum_kind: npt.NDArray[np.uint8] | None = None
    """uint8[n]: 0 none, 1 etag, 2 last-modified; None when no row has a checksum."""
    checksum: npt.NDArray[np.int64] | None = None
    """int64[n]: row of ``etags``, or seconds since the epoch; None when no row has a checksum."""
    etags: tuple[str, ...] = ()
    """Distinct etags."""
    inline_data: bytes = b""
    """Bytes of all inline rows, at ``offset`` and ``length``."""

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def ndim(self) -> int:
        """Dimensions of the array."""
        return int(self.coords.shape[1])

    @staticmethod
    def empty(ndim: int) -> ChunkRefs:
        """No references of an array with that many dimensions."""
        return ChunkRefs(
            coords=np.empty((0, ndim), np.uint32),
            kind=np.empty(0, np.uint8),
            offset=np.empty(0, np.uint64),
            length=np.empty(0, np.uint64),
            chunk_id=np.empty(0, ID12),
            location=np.empty(0, np.int32),
        )

    def take(self, rows: npt.NDArray[Any] | slice) -> ChunkRefs:
        """The references at these row numbers (in this order), or in the rows where this mask is true, or in this
        slice; tables and inline bytes are shared, not copied."""
        coords = self.coords[rows]
        count = len(coords)
        return ChunkRefs(
            coords=coords,
            kind=_taken(self.kind, rows, count),
            offset=self.offset[rows],
            length=self.length[rows],
            chunk_id=_taken(self.chunk_id, rows, count),
            location=self.location[rows],
            locations=self.locations,
            checksum_kind=None if self.checksum_kind is None else _taken(self.checksum_kind, rows, count),
            checksum=None if self.checksum is None else _taken(self.checksum, rows, count),
            etags=self.etags,
            inline_data=self.inline_data,
        )

    def row(self, i: int) -> ChunkRef:
        """Row ``i`` as a single value."""
        kind, offset, length = int(self.kind[i]), int(self.offset[i]), int(self.length[i])
        if kind == INLINE:
            return ChunkRef(INLINE, data=bytes(self.inline_data[offset : offset + length]), length=length)
        if kind == NATIVE:
            return ChunkRef(NATIVE, chunk_id=ObjectId(self.chunk_id[i].tobytes()), offset=offset, length=length)
        etag = last_modified = None
        if self.checksum_kind is not None and self.checksum is not None:
            if self.checksum_kind[i] == ETAG:
                etag = self.etags[int(self.checksum[i])]
            elif self.checksum_kind[i] == LAST_MODIFIED:
                last_modified = int(self.checksum[i])
        location = self.locations[int(self.location[i])]
        return ChunkRef(VIRTUAL, None, None, location, offset, length, etag, last_modified)


def _taken(column: npt.NDArray[Any], rows: npt.NDArray[Any] | slice, count: int) -> npt.NDArray[Any]:
    # A broadcast column (stride 0) stays a broadcast column, so it takes no memory.
    return np.broadcast_to(column[0], count) if column.strides == (0,) and len(column) else column[rows]


Extents: TypeAlias = tuple[tuple[int, int], ...]
"""First chunk coordinate (inclusive) and last (exclusive) of each dimension."""


class ManifestRef(NamedTuple):
    """An array's pointer to one of its manifests."""

    object_id: ObjectId
    extents: Extents
    """Bounding box of the array's references in that manifest; never overlaps another one of the same array."""


class ManifestFile(NamedTuple):
    """A manifest object that a snapshot uses."""

    object_id: ObjectId
    size_bytes: int
    num_chunk_refs: int


class DimensionShape(NamedTuple):
    """Size of one dimension of an array."""

    array_length: int
    """Number of elements."""
    num_chunks: int
    """Number of chunks along this dimension."""


class NodeKind(IntEnum):
    """Group or array; the numbers are those of the format's MoveOperation.node_type."""

    GROUP = 0
    ARRAY = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSnapshot:
    """A group or array as a snapshot holds it."""

    id: NodeId
    path: str
    """Absolute, ``/``-separated; the root is ``/``."""
    kind: NodeKind
    user_data: bytes
    """The node's zarr.json, verbatim."""
    shape: tuple[DimensionShape, ...] = ()
    """Dimensions of an array; empty for a group."""
    dimension_names: tuple[str | None, ...] | None = None
    manifests: tuple[ManifestRef, ...] = ()
    """Manifests of an array; together they hold all its references. Empty for a group."""
    extra: bytes | None = None

    def with_manifests(self, manifests: tuple[ManifestRef, ...]) -> NodeSnapshot:
        """The same node with its references in other manifests."""
        return NodeSnapshot(
            id=self.id,
            path=self.path,
            kind=self.kind,
            user_data=self.user_data,
            shape=self.shape,
            dimension_names=self.dimension_names,
            manifests=manifests,
            extra=self.extra,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One version of the hierarchy: everything except the chunk references."""

    id: ObjectId
    parent_id: ObjectId | None = None
    """Only in format 1; format 2 keeps ancestry in the repo object."""
    nodes: Mapping[str, NodeSnapshot] = field(default_factory=dict)
    """Nodes by path, in ascending order of the path's UTF-8 bytes."""
    flushed_at_us: int
    """µs since the epoch."""
    message: str
    metadata: Mapping[str, Json] = field(default_factory=dict)
    manifest_files: Mapping[ObjectId, ManifestFile] = field(default_factory=dict)
    """Every manifest that some node refers to."""
    extra: bytes | None = None

    def with_nodes(self, nodes: Mapping[str, NodeSnapshot]) -> Snapshot:
        """The same snapshot with other nodes."""
        return replace(self, nodes=nodes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Manifest:
    """Chunk references of one or several arrays."""

    id: ObjectId
    arrays: Mapping[NodeId, ChunkRefs]
    """References by array, in ascending order of node id; each array's rows in ascending order of coordinates."""

    @property
    def num_chunk_refs(self) -> int:
        """References of all arrays."""
        if isinstance(self.arrays, ByNode):
            return self.arrays.num_rows
        return sum(len(refs) for refs in self.arrays.values())


class Move(NamedTuple):
    """Net effect of the moves of one node in a transaction."""

    source: str
    target: str
    node_id: NodeId
    kind: NodeKind


@dataclass(frozen=True, slots=True, kw_only=True)
class TransactionLog:
    """The changes of one commit. An id is in at most one of the new, deleted and updated sets of its kind."""

    id: ObjectId
    """Id of the snapshot that the commit made."""
    new_groups: frozenset[NodeId] = frozenset()
    new_arrays: frozenset[NodeId] = frozenset()
    deleted_groups: frozenset[NodeId] = frozenset()
    deleted_arrays: frozenset[NodeId] = frozenset()
    updated_groups: frozenset[NodeId] = frozenset()
    updated_arrays: frozenset[NodeId] = frozenset()
    updated_chunks: Mapping[NodeId, npt.NDArray[np.uint32]] = field(default_factory=dict)
    """uint32[n, ndim] by node, ascending: every coordinate whose reference was added, replaced or deleted."""
    moved_nodes: tuple[Move, ...] = ()
    extra: bytes | None = None
