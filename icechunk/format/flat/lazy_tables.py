"""A vector of tables of which only those that are asked for are read.

What `flat_reader.Buffer` counts against its budget is counted once for each table, however often it is read: so
reading all of a hostile file costs no more than it would at once, and reading one table of an honest file for
years costs no budget.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from icechunk.format.flat.columns import TableColumns
from icechunk.format.flat.reader import Buffer, Table

__all__ = ["LazyTables"]


class LazyTables:
    """The tables of a vector.

    Parameters
    ----------
    buffer
        The payload that they are in.
    start, count
        Position of the vector's first offset, and how many there are, as `Table.vector` tells.

    Raises
    ------
    FormatError
        If one of them, or its vtable, is not within the buffer, or there are more than it has room for.
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
        """How many different tables have been read one at a time."""
        return self._seen.count(1)

    @property
    def payload(self) -> bytes:
        """The bytes of everything."""
        return self._buffer.data

    def positions(self) -> npt.NDArray[np.int64]:
        """int64[n]: where each table begins; not checked."""
        offsets = np.frombuffer(self._buffer.data, "<u4", self._count, self._start)
        positions: npt.NDArray[np.int64] = self._start + 4 * np.arange(self._count, dtype=np.int64) + offsets
        return positions

    def columns(self, rows: npt.NDArray[np.intp] | None = None) -> tuple[Buffer, TableColumns]:
        """Those of some rows as columns, None: all, with a buffer of their own to read further in.

        Raises
        ------
        FormatError
            If one of them is not within the buffer.
        """
        buffer, positions = Buffer(self._buffer.data, self._buffer.name), self.positions()
        return buffer, TableColumns(buffer, positions if rows is None else positions[rows])

    def table(self, row: int) -> Table:
        """The table with that number, from 0 to one less than there are.

        Raises
        ------
        FormatError
            If it is not within the buffer.
        """
        buffer = self._buffer
        if self._seen[row]:
            buffer = Buffer(buffer.data, buffer.name)
        else:
            self._seen[row] = 1
        field = self._start + 4 * row
        return Table(buffer, field + buffer.u32(field))
