"""Descriptions of snapshots, manifests, transaction logs and the ``repo`` object as plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, TypeAlias, assert_never

import numpy as np

from icechunk.format.envelope import FileHeader, FileType, read_header
from icechunk.format.ids import NodeId, ObjectId, encode_id
from icechunk.format.manifest import decode_manifest
from icechunk.format.manifest.tables import manifest_facts
from icechunk.format.repo import repo_info as stored
from icechunk.format.repo.repo_info import RepoInfo, SnapshotRecord, Update, UpdateChange
from icechunk.format.snapshot.codec import decode_snapshot
from icechunk.format.transaction import decode_transaction_log
from icechunk.format.values import INLINE, NATIVE, VIRTUAL, ChunkRefs, NodeKind, NodeSnapshot, TransactionLog
from icechunk.log.session.merge.diff import combined
from icechunk.runtime.clock import moment

__all__ = [
    "Json",
    "describe_collapsed_log",
    "describe_header",
    "describe_manifest",
    "describe_repo_info",
    "describe_snapshot",
    "describe_transaction_log",
    "json_value",
    "timestamp",
]

Json: TypeAlias = dict[str, Any]


def timestamp(us: int) -> str:
    """µs since the epoch as text in UTC, with as many decimals of the second as are needed: none, three or six."""
    precision = "microseconds" if us % 1000 else "milliseconds" if us % 1_000_000 else "seconds"
    return moment(us).replace(tzinfo=None).isoformat(timespec=precision) + "Z"


def json_value(value: Any) -> Any:
    """A stored value as one that JSON can express: NaN and infinity become None, bytes become hexadecimal text."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case bytes():
            return value.hex()
        case dict():
            return {str(key): json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [json_value(item) for item in value]
        case _:
            return value


def describe_header(header: FileHeader) -> Json:
    """The binary header of a metadata file."""
    # At the first dash: the versions of pre-releases have dashes of their own.
    name, _, version = header.written_by.partition("-")
    return {
        "written_by": header.written_by,
        "app_name": name,
        "app_version": version,
        "spec_version": spec_version(header.spec_version),
        "file_type": header.file_type.name.lower().replace("_", "-"),
        "compression": "zstd",
    }


def spec_version(number: int) -> str:
    """A version of the format as the official library writes it."""
    return f"{number}.0"


def describe_snapshot(data: bytes, id: ObjectId) -> Json:
    """The whole file of a snapshot: its nodes, in the order of their paths, and the manifests that they refer to.

    Raises `FormatError` where it is none, or another one.
    """
    snapshot = decode_snapshot(data, expected_id=id)
    return {
        "id": encode_id(snapshot.id),
        "header": describe_header(read_header(data, FileType.SNAPSHOT)),
        "flushed_at": timestamp(snapshot.flushed_at_us),
        "commit_message": snapshot.message,
        "metadata": json_value(dict(snapshot.metadata)),
        "manifests": [
            {
                "id": encode_id(file.object_id),
                "size_bytes": file.size_bytes,
                "num_chunk_refs": file.num_chunk_refs,
            }
            for file in snapshot.manifest_files.values()
        ],
        "nodes": [_node(node) for node in snapshot.nodes.values()],
    }


def _node(node: NodeSnapshot) -> Json:
    described: Json = {
        "id": encode_id(node.id),
        "path": node.path,
        "node_type": "array" if node.kind is NodeKind.ARRAY else "group",
    }
    if node.kind is NodeKind.ARRAY:
        names = node.dimension_names or (None,) * len(node.shape)
        described["shape"] = [
            {
                **({} if name is None else {"name": name}),
                "array_length": dimension.array_length,
                "num_chunks": dimension.num_chunks,
            }
            for name, dimension in zip(names, node.shape, strict=True)
        ]
        described["manifest_refs"] = [
            {"id": encode_id(ref.object_id), "extents": [list(extent) for extent in ref.extents]}
            for ref in node.manifests
        ]
    return described


def describe_manifest(data: bytes, id: ObjectId) -> Json:
    """The whole file of a manifest: how many references of which kind each array has in it, ascending by node id.

    ``size_bytes`` is that of the contents before compression. Raises `FormatError` where it is none, or another one.
    """
    manifest = decode_manifest(data, expected_id=id)
    facts = manifest_facts(data)
    arrays = [_array(node_id, refs) for node_id, refs in manifest.arrays.items()]
    compression: Json = {"uses_location_compression": facts.dictionary_size_bytes is not None}
    if facts.dictionary_size_bytes is not None:
        compression["dictionary_size_bytes"] = facts.dictionary_size_bytes
    compression["num_compressed_refs"] = facts.num_compressed_refs
    return {
        "id": encode_id(manifest.id),
        "header": describe_header(read_header(data, FileType.MANIFEST)),
        "size_bytes": facts.payload_size_bytes,
        "num_arrays": len(arrays),
        "total_chunk_refs": manifest.num_chunk_refs,
        **{f"total_{kind}": sum(array[f"num_{kind}"] for array in arrays) for kind in ("inline", "native", "virtual")},
        "arrays": arrays,
        "compression": compression,
    }


def _array(node_id: NodeId, refs: ChunkRefs) -> Json:
    counts = np.bincount(refs.kind, minlength=VIRTUAL + 1)
    return {
        "node_id": encode_id(node_id),
        "num_chunk_refs": len(refs),
        "num_inline": int(counts[INLINE]),
        "num_native": int(counts[NATIVE]),
        "num_virtual": int(counts[VIRTUAL]),
    }


def describe_transaction_log(data: bytes, id: ObjectId) -> Json:
    """The whole file of a transaction log; ids ascend, so do the coordinates of each array's chunks.

    Raises `FormatError` where it is none, or another one.
    """
    return _describe_changes(data, decode_transaction_log(data, expected_id=id))


def describe_collapsed_log(
    data: bytes, id: ObjectId, ancestors: Sequence[tuple[ObjectId, TransactionLog | None]]
) -> Json:
    """A transaction log combined with those of the ancestors that expiration removed from the history before it.

    Parameters
    ----------
    ancestors
        Oldest first; None for a log that is missing.
    """
    log: TransactionLog | None = None
    for found in (*(ancestor for _, ancestor in ancestors), decode_transaction_log(data, expected_id=id)):
        if found is not None:
            log = found if log is None else combined(log, found)
    assert log is not None
    return {
        **_describe_changes(data, log),
        "synthetic_composite": {
            "note": "These are the changes of this snapshot together with those of the ancestors that expiration took "
            "out of its history; `header` is that of the snapshot's own log.",
            "merged_pruned_ancestor_tx_logs": [encode_id(id) for id, found in ancestors if found is not None],
            "missing_tx_logs": [encode_id(id) for id, found in ancestors if found is None],
        },
    }


def _describe_changes(data: bytes, log: TransactionLog) -> Json:
    sets: dict[str, Any] = {
        name: [encode_id(node) for node in sorted(getattr(log, name))]
        for name in (
            "new_groups",
            "new_arrays",
            "deleted_groups",
            "deleted_arrays",
            "updated_groups",
            "updated_arrays",
        )
    }
    return {
        "header": describe_header(read_header(data, FileType.TRANSACTION_LOG)),
        **sets,
        "updated_chunks": [
            {"node_id": encode_id(node), "chunks": coords.tolist()}
            for node, coords in sorted(log.updated_chunks.items(), key=lambda item: item[0])
        ],
        "moved_nodes": [{"from": move.source, "to": move.target} for move in log.moved_nodes],
    }


_AVAILABILITY: Final = {stored.ONLINE: "Online", stored.READ_ONLY: "ReadOnly", stored.OFFLINE: "Offline"}


def describe_repo_info(header: FileHeader, info: RepoInfo) -> Json:
    """Refs by name, every snapshot by id (all ascending), and the newest part of the ops log, newest first."""
    described: Json = {
        "header": describe_header(header),
        "spec_version": spec_version(info.spec_version),
        "branches": {name: encode_id(id) for name, id in sorted(info.branches.items())},
        "tags": {name: encode_id(id) for name, id in sorted(info.tags.items())},
        "deleted_tags": sorted(info.deleted_tags),
        "snapshots": [_snapshot(record) for _, record in sorted(info.snapshots.items())],
        "metadata": json_value(dict(info.metadata)),
        "latest_updates": [_update(update) for update in info.updates],
    }
    if info.repo_before_updates is not None:
        described["repo_before_updates"] = info.repo_before_updates
    return described


def _snapshot(record: SnapshotRecord) -> Json:
    return {
        "id": encode_id(record.id),
        **({} if record.parent is None else {"parent_id": encode_id(record.parent)}),
        "flushed_at": timestamp(record.flushed_at_us),
        "message": record.message,
        "metadata": json_value(dict(record.metadata)),
    }


def _update(update: Update) -> Json:
    name, fields = _change(update.change)
    return {
        "update_type": {"type": name, **fields},
        "updated_at": timestamp(update.updated_at_us),
        **({} if update.backup_path is None else {"backup_path": update.backup_path}),
    }


def _change(change: UpdateChange) -> tuple[str, dict[str, Any]]:
    match change:
        case stored.RepoInitialized():
            return "RepoInitializedUpdate", {}
        case stored.RepoMigrated(from_version=old, to_version=new):
            return "RepoMigratedUpdate", {"from_version": spec_version(old), "to_version": spec_version(new)}
        case stored.ConfigChanged():
            return "ConfigChangedUpdate", {}
        case stored.MetadataChanged():
            return "MetadataChangedUpdate", {}
        case stored.TagCreated(name=name):
            return "TagCreatedUpdate", {"name": name}
        case stored.TagDeleted(name=name, previous_snapshot=previous):
            return "TagDeletedUpdate", {"name": name, "previous_snap_id": encode_id(previous)}
        case stored.BranchCreated(name=name):
            return "BranchCreatedUpdate", {"name": name}
        case stored.BranchDeleted(name=name, previous_snapshot=previous):
            return "BranchDeletedUpdate", {"name": name, "previous_snap_id": encode_id(previous)}
        case stored.BranchReset(name=name, previous_snapshot=previous):
            return "BranchResetUpdate", {"name": name, "previous_snap_id": encode_id(previous)}
        case stored.NewCommit(branch=branch, snapshot=snapshot):
            return "NewCommitUpdate", {"branch": branch, "new_snap_id": encode_id(snapshot)}
        case stored.CommitAmended(branch=branch, previous_snapshot=previous, snapshot=snapshot):
            return "CommitAmendedUpdate", {
                "branch": branch,
                "previous_snap_id": encode_id(previous),
                "new_snap_id": encode_id(snapshot),
            }
        case stored.NewDetachedSnapshot(snapshot=snapshot):
            return "NewDetachedSnapshotUpdate", {"new_snap_id": encode_id(snapshot)}
        case stored.GCRan():
            return "GCRanUpdate", {}
        case stored.ExpirationRan():
            return "ExpirationRanUpdate", {}
        case stored.FeatureFlagChanged(id=id, new_value=value, is_set=is_set):
            return "FeatureFlagChanged", {"id": id, "new_value": value if is_set else None}
        case stored.StatusChanged(status=status):
            return "RepoStatusChangedUpdate", {"status": _status(status)}
        case _:
            assert_never(change)


def _status(status: stored.Status) -> Json:
    return {
        "availability": _AVAILABILITY[status.availability],
        "limited_availability_reason": status.reason,
        "set_at": timestamp(status.set_at_us),
    }
