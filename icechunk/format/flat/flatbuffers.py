"""FlatBuffers: tables of one payload, read and written one at a time.

The reader trusts nothing. It reads any valid layout, not only the one that this package writes: vtables may be shared
or not, fields are in any order, unknown trailing slots are ignored, an absent field has its default. Every access is
checked against the end of the buffer. Offsets to children are unsigned and count forward, and the schema bounds the
depth of reading, so a cycle cannot occur. A small hostile file can let many offsets point to the same large child; the
bytes and tables that are returned are therefore counted against a budget that no valid file exceeds.

The writer writes from front to back. A table is a mapping from slots to values, and a value's Python type says how it
is stored:

============  =========================================================
`Scalar`      number within the table
`Inline`      struct within the table
``str``       string
``bytes``     vector of bytes
`Items`       vector of numbers or structs, already in their bytes
`FlatTable`   table
sequence      vector of tables or strings
============  =========================================================

Slots whose value is None are left out. Parents are written before their children, since offsets count forward; equal
vtables are shared.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, FormatError, InvalidInputError

__all__ = [
    "MAX_BYTES",
    "MAX_TABLES",
    "Buffer",
    "FlatTable",
    "FlatWriter",
    "Inline",
    "Items",
    "Payload",
    "Run",
    "Scalar",
    "Table",
    "Written",
    "all_utf8",
    "id_struct",
    "joined_utf8",
    "required",
    "u8",
    "u64",
    "utf8",
]

_T = TypeVar("_T")

Payload: TypeAlias = bytes | mmap.mmap
"""The bytes of a payload; a slice of either type is ``bytes``."""

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
    """One FlatBuffers payload, and the budget of bytes and tables that may still be read from it."""

    __slots__ = ("_vtables", "bytes_left", "data", "name", "size", "tables_left")

    def __init__(self, data: Payload, name: str) -> None:
        self.data: Payload = data
        self.size: int = len(data)
        self.name: str = name
        self.bytes_left: int = len(data) * _SHARING + _SPARE_BYTES
        self.tables_left: int = len(data) // _MIN_TABLE_BYTES + 1
        self._vtables: dict[int, tuple[int, ...]] = {}

    def files_of(self, positions: Any) -> Any:
        """The number of the file that each position is in; None: there is only one file."""

    def require_files(self, targets: Any, files: Any) -> None:
        """Check that targets are in the files of the positions that lead to them, as `files_of`; here all are."""

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


MAX_BYTES: Final = 2**31 - 1
"""No FlatBuffers payload may be larger."""
MAX_TABLES: Final = 50_000_000
"""The official library refuses to read a payload with more tables; each chunk reference, and each changed chunk, is
one."""

_OFFSET_TO_COME: Final = bytes(4)
_FORMATS: Final = {code: struct.Struct("<" + code) for code in "BHIiQ"}


class Scalar(NamedTuple):
    """A number within the table."""

    format: str
    """A `struct` format character: one of ``BHIiQ``."""
    value: int


class Inline(NamedTuple):
    """A struct within the table."""

    data: bytes
    align: int = 1


class Items(NamedTuple):
    """A vector of ``length`` numbers or structs."""

    data: bytes
    length: int
    align: int = 1
    """Alignment of an item in bytes: 1, 2, 4 or 8."""


class Written(NamedTuple):
    """A child that writes itself: its function is called with the writer and returns the child's position."""

    write: Callable[[FlatWriter], int]


Value: TypeAlias = "Scalar | Inline | Items | str | bytes | FlatTable | Written | list[FlatTable] | list[str] | None"


class FlatTable(NamedTuple):
    """A table."""

    slots: Mapping[int, Value]


