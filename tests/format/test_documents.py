"""The JSON that a document may hold."""

from __future__ import annotations

import math
import re

import pytest

from icechunk.format.documents import parse_document


def test_escaped_lone_surrogates_and_numbers_beyond_floats_are_json() -> None:
    assert parse_document(rb'{"a":"caf\udce9","\ud800":1}') == {"a": "caf\udce9", "\ud800": 1}
    assert parse_document(b"[1E400,-1E400]") == [math.inf, -math.inf]
    assert parse_document('{"é":"😀"}'.encode()) == {"é": "😀"}


@pytest.mark.parametrize(
    ("document", "place"),
    [
        (b'{"attributes":{"a":NaN}}', "attributes['a'] is NaN"),
        (b'{"attributes":{"a":[1,{"b":-Infinity}]}}', "attributes['a'][1]['b'] is -Infinity"),
    ],
)
def test_numbers_that_json_does_not_have_are_refused_with_their_place(document: bytes, place: str) -> None:
    with pytest.raises(ValueError, match=re.escape(place)):
        parse_document(document)


@pytest.mark.parametrize(
    "document", [b"", b"{", b"\xff", b'{"a":"\xe9"}', b"[" * 100_000, b'{"a":1}x', "[1]".encode("utf-16")]
)
def test_bytes_that_are_no_json_are_refused(document: bytes) -> None:
    with pytest.raises(ValueError, match=re.escape("JSON")):
        parse_document(document)
