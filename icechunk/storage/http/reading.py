"""Reading files from web servers: redirects, ranges, tries, and what the answers mean.

Options of the HTTP client, by the official names, and what they make of a reader of web servers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Final

import aiohttp
from yarl import URL

from icechunk.config import StorageSettings, StorageTimeoutSettings
from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.runtime.clock import Sources
from icechunk.runtime.representation import redacted_url
from icechunk.storage.http.headers import range_header, result_of
from icechunk.storage.port import ByteRange, GetResult, Range, Suffix, resolve_range
from icechunk.storage.retry import Limits, Tries, limits_of

__all__ = ["MOST_REDIRECTS", "REDIRECTS", "HttpReader", "check_options", "reader_maker"]

REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
MOST_REDIRECTS: Final = 10
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_TRANSIENT: Final = frozenset({408, 425, 429, 499, 500, 502, 503, 504})


class HttpReader:
    """Connections to web servers, on one event loop.

    Parameters
    ----------
    headers
        Sent with every request to the server that was asked; a redirect to another one goes without them.
    limits
        Tries and timeouts.
    serves_ranges
        Refuse servers that send a whole file where a range was asked for; else the range is cut out here.
    proxy
        URL of a proxy; None: as the environment says.
    tls
        False: take any certificate.
    """

    def __init__(
        self,
        headers: Mapping[str, str],
        limits: Limits,
        sources: Sources,
        *,
        serves_ranges: bool,
        proxy: str | None = None,
        tls: bool = True,
    ) -> None:
        self._headers = dict(headers)
        self._limits = limits
        self._sources = sources
        self._serves_ranges = serves_ranges
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=tls),
            timeout=_timeout(limits),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=True,
            proxy=proxy,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def get(self, url: URL, wanted: ByteRange, *, method: str = "GET") -> GetResult:
        """Bytes of a file, clamped to its size; with ``method`` ``HEAD`` none, but all else.

        Raises
        ------
        ObjectNotFoundError
            404 or 410.
        InvalidInputError
            The range begins beyond the file's end (kind ``invalid-byte-range``).
        StorageError
            Anything else, after the tries that the settings allow.
        """
        shown = redacted_url(str(url))
        tries = Tries(self._limits, self._sources)
        while True:
            try:
                found = await self._try(url, shown, wanted, method, tries.limits)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                if isinstance(error, aiohttp.ClientConnectorCertificateError):
                    raise StorageError(
                        f"cannot read {shown!r}: {error}; where the server's certificate is to be trusted, let "
                        "SSL_CERT_FILE name a file with that of its authority before the process starts",
                        ErrorKind.OBJECT_STORE,
                    ) from error
                if isinstance(error, aiohttp.InvalidURL | aiohttp.ClientSSLError):
                    raise StorageError(f"cannot read {shown!r}: {error}", ErrorKind.OBJECT_STORE) from error
                failure = StorageError(f"cannot read {shown!r}: {error!r}{tries}", ErrorKind.OBJECT_STORE)
                failure.__cause__ = error
            else:
                if isinstance(found, GetResult):
                    return found
                failure = StorageError(f"cannot read {shown!r}: {found}{tries}", ErrorKind.OBJECT_STORE)
            if not await tries.again():
                raise failure

    async def location(self, url: URL, limits: Limits) -> str | None:
        """Where one GET is redirected to, as the server wrote it; None: it is not. Raises aiohttp's errors."""
        async with self._session.get(
            url, headers=self._headers, allow_redirects=False, timeout=_timeout(limits)
        ) as response:
            return response.headers.get("Location") if response.status in REDIRECTS else None

    async def _try(self, url: URL, shown: str, wanted: ByteRange, method: str, limits: Limits) -> GetResult | str:
        """One request with its redirects: the bytes, or why to try again."""
        origin = url.origin()
        for _ in range(MOST_REDIRECTS):
            headers = {"accept-encoding": "identity", **range_header(wanted)}
            if url.origin() == origin:
                headers = {**self._headers, **headers}
            async with self._session.request(
                method, url, headers=headers, allow_redirects=False, timeout=_timeout(limits)
            ) as response:
                if response.status in REDIRECTS and "Location" in response.headers:
                    onward = url.join(URL(response.headers["Location"]))
                    if onward.scheme not in ("http", "https") or (url.scheme, onward.scheme) == ("https", "http"):
                        raise StorageError(
                            f"cannot read {shown!r}: the server redirects to {onward.scheme}:", ErrorKind.BAD_REDIRECT
                        )
                    url = onward
                    continue
                if response.status in _TRANSIENT:
                    return f"the server answered {response.status}"
                return await self._result(response, shown, wanted, method)
        raise StorageError(f"cannot read {shown!r}: more than {MOST_REDIRECTS} redirects", ErrorKind.BAD_REDIRECT)

    async def _result(
        self, response: aiohttp.ClientResponse, shown: str, wanted: ByteRange, method: str
    ) -> GetResult | str:
        headers = response.headers
        status = response.status
        if status in (404, 410):
            raise ObjectNotFoundError(f"there is nothing at {shown!r} ({status})")
        if status in (401, 403):
            raise StorageError(
                f"cannot read {shown!r}: the server answered {status}; check the headers that it is sent. Some servers "
                "say so of files that do not exist: let this one answer 404 for these",
                ErrorKind.OBJECT_STORE,
            )
        match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if status == 416:
            if isinstance(wanted, Suffix) and match is not None and match[3] == "0":
                return result_of(headers, b"", 0)
            start = wanted.start if isinstance(wanted, Range) else 0
            raise InvalidInputError(f"{shown!r} has no bytes from {start} on", ErrorKind.INVALID_BYTE_RANGE)
        if status == 200 and (wanted is None or not self._serves_ranges):
            if method == "HEAD":
                return result_of(headers, b"", int(headers.get("Content-Length", "0")))
            data = await response.read()
            expected = headers.get("Content-Length")
            if expected is not None and len(data) != int(expected):
                return f"{len(data)} bytes came instead of {expected}"
            start, stop = resolve_range(wanted, len(data), shown)
            return result_of(headers, data[start:stop], len(data))
        if status == 200:
            raise StorageError(
                f"cannot read {shown!r}: the server does not serve ranges of files; use another server, or copy the "
                "file",
                ErrorKind.OBJECT_STORE,
            )
        if status != 206 or match is None or match[1] is None or not _begins_there(wanted, match):
            raise StorageError(
                f"cannot read {shown!r}: the server answered {status} (Content-Range: {headers.get('Content-Range')})",
                ErrorKind.OBJECT_STORE,
            )
        expected_bytes = int(match[2]) - int(match[1]) + 1
        most = wanted.end - wanted.start if isinstance(wanted, Range) and wanted.end is not None else None
        if most is not None and expected_bytes > most:
            raise StorageError(f"cannot read {shown!r}: more came than was asked for", ErrorKind.OBJECT_STORE)
        data = await response.read()
        if len(data) != expected_bytes:
            return f"{len(data)} bytes came instead of {expected_bytes}"
        return result_of(headers, data, int(match[3]))


