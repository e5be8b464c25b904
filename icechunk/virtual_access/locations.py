"""Interpretation of the locations of virtual chunks: pure functions of their text.

A location is a URL. As in the official library it is kept as it was given, but for the scheme's case and, in ``file:``
URLs, for dot segments; ``vcc://name/rest`` is relative to the container called ``name``. Which container a location
belongs to is decided on its *resolved* form: absolute, without dot segments. The request to a back end has the
percent-decoded path, and decoding must not bring dot segments back: ``..%2f`` is refused, so that no reference leaves
the prefix that its reader has authorised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from operator import lt
from typing import Final
from urllib.parse import unquote

import numpy as np

from icechunk.config import VirtualChunkContainer
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.representation import redacted_url

__all__ = ["RELATIVE", "Prefixes", "checked_location", "key_of", "require_no_way_out", "stored_location"]

RELATIVE: Final = "vcc://"
_BATCH: Final = 1024
"""Locations that are looked at together: their text, some tens of KiB, stays in the cache of one processor. Pieces of
memory of more than 128 KiB are returned to the system at once, and getting them again takes longer than looking."""

_URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//([^/?#]*))?([^?#]*)(.*)", re.DOTALL)
# Nearly every location: nothing in it that would have to be resolved.
_ORDINARY: Final = re.compile(
    r"(?!file:|vcc:)[a-z][a-z0-9+-]*://[^/?#%\\\0-\x1f\x7f]+(?:/[^/.?#%\\\0-\x1f\x7f][^/?#%\\\0-\x1f\x7f]*)+"
)
# Parsers of URLs drop some of these, and so read another path than the one that was checked.
_CONTROL: Final = re.compile(r"[\0-\x1f\x7f]")
_PLAIN_PREFIX: Final = re.compile(r"file:///|(?!file:|vcc:)[a-z][a-z0-9+-]*://[^/?#%\\]+/")
_DOTS: Final = frozenset({".", "..", "%2e", ".%2e", "%2e.", "%2e%2e"})


def stored_location(location: str) -> str:
    """The location as a manifest keeps it.

    Raises
    ------
    InvalidInputError
        Kind ``invalid-virtual-ref``: no URL, or one without the bucket or host that it needs. Kind
        ``no-container-for-virtual-chunk``: relative to a container without a name.
    """
    if _ORDINARY.fullmatch(location):
        return location
    scheme, authority, path, rest = _split(location)
    if scheme == "vcc":
        if not authority:
            raise InvalidInputError(
                f"bad virtual chunk location {location!r}: write vcc://name/path, with a container's name",
                ErrorKind.NO_CONTAINER_FOR_VIRTUAL_CHUNK,
            )
        return f"vcc://{authority}{path}{rest}"
    if scheme == "file":
        path = _without_dots(path if path.startswith("/") else "/" + path)
        if "//" in path:
            raise _bad(location, "a file's path has no empty segments")
        return f"file://{_file_host(authority, location)}{path}{rest}"
    if not authority:
        raise _bad(location, "a bucket or host is missing")
    return f"{scheme}://{authority}{path}{rest}"


def checked_location(location: object) -> str:
    """`stored_location` of a caller's argument. Raises `TypeError` too, if that is no string."""
    if not isinstance(location, str):
        raise TypeError(f"the location of a virtual chunk must be a str, not {type(location).__name__}")
    return stored_location(location)


def key_of(location: str) -> str:
    """The decoded path of a resolved location, without its first ``/``: an object's key, or a file's path.

    Raises
    ------
    InvalidInputError
        Kind ``invalid-virtual-ref``: nothing there, or decoding brought dot segments or NUL.
    """
    if _ORDINARY.fullmatch(location):
        return location.split("/", 3)[3]
    path = unquote(_split(location)[2]).removeprefix("/")
    if not path or "\0" in path or any(segment in (".", "..") for segment in path.split("/")):
        raise _bad(location, "its decoded path is empty, or has '.' or '..' segments or NUL")
    return path


def require_no_way_out(location: str) -> None:
    """Refuse a location whose path a web server could decode, in any way, to a path outside of the prefix.

    Raises
    ------
    InvalidInputError
        Kind ``invalid-virtual-ref``.
    """
    path = key_of(location)
    if "\\" in path and any(segment in (".", "..") for segment in path.replace("\\", "/").split("/")):
        raise _bad(location, "its decoded path has '.' or '..' segments where backslashes are slashes")


