"""Virtual chunks in buckets: S3 by our own storage, Google's and Azure's through obstore, which is optional."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from icechunk.config import S3Options, StorageSettings
from icechunk.credentials import AnyS3Credential
from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.sources import Sources
from icechunk.storage.base import GetResult, Range, Version
from icechunk.storage.s3 import S3Storage
from icechunk.virtual_access.locations import key_of

__all__ = ["BucketFiles", "ObstoreFiles", "azure_files", "gcs_files"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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
    """Reads objects through one of obstore's stores."""

    def __init__(self, store: Any) -> None:
        self._store = store

    async def get(self, location: str, wanted: Range) -> GetResult:
        """As `Reader.get`."""
        import obstore
        from obstore import exceptions

        key = key_of(location)
        span: Any = {"offset": wanted.start} if wanted.end is None else (wanted.start, wanted.end)
        try:
            answer = await obstore.get_async(self._store, key, options={"range": span})
            data = bytes(await answer.bytes_async())
        except (FileNotFoundError, exceptions.NotFoundError) as error:
            raise ObjectNotFoundError(f"there is no object at {location!r}") from error
        except exceptions.BaseError as error:
            raise StorageError(f"cannot read {location!r}: {error}", ErrorKind.OBJECT_STORE) from error
        meta = answer.meta
        if wanted.start >= meta["size"]:
            raise InvalidInputError(f"{location!r} has {meta['size']} bytes only", ErrorKind.INVALID_BYTE_RANGE)
        return GetResult(
            data=data,
            size=meta["size"],
            version=Version((meta["e_tag"] or "").strip('"')),
            modified_us=(meta["last_modified"] - _EPOCH) // timedelta(microseconds=1),
            date_us=None,
        )

    async def aclose(self) -> None:
        """Obstore's connections close with the store."""


def gcs_files(url_prefix: str, options: Mapping[str, str], credential: Any) -> ObstoreFiles:
    """Objects of a bucket of Google Cloud Storage. Raises `StorageError` where obstore is not installed."""
    from icechunk.storage.obstore_credentials import gcs_options

    stores = _obstore("Google Cloud Storage")
    given, provider = gcs_options(credential)
    return ObstoreFiles(
        stores.GCSStore(urlsplit(url_prefix).netloc, config={**options, **given}, credential_provider=provider)
    )


def azure_files(url_prefix: str, options: Mapping[str, str], credential: Any) -> ObstoreFiles:
    """Blobs of a container of Azure. Raises `StorageError` where obstore is not installed."""
    from icechunk.storage.obstore_credentials import azure_options

    stores = _obstore("Azure Blob Storage")
    given, provider = azure_options(credential)
    named = {"account_name" if name == "account" else name: value for name, value in options.items()}
    return ObstoreFiles(
        stores.AzureStore(urlsplit(url_prefix).netloc, config={**named, **given}, credential_provider=provider)
    )


def _obstore(what: str) -> Any:
    try:
        from obstore import store
    except ImportError as error:
        raise StorageError(
            f"reading virtual chunks from {what} needs obstore: install it with pip install 'aioicechunk[obstore]'",
            ErrorKind.UNIMPLEMENTED,
        ) from error
    return store
