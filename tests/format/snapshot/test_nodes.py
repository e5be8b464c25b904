"""Nodes that are decoded when they are requested, and copied into the next file as bytes."""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from random import Random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError, InvalidInputError
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.flat.flatbuffers import Buffer, FlatTable, FlatWriter, Inline, Items, id_struct, u8
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.snapshot import codec, node_encoding, nodes, stored_nodes
from icechunk.format.snapshot.codec import decode_snapshot, encode_and_keep, encode_snapshot
from icechunk.format.snapshot.node_decoding import decode_one
from icechunk.format.snapshot.node_encoding import write_nodes
from icechunk.format.snapshot.node_region import region_of, used_manifests
from icechunk.format.snapshot.nodes import SnapshotNodes, by_id, paths_of, paths_with_ids, with_ids
from icechunk.format.values import DimensionShape, ManifestFile, ManifestRef, NodeKind, NodeSnapshot, Snapshot
from tests.raising import raises

FIXTURES = Path(__file__).parent.parent / "fixtures"
EMPTY = Snapshot(id=ObjectId(b"s" * 12), flushed_at_us=1, message="")
DOCUMENT = b'{"chunk_grid":{"name":"regular","configuration":{"chunk_shape":[2]}}}'


@contextmanager
def lazily(*, few: int = 1, many: int = 1, most_changed: int = 0) -> Iterator[None]:
    """Read single nodes of files of ``few`` nodes and more, and copy those of ``many`` and more."""
    with (
        mock.patch.object(nodes, "_FEW", few),
        mock.patch.object(codec, "_MANY", many),
        mock.patch.object(codec, "_MOST_CHANGED", most_changed),
    ):
        yield


def decoded_at_once(data: bytes) -> Snapshot:
    with lazily(few=2**32):
        return decode_snapshot(data)


def node(path: str, n: int = 0, *, note: int = 0) -> NodeSnapshot:
    id = NodeId(struct.pack(">II", zlib.crc32(path.encode()), n))
    if n % 4 == 0:
        return NodeSnapshot(id=id, path=path, kind=NodeKind.GROUP, user_data=b" " * note)
    return NodeSnapshot(
        id=id,
        path=path,
        kind=NodeKind.ARRAY,
        user_data=DOCUMENT + b" " * note,
        shape=(DimensionShape(2 * n, n),),
        dimension_names=(f"x{n}",) if n % 3 else None,
        manifests=(ManifestRef(ObjectId(struct.pack(">QI", n, 7)), ((0, n),)),) * (n % 2),
    )


def snapshot_of(found: Mapping[str, NodeSnapshot]) -> Snapshot:
    used = {ref.object_id for one in found.values() for ref in one.manifests}
    return replace(EMPTY, nodes=found, manifest_files={id: ManifestFile(id, 1, 2) for id in sorted(used)})


def tree(count: int) -> dict[str, NodeSnapshot]:
    found = {path: node(path, n) for n, path in enumerate(f"/g{n // 10}/a{n}" for n in range(count))}
    return dict(sorted(found.items()))


PATHS = st.sampled_from([f"/g{n}/a{m}" for n in range(4) for m in range(12)] + ["/", "/é", "/g1", "/z\U0001f600"])
TREES = st.dictionaries(PATHS, st.integers(0, 20), min_size=1, max_size=40).map(
    lambda found: {path: node(path, n) for path, n in sorted(found.items())}
)
CHANGES = st.dictionaries(PATHS, st.none() | st.integers(0, 20), max_size=6)


