"""JSON by the standard library: the values and the refusals of orjson."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icechunk.runtime.json_codec import JSONDecodeError, JSONEncodeError, standard_dumps, standard_loads

orjson = pytest.importorskip("orjson")

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
TEXTS = st.text(alphabet='[]{}",:\\ue1.-0dDNa8tfs ', max_size=30).map(str.encode)


def outcome(function: Any, value: Any) -> Any:
    """The result, NaN as text; an error by its kind."""
    try:
        return repr(function(value))
    except JSONDecodeError:
        return JSONDecodeError
    except JSONEncodeError:
        return JSONEncodeError


def nested(depth: int, inner: Any) -> Any:
    for _ in range(depth):
        inner = [inner]
    return inner


@given(VALUES)
def test_both_write_the_same_value(value: Any) -> None:
    ours, theirs = outcome(standard_dumps, value), outcome(orjson.dumps, value)
    assert (ours is JSONEncodeError) == (theirs is JSONEncodeError)
    if ours is not JSONEncodeError:
        assert repr(orjson.loads(standard_dumps(value))) == repr(orjson.loads(orjson.dumps(value)))


@pytest.mark.parametrize("value", [{1: 2}, b"bytes", {"a": object()}, "\ud800", {"\udfff": 1}, nested(255, 1), 2**64])
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    assert outcome(standard_dumps, value) is outcome(orjson.dumps, value) is JSONEncodeError


def test_tuples_are_lists_and_numbers_that_are_not_finite_are_null() -> None:
    value = {"a": (1, nested(250, None)), "b": math.nan, "c": -math.inf}
    assert standard_dumps(value) == orjson.dumps(value)


@given(VALUES.map(lambda value: repr(value).replace("'", '"').encode(errors="surrogatepass")) | st.binary() | TEXTS)
def test_both_read_the_same_value(text: bytes) -> None:
    assert outcome(standard_loads, text) == outcome(orjson.loads, text)


@pytest.mark.parametrize(
    "text",
    [
        *("NaN", "-Infinity", "1e999", "18446744073709551615", "18446744073709551616", "-9223372036854775809"),
        *("9" * 300, "9" * 5000, "-0", "-0.0", "1E5", "01", "1.", '"\t"', '"\\ud800"', '"\\ud83d\\ude00"', "\ufeff1"),
        *('{"a": 1, "a": 2}', "[1,]", "", " ", "1 2", "\x0c1", "[" * 300 + "]" * 300),
    ],
)
def test_a_text_is_read_or_refused_as_by_orjson(text: str) -> None:
    for data in (text, text.encode(), memoryview(text.encode())):
        assert outcome(standard_loads, data) == outcome(orjson.loads, data)


@pytest.mark.parametrize("text", ["[" * 1025 + "]" * 1025, "[" * 100_000, '{"a":' * 1025 + "1" + "}" * 1025])
def test_a_text_that_is_nested_too_deep_is_refused(text: str) -> None:
    assert outcome(standard_loads, text) is outcome(orjson.loads, text) is JSONDecodeError
