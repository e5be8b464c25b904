"""Snapshots, manifests and transaction logs, described."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from icechunk.format.envelope import FileType, read_header
from icechunk.format.ids import NodeId, ObjectId, encode_id
from icechunk.format.manifest import decode_manifest
from icechunk.format.manifest_facts import manifest_facts
from icechunk.format.snapshot import decode_snapshot
from icechunk.format.tables import INLINE, NATIVE, VIRTUAL, ChunkRefs, NodeKind, NodeSnapshot, TransactionLog
from icechunk.format.transaction import decode_transaction_log
from icechunk.inspection.json_values import Json, describe_header, json_value, timestamp
from icechunk.log.diff import combined

__all__ = ["describe_collapsed_log", "describe_manifest", "describe_snapshot", "describe_transaction_log"]


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
    """A transaction log together with those of the ancestors that expiration took out of the history before it.

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
