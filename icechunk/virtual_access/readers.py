"""Readers of the objects that virtual chunks are parts of: one class for each kind of storage, behind one port.

A reader of a web server or of S3 imports its storage when it is made, since most repositories need neither. Readers
through the optional obstore are in `icechunk.virtual_access.obstore_readers`.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping
from functools import partial
from typing import Protocol
from urllib.parse import urlsplit

from icechunk.config import S3Options, StorageSettings
from icechunk.credentials import AnyS3Credential
from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.runtime.clock import Sources
from icechunk.runtime.tasks import in_thread
from icechunk.storage.port import GetResult, Range, Version
from icechunk.virtual_access.locations import key_of, require_no_way_out

__all__ = ["BucketFiles", "LocalFiles", "Reader", "WebFiles"]


class Reader(Protocol):
    """Reads ranges of the objects of one container, on one event loop."""

    async def get(self, location: str, wanted: Range) -> GetResult:
        """Bytes of a range, clamped to the object's size, with version and time of the object they were read from.

        Parameters
        ----------
        location
            Resolved, within the container's prefix.

        Raises
        ------
        ObjectNotFoundError
            If there is no object at the location.
        IcechunkError
            Anything else that went wrong, after the tries that the settings allow.
        """
        ...

    async def aclose(self) -> None:
        """Close all connections."""
        ...


class LocalFiles:
    """Reads files below an authorised folder.

    Symbolic links are followed, as in the official library: a link can only be made by a user who controls the folder's
    contents, not by the author of a reference. Dot segments never leave the folder; see `locations`.
    """

    async def get(self, location: str, wanted: Range) -> GetResult:
        """As `Reader.get`. The version is made of inode, time and size."""
        path = "/" + key_of(location)
        return await in_thread(partial(_read, path, wanted))

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


class BucketFiles:
    """Reads objects of one S3 bucket.

    Parameters
    ----------
    url_prefix
        Of the container; names the bucket.
    credentials
        None: as the options and the environment say.
    """

    def __init__(
        self,
        url_prefix: str,
        options: S3Options,
        credentials: AnyS3Credential | None,
        settings: StorageSettings | None,
        sources: Sources,
    ) -> None:
        from icechunk.storage.s3.storage import S3Storage

        self._storage = S3Storage(
            urlsplit(url_prefix).netloc, options=options, credentials=credentials, settings=settings, sources=sources
        )

    async def get(self, location: str, wanted: Range) -> GetResult:
        """As `Reader.get`."""
        return await self._storage.get(key_of(location), wanted)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._storage.aclose()


class WebFiles:
    """Reads ranges of files by HTTP; the server must know ranges, since files may be large.

    Parameters
    ----------
    options
        Of the HTTP client, as `icechunk.http_storage` takes them.
    headers
        Sent with every request to the container's own server; a redirect to another one goes without them.
    settings
        Tries and timeouts.

    Raises
    ------
    InvalidInputError
        An option that is none.
    """

    def __init__(
        self,
        options: Mapping[str, str],
        headers: Mapping[str, str],
        settings: StorageSettings | None,
        sources: Sources,
    ) -> None:
        from icechunk.storage.http.options import check_options, reader_maker

        options = {name.lower(): value for name, value in options.items()}
        check_options(options)
        self._reader = reader_maker(options, headers, settings, sources, serves_ranges=True)()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._reader.aclose()

    async def get(self, location: str, wanted: Range) -> GetResult:
        """As `Reader.get`."""
        # The path as a server decodes it has to stay below the prefix too.
        require_no_way_out(location)
        return await self._reader.get(location, wanted)
