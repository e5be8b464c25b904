"""Name-value metadata of snapshots and repositories: FlexBuffers in format 2, MessagePack in format 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from icechunk.errors import ErrorKind, FormatError, InvalidInputError
from icechunk.format.flat import flexbuffers
from icechunk.format.flat.flatbuffers import FlatTable, Table, required
from icechunk.format.values import Json

__all__ = ["flexible", "metadata_from_tables", "metadata_tables"]

_NAME, _VALUE = 0, 1


def metadata_tables(metadata: Mapping[str, Json], spec_version: int) -> list[FlatTable]:
    """MetadataItem tables, in ascending order of name.

    Raises
    ------
    InvalidInputError
        If a value is not JSON-like.
    """
    pack = flexible if spec_version >= 2 else _pack
    return [
        FlatTable({_NAME: name, _VALUE: pack(value)})
        for name, value in sorted(metadata.items(), key=lambda item: item[0].encode("utf-8", "surrogatepass"))
    ]


def metadata_from_tables(tables: Iterable[Table], spec_version: int) -> dict[str, Json]:
    """Read `metadata_tables` back.

    Raises
    ------
    FormatError
        If a name repeats or a value cannot be read.
    """
    unpack = flexbuffers.loads if spec_version >= 2 else _unpack
    found: dict[str, Json] = {}
    for table in tables:
        name = required(table.string(_NAME), table, "name")
        if name in found:
            raise table.buffer.fail(f"its metadata has {name!r} twice")
        found[name] = unpack(required(table.blob(_VALUE), table, "value"))
    return found


def flexible(value: Json) -> bytes:
    """A value as a FlexBuffer. Raises `InvalidInputError` if it is not JSON-like."""
    # Imported where it is used: opening a repository of format 2 does not need it.
    import msgpack

    # A commit's metadata are written into its snapshot and into each checkpoint. MessagePack, which takes a hundredth
    # of the time, has other bytes for values that FlexBuffers write differently.
    try:
        key: bytes = msgpack.packb(value, use_bin_type=True)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return flexbuffers.dumps(value)
    # It writes bytearray, which FlexBuffers refuse, as bytes.
    may_hold_bytes = any(mark in key for mark in _MARKS_OF_BYTES)
    if may_hold_bytes or len(key) > _MOST_KEPT_BYTES:
        return flexbuffers.dumps(value)
    found = _kept.get(key)
    if found is None:
        found = flexbuffers.dumps(value)
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        _kept[key] = found
    return found


_MARKS_OF_BYTES: Final = (b"\xc4", b"\xc5", b"\xc6")
_MOST_KEPT: Final = 1024
_MOST_KEPT_BYTES: Final = 1024
_kept: dict[bytes, bytes] = {}
"""Encoded values by their MessagePack."""


def _pack(value: Json) -> bytes:
    import msgpack

    try:
        packed: bytes = msgpack.packb(value, use_bin_type=True)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidInputError(f"cannot encode metadata: {error}", ErrorKind.BAD_METADATA) from error
    return packed


def _no_extension(code: int, data: bytes) -> None:
    raise ValueError(f"extension type {code}")


def _unpack(data: bytes) -> Json:
    import msgpack

    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True, ext_hook=_no_extension)
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        raise FormatError(f"cannot read MessagePack metadata: {error}", ErrorKind.DESERIALIZATION) from error
