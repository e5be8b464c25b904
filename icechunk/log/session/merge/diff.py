"""Differences between two snapshots, from the transaction logs in between; also the changes of a session or a commit.

Differences are net, by node: a node that was created and deleted in between does not appear; one that was created
and then changed is only new; one that moved twice moved once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from itertools import chain, compress, pairwise, repeat
from typing import Final

import numpy as np
import numpy.typing as npt

from icechunk.format.by_node import ByNode, Coords, Part, grouped_coords, num_rows
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.snapshot.nodes import paths_with_ids
from icechunk.format.values import Move, NodeKind, NodeSnapshot, Snapshot, TransactionLog
from icechunk.log.session.columns import sort_last
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["Changes", "NetChanges", "changes_since", "combined", "diff", "move_order", "net_diff"]


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
    """(before, after): the paths of every moved node, descendants of a moved group too, ordered by the segments of the
    path before."""

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
    """The same by node: an id is in at most one of new, deleted and updated."""

    new: tuple[NodeSnapshot, ...] = ()
    """New nodes as they are now."""
    deleted: tuple[NodeSnapshot, ...] = ()
    """Deleted nodes as they were."""
    updated: tuple[NodeSnapshot, ...] = ()
    """Nodes with other metadata, as they are now."""
    moved: tuple[Move, ...] = ()
    """Nodes that are neither new nor deleted, ordered by the segments of their source."""
    chunks: Mapping[NodeId, npt.NDArray[np.uint32]] = field(default_factory=dict)
    """uint32[n, ndim] by live array, ascending: chunks added, replaced or deleted."""
    paths: Mapping[NodeId, str] = field(default_factory=dict)
    """Present paths of those arrays."""

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


def net_diff(transactions: Sequence[TransactionLog], from_snapshot: Snapshot, to_snapshot: Snapshot) -> NetChanges:
    """The changes by node.

    Parameters
    ----------
    transactions
        Of every commit after ``from_snapshot`` up to ``to_snapshot``, oldest first.
    from_snapshot, to_snapshot
        The two ends; the first an ancestor of the second.
    """
    mentioned: set[NodeId] = set()
    changed: set[NodeId] = set()
    for log in transactions:
        changed |= log.updated_groups | log.updated_arrays
        mentioned |= log.new_groups | log.new_arrays | log.deleted_groups | log.deleted_arrays
        mentioned |= {move.node_id for move in log.moved_nodes}
    chunks = united([log.updated_chunks for log in transactions])
    mentioned |= changed | chunks.keys()
    # Of an array whose chunks alone have changed only the path is needed: its node is not decoded.
    before, after = (paths_with_ids(snapshot.nodes, mentioned) for snapshot in (from_snapshot, to_snapshot))
    was, now = from_snapshot.nodes, to_snapshot.nodes
    moved = [now[path] for i, path in after.items() if before.get(i, path) != path]
    return NetChanges(
        new=tuple(now[path] for i, path in after.items() if i not in before),
        deleted=tuple(was[path] for i, path in before.items() if i not in after),
        updated=tuple(now[path] for i, path in after.items() if i in before and i in changed),
        moved=tuple(sorted((Move(before[n.id], n.path, n.id, n.kind) for n in moved), key=move_order)),
        chunks={i: coords for i, coords in chunks.items() if i in after},
        paths={i: after[i] for i in chunks if i in after},
    )


def diff(transactions: Sequence[TransactionLog], from_snapshot: Snapshot, to_snapshot: Snapshot) -> Changes:
    """The changes by path: paths of deleted nodes as in ``from_snapshot``, all others as in ``to_snapshot``.

    A node is new if one of the transaction logs says that it was created. Those of expired commits may be gone: older
    libraries, and format 1, do not keep them. As with the official library, the diff then has what the others record.

    Parameters
    ----------
    transactions
        Of every commit after ``from_snapshot`` up to ``to_snapshot``, oldest first, as far as they are known.
    from_snapshot, to_snapshot
        The two ends; the first an ancestor of the second.
    """
    net = net_diff(transactions, from_snapshot, to_snapshot)
    created = frozenset[NodeId]().union(*(log.new_groups | log.new_arrays for log in transactions))
    older = [node for node in net.new if node.id not in created]
    if older:
        net = replace(
            net,
            new=tuple(node for node in net.new if node.id in created),
            updated=(*net.updated, *_recorded_updates(transactions, older)),
            moved=tuple(sorted((*net.moved, *_recorded_moves(transactions, older)), key=move_order)),
        )
    return net.summary()


def _recorded_updates(transactions: Sequence[TransactionLog], nodes: Sequence[NodeSnapshot]) -> list[NodeSnapshot]:
    updated = frozenset[NodeId]().union(*(log.updated_groups | log.updated_arrays for log in transactions))
    return [node for node in nodes if node.id in updated]


def _recorded_moves(transactions: Sequence[TransactionLog], nodes: Sequence[NodeSnapshot]) -> list[Move]:
    sources: dict[NodeId, str] = {}
    for log in transactions:
        for move in log.moved_nodes:
            sources.setdefault(move.node_id, move.source)
    moves = [Move(sources.get(node.id, node.path), node.path, node.id, node.kind) for node in nodes]
    return [move for move in moves if move.source != move.target]


def combined(first: TransactionLog, second: TransactionLog) -> TransactionLog:
    """One transaction log for two commits in a row, as if they had been one; its id is the second's."""
    new = ((first.new_groups | first.new_arrays) - second.deleted_groups - second.deleted_arrays) | (
        second.new_groups | second.new_arrays
    )
    gone = first.deleted_groups | first.deleted_arrays | second.deleted_groups | second.deleted_arrays
    chunks: dict[NodeId, list[npt.NDArray[np.uint32]]] = {}
    for log in (first, second):
        for node_id, coords in log.updated_chunks.items():
            if node_id not in gone and len(coords):
                chunks.setdefault(node_id, []).append(coords)
    return TransactionLog(
        id=second.id,
        new_groups=(first.new_groups - second.deleted_groups) | second.new_groups,
        new_arrays=(first.new_arrays - second.deleted_arrays) | second.new_arrays,
        deleted_groups=first.deleted_groups | (second.deleted_groups - first.new_groups),
        deleted_arrays=first.deleted_arrays | (second.deleted_arrays - first.new_arrays),
        updated_groups=(first.updated_groups | second.updated_groups) - new - gone,
        updated_arrays=(first.updated_arrays | second.updated_arrays) - new - gone,
        updated_chunks={node_id: _merged(chunks[node_id]) for node_id in sorted(chunks)},
        moved_nodes=_moved_in_a_row(first.moved_nodes, second.moved_nodes, new | gone),
    )


