"""A small FlatBuffers writer that writes from front to back.

A table is a mapping from slots to values, and a value's Python type says how it is stored:

============  =========================================================
`Scalar`      number within the table
`Inline`      struct within the table
``str``       string
``bytes``     vector of bytes
`Items`       vector of numbers or structs, already in their bytes
`FlatTable`   table
sequence      vector of tables or strings
============  =========================================================

Slots whose value is None are left out. Parents are written before their children, since offsets
count forward; equal vtables are shared.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, InvalidInputError

__all__ = [
    "MAX_BYTES",
    "MAX_TABLES",
    "FlatTable",
    "FlatWriter",
    "Inline",
    "Items",
    "Run",
    "Scalar",
    "Written",
    "id_struct",
    "u8",
    "u64",
]

MAX_BYTES: Final = 2**31 - 1
"""No FlatBuffers payload may be larger."""
MAX_TABLES: Final = 50_000_000
"""The official library refuses to read a payload with more tables; each chunk reference, and each changed chunk, is
one."""

_U32: Final = struct.Struct("<I")
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
        self.out += bytes(-(len(self.out) + before) % align)

    def table(self, table: FlatTable) -> int:
        """Write a table and all below it; returns its position."""
        fields: list[tuple[int, int, int]] = []  # alignment, slot, size
        inline: list[bytes | None] = []  # None: an offset to come
        for slot, value in table.slots.items():
            if value is None:
                continue
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
            elif isinstance(value, Inline):
                fields.append((value.align, slot, len(value.data)))
                inline.append(value.data)
            else:
                fields.append((4, slot, 4))
                inline.append(None)
        layout = _layout(tuple(fields))
        vtable = self._vtable(layout.vtable)
        out = self.out
        # With 8-byte fields the table itself starts 4 bytes before an 8-byte boundary, so that they follow its first
        # word without a gap.
        self.align(8, 4) if layout.wide else self.align(4)
        start = len(out)
        out += (start - vtable).to_bytes(4, "little", signed=True)
        for i, offset in layout.fields:
            out += bytes(start + offset - len(out))
            data = inline[i]
            out += b"\0\0\0\0" if data is None else data
        for i, offset in layout.fields:
            if inline[i] is None:
                field = start + offset
                position = self._child(table.slots[fields[i][1]])
                _U32.pack_into(out, field, position - field)
        return start

    def vtable(self, offsets: Mapping[int, int], table_size: int) -> int:
        """Position of the vtable of tables of that size whose slots are at those offsets; a new vtable is written."""
        return self._vtable(_vtable_bytes(offsets, table_size))

    def _vtable(self, data: bytes) -> int:
        found = self._vtables.get(data)
        if found is None:
            self.align(2)
            found = self._vtables[data] = len(self.out)
            self.out += data
        return found

    def begin_run(self, payload: bytes = b"", run: Run | None = None) -> int:
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
        if isinstance(value, str):
            return self.string(value)
        if isinstance(value, bytes):
            return self.items(value, len(value), 1)
        if isinstance(value, Items):
            return self.items(*value)
        if isinstance(value, FlatTable):
            return self.table(value)
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
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(f"cannot encode {text!r}: not valid Unicode", ErrorKind.SERIALIZATION) from error
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
    """How the fields of a table are arranged."""

    fields: tuple[tuple[int, int], ...]
    """Number of each field, as given, and its offset, in the order of the offsets."""
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
    for i in order:
        align, slot, size = fields[i]
        end += -(end + (4 if wide else 0)) % align
        offsets[slot] = end
        end += size
    arranged = tuple((i, offsets[fields[i][1]]) for i in order)
    return _Layout(arranged, wide, _vtable_bytes(offsets, end))


def _vtable_bytes(offsets: Mapping[int, int], table_size: int) -> bytes:
    slots = max(offsets, default=-1) + 1
    return struct.pack(f"<{slots + 2}H", 4 + 2 * slots, table_size, *[offsets.get(i, 0) for i in range(slots)])
