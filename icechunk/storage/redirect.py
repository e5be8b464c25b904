"""A storage whose location a web server gives, by a redirect.

The server's answer is a redirect to ``s3://bucket/prefix?region=…``, ``gs://bucket/prefix``,
``r2://bucket/prefix?account_id=…``, ``tigris://bucket/prefix[?region=…]``, ``http+icechunk://host/path`` or
``https+icechunk://host/path``; redirects to ``http:`` and ``https:`` on the way are followed. The target is read only,
and without credentials: a server that chooses the target must not get the user's keys sent there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from icechunk.config import S3Options, StorageSettings
from icechunk.credentials import GcsCredentials, S3Credentials
from icechunk.errors import ErrorKind, IcechunkError, StorageError
from icechunk.runtime.clock import SYSTEM
from icechunk.runtime.pickles import call_of
from icechunk.runtime.representation import redacted_url
from icechunk.storage.http.reading import HttpReader
from icechunk.storage.http.storage import HttpStorage
from icechunk.storage.http.urls import parse_url
from icechunk.storage.obstore.buckets import GcsBucket
from icechunk.storage.obstore.storage import ObstoreStorage
from icechunk.storage.port import ByteRange, GetResult, ObjectInfo, ReadOnlyStorage, Storage
from icechunk.storage.presets import r2_options, tigris_options
from icechunk.storage.retry import limits_of
from icechunk.storage.s3.storage import S3Storage
from icechunk.storage.settings import object_store_settings

__all__ = ["RedirectStorage", "storage_of_url"]


class RedirectStorage(ReadOnlyStorage):
    """A storage that is looked for at first use, once for each process.

    Parameters
    ----------
    base_url
        Where to ask, ``http:`` or ``https:``.
    settings
        Tries and timeouts.
    user_agent
        What requests to the storage that is found name themselves; None: as they do by themselves.
    """

    def __init__(self, base_url: str, settings: StorageSettings | None = None, user_agent: str | None = None) -> None:
        parse_url(base_url)
        self._base_url = base_url
        self._settings = settings
        self._user_agent = user_agent
        self._found: Storage | None = None

    async def target(self) -> Storage:
        """The storage that the server names.

        Raises
        ------
        StorageError
            It does not answer, redirects nowhere, or to something that is no storage (kind ``bad-redirect``).
        """
        # Two first callers at the same time send two requests, with the same answer.
        if self._found is None:
            url = await _follow(self._base_url, self._settings)
            found = storage_of_url(url, asked=self._base_url).with_settings(self._settings)
            self._found = found if self._user_agent is None else found.with_user_agent(self._user_agent)
        return self._found

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        return await (await self.target()).get(key, byte_range)

    async def head(self, key: str) -> ObjectInfo:
        return await (await self.target()).head(key)

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        target = await self.target()
        async for page in target.list_pages(prefix, start_after=start_after, page_size=page_size):
            yield page

    async def aclose(self) -> None:
        if self._found is not None:
            await self._found.aclose()

    def with_settings(self, settings: StorageSettings | None) -> Storage:
        return RedirectStorage(self._base_url, settings, self._user_agent)

    def with_user_agent(self, user_agent: str) -> Storage:
        return RedirectStorage(self._base_url, self._settings, user_agent)

    def default_settings(self) -> StorageSettings:
        return object_store_settings()

    def describe(self) -> str:
        found = "" if self._found is None else f" ({self._found.describe()})"
        return f"{redacted_url(self._base_url)}{found}"

    def __repr__(self) -> str:
        return f"<icechunk.Storage>\ntype: redirect\nurl: {redacted_url(self._base_url)}\n"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RedirectStorage):
            return NotImplemented
        return self._base_url == other._base_url

    def __hash__(self) -> int:
        return hash((RedirectStorage, self._base_url))

    def __reduce__(self) -> tuple[Any, ...]:
        return call_of(RedirectStorage, self._base_url, self._settings, self._user_agent)


async def _follow(base_url: str, settings: StorageSettings | None) -> str:
    """The first URL on the way that is none of the web."""
    shown = redacted_url(base_url)
    reader = HttpReader({}, limits_of(settings), SYSTEM, serves_ranges=False)
    try:
        found = await reader.redirected(base_url)
    except IcechunkError as error:
        raise StorageError(
            f"cannot find the storage that {shown!r} redirects to: {error.message}", ErrorKind.BAD_REDIRECT
        ) from error
    finally:
        await reader.aclose()
    if found is None:
        raise StorageError(
            f"cannot find the storage that {shown!r} redirects to: the answer is no redirect", ErrorKind.BAD_REDIRECT
        )
    return found


def storage_of_url(url: str, *, asked: str) -> Storage:
    """The storage that a redirect names; see the module for the URLs.

    Raises
    ------
    StorageError
        Not such a URL (kind ``bad-redirect``).
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    bucket, prefix = parts.netloc, unquote(parts.path).strip("/")
    anonymous = S3Credentials.Anonymous()

    def needed(name: str) -> str:
        if not options.get(name):
            raise StorageError(
                f"{redacted_url(asked)!r} redirects to {parts.scheme}://{bucket}/{prefix} without the query parameter "
                f"{name}, which such a URL needs",
                ErrorKind.BAD_REDIRECT,
            )
        return options[name]

    match parts.scheme:
        case "s3":
            return S3Storage(bucket, prefix, options=S3Options(region=needed("region")), credentials=anonymous)
        case "r2":
            r2 = r2_options(S3Options(region=options.get("region")), needed("account_id"))
            return S3Storage(bucket, prefix, options=r2, credentials=anonymous)
        case "tigris":
            tigris = tigris_options(S3Options(region=options.get("region", "auto")))
            return S3Storage(bucket, prefix, options=tigris, credentials=anonymous)
        case "gs" | "gcs":
            return ObstoreStorage(GcsBucket(bucket, prefix, credentials=GcsCredentials.Anonymous()))
        case "http+icechunk" | "https+icechunk":
            return HttpStorage(parts._replace(scheme=parts.scheme.partition("+")[0]).geturl())
    raise StorageError(
        f"{redacted_url(asked)!r} redirects to a {parts.scheme}: URL, which is not supported as a target: "
        "there are s3, gs, r2, tigris, http+icechunk and https+icechunk",
        ErrorKind.BAD_REDIRECT,
    )
