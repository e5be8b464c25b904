from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icechunk.errors import InvalidInputError
from icechunk.format.ids import ObjectId, encode_id, encode_ids, object_ids_from_texts
from tests.raising import raises


@given(st.lists(st.binary(min_size=12, max_size=12).map(ObjectId), max_size=40))
def test_many_ids_come_back_from_their_texts(ids: list[ObjectId]) -> None:
    assert encode_ids(ids) == [encode_id(id) for id in ids]
    assert object_ids_from_texts([encode_id(id) for id in ids]) == ids


@pytest.mark.parametrize("wrong", ["", "0" * 19, "0" * 19 + "1", "0" * 19 + "U", "0" * 19 + "é", "0" * 21, "0" * 40])
def test_among_many_texts_the_one_that_is_no_id_is_named(wrong: str) -> None:
    texts = [encode_id(bytes([i]) * 12) for i in range(30)]
    with raises(InvalidInputError, "invalid-snapshot-id", wrong):
        object_ids_from_texts([*texts, wrong, *texts])
