"""What has variable length in a manifest: locations, etags and inline chunks, behind the tables that point to them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from icechunk.errors import InvalidInputError
from icechunk.format.flat_columns import Positions, copy_spans
from icechunk.format.location_compression import LocationDictionary
from icechunk.format.tables import INLINE, ChunkRefs

__all__ = ["fill_inline", "frames", "inline_places", "strings"]

_U32: Final = struct.Struct("<I")


def strings(texts: Sequence[str], used: npt.NDArray[Any], start: int) -> tuple[bytes, Positions]:
    """The strings that are used, to stand at ``start``, and the position of each of all; padded to 4 bytes."""
    at = np.zeros(len(texts), np.int64)
    mask = np.zeros(len(texts), np.bool_)
    mask[used] = True
    parts: list[bytes] = []
    position = start
    for i in np.flatnonzero(mask).tolist():
        data = _utf8(texts[i])
        padding = 4 - len(data) % 4  # at least the NUL
        at[i] = position
        parts += (_U32.pack(len(data)), data, b"\0\0\0\0"[:padding])
        position += 4 + len(data) + padding
    return b"".join(parts), at


def frames(
    texts: Sequence[str], used: npt.NDArray[Any], start: int, dictionary: LocationDictionary
) -> tuple[bytes, Positions]:
    """The same as vectors of bytes that are zstd frames."""
    mask = np.zeros(len(texts), np.bool_)
    mask[used] = True
    rows = np.flatnonzero(mask)
    data, sizes = dictionary.frames([_utf8(texts[i]) for i in rows.tolist()])
    ends = np.cumsum(4 + sizes + -sizes % 4)
    places = ends - (4 + sizes + -sizes % 4)
    at = np.zeros(len(texts), np.int64)
    at[rows] = start + places
    out = bytearray(int(ends[-1]) if len(ends) else 0)
    if len(places):
        _fill_vectors(out, places, data, np.cumsum(sizes) - sizes, sizes)
    return bytes(out), at


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"cannot encode {text!r}: not valid Unicode") from error


def inline_places(refs: ChunkRefs, start: int) -> tuple[Positions, int]:
    """Position of the vector of each inline row, and where the last one ends."""
    sizes = refs.length[refs.kind == INLINE].astype(np.int64)
    ends = start + np.cumsum(4 + sizes + -sizes % 4)
    at = ends - (4 + sizes + -sizes % 4)
    return at, int(ends[-1]) if len(ends) else start


def fill_inline(out: bytearray, refs: ChunkRefs, at: Positions) -> None:
    if not len(at):
        return
    inline = refs.kind == INLINE
    sizes = refs.length[inline].astype(np.int64)
    _fill_vectors(out, at, refs.inline_data, refs.offset[inline].astype(np.int64), sizes)


def _fill_vectors(
    out: bytearray, at: Positions, data: bytes, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> None:
    """Vectors of bytes at these positions: spans of ``data``."""
    octets = np.frombuffer(out, np.uint8)
    heads: npt.NDArray[Any] = np.ndarray((len(octets) - 3,), "<u4", octets, strides=(1,))
    heads[at] = sizes
    copy_spans(octets, at + 4, data, starts, sizes)
