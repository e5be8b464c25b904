"""Blocking file operations of `LocalStorage`: reading, listing, durable and exclusive writing, locks, paths of keys.

The rules (rule 12 of ``spec/repository-log.md``): a file appears under its name whole or not at all, and is durable
before the call returns. Three ways to make a name exclusive, tried in this order and remembered per folder:

1. ``link(2)`` from a complete temporary file;
2. an exclusive rename: ``renameat2(RENAME_NOREPLACE)``, ``renamex_np(RENAME_EXCL)``, and ``rename`` on Windows;
3. a look and a rename under the folder's ``flock``. The kernel releases that lock when its owner ends, so a process
   that sleeps keeps it.

A location that offers none of these is refused.

Bytes of new files go to the page cache in pieces, and each piece is sent on to the medium at once: the medium works
while the next piece is copied, and the sync at the end has little left to wait for. Past the cache takes longer for one
file, since each piece waits for the medium before the next; `direct` is for many files, of which some are made while
others are written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import heapq
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator
from enum import Enum, auto
from functools import cache
from typing import Final

from icechunk.errors import ErrorKind, InvalidInputError, StorageError
from icechunk.storage.buffers import Buffers
from icechunk.storage.local import syncs
from icechunk.storage.local.direct import DirectWrites
from icechunk.storage.outcome import refused, unsent
from icechunk.storage.port import ObjectInfo, Version, check_key

__all__ = [
    "RESERVED",
    "Exclusion",
    "LockedOut",
    "add_mode",
    "info_of",
    "is_link",
    "locked",
    "path_of",
    "publish_new",
    "read_file",
    "replace_lazily",
    "sweep",
    "temporary_name",
    "try_stat",
    "version_of",
    "walk",
    "write_new",
]

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


_NO_LINKS: Final = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EINVAL})
_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2
_RENAME_EXCL: Final = 4
_LOCK_PATIENCE_S: Final = 60.0
_LARGE_BYTES: Final = 512 * 1024
_CACHED_BYTES: Final = 128 * 1024
"""So many bytes are copied in a few microseconds; a thread takes a hundred to begin."""


class Exclusion(Enum):
    """The means by which a folder makes a name exclusive."""

    LINK = auto()
    RENAME = auto()
    LOCK = auto()


class LockedOut(StorageError):
    """Another process held the folder's lock for too long."""


_TEMPORARY: Final = re.compile(r"[0-9a-f]+-[0-9a-f]{24}")


def temporary_name() -> str:
    """A name that no other writer uses."""
    return f"{os.getpid():x}-{secrets.token_hex(12)}"


def sweep(folder: str, older_than_s: float) -> None:
    """Remove unfinished files that writers left in a folder long ago: regular files under names that only we give.

    A folder that is a symbolic link is left alone, and so are files that cannot be removed.
    """
    before_s = time.time() - older_than_s
    with contextlib.suppress(OSError):
        if os.unlink not in os.supports_dir_fd:
            if not is_link(os.lstat(folder)):
                _sweep(folder, folder, None, before_s)
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _sweep(descriptor, "", descriptor, before_s)
        finally:
            os.close(descriptor)


def _sweep(folder: str | int, path: str, descriptor: int | None, before_s: float) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) is None:
                continue
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and status.st_mtime < before_s:
                    os.unlink(os.path.join(path, entry.name), dir_fd=descriptor)


def is_link(status: os.stat_result) -> bool:
    """Whether an ``lstat`` is that of a symbolic link, or of a junction of Windows."""
    reparse = getattr(status, "st_file_attributes", 0) & getattr(stat, "FILE_ATTRIBUTE_REPARSE_POINT", 0)
    return stat.S_ISLNK(status.st_mode) or bool(reparse)


def read_file(descriptor: int, start: int, length: int, buffers: Buffers) -> bytes | memoryview:
    """Bytes of an open file, from ``start`` on; fewer where it ends before. Many come as a view of a buffer."""
    if length < _LARGE_BYTES or sys.platform == "win32" or not hasattr(os, "preadv"):
        return _read_pieces(descriptor, start, length)
    view = buffers.take(length)
    done = 0
    while done < length and (count := os.preadv(descriptor, [view[done:]], start + done)):
        done += count
    return view[:done].toreadonly()


