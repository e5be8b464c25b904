"""What a session, a commit or a span of history changed, by node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.tables import Move, NodeKind, NodeSnapshot, TransactionLog

__all__ = ["Changes", "NetChanges", "move_order"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Changes:
    """A summary for people: paths with a leading ``/``."""

    new_groups: frozenset[str] = frozenset()
    """Groups that did not exist before."""
    new_arrays: frozenset[str] = frozenset()
    """Arrays that did not exist before; also one that replaces another at the same path."""
    deleted_groups: frozenset[str] = frozenset()
    """Groups that exist no more, under their path before."""
    deleted_arrays: frozenset[str] = frozenset()
    """Arrays that exist no more, under their path before."""
    updated_groups: frozenset[str] = frozenset()
    """Groups with other metadata; never new ones."""
    updated_arrays: frozenset[str] = frozenset()
    """Arrays with other metadata; never new ones."""
    updated_chunks: Mapping[str, npt.NDArray[np.uint32]] = field(default_factory=dict)
    """uint32[n, ndim] by array, ascending: chunks added, replaced or deleted; ascending by path."""
    moved_nodes: tuple[tuple[str, str], ...] = ()
    """(before, after) of every node that stands elsewhere, descendants of a moved group too, ordered by the segments of
    the path before."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no change at all."""
        return not (
            self.new_groups
            or self.new_arrays
            or self.deleted_groups
            or self.deleted_arrays
            or self.updated_groups
            or self.updated_arrays
            or self.updated_chunks
            or self.moved_nodes
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NetChanges:
    """The same by node: an id stands in at most one of new, deleted and updated."""

    new: tuple[NodeSnapshot, ...] = ()
    """As they are now."""
    deleted: tuple[NodeSnapshot, ...] = ()
    """As they were."""
    updated: tuple[NodeSnapshot, ...] = ()
    """As they are now."""
    moved: tuple[Move, ...] = ()
    """Nodes that are neither new nor deleted, ordered by the segments of their source."""
    chunks: Mapping[NodeId, npt.NDArray[np.uint32]] = field(default_factory=dict)
    """uint32[n, ndim] by live array, ascending: chunks added, replaced or deleted."""
    paths: Mapping[NodeId, str] = field(default_factory=dict)
    """Of those arrays, now."""

    def transaction(self, snapshot_id: ObjectId) -> TransactionLog:
        """The transaction log of a commit that changes just this."""
        return TransactionLog(
            id=snapshot_id,
            new_groups=_ids(self.new, NodeKind.GROUP),
            new_arrays=_ids(self.new, NodeKind.ARRAY),
            deleted_groups=_ids(self.deleted, NodeKind.GROUP),
            deleted_arrays=_ids(self.deleted, NodeKind.ARRAY),
            updated_groups=_ids(self.updated, NodeKind.GROUP),
            updated_arrays=_ids(self.updated, NodeKind.ARRAY),
            updated_chunks=self.chunks,
            moved_nodes=self.moved,
        )

    def summary(self) -> Changes:
        """The same by path."""
        return Changes(
            new_groups=_paths(self.new, NodeKind.GROUP),
            new_arrays=_paths(self.new, NodeKind.ARRAY),
            deleted_groups=_paths(self.deleted, NodeKind.GROUP),
            deleted_arrays=_paths(self.deleted, NodeKind.ARRAY),
            updated_groups=_paths(self.updated, NodeKind.GROUP),
            updated_arrays=_paths(self.updated, NodeKind.ARRAY),
            updated_chunks=dict(sorted([(self.paths[i], coords) for i, coords in self.chunks.items()], key=_first)),
            moved_nodes=tuple((m.source, m.target) for m in self.moved),
        )


def move_order(move: Move) -> list[str]:
    """Sort key of moves: segment by segment (``/a`` < ``/a/b`` < ``/a-b``)."""
    return move.source.split("/")


def _first(item: tuple[str, npt.NDArray[np.uint32]]) -> str:
    return item[0]


def _ids(nodes: tuple[NodeSnapshot, ...], kind: NodeKind) -> frozenset[NodeId]:
    return frozenset(n.id for n in nodes if n.kind == kind)


def _paths(nodes: tuple[NodeSnapshot, ...], kind: NodeKind) -> frozenset[str]:
    return frozenset(n.path for n in nodes if n.kind == kind)