@settings(max_examples=60)
@given(TREES, st.sampled_from((1, 2)))
def test_nodes_read_one_at_a_time_are_those_that_are_decoded_at_once(
    found: dict[str, NodeSnapshot], version: int
) -> None:
    data = encode_snapshot(snapshot_of(found), version)
    with lazily():
        read = decode_snapshot(data).nodes
    assert isinstance(read, SnapshotNodes)
    assert len(read) == len(found)
    for path in [*reversed(found), "/absent", "/\ud800"]:
        assert read.get(path) == found.get(path)
        assert (path in read) == (path in found)
    assert list(read) == list(paths_of(read)) == list(found)
    assert list(read.values()) == list(found.values())
    assert list(read.items()) == list(found.items())
    ids = {one.id for one in found.values()}
    assert with_ids(read, ids) == with_ids(found, ids)
    assert list(paths_with_ids(read, ids).items()) == sorted(paths_with_ids(found, ids).items(), key=itemgetter(1))
    assert read == found


@settings(max_examples=60)
@given(TREES, st.lists(CHANGES, max_size=4), st.sampled_from((1, 2)), st.integers(0, 2**32))
def test_changed_nodes_are_a_mapping_and_are_written_as_one(
    base: dict[str, NodeSnapshot], steps: list[dict[str, int | None]], version: int, seed: int
) -> None:
    rng = Random(seed)
    model = dict(base)
    with lazily():
        now = decode_snapshot(encode_snapshot(snapshot_of(base), version)).nodes
        for i, step in enumerate(steps):
            assert isinstance(now, SnapshotNodes)
            changes = {path: None if n is None else node(path, n, note=i) for path, n in step.items()}
            now = now.changed(changes)
            model.update({path: one for path, one in changes.items() if one is not None})
            model = {path: model[path] for path in sorted(model) if changes.get(path, path) is not None}
            assert (len(now), list(now), dict(now.items())) == (len(model), list(model), model)
            assert [path for path in paths_of(now) if path in now] == sorted(model)
            assert [now.get(path) for path in ("/", "/g1", "/é")] == [model.get(path) for path in ("/", "/g1", "/é")]
            ids = [one.id for one in model.values()]
            assert set(by_id(now)) == set(ids)
            assert all(by_id(now)[id].id == id for id in ids)
            assert used_manifests(now) == used_manifests(model)
            encoded = encode_and_keep(snapshot_of(now), version)
            assert encoded.snapshot.nodes == model
            assert decode_snapshot(encoded.data).nodes == decoded_at_once(encoded.data).nodes == model
            if model and rng.random() < 0.5:
                now = decode_snapshot(encoded.data).nodes
            elif isinstance(encoded.snapshot.nodes, SnapshotNodes):
                now = encoded.snapshot.nodes
            if not isinstance(now, SnapshotNodes):
                return


def test_unchanged_nodes_are_copied_and_neither_decoded_nor_encoded() -> None:
    found = tree(1000)
    kept = encode_and_keep(snapshot_of(found))
    read = decode_snapshot(kept.data)
    for snapshot in (kept.snapshot, read):
        assert isinstance(snapshot.nodes, SnapshotNodes)
        changed = replace(found["/g5/a51"], user_data=b"{}")
        now = snapshot.with_nodes(snapshot.nodes.changed({"/g5/a51": changed, "/h": node("/h"), "/g7/a70": None}))
        with mock.patch.object(codec, "write_nodes", wraps=write_nodes) as write:
            encoded = encode_and_keep(now)
        assert [one.path for one in write.call_args.args[1]] == ["/g5/a51", "/h"]
        assert encoded.snapshot.nodes is now.nodes
        expected = {path: one for path, one in found.items() if path != "/g7/a70"}
        assert decoded_at_once(encoded.data).nodes == expected | {"/g5/a51": changed, "/h": node("/h")}
    assert isinstance(read.nodes, SnapshotNodes)
    assert not read.nodes.stored.known


def test_bytes_of_nodes_that_were_replaced_do_not_pile_up() -> None:
    found = tree(400)
    with lazily(most_changed=32):
        data = encode_snapshot(snapshot_of(found))
        at_first = len(unseal(data, FileType.SNAPSHOT)[1])
        for n in range(120):
            now = decode_snapshot(data)
            assert isinstance(now.nodes, SnapshotNodes)
            some = list(found)[5 * n % 400 : 5 * n % 400 + 5]
            found |= {path: replace(found[path], user_data=found[path].user_data[:-3] + b"%03d" % n) for path in some}
            data = encode_snapshot(now.with_nodes(now.nodes.changed({path: found[path] for path in some})))
            assert len(unseal(data, FileType.SNAPSHOT)[1]) < 1.5 * at_first
    assert decode_snapshot(data).nodes == found


