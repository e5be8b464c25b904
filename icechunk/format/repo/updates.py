"""The ops log that a repo info holds: a sequence of updates, newest first, decoded only as far as it is read.

It is a sequence of parts: a few updates as objects, and runs of updates in a file. The log of the next file is
therefore the new updates followed by the old file's, and none of the old ones is decoded for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt

from icechunk.format.flat.flatbuffers import Buffer, FlatWriter, Run
from icechunk.format.flat.vectors import LazyTables
from icechunk.format.repo.repo_info import Update
from icechunk.format.repo.update_encoding import read_update, update_table, write_update_blocks
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["UpdateList"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stretch:
    """A run of consecutive updates of a file."""

    tables: LazyTables
    rows: range
    """Their numbers in the file."""
    backup: str | None = None
    """The backup path of those that have none of their own."""
    run: Run | None = None
    """The place of all tables of the file, if this process wrote them."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Update]:
        return map(self.at, range(len(self.rows)))

    def at(self, i: int) -> Update:
        update = read_update(self.tables.table(self.rows[i]))
        if update.backup_path is None and self.backup is not None:
            return replace(update, backup_path=self.backup)
        return update


def _is_whole(part: _Part) -> bool:
    """Whether these are all updates of a file, as they are, and can be copied in one piece."""
    return (
        isinstance(part, _Stretch)
        and part.run is not None
        and part.backup is None
        and part.rows == range(len(part.tables))
    )


_Part: TypeAlias = "tuple[Update, ...] | _Stretch"


class UpdateList(Sequence[Update]):
    """Updates, newest first. Immutable; reading one raises `FormatError` if its file is corrupt."""

    __slots__ = ("_length", "_newest", "_parts")

    def __init__(self, parts: Iterable[_Part]) -> None:
        self._parts = tuple(part for part in parts if len(part))
        self._length = sum(map(len, self._parts))
        self._newest: Update | None = None
        """The first update, once it is known: every change of the repository asks for its time."""

    @staticmethod
    def of(updates: Iterable[Update]) -> UpdateList:
        """A list of these updates, newest first."""
        return updates if isinstance(updates, UpdateList) else UpdateList((tuple(updates),))

    @staticmethod
    def stored(
        buffer: Buffer, start: int, count: int, run: Run | None = None, newest: Update | None = None
    ) -> UpdateList:
        """The updates of a file.

        Parameters
        ----------
        buffer
            The payload.
        start, count
            Position and length of the vector of tables, as `Table.vector` returns them.
        run
            Where the tables are, if this process wrote them.
        newest
            The first of them, if this process wrote it.

        Raises
        ------
        FormatError
            If there are more than the buffer has room for.
        """
        found = UpdateList((_Stretch(tables=LazyTables(buffer, start, count), rows=range(count), run=run),))
        found._newest = newest
        return found

    @property
    def read_count(self) -> int:
        """Number of updates in files that have been decoded."""
        return sum(part.tables.read_count for part in self._parts if isinstance(part, _Stretch))

    def after(self, newer: Iterable[Update]) -> UpdateList:
        """The list with these newer updates before it."""
        return UpdateList((*UpdateList.of(newer)._parts, *self._parts))

    def with_backup(self, backup: str) -> UpdateList:
        """The same list, in which updates without a backup path have this one."""
        parts: list[_Part] = []
        for part in self._parts:
            if isinstance(part, _Stretch):
                parts.append(part if part.backup is not None else replace(part, backup=backup))
            else:
                parts.append(
                    tuple(one if one.backup_path is not None else replace(one, backup_path=backup) for one in part)
                )
        return UpdateList(parts)

    def packed(self, count: int) -> UpdateList:
        """The same list with its ``count`` newest updates in the form of a file, which takes less memory than
        objects."""
        writer = FlatWriter()
        newest = self[:count]
        start = newest.write(writer)
        return UpdateList(
            (
                *UpdateList.stored(Buffer(bytes(writer.out), "updates"), start + 4, len(newest))._parts,
                *self[count:]._parts,
            )
        )

    def write(self, writer: FlatWriter) -> int:
        """As `write_run`; returns the vector's position only."""
        return self.write_run(writer)[0]

    def write_run(self, writer: FlatWriter) -> tuple[int, Run]:
        """Write the vector of all updates; returns its position, and where its tables are.

        Raises
        ------
        InvalidInputError
            If a value cannot be encoded.
        FormatError
            If the file of some of them is corrupt.
        """
        writer.align(4)
        out = writer.out
        vector = len(out)
        out += len(self).to_bytes(4, "little") + bytes(4 * len(self))
        positions: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
        former = next(filter(_is_whole, self._parts), None)
        if isinstance(former, _Stretch):
            start = writer.begin_run(former.tables.payload, former.run)
        else:
            start = writer.begin_run()
        for part in self._parts:
            if isinstance(part, _Stretch) and part is former and part.run is not None:
                positions.append(start + part.run.tables)
            elif isinstance(part, _Stretch):
                positions.append(write_update_blocks(writer, part.tables, part.rows, part.backup))
            else:
                positions.append(np.array([writer.table(update_table(update)) for update in part], np.int64))
        tables = np.concatenate(positions)
        fields = vector + 4 + 4 * np.arange(len(self), dtype=np.int64)
        out[vector + 4 : vector + 4 + 4 * len(self)] = (tables - fields).astype("<u4").tobytes()
        return vector, writer.end_run(start, tables)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Update]:
        if self._length:
            yield self[0]
        for number, part in enumerate(self._parts):
            if number:
                yield from part
            elif isinstance(part, _Stretch):
                yield from map(part.at, range(1, len(part)))
            else:
                yield from part[1:]

    @overload
    def __getitem__(self, which: int) -> Update: ...

    @overload
    def __getitem__(self, which: slice) -> UpdateList: ...

    def __getitem__(self, which: int | slice) -> Update | UpdateList:
        if isinstance(which, slice):
            rows = range(len(self))[which]
            if rows.step != 1:
                return UpdateList.of(self[i] for i in rows)
            if len(rows) == len(self):
                return self
            return UpdateList(self._parts_of(rows))
        i = which + len(self) if which < 0 else which
        if i == 0 and self._parts:
            if self._newest is None:
                first = self._parts[0]
                self._newest = first.at(0) if isinstance(first, _Stretch) else first[0]
            return self._newest
        for part in self._parts:
            if 0 <= i < len(part):
                return part.at(i) if isinstance(part, _Stretch) else part[i]
            i -= len(part)
        raise IndexError(f"update {which} of {len(self)}")

    def _parts_of(self, rows: range) -> Iterator[_Part]:
        begins = 0
        for part in self._parts:
            inside = slice(max(0, rows.start - begins), max(0, rows.stop - begins))
            yield replace(part, rows=part.rows[inside]) if isinstance(part, _Stretch) else part[inside]
            begins += len(part)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, UpdateList | tuple | list):
            return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"<{len(self)} updates>"