class Prefixes:
    """The containers of a configuration, by the prefix of their locations.

    Parameters
    ----------
    containers
        Of no particular order.
    """

    def __init__(self, containers: Iterable[VirtualChunkContainer]) -> None:
        found = list(containers)
        self._by_length = sorted(found, key=lambda container: -len(container.url_prefix))
        self._starts = tuple(c.url_prefix for c in found if _PLAIN_PREFIX.match(c.url_prefix))
        # Of prefixes that contain others, the outermost: each location begins with one of them at most.
        starts = set(self._starts)
        self._roots = [r.encode() for r in starts if r.isascii() and not r.startswith(tuple(starts - {r}))]
        self._by_name: Mapping[str, VirtualChunkContainer] = {c.name: c for c in found if c.name is not None}

    def absolute(self, location: str) -> str:
        """The location as a URL of its own. Raises `InvalidInputError` where it is relative to an unknown container."""
        if not location.startswith(RELATIVE):
            return location
        name, slash, rest = location[len(RELATIVE) :].partition("/")
        container = self._by_name.get(name)
        if container is None or not slash:
            raise InvalidInputError(
                f"no virtual chunk container is called {name!r} ({location!r}): add one to the repository's "
                "configuration, with RepositoryConfig.set_virtual_chunk_container",
                ErrorKind.NO_CONTAINER_FOR_VIRTUAL_CHUNK,
            )
        return container.url_prefix + rest

    def resolve(self, location: str) -> tuple[str, VirtualChunkContainer]:
        """The resolved location and the container that it belongs to, the one with the longest prefix.

        Raises
        ------
        InvalidInputError
            It belongs to none (kind ``no-container-for-virtual-chunk``), or is no URL (``invalid-virtual-ref``).
        """
        resolved = self.absolute(location)
        if not _ORDINARY.fullmatch(resolved):
            scheme, authority, path, rest = _split(resolved)
            if scheme == "file":
                authority = _file_host(authority, location)
            resolved = f"{scheme}://{authority}{_without_dots(path)}{rest}"
        for container in self._by_length:
            if resolved.startswith(container.url_prefix):
                return resolved, container
        raise InvalidInputError(
            f"no virtual chunk container can handle the chunk location ({redacted_url(resolved)}), edit the repository "
            "configuration: add one with RepositoryConfig.set_virtual_chunk_container, and authorize it when opening",
            ErrorKind.NO_CONTAINER_FOR_VIRTUAL_CHUNK,
        )

    def is_plain(self, location: str) -> bool:
        """Whether a location is certainly stored unchanged and held by a container; a fast check for millions of
        them."""
        return (
            location.startswith(self._starts)
            and "/." not in location
            and "/%" not in location
            and location.find("//", 8) < 0
            and location.isprintable()
        )

    def all_plain(self, locations: Sequence[str]) -> bool:
        """Whether `is_plain` holds for each of them; False also where that takes longer to find out."""
        return bool(self._roots) and all(
            self._batch_is_plain(locations[i : i + _BATCH]) for i in range(0, len(locations), _BATCH)
        )

    def all_plain_and_ascending(self, locations: Sequence[str]) -> bool:
        """Whether there are some, each is greater than the one before it, and `all_plain`.

        Both are found in one pass, since millions of texts are in no cache when the next pass begins.
        """
        if not self._roots or not len(locations):
            return False
        for i in range(0, len(locations), _BATCH):
            # With the first one of the next batch, which is compared only.
            batch = locations[i : i + _BATCH + 1]
            if not all(map(lt, batch, islice(batch, 1, None))) or not self._batch_is_plain(batch[:_BATCH]):
                return False
        return True

    def _batch_is_plain(self, locations: Sequence[str]) -> bool:
        text = "\n".join(locations)
        if not text.isascii():
            return False
        data = text.encode()
        octets = np.frombuffer(data, np.uint8)
        # Bytes below 0x20 become large numbers, and so does 0x7F: only the ends of lines may be among them.
        if np.count_nonzero(octets - np.uint8(0x20) >= 0x5F) != len(locations) - 1:
            return False
        starts, doubled = 0, 0
        for root in self._roots:
            count = data.count(b"\n" + root) + data.startswith(root)
            starts += count
            doubled += count * sum(root.startswith(b"//", i) for i in range(8))
        # "/" and "." differ in the last bit only. All "//" must be those of the roots, which hold no "/.".
        followed = (octets[:-1] == 0x2F) & (octets[1:] | np.uint8(1) == 0x2F)
        return (
            starts == len(locations)
            and np.count_nonzero(followed) == doubled
            and (b"%" not in data or b"/%" not in data)
        )

    def holds(self, location: str) -> bool:
        """Whether a stored location belongs to some container; a relative one only has to name one."""
        if location.startswith(RELATIVE):
            name, slash, _ = location[len(RELATIVE) :].partition("/")
            return bool(slash) and name in self._by_name
        try:
            self.resolve(location)
        except InvalidInputError:
            return False
        return True


def _split(location: str) -> tuple[str, str, str, str]:
    """Scheme in lower case, authority, path, and the rest with its ``?`` or ``#``."""
    if _CONTROL.search(location):
        raise _bad(location, "it has control characters; write them as %09, where they belong to a name")
    match = _URL.fullmatch(location)
    if match is None:
        raise _bad(location, "it is no absolute URL, such as s3://bucket/key or file:///folder/file")
    scheme, _, authority, path, rest = match.groups()
    return scheme.lower(), authority or "", path, rest


def _without_dots(path: str) -> str:
    if "/." not in path and "/%2" not in path:
        return path
    kept: list[str] = []
    segments = path.split("/")
    for segment in segments[1:]:
        plain = segment.lower() in _DOTS
        if plain and segment.lower() not in (".", "%2e"):
            del kept[-1:]
        elif not plain:
            kept.append(segment)
    if segments[-1].lower() in _DOTS:
        kept.append("")
    return "/" + "/".join(kept)


def _file_host(authority: str, location: str) -> str:
    if authority.lower() not in ("", "localhost"):
        raise _bad(location, "files are read from this machine only: write file:///path")
    return ""


def _bad(location: str, reason: str) -> InvalidInputError:
    return InvalidInputError(
        f"error parsing virtual ref URL: {redacted_url(location)!r}: {reason}", ErrorKind.INVALID_VIRTUAL_REF
    )
