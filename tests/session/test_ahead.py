"""Chunks written ahead as columns of references."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from icechunk.format.ids import ObjectId
from icechunk.format.values import INLINE, NATIVE
from icechunk.session.ahead import Place, WrittenChunk, refs_of

COORDS = st.tuples(st.integers(0, 9), st.integers(0, 9))
PLACES = st.tuples(st.binary(min_size=12, max_size=12).map(ObjectId), st.integers(0, 2**40), st.integers(1, 2**32))
INLINE_DATA = st.binary(min_size=1, max_size=20)


def chunks_of(kind: st.SearchStrategy[Place | bytes | None]) -> st.SearchStrategy[list[WrittenChunk]]:
    return st.lists(st.tuples(COORDS, kind), min_size=1, max_size=20)


@given(chunks_of(PLACES) | chunks_of(INLINE_DATA))
def test_each_row_is_a_chunk(chunks: list[WrittenChunk]) -> None:
    refs = refs_of(chunks)
    assert refs is not None
    for row, (coords, written) in enumerate(chunks):
        offset, length = int(refs.offset[row]), int(refs.length[row])
        assert tuple(refs.coords[row].tolist()) == coords
        if isinstance(written, bytes):
            assert refs.kind[row] == INLINE
            assert refs.inline_data[offset : offset + length] == written
        else:
            assert refs.kind[row] == NATIVE
            assert (refs.chunk_id[row].tobytes(), offset, length) == written


@given(chunks_of(PLACES | INLINE_DATA | st.none()))
def test_chunks_of_several_kinds_are_no_columns(chunks: list[WrittenChunk]) -> None:
    kinds = {type(written) for _, written in chunks}
    assert (refs_of(chunks) is None) == (len(kinds) > 1 or kinds == {type(None)})
    assert refs_of([]) is None
