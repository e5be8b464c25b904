"""Virtual chunks in buckets: S3 by our own storage, Google's and Azure's through obstore, which is optional."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from icechunk.config import S3Options, StorageSettings
from icechunk.credentials import AnyS3Credential
from icechunk.errors import ErrorKind, IcechunkError, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.moments import us_of
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import GetResult, Range
from icechunk.storage.keys import resolve_range
from icechunk.storage.obstore_errors import missing, storage_error
from icechunk.storage.obstore_places import AzurePlace, GcsPlace, ObstorePlace, stores_of_obstore
from icechunk.storage.obstore_reading import version_of_meta
from icechunk.storage.obstore_runtime import obstore_module
from icechunk.storage.s3 import S3Storage
from icechunk.storage.tries import limits_of
from icechunk.values import redacted_url
from icechunk.virtual_access.locations import key_of

__all__ = ["BucketFiles", "ObstoreFiles", "azure_files", "gcs_files"]

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
    place = GcsPlace(
        bucket, "", credentials=credential, sources=sources, config=options, read_headers={}, write_headers={}
    )
    return _files(place, "Google Cloud Storage", settings)


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
    place = AzurePlace(
        account, bucket, "", credentials=credential, sources=sources, config=config, read_headers={}, write_headers={}
    )
    return _files(place, "Azure Blob Storage", settings)


def _files(place: ObstorePlace, service: str, settings: StorageSettings | None) -> ObstoreFiles:
    stores_of_obstore(f"reading virtual chunks from {service}")
    return ObstoreFiles(place.open(limits_of(settings), role="read"))
