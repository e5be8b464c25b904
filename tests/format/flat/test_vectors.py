from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icechunk.format.flat import vectors
from icechunk.format.flat.flatbuffers import Buffer
from icechunk.format.flat.vectors import Vectors, is_ascending, text_traits

# Texts that share their first words, end at the edges of words, hold zeros, or are too long to be compared whole.
COMMON = st.sampled_from([0, 1, 7, 8, 9, 16, 45, 64])
TEXTS = st.lists(
    st.builds(lambda common, own: b"x" * common + own, COMMON, st.binary(max_size=20)),
    max_size=60,
)


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
