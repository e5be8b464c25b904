"""Metadata and argument types, at the boundary."""

from __future__ import annotations

import math
from decimal import Decimal
from enum import Enum
from typing import Any

import numpy as np
import pytest

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.checks import WrongTypeError, json_metadata, require_text, require_type
from tests.raising import raises


class Letter(str, Enum):  # noqa: UP042  # `str` of a member is its name
    A = "a"


@pytest.mark.parametrize(
    "value", [None, True, 0, 2**64 - 1, -(2**63), 1.5, math.inf, "", "é", [], [1, [2]], {}, {"a": {"b": None}}]
)
def test_json_values_are_taken_as_they_are(value: Any) -> None:
    assert json_metadata("metadata", {"key": value}) == {"key": value}


def test_tuples_become_lists_and_the_copy_is_deep() -> None:
    inner = [1]
    copy = json_metadata("metadata", {"t": (1, 2), "l": inner})
    inner.append(2)
    assert copy == {"t": [1, 2], "l": [1]}


@pytest.mark.parametrize("value", [b"x", bytearray(b"x"), object(), {1, 2}, 1j, ..., {1: 2}, {"a": {None: 1}}, [b""]])
def test_values_that_are_not_json_are_a_type_error(value: Any) -> None:
    with raises(WrongTypeError, "bad-metadata", "metadata['key']"):
        json_metadata("metadata", {"key": value})


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", [2**64, -(2**63) - 1, 1 << 20_000, "\ud800", {"\ud800": 1}, nested(101), nested(5000)], ids=range(7)
)
def test_values_that_json_readers_cannot_hold_are_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError) as refused:
        json_metadata("metadata", {"key": value})
    assert refused.value.kind == ErrorKind.BAD_METADATA
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("value", ["text", [1], 1, {1: 2}])
def test_metadata_is_a_mapping_with_text_keys(value: Any) -> None:
    with raises(WrongTypeError, "bad-metadata" if value == {1: 2} else "invalid-setting", "metadata"):
        json_metadata("metadata", value)


def test_no_metadata_is_empty_metadata() -> None:
    assert json_metadata("metadata", None) == {}


def test_types_are_named_in_the_refusal() -> None:
    with raises(WrongTypeError, "invalid-setting", "message", "str", "int", 3):
        require_text("message", 3)
    with raises(WrongTypeError, "invalid-setting", "limit", "int", "float", "str"):
        require_type("limit", "3", int, float)
    require_type("limit", None, int, optional=True)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.float32(1.5), 1.5),
        (np.longdouble(1.5), 1.5),
        (np.bool_(True), True),
        (np.str_("s"), "s"),
        (np.arange(3), [0, 1, 2]),
        (np.ones((2, 2)), [[1.0, 1.0], [1.0, 1.0]]),
        (np.array(5), 5),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array([1, "a", np.float32(2)], object), [1, "a", 2.0]),
        ([np.int8(1), {"b": np.float64(2)}], [1, {"b": 2.0}]),
        (range(2), [0, 1]),
        (Decimal("1.5"), 1.5),
        (Letter.A, "a"),
    ],
)
def test_numbers_and_arrays_of_numpy_become_json_as_the_official_library_makes_it(value: object, plain: object) -> None:
    found = json_metadata("metadata", {"key": value})["key"]
    assert found == plain
    assert type(found) is type(plain)


@pytest.mark.parametrize(
    "value",
    [
        np.datetime64("2020-01-01T00:00:00.000000000"),
        np.timedelta64(3, "s"),
        np.array(["2020-01-01"], "M8[ns]"),
        np.complex64(1),
        np.array([b"a"]),
    ],
    ids=repr,
)
def test_values_that_json_cannot_express_are_refused(value: object) -> None:
    with pytest.raises(WrongTypeError):
        json_metadata("metadata", {"key": value})
