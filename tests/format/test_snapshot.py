from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError, InvalidInputError
from icechunk.format.ids import FIRST_SNAPSHOT, NodeId, ObjectId
from icechunk.format.snapshot import decode_snapshot, encode_snapshot
from icechunk.format.tables import DimensionShape, NodeKind, NodeSnapshot, Snapshot
from tools.fuzz.strategies import snapshots

EMPTY = Snapshot(id=FIRST_SNAPSHOT, flushed_at_us=1, message="")


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from((1, 2)))
def test_snapshots_come_back_as_they_were(data: st.DataObject, spec_version: int) -> None:
    snapshot = data.draw(snapshots(spec_version))
    again = decode_snapshot(encode_snapshot(snapshot, spec_version), expected_id=snapshot.id)
    assert again == snapshot
    assert list(again.nodes) == list(snapshot.nodes)
    assert list(again.manifest_files) == list(snapshot.manifest_files)


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
    with pytest.raises(InvalidInputError, match="/a: format 1 has only regular chunk grids"):
        encode_snapshot(snapshot, 1)


def test_another_id_than_expected_is_a_format_error_that_names_both() -> None:
    with pytest.raises(FormatError, match="snapshot 00000000000000000000: its id is 1CECHNKREP0F1RSTCMT0"):
        decode_snapshot(encode_snapshot(EMPTY), expected_id=ObjectId(bytes(12)))


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="not valid Unicode"):
        encode_snapshot(replace(EMPTY, message="\ud800"))


def test_a_number_that_the_format_has_no_room_for_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="a number of 8 bytes"):
        encode_snapshot(replace(EMPTY, flushed_at_us=2**64))
