"""Hypothesis strategies for everything that the format's files hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.repo.codec import (
    BranchCreated,
    BranchDeleted,
    BranchReset,
    CommitAmended,
    ConfigChanged,
    ExpirationRan,
    FeatureFlagChanged,
    GCRan,
    MetadataChanged,
    NewCommit,
    NewDetachedSnapshot,
    RepoInfo,
    RepoInitialized,
    RepoMigrated,
    SnapshotRecord,
    Status,
    StatusChanged,
    TagCreated,
    TagDeleted,
    Update,
)
from icechunk.format.values import (
    ETAG,
    ID12,
    INLINE,
    LAST_MODIFIED,
    NATIVE,
    NO_CHECKSUM,
    VIRTUAL,
    ChunkRefs,
    DimensionShape,
    Manifest,
    ManifestFile,
    ManifestRef,
    Move,
    NodeKind,
    NodeSnapshot,
    Snapshot,
    TransactionLog,
)

object_ids = st.binary(min_size=12, max_size=12).map(ObjectId)
node_ids = st.binary(min_size=8, max_size=8).map(NodeId)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
u64s = st.integers(0, 2**64 - 1)
u32s = st.integers(0, 2**32 - 1)
blobs = st.binary(max_size=40)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | texts,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8), inner, max_size=4
        )
    ),
    max_leaves=12,
)
metadata = st.dictionaries(texts, json_values, max_size=3)


@st.composite
def chunk_refs(draw: st.DrawFn, ndim: int | None = None, max_size: int = 12) -> ChunkRefs:
    """Columns with every kind of row in any mixture, in ascending order of coordinates."""
    ndim = draw(st.integers(0, 4)) if ndim is None else ndim
    coords = sorted(
        draw(st.sets(st.tuples(*[st.integers(0, 2**32 - 1) | st.integers(0, 3)] * ndim), max_size=max_size))
    )
    n = len(coords)
    locations = tuple(draw(st.lists(texts, unique=True, min_size=1, max_size=5)))
    etags = tuple(draw(st.lists(texts, unique=True, min_size=1, max_size=3)))
    kinds = draw(st.lists(st.sampled_from((INLINE, NATIVE, VIRTUAL)), min_size=n, max_size=n))
    columns: dict[str, list[Any]] = {
        "offset": [],
        "length": [],
        "chunk_id": [],
        "location": [],
        "ck": [],
        "checksum": [],
    }
    inline = bytearray(draw(st.binary(max_size=4)))
    for kind in kinds:
        chunk_id, location, checksum_kind, checksum = bytes(12), -1, NO_CHECKSUM, 0
        if kind == INLINE:
            data = draw(st.binary(max_size=20))
            offset, length = len(inline), len(data)
            inline += data + bytes(draw(st.integers(0, 2)))
        else:
            offset, length = draw(st.just(0) | u64s), draw(st.just(0) | u64s)
        if kind == NATIVE:
            chunk_id = draw(object_ids)
        if kind == VIRTUAL:
            location = draw(st.integers(0, len(locations) - 1))
            checksum_kind = draw(st.sampled_from((NO_CHECKSUM, ETAG, LAST_MODIFIED)))
            if checksum_kind == ETAG:
                checksum = draw(st.integers(0, len(etags) - 1))
            elif checksum_kind == LAST_MODIFIED:
                checksum = draw(st.integers(1, 2**32 - 1))
        for name, value in zip(columns, (offset, length, chunk_id, location, checksum_kind, checksum), strict=True):
            columns[name].append(value)
    checked = any(columns["ck"]) or draw(st.booleans())
    return ChunkRefs(
        coords=np.array(coords, np.uint32).reshape(n, ndim),
        kind=np.array(kinds, np.uint8),
        offset=np.array(columns["offset"], np.uint64),
        length=np.array(columns["length"], np.uint64),
        chunk_id=np.frombuffer(b"".join(columns["chunk_id"]), ID12),
        location=np.array(columns["location"], np.int32),
        locations=locations,
        checksum_kind=np.array(columns["ck"], np.uint8) if checked else None,
        checksum=np.array(columns["checksum"], np.int64) if checked else None,
        etags=etags,
        inline_data=bytes(inline),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Up to four arrays of any rank, in ascending order of id."""
    arrays = draw(st.dictionaries(node_ids, chunk_refs(), max_size=4))
    return Manifest(id=draw(object_ids), arrays=dict(sorted(arrays.items())))


def rows(refs: ChunkRefs) -> list[tuple[Any, ...]]:
    """Coordinates and value of every row, free of how the columns are arranged."""
    return [(tuple(refs.coords[i].tolist()), refs.row(i)) for i in range(len(refs))]


def contents(manifest: Manifest) -> list[tuple[NodeId, list[tuple[Any, ...]]]]:
    """Every row of every array, in order."""
    return [(node, rows(refs)) for node, refs in manifest.arrays.items()]


paths = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1, max_size=5), max_size=4
).map(lambda parts: "/" + "/".join(parts))