def utf8(text: str) -> bytes:
    """Text as a file has it. Raises `InvalidInputError` if it is not valid Unicode."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"cannot encode {text!r}: not valid Unicode", ErrorKind.SERIALIZATION) from error


def all_utf8(texts: Sequence[str]) -> list[bytes]:
    """As `utf8`, of many texts in much less time than one by one."""
    try:
        raw = "\0".join(texts).encode().split(b"\0")
    except UnicodeEncodeError:
        raw = []
    # Otherwise some text holds the separator, or there is none, or one is refused by name.
    return raw if len(raw) == len(texts) else [utf8(text) for text in texts]


def joined_utf8(texts: Sequence[str]) -> tuple[bytes, npt.NDArray[np.int64]]:
    """The bytes of all texts, concatenated, and the number of bytes of each; errors as `utf8`."""
    whole = "".join(texts)
    if whole.isascii():
        return whole.encode(), np.fromiter(map(len, texts), np.int64, len(texts))
    parts = all_utf8(texts)
    return b"".join(parts), np.fromiter(map(len, parts), np.int64, len(parts))


def u8(value: int) -> Scalar:
    """An unsigned byte."""
    return Scalar("B", value)


def u64(value: int) -> Scalar:
    """An unsigned 64-bit number."""
    return Scalar("Q", value)


def id_struct(raw: bytes) -> Inline:
    """An id of 8 or 12 bytes."""
    return Inline(raw)


class Run(NamedTuple):
    """Tables, and all below them, in consecutive bytes of a payload that refer to nothing outside of these bytes.

    They can therefore be copied into another payload as they are (`FlatWriter.begin_run`).
    """

    start: int
    """Position in the payload."""
    end: int
    tables: npt.NDArray[np.int64]
    """int64[n]: position of each table, relative to ``start``."""
    vtables: Mapping[bytes, int]
    """Positions of vtables by their bytes, relative to ``start``."""


class FlatWriter:
    """One payload that is being written."""

    __slots__ = ("_others", "_vtables", "out")

    def __init__(self) -> None:
        self.out: bytearray = bytearray()
        self._vtables: dict[bytes, int] = {}
        self._others = self._vtables
        """Vtables outside of the run that is being written."""

    def finish(self, root: FlatTable) -> bytearray:
        """Write ``root`` and everything below it after the file identifier.

        Raises
        ------
        InvalidInputError
            If the payload exceeds the 2 GiB that the format can address.
        """
        self.out += b"\0\0\0\0Ichk"
        position = self.table(root)
        _U32.pack_into(self.out, 0, position)
        if len(self.out) > MAX_BYTES:
            raise InvalidInputError(
                f"cannot encode {len(self.out)} bytes: a metadata file holds at most {MAX_BYTES}",
                ErrorKind.SERIALIZATION,
            )
        return self.out

    def align(self, align: int, before: int = 0) -> None:
        """Pad so that the position ``before`` bytes later is aligned."""
        if missing := -(len(self.out) + before) % align:
            self.out += bytes(missing)

    def table(self, table: FlatTable) -> int:
        """Write a table and all below it; returns its position."""
        fields: list[tuple[int, int, int]] = []  # alignment, slot, size
        inline: list[bytes] = []
        children: list[Value] = []
        for slot, value in table.slots.items():
            if isinstance(value, Scalar):
                packer = _FORMATS[value.format]
                try:
                    inline.append(packer.pack(value.value))
                except struct.error as error:
                    limit = f"a number of {packer.size} bytes"
                    raise InvalidInputError(
                        f"cannot encode {value.value}: the format holds {limit} there", ErrorKind.SERIALIZATION
                    ) from error
                fields.append((packer.size, slot, packer.size))
                children.append(None)
            elif isinstance(value, Inline):
                fields.append((value.align, slot, len(value.data)))
                inline.append(value.data)
                children.append(None)
            elif value is not None:
                fields.append((4, slot, 4))
                inline.append(_OFFSET_TO_COME)
                children.append(value)
        layout = _layout(tuple(fields))
        vtable = self._vtable(layout.vtable)
        out = self.out
        # With 8-byte fields the table itself starts 4 bytes before an 8-byte boundary, so that they follow its first
        # word without a gap.
        self.align(8, 4) if layout.wide else self.align(4)
        start = len(out)
        out += (start - vtable).to_bytes(4, "little", signed=True)
        for i, _, padding in layout.fields:
            out += padding
            out += inline[i]
        for i, offset, _ in layout.fields:
            child = children[i]
            if child is not None:
                field = start + offset
                _U32.pack_into(out, field, self._child(child) - field)
        return start

    def vtable(self, offsets: Mapping[int, int], table_size: int) -> int:
        """Position of the vtable of tables of that size whose slots are at those offsets; a new vtable is written."""
        return self._vtable(_vtable_bytes(tuple(offsets.items()), table_size))

    def _vtable(self, data: bytes) -> int:
        found = self._vtables.get(data)
        if found is None:
            self.align(2)
            found = self._vtables[data] = len(self.out)
            self.out += data
        return found

    def begin_run(self, payload: Payload = b"", run: Run | None = None) -> int:
        """Begin a `Run`, with a copy of one of another payload if there is one; returns its position.

        Until `end_run`, no vtable before that position is used.
        """
        self.align(8)
        self._others, self._vtables = self._vtables, {}
        start = len(self.out)
        if run is not None:
            self.out += memoryview(payload)[run.start : run.end]
            self._vtables = {data: start + at for data, at in run.vtables.items()}
        return start

    def end_run(self, start: int, tables: npt.NDArray[np.int64]) -> Run:
        """End the run that began at ``start``, with tables at these positions."""
        vtables, self._vtables = self._vtables, self._others
        return Run(start, len(self.out), tables - start, {data: at - start for data, at in vtables.items()})

    def _child(self, value: Value) -> int:
        if isinstance(value, FlatTable):
            return self.table(value)
        if isinstance(value, str):
            return self.string(value)
        if isinstance(value, bytes):
            return self.items(value, len(value), 1)
        if isinstance(value, Items):
            return self.items(*value)
        if isinstance(value, Written):
            return value.write(self)
        assert isinstance(value, list)
        return self.offsets(value)

    def items(self, data: bytes, count: int, align: int) -> int:
        """Write a vector of numbers or structs; returns its position."""
        self.align(max(align, 4), 4)
        start = len(self.out)
        self.out += _U32.pack(count)
        self.out += data
        return start

    def string(self, text: str) -> int:
        """Write a string; returns its position."""
        data = utf8(text)
        start = self.items(data, len(data), 1)
        self.out += b"\0"
        return start

    def offsets(self, children: Sequence[FlatTable | str]) -> int:
        """Write a vector of tables or strings; returns its position."""
        self.align(4)
        start = len(self.out)
        self.out += _U32.pack(len(children)) + bytes(4 * len(children))
        for i, child in enumerate(children):
            field = start + 4 + 4 * i
            position = self.table(child) if isinstance(child, FlatTable) else self.string(child)
            _U32.pack_into(self.out, field, position - field)
        return start


class _Layout(NamedTuple):
    """The arrangement of the fields of a table."""

    fields: tuple[tuple[int, int, bytes], ...]
    """Number of each field, as given, its offset, and the padding before it, in the order of the offsets."""
    wide: bool
    """Whether there is a field of 8 bytes."""
    vtable: bytes


@lru_cache(maxsize=1024)
def _layout(fields: tuple[tuple[int, int, int], ...]) -> _Layout:
    """The layout of a table with fields of these alignments, slots and sizes."""
    # Widest first: the only padding between fields is the one that an 8-byte field needs after the vtable's offset.
    order = sorted(range(len(fields)), key=lambda i: -fields[i][0])
    wide = bool(order) and fields[order[0]][0] == 8
    end = 4
    offsets: dict[int, int] = {}
    arranged = []
    for i in order:
        align, slot, size = fields[i]
        missing = -(end + (4 if wide else 0)) % align
        end += missing
        offsets[slot] = end
        arranged.append((i, end, bytes(missing)))
        end += size
    return _Layout(tuple(arranged), wide, _vtable_bytes(tuple(offsets.items()), end))


@lru_cache(maxsize=1024)
def _vtable_bytes(offsets: tuple[tuple[int, int], ...], table_size: int) -> bytes:
    """The vtable of tables of that size with these slots, each with its offset."""
    at = dict(offsets)
    slots = max(at, default=-1) + 1
    return struct.pack(f"<{slots + 2}H", 4 + 2 * slots, table_size, *[at.get(i, 0) for i in range(slots)])