TELLS_CACHED: Final = hasattr(os, "RWF_NOWAIT")
"""Whether the system can read what is in the page cache, and nothing else."""
NOT_TOLD: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""Error numbers of `read_cached` on a file system that cannot."""


def read_cached(descriptor: int, start: int, length: int) -> bytes | None:
    """As `read_file`, in less time than a thread takes to begin.

    Returns
    -------
    bytes or None
        None: not all of these bytes are in the page cache, or they are too many.

    Raises
    ------
    OSError
        They cannot be read so; with a number of `NOT_TOLD`: none of this file system can.
    """
    if length > _CACHED_BYTES or sys.platform != "linux":
        return None
    if not length:
        return b""
    data = bytearray(length)
    try:
        count = os.preadv(descriptor, [data], start, os.RWF_NOWAIT)
    except BlockingIOError:
        return None
    return bytes(data) if count == length else None


def _read_pieces(descriptor: int, start: int, length: int) -> bytes:
    data = _read_some(descriptor, length, start)
    if len(data) == length:
        return data
    # One call moves at most 2 GiB, and signals may cut it short.
    parts = [data]
    done = len(data)
    while done < length and data:
        data = _read_some(descriptor, length - done, start + done)
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def _read_some(descriptor: int, size: int, offset: int) -> bytes:
    if sys.platform == "win32":
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)
    return os.pread(descriptor, size, offset)


def publish_new(temporary: str, target: str, exclusion: Exclusion, lock: str) -> Exclusion:
    """Give a complete file its name, unless the name is taken.

    Parameters
    ----------
    exclusion
        The way known to work here; weaker ones are tried only after it turned out not to exist.
    lock
        Path of the folder's lock file.

    Returns
    -------
    Exclusion
        The way that worked.

    Raises
    ------
    FileExistsError
        The name is taken; nothing changed.
    """
    if exclusion is Exclusion.LINK:
        try:
            os.link(temporary, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            exclusion = Exclusion.RENAME
        else:
            # The object has its name; a temporary name that stays is swept later.
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            return exclusion
    if exclusion is Exclusion.RENAME:
        if _rename_exclusively(temporary, target):
            return exclusion
        exclusion = Exclusion.LOCK
    with locked(lock):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        os.replace(temporary, target)
    return exclusion


def _rename_exclusively(source: str, target: str) -> bool:
    """Rename unless ``target`` exists (`FileExistsError`). False where the system has no such operation."""
    if sys.platform == "win32":
        os.rename(source, target)
        return True
    if sys.platform == "darwin":
        return _call_rename("renamex_np", target, os.fsencode(source), os.fsencode(target), _RENAME_EXCL)
    return _renameat2(source, target, _RENAME_NOREPLACE)


def replace_lazily(temporary: str, target: str) -> None:
    """As `os.replace`, for a file of which it does not matter when the medium gets it.

    ext4 begins to write a file that replaces another by a rename at once (its option ``auto_da_alloc``). That takes
    longer than all else that a small change does in the page cache, and most of these files are replaced again before
    the medium needs them. An exchange of two names is as atomic for readers, and ext4 leaves such a file for later.
    """
    try:
        exchanged = _exchange(temporary, target)
    except OSError:
        # As on some network file systems. If there is more to it, the other call has the same error.
        exchanged = False
    if not exchanged:
        os.replace(temporary, target)
        return
    # The object is there now; the old one that stays is swept later.
    with contextlib.suppress(OSError):
        os.unlink(temporary)


def _exchange(one: str, other: str) -> bool:
    """Give two files each other's name. False where the system has no such operation."""
    return sys.platform == "linux" and _renameat2(one, other, _RENAME_EXCHANGE)


def _renameat2(source: str, target: str, flags: int) -> bool:
    return _call_rename("renameat2", target, _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags)


