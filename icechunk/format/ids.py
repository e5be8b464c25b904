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
_FEW: Final = 16
_PAIRS: Final = [first + second for first in _ALPHABET for second in _ALPHABET]
_PAIRS_IN_NUMPY: Final = np.array(_PAIRS).view(np.uint64)
"""uint64[1024]: each pair as numpy has two characters. Many ids are converted in fifths of their text: four characters,
twenty bits."""


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
    words = np.frombuffer(b"".join(ids), ">u4").reshape(len(ids), 3).astype(np.uint32)
    first, middle, last = words[:, 0], words[:, 1], words[:, 2]
    fifths = np.empty((len(ids), 5), np.uint32)
    fifths[:, 0] = first >> 12
    fifths[:, 1] = (first & 0xFFF) << 8 | middle >> 24
    fifths[:, 2] = middle >> 4 & 0xFFFFF
    fifths[:, 3] = (middle & 0xF) << 16 | last >> 16
    fifths[:, 4] = (last & 0xFFFF) << 4
    pairs = _PAIRS_IN_NUMPY[np.stack((fifths >> 10, fifths & 1023), axis=2)]
    texts: list[str] = pairs.reshape(len(ids), 10).view("U20")[:, 0].tolist()
    return texts


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
    pairs = values[:, ::2].astype(np.uint32) << 5 | values[:, 1::2]
    fifths = pairs[:, ::2] << 10 | pairs[:, 1::2]
    words = np.empty((len(texts), 3), ">u4")
    words[:, 0] = fifths[:, 0] << 12 | fifths[:, 1] >> 8
    words[:, 1] = (fifths[:, 1] & 0xFF) << 24 | fifths[:, 2] << 4 | fifths[:, 3] >> 16
    words[:, 2] = (fifths[:, 3] & 0xFFFF) << 16 | fifths[:, 4] >> 4
    ids: list[ObjectId] = words.view("V12").reshape(-1).tolist()
    return ids


FIRST_SNAPSHOT: Final = ObjectId(bytes.fromhex("0b1cc8d6787580f0e33a6534"))
"""The id of every repository's first snapshot."""
