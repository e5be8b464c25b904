"""Headers of ranges, dates and ETags."""

from __future__ import annotations

import pytest

from icechunk.storage.http.headers import date_us, range_header, result_of, version_of
from icechunk.storage.port import ByteRange, Range, Suffix


@pytest.mark.parametrize(
    ("wanted", "header"),
    [
        (None, {}),
        (Range(0, 1), {"range": "bytes=0-0"}),
        (Range(5, None), {"range": "bytes=5-"}),
        (Suffix(7), {"range": "bytes=-7"}),
    ],
)
def test_ranges(wanted: ByteRange, header: dict[str, str]) -> None:
    assert range_header(wanted) == header


@pytest.mark.parametrize(
    ("text", "us"),
    [
        ("Thu, 01 Jan 1970 00:00:01 GMT", 1_000_000),
        ("Thu, 01 Jan 1970 02:00:01 +0200", 1_000_000),
        ("yesterday", None),
        ("", None),
    ],
)
def test_dates(text: str, us: int | None) -> None:
    assert date_us({"Date": text}) == us
    assert date_us({}, "Last-Modified") is None


def test_a_result_has_the_values_of_the_headers() -> None:
    headers = {
        "ETag": '"abc"',
        "Date": "Thu, 01 Jan 1970 00:00:02 GMT",
        "Last-Modified": "Thu, 01 Jan 1970 00:00:01 GMT",
    }
    found = result_of(headers, b"xy", 9)
    assert (found.data, found.size, found.version, found.modified_us, found.date_us) == (
        b"xy",
        9,
        "abc",
        1_000_000,
        2_000_000,
    )
    bare = result_of({}, b"", 0)
    assert (bare.version, bare.modified_us, bare.date_us) == (version_of({}), 0, None) == ("", 0, None)
