"""Virtual chunks in Google's and Azure's buckets, through obstore, which is optional."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from icechunk.config import StorageSettings
from icechunk.errors import ErrorKind, IcechunkError, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.runtime.clock import SYSTEM, Sources, us_of
from icechunk.runtime.representation import redacted_url
from icechunk.storage.obstore.buckets import AzureContainer, GcsBucket, ObstoreBucket, stores_of_obstore
from icechunk.storage.obstore.obstore_errors import missing, obstore_module, storage_error
from icechunk.storage.obstore.reading import version_of_meta
from icechunk.storage.port import GetResult, Range, resolve_range
from icechunk.storage.retry import limits_of
from icechunk.virtual_access.locations import key_of

__all__ = ["ObstoreFiles", "azure_files", "gcs_files"]

_ACCOUNT: Final = ("account", "account_name", "azure_storage_account_name")


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
        """The error to raise for a failed read: stores and obstore report in many ways that an object is too short."""
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
