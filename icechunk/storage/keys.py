"""Which keys and byte ranges are well formed, the same on every back end."""

from __future__ import annotations

import re

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.storage.base import ByteRange, Range, Suffix

__all__ = ["MAX_KEY_BYTES", "check_key", "check_range", "resolve_range"]

MAX_KEY_BYTES = 1024
"""Longest key in UTF-8, as in S3; the root prefix counts too where the store is S3."""

# Nearly every key the engine makes; anything else takes the slow road below.
_ORDINARY = re.compile(r"[A-Za-z0-9_=+-][A-Za-z0-9_.=+-]*(?:/[A-Za-z0-9_=+-][A-Za-z0-9_.=+-]*)*")


def check_key(key: str) -> None:
    """Refuse a key that could leave the root prefix, or that some back end could not hold.

    Raises
    ------
    InvalidInputError
        Empty, absolute, with empty, ``.`` or ``..`` segments, NUL, not encodable as UTF-8, or longer than
        `MAX_KEY_BYTES`.
    """
    if len(key) <= 255 and _ORDINARY.fullmatch(key):
        return
    reason = _why_bad(key)
    if reason is not None:
        raise InvalidInputError(f"bad storage key {key!r}: {reason}", ErrorKind.INVALID_KEY)


def _why_bad(key: str) -> str | None:
    if not key:
        return "it is empty"
    if "\0" in key:
        return "it contains a NUL character"
    try:
        encoded = key.encode("utf-8")
    except UnicodeEncodeError:
        return "it cannot be encoded as UTF-8"
    if len(encoded) > MAX_KEY_BYTES:
        return f"it has {len(encoded)} bytes, and {MAX_KEY_BYTES} is the most a store takes"
    if key.startswith("/"):
        return "keys are relative to the root prefix and do not start with '/'"
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            return f"the segment {segment!r} is not allowed"
    return None


def check_range(byte_range: ByteRange) -> None:
    """Refuse a range that is empty or negative whatever the object's size. Raises `InvalidInputError`."""
    match byte_range:
        case Range(start, end):
            bad = start < 0 or (end is not None and end <= start)
        case Suffix(length):
            bad = length <= 0
        case None:
            bad = False
    if bad:
        raise InvalidInputError(
            f"bad byte range {byte_range}: it must name at least one byte, counted from 0", ErrorKind.INVALID_BYTE_RANGE
        )


def resolve_range(byte_range: ByteRange, size: int, key: str) -> tuple[int, int]:
    """Clamp a range to an object's size.

    Returns
    -------
    tuple
        First byte (inclusive) and last (exclusive).

    Raises
    ------
    InvalidInputError
        The range is malformed, or starts at or beyond the end of the object (kind ``invalid-byte-range``).
    """
    if byte_range is None:
        return 0, size
    check_range(byte_range)
    if isinstance(byte_range, Suffix):
        return max(0, size - byte_range.length), size
    if byte_range.start >= size:
        raise InvalidInputError(
            f"cannot read bytes from {byte_range.start} of {key!r}: the object has {size} bytes",
            ErrorKind.INVALID_BYTE_RANGE,
        )
    return byte_range.start, size if byte_range.end is None else min(byte_range.end, size)
