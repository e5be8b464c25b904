"""New files: their bytes, their time, and what makes them durable.

Bytes go to the page cache in pieces, and each piece is sent on to the medium at once: the medium works while the next
piece is copied, and the sync at the end has little left to wait for. Past the cache (``O_DIRECT``) takes twice as long,
since each piece waits for the medium before the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Final

from icechunk.storage.local.files import add_mode, fsync_file

__all__ = ["write_new"]

_LEAST_STARTED_BYTES: Final = 1024 * 1024
_PIECE_BYTES: Final = 1024 * 1024
_SYNC_FILE_RANGE_WRITE: Final = 2


def write_new(path: str, data: bytes | memoryview, *, group_mode: int = 0, synced: bool = True) -> os.stat_result:
    """Create a file of these bytes, with the clock's time as its own. Its folder is not synced.

    Parameters
    ----------
    group_mode
        Permission bits for the group; of these the file has the one for reading at the least, whatever the umask.
    synced
        False: the file is on its way to the medium, and may be torn after a power failure.

    Returns
    -------
    os.stat_result
        Of the file.

    Raises
    ------
    OSError
        Nothing was left behind; FileNotFoundError: there is no such folder.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            _write(descriptor, memoryview(data))
            if group_mode:
                add_mode(descriptor, group_mode & stat.S_IRGRP)
            if os.utime in os.supports_fd:
                now_ns = time.time_ns()
                os.utime(descriptor, ns=(now_ns, now_ns))
            if synced:
                fsync_file(descriptor)
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _write(descriptor: int, data: memoryview) -> None:
    start_range = _start_range() if len(data) >= _LEAST_STARTED_BYTES else None
    begin = done = 0
    while done < len(data):
        # No piece crosses a multiple of its size, so that no page is begun twice.
        done += os.write(descriptor, data[done : begin + _PIECE_BYTES])
        if start_range is not None and (done - begin >= _PIECE_BYTES or done == len(data)):
            # Only a hint, so what it answers does not matter.
            start_range(descriptor, begin, done - begin, _SYNC_FILE_RANGE_WRITE)
            begin = done


@cache
def _start_range() -> Callable[[int, int, int, int], int] | None:
    """``sync_file_range(2)``, which begins to write part of a file to the medium; None where there is no such call."""
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call
