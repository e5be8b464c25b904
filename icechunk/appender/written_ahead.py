"""Rows that are encoded and written while others are still put, long before their commit refers to them.

So the medium and a second core work from the first rows on, the commit finds little left to do, and the memory of rows
is free again soon. Where the storage makes each object durable by itself, as an object store does, rows stay in memory
until their commit. The same holds for rows that could not be written: their commit tries it again, and says why.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterator, Sequence
from typing import Final

from icechunk.appender.chunk_encoding import EncodedChunk
from icechunk.appender.target import Batch, Target, Variable, WrittenRows, encoded_rows
from icechunk.session.ahead import gains_from_writing_ahead, write_ahead
from icechunk.session.core import Core

__all__ = ["WriteAhead"]

_PORTION_BYTES: Final = 8 * 1024 * 1024
"""Bytes of rows that are written at once, about."""
_CACHED_BYTES: Final = 64 * 1024 * 1024
"""Bytes of rows of one commit that a reader finds in the system's cache of files, at the least; further ones it reads
from the medium."""
_ENCODERS: Final = max(1, min(4, os.cpu_count() or 1))
_AT_ONCE: Final = _ENCODERS + 3
"""Portions that are encoded or written at once: more of them stay in memory, or wait."""
_LAST_PORTION_BYTES: Final = 1024 * 1024
"""Least bytes of the last rows before a commit that are written as those before them."""
_LEAST_CHUNK_BYTES: Final = 16 * 1024
"""Arrays of smaller chunks keep their rows in memory, labels among them."""


class WriteAhead:
    """Writes the whole chunks of buffered batches. Nothing that fails here is raised."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._gains = gains_from_writing_ahead(core)
        self._has_failed = False
        self._encoders = asyncio.Semaphore(_ENCODERS)
        self._tasks = set[asyncio.Task[None]]()
        self._batches: list[Batch] = []
        """Batches in memory, each behind the one before it."""
        self._first_row = 0
        self._bytes = 0
        self._enough_bytes = _PORTION_BYTES
        self._begun_bytes = 0
        """Bytes of rows for the next commit that are written, or on their way."""

    def add(self, batch: Batch, target: Target, first_row: int) -> None:
        """A batch was buffered.

        Parameters
        ----------
        target
            The arrays as of the last commit.
        first_row
            Position of the first row, if no other writer appends any.
        """
        if not self._gains or self._has_failed:
            return
        if not self._batches:
            self._first_row = first_row
        self._batches.append(batch)
        self._bytes += batch.num_bytes
        if self._bytes >= self._enough_bytes:
            self._begin(target, _PORTION_BYTES // 2)

    def cut(self, target: Target | None = None) -> set[asyncio.Task[None]]:
        """A commit begins: it writes all batches but those whose writing these tasks end first.

        Parameters
        ----------
        target
            The arrays as of the last commit; None: no more rows are written.
        """
        if target is not None and self._begun_bytes and not self._has_failed:
            # The last rows too: the commit would write them only after all others.
            self._begin(target, _LAST_PORTION_BYTES)
        self._batches, self._bytes, self._enough_bytes, self._begun_bytes = [], 0, _PORTION_BYTES, 0
        return set(self._tasks)

    @property
    def is_full(self) -> bool:
        """Whether so many rows are being written that others should wait."""
        return len(self._tasks) >= _AT_ONCE

    async def wait(self) -> None:
        """Return when some rows are written, or could not be."""
        if self._tasks:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    def resume(self) -> None:
        """Rows were committed: what could not be written may succeed now."""
        self._has_failed = False

    def _begin(self, target: Target, least_bytes: int) -> None:
        """Write the batches between the first and the last place where chunks of all large arrays begin, if they have
        so many bytes; of other arrays too whose chunks begin there."""
        large = [v for v in target.growing if v.name != target.dim and v.encoder is not None and _is_large(v)]
        unit = math.lcm(*(v.chunk_rows for v in large))
        row, places = self._first_row, list[tuple[int, int]]()
        for number, batch in enumerate(self._batches):
            if row % unit == 0:
                places.append((number, row))
            row += batch.rows
        if row % unit == 0:
            places.append((len(self._batches), row))
        (begin, first_row), (end, end_row) = (places[0], places[-1]) if places else ((0, 0), (0, 0))
        batches = self._batches[begin:end]
        if not large or sum(batch.num_bytes for batch in batches) < least_bytes:
            self._enough_bytes = 2 * self._bytes
            return
        self._batches, self._first_row = self._batches[end:], end_row
        self._bytes = sum(batch.num_bytes for batch in self._batches)
        self._enough_bytes = _PORTION_BYTES
        bulk = self._begun_bytes >= _CACHED_BYTES
        self._begun_bytes += sum(batch.num_bytes for batch in batches)
        names = {variable.name for variable in large}
        small = [v for v in target.growing if v.name not in names and v.encoder is not None and not unit % v.chunk_rows]
        task = asyncio.create_task(self._write(batches, large, small, first_row, bulk))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(
        self,
        batches: Sequence[Batch],
        large: Sequence[Variable],
        small: Sequence[Variable],
        first_row: int,
        bulk: bool,
    ) -> None:
        both = [*large, *small]

        def encode() -> Iterator[EncodedChunk]:
            return encoded_rows(both, [[batch.values[v.name] for batch in batches] for v in both], first_row)

        try:
            ahead = await write_ahead(self._core, encode, self._encoders, bulk=bulk)
        except Exception:
            # The commit meets the same error, if it is still there, and raises it.
            self._has_failed = True
            return
        rows = sum(batch.rows for batch in batches)
        variables = {variable.name: variable for variable in both}
        written = WrittenRows(
            first=first_row,
            rows=rows,
            variables=variables,
            # An array with a dimension of length 0 has no chunks.
            chunks={name: ahead.chunks.get(name, []) for name in variables},
            since_us=ahead.since_us,
            batches=batches,
        )
        freed = {variable.name for variable in large}
        for batch in batches:
            batch.written = written
            batch.values = {name: v for name, v in batch.values.items() if name not in freed}


def _is_large(variable: Variable) -> bool:
    shape: tuple[int, ...] = variable.meta.chunk_grid.chunk_shape  # type: ignore[attr-defined]
    return math.prod(shape) * variable.dtype.itemsize >= _LEAST_CHUNK_BYTES
