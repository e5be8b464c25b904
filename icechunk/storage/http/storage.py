"""Repositories on web servers: files below a URL, read only, and not listed.

A web server has no listing that could be relied on, so `HttpStorage.list_pages` raises `ListingUnsupportedError`; what
opens repositories goes from file to file instead.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final
from urllib.parse import quote

from icechunk.config import StorageSettings
from icechunk.errors import AccessDeniedError, ErrorKind, ObjectNotFoundError, StorageError
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.runtime.loops import PerLoop
from icechunk.runtime.pickles import call_of
from icechunk.runtime.representation import redacted_url
from icechunk.storage.http.options import check_options, reader_maker
from icechunk.storage.http.reading import HttpReader
from icechunk.storage.http.urls import parse_url
from icechunk.storage.port import (
    ByteRange,
    GetResult,
    ListingUnsupportedError,
    ObjectInfo,
    ReadOnlyStorage,
    Storage,
    check_key,
    check_range,
)
from icechunk.storage.settings import object_store_settings

__all__ = ["HttpStorage"]

_SAFE: Final = "/~!$&'()*+,;=:@-._"


class HttpStorage(ReadOnlyStorage):
    """A storage below a URL.

    Parameters
    ----------
    base_url
        The repository's root, ``http:`` or ``https:``; a query is sent with every request.
    options
        Of the HTTP client, by the official names: ``timeout``, ``connect_timeout``, ``read_timeout`` (``30s``,
        ``500ms``, ``2m``), ``allow_http``, ``allow_invalid_certificates``, ``proxy_url``, ``user_agent``; others that
        only tune the official client are ignored.
    headers
        Sent with every request to that server.
    settings
        Tries and timeouts.

    Raises
    ------
    InvalidInputError
        No such URL, or an option that is none.
    """

    def __init__(
        self,
        base_url: str,
        options: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        settings: StorageSettings | None = None,
        sources: Sources = SYSTEM,
    ) -> None:
        self._options = {name.lower(): value for name, value in (options or {}).items()}
        self._headers = dict(headers or {})
        self._base_url = base_url
        self._folder, self._query = _checked_url(base_url, self._options)
        self._sources = sources
        self._settings = copy.deepcopy(settings)
        self._readers: PerLoop[HttpReader] = PerLoop(
            reader_maker(self._options, self._headers, settings, sources, serves_ranges=False), HttpReader.aclose
        )

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        check_range(byte_range)
        return await self._read(key, byte_range, "GET")

    async def head(self, key: str) -> ObjectInfo:
        found = await self._read(key, None, "HEAD")
        return ObjectInfo(key=key, size=found.size, version=found.version, modified_us=found.modified_us)

    async def _read(self, key: str, byte_range: ByteRange, method: str) -> GetResult:
        check_key(key)
        reader = self._readers.peek() or await self._readers.get()
        url = f"{self._folder}/{quote(key, safe=_SAFE)}{self._query}"
        try:
            return await reader.get(url, byte_range, method=method)
        except ObjectNotFoundError as error:
            raise ObjectNotFoundError(f"no object {key!r} in {self.describe()}") from error
        except AccessDeniedError as error:
            error.key = key
            raise

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        raise ListingUnsupportedError(
            f"cannot list the objects in {self.describe()}: web servers have no listings; run operations that "
            "need one on the storage behind the server",
            ErrorKind.UNIMPLEMENTED,
        )
        yield []

    async def aclose(self) -> None:
        await self._readers.aclose()

    def with_settings(self, settings: StorageSettings | None) -> Storage:
        return HttpStorage(self._base_url, self._options, self._headers, settings=settings, sources=self._sources)

    def with_user_agent(self, user_agent: str) -> Storage:
        # A header or option of the caller takes precedence.
        options = {"user_agent": user_agent, **self._options}
        return HttpStorage(self._base_url, options, self._headers, settings=self._settings, sources=self._sources)

    def default_settings(self) -> StorageSettings:
        return object_store_settings()

    def describe(self) -> str:
        return redacted_url(self._base_url)

    def __repr__(self) -> str:
        return f"<icechunk.Storage>\ntype: HTTP\nurl: {self.describe()}\n"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HttpStorage):
            return NotImplemented
        return self._base_url == other._base_url

    def __hash__(self) -> int:
        return hash((HttpStorage, self._base_url))

    def __reduce__(self) -> tuple[Any, ...]:
        return call_of(_unpickled, self._base_url, self._options, self._headers, self._settings)


def _unpickled(
    base_url: str, options: dict[str, str], headers: dict[str, str], settings: StorageSettings | None
) -> Storage:
    return HttpStorage(base_url, options, headers, settings=settings)


def _checked_url(base_url: str, options: Mapping[str, str]) -> tuple[str, str]:
    """The common start of the URLs of all objects, and their query, beginning with ``?``."""
    parsed = parse_url(base_url)
    check_options(options)
    if parsed.scheme == "http" and options.get("allow_http", "true").lower() == "false":
        raise StorageError(
            f"the repository {redacted_url(base_url)!r} is on plain http, which allow_http forbids; use https",
            ErrorKind.STORAGE_CONFIG,
        )
    folder, question, query = base_url.partition("#")[0].partition("?")
    return folder.rstrip("/"), question + query