@st.composite
def nodes(draw: st.DrawFn, path: str) -> NodeSnapshot:
    """A group, or an array with a regular chunk grid."""
    id = draw(node_ids)
    if draw(st.booleans()):
        return NodeSnapshot(id=id, path=path, kind=NodeKind.GROUP, user_data=draw(blobs))
    lengths = draw(st.lists(st.tuples(st.integers(0, 2**31), st.integers(1, 2**20)), max_size=4))
    shape = tuple(DimensionShape(n, -(-n // chunk)) for n, chunk in lengths)
    chunks = [math.ceil(dim.array_length / dim.num_chunks) if dim.num_chunks else 1 for dim in shape]
    extents = st.tuples(*[st.tuples(u32s, u32s)] * len(shape))
    return NodeSnapshot(
        id=id,
        path=path,
        kind=NodeKind.ARRAY,
        user_data=f'{{"chunk_grid":{{"name":"regular","configuration":{{"chunk_shape":{chunks}}}}}}}'.encode(),
        shape=shape,
        dimension_names=draw(st.none() | st.tuples(*[st.none() | texts] * len(shape))),
        manifests=tuple(draw(st.lists(st.builds(ManifestRef, object_ids, extents), max_size=3))),
    )


@st.composite
def snapshots(draw: st.DrawFn, spec_version: int = 2) -> Snapshot:
    """A snapshot that the spec version can hold, mappings in the order of the file."""
    names = sorted(draw(st.sets(paths, max_size=5)), key=str.encode)
    files = draw(st.dictionaries(object_ids, st.tuples(u64s, u32s), max_size=4))
    return Snapshot(
        id=draw(object_ids),
        parent_id=draw(st.none() | object_ids) if spec_version == 1 else None,
        nodes={path: draw(nodes(path)) for path in names},
        flushed_at_us=draw(u64s),
        message=draw(texts),
        metadata=draw(metadata),
        manifest_files={id: ManifestFile(id, *files[id]) for id in sorted(files)},
        extra=draw(st.none() | blobs) if spec_version == 2 else None,
    )


@st.composite
def transaction_logs(draw: st.DrawFn, spec_version: int = 2) -> TransactionLog:
    """A transaction log; moves only where the spec version has them."""
    ids = st.frozensets(node_ids, max_size=3)
    chunks = draw(st.dictionaries(node_ids, chunk_refs(), max_size=3))
    moves = st.lists(st.builds(Move, paths, paths, node_ids, st.sampled_from(NodeKind)), max_size=3)
    newer = spec_version == 2
    return TransactionLog(
        id=draw(object_ids),
        new_groups=draw(ids),
        new_arrays=draw(ids),
        deleted_groups=draw(ids),
        deleted_arrays=draw(ids),
        updated_groups=draw(ids),
        updated_arrays=draw(ids),
        updated_chunks={node: refs.coords for node, refs in sorted(chunks.items()) if len(refs)},
        moved_nodes=tuple(sorted(draw(moves), key=lambda move: move.source.split("/"))) if newer else (),
        extra=draw(st.none() | blobs) if newer else None,
    )


statuses = st.builds(Status, availability=st.integers(0, 2), set_at_us=u64s, reason=st.none() | texts)
changes = st.one_of(
    st.builds(RepoInitialized),
    st.builds(RepoMigrated, from_version=st.integers(0, 255), to_version=st.integers(0, 255)),
    st.builds(ConfigChanged),
    st.builds(MetadataChanged),
    st.builds(TagCreated, name=texts),
    st.builds(TagDeleted, name=texts, previous_snapshot=object_ids),
    st.builds(BranchCreated, name=texts),
    st.builds(BranchDeleted, name=texts, previous_snapshot=object_ids),
    st.builds(BranchReset, name=texts, previous_snapshot=object_ids),
    st.builds(NewCommit, branch=texts, snapshot=object_ids),
    st.builds(CommitAmended, branch=texts, previous_snapshot=object_ids, snapshot=object_ids),
    st.builds(NewDetachedSnapshot, snapshot=object_ids),
    st.builds(GCRan),
    st.builds(ExpirationRan),
    st.builds(FeatureFlagChanged, id=st.integers(0, 2**16 - 1), new_value=st.booleans(), is_set=st.booleans()),
    st.builds(StatusChanged, status=statuses),
)
updates = st.builds(Update, change=changes, updated_at_us=u64s, backup_path=st.none() | texts)


@st.composite
def repo_infos(draw: st.DrawFn) -> RepoInfo:
    """A repo info whose refs and parents are among its snapshots, in the order of the file."""
    ids = sorted(draw(st.sets(object_ids, min_size=1, max_size=5)))
    known = st.sampled_from(ids)
    records = {
        id: SnapshotRecord(
            id=id,
            parent=draw(st.none() | known),
            flushed_at_us=draw(u64s),
            message=draw(texts),
            metadata=draw(metadata),
            pruned_ancestor_tx_logs=tuple(draw(st.lists(object_ids, max_size=2))),
        )
        for id in ids
    }
    flags = st.none() | st.frozensets(st.integers(0, 2**16 - 1), max_size=3)
    return RepoInfo(
        tags=draw(st.dictionaries(texts, known, max_size=3)),
        branches=draw(st.dictionaries(texts, known, max_size=3)),
        deleted_tags=frozenset(draw(st.lists(texts, max_size=3))),
        snapshots=records,
        status=draw(statuses),
        metadata=draw(metadata),
        updates=tuple(draw(st.lists(updates, max_size=4))),
        repo_before_updates=draw(st.none() | texts),
        config=draw(st.none() | st.dictionaries(st.sampled_from("abc"), json_values, max_size=3)),
        enabled_feature_flags=draw(flags),
        disabled_feature_flags=draw(flags),
        extra=draw(st.none() | blobs),
    )