def _call_rename(name: str, target: str, *arguments: int | bytes) -> bool:
    """Call this function of the C library, whose last argument is unsigned. False where the system does not have it."""
    rename = getattr(_c_library(), name, None)
    if rename is None:
        return False
    if rename(*arguments[:-1], ctypes.c_uint(int(arguments[-1]))) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), target)


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def locked(path: str, *, group_mode: int = 0) -> Iterator[None]:
    """Hold the lock file at ``path`` exclusively, against threads and processes alike.

    Parameters
    ----------
    group_mode
        Permission bits for the group that a lock file made by this call has at the least, with any umask.

    Raises
    ------
    LockedOut
        Not had within a minute. Nothing was changed.
    StorageError
        The mount has no locks (kind ``storage-config``).
    """
    # Opened anew each time: flock belongs to the open file, so two threads exclude each other too.
    flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_CREAT, 0o666)
        add_mode(descriptor, group_mode & (stat.S_IRGRP | stat.S_IWGRP))
    try:
        _acquire(descriptor, path)
        try:
            yield
        finally:
            # Unlocked by name: closing is not enough while a forked child holds a copy of the descriptor.
            _release(descriptor)
    finally:
        os.close(descriptor)


def add_mode(descriptor: int, mode: int) -> None:
    """Give an open file these permission bits too, unless it belongs to another user."""
    present = stat.S_IMODE(os.fstat(descriptor).st_mode)
    if mode & ~present and os.chmod in os.supports_fd:
        with contextlib.suppress(PermissionError):
            os.chmod(descriptor, present | mode)


def _acquire(descriptor: int, path: str) -> None:
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    pause = 0.0002
    while True:
        try:
            if sys.platform == "win32":
                os.lseek(descriptor, 0, os.SEEK_SET)
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EINTR, errno.EDEADLK):
                raise refused(
                    StorageError(
                        f"cannot lock {path!r} ({error.strerror}): this file system has neither exclusive names nor "
                        "locks, so concurrent writers could overwrite each other; keep the repository on another one",
                        ErrorKind.STORAGE_CONFIG,
                    )
                ) from error
        if time.monotonic() > deadline:
            raise unsent(
                LockedOut(
                    f"waited {_LOCK_PATIENCE_S:.0f} s for the lock {path!r}; nothing was written. Look for a stopped "
                    "process that holds it",
                    ErrorKind.IO,
                )
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)


def _release(descriptor: int) -> None:
    if sys.platform == "win32":
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


RESERVED: Final = ".aioicechunk"
"""First segment that keys may not have: the folder of unfinished files and the lock."""
_LONGEST_NAME: Final = 255
"""Bytes of the name of a file."""


def path_of(root: str, key: str) -> str:
    """The path of a key's file. Raises `InvalidInputError` (``invalid-key``) where a file system has no such name."""
    check_key(key)
    if os.name == "posix" and len(key) <= _LONGEST_NAME and key.isascii() and not key.startswith(RESERVED):
        return os.path.join(root, key)
    segments = key.split("/")
    if segments[0] == RESERVED:
        raise InvalidInputError(
            f"bad storage key {key!r}: {RESERVED!r} is kept for unfinished files", ErrorKind.INVALID_KEY
        )
    if os.name == "nt":
        check_windows_names(key, segments)
    for segment in segments:
        if len(segment.encode()) > _LONGEST_NAME:
            raise InvalidInputError(
                f"bad storage key {key!r}: a file name has at most {_LONGEST_NAME} bytes", ErrorKind.INVALID_KEY
            )
    return os.path.join(root, *segments)


def check_windows_names(key: str, segments: list[str]) -> None:
    """Raise `InvalidInputError` where Windows would refuse a segment, or take it for something else."""
    devices = {"CON", "PRN", "AUX", "NUL", *(f"{name}{n}" for name in ("COM", "LPT") for n in range(1, 10))}
    for segment in segments:
        if any(character in '<>:"|?*\\' or ord(character) < 32 for character in segment):
            reason = "it has a character that Windows does not allow in file names"
        elif segment[-1] in ". ":
            reason = "Windows drops a final dot or space of a file name"
        elif segment.split(".")[0].upper() in devices:
            reason = "Windows keeps that name for a device"
        else:
            continue
        raise InvalidInputError(f"bad storage key {key!r}: {reason}", ErrorKind.INVALID_KEY)


