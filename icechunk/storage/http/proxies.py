"""The proxy of the requests to an origin, by the environment or an option.

The variables are those of urllib, botocore and aiohttp: ``http_proxy`` and ``https_proxy`` by the scheme of the
request, ``no_proxy`` for the hosts that are reached directly (on macOS and Windows, the settings of the system too).
``all_proxy`` is ignored, as these libraries ignore it.
"""

from __future__ import annotations

import base64
from dataclasses import field
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import redacted_url

__all__ = ["Proxies", "Proxy", "ProxyError"]


class ProxyError(ConnectionError):
    """The proxy cannot be used: nothing was sent to the server behind it."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy."""

    scheme: str
    """Scheme of the connection to it: ``http`` or ``https``."""
    host: str
    port: int
    named: str
    """URL without secrets, and where it comes from; for messages."""
    headers: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Headers that the proxy requires with each of its requests."""


class Proxies:
    """The proxy of each scheme and host.

    Parameters
    ----------
    url
        URL of the proxy of all requests; None: the environment decides, as it is now.
    """

    def __init__(self, url: str | None = None) -> None:
        self._url = url
        self._found = {} if url is not None else getproxies()

    def proxy_for(self, scheme: str, host: str, port: int) -> Proxy | None:
        """The proxy of requests to an origin; None if they go directly.

        Raises
        ------
        ProxyError
            The value is not the URL of an ``http://`` or ``https://`` proxy.
        """
        if self._url is not None:
            return _parsed(self._url, "proxy_url")
        url = self._found.get(scheme)
        if not url or proxy_bypass(host) or proxy_bypass(f"{host}:{port}"):
            return None
        return _parsed(url, f"{scheme}_proxy")


def _parsed(url: str, source: str) -> Proxy:
    whole = url if "://" in url else f"http://{url.removeprefix('//')}"
    named = f"{redacted_url(whole)} ({source})"
    try:
        parts = urlsplit(whole)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ProxyError(f"the proxy {named} is no URL") from error
    if parts.scheme not in ("http", "https") or not host:
        raise ProxyError(f"the proxy {named} cannot be used: only http:// and https:// proxies can")
    headers = {}
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["proxy-authorization"] = f"Basic {base64.b64encode(secret).decode()}"
    return Proxy(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), named, headers)
