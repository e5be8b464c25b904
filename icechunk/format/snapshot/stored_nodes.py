"""The nodes of a snapshot's file, each decoded when it is requested.

A hierarchy of a hundred thousand arrays is usually opened to use a few of them. Opening checks, as columns, only the
conditions of a search: that every node has its required fields, and that paths are absolute, valid and strictly
ascending. A file whose nodes are in another order is decoded at once instead
(`icechunk.format.snapshot.node_decoding`). The rest of a node is checked when the node is decoded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from icechunk.format.flat.flatbuffers import Buffer, Payload, Table, required
from icechunk.format.flat.vectors import LazyTables, Positions, TableColumns, Vectors, gather, text_traits
from icechunk.format.ids import NodeId
from icechunk.format.snapshot.node_decoding import decode_many, decode_one, decode_texts, has_array_kind, node_columns
from icechunk.format.values import NodeKind, NodeSnapshot

__all__ = ["NodeRegion", "StoredNodes", "StoredPaths", "stored_nodes"]

_ONE_BY_ONE: Final = 16
"""The share of the nodes, as its reciprocal, that are decoded one by one before whole blocks are decoded."""
_BLOCK: Final = 256
"""Number of nodes in such a block."""
_LONGEST_PATH: Final = 4096
"""Bytes of a path; a file with longer ones is decoded at once."""


class NodeRegion(NamedTuple):
    """The bytes of all nodes of a file."""

    first: int
    """Position of the first byte, a multiple of 8."""
    last: int
    """Position after the last one."""
    used: int
    """Number of bytes in it that belong to the nodes. Documents that nodes share count once, other bytes for each."""
    manifests: npt.NDArray[np.bytes_]
    """S12[m]: ids of the manifests of all nodes, in the order of the nodes."""
    manifest_rows: npt.NDArray[np.int64]
    """int64[m]: the row of the node that each belongs to; ascending."""


class StoredNodes:
    """The nodes of one file by row, the number of a node in the order of paths. Made by `stored_nodes`.

    Decoding a node, or several, raises `FormatError` if one of them is corrupt.
    """

    __slots__ = (
        "_decoded",
        "_ends",
        "_id_order",
        "_positions",
        "_starts",
        "_tables",
        "ids",
        "known",
        "region",
        "version",
    )

    def __init__(self, tables: LazyTables, version: int, paths: Vectors, ids: npt.NDArray[np.uint64]) -> None:
        self._tables = tables
        self._positions = tables.positions()
        self._starts = paths.starts.data
        self._ends = (paths.starts + paths.counts).data
        self._decoded = 0
        self._id_order: npt.NDArray[np.intp] | None = None
        self.version: int = version
        """Spec version of the file."""
        self.ids: npt.NDArray[np.uint64] = ids
        """uint64[n]: ids by row, as big-endian numbers."""
        self.known: dict[int, NodeSnapshot] = {}
        """Nodes that have been decoded, by row."""
        self.region: NodeRegion | None = None
        """The region of their bytes, once it is known (`icechunk.format.snapshot.node_region`)."""

    def __len__(self) -> int:
        return len(self._tables)

    @property
    def data(self) -> Payload:
        """The payload that the nodes are in."""
        return self._tables.payload

    @property
    def paths(self) -> StoredPaths:
        """The paths by row, as a sequence."""
        return StoredPaths(self)

    def path(self, row: int) -> str:
        """The path of a node."""
        return self.data[self._starts[row] : self._ends[row]].decode()

    def find(self, path: str) -> int:
        """The row of a path, or −1."""
        try:
            key = path.encode()
        except UnicodeEncodeError:
            return -1
        data, starts, ends = self.data, self._starts, self._ends
        first, last = 0, len(starts)
        while first < last:
            middle = (first + last) // 2
            if data[starts[middle] : ends[middle]] < key:
                first = middle + 1
            else:
                last = middle
        return first if first < len(starts) and data[starts[first] : ends[first]] == key else -1

    def find_ids(self, wanted: Sequence[NodeId]) -> list[int]:
        """For each id its row, the last one where several nodes have it, or −1."""
        if self._id_order is None:
            self._id_order = np.argsort(self.ids, kind="stable")
        ordered = self.ids[self._id_order]
        asked = np.frombuffer(b"".join(wanted), ">u8").astype(np.uint64)
        at = np.searchsorted(ordered, asked, side="right") - 1
        found = np.where((at >= 0) & (ordered[at] == asked), self._id_order[at], -1)
        rows: list[int] = found.tolist()
        return rows

    def is_array(self, row: int) -> bool:
        """Whether a node is an array, without decoding it."""
        found = self.known.get(row)
        return has_array_kind(self._tables.table(row)) if found is None else found.kind is NodeKind.ARRAY

    def node(self, row: int) -> NodeSnapshot:
        """A node."""
        found = self.known.get(row)
        if found is not None:
            return found
        if self._decoded * _ONE_BY_ONE > len(self):
            first = row - row % _BLOCK
            self._decode(range(first, min(first + _BLOCK, len(self))))
            return self.known[row]
        self._decoded += 1
        return self.known.setdefault(row, decode_one(self._tables.table(row)))

    def nodes(self, rows: range) -> list[NodeSnapshot]:
        """Consecutive nodes."""
        self._decode(rows)
        return [self.known[row] for row in rows]

    def _decode(self, rows: range) -> None:
        missing = [row for row in rows if row not in self.known]
        if missing:
            buffer = Buffer(self.data, self._tables.name)
            buffer.charge_tables(len(missing))
            nodes = decode_many(buffer, self._positions[missing])
            for row, node in zip(missing, nodes, strict=True):
                self.known.setdefault(row, node)

    def columns(self) -> tuple[Buffer, TableColumns]:
        """The tables of all nodes, as `LazyTables.columns`."""
        return self._tables.columns()

    def positions(self) -> Positions:
        """int64[n]: position of the table of each node."""
        return self._positions


class StoredPaths(Sequence[str]):
    """The paths of stored nodes, ascending; each is decoded when it is requested."""

    __slots__ = ("_nodes",)

    def __init__(self, nodes: StoredNodes) -> None:
        self._nodes = nodes

    def __len__(self) -> int:
        return len(self._nodes)

    @overload
    def __getitem__(self, which: int) -> str: ...

    @overload
    def __getitem__(self, which: slice) -> list[str]: ...

    def __getitem__(self, which: int | slice) -> str | list[str]:
        if isinstance(which, slice):
            return [self._nodes.path(row) for row in range(len(self))[which]]
        return self._nodes.path(range(len(self))[which])

    def __iter__(self) -> Iterator[str]:
        return map(self._nodes.path, range(len(self)))

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and self._nodes.find(path) >= 0

    def index(self, path: Any, start: int = 0, stop: int | None = None) -> int:
        """As `Sequence.index`."""
        row = bisect_left(self, path, start, len(self) if stop is None else stop)
        if row == len(self) or self[row] != path:
            raise ValueError(f"{path!r} is not among the paths")
        return row


def stored_nodes(root: Table, slot: int, version: int) -> StoredNodes | None:
    """The nodes in that field of a snapshot; None if their paths are not strictly ascending.

    Raises
    ------
    FormatError
        If a node lacks a required field, is of unknown kind, or its path is not absolute or no UTF-8.
    """
    buffer = root.buffer
    start, count = required(root.vector(slot, 4), root, "nodes")
    tables = LazyTables(buffer, start, count)
    if not count:
        return None
    own, columns = tables.columns()
    paths, ids = node_columns(own, columns)
    lowest, highest = int(paths.counts.min()), int(paths.counts.max())
    if not lowest or highest > _LONGEST_PATH or (gather(own, paths.starts, "u1") != ord("/")).any():
        # Decoding the nodes one after another finds the path that is refused.
        return None
    traits = text_traits(own, paths)
    if not traits.is_ascending:
        return None
    if not traits.is_ascii:
        decode_texts(own, paths)
    return StoredNodes(tables, version, paths, ids)
