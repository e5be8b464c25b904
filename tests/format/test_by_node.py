"""Columns of many arrays are a mapping like one of each array's own rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.format.by_node import grouped_coords
from icechunk.format.ids import NodeId
from icechunk.format.manifest import decode_manifest, encode_manifest
from icechunk.format.manifest.refs_by_node import grouped_refs
from icechunk.format.values import Manifest
from tools.fuzz.strategies import contents, manifests, node_ids, rows

Coordinates = st.dictionaries(
    node_ids, st.integers(0, 2).flatmap(lambda ndim: st.lists(st.tuples(*[st.integers(0, 9)] * ndim), max_size=4))
)


@settings(max_examples=60)
@given(manifests())
def test_references_of_many_arrays_are_those_of_each(manifest: Manifest) -> None:
    columns = grouped_refs(manifest.arrays)
    assert list(columns) == list(manifest.arrays)
    assert len(columns) == len(manifest.arrays)
    assert columns.num_rows == manifest.num_chunk_refs
    for node, refs in manifest.arrays.items():
        assert node in columns
        assert columns[node].ndim == refs.ndim
        assert rows(columns[node]) == rows(refs)
    assert columns.get(NodeId(b"absent..")) is None


@settings(max_examples=60)
@given(manifests(), st.sampled_from((1, 2)))
def test_a_manifest_of_columns_is_written_like_one_of_single_arrays(manifest: Manifest, spec_version: int) -> None:
    columns = Manifest(id=manifest.id, arrays=grouped_refs(manifest.arrays))
    written = encode_manifest(columns, spec_version)
    assert written == encode_manifest(manifest, spec_version)
    # A decoded manifest has columns as well: they need not be made from the arrays again.
    read = decode_manifest(written)
    assert contents(read) == contents(manifest)
    assert contents(decode_manifest(encode_manifest(read, spec_version))) == contents(manifest)


@settings(max_examples=60)
@given(Coordinates)
def test_coordinates_of_many_arrays_are_those_of_each(drawn: dict[NodeId, list[tuple[int, ...]]]) -> None:
    chunks = {
        node: np.array(coords, np.uint32).reshape(len(coords), len(coords[0]) if coords else 0)
        for node, coords in drawn.items()
    }
    columns = grouped_coords(chunks)
    assert list(columns) == sorted(chunks)
    assert columns.num_rows == sum(map(len, chunks.values()))
    assert all(columns[node].tolist() == coords.tolist() for node, coords in chunks.items())
    assert grouped_coords(columns) is columns
