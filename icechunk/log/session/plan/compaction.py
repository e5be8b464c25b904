"""The step from a session's fold to the files of a commit: manifests, snapshot, transaction log.

`plan` decides, without any I/O, which manifests must be read; `new_manifests` builds the new ones
from them and from the log, one at a time; `new_snapshot` combines them, once they have been encoded, with
those that stay. Only changed manifests are rewritten: a manifest without changes stays, and a manifest that
also holds references of other arrays stays in use for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.format.by_node import ByNode, Part
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.manifest.refs_by_node import grouped_refs, refs_by_node
from icechunk.format.snapshot.node_region import used_manifests
from icechunk.format.snapshot.nodes import SnapshotNodes
from icechunk.format.values import (
    ChunkRefs,
    Extents,
    Json,
    Manifest,
    ManifestFile,
    ManifestRef,
    NodeKind,
    NodeSnapshot,
    Snapshot,
)
from icechunk.log.session.array_fold import FEW_ROWS, Rows, in_view
from icechunk.log.session.extents import bounds
from icechunk.log.session.log import SessionLog
from icechunk.log.session.merge.diff import NetChanges
from icechunk.log.session.plan.manifest_rows import ArrayPlan, pieces
from icechunk.log.session.plan.small_arrays import Batch, boxes_of, cut, merged, plan_batches
from icechunk.log.session.plan.tiles import Tile, TilePolicy, plan_anew, plan_grid, plan_tiles
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["EVERYTHING", "Placed", "Plan", "Policy", "new_manifests", "new_snapshot", "placed", "plan"]

TileShape: TypeAlias = Callable[[NodeSnapshot], tuple[int, ...] | None]
Alike: TypeAlias = dict[tuple[tuple[int, ...], int, bytes, int, bytes], tuple[tuple[ManifestRef, ...], list[Tile]]]
"""The manifests and the tiles of the last array of some grid in which some coordinates are written and deleted: nothing
else decides the tiles. The variables of a dataset are often changed at the same places, and are then planned once."""

EVERYTHING: Final = 2**32 - 1
"""Tile length, in chunks, along a dimension that no configuration splits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Rules for the layout of references in manifests."""

    max_refs_per_manifest: int = 65_536
    """Largest number of references of one array in one manifest, and of all arrays in a shared one; tiles are cut to
    it."""
    share_below_refs: int = 4_096
    """Tiles with fewer references share manifests with those of other arrays; with 0, or configured splitting, no tile
    shares a manifest."""
    fan_in: int = 8
    """Number of small neighbouring tiles of an array that merge into one."""
    tile_shape: TileShape | None = None
    """Configured splitting: number of chunks of an array's tiles along each dimension; None for an array that is laid
    out automatically."""

    @staticmethod
    def explicit(tile_shape: TileShape | None = None) -> Policy:
        """The layout of the official library: one array per manifest, and one manifest per array unless split by
        configuration."""

        def shape(node: NodeSnapshot) -> tuple[int, ...]:
            own = None if tile_shape is None else tile_shape(node)
            return (EVERYTHING,) * len(node.shape) if own is None else own

        return Policy(share_below_refs=0, tile_shape=shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """The files that a commit will write, and the manifests that it must read for them."""

    base: Snapshot
    """The snapshot that the session is based on."""
    nodes: Mapping[str, NodeSnapshot]
    """All current nodes, in ascending order of path, still with the base's manifests."""
    arrays: tuple[ArrayPlan, ...]
    """Arrays whose references change, in ascending order of path, except those in the batches."""
    batches: tuple[Batch, ...]
    """Small arrays whose references change."""
    changes: NetChanges
    """Changes that the transaction log lists."""
    policy: Policy
    """The policy of this plan."""
    manifests_to_read: tuple[ObjectId, ...]
    """Ids, ascending, of the manifests whose references the plan needs."""

    @property
    def num_rows(self) -> int:
        """Number of references that it writes, without those that are in manifests already."""
        written = sum(len(array.written) for array in self.arrays)
        return written + sum(len(batch.rows.rows) for batch in self.batches)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placed:
    """The data of a new manifest that a snapshot holds."""

    file: ManifestFile
    extents: Mapping[NodeId, Extents]
    """Bounding boxes of the references of each of its arrays."""


