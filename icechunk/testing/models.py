"""Models to compare a repository with: trees of groups and arrays, and a plain store that can move and shift.

A tree is a value, not a store: `GroupNode.materialize` writes it to any store, so that the same tree can be written to
a model and to a repository. `ModelStore` is zarr's memory store with the operations that only icechunk has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import zarr
import zarr.api.asynchronous
from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

__all__ = ["ArrayNode", "GroupNode", "ModelStore", "Node"]

_PROTOTYPE = default_buffer_prototype()


class ModelStore(MemoryStore):
    """zarr's memory store, with a simple implementation of the additional operations of sessions."""

    spec_version: int

    async def shift_array(self, array_path: str, offset: tuple[int, ...], num_chunks: tuple[int, ...]) -> None:
        """Move every chunk of an array by an offset; chunks that leave the grid are dropped.

        Parameters
        ----------
        array_path
            With or without a leading slash.
        offset
            In chunks, one for each dimension.
        num_chunks
            Shape of the chunk grid.
        """
        prefix = f"{array_path.strip('/')}/c/".lstrip("/")
        moved: dict[str, Buffer] = {}
        for key in [key for key in self._store_dict if key.startswith(prefix)]:
            here = [int(part) for part in key.removeprefix(prefix).split("/")]
            there = [at + by for at, by in zip(here, offset, strict=True)]
            value = self._store_dict.pop(key)
            if all(0 <= at < count for at, count in zip(there, num_chunks, strict=True)):
                moved[prefix + "/".join(map(str, there))] = value
        self._store_dict.update(moved)

    async def move(self, source: str, dest: str) -> None:
        """Move a node and everything below it; paths begin with a slash."""
        old, new = (f"{path.strip('/')}/".removeprefix("/") for path in (source, dest))
        for key in [key for key in self._store_dict if key.startswith(old)]:
            self._store_dict[new + key.removeprefix(old)] = self._store_dict.pop(key)

    async def copy(self) -> ModelStore:
        """An independent store with the same keys and values."""
        return ModelStore(dict(self._store_dict))


@dataclass(frozen=True)
class ArrayNode:
    """An array of a tree."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class GroupNode:
    """A group of a tree, with everything below it; the root has no name. Paths in trees have no leading slash."""

    children: dict[str, ArrayNode | GroupNode] = field(default_factory=dict)
    """Children by name."""

    def walk(self, prefix: str | PurePosixPath = "") -> Iterator[tuple[PurePosixPath, Node]]:
        """Every node below this one with its path, each group before its members."""
        for name, child in self.children.items():
            path = PurePosixPath(prefix) / name
            yield path, child
            if isinstance(child, GroupNode):
                yield from child.walk(path)

    def nodes(self, prefix: str = "", *, include_root: bool = False) -> list[str]:
        """Paths of all nodes."""
        return self._root(prefix, include_root) + [str(path) for path, _ in self.walk(prefix)]

    def groups(self, prefix: str = "", *, include_root: bool = False) -> list[str]:
        """Paths of all groups."""
        below = [str(path) for path, node in self.walk(prefix) if isinstance(node, GroupNode)]
        return self._root(prefix, include_root) + below

    def arrays(self, prefix: str = "") -> list[str]:
        """Paths of all arrays."""
        return [str(path) for path, node in self.walk(prefix) if isinstance(node, ArrayNode)]

    @staticmethod
    def _root(prefix: str, wanted: bool) -> list[str]:
        return [prefix] if wanted else []

    def materialize(self, store: Store) -> zarr.Group:
        """Create all groups and arrays in an empty store; returns the root group."""
        root = zarr.create_group(store)
        for path, node in self.walk():
            if isinstance(node, ArrayNode):
                root.create_array(str(path), shape=node.shape, dtype=node.dtype)
            else:
                root.create_group(str(path))
        return root

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> GroupNode:
        """A tree from nested dictionaries, whose leaves are `ArrayNode`."""
        return cls({name: cls.from_dict(child) if isinstance(child, dict) else child for name, child in d.items()})

    @classmethod
    def from_paths(cls, arrays: set[str], groups: set[str]) -> GroupNode:
        """A tree from paths that begin with a slash; parents that are not listed are groups. Arrays hold one int32."""
        leaves: dict[str, Any] = {path: ArrayNode(shape=(1,), dtype=np.dtype("int32")) for path in arrays}
        return cls._assembled({**dict.fromkeys(groups, None), **leaves})

    @classmethod
    def _assembled(cls, nodes: dict[str, ArrayNode | None]) -> GroupNode:
        tree: dict[str, Any] = {}
        for path in sorted(nodes):
            *parents, name = path.strip("/").split("/")
            if not name:
                continue
            place = tree
            for parent in parents:
                place = place.setdefault(parent, {})
            place.setdefault(name, nodes[path] or {})
        return cls.from_dict(tree)

    @classmethod
    async def from_store_async(cls, store: Store) -> GroupNode:
        """The tree that a store holds."""
        root = await zarr.api.asynchronous.open_group(store, mode="r")
        found: dict[str, ArrayNode | None] = {}
        async for path, member in root.members(max_depth=None):
            if isinstance(member, zarr.AsyncArray):
                found[path] = ArrayNode(shape=member.shape, dtype=np.dtype(member.dtype))
            else:
                found[path] = None
        return cls._assembled(found)

    @classmethod
    def from_store(cls, store: Store) -> GroupNode:
        """Synchronous twin of `from_store_async`."""
        return sync(cls.from_store_async(store))


Node: TypeAlias = ArrayNode | GroupNode
