"""Identifiers: random bytes, written in keys as Crockford base32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NewType

import numpy as np

from icechunk.errors import ErrorKind, InvalidInputError

__all__ = [
    "FIRST_SNAPSHOT",
    "ID_CHARACTERS",
    "NodeId",
    "ObjectId",
    "decode_id",
    "encode_id",
    "encode_ids",
    "object_id_from_text",
    "object_ids_from_texts",
]

ObjectId = NewType("ObjectId", bytes)
"""12 bytes: a snapshot, manifest or chunk."""
NodeId = NewType("NodeId", bytes)
"""8 bytes: a group or array, for its whole life, through moves and changes of metadata."""

_OBJECT_ID_BYTES: Final = 12
ID_CHARACTERS: Final = 20
"""Characters of the text of an `ObjectId`."""
_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_VALUES: Final = {c: i for i, c in enumerate(_ALPHABET)}
_NO_VALUE: Final = 255
_VALUES_BY_BYTE: Final = bytes(_VALUES.get(chr(byte), _NO_VALUE) for byte in range(256))
_BYTES_BY_VALUE: Final = _ALPHABET.encode().ljust(256, b"?")
_FEW: Final = 16
_SHIFTS: Final = [np.uint64(shift) for shift in range(45, -1, -5)]
"""Positions of the ten characters of half an id."""
_PAIRS: Final = [first + second for first in _ALPHABET for second in _ALPHABET]


def encode_id(raw: bytes) -> str:
    """Write an id as its key text: upper case, unpadded, zero bits appended on the right.

    >>> encode_id(bytes.fromhex("0b1cc8d6787580f0e33a6534"))
    '1CECHNKREP0F1RSTCMT0'
    """
    pairs = _PAIRS
    if len(raw) == _OBJECT_ID_BYTES:
        # Ten pairs of characters, written out: histories are lists of such ids.
        number = int.from_bytes(raw) << 4
        high, low = number >> 50, number & 0x3FFFFFFFFFFFF
        return (
            pairs[high >> 40]
            + pairs[high >> 30 & 1023]
            + pairs[high >> 20 & 1023]
            + pairs[high >> 10 & 1023]
            + pairs[high & 1023]
            + pairs[low >> 40]
            + pairs[low >> 30 & 1023]
            + pairs[low >> 20 & 1023]
            + pairs[low >> 10 & 1023]
            + pairs[low & 1023]
        )
    bits = len(raw) * 8
    chars = -(-bits // 5)
    number = int.from_bytes(raw) << (chars * 5 - bits)
    return "".join([_ALPHABET[(number >> shift) & 31] for shift in range((chars - 1) * 5, -1, -5)])


def encode_ids(ids: Sequence[ObjectId]) -> list[str]:
    """As `encode_id`, of many objects at once."""
    if len(ids) < _FEW:
        return [encode_id(id) for id in ids]
    # Two halves of ten characters, fifty bits; the last four of an id's hundred bits are zero.
    words = np.frombuffer(b"".join(ids), ">u4").reshape(len(ids), 3).astype(np.uint64)
    first, middle, last = words[:, 0], words[:, 1], words[:, 2]
    halves = first << 18 | middle >> 14, (middle & 0x3FFF) << 36 | last << 4
    values = np.empty((len(ids), 20), np.uint8)
    for i in range(20):
        values[:, i] = halves[i // 10] >> _SHIFTS[i % 10] & 31
    joined = values.tobytes().translate(_BYTES_BY_VALUE).decode()
    return [joined[at : at + 20] for at in range(0, len(joined), 20)]


def decode_id(text: str, size: int) -> bytes:
    """Read `encode_id` back.

    Raises
    ------
    InvalidInputError
        If ``text`` is not the text of an id of ``size`` bytes.
    """
    bits = size * 8
    chars = -(-bits // 5)
    try:
        number = 0
        for char in text:
            number = number << 5 | _VALUES[char]
    except KeyError:
        raise InvalidInputError(f"invalid id {text!r}: not Crockford base32", ErrorKind.INVALID_SNAPSHOT_ID) from None
    spare = chars * 5 - bits
    if len(text) != chars:
        raise InvalidInputError(
            f"invalid id {text!r}: {chars} characters of Crockford base32 expected, not {len(text)}",
            ErrorKind.INVALID_SNAPSHOT_ID,
        )
    if number & ((1 << spare) - 1):
        raise InvalidInputError(
            f"invalid id {text!r}: the last character of an id cannot be {text[-1]!r}; look whether the id was copied "
            "right",
            ErrorKind.INVALID_SNAPSHOT_ID,
        )
    return (number >> spare).to_bytes(size)


def object_id_from_text(text: str) -> ObjectId:
    """The id of a snapshot, manifest or chunk from its text (20 characters).

    Raises
    ------
    InvalidInputError
        If ``text`` is not the text of such an id.
    """
    if not isinstance(text, str):
        raise InvalidInputError(
            f"invalid id {text!r}: text expected, not {type(text).__name__}", ErrorKind.INVALID_SNAPSHOT_ID
        )
    return ObjectId(decode_id(text, 12))


def object_ids_from_texts(texts: Sequence[str]) -> list[ObjectId]:
    """As `object_id_from_text`, many at once: the entry of an expiration lists half of a history."""
    if len(texts) < _FEW:
        return [object_id_from_text(text) for text in texts]
    joined = "".join(texts)
    if len(joined) != 20 * len(texts) or not joined.isascii() or set(map(len, texts)) != {20}:
        return [object_id_from_text(text) for text in texts]
    values = np.frombuffer(joined.encode().translate(_VALUES_BY_BYTE), np.uint8).reshape(len(texts), 20)
    if values.max() == _NO_VALUE or (values[:, 19] & 0xF).any():
        return [object_id_from_text(text) for text in texts]
    halves = np.zeros((2, len(texts)), np.uint64)
    for i in range(20):
        halves[i // 10] |= values[:, i].astype(np.uint64) << _SHIFTS[i % 10]
    words = np.empty((len(texts), 3), ">u4")
    words[:, 0] = halves[0] >> 18
    words[:, 1] = (halves[0] & 0x3FFFF) << 14 | halves[1] >> 36
    words[:, 2] = halves[1] >> 4 & 0xFFFFFFFF
    ids: list[ObjectId] = words.view("V12").reshape(-1).tolist()
    return ids


FIRST_SNAPSHOT: Final = ObjectId(bytes.fromhex("0b1cc8d6787580f0e33a6534"))
"""The id of every repository's first snapshot."""
