"""Virtual chunks in files of this machine."""

from __future__ import annotations

import os
import stat
import time

import anyio.to_thread

from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.storage.port import GetResult, Range, Version
from icechunk.virtual_access.locations import key_of

__all__ = ["LocalFiles"]


class LocalFiles:
    """Reads files below an authorised folder.

    Symbolic links are followed, as in the official library: a link can only be made by a user who controls the folder's
    contents, not by the author of a reference. Dot segments never leave the folder; see `locations`.
    """

    async def get(self, location: str, wanted: Range) -> GetResult:
        """As `Reader.get`. The version is made of inode, time and size."""
        path = "/" + key_of(location)
        return await anyio.to_thread.run_sync(_read, path, wanted, abandon_on_cancel=True)

    async def aclose(self) -> None:
        """Nothing is open between reads."""


def _read(path: str, wanted: Range) -> GetResult:
    try:
        # Not blocking: a named pipe at this path must not block a thread for ever.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ObjectNotFoundError(f"there is no file {path!r}") from error
    except OSError as error:
        raise StorageError(f"cannot open {path!r}: {error.strerror or error}", ErrorKind.IO) from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ObjectNotFoundError(f"{path!r} is not a file")
        data = _read_all(handle, wanted)
        # After the bytes: a file that changes while it is read shows it here.
        found = os.fstat(handle)
    except OSError as error:
        raise StorageError(f"cannot read {path!r}: {error.strerror or error}", ErrorKind.IO) from error
    finally:
        os.close(handle)
    if wanted.start >= found.st_size:
        raise InvalidInputError(f"{path!r} has {found.st_size} bytes only", ErrorKind.INVALID_BYTE_RANGE)
    return GetResult(
        body=data,
        size=found.st_size,
        version=Version(f"{found.st_ino:x}-{found.st_mtime_ns // 1000:x}-{found.st_size:x}"),
        modified_us=found.st_mtime_ns // 1000,
        date_us=time.time_ns() // 1000,
    )


def _read_all(handle: int, wanted: Range) -> bytes:
    size = os.fstat(handle).st_size
    end = size if wanted.end is None else min(size, wanted.end)
    parts: list[bytes] = []
    at = wanted.start
    while at < end:
        # One read ends at 2 GiB on Linux.
        part = os.pread(handle, end - at, at)
        if not part:
            break
        parts.append(part)
        at += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
