"""Memory for large answers, used again once no reference to it is left.

The first touch of fresh memory costs more than the copy that follows: the system clears each page, one fault at
a time, and takes all of them back with the next `free`. A reader of many chunks drops each as soon as it is decoded, so
a few buffers serve it from then on.

A view, a slice of one, or an array made of either keeps the buffer in use. The buffer is free again when the last of
them is collected, on any thread.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Buffers"]

_KEPT: Final = 12
"""Buffers that wait for their next use at the most; as many as zarr reads at a time, and two."""
_LARGEST_KEPT_BYTES: Final = 8 * 1024 * 1024
_STEP_BYTES: Final = 256 * 1024
_PAGE_BYTES: Final = 4096


class _Lease(np.ndarray[Any, np.dtype[np.uint8]]):
    """Owner of the memory that the views of one use share, so that no array keeps the memory alone."""


class Buffers:
    """Buffers of one owner; safe among threads."""

    def __init__(self) -> None:
        self._idle: deque[npt.NDArray[np.uint8]] = deque(maxlen=_KEPT)

    def take(self, size_bytes: int) -> memoryview:
        """Writable memory of that size, not cleared, that begins at a page."""
        if size_bytes > _LARGEST_KEPT_BYTES:
            return _pages(size_bytes).data
        memory = self._fitting(size_bytes)
        if memory is None:
            memory = _pages(-(-size_bytes // _STEP_BYTES) * _STEP_BYTES)
        lease = memory[:size_bytes].view(_Lease)
        weakref.finalize(lease, self._idle.append, memory).atexit = False
        return lease.data

    def _fitting(self, size_bytes: int) -> npt.NDArray[np.uint8] | None:
        """An idle buffer of at least this size, and not much more, since a view keeps all of it in use; else None."""
        for _ in range(len(self._idle)):
            try:
                memory = self._idle.pop()
            except IndexError:
                break
            if size_bytes <= memory.nbytes <= size_bytes + size_bytes // 4 + _STEP_BYTES:
                return memory
            self._idle.appendleft(memory)
        return None


def _pages(size_bytes: int) -> npt.NDArray[np.uint8]:
    memory = np.empty(size_bytes + _PAGE_BYTES, np.uint8)
    first = -memory.ctypes.data % _PAGE_BYTES
    return memory[first : first + size_bytes]
