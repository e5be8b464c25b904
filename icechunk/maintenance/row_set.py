"""A set of fixed-width byte strings in numpy columns: a million 12-byte ids in 12 MB."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["RowSet"]

_MERGE_FROM = 1 << 16


class RowSet:
    """Grows by whole columns, keeps each row once, and answers for many rows at a time. Threads may share it.

    Parameters
    ----------
    width
        Bytes of a row.
    """

    def __init__(self, width: int) -> None:
        # Of one width all rows, so that it does not matter that numpy compares without zeros at the end.
        self._type = np.dtype(f"S{width}")
        self._rows = np.empty(0, self._type)
        self._fresh: list[npt.NDArray[Any]] = []
        self._fresh_count = 0
        self._lock = threading.Lock()

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Add rows, an array of any type of ``width`` bytes."""
        if not len(rows):
            return
        # A copy: a view would keep alive what the rows were taken from.
        fresh = np.array(rows).view(self._type)
        with self._lock:
            self._fresh.append(fresh)
            self._fresh_count += len(fresh)
            if self._fresh_count > max(_MERGE_FROM, len(self._rows)):
                self._merge()

    def _merge(self) -> None:
        if self._fresh:
            self._rows = np.unique(np.concatenate([self._rows, *self._fresh]))
            self._fresh.clear()
            self._fresh_count = 0

    @property
    def rows(self) -> npt.NDArray[Any]:
        """``S{width}[n]``: all rows, ascending."""
        with self._lock:
            self._merge()
            return self._rows

    def __len__(self) -> int:
        return len(self.rows)

    def missing(self, wanted: Iterable[bytes]) -> list[bool]:
        """For each row, in order, whether it is not in the set."""
        asked = np.array(list(wanted), self._type)
        if not len(asked):
            return []
        rows = self.rows
        if not len(rows):
            return [True] * len(asked)
        found = np.minimum(np.searchsorted(rows, asked), len(rows) - 1)
        absent: list[bool] = (rows[found] != asked).tolist()
        return absent
