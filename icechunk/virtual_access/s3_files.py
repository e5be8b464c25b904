"""Virtual chunks in S3 buckets, read through `icechunk.storage.s3`."""

from __future__ import annotations

from urllib.parse import urlsplit

from icechunk.config import S3Options, StorageSettings
from icechunk.credentials import AnyS3Credential
from icechunk.runtime.clock import Sources
from icechunk.storage.port import GetResult, Range
from icechunk.storage.s3.storage import S3Storage
from icechunk.virtual_access.locations import key_of

__all__ = ["BucketFiles"]


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
