"""A FlatBuffers reader that trusts nothing.

It reads any valid layout, not only the one that this package writes: vtables may be shared or not, fields are in any
order, unknown trailing slots are ignored, an absent field has its default. Every access is checked against the end of
the buffer. Offsets to children are unsigned and count forward, and the schema bounds the depth of reading, so a cycle
cannot occur. A small hostile file can let many offsets point to the same large child; the bytes and tables that are
returned are therefore counted against a budget that no valid file exceeds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final, TypeVar

from icechunk.errors import ErrorKind, FormatError

__all__ = ["Buffer", "Table", "required"]

_T = TypeVar("_T")

_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")
_I32: Final = struct.Struct("<i")
_U64: Final = struct.Struct("<Q")

# Writers may share equal strings, hence a factor above one; they have no reason to share tables.
_SHARING: Final = 16
_SPARE_BYTES: Final = 2**16
_MIN_TABLE_BYTES: Final = 8
"""Bytes of a table's own offset and of the one that points to it."""


class Buffer:
    """One FlatBuffers payload, and the budget of what may still be read from it."""

    __slots__ = ("_vtables", "bytes_left", "data", "name", "size", "tables_left")

    def __init__(self, data: bytes, name: str) -> None:
        self.data: bytes = data
        self.size: int = len(data)
        self.name: str = name
        self.bytes_left: int = len(data) * _SHARING + _SPARE_BYTES
        self.tables_left: int = len(data) // _MIN_TABLE_BYTES + 1
        self._vtables: dict[int, tuple[int, ...]] = {}

    def require_same_file(self, positions: Any, targets: Any) -> None:
        """Check that targets are in the same file as the positions that lead to them; here all are."""

    def fail(self, reason: str, kind: ErrorKind = ErrorKind.INVALID_FILE_FORMAT) -> FormatError:
        """The error to raise for this payload, with ``reason`` in its message."""
        return FormatError(f"cannot read {self.name}: {reason}", kind)

    def root(self) -> Table:
        """The root table.

        Raises
        ------
        FormatError
            If it is not within the buffer.
        """
        return Table(self, self.u32(0))

    def u32(self, pos: int) -> int:
        """Unsigned 32-bit number at ``pos``, which is not negative."""
        if pos + 4 > self.size:
            raise self.fail(f"offset {pos} points past its end ({self.size} bytes)")
        value: int = _U32.unpack_from(self.data, pos)[0]
        return value

    def vtable(self, pos: int) -> tuple[int, ...]:
        """Table size and then the field offsets, by slot, of the vtable at ``pos``."""
        found = self._vtables.get(pos)
        if found is None:
            if pos < 0 or pos + 4 > self.size:
                raise self.fail(f"a table's vtable is at {pos}, outside its {self.size} bytes")
            nbytes: int = _U16.unpack_from(self.data, pos)[0]
            if nbytes < 4 or nbytes % 2 or pos + nbytes > self.size:
                raise self.fail(f"the vtable at {pos} has size {nbytes}")
            found = struct.unpack_from(f"<{nbytes // 2 - 1}H", self.data, pos + 2)
            # A hostile file may have a vtable of 64 KiB at every other byte; cache only those of a usual size.
            if nbytes <= 64:
                self._vtables[pos] = found
            else:
                self.charge(nbytes)
        return found

    def charge(self, nbytes: int) -> None:
        """Take ``nbytes`` from the budget.

        Raises
        ------
        FormatError
            If nothing is left of it.
        """
        self.bytes_left -= nbytes
        if self.bytes_left < 0:
            raise self.fail("its offsets overlap so much that it must be corrupt")

    def charge_tables(self, count: int) -> None:
        """Take ``count`` tables from the budget; errors as `charge`."""
        self.tables_left -= count
        if self.tables_left < 0:
            raise self.fail("it has more tables than it has room for, so it must be corrupt")


