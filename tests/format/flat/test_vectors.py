from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icechunk.format.flat import vectors
from icechunk.format.flat.flatbuffers import Buffer
from icechunk.format.flat.vectors import TableColumns, Vectors, gather, is_ascending, text_traits

# Texts that share their first words, end at the edges of words, hold zeros, or are too long to be compared whole.
COMMON = st.sampled_from([0, 1, 7, 8, 9, 16, 45, 64])
TEXTS = st.lists(
    st.builds(lambda common, own: b"x" * common + own, COMMON, st.binary(max_size=20)),
    max_size=60,
)


@given(
    positions=st.lists(st.integers(0, 1000), max_size=200),
    step=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(["<u4", "<i4", "<u2", "u1"]),
)
def test_numbers_are_those_at_their_positions_whether_these_are_aligned_or_not(
    positions: list[int], step: int, kind: str
) -> None:
    payload = np.random.default_rng(0).bytes(4005)
    found = gather(Buffer(payload, "numbers"), np.array(positions, np.int64) * step, kind)
    dtype = np.dtype(kind)
    expected = [np.frombuffer(payload, dtype, 1, step * position)[0] for position in positions]
    assert found.dtype == dtype
    assert found.tolist() == expected


# Positions of two fields in a table of 12 bytes; 0: it has no such field.
LAYOUTS = st.lists(st.tuples(st.sampled_from([0, 4, 8]), st.sampled_from([0, 4, 8])), min_size=1, max_size=4)


@given(layouts=LAYOUTS, runs=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=8))
def test_fields_are_the_same_whether_vtables_are_compared_or_each_is_looked_up(
    layouts: list[tuple[int, int]], runs: list[tuple[int, int]]
) -> None:
    payload = bytearray(b"\0\0\0\0Ichk")
    vtables = []
    for layout in layouts:
        vtables.append(len(payload))
        payload += struct.pack("<4H", 8, 12, *layout)
    positions, expected = [], []
    for number, count in runs:
        for _ in range(count):
            at = len(payload)
            positions.append(at)
            payload += struct.pack("<i2I", at - vtables[number % len(layouts)], at, at + 1)
            expected.append([at + (field - 4) // 4 if field else 0 for field in layouts[number % len(layouts)]])
    buffer = Buffer(bytes(payload), "tables")
    for few in (0, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vectors, "_FEW_VTABLES", few)
            tables = TableColumns(buffer, np.array(positions, np.int64))
        found = [tables.numbers(slot, "<u4").tolist() for slot in (0, 1)]
        assert found == [list(column) for column in zip(*expected, strict=True)]
        assert not tables.numbers(2, "<u4").any()


@given(texts=TEXTS, in_order=st.booleans(), distinct=st.booleans(), bytes_after=st.sampled_from([0, 7, 80]))
def test_the_traits_of_texts_are_those_of_each_beside_the_next(
    texts: list[bytes], in_order: bool, distinct: bool, bytes_after: int
) -> None:
    found = list(dict.fromkeys(texts)) if distinct else texts
    if in_order:
        found = sorted(found)
    counts = np.array([len(text) for text in found], np.int64)
    # A payload has at least 8 bytes.
    where = Vectors(None, 8 + np.cumsum(counts) - counts, counts)
    payload = b"\0\0\0\0Ichk" + b"".join(found) + b"\xff" * bytes_after
    traits = text_traits(Buffer(payload, "texts"), where)
    assert traits.is_ascending == all(before < after for before, after in itertools.pairwise(found))
    assert traits.is_ascii == b"".join(found).isascii()


@pytest.mark.parametrize("block", [1, 2, 3, 65536])
@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=7),
    in_order=st.booleans(),
    firsts=st.none() | st.lists(st.booleans(), min_size=7, max_size=7),
)
def test_rows_ascend_if_each_is_greater_than_the_one_before_it_in_its_group(
    block: int, rows: list[tuple[int, int]], in_order: bool, firsts: list[bool] | None
) -> None:
    found = sorted(set(rows)) if in_order else rows
    first_of_group = None if firsts is None else np.array(firsts[: len(found)], np.bool_)
    expected = all(
        a < b or (firsts is not None and firsts[i + 1]) for i, (a, b) in enumerate(itertools.pairwise(found))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "_BLOCK", block)
        assert is_ascending(np.array(found, np.uint32).reshape(-1, 2), first_of_group) == expected
