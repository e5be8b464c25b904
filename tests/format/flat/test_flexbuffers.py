from __future__ import annotations

import struct
from typing import Any

import pytest
from flatbuffers import flexbuffers as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError, InvalidInputError
from icechunk.format.flat import flexbuffers
from tests.raising import raises
from tools.fuzz.strategies import json_values

_ASCII = st.text(st.characters(max_codepoint=127, exclude_characters="\0"), min_size=1, max_size=6)
# values that the independent library can also read: keys in ASCII
_PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | _ASCII,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_ASCII, inner, max_size=5),
    max_leaves=20,
)
# values that it can also write: small floats, signed integers
_WRITABLE: st.SearchStrategy[Any] = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(width=32, allow_nan=False, allow_infinity=False)
    | _ASCII,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_ASCII, inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=200)
@given(json_values)
def test_values_come_back_as_they_were(value: Any) -> None:
    assert flexbuffers.loads(flexbuffers.dumps(value)) == value


@settings(max_examples=150)
@given(_PLAIN)
def test_an_independent_reader_reads_our_bytes(value: Any) -> None:
    assert reference.Loads(flexbuffers.dumps(value)) == value


@settings(max_examples=150)
@given(_WRITABLE)
def test_our_reader_reads_the_bytes_of_an_independent_writer(value: Any) -> None:
    data = bytes(reference.Dumps(value))
    assert flexbuffers.loads(data) == reference.Loads(data)


def test_typed_and_fixed_vectors_and_indirect_numbers_are_read() -> None:
    builder = reference.Builder()
    with builder.Vector():
        builder.FixedTypedVectorFromElements([1, -2, 3])
        builder.FixedTypedVectorFromElements([1.5, 2.5])
        builder.TypedVectorFromElements([True, False])
        builder.TypedVectorFromElements([300, 70_000, 5])
        builder.IndirectFloat(2.5)
        builder.IndirectInt(-3)
        builder.IndirectUInt(3)
        builder.Blob(b"\0\1")
    assert flexbuffers.loads(bytes(builder.Finish())) == [
        [1, -2, 3],
        [1.5, 2.5],
        [True, False],
        [300, 70_000, 5],
        2.5,
        -3,
        3,
        b"\0\1",
    ]


@pytest.mark.parametrize(("width", "code"), [(2, "e"), (4, "f"), (8, "d")])
def test_floats_of_every_width_are_read(width: int, code: str) -> None:
    assert flexbuffers.loads(struct.pack("<" + code, 1.5) + bytes((3 << 2 | width.bit_length() - 1, width))) == 1.5


def test_big_values_need_wider_offsets_and_come_back() -> None:
    value = {"a": ["x" * 300, b"y" * 70_000, {"deep": list(range(1000))}], "b": "x" * 300}
    assert flexbuffers.loads(flexbuffers.dumps(value)) == value


def test_map_keys_are_sorted_by_their_bytes() -> None:
    assert list(flexbuffers.loads(flexbuffers.dumps({"é": 1, "z": 2, "a": 3}))) == ["a", "z", "é"]


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, 2**64, -(2**63) - 1, {"a\0": 1}, "\ud800", {"\ud800": 1}, [{1, 2}]]
)
def test_values_that_are_not_json_like_are_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError):
        flexbuffers.dumps(value)


def test_nesting_is_bounded_both_ways() -> None:
    value: Any = 1
    for _ in range(flexbuffers.MAX_DEPTH):
        value = [value]
    data = flexbuffers.dumps(value)
    assert flexbuffers.loads(data) == value
    with raises(InvalidInputError, "bad-metadata", 100):
        flexbuffers.dumps([value])
    builder = reference.Builder()
    builder.Add([value])
    with raises(FormatError, "deserialization", 100):
        flexbuffers.loads(bytes(builder.Finish()))


def test_vectors_that_share_their_children_exponentially_are_refused() -> None:
    # each vector is [previous, previous]: size, two offsets, two types
    data = bytearray(b"\x01\x05\x04")  # [5], untyped
    previous = 1
    for _ in range(60):
        data.append(2)
        position = len(data)
        data += bytes((position - previous, position + 1 - previous, 10 << 2, 10 << 2))
        previous = position
    data += bytes((len(data) - previous, 10 << 2, 1))
    with raises(FormatError, "deserialization", "overlap"):  # words: only they tell the defect
        flexbuffers.loads(bytes(data))


@pytest.mark.parametrize("data", [b"", b"\0", b"\0\0", b"\0\0\3", b"\xff\x28\x01", b"\x01\x14\x01", b"\0\xf0\x01"])
def test_random_bytes_are_a_format_error(data: bytes) -> None:
    with pytest.raises(FormatError):
        flexbuffers.loads(data)
