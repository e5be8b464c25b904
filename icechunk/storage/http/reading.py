"""Reading files from web servers: redirects, ranges, tries, and the meaning of answers."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from typing import Final

from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.runtime.about import CLIENT_NAME
from icechunk.runtime.clock import Sources
from icechunk.runtime.representation import redacted_url
from icechunk.storage.http.connections import Connections, NotConnectedError, Response, TooLargeError
from icechunk.storage.http.headers import content_length, most_bytes, range_header, result_of, served_size
from icechunk.storage.http.proxies import Proxies
from icechunk.storage.http.urls import WebUrl, joined, parse_url
from icechunk.storage.port import ByteRange, GetResult, Range, Suffix, resolve_range
from icechunk.storage.retry import Limits, Tries
from icechunk.storage.rights import Right, Service, access_denied

__all__ = ["HttpReader"]

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS: Final = 10
_TRANSIENT: Final = frozenset({408, 425, 429, 499, 500, 502, 503, 504})


class HttpReader:
    """Connections to web servers, on one event loop.

    Parameters
    ----------
    headers
        Sent with every request to the server of the URL; requests that follow a redirect to another server go without
        them.
    limits
        Tries and timeouts.
    serves_ranges
        Refuse servers that answer with a whole file if a range was asked for; else the range is cut out here.
    proxy
        URL of a proxy; None: as the environment says.
    tls
        Makes the context of encrypted connections; None: the system's.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        limits: Limits,
        sources: Sources,
        *,
        serves_ranges: bool,
        proxy: str | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._headers = {"user-agent": CLIENT_NAME} | {name.lower(): value for name, value in headers.items()}
        self._limits = limits
        self._sources = sources
        self._serves_ranges = serves_ranges
        self._connections = Connections(tls, Proxies(proxy))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._connections.aclose()

    async def get(self, url: str, wanted: ByteRange = None, *, method: str = "GET") -> GetResult:
        """Bytes of a file, clamped to its size; with ``method`` ``HEAD`` none, but all else.

        Raises
        ------
        ObjectNotFoundError
            404 or 410.
        InvalidInputError
            The range begins beyond the file's end (kind ``invalid-byte-range``), or the URL is none.
        StorageError
            Anything else, after the tries that the settings allow.
        """
        asked = parse_url(url)
        shown = redacted_url(url)
        tries = Tries(self._limits, self._sources)
        while True:
            try:
                found = await self._try(asked, shown, wanted, method, tries.limits)
            except (NotConnectedError, OSError, TimeoutError) as error:
                cause = error.__cause__ or error if isinstance(error, NotConnectedError) else error
                if isinstance(cause, ssl.SSLError):
                    raise StorageError(
                        f"cannot read {shown!r}: {cause}; where the server's certificate is to be trusted, let "
                        "SSL_CERT_FILE name a file with that of its authority before the process starts",
                        ErrorKind.OBJECT_STORE,
                    ) from error
                failure = StorageError(f"cannot read {shown!r}: {cause!r}{tries}", ErrorKind.OBJECT_STORE)
                failure.__cause__ = error
                if isinstance(cause, TooLargeError):
                    raise failure from error
            else:
                if isinstance(found, GetResult):
                    return found
                failure = StorageError(f"cannot read {shown!r}: {found}{tries}", ErrorKind.OBJECT_STORE)
            if not await tries.again():
                raise failure

    async def redirected(self, url: str) -> str | None:
        """The first URL in a chain of redirects with a scheme other than ``http`` and ``https``; None without one.

        Raises
        ------
        StorageError
            Too many redirects, or to plain http from https (kind ``bad-redirect``); no answer.
        """
        shown = redacted_url(url)
        for _ in range(_MOST_REDIRECTS):
            asked = parse_url(url)
            tries = Tries(self._limits, self._sources)
            while True:
                try:
                    response = await self._exchange(asked, "GET", self._headers, tries.limits, most=0)
                    break
                except (NotConnectedError, OSError, TimeoutError) as error:
                    if not await tries.again(contacted=False):
                        raise StorageError(f"{error!r}{tries}", ErrorKind.BAD_REDIRECT) from error
            location = _location(response)
            if location is None:
                return None
            onward = joined(asked, location)
            if not _is_of_the_web(onward):
                return onward
            _require_no_downgrade(asked, onward, shown)
            url = onward
        raise _too_many(shown)

    async def _try(self, asked: WebUrl, shown: str, wanted: ByteRange, method: str, limits: Limits) -> GetResult | str:
        """One request with its redirects: the bytes, or why to try again."""
        url = asked
        for _ in range(_MOST_REDIRECTS):
            headers = range_header(wanted)
            if url.origin == asked.origin:
                headers = {**self._headers, **headers}
                if asked.authorization is not None:
                    headers.setdefault("authorization", asked.authorization)
            else:
                headers = {"user-agent": self._headers["user-agent"], **headers}
            response = await self._exchange(url, method, headers, limits, most=most_bytes(wanted))
            location = _location(response)
            if location is not None:
                onward = joined(url, location)
                if not _is_of_the_web(onward):
                    raise StorageError(
                        f"cannot read {shown!r}: the server redirects to {onward.partition(':')[0]}:",
                        ErrorKind.BAD_REDIRECT,
                    )
                _require_no_downgrade(url, onward, shown)
                url = parse_url(onward)
                continue
            if response.status in _TRANSIENT:
                return f"the server answered {response.status}"
            return self._result(response, shown, wanted, method)
        raise _too_many(shown)

    async def _exchange(
        self, url: WebUrl, method: str, headers: Mapping[str, str], limits: Limits, *, most: int | None
    ) -> Response:
        try:
            return await self._connections.exchange(
                url.origin,
                method,
                url.target,
                {"host": url.host_header, "accept": "*/*", "accept-encoding": "identity", **headers},
                connect_s=limits.connect_s,
                read_s=limits.read_s,
                total_s=limits.attempt_s,
                most_bytes=most,
                patience=limits.patience,
            )
        except ValueError as error:
            raise InvalidInputError(
                f"cannot ask for {redacted_url(str(url))!r}: {error}; check the headers and options of the web server",
                ErrorKind.STORAGE_CONFIG,
            ) from error

    def _result(self, response: Response, shown: str, wanted: ByteRange, method: str) -> GetResult:
        headers, status, data = response.headers, response.status, response.body
        if status in (404, 410):
            raise ObjectNotFoundError(f"there is nothing at {shown!r} ({status})")
        if status == 401:
            raise StorageError(
                f"cannot read {shown!r}: the server answered 401; check the headers in the storage's options",
                ErrorKind.OBJECT_STORE,
            )
        if status == 403:
            where = "the headers that the server is sent"
            raise access_denied(Service.WEB, Right.READ, shown, f"read {shown!r}", "HTTP 403", where)
        if status == 416:
            if isinstance(wanted, Suffix) and served_size(headers, wanted) == 0:
                return result_of(headers, b"", 0)
            start = wanted.start if isinstance(wanted, Range) else 0
            raise InvalidInputError(f"{shown!r} has no bytes from {start} on", ErrorKind.INVALID_BYTE_RANGE)
        if status == 200 and (wanted is None or not self._serves_ranges):
            if method == "HEAD":
                return result_of(headers, b"", content_length(headers) or 0)
            start, stop = resolve_range(wanted, len(data), shown)
            return result_of(headers, data[start:stop], len(data))
        if status == 200:
            raise StorageError(
                f"cannot read {shown!r}: the server does not serve ranges of files; use another server, or copy the "
                "file",
                ErrorKind.OBJECT_STORE,
            )
        size = served_size(headers, wanted, len(data)) if status == 206 else None
        if size is None:
            raise StorageError(
                f"cannot read {shown!r}: the server answered {status} with {len(data)} bytes (Content-Range: "
                f"{headers.get('Content-Range')}) where {range_header(wanted).get('range', 'all')} were asked for",
                ErrorKind.OBJECT_STORE,
            )
        return result_of(headers, data, size)


def _location(response: Response) -> str | None:
    return response.headers.get("Location") if response.status in _REDIRECTS else None


def _is_of_the_web(url: str) -> bool:
    return url.partition(":")[0].lower() in ("http", "https")


def _require_no_downgrade(url: WebUrl, onward: str, shown: str) -> None:
    if url.scheme == "https" and onward[:6].lower() != "https:":
        raise StorageError(f"cannot read {shown!r}: the server redirects from https to http", ErrorKind.BAD_REDIRECT)


def _too_many(shown: str) -> StorageError:
    return StorageError(f"cannot read {shown!r}: more than {_MOST_REDIRECTS} redirects", ErrorKind.BAD_REDIRECT)
