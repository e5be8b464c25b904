"""Calls that wait for the medium, and what each file system promises about a power failure.

Rule 12 of ``spec/repository-log.md`` needs two facts: an object's bytes and all that it refers to are on the medium
before its name is, and the name is before its writer returns. A sync of the bytes and a sync of the name are enough on
any file system. Where a journal keeps the order, the second alone is enough (`Promises.orders`): the bytes are only
*handed over* to the device before the name is given (`hand_over`), and the journal does not get the name without what
came before it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final

from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "Promises",
    "fsync_each",
    "fsync_file",
    "fsync_folder",
    "fsync_together",
    "hand_over",
    "hand_over_together",
    "promises_of",
    "start",
]

if sys.platform != "win32":
    import fcntl

_WAIT_BEFORE: Final = 1
_WRITE: Final = 2
_WAIT_AFTER: Final = 4
_NOT_THERE: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ESPIPE})
"""Answers of a system that does not have `sync_file_range`, or forbids it."""
_OPEN_AT_ONCE: Final = 64
_OTHERS_BYTES: Final = 64 * 1024 * 1024
_UNWRITTEN: Final = re.compile(rb"^(?:Dirty|Writeback): *([0-9]+) kB$", re.MULTILINE)
_REPORTS_ERRORS: Final = (5, 8)
"""The version of Linux since which `syncfs` says whether bytes were lost."""


def fsync_file(descriptor: int) -> None:
    """Wait until the file's bytes and metadata are on the medium."""
    if sys.platform == "darwin":
        # fsync only hands the bytes to the drive there.
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:
            pass
    os.fsync(descriptor)


def fsync_folder(path: str) -> None:
    """Wait until the names in a folder are on the medium. Windows has no such call; NTFS journals names."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync_file(descriptor)
    except OSError as error:
        # Some network and FUSE mounts cannot sync a folder; they have nothing better to offer either.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def start(descriptor: int, begin: int, count: int) -> None:
    """Begin to write part of a file to the medium, where the system has such a call; a hint."""
    call = _sync_file_range()
    if call is not None:
        call(descriptor, begin, count, _WRITE)


def hand_over(descriptor: int) -> None:
    """Wait until the device has a file's bytes; it may keep them in its cache.

    Where `Promises.orders`, they and the file's size are on the medium before any name that is given afterwards.
    Elsewhere this says nothing about a power failure.

    Raises
    ------
    OSError
        The bytes may be lost. A system reports that once, so another call may succeed.
    """
    call = _sync_file_range()
    if call is None:
        fsync_file(descriptor)
    elif call(descriptor, 0, 0, _WAIT_BEFORE | _WRITE | _WAIT_AFTER):
        code = ctypes.get_errno()
        if code not in _NOT_THERE:
            raise OSError(code, os.strerror(code))
        fsync_file(descriptor)


def hand_over_together(paths: Sequence[str]) -> None:
    """As `hand_over`, of files; the device works on all of them at once. An error has the path as its ``filename``."""
    _each(paths, hand_over)


def fsync_each(paths: Sequence[str]) -> None:
    """Wait until files' bytes and metadata are on the medium; the device works on all of them at once. An error has the
    path as its ``filename``."""
    _each(paths, fsync_file)


def _each(paths: Sequence[str], wait: Callable[[int], None]) -> None:
    for first in range(0, len(paths), _OPEN_AT_ONCE):
        with contextlib.ExitStack() as stack:
            opened: list[tuple[str, int]] = []
            for path in paths[first : first + _OPEN_AT_ONCE]:
                descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
                stack.callback(os.close, descriptor)
                start(descriptor, 0, 0)
                opened.append((path, descriptor))
            for path, descriptor in opened:
                try:
                    wait(descriptor)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, path) from error


def fsync_together(paths: Sequence[str], *, flush: bool) -> bool:
    """Wait for the medium once, until all these files and whatever else their file system was given are on it.

    Only on file systems of `Promises.syncs_all`. All names that were given before are on the medium too.

    Parameters
    ----------
    flush
        Make the device write its cache too: without a journal, the last writes of the call follow its flush.

    Returns
    -------
    bool
        False: nothing was done, since the system has no such call that reports errors, since other programs have
        written so much lately that waiting for each of these files takes less time, or since they are on several disks.

    Raises
    ------
    OSError
        A file is not there, or its bytes may be lost. A system reports that once, so another call may succeed.
    """
    call, range_call = _sync_file_system(), _sync_file_range()
    if call is None or range_call is None:
        return False
    statuses = [os.stat(path) for path in paths]
    if len({status.st_dev for status in statuses}) > 1:
        return False
    if _unwritten_bytes() > sum(status.st_size for status in statuses) + _OTHERS_BYTES:
        return False
    descriptor = os.open(os.path.dirname(paths[0]), os.O_RDONLY | os.O_DIRECTORY)
    try:
        _checked(call(descriptor), paths[0])
        if flush:
            fsync_file(descriptor)
    finally:
        os.close(descriptor)
    for path in paths:
        # The system reports a failure for each file, also after another program has asked about the whole file system.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _checked(range_call(descriptor, 0, 0, _WAIT_BEFORE), path)
        finally:
            os.close(descriptor)
    return True


def _checked(answer: int, path: str) -> None:
    if answer:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def _unwritten_bytes() -> int:
    """Bytes that all programs of the machine have written and that are not on the medium yet; 0: not known."""
    with contextlib.suppress(OSError), open("/proc/meminfo", "rb", buffering=0) as file:
        return sum(map(int, _UNWRITTEN.findall(file.read(4096)))) * 1024
    return 0


@dataclass(frozen=True, slots=True)
class Promises:
    """The promises of a file system about a power failure."""

    orders: bool = False
    """Whether a name is on the medium only together with all names that were given before it, and with the bytes and
    sizes of all files that were handed over (`hand_over`) before it."""
    names_follow_files: bool = False
    """Whether a sync of a file or folder makes durable the names that it has, and those of the folders above it."""
    syncs_all: bool = False
    """Whether a call makes everything durable at once, and reports lost bytes (`fsync_together`)."""
    flushes_all: bool = False
    """Whether that call flushes the device's cache after its last write."""


