"""The nodes of a snapshot as an immutable mapping: those of a file, plus the changes since it was written.

A new snapshot shares the file of the one before it, so committing a change of a few nodes decodes no others, and
`icechunk.format.snapshot.codec` writes them by copying their bytes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, ItemsView, Iterator, Mapping, Sequence, ValuesView
from typing import Any, Final, overload

from icechunk.format.flat.flatbuffers import Table, required
from icechunk.format.ids import NodeId
from icechunk.format.snapshot.node_decoding import decode_nodes
from icechunk.format.snapshot.stored_nodes import StoredNodes, StoredPaths, stored_nodes
from icechunk.format.values import NodeKind, NodeSnapshot

__all__ = ["NodesById", "SnapshotNodes", "array_paths", "by_id", "paths_of", "paths_with_ids", "read_nodes", "with_ids"]

_FEW: Final = 32
"""Number of nodes below which all are decoded at once."""
_FIRST_BLOCK: Final = 16
_LARGEST_BLOCK: Final = 4096
"""Numbers of nodes that an iteration decodes at a time: few at first, since it may end soon."""


class SnapshotNodes(Mapping[str, NodeSnapshot]):
    """Nodes by path, in ascending order of paths.

    Decoding a node raises `FormatError` if it is corrupt.

    Parameters
    ----------
    stored
        The nodes of a file.
    """

    __slots__ = ("_added", "_changes", "_count", "_known", "stored")

    def __init__(self, stored: StoredNodes) -> None:
        self.stored: StoredNodes = stored
        """The nodes of a file, of which some may have changed."""
        self._changes: Mapping[str, NodeSnapshot | None] = {}
        self._known: dict[str, NodeSnapshot] = {}
        """The nodes that have been looked up, and those that have changed."""
        self._added: list[str] = []
        self._count = len(stored)

    def changed(self, changes: Mapping[str, NodeSnapshot | None]) -> SnapshotNodes:
        """The nodes after changes, by path; None: the node is deleted."""
        new, stored = SnapshotNodes(self.stored), self.stored
        new._changes = {**self._changes, **changes}
        new._known = {path: node for path, node in new._changes.items() if node is not None}
        new._added = list(self._added)
        new._count = self._count
        for path, node in changes.items():
            if path in self._known and path not in self._changes:
                # A stored node that was looked up before, as those that a commit changes are: no search for it.
                new._count -= node is None
                continue
            existed = path in self
            new._count += (node is not None) - existed
            if stored.find(path) >= 0:
                continue
            if node is None and existed:
                del new._added[bisect_left(new._added, path)]
            elif node is not None and not existed:
                insort(new._added, path)
        return new

    @property
    def changes(self) -> Mapping[str, NodeSnapshot | None]:
        """The nodes that differ from the stored ones, by path; None: there is no such node, or no more."""
        return self._changes

    @property
    def paths(self) -> Sequence[str]:
        """All paths in ascending order, and those of stored nodes that were deleted; not copied."""
        return _MergedPaths(self.stored.paths, self._added) if self._added else self.stored.paths

    @overload
    def get(self, path: str, /) -> NodeSnapshot | None: ...

    @overload
    def get(self, path: str, /, default: Any) -> Any: ...

    def get(self, path: str, /, default: Any = None) -> Any:
        """The node at this path."""
        found = self._known.get(path)
        if found is not None:
            return found
        if path in self._changes or (row := self.stored.find(path)) < 0:
            return default
        return self._known.setdefault(path, self.stored.node(row))

    def paths_with_ids(self, ids: Collection[NodeId]) -> dict[NodeId, str]:
        """The paths of the nodes with these ids, ascending."""
        wanted = list(ids)
        asked = frozenset(wanted)
        found = [(node.path, node.id) for node in self._changes.values() if node is not None and node.id in asked]
        rows = zip(wanted, self.stored.find_ids(wanted), strict=True)
        stored = [(self.stored.path(row), id) for id, row in rows if row >= 0]
        found += [(path, id) for path, id in stored if path not in self._changes]
        return {id: path for path, id in sorted(found)}

    def values(self) -> ValuesView[NodeSnapshot]:
        """All nodes; they are decoded in blocks."""
        return _Values(self)

    def items(self) -> ItemsView[str, NodeSnapshot]:
        """All nodes with their paths; they are decoded in blocks."""
        return _Items(self)

    def in_order(self) -> Iterator[NodeSnapshot]:
        """All nodes in ascending order of their paths."""
        changes, added, first, size = self._changes, iter(self._added), 0, _FIRST_BLOCK
        waiting = next(added, None)
        while first < len(self.stored):
            for node in self.stored.nodes(range(first, min(first + size, len(self.stored)))):
                while waiting is not None and waiting < node.path:
                    yield self._known[waiting]
                    waiting = next(added, None)
                now = changes.get(node.path, node)
                if now is not None:
                    yield now
            first, size = first + size, min(2 * size, _LARGEST_BLOCK)
        while waiting is not None:
            yield self._known[waiting]
            waiting = next(added, None)

    def __getitem__(self, path: str) -> NodeSnapshot:
        found = self.get(path)
        if found is None:
            raise KeyError(path)
        return found

    def __contains__(self, path: object) -> bool:
        if not isinstance(path, str):
            return False
        return path in self._known or (path not in self._changes and self.stored.find(path) >= 0)

    def __iter__(self) -> Iterator[str]:
        changes = self._changes
        return (path for path in self.paths if changes.get(path, path) is not None)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<{len(self)} nodes, {len(self._changes)} of them changed since they were stored>"


class _Values(ValuesView[NodeSnapshot]):
    def __init__(self, nodes: SnapshotNodes) -> None:
        super().__init__(nodes)
        self._nodes = nodes

    def __iter__(self) -> Iterator[NodeSnapshot]:
        return self._nodes.in_order()

    def __contains__(self, node: object) -> bool:
        return isinstance(node, NodeSnapshot) and self._nodes.get(node.path) == node


class _Items(ItemsView[str, NodeSnapshot]):
    def __init__(self, nodes: SnapshotNodes) -> None:
        super().__init__(nodes)
        self._nodes = nodes

    def __iter__(self) -> Iterator[tuple[str, NodeSnapshot]]:
        return ((node.path, node) for node in self._nodes.in_order())


class _MergedPaths(Sequence[str]):
    """Stored paths and others, all of them distinct, in ascending order."""

    __slots__ = ("_added", "_places", "_stored")

    def __init__(self, stored: StoredPaths, added: Sequence[str]) -> None:
        self._stored = stored
        self._added = added
        self._places = [bisect_left(stored, path) + i for i, path in enumerate(added)]
        """The position of each added node."""

    def __len__(self) -> int:
        return len(self._stored) + len(self._added)

    @overload
    def __getitem__(self, which: int) -> str: ...

    @overload
    def __getitem__(self, which: slice) -> list[str]: ...

    def __getitem__(self, which: int | slice) -> str | list[str]:
        if isinstance(which, slice):
            return [self[i] for i in range(len(self))[which]]
        place = range(len(self))[which]
        i = bisect_left(self._places, place)
        if i < len(self._places) and self._places[i] == place:
            return self._added[i]
        return self._stored[place - i]


class NodesById(Mapping[NodeId, NodeSnapshot]):
    """Nodes by id; each is decoded when it is looked up."""

    __slots__ = ("_nodes",)

    def __init__(self, nodes: SnapshotNodes) -> None:
        self._nodes = nodes

    def __getitem__(self, id: NodeId) -> NodeSnapshot:
        return self._nodes[self._nodes.paths_with_ids((id,))[id]]

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[NodeId]:
        return (node.id for node in self._nodes.in_order())


def by_id(nodes: Mapping[str, NodeSnapshot]) -> Mapping[NodeId, NodeSnapshot]:
    """Nodes by id."""
    return NodesById(nodes) if isinstance(nodes, SnapshotNodes) else {node.id: node for node in nodes.values()}


def with_ids(nodes: Mapping[str, NodeSnapshot], ids: Collection[NodeId]) -> dict[NodeId, NodeSnapshot]:
    """The nodes with these ids; others are not decoded."""
    return {id: nodes[path] for id, path in paths_with_ids(nodes, ids).items()}


def paths_with_ids(nodes: Mapping[str, NodeSnapshot], ids: Collection[NodeId]) -> dict[NodeId, str]:
    """The paths of the nodes with these ids, in the order of the nodes; no node is decoded for it."""
    if isinstance(nodes, SnapshotNodes):
        return nodes.paths_with_ids(ids)
    return {node.id: path for path, node in nodes.items() if node.id in ids}


def array_paths(nodes: Mapping[str, NodeSnapshot]) -> Iterator[str]:
    """The paths of arrays in ascending order; nodes of a file are not decoded for it."""
    if not isinstance(nodes, SnapshotNodes):
        yield from sorted(path for path, node in nodes.items() if node.kind is NodeKind.ARRAY)
        return
    for path in nodes.paths:
        if path in nodes.changes:
            node = nodes.changes[path]
            is_array = node is not None and node.kind is NodeKind.ARRAY
        else:
            is_array = nodes.stored.is_array(nodes.stored.find(path))
        if is_array:
            yield path


def paths_of(nodes: Mapping[str, NodeSnapshot]) -> Sequence[str]:
    """The paths of nodes in ascending order; possibly with those of nodes that were deleted."""
    return nodes.paths if isinstance(nodes, SnapshotNodes) else sorted(nodes)


def read_nodes(root: Table, slot: int, version: int) -> Mapping[str, NodeSnapshot]:
    """The nodes in that field of a snapshot of this spec version, by path, in ascending order.

    Raises
    ------
    FormatError
        If a node is corrupt, its path is not absolute, or two nodes have the same path. Unless the nodes are few, what
        only one node needs is checked when that node is decoded.
    """
    _, count = required(root.vector(slot, 4), root, "nodes")
    stored = stored_nodes(root, slot, version) if count >= _FEW else None
    return decode_nodes(root, slot) if stored is None else SnapshotNodes(stored)
