"""HTTP exchanges through a proxy, made by aiohttp."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from icechunk.storage.http.connections import BadAnswerError, NotConnectedError, Origin, Response

__all__ = ["ProxiedConnections", "is_proxied"]

_PROXIES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


def is_proxied() -> bool:
    """Whether the environment names a proxy."""
    return any(os.environ.get(name) for name in _PROXIES)


class ProxiedConnections:
    """Connections of one event loop, through the proxy that the environment names for each host."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=512, keepalive_timeout=15.0, ssl=tls or True),
            auto_decompress=False,
            skip_auto_headers=("Content-Type", "Accept-Encoding", "User-Agent"),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=True,
            requote_redirect_url=False,
        )
        # aiohttp repeats idempotent requests where a kept connection turns out to be closed; one try is one request.
        self._session._retry_connection = False

    async def exchange(
        self,
        origin: Origin,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | memoryview = b"",
        *,
        connect_s: float,
        read_s: float,
        total_s: float | None = None,
    ) -> Response:
        """As `icechunk.storage.http.connections.Connections.exchange`."""
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        try:
            async with self._session.request(
                method,
                URL(f"{origin.scheme}://{host}:{origin.port}{target}", encoded=True),
                headers=headers,
                data=bytes(body) if body else None,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=total_s, sock_connect=connect_s, sock_read=read_s),
            ) as response:
                data = await response.read()
                expected = response.headers.get("Content-Length")
                if expected is not None and method != "HEAD" and len(data) != int(expected):
                    raise BadAnswerError(f"{len(data)} bytes came instead of {expected}")
                return Response(response.status, CIMultiDict(response.headers), data)
        except aiohttp.ClientConnectorCertificateError as error:
            raise NotConnectedError(str(error)) from error.certificate_error
        except aiohttp.ClientConnectorError as error:
            raise NotConnectedError(str(error)) from error.os_error
        except aiohttp.ConnectionTimeoutError as error:
            raise NotConnectedError(str(error)) from error
        except aiohttp.ClientError as error:
            raise BadAnswerError(f"{type(error).__name__}: {error}") from error

    async def aclose(self) -> None:
        """Close all connections."""
        await self._session.close()
