"""Decoding the nodes of a snapshot, formats 1 and 2.

A few nodes are read one by one. For many, each field of all nodes, of all their dimensions, manifests and names is
gathered at once (`icechunk.format.flat.vectors`). Equal values, which shapes and manifests often are, are made once and
shared.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from icechunk.format.by_node import owners
from icechunk.format.flat.flatbuffers import Buffer, Table, required
from icechunk.format.flat.vectors import Positions, TableColumns, Vectors, gather, targets
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.values import DimensionShape, Extents, ManifestRef, NodeKind, NodeSnapshot

__all__ = ["decode_many", "decode_nodes", "decode_one", "decode_texts", "has_array_kind", "node_columns"]

_T = TypeVar("_T")

_FEW: Final = 32
"""Number of nodes below which they are read one by one."""

# Slots of NodeSnapshot and of ArrayNodeData.
_ID, _PATH, _USER_DATA, _KIND, _DATA, _EXTRA = range(6)
_SHAPE_V1, _NAMES, _MANIFESTS, _SHAPE = range(4)

_ARRAY, _GROUP = 1, 2
_ID_SIZE: Final = 12
_NODE_ID_SIZE: Final = 8
_DIMENSION_V1: Final = struct.Struct("<QQ")
_RANGE: Final = struct.Struct("<II")


def decode_nodes(root: Table, slot: int) -> dict[str, NodeSnapshot]:
    """The nodes in that field of a snapshot, by path, in ascending order of the path's bytes.

    Raises
    ------
    FormatError
        If a node is corrupt, its path is not absolute, or two nodes have the same path.
    """
    buffer = root.buffer
    start, count = required(root.vector(slot, 4), root, "nodes")
    if count < _FEW:
        return _by_path([decode_one(table) for table in root.tables(slot) or ()], buffer)
    buffer.charge_tables(count)
    return _by_path(decode_many(buffer, targets(buffer, start + 4 * np.arange(count, dtype=np.int64))), buffer)


def _by_path(nodes: Iterable[NodeSnapshot], buffer: Buffer) -> dict[str, NodeSnapshot]:
    found: dict[str, NodeSnapshot] = {}
    in_order = True
    last = ""
    for node in nodes:
        path = node.path
        if not path.startswith("/"):
            raise buffer.fail(f"the path {path!r} is not absolute")
        if path in found:
            raise buffer.fail(f"{path} is in it twice")
        # Python compares text by code point, which is the order of its UTF-8 bytes.
        in_order = in_order and last < path
        last = path
        found[path] = node
    return found if in_order else {node.path: node for node in sorted(found.values(), key=attrgetter("path"))}


# -- one by one ------------------------------------------------------------------------------------


def has_array_kind(table: Table) -> bool:
    """Whether the table of a node says that it is an array."""
    return table.u8(_KIND) == _ARRAY


def decode_one(table: Table) -> NodeSnapshot:
    kind = table.u8(_KIND)
    id = NodeId(required(table.inline(_ID, _NODE_ID_SIZE), table, "id"))
    path = required(table.string(_PATH), table, "path")
    user_data = required(table.blob(_USER_DATA), table, "user_data")
    extra = table.blob(_EXTRA)
    if kind == _GROUP:
        return NodeSnapshot(id=id, path=path, kind=NodeKind.GROUP, user_data=user_data, extra=extra)
    if kind != _ARRAY:
        raise table.buffer.fail(f"the node {path!r} is of unknown kind {kind}")
    array = required(table.table(_DATA), table, "node_data")
    names = array.tables(_NAMES)
    shape = _shape(array)
    manifests = tuple([_manifest_ref(ref) for ref in required(array.tables(_MANIFESTS), array, "manifests")])
    return NodeSnapshot(
        id=id,
        path=path,
        kind=NodeKind.ARRAY,
        user_data=user_data,
        shape=shape,
        dimension_names=None if names is None else tuple([name.string(0) for name in names]),
        manifests=_fitting(manifests, shape),
        extra=extra,
    )


def _fitting(refs: tuple[ManifestRef, ...], shape: tuple[DimensionShape, ...]) -> tuple[ManifestRef, ...]:
    """The manifests with extents of the array's rank.

    The official library writes chunks of any rank, and takes extents from the first: what such a manifest holds of the
    array may be anywhere in its grid.
    """
    ndim = len(shape)
    if all(len(ref.extents) == ndim for ref in refs):
        return refs
    grid: Extents = tuple([(0, dimension.num_chunks) for dimension in shape])
    return tuple([ref if len(ref.extents) == ndim else ManifestRef(ref.object_id, grid) for ref in refs])


def _shape(array: Table) -> tuple[DimensionShape, ...]:
    newer = array.tables(_SHAPE)
    if newer is not None:
        return tuple([DimensionShape(dim.u64(0), dim.u32(1)) for dim in newer])
    items: bytes = required(array.items(_SHAPE_V1, _DIMENSION_V1.size), array, "shape")
    return tuple([_dimension_v1(*dim) for dim in _DIMENSION_V1.iter_unpack(items)])


def _dimension_v1(length: int, chunk_length: int) -> DimensionShape:
    # A chunk length of 0 can only belong to a dimension that has no chunks.
    return DimensionShape(length, -(-length // chunk_length) if chunk_length else 0)


def _manifest_ref(table: Table) -> ManifestRef:
    id = ObjectId(required(table.inline(0, _ID_SIZE), table, "object_id"))
    extents: Extents = tuple(_RANGE.iter_unpack(required(table.items(1, _RANGE.size), table, "extents")))
    return ManifestRef(id, extents)


# -- many at once ----------------------------------------------------------------------------------


def decode_many(buffer: Buffer, positions: Positions) -> list[NodeSnapshot]:
    """The nodes whose tables are at these positions. Raises `FormatError` if one of them is corrupt."""
    tables = TableColumns(buffer, positions)
    ids = _ids(buffer, tables, _ID, _NODE_ID_SIZE, "id")
    paths = decode_texts(buffer, _all(buffer, tables.vectors(_PATH, 1), "path"))
    user_data = _blobs(buffer, _all(buffer, tables.vectors(_USER_DATA, 1), "user_data"))
    kinds = tables.numbers(_KIND, "u1")
    unknown = (kinds != _ARRAY) & (kinds != _GROUP)
    if unknown.any():
        i = int(unknown.argmax())
        raise buffer.fail(f"the node {paths[i]!r} is of unknown kind {int(kinds[i])}")
    extra: list[bytes | None] = [None] * len(paths)
    if (some := tables.vectors(_EXTRA, 1)) is not None:
        for row, blob in zip(_rows(some, len(paths)), _blobs(buffer, some), strict=True):
            extra[row] = blob
    rows = np.flatnonzero(kinds == _ARRAY)
    shapes, names, manifests = _arrays(buffer, tables, rows)
    found: list[NodeSnapshot] = []
    which = iter(zip(shapes, names, manifests, strict=True))
    for id, path, document, kind, own in zip(ids, paths, user_data, kinds.tolist(), extra, strict=True):
        if kind == _GROUP:
            found.append(NodeSnapshot(id=NodeId(id), path=path, kind=NodeKind.GROUP, user_data=document, extra=own))
            continue
        shape, dimension_names, refs = next(which)
        found.append(
            NodeSnapshot(
                id=NodeId(id),
                path=path,
                kind=NodeKind.ARRAY,
                user_data=document,
                shape=shape,
                dimension_names=dimension_names,
                manifests=_fitting(refs, shape),
                extra=own,
            )
        )
    return found


def node_columns(buffer: Buffer, tables: TableColumns) -> tuple[Vectors, npt.NDArray[np.uint64]]:
    """Paths and ids (as big-endian numbers) of nodes, after a check of the fields that every node has.

    Raises
    ------
    FormatError
        If a node lacks one of them, or is of unknown kind.
    """
    column = tables.column(_ID, _NODE_ID_SIZE)
    if column is None or column.rows is not None:
        raise buffer.fail("a table in it lacks the required field 'id'")
    paths = _all(buffer, tables.vectors(_PATH, 1), "path")
    user_data = _all(buffer, tables.vectors(_USER_DATA, 1), "user_data")
    buffer.charge(int(paths.counts.sum()) + int(user_data.counts.sum()))
    kinds = tables.numbers(_KIND, "u1")
    unknown = (kinds != _ARRAY) & (kinds != _GROUP)
    if unknown.any():
        i = int(unknown.argmax())
        path = buffer.data[int(paths.starts[i]) : int(paths.starts[i] + paths.counts[i])].decode(errors="replace")
        raise buffer.fail(f"the node {path!r} is of unknown kind {int(kinds[i])}")
    return paths, gather(buffer, column.positions, ">u8").astype(np.uint64)


def _arrays(
    buffer: Buffer, tables: TableColumns, rows: npt.NDArray[np.intp]
) -> tuple[list[tuple[DimensionShape, ...]], list[tuple[str | None, ...] | None], list[tuple[ManifestRef, ...]]]:
    """Shapes, names of dimensions and manifests of the nodes with these numbers, all of which are arrays."""
    if not len(rows):
        return [], [], []
    data = tables.column(_DATA, 4)
    at = np.zeros(len(tables), np.int64)
    if data is not None:
        at[slice(None) if data.rows is None else data.rows] = data.positions
    at = at[rows]
    if not at.all():
        raise buffer.fail("an array in it lacks the required field 'node_data'")
    buffer.charge_tables(len(rows))
    arrays = TableColumns(buffer, targets(buffer, at))
    manifests = _manifests(buffer, _all(buffer, arrays.vectors(_MANIFESTS, 4), "manifests"))
    return _shapes(buffer, arrays), _names(buffer, arrays), manifests


def _shapes(buffer: Buffer, arrays: TableColumns) -> list[tuple[DimensionShape, ...]]:
    shapes: list[tuple[DimensionShape, ...] | None] = [None] * len(arrays)
    newer = arrays.vectors(_SHAPE, 4)
    if newer is not None:
        edges, fields = _items(buffer, newer, 4, tables=True)
        dimensions = TableColumns(buffer, targets(buffer, fields))
        lengths, chunks = dimensions.numbers(0, "<u8"), dimensions.numbers(1, "<u4").astype(np.uint64)
        made = _shared(
            np.column_stack([lengths, chunks]), edges, lambda dims: tuple([DimensionShape(*d) for d in dims])
        )
        for row, shape in zip(_rows(newer, len(arrays)), made, strict=True):
            shapes[row] = shape
    if newer is not None and newer.rows is None:
        return [shape for shape in shapes if shape is not None]
    older = arrays.vectors(_SHAPE_V1, _DIMENSION_V1.size)
    if older is not None:
        edges, places = _items(buffer, older, _DIMENSION_V1.size)
        numbers = gather(buffer, places, f"V{_DIMENSION_V1.size}").view("<u8").reshape(-1, 2)
        made = _shared(numbers, edges, lambda dims: tuple([_dimension_v1(*d) for d in dims]))
        for row, shape in zip(_rows(older, len(arrays)), made, strict=True):
            if shapes[row] is None:
                shapes[row] = shape
    if any(shape is None for shape in shapes):
        raise buffer.fail("an array in it lacks the required field 'shape'")
    return [shape for shape in shapes if shape is not None]


def _names(buffer: Buffer, arrays: TableColumns) -> list[tuple[str | None, ...] | None]:
    names: list[tuple[str | None, ...] | None] = [None] * len(arrays)
    vectors = arrays.vectors(_NAMES, 4)
    if vectors is None:
        return names
    edges, fields = _items(buffer, vectors, 4, tables=True)
    strings = TableColumns(buffer, targets(buffer, fields)).vectors(0, 1) if len(fields) else None
    texts: list[str | None] = [None] * len(fields)
    if strings is not None:
        for row, text in zip(_rows(strings, len(fields)), decode_texts(buffer, strings), strict=True):
            texts[row] = text
    known: dict[tuple[str | None, ...], tuple[str | None, ...]] = {}
    for row, (first, last) in zip(_rows(vectors, len(arrays)), pairwise(edges.tolist()), strict=True):
        own = tuple(texts[first:last])
        names[row] = known.setdefault(own, own)
    return names


def _manifests(buffer: Buffer, vectors: Vectors) -> list[tuple[ManifestRef, ...]]:
    edges, fields = _items(buffer, vectors, 4, tables=True)
    if not len(fields):
        return [()] * len(vectors.counts)
    refs = TableColumns(buffer, targets(buffer, fields))
    ids = _ids(buffer, refs, 0, _ID_SIZE, "object_id")
    boxes = _all(buffer, refs.vectors(1, _RANGE.size), "extents")
    ends, places = _items(buffer, boxes, _RANGE.size)
    ranges = gather(buffer, places, f"V{_RANGE.size}").view("<u4").reshape(-1, 2)
    extents: list[Extents] = _shared(ranges, ends, lambda pairs: tuple([(a, b) for a, b in pairs]))
    known: dict[tuple[bytes, Extents], tuple[ManifestRef]] = {}
    made = []
    for key in zip(ids, extents, strict=True):
        ref = known.get(key)
        if ref is None:
            ref = known[key] = (ManifestRef(ObjectId(key[0]), key[1]),)
        made.append(ref)
    result: list[tuple[ManifestRef, ...]] = []
    for first, last in pairwise(edges.tolist()):
        result.append(made[first] if last - first == 1 else tuple([ref for (ref,) in made[first:last]]))
    return result


# -- columns ---------------------------------------------------------------------------------------


def _all(buffer: Buffer, vectors: Vectors | None, field: str) -> Vectors:
    if vectors is None or vectors.rows is not None:
        raise buffer.fail(f"a table in it lacks the required field {field!r}")
    return vectors


def _rows(vectors: Vectors, count: int) -> Sequence[int]:
    """Numbers of the tables that have the field."""
    return range(count) if vectors.rows is None else vectors.rows.tolist()


def _items(buffer: Buffer, vectors: Vectors, size: int, *, tables: bool = False) -> tuple[Positions, Positions]:
    """First item of each vector among the items of all vectors, followed by the end of the last; and the positions of
    all items."""
    count = int(vectors.counts.sum())
    buffer.charge(count * size)
    if tables:
        buffer.charge_tables(count)
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(vectors.counts)])
    owner = owners(edges)
    return edges, (vectors.starts - size * edges[:-1])[owner] + size * np.arange(count, dtype=np.int64)


def _ids(buffer: Buffer, tables: TableColumns, slot: int, size: int, field: str) -> list[bytes]:
    column = tables.column(slot, size)
    if column is None or column.rows is not None:
        raise buffer.fail(f"a table in it lacks the required field {field!r}")
    raw = gather(buffer, column.positions, f"V{size}").tobytes()
    return [raw[i : i + size] for i in range(0, len(raw), size)]


def _blobs(buffer: Buffer, vectors: Vectors) -> list[bytes]:
    buffer.charge(int(vectors.counts.sum()))
    data = buffer.data
    return [data[a:b] for a, b in zip(vectors.starts.tolist(), (vectors.starts + vectors.counts).tolist(), strict=True)]


def decode_texts(buffer: Buffer, strings: Vectors) -> list[str]:
    """Strings, decoded. Raises `FormatError` if one of them is not UTF-8."""
    try:
        return [raw.decode() for raw in _blobs(buffer, strings)]
    except UnicodeDecodeError as error:
        raise buffer.fail("a string in it is not UTF-8") from error


def _shared(rows: npt.NDArray[Any], edges: Positions, make: Callable[[list[list[int]]], _T]) -> list[_T]:
    """The result of ``make`` for the rows between each two edges; equal rows share one object."""
    raw, width = rows.tobytes(), rows.shape[1] * rows.itemsize
    known: dict[bytes, _T] = {}
    result = []
    for first, last in pairwise(edges.tolist()):
        key = raw[width * first : width * last]
        found = known.get(key)
        if found is None:
            found = known[key] = make(rows[first:last].tolist())
        result.append(found)
    return result