def plan(log: SessionLog, policy: Policy, *, everything: bool = False) -> Plan:
    """Decide which manifests to rewrite.

    The cost is proportional to the nodes of the hierarchy, the log's rows and the changed arrays' manifests.

    Parameters
    ----------
    everything
        Rewrite the manifests of all arrays, in the layout that the policy gives to a new repository.
    """
    rows = log.rows()
    changes = log.net_changes(rows)
    nodes = log.hierarchy()
    batches: list[Batch] = []
    done: frozenset[NodeId] = frozenset()
    limit = min(FEW_ROWS, policy.share_below_refs - 1, policy.max_refs_per_manifest)
    if policy.tile_shape is None and not everything and limit > 0:
        batches, done = plan_batches(rows, limit)
    resized = {node.id for node in changes.updated}
    wanted = (resized | rows.nodes.keys()) - done
    arrays = []
    # Every node in the wanted set is one that the log touches, so no others are decoded to find them.
    touched = {node.path: node for node in (*changes.updated, *rows.nodes.values()) if node.id in wanted}
    alike: Alike = {}
    for node in nodes.values() if everything else [touched[path] for path in sorted(touched)]:
        if node.kind != NodeKind.ARRAY:
            continue
        small = rows.small.get(node.id)
        if small is None:
            written, deleted = log.overlay_rows(node)
        else:
            written, deleted = in_view(small, [dimension.num_chunks for dimension in node.shape])
        array = _plan_array(node, log.base.manifest_files, written, deleted, policy, alike, everything=everything)
        if len(array.tiles) != len(node.manifests) or any(tile.dirty for tile in array.tiles):
            arrays.append(array)
    needed = {s.object_id for array in arrays for tile in array.tiles if tile.dirty for s in tile.sources}
    needed.update(source for batch in batches for source in batch.sources if source is not None)
    return Plan(
        base=log.base,
        nodes=nodes,
        arrays=tuple(arrays),
        batches=tuple(batches),
        changes=changes,
        policy=policy,
        manifests_to_read=tuple(sorted(needed)),
    )


def _plan_array(
    node: NodeSnapshot,
    files: Mapping[ObjectId, ManifestFile],
    written: Rows,
    deleted: npt.NDArray[np.uint32],
    policy: Policy,
    alike: Alike,
    *,
    everything: bool,
) -> ArrayPlan:
    grid = [dimension.num_chunks for dimension in node.shape]
    shape = None if policy.tile_shape is None else policy.tile_shape(node)
    if everything:
        tiles = plan_anew(node.manifests, files, grid, written.coords, deleted)
    elif shape is None:
        limits = TilePolicy(max_refs=policy.max_refs_per_manifest, fan_in=policy.fan_in)
        if len(written) + len(deleted) > FEW_ROWS:
            tiles = plan_tiles(node.manifests, files, grid, written.coords, deleted, limits)
        else:
            key = tuple(grid), len(deleted), deleted.tobytes(), len(written), written.coords.tobytes()
            known = alike.get(key)
            if known is None or known[0] != node.manifests:
                tiles = plan_tiles(node.manifests, files, grid, written.coords, deleted, limits)
                known = alike[key] = node.manifests, tiles
            tiles = known[1]
    else:
        tiles = plan_grid(node.manifests, files, grid, written.coords, deleted, shape)
    return ArrayPlan(node=node, tiles=tuple(tiles), written=written, deleted=deleted, tile_shape=shape, anew=everything)


def new_manifests(
    plan: Plan, manifests: Mapping[ObjectId, Manifest], new_object_id: Callable[[], ObjectId]
) -> Iterator[Manifest]:
    """The new manifests, one at a time, each made when the iterator requests it and not kept here.

    Parameters
    ----------
    manifests
        At least `Plan.manifests_to_read`.
    new_object_id
        Source of their ids.

    Raises
    ------
    FormatError
        If a manifest lacks the array that the base says it holds.
    """
    packer = _Packer(plan.policy, new_object_id)
    most = plan.policy.max_refs_per_manifest
    for batch in plan.batches:
        part = merged(batch, manifests)
        if part is not None:
            yield from packer.add_many(part)
    for array in plan.arrays:
        for piece in pieces(array, manifests, most):
            yield from packer.add(array.node.id, piece, alone=array.tile_shape is not None)
    yield from packer.close()


def placed(manifest: Manifest, size_bytes: int) -> Placed:
    """The entry of a snapshot for a new manifest whose encoded size is ``size_bytes``."""
    arrays = manifest.arrays
    if isinstance(arrays, ByNode):
        found = {node_id: box for part in arrays.parts for node_id, box in zip(part.nodes, boxes_of(part), strict=True)}
        extents: Mapping[NodeId, Extents] = {node_id: found[node_id] for node_id in arrays}
    else:
        extents = {node_id: bounds(refs.coords) for node_id, refs in arrays.items()}
    return Placed(file=ManifestFile(manifest.id, size_bytes, manifest.num_chunk_refs), extents=extents)