@cache
def promises_of(device: int) -> Promises:
    """Promises of the file system on a device (``st_dev`` of a folder); none where they are not known."""
    if sys.platform != "linux":
        return Promises()
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == wanted:
                found = rest.split()
                return _promises(found[0], set(found[-1].split(",")), wanted)
    return Promises()


def _promises(name: str, options: set[str], device: str) -> Promises:
    """Promises of a kind of file system, mounted with these options, on a device (``major:minor``).

    ext4 keeps the order if it has its journal inside: a commit of the journal then flushes the cache of the device that
    has the bytes; but an asynchronous commit does not flush first. Without a journal it syncs the folders above a new
    file with the file, and writes the last inodes of a `syncfs` after the flush. XFS keeps the order, except on a
    realtime device, whose cache its commits do not flush. Btrfs does not: it ends the write of a page before the file
    refers to it. No other kind is known well enough, nor these on an older Linux, whose `sync_file_range` may leave
    pages out.
    """
    reports = _linux() >= _REPORTS_ERRORS
    match name:
        case "ext4":
            journal = _journal_is_inside(device)
            orders = reports and journal and "journal_async_commit" not in options
            return Promises(orders=orders, names_follow_files=True, syncs_all=True, flushes_all=journal)
        case "xfs":
            orders = reports and not any(option.startswith("rtdev=") for option in options)
            return Promises(orders=orders, names_follow_files=True, syncs_all=True, flushes_all=True)
        case "btrfs":
            return Promises(names_follow_files=True, syncs_all=True, flushes_all=True)
        case _:
            return Promises()


def _journal_is_inside(device: str) -> bool:
    """Whether ext4 on this device has a journal in the file system itself, as the list of journals in use tells."""
    try:
        name = os.path.basename(os.readlink(f"/sys/dev/block/{device}"))
        return any(entry.startswith(f"{name}-") for entry in os.listdir("/proc/fs/jbd2"))
    except OSError:
        return False


def _linux() -> tuple[int, int]:
    """The version of the running Linux; (0, 0): not known."""
    # Compiling a pattern would take longer than all else that the first write of a process does before its sync.
    major, _, rest = os.uname().release.partition(".")
    minor = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    return (int(major), int(minor)) if major.isdecimal() and minor else (0, 0)


@cache
def _sync_file_system() -> Callable[[int], int] | None:
    """``syncfs(2)``; None where there is no such call, or it hides errors."""
    if sys.platform != "linux" or _linux() < _REPORTS_ERRORS:
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if call is not None:
        call.argtypes = [ctypes.c_int]
    return call


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """``sync_file_range(2)``; None where there is no such call."""
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call
