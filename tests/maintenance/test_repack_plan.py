"""The plan of a repacking: which objects, where their living bytes go, and the new references."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.values import INLINE, NATIVE, ChunkRefs, Manifest
from icechunk.maintenance.byte_ranges import CHUNK_ID_BYTES, SPAN_BYTES, covered_by_object, native_rows
from icechunk.maintenance.reachability import RowSet, living_rows
from icechunk.maintenance.repack_plan import MAX_STORED, Candidate, Moves, choose, rewritten

A, B = NodeId(b"a" * 8), NodeId(b"b" * 8)
OBJECTS = {ObjectId(bytes([i]) + b"\0" * 11): bytes((37 * i + 11 * j) % 251 for j in range(60)) for i in range(4)}
SPANS = st.lists(st.tuples(st.sampled_from(sorted(OBJECTS)), st.integers(0, 40), st.integers(0, 20)), max_size=20)


def references(spans: list[tuple[ObjectId, int, int]]) -> ChunkRefs:
    return ChunkRefs(
        coords=np.arange(len(spans), dtype=np.uint32)[:, None],
        kind=np.full(len(spans), NATIVE, np.uint8),
        offset=np.array([span[1] for span in spans], np.uint64),
        length=np.array([span[2] for span in spans], np.uint64),
        chunk_id=np.frombuffer(b"".join(span[0] for span in spans), "V12"),
        location=np.full(len(spans), -1, np.int32),
    )


def new_ids() -> Callable[[], ObjectId]:
    numbers = itertools.count(1)
    return lambda: ObjectId(b"\xff" + next(numbers).to_bytes(11, "big"))


def moves_of(refs: ChunkRefs, only: frozenset[ObjectId] | None = None, pack_size_bytes: int = 25) -> Moves:
    rows = RowSet(CHUNK_ID_BYTES + SPAN_BYTES)
    mask = np.array([only is None or id.tobytes() in only for id in refs.chunk_id], np.bool_)
    rows.add(native_rows(refs, mask))
    return Moves(rows.rows, pack_size_bytes=pack_size_bytes, new_object_id=new_ids())


def read(refs: ChunkRefs, objects: dict[ObjectId, bytes]) -> list[bytes]:
    found = zip(refs.chunk_id, refs.offset.tolist(), refs.length.tolist(), strict=True)
    return [objects[ObjectId(id.tobytes())][offset : offset + length] for id, offset, length in found]


@given(SPANS, st.sets(st.sampled_from(sorted(OBJECTS))), st.integers(1, 80))
@settings(max_examples=300)
def test_moved_chunks_read_the_same_and_no_others_move(
    spans: list[tuple[ObjectId, int, int]], chosen: set[ObjectId], pack_size_bytes: int
) -> None:
    refs = references(spans)
    moves = moves_of(refs, frozenset(chosen), pack_size_bytes)
    objects = dict(OBJECTS)
    for i in range(len(moves)):
        pack = moves.pack(i)
        assert pack.id not in objects
        objects[pack.id] = b"".join(OBJECTS[p.source][p.start : p.start + p.length] for p in pack.pieces)
        assert len(objects[pack.id]) == pack.size_bytes < pack_size_bytes + 60
    applied = moves.applied(refs)
    assert read(applied, objects) == read(refs, OBJECTS)
    for before, after in zip(refs.chunk_id, applied.chunk_id, strict=True):
        assert (before.tobytes() in chosen) == (before != after)
    living = {(id, byte) for id, first, length in spans for byte in range(first, first + length) if id in chosen}
    assert moves.num_bytes == len(living)


def test_a_reference_to_bytes_that_do_not_move_is_no_reference_to_something_else() -> None:
    id = min(OBJECTS)
    moves = moves_of(references([(id, 10, 10)]))
    for span in ((id, 5, 3), (id, 10, 11), (id, 15, 10), (id, 30, 1)):
        with pytest.raises(FormatError):
            moves.applied(references([span]))


@given(SPANS)
@settings(max_examples=100)
def test_bytes_of_each_object_count_once(spans: list[tuple[ObjectId, int, int]]) -> None:
    rows = RowSet(CHUNK_ID_BYTES + SPAN_BYTES)
    refs = references(spans)
    if spans:
        rows.add(native_rows(refs, np.ones(len(spans), np.bool_)))
    names, covered = covered_by_object(rows.rows)
    expected = {id: len({b for i, a, n in spans if i == id for b in range(a, a + n)}) for id, _, _ in spans}
    assert dict(zip((ObjectId(n.ljust(12, b"\0")) for n in names.tolist()), covered.tolist(), strict=True)) == expected


def test_a_manifest_keeps_the_arrays_that_use_it_and_nothing_of_others() -> None:
    inline = ChunkRefs(
        coords=np.array([[0], [3]], np.uint32),
        kind=np.full(2, INLINE, np.uint8),
        offset=np.array([0, 4], np.uint64),
        length=np.array([4, 5], np.uint64),
        chunk_id=np.zeros(2, "V12"),
        location=np.full(2, -1, np.int32),
        inline_data=b"deadalive",
    )
    manifest = Manifest(id=ObjectId(b"m" * 12), arrays={A: inline.take(np.array([0])), B: inline.take(np.array([1]))})
    new = rewritten(manifest, {B}, moves_of(references([])), ObjectId(b"n" * 12))
    assert list(new.arrays) == [B]
    assert new.arrays[B].inline_data == b"alive"
    assert new.arrays[B].row(0).data == b"alive"
    (rows,) = living_rows(manifest, {A})
    assert len(rows) == 1


CANDIDATES = st.lists(st.tuples(st.integers(1, 100), st.floats(0, 1)), max_size=12)


@given(CANDIDATES, st.integers(0, 300), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
@settings(max_examples=300)
def test_all_below_the_threshold_are_chosen_and_as_many_more_as_the_bound_needs(
    items: list[tuple[int, float]], whole: int, below: float
) -> None:
    candidates = [
        Candidate(id=ObjectId(bytes([i]) * 12), size_bytes=size, living_bytes=size * share * 0.999)
        for i, (size, share) in enumerate(items)
    ]
    stored = whole + sum(one.size_bytes for one in candidates)
    living = whole + sum(one.living_bytes for one in candidates)
    chosen = choose(candidates, stored_bytes=stored, living_bytes=living, below=below)
    left = [one for one in candidates if one not in chosen]
    assert all(one.living_bytes >= below * one.size_bytes for one in left)
    after = stored - sum(one.size_bytes - one.living_bytes for one in chosen)
    assert after <= MAX_STORED * living + 1e-6
    # None too many: without the last one it would not hold, unless that is below the threshold.
    if chosen and (last := chosen[-1]).living_bytes >= below * last.size_bytes:
        assert after + last.size_bytes - last.living_bytes > MAX_STORED * living
    shares = [one.living_bytes / one.size_bytes for one in chosen]
    assert shares == sorted(shares)