def test_a_commit_of_one_node_makes_a_file_larger_by_little_more_than_that_node() -> None:
    found = tree(400)
    with lazily(most_changed=32):
        data = encode_snapshot(snapshot_of(found))
        at_first = len(unseal(data, FileType.SNAPSHOT)[1])
        for n in range(1, 9):
            now = decode_snapshot(data)
            assert isinstance(now.nodes, SnapshotNodes)
            found["/g1/a11"] = replace(found["/g1/a11"], user_data=b"%03d" % n)
            data = encode_snapshot(now.with_nodes(now.nodes.changed({"/g1/a11": found["/g1/a11"]})))
            assert len(unseal(data, FileType.SNAPSHOT)[1]) < at_first + 400 * n
    assert decode_snapshot(data).nodes == found


@settings(max_examples=60)
@given(st.lists(st.sampled_from([b"", b"{}", b"{ }", DOCUMENT]), min_size=1, max_size=80), st.sampled_from((1, 2)))
def test_equal_documents_are_written_once_for_every_eight_nodes(documents: list[bytes], version: int) -> None:
    groups = {
        f"/g{n:02}": replace(node(f"/g{n:02}"), user_data=document, extra=b"e" if version == 2 and n % 5 == 0 else None)
        for n, document in enumerate(documents)
    }
    data = encode_snapshot(snapshot_of(groups), version)
    assert decode_snapshot(data).nodes == groups
    with lazily():
        read = decode_snapshot(data).nodes
        assert read == groups
        assert isinstance(read, SnapshotNodes)
    found = read.stored.columns()[1].vectors(2, 1)
    assert found is not None
    used = Counter(found.starts.tolist())
    assert max(used.values()) <= 8
    if len(documents) >= node_encoding.FEW:
        assert len(used) == sum(-(-count // 8) for count in Counter(documents).values())


def test_documents_that_are_much_larger_than_their_nodes_are_read_though_they_are_shared() -> None:
    document = b'{"attributes":{"history":"' + b"x" * 20_000 + b'"}}'
    found = {path: replace(one, user_data=document) for path, one in tree(1000).items()}
    data = encode_snapshot(snapshot_of(found))
    assert len(unseal(data, FileType.SNAPSHOT)[1]) < 1000 * 20_000 / 7
    assert decoded_at_once(data).nodes == found
    assert decode_snapshot(data).nodes == found


def test_nodes_of_a_file_that_are_in_another_order_are_all_found() -> None:
    found = tree(100)
    with mock.patch.object(codec, "_path", lambda one: one.id):
        data = encode_snapshot(snapshot_of(found))
    read = decode_snapshot(data).nodes
    assert list(read) == sorted(found)
    assert read == found


@pytest.mark.parametrize("path", ["a", "", "/a1", "/" + "x" * 5000])
def test_a_path_that_is_not_absolute_or_twice_there_is_refused_and_a_long_one_is_not(path: str) -> None:
    found = tree(40)
    found[path + "?"] = replace(node("/x"), path=path)
    if path == "/a1":
        found["/a1"] = node("/a1", 3)
    data = encode_snapshot(snapshot_of(found))
    if path.startswith("/x"):
        assert decode_snapshot(data).nodes[path].path == path
        return
    with raises(FormatError, "invalid-file-format", path):
        decode_snapshot(data)


def broken(rng: Random, payload: bytes) -> bytes:
    octets = bytearray(payload)
    for _ in range(rng.choice((1, 1, 1, 3))):
        at = rng.randrange(8, len(octets))
        octets[at] = rng.choice((0, 1, 4, 255, octets[at] ^ 1 << rng.randrange(8)))
    return bytes(octets)


@settings(max_examples=150)
@given(st.randoms(use_true_random=False), st.sampled_from((1, 2)))
def test_corrupt_nodes_are_refused_or_read_right_and_never_copied(rng: Random, version: int) -> None:
    _, payload = unseal(encode_snapshot(snapshot_of(tree(6)), version), FileType.SNAPSHOT)
    data = seal(FileType.SNAPSHOT, version, broken(rng, payload[:]))
    expected: Snapshot | None = None
    with suppress(FormatError):
        expected = decoded_at_once(data)
    try:
        with lazily():
            read = decode_snapshot(data)
    except FormatError:
        return
    one_by_one: dict[str, NodeSnapshot] | None = None
    with suppress(FormatError):
        one_by_one = {path: read.nodes[path] for path in read.nodes}
    if one_by_one is not None and expected is not None:
        assert one_by_one == expected.nodes
    if not isinstance(read.nodes, SnapshotNodes):
        return
    try:
        copied = region_of(read.nodes.stored) is not None
    except FormatError:
        return
    if copied:
        assert one_by_one is not None
        with lazily():
            changed = read.nodes.changed({"/new": node("/new", 3)})
            try:
                again = encode_snapshot(read.with_nodes(changed), version)
            except (FormatError, InvalidInputError):
                # Its bytes are so few that all nodes are encoded, and one of them cannot be.
                return
        assert decoded_at_once(again).nodes == {**one_by_one, "/new": node("/new", 3)}


def test_a_file_with_fields_of_a_newer_format_is_read_and_not_copied() -> None:
    def table(n: int) -> FlatTable:
        path = f"/{n:03}"
        return FlatTable({0: Inline(struct.pack(">Q", n)), 1: path, 2: b"{}", 3: u8(2), 4: FlatTable({}), 6: b"newer"})

    root = FlatTable(
        {
            0: id_struct(EMPTY.id),
            2: [table(n) for n in range(300)],
            4: "",
            5: [],
            6: Items(b"", 0, 8),
            7: [],
        }
    )
    data = seal(FileType.SNAPSHOT, 2, FlatWriter().finish(root))
    read = decode_snapshot(data).nodes
    assert isinstance(read, SnapshotNodes)
    assert region_of(read.stored) is None
    changed = read.changed({"/new": node("/new")})
    assert decode_snapshot(encode_snapshot(EMPTY.with_nodes(changed))).nodes == dict(changed.items())


@pytest.mark.parametrize("path", [*FIXTURES.glob("*/snapshots/*")], ids=lambda path: f"{path.parts[-3]}-{path.name}")
def test_official_snapshots_are_read_and_copied_as_they_are_decoded_at_once(path: Path) -> None:
    data = path.read_bytes()
    version, payload = unseal(data, FileType.SNAPSHOT)
    expected = decoded_at_once(data)
    with lazily():
        read = decode_snapshot(data)
        assert read == expected
        if not isinstance(read.nodes, SnapshotNodes):
            assert not Buffer(payload, "").root().vector(2, 4)[1]  # type: ignore[index]
            return
        changed = read.with_nodes(read.nodes.changed({"/zz": node("/zz", 3)}))
        with mock.patch.object(codec, "is_dense", return_value=True):
            encoded = encode_snapshot(changed, version)
        assert decode_snapshot(encoded).nodes == {**expected.nodes, "/zz": node("/zz", 3)}


def test_many_look_ups_decode_whole_blocks() -> None:
    data = encode_snapshot(snapshot_of(tree(1024)))
    read = decode_snapshot(data).nodes
    assert isinstance(read, SnapshotNodes)
    paths = list(read)
    with mock.patch.object(stored_nodes, "decode_one", wraps=decode_one) as one:
        for path in paths:
            assert read[path].path == path
    assert one.call_count <= 1024 // 16 + 1
