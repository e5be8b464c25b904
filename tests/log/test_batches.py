"""Many small arrays at once come out as each of them alone."""

from __future__ import annotations

from itertools import count

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.tables import (
    INLINE,
    NATIVE,
    VIRTUAL,
    ChunkRef,
    ChunkRefs,
    DimensionShape,
    Manifest,
    ManifestRef,
    NodeKind,
    NodeSnapshot,
)
from icechunk.log.batches import columns_of_many, pieces_of_small
from icechunk.log.columns import DELETED, from_rows
from icechunk.log.pieces import ArrayPlan, pieces
from icechunk.log.tiles import TilePolicy, plan_tiles
from tools.fuzz.strategies import rows

KINDS = st.sampled_from((INLINE, NATIVE, NATIVE, VIRTUAL))
MANIFEST = ObjectId(b"m" * 12)


@st.composite
def small_arrays(draw: st.DrawFn, ndim: int, virtual: bool, tombstones: bool) -> dict[tuple[int, ...], ChunkRef | None]:
    number = count(draw(st.integers(0, 1000)))
    places = draw(st.sets(st.tuples(*[st.integers(0, 3)] * ndim), max_size=5))
    found: dict[tuple[int, ...], ChunkRef | None] = {}
    for coords in places:
        kind = draw(KINDS)
        n = next(number)
        if tombstones and draw(st.booleans()):
            found[coords] = None
        elif kind == INLINE:
            data = b"%d" % n * draw(st.integers(0, 3))
            found[coords] = ChunkRef(INLINE, data=data, length=len(data))
        elif kind == VIRTUAL and virtual:
            found[coords] = ChunkRef(VIRTUAL, location=f"s3://b/{n}", offset=n, length=1, etag="e")
        else:
            found[coords] = ChunkRef(NATIVE, chunk_id=ObjectId(n.to_bytes(12)), offset=n, length=n)
    return found


def content(refs: ChunkRefs) -> list[tuple[object, ...]]:
    live = refs.kind != DELETED
    return [*rows(refs.take(live)), *map(tuple, refs.coords[~live].tolist())]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2), st.booleans())
def test_rows_of_many_arrays_become_the_columns_of_each(data: st.DataObject, ndim: int, virtual: bool) -> None:
    many = data.draw(st.lists(small_arrays(ndim, virtual, True), max_size=5))
    for refs, own in zip(columns_of_many(many, ndim), many, strict=True):
        assert content(refs) == content(from_rows(own, ndim))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans())
def test_many_arrays_are_merged_with_their_manifests_as_each_of_them(data: st.DataObject, virtual: bool) -> None:
    arrays: list[ArrayPlan] = []
    old: dict[NodeId, ChunkRefs] = {}
    for i in range(data.draw(st.integers(0, 5))):
        ndim = data.draw(st.integers(0, 2))
        grid = [data.draw(st.integers(1, 4)) for _ in range(ndim)]
        id = NodeId(i.to_bytes(8))
        present = from_rows(data.draw(small_arrays(ndim, virtual, False)), ndim)
        box = ((0, 4),) * ndim
        log = from_rows(data.draw(small_arrays(ndim, virtual, True)), ndim)
        log = log.take(np.array([all(c < n for c, n in zip(row, grid, strict=True)) for row in log.coords], np.bool_))
        gone = log.kind == DELETED
        node = NodeSnapshot(
            id=id,
            path=f"/{i}",
            kind=NodeKind.ARRAY,
            user_data=b"",
            shape=tuple(DimensionShape(n, n) for n in grid),
            manifests=(ManifestRef(MANIFEST, box),) if len(present) else (),
        )
        if len(present):
            old[id] = present
        written, deleted = log.take(~gone), log.coords[gone]
        tiles = plan_tiles(node.manifests, {}, grid, written.coords, deleted, TilePolicy(max_refs=64, fan_in=8))
        arrays.append(ArrayPlan(node=node, tiles=tuple(tiles), written=written, deleted=deleted, tile_shape=None))
    manifests = {MANIFEST: Manifest(id=MANIFEST, arrays=old)}
    together = pieces_of_small(arrays, manifests, 64)
    for array in arrays:
        alone = list(pieces(array, manifests, 64))
        if array.node.id in together:
            piece = together[array.node.id]
            assert [rows(refs) for refs in alone] == ([rows(piece)] if len(piece) else [])
        else:
            refs = old.get(array.node.id)
            texts = bool(array.written.locations) or (refs is not None and bool(refs.locations))
            assert texts or not any(tile.dirty for tile in array.tiles)
