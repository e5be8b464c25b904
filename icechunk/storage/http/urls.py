"""URLs of web servers, and the form in which requests send them. No other module decides that form.

The query is sent byte for byte as it was given, and so are the percent-encodings of the path; every other character
that a request cannot hold is encoded. Control characters are refused: parsers disagree on whether they count, so a URL
with them may mean another place than the one that was checked.
"""

from __future__ import annotations

import base64
import re
from typing import Final
from urllib.parse import quote, unquote, urljoin

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import redacted_url
from icechunk.storage.http.connections import Origin

__all__ = ["WebUrl", "joined", "parse_url"]

_URL: Final = re.compile(
    r"(https?)://(?:([^/?#@\\]*)@)?(\[[0-9A-Fa-f:.]+(?:%[^/?#@\]\\]+)?\]|[^/?#:@\\\[\]% ]+)(?::([0-9]{0,5}))?"
    r"(/[^?#]*)?(\?[^#]*)?(?:#.*)?",
    re.IGNORECASE,
)
_CONTROL: Final = re.compile(r"[\0-\x1f\x7f]")
# All that a path or a query may hold, encodings of it included.
_TO_ENCODE: Final = re.compile(r"[^A-Za-z0-9\-._~!$&'()*+,;=:@/%]+|%(?![0-9A-Fa-f]{2})")
_TO_ENCODE_IN_A_QUERY: Final = re.compile(r"[^\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class WebUrl:
    """A URL of scheme ``http`` or ``https``, in the form that requests need."""

    scheme: str
    """Scheme in lower case."""
    host: str
    """A name in ASCII, or an address, without brackets."""
    port: int
    target: str
    """Path and query, encoded."""
    authorization: str | None
    """Value of the header ``authorization``, made of the user and password in the URL; None if it has none."""

    @property
    def origin(self) -> Origin:
        """The target of connections."""
        return Origin(self.scheme, self.host, self.port)

    @property
    def host_header(self) -> str:
        """The value of the header ``host``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host_header}{self.target}"


def parse_url(url: str) -> WebUrl:
    """Read a URL of the web.

    Raises
    ------
    InvalidInputError
        The text is not a URL of the web, or has control characters (kind ``cannot-parse-url``).
    """
    match = None if _CONTROL.search(url) else _URL.fullmatch(url)
    if match is None:
        raise _bad(url)
    scheme, user, host, port, path, query = match.groups()
    scheme = scheme.lower()
    try:
        name = host.strip("[]").encode("ascii" if host.isascii() else "idna").decode().lower()
        target = _TO_ENCODE.sub(lambda found: quote(found[0], safe=""), path or "/")
        target += _TO_ENCODE_IN_A_QUERY.sub(lambda found: quote(found[0], safe=""), query or "")
        number = int(port) if port else 443 if scheme == "https" else 80
        authorization = None if user is None else _basic(user)
    except UnicodeError as error:
        raise _bad(url) from error
    if not 0 < number < 65536:
        raise _bad(url)
    return WebUrl(scheme, name, number, target, authorization)


def joined(url: WebUrl, location: str) -> str:
    """The target of a redirect, as a URL of any scheme.

    Raises
    ------
    InvalidInputError
        ``location`` is not a URL, or has control characters (kind ``bad-redirect``).
    """
    try:
        if _CONTROL.search(location):
            raise ValueError("control characters")
        # Headers are read as Latin-1, and servers write UTF-8.
        return urljoin(str(url), location.encode("latin-1").decode("utf-8", "replace"))
    except ValueError as error:
        raise InvalidInputError(
            f"the server redirects to {redacted_url(location[:200])!r}, which is no URL", ErrorKind.BAD_REDIRECT
        ) from error


def _basic(user: str) -> str:
    name, _, password = user.partition(":")
    return f"Basic {base64.b64encode(f'{unquote(name)}:{unquote(password)}'.encode()).decode()}"


def _bad(url: str) -> InvalidInputError:
    return InvalidInputError(
        f"error parsing URL: {redacted_url(url)!r}: the URL of a web server begins with http:// or https:// and a "
        "host, and has no control characters",
        ErrorKind.CANNOT_PARSE_URL,
    )
