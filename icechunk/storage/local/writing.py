"""New files with large contents, on their way to the medium.

Every file is synced before its writer is told so; its bytes go to the medium at once, whichever way they take. Through
the page cache each of them is copied into memory that the system first has to find, and again has to wait for the
medium. So large contents go past it where the file system lets them (``O_DIRECT`` of Linux): in pieces, through a
little memory of the writing thread's own that is aligned as such writes demand. What is no whole block at the end, and
everything where the file system declines, takes the usual way.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import threading
import time
from typing import Final

from icechunk.storage.local.files import fsync_file

if sys.platform == "linux":
    import fcntl

__all__ = ["write_new"]

_DIRECT: Final = getattr(os, "O_DIRECT", 0) if sys.platform == "linux" else 0
_LEAST_DIRECT_BYTES: Final = 1024 * 1024
_PIECE_BYTES: Final = 1024 * 1024
# Of every file system and device that we know, the coarsest alignment.
_BLOCK_BYTES: Final = 4096
_DECLINED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})


def write_new(path: str, data: bytes | memoryview) -> os.stat_result:
    """Create a file of these bytes, synced, with the clock's time as its own. Its folder is not synced.

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
            if os.utime in os.supports_fd:
                now_ns = time.time_ns()
                os.utime(descriptor, ns=(now_ns, now_ns))
            fsync_file(descriptor)
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _write(descriptor: int, data: memoryview) -> None:
    rest = data
    if len(data) >= _LEAST_DIRECT_BYTES and _set_direct(descriptor, on=True):
        rest = data[_write_directly(descriptor, data) :]
        _set_direct(descriptor, on=False)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _set_direct(descriptor: int, *, on: bool) -> bool:
    """Whether the file system took it."""
    if sys.platform != "linux" or not _DIRECT:
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _DIRECT if on else flags & ~_DIRECT)
    except OSError as error:
        if not on or error.errno not in _DECLINED:
            raise
        return False
    return True


def _write_directly(descriptor: int, data: memoryview) -> int:
    """Write whole blocks past the page cache; how many bytes that were, from the start on."""
    piece = _thread_piece()
    done, end = 0, len(data) - len(data) % _BLOCK_BYTES
    while done < end:
        size = min(_PIECE_BYTES, end - done)
        piece[:size] = data[done : done + size]
        try:
            count = os.write(descriptor, piece[:size])
        except OSError as error:
            if error.errno not in _DECLINED:
                raise
            break
        done += count
        if count < size:
            # A disk that is full, for one: the usual way finds out.
            break
    return done


class _Pieces(threading.local):
    piece: memoryview | None = None


_pieces: Final = _Pieces()


def _thread_piece() -> memoryview:
    if _pieces.piece is None:
        # Pages begin at pages. Private: a forked child writes its own.
        memory = mmap.mmap(-1, _PIECE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _pieces.piece = memoryview(memory)
    return _pieces.piece
