"""Both maps do what a dict does, and leave the maps that they were made from as they were."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icechunk.runtime.persistent_map import Map, PyrsistentMap

KEYS = st.integers(0, 40)
CHANGES = st.lists(
    st.tuples(st.just("set"), KEYS, st.integers())
    | st.tuples(st.just("delete"), KEYS)
    | st.tuples(st.just("update"), st.dictionaries(KEYS, st.integers()))
)


@pytest.mark.parametrize("kind", [Map, PyrsistentMap])
@given(start=st.dictionaries(KEYS, st.integers()), changes=CHANGES)
def test_a_map_changes_as_a_dict_does(kind: Any, start: dict[int, int], changes: list[Any]) -> None:
    made, expected = kind(start), dict(start)
    for change, *what in changes:
        before, kept = made, dict(expected)
        if change == "set":
            made = made.set(*what)
            expected[what[0]] = what[1]
        elif change == "update":
            made = made.update(*what)
            expected.update(*what)
        elif what[0] in expected:
            made = made.delete(*what)
            del expected[what[0]]
        else:
            with pytest.raises(KeyError):
                made.delete(*what)
        assert dict(before.items()) == kept
        assert dict(made.items()) == dict(made) == expected
        assert set(made) == set(expected)
        assert sorted(made.values()) == sorted(expected.values())
        assert len(made) == len(expected)
    for key in range(41):
        assert (key in made, made.get(key), made.get(key, "none")) == (
            key in expected,
            expected.get(key),
            expected.get(key, "none"),
        )
    assert made == kind(expected)
    assert hash(made) == hash(kind(expected))
    with pytest.raises(KeyError):
        made[41]


@pytest.mark.parametrize("kind", [Map, PyrsistentMap])
def test_a_map_is_made_of_pairs_and_of_nothing(kind: Any) -> None:
    assert dict(kind(enumerate("ab"))) == {0: "a", 1: "b"}
    assert dict(kind()) == {}
