"""Numbers, times and metadata as JSON has them."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from icechunk.format.envelope import FileHeader
from icechunk.moments import moment

__all__ = ["Json", "describe_header", "json_value", "timestamp"]

Json: TypeAlias = dict[str, Any]


def timestamp(us: int) -> str:
    """µs since the epoch as text in UTC, with as many decimals of the second as are needed: none, three or six."""
    precision = "microseconds" if us % 1000 else "milliseconds" if us % 1_000_000 else "seconds"
    return moment(us).replace(tzinfo=None).isoformat(timespec=precision) + "Z"


def json_value(value: Any) -> Any:
    """A stored value as one that JSON can express: what is not a number becomes None, bytes become hexadecimal text."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case bytes():
            return value.hex()
        case dict():
            return {str(key): json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [json_value(item) for item in value]
        case _:
            return value


def describe_header(header: FileHeader) -> Json:
    """The binary header of a metadata file."""
    # At the first dash: the versions of pre-releases have dashes of their own.
    name, _, version = header.written_by.partition("-")
    return {
        "written_by": header.written_by,
        "app_name": name,
        "app_version": version,
        "spec_version": spec_version(header.spec_version),
        "file_type": header.file_type.name.lower().replace("_", "-"),
        "compression": "zstd",
    }


def spec_version(number: int) -> str:
    """A version of the format as the official library writes it."""
    return f"{number}.0"