def new_snapshot(
    plan: Plan,
    new: Iterable[Placed],
    *,
    snapshot_id: ObjectId,
    parent_id: ObjectId | None,
    flushed_at_us: int,
    message: str,
    metadata: Mapping[str, Json],
) -> Snapshot:
    """The snapshot of the new manifests and of those that stay.

    Parameters
    ----------
    new
        All that `new_manifests` returns, in any order; or others that hold the same references.
    parent_id
        Stored in format 1 only; pass None otherwise.
    flushed_at_us
        µs since the epoch.
    """
    kept: dict[NodeId, list[ManifestRef]] = {}
    for array in plan.arrays:
        refs = kept[array.node.id] = []
        for tile in array.tiles:
            if not tile.dirty:
                refs.extend(tile.sources)
    files: dict[ObjectId, ManifestFile] = {}
    alone: dict[NodeId, tuple[ManifestRef, ...]] = {}
    for manifest in new:
        id = manifest.file.object_id
        files[id] = manifest.file
        # Small arrays often have the same box: thousands then share one tuple.
        known: dict[Extents, tuple[ManifestRef, ...]] = {}
        for node_id, extents in manifest.extents.items():
            refs_of = known.get(extents)
            if refs_of is None:
                refs_of = known[extents] = (ManifestRef(id, extents),)
            if (several := kept.get(node_id)) is None:
                alone[node_id] = refs_of
            else:
                several += refs_of
    placed_nodes: dict[str, NodeSnapshot] = {}
    for array in plan.arrays:
        placed_nodes[array.node.path] = array.node.with_manifests(tuple(sorted(kept[array.node.id], key=_by_extents)))
    for batch in plan.batches:
        for node in batch.nodes:
            placed_nodes[node.path] = node.with_manifests(alone.get(node.id, ()))
    if isinstance(plan.nodes, SnapshotNodes):
        nodes: Mapping[str, NodeSnapshot] = plan.nodes.changed(placed_nodes)
    else:
        nodes = {**plan.nodes, **placed_nodes}
    return Snapshot(
        id=snapshot_id,
        parent_id=parent_id,
        nodes=nodes,
        flushed_at_us=flushed_at_us,
        message=message,
        metadata=metadata,
        manifest_files=_files(nodes, plan.base.manifest_files, files),
    )


class _Packer:
    """Puts pieces into manifests.

    A manifest holds an array at most once, so the j-th small piece of each array goes into the j-th *stream* of
    shared manifests.
    """

    def __init__(self, policy: Policy, new_object_id: Callable[[], ObjectId]) -> None:
        self._policy = policy
        self._new_object_id = new_object_id
        self._streams: list[_Stream] = []
        self._ordinals: dict[NodeId, int] = {}

    def add(self, node_id: NodeId, refs: ChunkRefs, *, alone: bool) -> Iterator[Manifest]:
        """Add a piece, which is not empty; with ``alone``, to a manifest of its own. Returns the manifest that becomes
        full."""
        if alone or len(refs) >= self._policy.share_below_refs:
            yield Manifest(id=self._new_object_id(), arrays={node_id: refs})
            return
        j = self._ordinals.get(node_id, 0)
        self._ordinals[node_id] = j + 1
        if j == len(self._streams):
            self._streams.append(_Stream())
        stream = self._streams[j]
        if stream.size and stream.size + len(refs) > self._policy.max_refs_per_manifest:
            yield self._emptied(stream)
        stream.arrays[node_id] = refs
        stream.size += len(refs)

    def add_many(self, part: Part[ChunkRefs]) -> Iterator[Manifest]:
        """Add the only pieces of many arrays, each smaller than a manifest. Returns the manifests that become full."""
        if not self._streams:
            self._streams.append(_Stream())
        stream, edges, first = self._streams[0], part.edges, 0
        while first < len(part.nodes):
            room = self._policy.max_refs_per_manifest - stream.size
            last = int(np.searchsorted(edges, edges[first] + room, side="right")) - 1
            if last == first:
                yield self._emptied(stream)
                continue
            stream.parts.append(cut(part, first, last))
            stream.size += int(edges[last] - edges[first])
            first = last

    def close(self) -> Iterator[Manifest]:
        """The manifests that are not full."""
        while self._streams:
            yield self._emptied(self._streams.pop(0))

    def _emptied(self, stream: _Stream) -> Manifest:
        arrays: Mapping[NodeId, ChunkRefs] = {i: stream.arrays[i] for i in sorted(stream.arrays)}
        if stream.parts:
            arrays = refs_by_node([*stream.parts, *grouped_refs(arrays).parts])
        stream.arrays, stream.parts, stream.size = {}, [], 0
        return Manifest(id=self._new_object_id(), arrays=arrays)


@dataclass(slots=True, eq=False)
class _Stream:
    """A manifest that is being filled."""

    arrays: dict[NodeId, ChunkRefs] = field(default_factory=dict)
    parts: list[Part[ChunkRefs]] = field(default_factory=list)
    """References of other arrays."""
    size: int = 0
    """Number of references of all arrays in it."""


def _files(
    nodes: Mapping[str, NodeSnapshot], base: Mapping[ObjectId, ManifestFile], new: Mapping[ObjectId, ManifestFile]
) -> dict[ObjectId, ManifestFile]:
    return {i: new[i] if i in new else base[i] for i in used_manifests(nodes)}


def _by_extents(ref: ManifestRef) -> tuple[tuple[int, int], ...]:
    return ref.extents
