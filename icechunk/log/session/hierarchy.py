"""The nodes of a session: those of the base snapshot, overlaid with the session's changes.

The base is never copied. Paths are compared as text: Python orders it by code point, which is the
order of its UTF-8 bytes, and everything below ``/a`` is one range, from ``/a/`` to ``/a0`` (``0``
follows ``/``).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.ids import NodeId
from icechunk.format.snapshot.nodes import SnapshotNodes, by_id, paths_of
from icechunk.format.values import NodeSnapshot

__all__ = ["Hierarchy", "check_path", "is_below", "parent_of"]

_ABSENT: Final = object()


def check_path(path: str) -> None:
    """Refuse a path that is not absolute and normalized.

    Raises
    ------
    InvalidInputError
        Kind ``invalid-path``.
    """
    if path == "/":
        return
    if not path.startswith("/") or any(part in ("", ".", "..") for part in path[1:].split("/")):
        raise InvalidInputError(
            f"invalid path {path!r}: it must start with '/', not end with it, and have no empty, '.' or '..' segment",
            ErrorKind.INVALID_PATH,
        )
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InvalidInputError(f"invalid path {path!r}: it is not valid Unicode", ErrorKind.INVALID_PATH) from None


def parent_of(path: str) -> str:
    """The path one level up; the parent of the root is the root."""
    return path.rpartition("/")[0] or "/"


def is_below(path: str, ancestor: str) -> bool:
    """Whether ``path`` is below ``ancestor``, at any depth."""
    return path != ancestor and path.startswith(_prefix(ancestor))


def _prefix(path: str) -> str:
    return "/" if path == "/" else path + "/"


class Hierarchy:
    """Nodes by path.

    Parameters
    ----------
    base
        Nodes of the base snapshot, in ascending order of paths.
    """

    __slots__ = ("_added", "_base", "_base_by_id", "_base_paths", "_moved", "overlay")

    def __init__(self, base: Mapping[str, NodeSnapshot]) -> None:
        self._base = base
        self._base_paths: Sequence[str] | None = None
        self._base_by_id: Mapping[NodeId, NodeSnapshot] | None = None
        self._added: list[str] = []
        self._moved: dict[NodeId, str] = {}
        self.overlay: dict[str, NodeSnapshot | None] = {}
        """The paths at which the session differs from the base: the current node, or None if it was removed."""

    def get(self, path: str) -> NodeSnapshot | None:
        """The node at this path."""
        node = self.overlay.get(path, _ABSENT)
        return self._base.get(path) if node is _ABSENT else node  # type: ignore[return-value]

    def base(self, path: str) -> NodeSnapshot | None:
        """The base's node at this path."""
        return self._base.get(path)

    def put(self, node: NodeSnapshot) -> None:
        """Set the node at its path."""
        path = node.path
        old = self._base.get(path)
        if old is None:
            if path not in self.overlay:
                insort(self._added, path)
            self.overlay[path] = node
            self._moved[node.id] = path
        elif old == node:
            self.overlay.pop(path, None)
        else:
            self.overlay[path] = node
            self._moved[node.id] = path

    def remove(self, path: str) -> None:
        """Remove the node at this path."""
        if path in self._base:
            self.overlay[path] = None
        elif path in self.overlay:
            del self.overlay[path]
            del self._added[bisect_left(self._added, path)]

    def move(self, source: str, target: str) -> None:
        """Move a node and everything below it to a free path."""
        for node in list(self.subtree(source)):
            self.remove(node.path)
            self.put(replace(node, path=target + node.path[len(source) :]))

    def everything(self) -> Mapping[str, NodeSnapshot]:
        """All nodes by path, in ascending order; valid until the next change."""
        if not self.overlay:
            return self._base
        if isinstance(self._base, SnapshotNodes):
            return self._base.changed(self.overlay)
        known: dict[str, NodeSnapshot | None] = {**self._base, **self.overlay}
        # Two sorted runs: the paths that the base has, and those that it does not have.
        paths = sorted([*self._paths(), *self._added]) if self._added else known
        return {path: node for path in paths if (node := known[path]) is not None}

    def subtree(self, path: str) -> Iterator[NodeSnapshot]:
        """The node and everything below it, in ascending order of paths; the hierarchy must not change during the
        iteration."""
        node = self.get(path)
        if node is not None:
            yield node
        prefix = _prefix(path)
        old, added = self._paths(), self._added
        i, j = _start(old, prefix), _start(added, prefix)
        i_end, j_end = _end(old, prefix), _end(added, prefix)
        while i < i_end or j < j_end:
            if j >= j_end or (i < i_end and old[i] < added[j]):
                name, i = old[i], i + 1
            else:
                name, j = added[j], j + 1
            found = self.get(name)
            if found is not None and name != path:
                yield found

    def children(self, path: str, *, implied: bool = False) -> list[str]:
        """Names of the nodes directly below, ascending; with ``implied`` also names that are only ancestors of
        nodes."""
        prefix = _prefix(path)
        names: set[str] = set()
        for paths in (self._paths(), self._added):
            i, end = _start(paths, prefix), _end(paths, prefix)
            while i < end:
                name, deeper, _ = paths[i][len(prefix) :].partition("/")
                if deeper:
                    if implied and next(self.subtree(prefix + name), None) is not None:
                        names.add(name)
                    # Skip the whole subtree; the child itself, if it is a node, came before.
                    i = bisect_left(paths, prefix + name + "0", i + 1, end)
                    continue
                if name and self.get(prefix + name) is not None:
                    names.add(name)
                i += 1
        return sorted(names)

    def path_of(self, node_id: NodeId, hint: str) -> str | None:
        """Current path of a node; the path ``hint`` is tried first."""
        node = self.node_of(node_id, hint)
        return None if node is None else node.path

    def node_of(self, node_id: NodeId, hint: str) -> NodeSnapshot | None:
        """The node with this id, at any path; the path ``hint`` is tried first."""
        node = self.get(hint)
        if node is not None and node.id == node_id:
            return node
        if self._base_by_id is None:
            self._base_by_id = by_id(self._base)
        stored = self._base_by_id.get(node_id)
        for path in (self._moved.get(node_id), None if stored is None else stored.path):
            if path is not None and (node := self.get(path)) is not None and node.id == node_id:
                return node
        return None

    def _paths(self) -> Sequence[str]:
        if self._base_paths is None:
            self._base_paths = paths_of(self._base)
        return self._base_paths


def _start(paths: Sequence[str], prefix: str) -> int:
    return bisect_left(paths, prefix)


def _end(paths: Sequence[str], prefix: str) -> int:
    return bisect_left(paths, prefix[:-1] + "0")
