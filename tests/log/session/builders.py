"""Zarr documents, references and commits in memory, for the tests of the session log."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from icechunk.format.ids import FIRST_SNAPSHOT, NodeId, ObjectId
from icechunk.format.values import (
    NATIVE,
    ChunkRef,
    ChunkRefs,
    Manifest,
    ManifestFile,
    NodeSnapshot,
    Snapshot,
    TransactionLog,
)
from icechunk.log.session.columns import find
from icechunk.log.session.log import ABSENT, IN_BASE, SessionLog
from icechunk.log.session.plan.compaction import Plan, Policy, new_manifests, new_snapshot, placed, plan
from icechunk.log.session.plan.reuse import Earlier

GROUP = b'{"zarr_format":3,"node_type":"group","attributes":{}}'
EMPTY = Snapshot(id=FIRST_SNAPSHOT, flushed_at_us=1, message="Repository initialized")


def array_json(shape: Sequence[int], chunks: Sequence[int] | None = None, **attributes: object) -> bytes:
    return json.dumps(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": "int32",
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [1] * len(shape) if chunks is None else list(chunks)},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "attributes": attributes,
        }
    ).encode()


def group_json(**attributes: object) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def counter(size: int) -> Callable[[], bytes]:
    """Ids whose order is not the order of their making."""
    numbers = itertools.count(1)
    return lambda: (next(numbers) * 0x9E3779B1 % 2**32).to_bytes(4) + bytes(size - 4)


def object_id(n: int) -> ObjectId:
    return ObjectId(n.to_bytes(12))


def native(coords: np.ndarray, first: int = 1) -> ChunkRefs:
    n = len(coords)
    ids = b"".join(object_id(first + i) for i in range(n))
    return ChunkRefs(
        coords=np.asarray(coords, np.uint32),
        kind=np.full(n, NATIVE, np.uint8),
        offset=np.zeros(n, np.uint64),
        length=np.full(n, 7, np.uint64),
        chunk_id=np.frombuffer(ids, "V12") if n else np.empty(0, "V12"),
        location=np.full(n, -1, np.int32),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compaction:
    """The files of a commit, all at once."""

    snapshot: Snapshot
    manifests: tuple[Manifest, ...]
    transaction: TransactionLog


def compacted(
    planned: Plan,
    manifests: Mapping[ObjectId, Manifest],
    new_object_id: Callable[[], ObjectId],
    earlier: Earlier | None = None,
) -> Compaction:
    """The manifests that a commit of the plan makes, without those that existed before."""
    new, places = [], []
    for manifest in new_manifests(planned, manifests, new_object_id):
        known = None if earlier is None else earlier.find(manifest)
        places.append(placed(manifest, 100 + manifest.num_chunk_refs) if known is None else known)
        if known is None:
            new.append(manifest)
    snapshot = new_snapshot(
        planned,
        places,
        snapshot_id=new_object_id(),
        parent_id=None,
        flushed_at_us=planned.base.flushed_at_us + 1,
        message="m",
        metadata={},
    )
    return Compaction(snapshot=snapshot, manifests=tuple(new), transaction=planned.changes.transaction(snapshot.id))


class Repo:
    """Snapshots and manifests in dicts, and how much every commit read and wrote."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.new_node_id: Callable[[], NodeId] = counter(8)  # type: ignore[assignment]
        self.new_object_id: Callable[[], ObjectId] = counter(12)  # type: ignore[assignment]
        self.manifests: dict[ObjectId, Manifest] = {}
        self.snapshot = EMPTY
        self.read: tuple[ObjectId, ...] = ()
        self.written_refs = 0
        self.last: Compaction | None = None

    def log(self) -> SessionLog:
        return SessionLog(self.snapshot, self.new_node_id)

    def commit(self, log: SessionLog) -> Compaction:
        planned = plan(log, self.policy)
        self.read = planned.manifests_to_read
        done = compacted(planned, {i: self.manifests[i] for i in self.read}, self.new_object_id)
        self.snapshot = done.snapshot
        self.manifests.update({m.id: m for m in done.manifests})
        self.written_refs += sum(m.num_chunk_refs for m in done.manifests)
        self.last = done
        return done

    def committed(self, node: NodeSnapshot, coords: tuple[int, ...]) -> ChunkRef | None:
        for ref in node.manifests:
            if all(a <= c < b for c, (a, b) in zip(coords, ref.extents, strict=True)):
                return find(self.manifests[ref.object_id].arrays[node.id], coords)
        return None

    def chunk(self, log: SessionLog, node: NodeSnapshot, coords: tuple[int, ...]) -> ChunkRef | None:
        found = log.chunk(node, coords)
        if found is ABSENT:
            return None
        return self.committed(node, coords) if found is IN_BASE else found


def check_snapshot(repo: Repo) -> int:
    """Everything a snapshot and its manifests must satisfy; the number of references it holds."""
    snapshot = repo.snapshot
    total = 0
    assert list(snapshot.nodes) == sorted(snapshot.nodes, key=str.encode)
    used = set()
    for path, node in snapshot.nodes.items():
        assert node.path == path
        for i, ref in enumerate(node.manifests):
            used.add(ref.object_id)
            refs = repo.manifests[ref.object_id].arrays[node.id]
            assert len(refs)
            low, high = refs.coords.min(axis=0).tolist(), refs.coords.max(axis=0).tolist()
            assert ref.extents == tuple((a, b + 1) for a, b in zip(low, high, strict=True))
            assert all(b < d.num_chunks for b, d in zip(high, node.shape, strict=True))
            rows = refs.coords.tolist()
            assert all(a < b for a, b in itertools.pairwise(rows))
            total += len(refs)
            for other in node.manifests[:i]:
                assert ref.object_id != other.object_id
                assert any(b <= c or d <= a for (a, b), (c, d) in zip(ref.extents, other.extents, strict=True)), (
                    "extents overlap"
                )
    assert list(snapshot.manifest_files) == sorted(used)
    for id, file in snapshot.manifest_files.items():
        manifest = repo.manifests[id]
        assert file == ManifestFile(id, 100 + manifest.num_chunk_refs, manifest.num_chunk_refs)
        assert list(manifest.arrays) == sorted(manifest.arrays)
    return total
