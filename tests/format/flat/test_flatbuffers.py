"""Texts of a file, many at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icechunk.errors import InvalidInputError
from icechunk.format.flat.flatbuffers import all_utf8, joined_utf8, utf8

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=8)


@given(TEXTS)
def test_many_texts_are_encoded_as_each_of_them(texts: list[str]) -> None:
    each = [utf8(text) for text in texts]
    assert all_utf8(texts) == each
    whole, sizes = joined_utf8(texts)
    assert whole == b"".join(each)
    assert sizes.tolist() == [len(one) for one in each]


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["\0"], ["a\0b", "c"], ["\0", "\0\0"]])
def test_texts_with_zeros_and_empty_ones_stay_apart(texts: list[str]) -> None:
    assert all_utf8(texts) == [utf8(text) for text in texts]


@pytest.mark.parametrize("encode", [all_utf8, joined_utf8])
def test_a_text_that_is_no_unicode_is_refused(encode: Callable[[list[str]], object]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        encode(["fine", "\ud800"])
    assert caught.value.kind == "serialization"
