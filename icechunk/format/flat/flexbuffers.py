"""FlexBuffers: JSON-like values in the self-describing variant of FlatBuffers.

A value is stored after its children. Offsets count backward from their own position, so reading cannot loop; depth and
amount of reading are bounded.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from icechunk.errors import ErrorKind, FormatError, InvalidInputError
from icechunk.format.values import Json

__all__ = ["MAX_DEPTH", "dumps", "loads"]

MAX_DEPTH: Final = 100
"""Largest depth of nested lists and maps."""

_NULL, _INT, _UINT, _FLOAT, _KEY, _STRING = 0, 1, 2, 3, 4, 5
_INDIRECT_INT, _INDIRECT_UINT, _INDIRECT_FLOAT, _MAP, _VECTOR = 6, 7, 8, 9, 10
_VECTOR_KEY, _VECTOR_STRING, _BLOB, _BOOL, _VECTOR_BOOL = 14, 15, 25, 26, 36
_INDIRECT: Final = {_INDIRECT_INT: _INT, _INDIRECT_UINT: _UINT, _INDIRECT_FLOAT: _FLOAT}
_TYPED: Final = {11: _INT, 12: _UINT, 13: _FLOAT, _VECTOR_KEY: _KEY, _VECTOR_STRING: _STRING, _VECTOR_BOOL: _BOOL}
_FIXED: Final = {16 + 3 * (n - 2) + t - 1: (n, t) for n in (2, 3, 4) for t in (_INT, _UINT, _FLOAT)}
_FLOATS: Final = {2: struct.Struct("<e"), 4: struct.Struct("<f"), 8: struct.Struct("<d")}


def loads(data: bytes) -> Json:
    """Read a value back.

    Every type of the format is understood: typed vectors become lists, keys become strings, blobs
    become ``bytes``.

    Raises
    ------
    FormatError
        If ``data`` is not a FlexBuffer, or nests deeper than `MAX_DEPTH`.
    """
    return _Reader(data).root()


class _Reader:
    __slots__ = ("_bytes_left", "_data", "_items_left", "_keys", "_strings")

    def __init__(self, data: bytes) -> None:
        self._data = data
        # An item takes at least one byte, and no correct writer shares vectors or lets strings overlap.
        self._items_left = len(data)
        self._bytes_left = len(data)
        self._strings: dict[tuple[int, int], str] = {}
        self._keys: dict[int, str] = {}

    def root(self) -> Json:
        data = self._data
        if len(data) < 3:
            raise _bad(f"{len(data)} bytes are too few")
        width = data[-1]
        if width not in (1, 2, 4, 8) or len(data) < width + 2:
            raise _bad(f"its root is {width} bytes wide")
        return self._value(len(data) - 2 - width, width, data[-2], 0)

    def _uint(self, pos: int, width: int) -> int:
        if pos < 0 or pos + width > len(self._data):
            raise _bad(f"position {pos} is outside its {len(self._data)} bytes")
        return int.from_bytes(self._data[pos : pos + width], "little")

    def _target(self, pos: int, width: int) -> int:
        target = pos - self._uint(pos, width)
        if target < 0:
            raise _bad(f"the offset at {pos} points before its start")
        return target

    def _number(self, pos: int, width: int, kind: int) -> Json:
        raw = self._uint(pos, width)
        if kind == _UINT:
            return raw
        if kind == _INT:
            return raw - (1 << 8 * width) if raw >> (8 * width - 1) else raw
        if kind == _BOOL:
            return raw != 0
        unpacker = _FLOATS.get(width)
        if unpacker is None:
            raise _bad(f"the float at {pos} is {width} bytes wide")
        return unpacker.unpack_from(self._data, pos)[0]

    def _value(self, pos: int, width: int, packed: int, depth: int) -> Json:
        kind, child_width = packed >> 2, 1 << (packed & 3)
        if kind == _NULL:
            return None
        if kind in (_INT, _UINT, _FLOAT, _BOOL):
            return self._number(pos, width, kind)
        target = self._target(pos, width)
        if kind in _INDIRECT:
            return self._number(target, child_width, _INDIRECT[kind])
        if kind == _KEY:
            return self._key(target)
        if kind == _STRING:
            return self._string(target, child_width)
        if kind == _BLOB:
            return self._span(target, self._uint(target - child_width, child_width))
        if depth >= MAX_DEPTH:
            raise _bad(f"it nests deeper than {MAX_DEPTH}")
        if kind == _MAP:
            return self._map(target, child_width, depth + 1)
        if kind == _VECTOR:
            return self._vector(target, child_width, depth + 1)
        if kind in _TYPED:
            count = self._uint(target - child_width, child_width)
            return self._typed(target, child_width, count, _TYPED[kind])
        if kind in _FIXED:
            return self._typed(target, child_width, *_FIXED[kind])
        raise _bad(f"unknown type {kind} at {pos}")

    def _count(self, pos: int, nbytes: int, count: int) -> None:
        if pos + nbytes > len(self._data):
            raise _bad(f"the vector at {pos} ends past its end")
        self._items_left -= count
        if self._items_left < 0:
            raise _bad("its vectors overlap")

    def _vector(self, pos: int, width: int, depth: int) -> list[Json]:
        count = self._uint(pos - width, width)
        self._count(pos, count * (width + 1), count)
        types = pos + count * width
        return [self._value(pos + i * width, width, self._data[types + i], depth) for i in range(count)]

    def _typed(self, pos: int, width: int, count: int, kind: int) -> list[Json]:
        self._count(pos, count * width, count)
        if kind == _KEY:
            return [self._key(self._target(pos + i * width, width)) for i in range(count)]
        if kind == _STRING:
            # The format deprecates this type because it does not record the width of the strings' sizes; it is one
            # byte.
            return [self._string(self._target(pos + i * width, width), 1) for i in range(count)]
        return [self._number(pos + i * width, width, kind) for i in range(count)]

    def _map(self, pos: int, width: int, depth: int) -> dict[str, Json]:
        values = self._vector(pos, width, depth)
        keys = self._target(pos - 3 * width, width)
        keys_width = self._uint(pos - 2 * width, width)
        if keys_width not in (1, 2, 4, 8) or self._uint(keys - keys_width, keys_width) != len(values):
            raise _bad(f"the map at {pos} has a bad vector of keys")
        names = [self._key(self._target(keys + i * keys_width, keys_width)) for i in range(len(values))]
        found = dict(zip(names, values, strict=True))
        if len(found) != len(names):
            raise _bad(f"the map at {pos} repeats a key")
        return found

    def _span(self, pos: int, count: int) -> bytes:
        if pos + count > len(self._data):
            raise _bad(f"the {count} bytes at {pos} end past its end")
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise _bad("its strings overlap")
        return self._data[pos : pos + count]

    def _text(self, pos: int, count: int) -> str:
        try:
            return self._span(pos, count).decode()
        except UnicodeDecodeError as error:
            raise _bad(f"the text at {pos} is not UTF-8") from error

    def _string(self, pos: int, width: int) -> str:
        place = pos, self._uint(pos - width, width)
        found = self._strings.get(place)
        if found is None:
            found = self._strings[place] = self._text(*place)
        return found

    def _key(self, pos: int) -> str:
        found = self._keys.get(pos)
        if found is None:
            end = self._data.find(b"\0", pos)
            if end < 0:
                raise _bad(f"the key at {pos} does not end")
            found = self._keys[pos] = self._text(pos, end - pos)
        return found


def _bad(reason: str) -> FormatError:
    return FormatError(f"cannot read a FlexBuffer: {reason}", ErrorKind.DESERIALIZATION)


class _Slot(NamedTuple):
    """A value that its parent is about to refer to."""

    kind: int
    width: int
    """Bytes: the width that an inline number needs, or the width that the child was written with."""
    number: int = 0
    """Bits of an inline number (two's complement at 8 bytes), or position of the child."""
    inline: bool = True


_NULL_SLOT: Final = _Slot(_NULL, 1)


def dumps(value: Json) -> bytes:
    """Write a JSON-like value; map keys are sorted by their UTF-8 bytes.

    Raises
    ------
    InvalidInputError
        If ``value`` contains anything other than None, bool, int (64 bits), float, str, bytes, list, tuple and dict
        with string keys, a key has a NUL character, or the nesting is deeper than `MAX_DEPTH`.
    """
    writer = _Writer()
    root = writer.value(value, 0)
    width = writer.needed(root, 0)
    writer.align(width)
    writer.element(root, width)
    writer.out += bytes((root.kind << 2 | _WIDTHS[width if root.inline else root.width], width))
    return bytes(writer.out)


_WIDTHS: Final = {1: 0, 2: 1, 4: 2, 8: 3}


def _uint_width(number: int) -> int:
    return 1 if number < 1 << 8 else 2 if number < 1 << 16 else 4 if number < 1 << 32 else 8


class _Writer:
    __slots__ = ("_texts", "out")

    def __init__(self) -> None:
        self.out = bytearray()
        self._texts: dict[bytes, int] = {}

    def align(self, width: int) -> None:
        self.out += bytes(-len(self.out) % width)

    def needed(self, slot: _Slot, index: int) -> int:
        """Width in bytes that element ``index`` needs in a vector that begins at the current position."""
        if slot.inline:
            return slot.width
        for width in (1, 2, 4):
            at = len(self.out) + -len(self.out) % width + index * width
            if at - slot.number < 1 << 8 * width:
                return width
        return 8

    def element(self, slot: _Slot, width: int) -> None:
        if not slot.inline:
            number = len(self.out) - slot.number
        elif slot.kind == _FLOAT:
            number = slot.number
        else:
            number = slot.number & ((1 << 8 * width) - 1)
        self.out += number.to_bytes(width, "little")

    def value(self, value: Json, depth: int) -> _Slot:
        if value is None:
            return _NULL_SLOT
        if isinstance(value, bool):
            return _Slot(_BOOL, 1, int(value))
        if isinstance(value, int):
            return self._integer(value)
        if isinstance(value, float):
            return _Slot(_FLOAT, 8, int.from_bytes(struct.pack("<d", value), "little"))
        if isinstance(value, str):
            return self._sized(_STRING, _encode(value))
        if isinstance(value, bytes):
            return self._sized(_BLOB, value)
        if depth >= MAX_DEPTH:
            raise InvalidInputError(f"cannot encode a value that nests deeper than {MAX_DEPTH}", ErrorKind.BAD_METADATA)
        if isinstance(value, list | tuple):
            return self._vector(_VECTOR, [self.value(item, depth + 1) for item in value])
        if isinstance(value, dict):
            return self._map(value, depth + 1)
        raise InvalidInputError(
            f"cannot encode a {type(value).__name__}: only None, bool, int, float, str, bytes, list and dict",
            ErrorKind.BAD_METADATA,
        )

    def _integer(self, value: int) -> _Slot:
        if not -(1 << 63) <= value < 1 << 64:
            raise InvalidInputError(f"cannot encode {value}: integers have at most 64 bits", ErrorKind.BAD_METADATA)
        if value >= 0:
            return _Slot(_UINT, _uint_width(value), value)
        return _Slot(_INT, _uint_width(2 * ~value + 1), value)

    def _sized(self, kind: int, data: bytes) -> _Slot:
        width = _uint_width(len(data))
        self.align(width)
        self.out += len(data).to_bytes(width, "little")
        position = len(self.out)
        self.out += data
        if kind == _STRING:
            self.out += b"\0"
        return _Slot(kind, width, position, inline=False)

    def _vector(self, kind: int, slots: list[_Slot], head: tuple[_Slot, ...] = ()) -> _Slot:
        first = (*head, _Slot(_UINT, _uint_width(len(slots)), len(slots)))
        entries = [*first, *slots]
        begin = len(self.out)
        if begin + len(entries) < 256 and all(slot.width == 1 for slot in entries if slot.inline):
            # Everything that is written so far is within the reach of one byte.
            self.out += bytes(
                [slot.number & 255 if slot.inline else begin + i - slot.number for i, slot in enumerate(entries)]
            )
            if kind != _VECTOR_KEY:
                self.out += bytes([slot.kind << 2 | _WIDTHS[1 if slot.inline else slot.width] for slot in slots])
            return _Slot(kind, 1, begin + len(first), inline=False)
        width = max(self.needed(slot, i) for i, slot in enumerate(entries))
        # A wider vector moves its offsets away from their targets: repeat until the width no longer changes.
        self.align(width)
        while (wider := max(self.needed(slot, i) for i, slot in enumerate(entries))) > width:
            width = wider
            self.align(width)
        for slot in first:
            self.element(slot, width)
        position = len(self.out)
        for slot in slots:
            self.element(slot, width)
        if kind != _VECTOR_KEY:
            self.out += bytes(slot.kind << 2 | _WIDTHS[width if slot.inline else slot.width] for slot in slots)
        return _Slot(kind, width, position, inline=False)

    def _map(self, value: dict[str, Json], depth: int) -> _Slot:
        if not all(isinstance(key, str) for key in value):
            raise InvalidInputError("cannot encode a map whose keys are not all strings", ErrorKind.BAD_METADATA)
        entries = sorted(((_encode(key), item) for key, item in value.items()), key=lambda entry: entry[0])
        slots = [self.value(item, depth) for _, item in entries]
        keys = self._vector(_VECTOR_KEY, [self._key(key) for key, _ in entries])
        return self._vector(_MAP, slots, (keys, _Slot(_UINT, 1, keys.width)))

    def _key(self, key: bytes) -> _Slot:
        if b"\0" in key:
            raise InvalidInputError(f"cannot encode the key {key.decode()!r}: NUL character", ErrorKind.BAD_METADATA)
        position = self._texts.get(key)
        if position is None:
            position = self._texts[key] = len(self.out)
            self.out += key + b"\0"
        return _Slot(_KEY, 1, position, inline=False)


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"cannot encode {text!r}: not valid Unicode", ErrorKind.BAD_METADATA) from error
