"""Real, tiny files for the simulator: what a commit uploads, and whether all that history needs is still there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter

import numpy as np

from icechunk.format.ids import FIRST_SNAPSHOT, NodeId, ObjectId
from icechunk.format.keys import chunk_key, manifest_key, snapshot_key, transaction_key
from icechunk.format.manifest import decode_manifest, encode_manifest
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.format.snapshot.codec import decode_snapshot, encode_snapshot
from icechunk.format.transaction import encode_transaction_log
from icechunk.format.values import (
    NATIVE,
    ChunkRefs,
    DimensionShape,
    Manifest,
    ManifestFile,
    ManifestRef,
    NodeKind,
    NodeSnapshot,
    Snapshot,
    TransactionLog,
)
from icechunk.log.repository.state import RepoState

__all__ = ["CommitFiles", "bare_snapshot", "commit_files", "missing_files"]

_METADATA = (
    b'{"zarr_format":3,"node_type":"array","shape":[1],"data_type":"uint8","fill_value":0,"codecs":[{"name":"bytes"}],'
    b'"chunk_grid":{"name":"regular","configuration":{"chunk_shape":[1]}},"chunk_key_encoding":{"name":"default"}}'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitFiles:
    """The files of one commit."""

    manifest: ManifestFile
    """Its own; those of its parent that it keeps are in the snapshot besides."""
    files: tuple[tuple[str, bytes], ...]
    """Key and bytes, in an order in which they may be written."""


def bare_snapshot(record: SnapshotRecord, *, spec_version: int) -> bytes:
    """The file of a snapshot without any nodes."""
    return encode_snapshot(_document(record, ()), spec_version)


def _document(record: SnapshotRecord, files: Iterable[ManifestFile]) -> Snapshot:
    used = {file.object_id: file for file in files}
    return Snapshot(
        id=record.id,
        nodes={node.path: node for node in sorted(map(_array_of, used), key=attrgetter("path"))},
        flushed_at_us=record.flushed_at_us,
        message=record.message,
        parent_id=record.parent,
        manifest_files=used,
    )


def _array_of(manifest: ObjectId) -> NodeSnapshot:
    """The array whose only chunk a manifest refers to."""
    return NodeSnapshot(
        id=NodeId(manifest[:8]),
        path=f"/{manifest.hex()}",
        kind=NodeKind.ARRAY,
        user_data=_METADATA,
        shape=(DimensionShape(1, 1),),
        manifests=(ManifestRef(manifest, ((0, 1),)),),
    )


def commit_files(
    record: SnapshotRecord,
    *,
    manifest: ObjectId,
    chunk: ObjectId,
    inherited: Iterable[ManifestFile],
    spec_version: int,
) -> CommitFiles:
    """The files of a snapshot that adds an array of one chunk, and keeps some of its parent's.

    Parameters
    ----------
    manifest, chunk
        New ids.
    """
    refs = ChunkRefs(
        coords=np.zeros((1, 1), np.uint32),
        kind=np.full(1, NATIVE, np.uint8),
        offset=np.zeros(1, np.uint64),
        length=np.full(1, 5, np.uint64),
        chunk_id=np.frombuffer(chunk, "V12"),
        location=np.full(1, -1, np.int32),
    )
    data = encode_manifest(Manifest(id=manifest, arrays={_array_of(manifest).id: refs}), spec_version)
    own = ManifestFile(manifest, len(data), 1)
    changes = encode_transaction_log(TransactionLog(id=record.id), spec_version)
    return CommitFiles(
        manifest=own,
        files=(
            (chunk_key(chunk), b"chunk"),
            (manifest_key(manifest), data),
            (transaction_key(record.id), changes),
            (snapshot_key(record.id), encode_snapshot(_document(record, (own, *inherited)), spec_version)),
        ),
    )


def missing_files(state: RepoState, objects: Mapping[str, bytes]) -> list[tuple[ObjectId, str]]:
    """Files that the graph needs and the store lacks: the snapshot that needs each, and its key."""
    missing: list[tuple[ObjectId, str]] = []
    for record in state.snapshots.values():
        if record.id == FIRST_SNAPSHOT:
            continue
        wanted = [snapshot_key(record.id)]
        wanted += [transaction_key(id) for id in (record.id, *record.pruned_ancestor_tx_logs)]
        if snapshot_key(record.id) in objects:
            for key in _manifests_of(objects[snapshot_key(record.id)]):
                wanted.append(key)
                if key in objects:
                    wanted += _chunks_of(objects[key])
        missing += [(record.id, key) for key in wanted if key not in objects]
    return missing


@lru_cache(maxsize=4096)
def _manifests_of(snapshot: bytes) -> tuple[str, ...]:
    return tuple(manifest_key(id) for id in decode_snapshot(snapshot).manifest_files)


@lru_cache(maxsize=4096)
def _chunks_of(manifest: bytes) -> tuple[str, ...]:
    arrays = decode_manifest(manifest).arrays.values()
    return tuple(chunk_key(ObjectId(id.tobytes())) for refs in arrays for id in refs.chunk_id[refs.kind == NATIVE])
