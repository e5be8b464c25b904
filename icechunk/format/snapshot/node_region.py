"""The bytes of all nodes of a file, for a writer that copies them into the next file.

Offsets in a FlatBuffers payload are relative, so nodes may be copied as one block of bytes, in any layout of the
file: from the first to the last byte that a node, or anything below one, takes. Everything below the nodes is
checked as columns before: in another file, an offset that leads out of its own file would lead to other bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from icechunk.format.by_node import owners
from icechunk.format.flat.flatbuffers import Buffer
from icechunk.format.flat.vectors import Positions, Spans, TableColumns, Vectors, gather, targets, text_traits
from icechunk.format.ids import ObjectId
from icechunk.format.snapshot.node_decoding import decode_texts
from icechunk.format.snapshot.nodes import SnapshotNodes
from icechunk.format.snapshot.stored_nodes import NodeRegion, StoredNodes
from icechunk.format.values import NodeSnapshot

__all__ = ["Extent", "below_nodes", "is_dense", "region_of", "used_manifests"]

# Slots of NodeSnapshot and of ArrayNodeData, and numbers of slots of the tables.
_PATH, _USER_DATA, _KIND, _DATA, _EXTRA, _NODE_SLOTS = 1, 2, 3, 4, 5, 6
_SHAPE_V1, _NAMES, _MANIFESTS, _SHAPE, _ARRAY_SLOTS = 0, 1, 2, 3, 4
_NAME_SLOTS, _DIMENSION_SLOTS, _REF_SLOTS = 1, 2, 2
_ARRAY: Final = 1
_ID_SIZE: Final = 12
_DIMENSION_V1_SIZE: Final = 16
_RANGE_SIZE: Final = 8
_ALIGN: Final = 8
_FEW_CHANGED: Final = 32
"""The share of the nodes, as its reciprocal, up to which changed ones are looked for among the stored ones."""


class Extent:
    """Grows with every range of bytes that is noted."""

    def __init__(self, size: int) -> None:
        self.first: int = size
        self.last: int = 0
        self.used: int = 0
        self.has_unknown_fields = False
        """Whether a table may have a field that is not known here, and whose bytes are not in the extent."""

    def note(self, spans: Spans) -> None:
        if len(spans.starts):
            self.first = min(self.first, int(spans.starts.min()))
            self.last = max(self.last, int((spans.starts + spans.sizes).max()))
            self.used += int(spans.sizes.sum())

    def note_tables(self, tables: TableColumns) -> None:
        if len(tables):
            own, (vtables, sizes) = tables.spans()
            self.note(own)
            at, which = np.unique(vtables, return_index=True)
            self.note(Spans(at, sizes[which]))

    def note_vectors(self, vectors: Vectors | None, item_size: int, after: int = 0) -> None:
        if vectors is not None:
            self.note(Spans(vectors.starts - 4, vectors.counts * item_size + 4 + after))

    def note_shared(self, vectors: Vectors | None, item_size: int) -> None:
        """Note each position once: nodes with equal documents refer to the same one."""
        if vectors is not None:
            starts, which = np.unique(vectors.starts, return_index=True)
            self.note_vectors(Vectors(None, starts, vectors.counts[which]), item_size)


class _NoExtent(Extent):
    """Stays as it is."""

    def note(self, spans: Spans) -> None:
        pass

    def note_tables(self, tables: TableColumns) -> None:
        pass

    def note_vectors(self, vectors: Vectors | None, item_size: int, after: int = 0) -> None:
        pass

    def note_shared(self, vectors: Vectors | None, item_size: int) -> None:
        pass


def region_of(stored: StoredNodes) -> NodeRegion | None:
    """The region of the nodes of a file; None where a table in it has fields of a newer format.

    Raises
    ------
    FormatError
        If a node, or anything below it, is corrupt.
    """
    if stored.region is None:
        buffer, nodes = stored.columns()
        extent = Extent(buffer.size)
        manifests, rows = below_nodes(buffer, nodes, extent)
        if extent.has_unknown_fields:
            return None
        first, last = extent.first - extent.first % _ALIGN, min(extent.last, buffer.size)
        stored.region = NodeRegion(first, last, extent.used, manifests, rows)
    return stored.region


def is_dense(region: NodeRegion) -> bool:
    """Whether at least three quarters of the bytes belong to the nodes."""
    return 4 * region.used >= 3 * (region.last - region.first)


def used_manifests(nodes: Mapping[str, NodeSnapshot]) -> list[ObjectId]:
    """The ids of the manifests that nodes refer to, ascending.

    Raises
    ------
    FormatError
        If a node in a file is corrupt.
    """
    few = isinstance(nodes, SnapshotNodes) and len(nodes.changes) * _FEW_CHANGED <= len(nodes)
    region = region_of(nodes.stored) if few and isinstance(nodes, SnapshotNodes) else None
    if not isinstance(nodes, SnapshotNodes) or region is None:
        return sorted({ref.object_id for node in nodes.values() for ref in node.manifests})
    used = {ref.object_id for node in nodes.changes.values() if node is not None for ref in node.manifests}
    changed = [row for row in map(nodes.stored.find, nodes.changes) if row >= 0]
    ids = region.manifests[~np.isin(region.manifest_rows, changed)] if changed else region.manifests
    if len(ids):
        # Neighbours often share a manifest, which leaves little to sort.
        ids = np.sort(ids[np.append(True, ids[1:] != ids[:-1])])
        ids = ids[np.append(True, ids[1:] != ids[:-1])]
        raw = ids.tobytes()
        used.update([ObjectId(raw[i : i + _ID_SIZE]) for i in range(0, len(raw), _ID_SIZE)])
    return sorted(used)


def below_nodes(
    buffer: Buffer, nodes: TableColumns, extent: Extent | None
) -> tuple[npt.NDArray[np.bytes_], npt.NDArray[np.int64]]:
    """Check all that is below nodes, and note the bytes of it and of the nodes, unless ``extent`` is None.

    Returns
    -------
    manifests : S12[m]
        Ids of the manifests of all nodes, in the order of the nodes.
    rows : int64[m]
        The number of the node that each belongs to; ascending.

    Raises
    ------
    FormatError
        If something of it is corrupt.
    """
    extent = extent or _NoExtent(0)
    _note_known(nodes, _NODE_SLOTS, extent)
    extent.note_vectors(nodes.vectors(_PATH, 1), 1, 1)
    extent.note_shared(nodes.vectors(_USER_DATA, 1), 1)
    extent.note_vectors(nodes.vectors(_EXTRA, 1), 1)
    data, at = nodes.column(_DATA, 4), np.zeros(len(nodes), np.int64)
    if data is not None:
        at[slice(None) if data.rows is None else data.rows] = data.positions
    of_array = nodes.numbers(_KIND, "u1") == _ARRAY
    if not at[of_array].all():
        raise buffer.fail("an array in it lacks the required field 'node_data'")
    groups = at[~of_array & (at > 0)]
    if len(groups):
        _note_known(TableColumns(buffer, targets(buffer, groups)), 0, extent)
    rows = np.flatnonzero(of_array)
    buffer.charge_tables(len(rows))
    arrays = TableColumns(buffer, targets(buffer, at[rows]))
    if len(arrays):
        _note_known(arrays, _ARRAY_SLOTS, extent)
    older, newer = arrays.vectors(_SHAPE_V1, _DIMENSION_V1_SIZE), arrays.vectors(_SHAPE, 4)
    if len(arrays) and not _all_have(older, newer, len(arrays)):
        raise buffer.fail("an array in it lacks the required field 'shape'")
    extent.note_vectors(older, _DIMENSION_V1_SIZE)
    for dimensions, _ in _tables_of(buffer, newer, _DIMENSION_SLOTS, extent):
        dimensions.column(0, 8)
        dimensions.column(1, 4)
    for names, _ in _tables_of(buffer, arrays.vectors(_NAMES, 4), _NAME_SLOTS, extent):
        strings = names.vectors(0, 1)
        if strings is not None:
            extent.note_vectors(strings, 1, 1)
            buffer.charge(int(strings.counts.sum()))
            if not text_traits(buffer, strings).is_ascii:
                decode_texts(buffer, strings)
    refs_of = arrays.vectors(_MANIFESTS, 4)
    if len(arrays) and (refs_of is None or refs_of.rows is not None):
        raise buffer.fail("a table in it lacks the required field 'manifests'")
    for refs, owner in _tables_of(buffer, refs_of, _REF_SLOTS, extent):
        ids, boxes = refs.column(0, _ID_SIZE), refs.vectors(1, _RANGE_SIZE)
        if ids is None or ids.rows is not None or boxes is None or boxes.rows is not None:
            raise buffer.fail("a table in it lacks the required field 'object_id' or 'extents'")
        extent.note_vectors(boxes, _RANGE_SIZE)
        return gather(buffer, ids.positions, f"S{_ID_SIZE}"), rows[owner]
    return np.empty(0, f"S{_ID_SIZE}"), np.empty(0, np.int64)


def _note_known(tables: TableColumns, slots: int, extent: Extent) -> None:
    if tables.has_field_from(slots):
        extent.has_unknown_fields = True
    extent.note_tables(tables)


def _all_have(older: Vectors | None, newer: Vectors | None, count: int) -> bool:
    have = np.zeros(count, np.bool_)
    for vectors in (older, newer):
        if vectors is not None:
            have[slice(None) if vectors.rows is None else vectors.rows] = True
    return bool(have.all())


def _tables_of(
    buffer: Buffer, vectors: Vectors | None, slots: int, extent: Extent
) -> Iterator[tuple[TableColumns, npt.NDArray[np.int64]]]:
    """The tables in vectors of tables, if there are any, and for each the number of the vector that it is in."""
    if vectors is None:
        return
    extent.note_vectors(vectors, 4)
    count = int(vectors.counts.sum())
    buffer.charge(4 * count)
    buffer.charge_tables(count)
    if count:
        edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(vectors.counts)])
        owner = owners(edges)
        fields: Positions = (vectors.starts - 4 * edges[:-1])[owner] + 4 * np.arange(count, dtype=np.int64)
        tables = TableColumns(buffer, targets(buffer, fields))
        _note_known(tables, slots, extent)
        yield tables, owner
