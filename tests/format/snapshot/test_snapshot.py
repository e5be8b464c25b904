from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError, InvalidInputError
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.ids import FIRST_SNAPSHOT, NodeId, ObjectId, encode_id
from icechunk.format.snapshot import node_decoding
from icechunk.format.snapshot.codec import decode_snapshot, encode_snapshot
from icechunk.format.values import DimensionShape, ManifestRef, NodeKind, NodeSnapshot, Snapshot
from tests.raising import raises
from tools.fuzz.strategies import nodes, snapshots

FIXTURES = Path(__file__).parent.parent / "fixtures"
EMPTY = Snapshot(id=FIRST_SNAPSHOT, flushed_at_us=1, message="")


@settings(max_examples=60)
@given(st.data(), st.sampled_from((1, 2)))
def test_snapshots_come_back_as_they_were(data: st.DataObject, spec_version: int) -> None:
    snapshot = data.draw(snapshots(spec_version))
    again = decode_snapshot(encode_snapshot(snapshot, spec_version), expected_id=snapshot.id)
    assert again == snapshot
    assert list(again.nodes) == list(snapshot.nodes)
    assert list(again.manifest_files) == list(snapshot.manifest_files)


@st.composite
def many_nodes(draw: st.DrawFn, spec_version: int) -> dict[str, NodeSnapshot]:
    """Up to a hundred nodes, of which many share a layout: what differs are ids, texts of one length, and numbers."""
    found: dict[str, NodeSnapshot] = {}
    for like in draw(st.lists(nodes("/like"), min_size=1, max_size=3)):
        extra = draw(st.none() | st.just(b"extra")) if spec_version == 2 else None
        for _ in range(draw(st.integers(1, 33))):
            n = len(found)
            dims = tuple(replace_number(dim, n) for dim in like.shape)
            chunks = [-(-dim.array_length // dim.num_chunks) if dim.num_chunks else 1 for dim in dims]
            grid = f'{{"chunk_grid":{{"name":"regular","configuration":{{"chunk_shape":{chunks}}}}}}}'.encode()
            refs = [
                ManifestRef(ObjectId((7 * n + i).to_bytes(12)), tuple([(a, (b + n) % 2**32) for a, b in ref.extents]))
                for i, ref in enumerate(like.manifests)
            ]
            found[f"/{n}"] = replace(
                like,
                id=NodeId((2**64 // 3 * n % 2**64).to_bytes(8)),
                path=f"/{n}",
                user_data=grid if like.kind is NodeKind.ARRAY else like.user_data + b"\0" * (n % 3),
                shape=dims,
                manifests=tuple(refs),
                extra=extra if n % 5 == 0 else None,
            )
    return dict(sorted(found.items()))


def replace_number(dim: DimensionShape, n: int) -> DimensionShape:
    return DimensionShape(dim.num_chunks * (n + 1), dim.num_chunks)


@settings(max_examples=40)
@given(st.data(), st.sampled_from((1, 2)))
def test_many_nodes_come_back_as_they_were(data: st.DataObject, spec_version: int) -> None:
    snapshot = EMPTY.with_nodes(data.draw(many_nodes(spec_version)))
    assert decode_snapshot(encode_snapshot(snapshot, spec_version)) == snapshot


def read_both_ways(data: bytes) -> tuple[Snapshot | FormatError, Snapshot | FormatError]:
    """The same values, read node by node and in columns."""
    found: list[Snapshot | FormatError] = []
    for few in (2**32, 1):
        with mock.patch.object(node_decoding, "_FEW", few):
            try:
                found.append(decode_snapshot(data))
            except FormatError as error:
                found.append(error)
    return found[0], found[1]


@settings(max_examples=40)
@given(st.data(), st.sampled_from((1, 2)))
def test_many_nodes_are_read_as_one_by_one(data: st.DataObject, spec_version: int) -> None:
    snapshot = EMPTY.with_nodes(data.draw(many_nodes(spec_version)))
    assert read_both_ways(encode_snapshot(snapshot, spec_version)) == (snapshot, snapshot)


@pytest.mark.parametrize("path", [*FIXTURES.glob("*/snapshots/*")], ids=lambda path: f"{path.parts[-3]}-{path.name}")
def test_official_snapshots_are_read_in_columns_as_one_by_one(path: Path) -> None:
    one_by_one, columns = read_both_ways(path.read_bytes())
    assert isinstance(columns, Snapshot)
    assert columns == one_by_one


@settings(max_examples=60)
@given(st.randoms(use_true_random=False), st.sampled_from((1, 2)))
@example(Random(5698), 2)  # a vtable of 255 bytes
def test_corrupt_nodes_are_refused_or_read_as_one_by_one(rng: Random, spec_version: int) -> None:
    found = {}
    for n in range(6):
        found[f"/{n}"] = NodeSnapshot(
            id=NodeId(n.to_bytes(8)),
            path=f"/{n}",
            kind=NodeKind.ARRAY if n % 3 else NodeKind.GROUP,
            user_data=b'{"chunk_grid":{"name":"regular","configuration":{"chunk_shape":[2]}}}',
            shape=(DimensionShape(4, 2),) if n % 3 else (),
            dimension_names=("x",) if n % 2 and n % 3 else None,
            manifests=(ManifestRef(ObjectId(bytes(12)), ((0, n),)),) * (n % 3),
        )
    _, payload = unseal(encode_snapshot(EMPTY.with_nodes(found), spec_version), FileType.SNAPSHOT)
    broken = bytearray(payload)
    for _ in range(rng.choice((1, 1, 1, 3))):
        at = rng.randrange(8, len(broken))
        broken[at] = rng.choice((0, 1, 4, 255, broken[at] ^ 1 << rng.randrange(8)))
    one_by_one, columns = read_both_ways(seal(FileType.SNAPSHOT, spec_version, bytes(broken)))
    # Columns are checked as a whole: a table that ends past the end is refused even if no field there is read.
    if isinstance(columns, Snapshot):
        assert columns == one_by_one


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shape": (DimensionShape(2**64, 1),)}, "/17"),
        ({"shape": (DimensionShape(1, 2**32),)}, "/17"),
        ({"manifests": (ManifestRef(ObjectId(bytes(12)), ((0, 2**32),)),)}, "/17"),
        ({"dimension_names": ("\ud800",)}, repr("\ud800")),
    ],
)
def test_one_of_many_nodes_that_cannot_be_written_is_named(changes: dict[str, Any], named: str) -> None:
    found = {}
    for n in range(20):
        found[f"/{n:02}"] = NodeSnapshot(
            id=NodeId(n.to_bytes(8)),
            path=f"/{n:02}",
            kind=NodeKind.ARRAY,
            user_data=b"{}",
            shape=(DimensionShape(1, 1),),
            dimension_names=("x",),
            manifests=(ManifestRef(ObjectId(bytes(12)), ((0, 1),)),),
        )
    found["/17"] = replace(found["/17"], **changes)
    with raises(InvalidInputError, "serialization", named):
        encode_snapshot(EMPTY.with_nodes(found))


def test_nodes_are_written_in_the_order_of_their_path_bytes() -> None:
    paths = ["/ab", "/a/b", "/a-b", "/a", "/", "/é", "/z"]
    nodes = {path: NodeSnapshot(id=NodeId(bytes(8)), path=path, kind=NodeKind.GROUP, user_data=b"{}") for path in paths}
    again = decode_snapshot(encode_snapshot(EMPTY.with_nodes(nodes)))
    assert list(again.nodes) == ["/", "/a", "/a-b", "/a/b", "/ab", "/z", "/é"]


def test_format_1_keeps_the_parent_and_format_2_does_not() -> None:
    snapshot = replace(EMPTY, parent_id=ObjectId(b"p" * 12))
    assert decode_snapshot(encode_snapshot(snapshot, 1)).parent_id == b"p" * 12
    assert decode_snapshot(encode_snapshot(snapshot, 2)).parent_id is None


def test_an_irregular_grid_is_refused_in_format_1_and_kept_in_format_2() -> None:
    node = NodeSnapshot(
        id=NodeId(bytes(8)),
        path="/a",
        kind=NodeKind.ARRAY,
        user_data=b'{"chunk_grid":{"name":"rectilinear","configuration":{}}}',
        shape=(DimensionShape(10, 3),),
    )
    snapshot = EMPTY.with_nodes({"/a": node})
    assert decode_snapshot(encode_snapshot(snapshot)).nodes["/a"] == node
    with raises(InvalidInputError, "unsupported-operation-for-version", "/a"):
        encode_snapshot(snapshot, 1)


def test_another_id_than_expected_is_a_format_error_that_names_both() -> None:
    with raises(FormatError, "invalid-file-format", "0" * 20, encode_id(EMPTY.id)):
        decode_snapshot(encode_snapshot(EMPTY), expected_id=ObjectId(bytes(12)))


def test_text_that_is_not_unicode_is_refused() -> None:
    with raises(InvalidInputError, "serialization", repr("\ud800")):
        encode_snapshot(replace(EMPTY, message="\ud800"))


def test_a_number_that_the_format_has_no_room_for_is_refused() -> None:
    with raises(InvalidInputError, "serialization", 2**64):
        encode_snapshot(replace(EMPTY, flushed_at_us=2**64))
