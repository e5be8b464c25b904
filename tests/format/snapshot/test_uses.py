"""The references of many snapshots, read at once, are those of each of them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.flat.vectors import TableColumns, joined, targets
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.snapshot.codec import decode_snapshot, encode_snapshot
from icechunk.format.snapshot.uses import manifest_uses
from icechunk.format.values import DimensionShape, ManifestFile, ManifestRef, NodeKind, NodeSnapshot, Snapshot
from tests.raising import raises
from tools.fuzz.strategies import snapshots

Uses = list[tuple[object, set[tuple[bytes, bytes]], set[tuple[bytes, int, int]]]]


def padded(value: bytes, size: int) -> bytes:
    return value.ljust(size, b"\0")


def together(files: Sequence[tuple[ObjectId, bytes]]) -> Uses:
    uses = manifest_uses(files)
    found: Uses = [(parent, set(), set()) for parent in uses.parents]
    for snapshot, manifest, node in zip(uses.ref_snapshots, uses.ref_manifests, uses.ref_nodes, strict=True):
        found[snapshot][1].add((padded(manifest, 12), padded(node, 8)))
    for snapshot, (id, size, count) in zip(uses.file_snapshots, uses.files.tolist(), strict=True):
        found[snapshot][2].add((padded(id, 12), size, count))
    return found


def singly(files: Sequence[tuple[ObjectId, bytes]]) -> Uses:
    found: Uses = []
    for id, data in files:
        snapshot = decode_snapshot(data, expected_id=id)
        refs: set[tuple[bytes, bytes]] = {
            (ref.object_id, node.id) for node in snapshot.nodes.values() for ref in node.manifests
        }
        listed: set[tuple[bytes, int, int]] = set(snapshot.manifest_files.values())
        found.append((snapshot.parent_id, refs, listed))
    return found


@settings(max_examples=60)
@given(st.data())
def test_snapshots_that_are_read_together_have_the_references_of_each(data: st.DataObject) -> None:
    versions = data.draw(st.lists(st.sampled_from((1, 2)), min_size=1, max_size=5))
    drawn = [(data.draw(snapshots(version)), version) for version in versions]
    files = [(snapshot.id, encode_snapshot(snapshot, version)) for snapshot, version in drawn]
    assert together(files) == singly(files)


@settings(max_examples=200)
@given(st.randoms(use_true_random=False), st.sampled_from((1, 2)))
def test_of_snapshots_that_are_read_together_a_corrupt_one_is_refused_or_read_as_if_it_were_alone(
    rng: Random, version: int
) -> None:
    files = []
    for n in range(3):
        manifests = [ObjectId(bytes([n, i]) * 6) for i in range(2)]
        nodes = [
            NodeSnapshot(
                id=NodeId(bytes([n, i]) * 4),
                path=f"/{n}{i}",
                kind=NodeKind.ARRAY,
                user_data=b'{"chunk_grid":{"name":"regular","configuration":{"chunk_shape":[2]}}}',
                shape=(DimensionShape(4, 2),),
                manifests=tuple(ManifestRef(id, ((0, 1),)) for id in manifests[: i + 1]),
            )
            for i in range(2)
        ]
        snapshot = Snapshot(
            id=ObjectId(bytes([n]) * 12),
            flushed_at_us=1,
            message="m",
            nodes={node.path: node for node in nodes},
            manifest_files={id: ManifestFile(id, 1, 2) for id in manifests},
        )
        _, payload = unseal(encode_snapshot(snapshot, version), FileType.SNAPSHOT)
        octets = bytearray(payload)
        if n == 1:
            for _ in range(rng.choice((1, 1, 3))):
                at = rng.randrange(len(octets))
                octets[at] = rng.choice((0, 1, 4, 255, octets[at] ^ 1 << rng.randrange(8)))
        octets[4:8] = b"Ichk"
        files.append((snapshot.id, seal(FileType.SNAPSHOT, version, octets)))
    try:
        found = together(files)
    except FormatError:
        return
    try:
        expected = singly(files)
    except FormatError:
        # Fields without references (times, metadata, the order of paths) are not read here.
        return
    assert found == expected


def test_equal_vtables_of_several_files_are_read_once_and_different_ones_give_the_same_values() -> None:
    files = []
    for n, version in enumerate((2, 2, 1)):
        nodes = [
            NodeSnapshot(id=NodeId(bytes([n, i]) * 4), path=f"/{i:02}", kind=NodeKind.GROUP, user_data=b"{}")
            for i in range(90)
        ]
        snapshot = Snapshot(id=ObjectId(bytes([n]) * 12), flushed_at_us=1, message="", nodes={n.path: n for n in nodes})
        files.append(unseal(encode_snapshot(snapshot, version), FileType.SNAPSHOT)[1][:])

    def nodes_of(payloads: Sequence[bytes]) -> TableColumns:
        [(_, buffer)] = joined(payloads, "snapshots")
        vectors = TableColumns(buffer, buffer.roots).vectors(2, 4)
        assert vectors is not None
        fields = [start + 4 * np.arange(count) for start, count in zip(vectors.starts, vectors.counts, strict=True)]
        return TableColumns(buffer, targets(buffer, np.concatenate(fields)))

    ids = [nodes_of([file]).numbers(0, "V8").tobytes() for file in files]
    both, all_three = nodes_of(files[:2]), nodes_of(files)
    assert both.numbers(0, "V8").tobytes() == b"".join(ids[:2])
    assert all_three.numbers(0, "V8").tobytes() == b"".join(ids)
    assert len(both.spans()[1].starts) == 2


def test_another_id_than_expected_is_refused_by_name() -> None:
    files = [
        (ObjectId(bytes([n]) * 12), encode_snapshot(Snapshot(id=ObjectId(bytes(12)), flushed_at_us=1, message="")))
        for n in range(2)
    ]
    with raises(FormatError, "invalid-file-format", "0" * 20):
        manifest_uses(files[1:])
