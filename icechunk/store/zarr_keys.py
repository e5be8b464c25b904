"""Zarr's keys, as the hierarchy understands them."""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "ChunkKey",
    "MetadataKey",
    "StoreKey",
    "V2Key",
    "chunk_key_text",
    "metadata_key_text",
    "parse_key",
    "to_path",
]

_METADATA: Final = "zarr.json"
_V2_NAMES: Final = frozenset((".zarray", ".zgroup", ".zattrs", ".zmetadata"))


@dataclass(frozen=True, slots=True)
class MetadataKey:
    """``{path}/zarr.json``."""

    path: str


class ChunkKey(NamedTuple):
    """``{path}/c/0/1``: a chunk of the array at ``path``."""

    path: str
    coords: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class V2Key:
    """Metadata of Zarr 2, which never exists here: zarr asks for it to find out a hierarchy's version."""

    name: str


StoreKey: TypeAlias = MetadataKey | ChunkKey | V2Key


def parse_key(key: str) -> StoreKey:
    """The meaning of a key.

    >>> parse_key("group/array/c/0/1")
    ChunkKey(path='/group/array', coords=(0, 1))

    Raises
    ------
    InvalidInputError
        A key that Zarr 3 does not have (kind ``invalid-key``).
    """
    if "//" in key or key.startswith("/"):
        key = "/".join([part for part in key.split("/") if part])
    head, slash, tail = key.rpartition("/c/")
    if not slash and key.startswith("c/"):
        head, slash, tail = "", "/c/", key[2:]
    if slash and tail.isascii():
        if tail.isdigit():
            coords: tuple[int, ...] = (int(tail),)
        elif tail.replace("/", "").isdigit() and tail[-1] != "/":
            coords = tuple([int(part) for part in tail.split("/")])
        else:
            coords = ()
        if coords:
            # A number of nine digits is small enough.
            if len(tail) > 9 and max(coords) >= 1 << 32:
                raise _invalid(key)
            return ChunkKey("/" + head, coords)
    parent, _, name = key.rpartition("/")
    if name == _METADATA:
        return MetadataKey(f"/{parent}")
    if name == "c":
        return ChunkKey(f"/{parent}", ())
    if name in _V2_NAMES:
        return V2Key(key)
    raise _invalid(key)


def to_path(prefix: str) -> str:
    """The absolute path that a store prefix such as ``group/`` means.

    >>> to_path("group/array/")
    '/group/array'
    """
    return "/" + "/".join([part for part in prefix.split("/") if part])


def metadata_key_text(path: str) -> str:
    """The key of a node's metadata: ``/a/b`` gives ``a/b/zarr.json``."""
    return f"{path[1:]}/{_METADATA}" if path != "/" else _METADATA


def chunk_key_text(path: str, coords: tuple[int, ...] | list[int]) -> str:
    """The key of a chunk: ``/a`` and ``(0, 1)`` give ``a/c/0/1``."""
    parts = [path[1:], "c"] if path != "/" else ["c"]
    return "/".join([*parts, *map(str, coords)])


def _invalid(key: str) -> InvalidInputError:
    return InvalidInputError(
        f"invalid zarr key {key!r}: only {{path}}/zarr.json and {{path}}/c/0/1 exist in a Zarr 3 hierarchy",
        ErrorKind.INVALID_KEY,
    )
