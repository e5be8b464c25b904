"""JSON that round-trips every value that metadata and configuration may hold.

JSON has no bytes, no infinities and no NaN; those are written as a map with one reserved key that begins with NUL,
which no other key holds: FlexBuffers, in which checkpoints keep the same values, end keys there.
"""

from __future__ import annotations

import base64
import math
from typing import Any, Final, TypeAlias

from icechunk.errors import ErrorKind, InvalidInputError

__all__ = ["pack", "unpack"]

Json: TypeAlias = Any

_BYTES: Final = "\x00bytes"
_FLOAT: Final = "\x00float"
_MAX_INT: Final = 2**64 - 1
_MIN_INT: Final = -(2**63)
_MAX_DEPTH: Final = 100


def pack(value: Json, depth: int = 0) -> Json:
    """A value that orjson writes without loss.

    Raises
    ------
    InvalidInputError
        A value that is no JSON and no bytes, an integer beyond 64 bits, text that is no UTF-8, a key that is not text
        or holds a NUL character, or nesting deeper than 100.
    """
    if depth > _MAX_DEPTH:
        raise InvalidInputError(f"metadata is nested deeper than {_MAX_DEPTH} levels", ErrorKind.SERIALIZATION)
    match value:
        case None | bool():
            return value
        case str():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise InvalidInputError(f"text {value!r} cannot be written as UTF-8", ErrorKind.SERIALIZATION) from None
            return str(value)
        case int():
            if not _MIN_INT <= value <= _MAX_INT:
                raise InvalidInputError(f"integer {value} does not fit into 64 bits", ErrorKind.SERIALIZATION)
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
        case bytes():
            return {_BYTES: base64.b64encode(value).decode()}
        case list() | tuple():
            return [pack(item, depth + 1) for item in value]
    if hasattr(value, "items"):
        items = [(key, pack(item, depth + 1)) for key, item in value.items()]
        for key, _ in items:
            if not isinstance(key, str):
                raise InvalidInputError(f"metadata key {key!r} is not text", ErrorKind.SERIALIZATION)
            if "\x00" in pack(key):
                raise InvalidInputError(f"metadata key {key!r} holds a NUL character", ErrorKind.SERIALIZATION)
        return dict(items)
    raise InvalidInputError(f"{type(value).__name__} cannot be written as JSON: {value!r}", ErrorKind.SERIALIZATION)


def unpack(value: Json) -> Json:
    """Read `pack` back. Raises ValueError on a reserved key with a foreign value."""
    match value:
        case list():
            return [unpack(item) for item in value]
        case dict():
            if len(value) == 1:
                ((key, inner),) = value.items()
                if key == _BYTES:
                    return base64.b64decode(inner, validate=True)
                if key == _FLOAT:
                    if inner not in ("nan", "inf", "-inf"):
                        raise ValueError(f"bad float {inner!r}")
                    return float(inner)
            return {key: unpack(item) for key, item in value.items()}
    return value