def _begins_there(wanted: ByteRange, match: re.Match[str]) -> bool:
    match wanted:
        case Range(start, _):
            return int(match[1]) == start
        case Suffix(length):
            return int(match[1]) == max(0, int(match[3]) - length)
    return False


def _timeout(limits: Limits) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=limits.attempt_s, sock_connect=limits.connect_s, sock_read=limits.read_s)


_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|h)?")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, None: 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_USED: Final = (
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "proxy_url",
    "read_timeout",
    "timeout",
    "user_agent",
)
# Options of the official library's HTTP client that tune it, and mean nothing to ours.
_IGNORED: Final = frozenset(
    {
        "default_content_type",
        "http1_only",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "http2_keep_alive_while_idle",
        "http2_max_frame_size",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "randomize_addresses",
    }
)


def check_options(options: Mapping[str, str]) -> None:
    """Refuse names that are none of the options', in lower case.

    Raises
    ------
    InvalidInputError
        Kind ``storage-config``.
    """
    unknown = sorted(set(options) - set(_USED) - _IGNORED)
    if unknown:
        raise InvalidInputError(
            f"unknown options {unknown} of a web server; there are {list(_USED)}", ErrorKind.STORAGE_CONFIG
        )


def reader_maker(
    options: Mapping[str, str],
    headers: Mapping[str, str],
    settings: StorageSettings | None,
    sources: Sources,
    *,
    serves_ranges: bool,
) -> Callable[[], HttpReader]:
    """What makes a reader, on the event loop that it is called on.

    Parameters
    ----------
    options
        As `check_options` accepts them; timeouts that the settings have come before those here.
    headers, settings, sources, serves_ranges
        As `HttpReader` and `limits_of` take them.

    Raises
    ------
    InvalidInputError
        A timeout that is none (kind ``storage-config``).
    """
    sent = dict(headers)
    if "user_agent" in options and not any(name.lower() == "user-agent" for name in sent):
        sent["user-agent"] = options["user_agent"]
    return partial(
        HttpReader,
        sent,
        _limits(settings, options),
        sources,
        serves_ranges=serves_ranges,
        proxy=options.get("proxy_url"),
        tls=options.get("allow_invalid_certificates", "false").lower() != "true",
    )


def _limits(settings: StorageSettings | None, options: Mapping[str, str]) -> Limits:
    found = limits_of(settings)
    given = (None if settings is None else settings.timeouts) or StorageTimeoutSettings()
    connect_s = _seconds(options, "connect_timeout") if given.connect_timeout_ms is None else None
    read_s = _seconds(options, "read_timeout") if given.read_timeout_ms is None else None
    attempt_s = _seconds(options, "timeout") if given.operation_attempt_timeout_ms is None else None
    return replace(
        found,
        connect_s=connect_s or found.connect_s,
        read_s=read_s or found.read_s,
        attempt_s=found.attempt_s if attempt_s is None else attempt_s,
    )


def _seconds(options: Mapping[str, str], name: str) -> float | None:
    if name not in options:
        return None
    match = _DURATION.fullmatch(options[name].strip())
    if match is None:
        raise InvalidInputError(
            f"bad option {name}={options[name]!r}: durations are like 30s, 500ms or 2m", ErrorKind.STORAGE_CONFIG
        )
    return float(match[1]) * _SECONDS[match[2]]