def changes_since(log: TransactionLog, before: Snapshot, after: Snapshot) -> TransactionLog:
    """The part of a transaction log that changed after a snapshot whose changes the log includes, as that of an
    amendment.

    A chunk of an array that both changed counts as changed after it: which of the two did is not known.

    Parameters
    ----------
    before
        The amended snapshot.
    after
        The snapshot of the log.
    """
    was = {node.id: node for node in before.nodes.values()}
    now = {node.id: node for node in after.nodes.values()}
    kept = [(was[i], now[i]) for i in was.keys() & now.keys()]
    same_chunks = {new.id for old, new in kept if old.manifests == new.manifests}
    net = NetChanges(
        new=tuple(node for i, node in now.items() if i not in was),
        deleted=tuple(node for i, node in was.items() if i not in now),
        updated=tuple(new for old, new in kept if old.user_data != new.user_data),
        moved=tuple(Move(old.path, new.path, new.id, new.kind) for old, new in kept if old.path != new.path),
        chunks={i: coords for i, coords in log.updated_chunks.items() if i not in same_chunks},
    )
    return net.transaction(log.id)


def _moved_in_a_row(first: Sequence[Move], second: Sequence[Move], without: frozenset[NodeId]) -> tuple[Move, ...]:
    moves = {move.node_id: move for move in first}
    for move in second:
        before = moves.get(move.node_id)
        moves[move.node_id] = move if before is None else move._replace(source=before.source)
    kept = (m for m in moves.values() if m.source != m.target and m.node_id not in without)
    return tuple(sorted(kept, key=move_order))


_TOGETHER: Final = 1 << 18
"""Coordinates that are sorted together. With more, those of each array take most of the time, and need less memory."""


def united(changes: Sequence[Mapping[NodeId, Coords]]) -> dict[NodeId, Coords]:
    """All coordinates of each array in several mappings, each once and in ascending order.

    Of an array that has changed its rank, only coordinates of its last rank are kept. Arrays without any are left out.
    """
    if len(changes) > 1 and sum(map(num_rows, changes)) <= _TOGETHER:
        return _united_in_columns([grouped_coords(chunks) for chunks in changes])
    parts: dict[NodeId, list[Coords]] = {}
    for chunks in changes:
        for node_id, coords in chunks.items():
            if len(coords):
                parts.setdefault(node_id, []).append(coords)
    return {node_id: _merged(own) for node_id, own in parts.items()}


def _united_in_columns(changes: Sequence[ByNode[Coords]]) -> dict[NodeId, Coords]:
    """The same, with few numpy calls: a long history has a few chunks of each of many arrays in each of many logs."""
    by_rank: dict[int, list[tuple[Part[Coords], npt.NDArray[np.int64]]]] = {}
    """By rank the parts, each with its number of coordinates of each array."""
    ranks: dict[NodeId, int] = {}
    for chunks in changes:
        if len(chunks.parts) > 1 and len(chunks) < sum(len(part.nodes) for part in chunks.parts):
            # Others may have written coordinates of several ranks for one array: those of one of them count.
            chunks = grouped_coords(dict(chunks))
        for part in chunks.parts:
            if len(part.rows):
                rank: int = part.rows.shape[1]
                counts = part.edges[1:] - part.edges[:-1]
                by_rank.setdefault(rank, []).append((part, counts))
                ranks.update(dict.fromkeys(compress(part.nodes, counts.tolist()), rank))
    found: dict[NodeId, Coords] = {}
    for rank, parts in by_rank.items():
        own = [node for node, last in ranks.items() if last == rank]
        numbers = {node: number for number, node in enumerate(own)}
        nodes = chain.from_iterable(part.nodes for part, _ in parts)
        of_entry = np.fromiter(map(numbers.get, nodes, repeat(-1)), np.int64)
        owner = np.repeat(of_entry, np.concatenate([counts for _, counts in parts]))
        rows = np.concatenate([part.rows for part, _ in parts])
        if len(by_rank) > 1:
            rows, owner = rows[owner >= 0], owner[owner >= 0]
        order = sort_last(np.column_stack([owner.astype(np.uint32), rows]))
        if order is not None:
            rows, owner = rows[order], owner[order]
        edges = np.searchsorted(owner, np.arange(len(own) + 1)).tolist()
        found.update((node, rows[first:last]) for node, (first, last) in zip(own, pairwise(edges), strict=True))
    return found


def _merged(parts: list[npt.NDArray[np.uint32]]) -> npt.NDArray[np.uint32]:
    # An array may have changed its rank; only coordinates of its present rank are kept.
    rank = parts[-1].shape[1]
    coords = np.concatenate([p for p in parts if p.shape[1] == rank])
    order = sort_last(coords)
    return coords if order is None else coords[order]
