"""Documents that are accepted, and the kinds of those that are not; "as official" where 2.3.0 agrees."""

from __future__ import annotations

import json
from typing import Any

import pytest

from icechunk.errors import InvalidInputError
from icechunk.log.session.zarr_metadata import ArrayMeta, GroupMeta, parse_node
from tests.log.session.builders import GROUP, array_json
from tests.raising import raises


def document(**fields: Any) -> bytes:
    whole = {**json.loads(array_json((10,), (2,))), **fields}
    return json.dumps({k: v for k, v in whole.items() if v is not ...}).encode()


def rectilinear(*shapes: object) -> dict[str, object]:
    return {"name": "rectilinear", "configuration": {"kind": "inline", "chunk_shapes": list(shapes)}}


def test_a_group_is_parsed() -> None:
    assert parse_node(GROUP, "/") == GroupMeta()
    assert parse_node(b'{"zarr_format":3,"node_type":"group"}', "/") == GroupMeta()


@pytest.mark.parametrize(
    ("shape", "chunks", "grid"),
    [((10,), (3,), (4,)), ((), (), ()), ((0,), (2,), (0,)), ((2**40, 1), (2**20, 5), (2**20, 1))],
)
def test_a_regular_grid_is_counted(shape: tuple[int, ...], chunks: tuple[int, ...], grid: tuple[int, ...]) -> None:
    meta = parse_node(array_json(shape, chunks), "/a")
    assert meta == ArrayMeta(shape=shape, num_chunks=grid, dimension_names=None)


@pytest.mark.parametrize(("edges", "count"), [([[2, 3], 4], 4), ([2, 3, 5], 3), (3, 4)])
def test_a_rectilinear_grid_is_counted(edges: object, count: int) -> None:
    meta = parse_node(document(chunk_grid=rectilinear(edges)), "/a")
    assert isinstance(meta, ArrayMeta)
    assert meta.num_chunks == (count,)


@pytest.mark.parametrize("encoding", ["default", {"name": "default"}, {"name": "default", "configuration": {}}])
def test_every_spelling_of_the_default_key_encoding_is_accepted(encoding: object) -> None:
    assert parse_node(document(chunk_key_encoding=encoding), "/a") == parse_node(document(), "/a")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"[]",
        b'{"zarr_format":3,"node_type":"group","attributes":{"a":NaN}}',
        document(node_type=...),
        document(node_type="x"),
        document(zarr_format=2),
        *(document(**{f: ...}) for f in ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs")),
        document(shape=[-1]),
        document(shape=[1.5]),
        document(shape=[True]),
        document(shape=[2**64]),
        document(chunk_grid={"name": "x", "configuration": {}}),
        document(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0]}}),
        document(chunk_grid=rectilinear([[2]])),
        document(chunk_key_encoding=3),
        document(chunk_key_encoding={"name": "default", "configuration": 3}),
        document(dimension_names=[1]),
    ],
)
def test_documents_that_are_not_zarr_are_bad_metadata(data: bytes) -> None:
    with raises(InvalidInputError, "bad-metadata", "/a"):
        parse_node(data, "/a")


@pytest.mark.parametrize(
    "data",
    [
        document(chunk_key_encoding={"name": "v2", "configuration": {"separator": "."}}),
        document(chunk_key_encoding={"name": "default", "configuration": {"separator": "."}}),
        document(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [2, 2]}}),
        document(chunk_grid=rectilinear([2], [2])),
        document(dimension_names=["a", "b"]),
        document(shape=[2**40], chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1]}}),
    ],
)
def test_arrays_that_cannot_be_stored_are_invalid_array_metadata(data: bytes) -> None:
    with raises(InvalidInputError, "invalid-array-metadata", "/a"):
        parse_node(data, "/a")
