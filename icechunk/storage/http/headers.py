"""Headers that servers of objects and of files have in common: ranges, dates, ETags."""

from __future__ import annotations

import calendar
from collections.abc import Mapping
from email.utils import parsedate_tz
from functools import lru_cache

from icechunk.storage.port import ByteRange, GetResult, Range, Suffix, Version

__all__ = ["date_us", "range_header", "result_of", "version_of"]


def range_header(byte_range: ByteRange) -> dict[str, str]:
    """The header that asks for a range."""
    match byte_range:
        case None:
            return {}
        case Range(start, None):
            return {"range": f"bytes={start}-"}
        case Range(start, end):
            return {"range": f"bytes={start}-{(end or 0) - 1}"}
        case Suffix(length):
            return {"range": f"bytes=-{length}"}


@lru_cache(maxsize=256)
def _parse_date(text: str) -> int | None:
    parsed = parsedate_tz(text)
    if parsed is None:
        return None
    return (calendar.timegm(parsed[:9]) - (parsed[9] or 0)) * 1_000_000


def date_us(headers: Mapping[str, str], name: str = "Date") -> int | None:
    """A date header, µs since the epoch; None where it is missing or no date."""
    text = headers.get(name)
    return None if text is None else _parse_date(text)


def version_of(headers: Mapping[str, str]) -> Version:
    """The ETag without its quotes."""
    return Version(headers.get("ETag", "").strip('"'))


def result_of(headers: Mapping[str, str], body: bytes | memoryview, size: int) -> GetResult:
    """What was read, from the headers that came with it; ``size`` is the whole object's."""
    return GetResult(
        body=body,
        size=size,
        version=version_of(headers),
        modified_us=date_us(headers, "Last-Modified") or 0,
        date_us=date_us(headers),
    )