class Table:
    """One table; ``slot`` is always the field's number in the schema, from 0.

    Readers of absent fields return the default or None; every reader raises FormatError if the
    field, or its target, is not within the buffer.
    """

    __slots__ = ("buffer", "fields", "pos")

    def __init__(self, buffer: Buffer, pos: int) -> None:
        self.buffer: Buffer = buffer
        self.pos: int = pos
        if pos + 4 > buffer.size:
            raise buffer.fail(f"a table is at {pos}, past its end ({buffer.size} bytes)")
        self.fields: tuple[int, ...] = buffer.vtable(pos - _I32.unpack_from(buffer.data, pos)[0])

    def _at(self, slot: int, size: int) -> int:
        """Position of an inline field of ``size`` bytes, 0 when it is absent."""
        fields = self.fields
        if slot + 1 >= len(fields):
            return 0
        offset = fields[slot + 1]
        if not offset:
            return 0
        pos = self.pos + offset
        if offset < 4 or offset + size > fields[0] or pos + size > self.buffer.size:
            raise self.buffer.fail(f"field {slot} of the table at {self.pos} is outside it")
        return pos

    def u8(self, slot: int, default: int = 0) -> int:
        """An unsigned byte."""
        pos = self._at(slot, 1)
        return self.buffer.data[pos] if pos else default

    def u16(self, slot: int, default: int = 0) -> int:
        """An unsigned 16-bit number."""
        pos = self._at(slot, 2)
        return _U16.unpack_from(self.buffer.data, pos)[0] if pos else default

    def u32(self, slot: int, default: int = 0) -> int:
        """An unsigned 32-bit number."""
        pos = self._at(slot, 4)
        return _U32.unpack_from(self.buffer.data, pos)[0] if pos else default

    def i32(self, slot: int, default: int = 0) -> int:
        """A signed 32-bit number."""
        pos = self._at(slot, 4)
        return _I32.unpack_from(self.buffer.data, pos)[0] if pos else default

    def u64(self, slot: int, default: int = 0) -> int:
        """An unsigned 64-bit number."""
        pos = self._at(slot, 8)
        return _U64.unpack_from(self.buffer.data, pos)[0] if pos else default

    def inline(self, slot: int, size: int) -> bytes | None:
        """An inline struct of ``size`` bytes."""
        pos = self._at(slot, size)
        return self.buffer.data[pos : pos + size] if pos else None

    def child(self, slot: int) -> int:
        """Position of the target of an offset field, 0 when the field is absent."""
        pos = self._at(slot, 4)
        return pos + self.buffer.u32(pos) if pos else 0

    def table(self, slot: int) -> Table | None:
        """A table."""
        pos = self.child(slot)
        if not pos:
            return None
        self.buffer.charge_tables(1)
        return Table(self.buffer, pos)

    def vector(self, slot: int, item_size: int) -> tuple[int, int] | None:
        """Position of the first item and number of items of a vector of items of ``item_size`` bytes."""
        pos = self.child(slot)
        return self._vector_at(pos, item_size) if pos else None

    def _vector_at(self, pos: int, item_size: int) -> tuple[int, int]:
        buffer = self.buffer
        count = buffer.u32(pos)
        if pos + 4 + count * item_size > buffer.size:
            raise buffer.fail(f"the vector at {pos} has {count} items and ends past its end ({buffer.size} bytes)")
        buffer.charge(count * item_size)
        return pos + 4, count

    def blob(self, slot: int) -> bytes | None:
        """A vector of bytes."""
        found = self.vector(slot, 1)
        return self.buffer.data[found[0] : found[0] + found[1]] if found else None

    def items(self, slot: int, item_size: int) -> bytes | None:
        """All items of a vector of structs or numbers, ``item_size`` bytes each."""
        found = self.vector(slot, item_size)
        return self.buffer.data[found[0] : found[0] + found[1] * item_size] if found else None

    def string(self, slot: int) -> str | None:
        """A UTF-8 string."""
        pos = self.child(slot)
        return self._string_at(pos) if pos else None

    def _string_at(self, pos: int) -> str:
        start, count = self._vector_at(pos, 1)
        try:
            return self.buffer.data[start : start + count].decode()
        except UnicodeDecodeError as error:
            raise self.buffer.fail(f"the string at {pos} is not UTF-8") from error

    def strings(self, slot: int) -> list[str] | None:
        """A vector of strings."""
        found = self.vector(slot, 4)
        if found is None:
            return None
        self.buffer.charge_tables(found[1])
        return [self._string_at(pos) for pos in self._targets(*found)]

    def tables(self, slot: int) -> Iterator[Table] | None:
        """A vector of tables, read one at a time."""
        found = self.vector(slot, 4)
        if found is None:
            return None
        self.buffer.charge_tables(found[1])
        return (Table(self.buffer, pos) for pos in self._targets(*found))

    def _targets(self, start: int, count: int) -> Iterator[int]:
        offsets = struct.unpack_from(f"<{count}I", self.buffer.data, start)
        return (start + 4 * i + offset for i, offset in enumerate(offsets))


def required(value: _T | None, table: Table, field: str) -> _T:
    """Return ``value`` if it is not None.

    Raises
    ------
    FormatError
        If the field called ``field`` of ``table`` is absent.
    """
    if value is None:
        raise table.buffer.fail(f"the table at {table.pos} lacks the required field {field!r}")
    return value
