"""Headers that servers of objects and of files have in common: ranges, dates, ETags."""

from __future__ import annotations

import calendar
import re
from collections.abc import Mapping
from email.utils import parsedate_tz
from functools import lru_cache

from icechunk.storage.port import ByteRange, GetResult, Range, Suffix, Version

__all__ = ["content_length", "date_us", "most_bytes", "range_header", "result_of", "served_size", "version_of"]

# MinIO says "bytes 0--1/0" for an empty object.
_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,18})-(-?[0-9]{1,18})|\*)/([0-9]{1,18})")


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


def most_bytes(byte_range: ByteRange) -> int | None:
    """Largest number of bytes in a range; None if its end depends on the object."""
    match byte_range:
        case Range(start, int(end)):
            return end - start
        case Suffix(length):
            return length
    return None


def served_size(headers: Mapping[str, str], wanted: ByteRange, received: int | None = None) -> int | None:
    """The size of the whole object, from the ``Content-Range`` of an answer of status 206 or 416.

    Parameters
    ----------
    wanted
        The range that was asked for.
    received
        Number of bytes in the body of a 206; None: the status is 416, which has no range.

    Returns
    -------
    int or None
        None if the header is missing or malformed, or names another range than the wanted one.
    """
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if match is None:
        return None
    size = int(match[3])
    if received is None:
        return size if match[1] is None else None
    if match[1] is None or int(match[2]) - int(match[1]) + 1 != received:
        return None
    first, last = int(match[1]), int(match[2])
    match wanted:
        case Range(start, end):
            right = (first, last) == (start, size - 1 if end is None else min(end, size) - 1)
        case Suffix(length):
            right = (first, last) == (max(0, size - length), size - 1)
        case None:
            right = False
    return size if right else None


def content_length(headers: Mapping[str, str]) -> int | None:
    """The value of ``Content-Length``; None if it is missing or malformed."""
    text = headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


@lru_cache(maxsize=256)
def _parse_date(text: str) -> int | None:
    try:
        parsed = parsedate_tz(text)
        return None if parsed is None else (calendar.timegm(parsed[:9]) - (parsed[9] or 0)) * 1_000_000
    except (ValueError, OverflowError, IndexError, TypeError):
        return None


def date_us(headers: Mapping[str, str], name: str = "Date") -> int | None:
    """A date header, µs since the epoch; None if it is missing or not a date."""
    text = headers.get(name)
    return None if text is None else _parse_date(text)


def version_of(headers: Mapping[str, str]) -> Version:
    """The ETag without its quotes."""
    return Version(headers.get("ETag", "").strip('"'))


def result_of(headers: Mapping[str, str], body: bytes | memoryview, size: int) -> GetResult:
    """The result of a read, from its headers; ``size`` is the whole object's."""
    return GetResult(
        body=body,
        size=size,
        version=version_of(headers),
        modified_us=date_us(headers, "Last-Modified") or 0,
        date_us=date_us(headers),
    )
