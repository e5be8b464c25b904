"""Virtual chunks on web servers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import aiohttp
from yarl import URL

from icechunk.config import StorageSettings
from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.sources import Sources
from icechunk.storage.base import GetResult, Range
from icechunk.storage.s3_answers import date_us, version_of
from icechunk.storage.s3_client import limits_of
from icechunk.values import redacted_url
from icechunk.virtual_access.locations import key_of

__all__ = ["WebFiles"]

_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS: Final = 10


class WebFiles:
    """Reads ranges of files by HTTP.

    Parameters
    ----------
    headers
        Sent with every request to the container's own server; a redirect to another one goes without them.
    settings
        Tries and timeouts.
    """

    def __init__(self, headers: Mapping[str, str], settings: StorageSettings | None, sources: Sources) -> None:
        self._headers = dict(headers)
        self._limits = limits_of(settings, None)
        self._sources = sources
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(
                total=self._limits.attempt_s, sock_connect=self._limits.connect_s, sock_read=self._limits.read_s
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=True,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def get(self, location: str, wanted: Range) -> GetResult:
        """As `Reader.get`; the server must know ranges."""
        # What a decoding server would make of the path has to stay below the prefix too.
        key_of(location)
        url = URL(location)
        shown = redacted_url(location)
        limits = self._limits
        tries = 0
        while True:
            tries += 1
            try:
                found = await self._try(url, shown, wanted)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                failure = StorageError(f"cannot read {shown!r}: {error!r} ({tries} tries)", ErrorKind.OBJECT_STORE)
                failure.__cause__ = error
            else:
                if isinstance(found, GetResult):
                    return found
                failure = StorageError(f"cannot read {shown!r}: {found} ({tries} tries)", ErrorKind.OBJECT_STORE)
            if tries >= limits.max_tries:
                raise failure
            ceiling_s = min(limits.max_backoff_s, limits.initial_backoff_s * 2.0 ** (tries - 1))
            await self._sources.sleep(ceiling_s * int.from_bytes(self._sources.random_bytes(4), "big") / 2**32)

    async def _try(self, url: URL, shown: str, wanted: Range) -> GetResult | str:
        """One request with its redirects: the bytes, or why to try again."""
        origin = url.origin()
        wish = f"bytes={wanted.start}-{'' if wanted.end is None else wanted.end - 1}"
        for _ in range(_MOST_REDIRECTS):
            headers = {"range": wish, "accept-encoding": "identity"}
            if url.origin() == origin:
                headers = {**self._headers, **headers}
            async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                if response.status in _REDIRECTS and "Location" in response.headers:
                    onward = url.join(URL(response.headers["Location"]))
                    if onward.scheme not in ("http", "https") or (url.scheme, onward.scheme) == ("https", "http"):
                        raise StorageError(
                            f"cannot read {shown!r}: the server redirects to {onward.scheme}:", ErrorKind.BAD_REDIRECT
                        )
                    url = onward
                    continue
                if response.status in _TRANSIENT:
                    return f"the server answered {response.status}"
                return await _result(response, shown, wanted)
        raise StorageError(f"cannot read {shown!r}: more than {_MOST_REDIRECTS} redirects", ErrorKind.BAD_REDIRECT)


async def _result(response: aiohttp.ClientResponse, shown: str, wanted: Range) -> GetResult | str:
    headers = response.headers
    if response.status in (404, 410):
        raise ObjectNotFoundError(f"there is nothing at {shown!r} ({response.status})")
    if response.status == 416:
        raise InvalidInputError(f"{shown!r} has no bytes from {wanted.start} on", ErrorKind.INVALID_BYTE_RANGE)
    if response.status == 200:
        raise StorageError(
            f"cannot read {shown!r}: the server does not serve ranges of files; use another server, or copy the file",
            ErrorKind.OBJECT_STORE,
        )
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if response.status != 206 or match is None or int(match[1]) != wanted.start:
        raise StorageError(
            f"cannot read {shown!r}: the server answered {response.status} "
            f"(Content-Range: {headers.get('Content-Range')})",
            ErrorKind.OBJECT_STORE,
        )
    expected = int(match[2]) - wanted.start + 1
    if wanted.end is not None and expected > wanted.end - wanted.start:
        raise StorageError(f"cannot read {shown!r}: more came than was asked for", ErrorKind.OBJECT_STORE)
    data = await response.read()
    if len(data) != expected:
        return f"{len(data)} bytes came instead of {expected}"
    return GetResult(
        data=data,
        size=int(match[3]),
        version=version_of(headers),
        modified_us=date_us(headers, "Last-Modified") or 0,
        date_us=date_us(headers),
    )
