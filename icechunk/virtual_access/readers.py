"""What reading somebody else's objects needs: one verb.

Virtual chunks in files of this machine.

Virtual chunks on web servers.

Virtual chunks in buckets: S3 by our own storage, Google's and Azure's through obstore, which is optional.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import anyio.to_thread
from yarl import URL

from icechunk.config import S3Options, StorageSettings
from icechunk.credentials import AnyS3Credential
from icechunk.errors import ErrorKind, IcechunkError, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.runtime.clock import SYSTEM, Sources, us_of
from icechunk.runtime.representation import redacted_url
from icechunk.storage.http.reading import check_options, reader_maker
from icechunk.storage.obstore.buckets import AzureContainer, GcsBucket, ObstoreBucket, stores_of_obstore
from icechunk.storage.obstore.errors import missing, obstore_module, storage_error
from icechunk.storage.obstore.reading import version_of_meta
from icechunk.storage.port import GetResult, Range, Version, resolve_range
from icechunk.storage.retry import limits_of
from icechunk.storage.s3.storage import S3Storage
from icechunk.virtual_access.locations import key_of

__all__ = ["BucketFiles", "LocalFiles", "ObstoreFiles", "Reader", "WebFiles", "azure_files", "gcs_files"]


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
            Nothing there.
        IcechunkError
            Anything else that went wrong, after the tries that the settings allow.
        """
        ...

    async def aclose(self) -> None:
        """Close what is open."""
        ...


class LocalFiles:
    """Reads files below an authorised folder.

    Symbolic links are followed, as the official library does it: whoever can make one in the folder decides what is in
    it, and that is not the author of a reference. Dot segments never leave the folder; see `locations`.
    """

    async def get(self, location: str, wanted: Range) -> GetResult:
        """As `Reader.get`. The version is made of inode, time and size."""
        path = "/" + key_of(location)
        return await anyio.to_thread.run_sync(_read, path, wanted, abandon_on_cancel=True)

    async def aclose(self) -> None:
        """Nothing is open between reads."""


def _read(path: str, wanted: Range) -> GetResult:
    try:
        # Not blocking: a pipe that somebody put there must not hold a thread for ever.
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
        options = {name.lower(): value for name, value in options.items()}
        check_options(options)
        self._reader = reader_maker(options, headers, settings, sources, serves_ranges=True)()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._reader.aclose()

    async def get(self, location: str, wanted: Range) -> GetResult:
        """As `Reader.get`."""
        # What a decoding server would make of the path has to stay below the prefix too.
        key_of(location)
        return await self._reader.get(URL(location), wanted)


_ACCOUNT: Final = ("account", "account_name", "azure_storage_account_name")


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
        self._storage = S3Storage(
            urlsplit(url_prefix).netloc, options=options, credentials=credentials, settings=settings, sources=sources
        )

    async def get(self, location: str, wanted: Range) -> GetResult:
        """As `Reader.get`."""
        return await self._storage.get(key_of(location), wanted)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._storage.aclose()


class ObstoreFiles:
    """Reads objects through one of obstore's stores.

    Parameters
    ----------
    store
        Its own tries and timeouts are in force.
    """

    def __init__(self, store: Any) -> None:
        self._store = store

    async def get(self, location: str, wanted: Range) -> GetResult:
        """As `Reader.get`."""
        key = key_of(location)
        span: Any = {"offset": wanted.start} if wanted.end is None else (wanted.start, wanted.end)
        try:
            answer = await obstore_module().get_async(self._store, key, options={"range": span})
            data = bytes(await answer.bytes_async())
        except Exception as error:
            if missing(error):
                raise ObjectNotFoundError(f"there is no object at {redacted_url(location)!r}") from error
            raise await self._unread(location, key, wanted, error) from error
        meta = answer.meta
        resolve_range(wanted, meta["size"], redacted_url(location))
        return GetResult(
            body=data,
            size=meta["size"],
            version=version_of_meta(meta),
            modified_us=us_of(meta["last_modified"]),
            date_us=None,
        )

    async def _unread(self, location: str, key: str, wanted: Range, error: Exception) -> IcechunkError:
        """The error to raise for one while reading: stores and obstore say in many ways that an object is shorter."""
        shown = redacted_url(location)
        try:
            meta = await obstore_module().head_async(self._store, key)
            resolve_range(wanted, meta["size"], shown)
        except InvalidInputError as refusal:
            return refusal
        except Exception:
            pass
        return storage_error(f"read {shown!r}", error)

    async def aclose(self) -> None:
        """Obstore's connections close with the store."""


def gcs_files(
    url_prefix: str,
    options: Mapping[str, str],
    credential: Any,
    settings: StorageSettings | None = None,
    sources: Sources = SYSTEM,
) -> ObstoreFiles:
    """Objects of a bucket of Google Cloud Storage.

    Raises
    ------
    StorageError
        Obstore is not installed, or does not take the options.
    """
    bucket = urlsplit(url_prefix).netloc
    opened = GcsBucket(bucket, credentials=credential, sources=sources, config=options)
    return _files(opened, "Google Cloud Storage", settings)


def azure_files(
    url_prefix: str,
    options: Mapping[str, str],
    credential: Any,
    settings: StorageSettings | None = None,
    sources: Sources = SYSTEM,
) -> ObstoreFiles:
    """Blobs of a container of Azure, of the account that the options name as ``account``.

    Raises
    ------
    StorageError
        Obstore is not installed, or does not take the options; no account.
    """
    account = next((value for name, value in options.items() if name.lower() in _ACCOUNT), None)
    account = account or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if account is None:
        raise StorageError(
            f"the virtual chunk container {url_prefix!r} does not say in which account it is: give its store as "
            'icechunk.azure_store(account="…")',
            ErrorKind.STORAGE_CONFIG,
        )
    config = {name: value for name, value in options.items() if name.lower() not in _ACCOUNT}
    bucket = urlsplit(url_prefix).netloc
    opened = AzureContainer(account, bucket, credentials=credential, sources=sources, config=config)
    return _files(opened, "Azure Blob Storage", settings)


def _files(bucket: ObstoreBucket, service: str, settings: StorageSettings | None) -> ObstoreFiles:
    stores_of_obstore(f"reading virtual chunks from {service}")
    return ObstoreFiles(bucket.open(limits_of(settings), role="read"))
