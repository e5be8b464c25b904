"""Writes past the page cache (``O_DIRECT`` of Linux), of many large objects in a row.

Through the cache each byte is copied into memory that the system has to find first, and the bytes of a long load take
the place of all that others had there. Past it the device reads the writer's own memory, and no byte is copied.

Where the medium is slow the writer would gain nothing, since it waits for the medium either way, and a reader of the
same bytes would have to wait for it too. So the time of such writes is measured, and a medium that takes longer is
written through the cache for a while.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from typing import Final

import numpy as np

if sys.platform == "linux":
    import fcntl

__all__ = ["BLOCK_BYTES", "DirectWrites"]

BLOCK_BYTES: Final = 4096
"""Alignment of memory, places and lengths: the coarsest of all devices that are known."""
_LEAST_BYTES: Final = 1024 * 1024
_MOST_AT_ONCE: Final = 8 * 1024 * 1024
_LEAST_PER_S: Final = 150e6
"""Bytes a second, of one write among a few; a slower medium is written through the cache."""
_SLOW_FOR_S: Final = 10.0
_DECLINED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class DirectWrites:
    """Writes past the page cache on one file system, and how long they take; safe among threads."""

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0
        """Sums over the writes so far, each counting half as much as the next."""
        self._not_before_s = -math.inf

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write as much of the data, from their beginning, as can go past the cache, into a new and empty file.

        Returns
        -------
        int
            Bytes that were written. The rest is for the caller to write, from there on; where the system declined only
            the bytes, the file may have its size already.
        """
        size = len(data) - len(data) % BLOCK_BYTES
        now_s = time.perf_counter()
        if size < _LEAST_BYTES or now_s < self._not_before_s or not _is_aligned(data) or not _set(descriptor, on=True):
            return 0
        done = 0
        try:
            # In one piece on the medium; a file that grows with each write takes longer.
            os.posix_fallocate(descriptor, 0, len(data))
            while done < size:
                done += os.write(descriptor, data[done : min(done + _MOST_AT_ONCE, size)])
                if done % BLOCK_BYTES:
                    # Cut short, by a full disk for one: the usual way finds out.
                    break
        except OSError as error:
            if error.errno not in _DECLINED:
                raise
        _set(descriptor, on=False)
        self._took(done, time.perf_counter() - now_s)
        return done

    def _took(self, size: int, seconds: float) -> None:
        self._bytes, self._seconds = self._bytes / 2 + size, self._seconds / 2 + seconds
        if self._bytes < _LEAST_PER_S * self._seconds:
            self._not_before_s = time.perf_counter() + _SLOW_FOR_S
            self._bytes = self._seconds = 0.0


def _is_aligned(data: memoryview) -> bool:
    return int(np.frombuffer(data, np.uint8).ctypes.data) % BLOCK_BYTES == 0


def _set(descriptor: int, *, on: bool) -> bool:
    """Whether the file system did as it was told."""
    if sys.platform != "linux":
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError as error:
        if error.errno not in _DECLINED:
            raise
        return False
    return True
