"""From a session's fold to the files of a commit: manifests, snapshot, transaction log.

`plan` decides, without any I/O, which manifests must be read; `compact` builds the new ones from
them and from the log; `finish` fills in the sizes once they have been encoded. Only what changed is
touched: a manifest that no changed array needs rewritten stays, and one that serves other arrays
too goes on serving them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.tables import (
    ChunkRefs,
    Json,
    Manifest,
    ManifestFile,
    ManifestRef,
    NodeKind,
    NodeSnapshot,
    Snapshot,
    TransactionLog,
)
from icechunk.log.batches import pieces_of_small
from icechunk.log.boxes import bounds
from icechunk.log.changes import NetChanges
from icechunk.log.pieces import ArrayPlan, pieces
from icechunk.log.session_log import SessionLog
from icechunk.log.tiles import TilePolicy, plan_anew, plan_grid, plan_tiles

__all__ = ["EVERYTHING", "Compaction", "Plan", "Policy", "compact", "finish", "plan"]

TileShape: TypeAlias = Callable[[NodeSnapshot], tuple[int, ...] | None]

EVERYTHING: Final = 2**32 - 1
"""Chunks along a dimension that no configuration splits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How references are laid out in manifests."""

    max_refs_per_manifest: int = 65_536
    """References of one array in one manifest, and of all arrays in a shared one; tiles are cut to it."""
    share_below_refs: int = 4_096
    """Tiles with fewer references share manifests with those of other arrays; 0, and with configured splitting: none
    does."""
    fan_in: int = 8
    """So many small neighbours of an array merge into one."""
    tile_shape: TileShape | None = None
    """Configured splitting: chunks along each dimension of an array's tiles; None for an array that is laid out
    automatically."""

    @staticmethod
    def explicit(tile_shape: TileShape | None = None) -> Policy:
        """What the official library does: one array per manifest, and one manifest per array unless split by
        configuration."""

        def shape(node: NodeSnapshot) -> tuple[int, ...]:
            own = None if tile_shape is None else tile_shape(node)
            return (EVERYTHING,) * len(node.shape) if own is None else own

        return Policy(share_below_refs=0, tile_shape=shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What a commit will do, and what it must read for it."""

    base: Snapshot
    """What the session stands on."""
    nodes: Mapping[str, NodeSnapshot]
    """All nodes now, in ascending order of path, still with the base's manifests."""
    arrays: tuple[ArrayPlan, ...]
    """Arrays whose references change, in ascending order of path."""
    changes: NetChanges
    """For the transaction log."""
    policy: Policy
    """By which it was made."""
    manifests_to_read: tuple[ObjectId, ...]
    """Ascending."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compaction:
    """The files of a commit."""

    snapshot: Snapshot
    """New manifests have ``size_bytes`` 0 until `finish`."""
    manifests: tuple[Manifest, ...]
    """New ones only, in ascending order of id."""
    transaction: TransactionLog
    """What changed."""


def plan(log: SessionLog, policy: Policy, *, everything: bool = False) -> Plan:
    """Decide what to rewrite.

    Cost is in proportion to the nodes of the hierarchy, the log's rows and the changed arrays' manifests.

    Parameters
    ----------
    everything
        Rewrite the manifests of all arrays, as the policy would lay them out from the start.
    """
    changes = log.net_changes()
    nodes = {node.path: node for node in log.nodes()}
    touched = log.touched_arrays()
    resized = {node.id for node in changes.updated}
    arrays = []
    for node in nodes.values():
        if node.kind != NodeKind.ARRAY or not (everything or node.id in touched or node.id in resized):
            continue
        written, deleted = log.overlay(node)
        array = _plan_array(node, log.base.manifest_files, written, deleted, policy, everything=everything)
        if len(array.tiles) != len(node.manifests) or any(tile.dirty for tile in array.tiles):
            arrays.append(array)
    needed = {s.object_id for array in arrays for tile in array.tiles if tile.dirty for s in tile.sources}
    return Plan(
        base=log.base,
        nodes=nodes,
        arrays=tuple(arrays),
        changes=changes,
        policy=policy,
        manifests_to_read=tuple(sorted(needed)),
    )


def _plan_array(
    node: NodeSnapshot,
    files: Mapping[ObjectId, ManifestFile],
    written: ChunkRefs,
    deleted: npt.NDArray[np.uint32],
    policy: Policy,
    *,
    everything: bool,
) -> ArrayPlan:
    grid = [dimension.num_chunks for dimension in node.shape]
    shape = None if policy.tile_shape is None else policy.tile_shape(node)
    if everything:
        tiles = plan_anew(node.manifests, files, grid, written.coords, deleted)
    elif shape is None:
        limits = TilePolicy(max_refs=policy.max_refs_per_manifest, fan_in=policy.fan_in)
        tiles = plan_tiles(node.manifests, files, grid, written.coords, deleted, limits)
    else:
        tiles = plan_grid(node.manifests, files, grid, written.coords, deleted, shape)
    return ArrayPlan(node=node, tiles=tuple(tiles), written=written, deleted=deleted, tile_shape=shape, anew=everything)


def compact(
    plan: Plan,
    manifests: Mapping[ObjectId, Manifest],
    *,
    snapshot_id: ObjectId,
    parent_id: ObjectId | None,
    flushed_at_us: int,
    message: str,
    metadata: Mapping[str, Json],
    new_object_id: Callable[[], ObjectId],
) -> Compaction:
    """Build the files.

    Parameters
    ----------
    manifests
        At least `Plan.manifests_to_read`.
    parent_id
        Stored in format 1 only; pass None otherwise.
    flushed_at_us
        µs since the epoch.
    new_object_id
        Source of ids of the new manifests.

    Raises
    ------
    FormatError
        If a manifest lacks the array that the base says it holds.
    """
    packer = _Packer(plan.policy, new_object_id)
    kept: dict[NodeId, list[ManifestRef]] = {}
    most = plan.policy.max_refs_per_manifest
    small = pieces_of_small(plan.arrays, manifests, most)
    for array in plan.arrays:
        refs: list[ManifestRef] = []
        kept[array.node.id] = refs
        for tile in array.tiles:
            if not tile.dirty:
                refs.extend(tile.sources)
        ready = small.get(array.node.id)
        own = pieces(array, manifests, most) if ready is None else [ready] if len(ready) else []
        for piece in own:
            packer.add(array.node.id, piece, alone=array.tile_shape is not None)
    new = packer.close()
    for node_id, refs in packer.placed.items():
        kept[node_id] += refs
    nodes = dict(plan.nodes)
    for array in plan.arrays:
        refs = sorted(kept[array.node.id], key=_by_extents)
        nodes[array.node.path] = replace(array.node, manifests=tuple(refs))
    snapshot = Snapshot(
        id=snapshot_id,
        parent_id=parent_id,
        nodes=nodes,
        flushed_at_us=flushed_at_us,
        message=message,
        metadata=metadata,
        manifest_files=_files(nodes.values(), plan.base.manifest_files, new),
    )
    return Compaction(snapshot=snapshot, manifests=new, transaction=plan.changes.transaction(snapshot_id))


def finish(compaction: Compaction, sizes: Mapping[ObjectId, int]) -> Snapshot:
    """The snapshot with the sizes of its new manifests.

    Parameters
    ----------
    sizes
        Bytes of each encoded new manifest.
    """
    files = {
        i: file._replace(size_bytes=sizes[i]) if i in sizes else file
        for i, file in compaction.snapshot.manifest_files.items()
    }
    return replace(compaction.snapshot, manifest_files=files)


class _Packer:
    """Puts pieces into manifests.

    A manifest holds an array at most once, so the j-th small piece of each array goes into the j-th *stream* of
    shared manifests.
    """

    def __init__(self, policy: Policy, new_object_id: Callable[[], ObjectId]) -> None:
        self._policy = policy
        self._new_object_id = new_object_id
        self._done: list[Manifest] = []
        self._streams: list[dict[NodeId, ChunkRefs]] = []
        self._sizes: list[int] = []
        self._ordinals: dict[NodeId, int] = {}
        self.placed: dict[NodeId, list[ManifestRef]] = {}
        """Where the pieces are; complete after `close`."""

    def add(self, node_id: NodeId, refs: ChunkRefs, *, alone: bool) -> None:
        """Place a piece, not empty; ``alone``: in a manifest of its own."""
        if alone or len(refs) >= self._policy.share_below_refs:
            self._write({node_id: refs})
            return
        j = self._ordinals.get(node_id, 0)
        self._ordinals[node_id] = j + 1
        if j == len(self._streams):
            self._streams.append({})
            self._sizes.append(0)
        if self._streams[j] and self._sizes[j] + len(refs) > self._policy.max_refs_per_manifest:
            self._write(self._streams[j])
            self._streams[j], self._sizes[j] = {}, 0
        self._streams[j][node_id] = refs
        self._sizes[j] += len(refs)

    def close(self) -> tuple[Manifest, ...]:
        """Write what is open; all manifests, in ascending order of id."""
        for stream in self._streams:
            if stream:
                self._write(stream)
        self._streams = []
        return tuple(sorted(self._done, key=_by_id))

    def _write(self, arrays: Mapping[NodeId, ChunkRefs]) -> None:
        manifest = Manifest(id=self._new_object_id(), arrays={i: arrays[i] for i in sorted(arrays)})
        self._done.append(manifest)
        for node_id, refs in arrays.items():
            self.placed.setdefault(node_id, []).append(ManifestRef(manifest.id, bounds(refs.coords)))


def _files(
    nodes: Iterable[NodeSnapshot], base: Mapping[ObjectId, ManifestFile], new: Sequence[Manifest]
) -> dict[ObjectId, ManifestFile]:
    used = {ref.object_id for node in nodes for ref in node.manifests}
    fresh = {m.id: ManifestFile(m.id, 0, m.num_chunk_refs) for m in new}
    return {i: fresh[i] if i in fresh else base[i] for i in sorted(used)}


def _by_extents(ref: ManifestRef) -> tuple[tuple[int, int], ...]:
    return ref.extents


def _by_id(manifest: Manifest) -> ObjectId:
    return manifest.id
