"""Sorted search, columns and boxes against plain Python."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.format.values import ID12, INLINE, NATIVE, VIRTUAL, ChunkRef, ChunkRefs
from icechunk.log.session.columns import CoordIndex, concat, find, from_rows, normalized, sort_last, trimmed
from icechunk.log.session.extents import around, bounds, by_tile, halved, in_box, overlap
from tests.log.session.builders import object_id

SMALL = st.integers(0, 6)
LARGE = st.one_of(SMALL, st.sampled_from([2**16, 2**31, 2**32 - 2]))


@st.composite
def coordinates(draw: st.DrawFn, values: st.SearchStrategy[int] = LARGE, unique: bool = False) -> np.ndarray:
    rank = draw(st.integers(1, 5))
    rows = draw(st.lists(st.tuples(*[values] * rank), min_size=1, max_size=40, unique=unique))
    return np.array(rows, np.uint32).reshape(len(rows), rank)


@settings(max_examples=150)
@given(coordinates(), st.data())
def test_sorting_and_searching_equal_plain_python(coords: np.ndarray, data: st.DataObject) -> None:
    rows = [tuple(r) for r in coords.tolist()]
    order = sort_last(coords)
    kept = coords if order is None else coords[order]
    assert [tuple(r) for r in kept.tolist()] == sorted(set(rows))
    if order is not None:
        assert all(tuple(coords[i].tolist()) not in rows[i + 1 :] for i in order)
    index = CoordIndex(kept)
    others = data.draw(st.lists(st.tuples(*[LARGE] * coords.shape[1]), max_size=10))
    wanted = rows + others
    expected = [sorted(set(rows)).index(r) if r in rows else -1 for r in wanted]
    assert [index.find(r) for r in wanted] == expected
    asked = np.array(wanted, np.uint32).reshape(len(wanted), coords.shape[1])
    assert index.find_rows(asked).tolist() == expected


ref = st.one_of(
    st.binary(min_size=1, max_size=5).map(lambda b: ChunkRef(INLINE, data=b, length=len(b))),
    st.integers(0, 99).map(lambda n: ChunkRef(NATIVE, chunk_id=object_id(n), offset=n, length=3)),
    st.builds(
        lambda n, sums: ChunkRef(VIRTUAL, None, None, f"s3://b/{n}", n, 3, *sums),
        st.integers(0, 4),
        st.sampled_from([(None, None), ("e", None), ("f", None), (None, 5)]),
    ),
)


@settings(max_examples=100)
@given(st.lists(st.dictionaries(st.tuples(SMALL, SMALL), ref, max_size=8), min_size=1, max_size=5))
def test_rows_are_equal_after_columns_concatenation_selection_and_trimming(
    parts: list[dict[tuple[int, ...], ChunkRef]],
) -> None:
    columns = [from_rows(p, 2) for p in parts]
    merged = normalized(concat(columns))
    expected: dict[tuple[int, ...], ChunkRef] = {}
    for part in parts:
        expected.update(part)
    assert {tuple(merged.coords[i].tolist()): merged.row(i) for i in range(len(merged))} == expected
    some = trimmed(merged.take(np.arange(0, len(merged), 2)))
    assert {tuple(some.coords[i].tolist()): some.row(i) for i in range(len(some))} == {
        c: expected[c] for c in sorted(expected)[::2]
    }
    assert len(some.inline_data) == int(some.length[some.kind == INLINE].sum())
    assert set(some.locations) == {r.location for r in map(some.row, range(len(some))) if r.location}
    for coords in itertools.product(range(8), range(8)):
        assert find(merged, coords) == expected.get(coords)
    assert find(merged, (1,)) is None
    assert find(ChunkRefs.empty(2), (1, 1)) is None


@settings(max_examples=100)
@given(coordinates(SMALL, unique=True), st.integers(1, 9))
def test_halves_are_disjoint_complete_and_small_enough(coords: np.ndarray, most: int) -> None:
    pieces = halved(coords, most)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(coords)))
    assert all(0 < len(p) <= most for p in pieces)
    boxes = [bounds(coords[p]) for p in pieces]
    assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))


@settings(max_examples=100)
@given(coordinates(SMALL, unique=True), st.integers(1, 5), st.integers(1, 4))
def test_pieces_around_obstacles_meet_neither_them_nor_each_other(coords: np.ndarray, most: int, every: int) -> None:
    pieces = halved(coords, most)
    obstacles = [bounds(coords[p]) for p in pieces[::every]]
    free = [i for i in range(len(coords)) if not any(_holds(o, coords[i].tolist()) for o in obstacles)]
    if not free:
        return
    rest = coords[free]
    boxes = [bounds(rest[p]) for p in around(rest, obstacles)]
    assert not any(overlap(a, b) for a, b in itertools.combinations([*boxes, *obstacles], 2))
    assert sorted(np.concatenate(around(rest, obstacles)).tolist()) == list(range(len(rest)))


@settings(max_examples=100)
@given(coordinates(SMALL, unique=True), st.data())
def test_rows_in_a_box_and_in_tiles_equal_plain_python(coords: np.ndarray, data: st.DataObject) -> None:
    order = sort_last(coords)
    coords = coords if order is None else coords[order]
    rank = coords.shape[1]
    box = tuple(data.draw(st.tuples(SMALL, SMALL)) for _ in range(rank))
    assert in_box(coords, box).tolist() == [i for i, r in enumerate(coords.tolist()) if _holds(box, r)]
    tile = tuple(data.draw(st.integers(1, 4)) for _ in range(rank))
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(coords.tolist()):
        groups.setdefault(tuple(c // t for c, t in zip(row, tile, strict=True)), []).append(i)
    assert [g.tolist() for g in by_tile(coords, tile)] == [groups[k] for k in sorted(groups)]


def _holds(box: tuple[tuple[int, int], ...], row: list[int]) -> bool:
    return all(a <= c < b for c, (a, b) in zip(row, box, strict=True))


@given(st.integers(1, 12), st.lists(st.integers(-1, 11), min_size=1, max_size=20))
def test_only_the_locations_that_rows_have_are_kept_in_their_order(count: int, wanted: list[int]) -> None:
    table = tuple(f"s3://bucket/{i}" for i in range(count))
    location = np.array([i % count if i >= 0 else -1 for i in wanted], np.int32)
    n = len(location)
    refs = ChunkRefs(
        coords=np.arange(n, dtype=np.uint32).reshape(n, 1),
        kind=np.where(location >= 0, np.uint8(VIRTUAL), np.uint8(NATIVE)),
        offset=np.zeros(n, np.uint64),
        length=np.ones(n, np.uint64),
        chunk_id=np.zeros(n, ID12),
        location=location,
        locations=table,
    )
    kept = trimmed(refs)
    assert kept.locations == tuple(table[i] for i in sorted(set(location.tolist()) - {-1}))
    found = [kept.locations[i] if i >= 0 else None for i in kept.location.tolist()]
    assert found == [table[i] if i >= 0 else None for i in location.tolist()]