def try_stat(path: str) -> os.stat_result | None:
    """The status of a regular file, links followed; None where there is none."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def version_of(status: os.stat_result) -> Version:
    """``inode-mtime-size``."""
    return Version(f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}")


def info_of(key: str, status: os.stat_result) -> ObjectInfo:
    """A file as an object."""
    return ObjectInfo(key=key, size=status.st_size, version=version_of(status), modified_us=status.st_mtime_ns // 1000)


def walk(root: str, prefix: str, start_after: str | None) -> Iterator[ObjectInfo]:
    """Objects whose keys begin with ``prefix`` and come after ``start_after``, ascending by whole keys.

    Raises `OSError`.
    """
    folder_key = prefix.rpartition("/")[0]
    segments = folder_key.split("/") if folder_key else []
    if "\0" in prefix or any(segment in ("", ".", "..") for segment in segments) or segments[:1] == [RESERVED]:
        return
    path = os.path.join(root, *segments)
    yield from _walk_folder(path, folder_key + "/" if segments else "", prefix, start_after, frozenset())


def _walk_folder(
    path: str, key: str, prefix: str, start_after: str | None, above: frozenset[tuple[int, int]]
) -> Iterator[ObjectInfo]:
    try:
        status = os.stat(path)
        with os.scandir(path) as entries:
            # A folder sorts with its slash, so that "a-b" comes before "a/b" as whole keys do.
            names = [entry.name + "/" if entry.is_dir() else entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return  # a symbolic link that leads back up
    # A listing of a long log needs its first few keys only: no others are sorted, or looked at.
    heapq.heapify(names)
    folder = os.path.join(path, "")
    while names:
        name = heapq.heappop(names)
        if not (name.isascii() or _is_utf8(name)) or (key == "" and name.rstrip("/") == RESERVED):
            continue
        full = key + name
        if name.endswith("/"):
            if not (full.startswith(prefix) or prefix.startswith(full)):
                continue
            if start_after is not None and full < start_after and not start_after.startswith(full):
                continue
            yield from _walk_folder(folder + name.rstrip("/"), full, prefix, start_after, above | {identity})
        elif full.startswith(prefix) and (start_after is None or full > start_after):
            found = try_stat(folder + name)
            if found is not None:
                yield info_of(full, found)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


_LEAST_STARTED_BYTES: Final = 128 * 1024
_PIECE_BYTES: Final = 1024 * 1024


def write_new(
    path: str,
    data: bytes | memoryview,
    *,
    group_mode: int = 0,
    finish: Callable[[int], None] | None = None,
    direct: DirectWrites | None = None,
) -> os.stat_result:
    """Create a file of these bytes, with the clock's time as its own. Its folder is not synced.

    Parameters
    ----------
    group_mode
        Permission bits for the group; of these the file has the one for reading at the least, with any umask.
    finish
        Called with the descriptor of the complete file, such as `syncs.fsync_file`. None: the file is on its way to the
        medium, and may be torn after a power failure.
    direct
        Writes as much past the page cache as it can. None: all goes through the cache.

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
            _write(descriptor, memoryview(data), 0 if direct is None else direct.write(descriptor, memoryview(data)))
            if group_mode:
                add_mode(descriptor, group_mode & stat.S_IRGRP)
            if os.utime in os.supports_fd:
                now_ns = time.time_ns()
                os.utime(descriptor, ns=(now_ns, now_ns))
            if finish is not None:
                finish(descriptor)
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _write(descriptor: int, data: memoryview, done: int) -> None:
    """Write the bytes behind the first ``done``, which the file has already."""
    started = len(data) - done >= _LEAST_STARTED_BYTES
    begin = done
    while done < len(data):
        # No piece crosses a multiple of its size, so that no page is begun twice.
        done += os.write(descriptor, data[done : begin + _PIECE_BYTES])
        if started and (done - begin >= _PIECE_BYTES or done == len(data)):
            syncs.start(descriptor, begin, done - begin)
            begin = done
