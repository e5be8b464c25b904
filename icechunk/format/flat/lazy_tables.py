"""A vector of tables that reads a table only when it is requested.

Each table counts against the budget of `icechunk.format.flat.reader.Buffer` once, however often it is read. Reading all
of a hostile file therefore costs no more than reading it at once, and repeated reads of one table of a valid file never
use up the budget.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from icechunk.format.flat.reader import Buffer, Table
from icechunk.format.flat.vectors import TableColumns

__all__ = ["LazyTables"]


class LazyTables:
    """The tables of a vector.

    Parameters
    ----------
    buffer
        The payload that they are in.
    start, count
        Position of the vector's first offset, and number of tables, as `Table.vector` returns them.

    Raises
    ------
    FormatError
        If a table or its vtable is not within the buffer, or there are more tables than the buffer has room for.
    """

    __slots__ = ("_buffer", "_count", "_seen", "_start")

    def __init__(self, buffer: Buffer, start: int, count: int) -> None:
        buffer.charge_tables(count)
        self._buffer = buffer
        self._start = start
        self._count = count
        self._seen = bytearray(count)

    def __len__(self) -> int:
        return self._count

    @property
    def read_count(self) -> int:
        """Number of distinct tables that have been read individually."""
        return self._seen.count(1)

    @property
    def payload(self) -> bytes:
        """All bytes of the buffer."""
        return self._buffer.data

    @property
    def name(self) -> str:
        """Name of the buffer in errors."""
        return self._buffer.name

    def positions(self) -> npt.NDArray[np.int64]:
        """int64[n]: position of each table; not checked."""
        offsets = np.frombuffer(self._buffer.data, "<u4", self._count, self._start)
        positions: npt.NDArray[np.int64] = self._start + 4 * np.arange(self._count, dtype=np.int64) + offsets
        return positions

    def position(self, row: int) -> int:
        """Position of the table with that number; not checked."""
        field = self._start + 4 * row
        return field + self._buffer.u32(field)

    def columns(self, rows: npt.NDArray[np.intp] | None = None) -> tuple[Buffer, TableColumns]:
        """The tables of some rows (None: all) as columns, and a buffer with a budget of its own to read what they
        point to.

        Raises
        ------
        FormatError
            If a table is not within the buffer.
        """
        buffer, positions = Buffer(self._buffer.data, self._buffer.name), self.positions()
        return buffer, TableColumns(buffer, positions if rows is None else positions[rows])

    def table(self, row: int) -> Table:
        """The table with that number, 0 ≤ ``row`` < ``len(self)``.

        Raises
        ------
        FormatError
            If the table is not within the buffer.
        """
        buffer = self._buffer
        if self._seen[row]:
            buffer = Buffer(buffer.data, buffer.name)
        else:
            self._seen[row] = 1
        field = self._start + 4 * row
        return Table(buffer, field + buffer.u32(field))
