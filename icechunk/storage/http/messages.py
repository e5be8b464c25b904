"""The messages of HTTP/1.1, without I/O: the head of a request, and an answer as it comes in, cut anywhere.

The pieces of a small answer are joined once, when the last one has come. A large answer of known size is received into
its final place: see `Reading.rest`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from multidict import CIMultiDict

from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.buffers import Buffers

__all__ = ["LARGE_BYTES", "BadAnswerError", "Reading", "Response", "TooLargeError", "request_head"]

LARGE_BYTES: Final = 1024 * 1024
"""Answers of this size and above are received in place."""

_LARGEST_HEAD_BYTES: Final = 64 * 1024
_LARGEST_REFUSAL_BYTES: Final = 1024 * 1024
_LARGEST_UNTOLD_BYTES: Final = 4 * 1024 * 1024 * 1024
"""Bytes of a body whose size no header gives, at most."""
_LARGEST_WHOLE_BYTES: Final = 64 * 1024 * 1024
"""Bytes that a server may send instead of a smaller range that it ignores."""
_MOST_INTERIM: Final = 32
_STATUS_LINE: Final = re.compile(r"HTTP/1\.([01]) ([1-5][0-9]{2})(?: .*)?")
_HEADER: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):(.*)")
_NOT_IN_A_LINE: Final = re.compile(r"[\r\n\0]")
_NOT_IN_A_TARGET: Final = re.compile(r"[\0-\x20\x7f-\uffff]")
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")
_SINGLE: Final = ("content-length", "content-range", "transfer-encoding")
# No more than this is allocated because of a header alone.
_LARGEST_IN_PLACE_BYTES: Final = 256 * 1024 * 1024


class BadAnswerError(ConnectionError):
    """The answer is incomplete or malformed."""


class TooLargeError(BadAnswerError):
    """The answer is larger than the requested range."""


@dataclass(frozen=True, slots=True)
class Response:
    """A complete answer."""

    status: int
    headers: CIMultiDict[str]
    body: bytes | memoryview
    """A large body is a view of memory that does not change any more."""


class Reading:
    """An answer as it comes in.

    Parameters
    ----------
    bodiless
        The answer has no body, also if its headers say otherwise: it answers a HEAD.
    most_bytes
        The largest body of status 206 that was asked for. An answer of another status may be larger: the whole object
        instead of a range of it, or the text of a refusal, each within a bound of its own. None: no bound.
    tunnel
        The request was a CONNECT: an answer that agrees has no body, also if its headers say otherwise.
    """

    __slots__ = (
        "_bodiless",
        "_buffers",
        "_chunks",
        "_head",
        "_headers",
        "_interim",
        "_left",
        "_most",
        "_most_asked",
        "_parts",
        "_size",
        "_status",
        "_tunnel",
        "_whole",
        "keep",
    )

    def __init__(
        self, bodiless: bool, buffers: Buffers, most_bytes: int | None = None, *, tunnel: bool = False
    ) -> None:
        self._tunnel = tunnel
        self._bodiless = bodiless
        self._most_asked = most_bytes
        self._most: int | None = None
        self._interim = 0
        self._buffers = buffers
        self._head: bytes | None = b""
        self._status = 0
        self._headers: CIMultiDict[str] = CIMultiDict()
        self._parts: list[bytes] = []
        self._size: int | None = None
        self._left = 0
        self._chunks: _Chunks | None = None
        # A large body, of which all but the last `_left` bytes are there.
        self._whole: memoryview | None = None
        self.keep: bool = False
        """Whether the connection may be used again after this answer."""

    def feed(self, data: bytes) -> Response | None:
        """Take bytes; returns the answer once it is complete. Raises `ValueError` if it is malformed."""
        if self._head is not None:
            rest = self._feed_head(data)
            if rest is None:
                return None
            data = rest
        if self._chunks is not None:
            body = self._chunks.feed(data)
            if body is None:
                return None
            self.keep = self.keep and not self._chunks.rest
            return Response(self._status, self._headers, body)
        if self._whole is not None:
            count = min(len(data), self._left)
            at = len(self._whole) - self._left
            self._whole[at : at + count] = memoryview(data)[:count]
            self.keep = self.keep and count == len(data)
            return self.fill(count)
        if data:
            self._parts.append(data)
            self._left -= len(data)
        if self._size is None:
            _require_fitting(-self._left, self._most)
            return None
        if self._left > 0:
            return None
        if self._left < 0:
            self.keep = False
            self._parts[-1] = self._parts[-1][: self._left]
        return self._response()

    @property
    def rest(self) -> memoryview | None:
        """The memory for the rest of a large body, for the receiver to fill; `fill` has to follow."""
        return None if self._whole is None else self._whole[len(self._whole) - self._left :]

    def fill(self, count: int) -> Response | None:
        """Note that ``count`` bytes of `rest` were filled; returns the answer once it is complete."""
        self._left -= count
        return None if self._left else self._response()

    def at_end(self) -> Response | None:
        """The answer, if the end of the connection marks its end; None if it is incomplete."""
        if self._head is None and self._size is None and self._chunks is None:
            return self._response()
        return None

    def missing(self) -> str:
        """The missing part of an incomplete answer, for a message."""
        if self._head is not None:
            return "the connection was closed without an answer" if not self._head else "the answer broke off"
        if self._chunks is not None or self._size is None:
            return "the answer broke off"
        return f"{self._size - self._left} bytes came instead of {self._size}"

    def _response(self) -> Response:
        if self._whole is not None:
            return Response(self._status, self._headers, self._whole.toreadonly())
        parts, self._parts = self._parts, []
        return Response(self._status, self._headers, parts[0] if len(parts) == 1 else b"".join(parts))

    def _feed_head(self, data: bytes) -> bytes | None:
        """Take bytes of the head; returns the bytes after it, once it is complete."""
        while True:
            data = self._head + data if self._head else data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > _LARGEST_HEAD_BYTES or not b"HTTP/1."[: len(data)] == data[:7] or b"\n\n" in data:
                    raise ValueError(f"it begins with {data[:40]!r}")
                self._head = data
                return None
            head, data = data[:end], data[end + 4 :]
            self._head = b""
            self._parse_head(head)
            if self._status >= 200:
                self._head = None
                return data
            # 100 Continue and its like come before the answer.
            self._interim += 1
            if self._status == 101 or self._interim > _MOST_INTERIM:
                raise ValueError(f"status {self._status} was not asked for, or comes again and again")
            if not data:
                return None

    def _parse_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        status = _STATUS_LINE.fullmatch(first)
        if status is None or _NOT_IN_A_LINE.search(first):
            raise ValueError(f"it begins with {first[:40]!r}")
        self._status = int(status[2])
        headers = self._headers = CIMultiDict()
        for line in lines:
            header = _HEADER.fullmatch(line)
            if header is None or _NOT_IN_A_LINE.search(line):
                raise ValueError(f"bad header {line[:80]!r}")
            headers.add(header[1], header[2].strip(" \t"))
        for name in _SINGLE:
            if len(headers.getall(name, ())) > 1:
                raise ValueError(f"{name} comes twice")
        tokens = {token.strip() for value in headers.getall("connection", ()) for token in value.lower().split(",")}
        self.keep = status[1] == "1" and "close" not in tokens
        self._most = self._bound()
        length = headers.get("content-length")
        if length is not None and not (length.isascii() and length.isdigit() and len(length) < 19):
            raise ValueError(f"bad content-length {length[:40]!r}")
        coding = headers.get("transfer-encoding")
        if coding is not None and (coding.lower() != "chunked" or length is not None or status[1] == "0"):
            raise ValueError(f"bad transfer-encoding {coding[:40]!r}, or one beside a content-length")
        if self._bodiless or self._status in (204, 304) or (self._tunnel and self._status < 300):
            self._size = self._left = 0
        elif coding is not None:
            self._chunks = _Chunks(_LARGEST_UNTOLD_BYTES if self._most is None else self._most)
        elif length is not None:
            self._size = self._left = int(length)
            _require_fitting(self._size, self._most)
            if LARGE_BYTES <= self._size <= _LARGEST_IN_PLACE_BYTES:
                self._whole = self._buffers.take(self._size)
        else:
            self._most = _LARGEST_UNTOLD_BYTES if self._most is None else self._most
            self.keep = False

    def _bound(self) -> int | None:
        """The largest body that an answer of this status may have."""
        if self._status >= 300:
            return _LARGEST_REFUSAL_BYTES
        if self._most_asked is None or self._status == 206:
            return self._most_asked
        return max(self._most_asked, _LARGEST_WHOLE_BYTES)


def _require_fitting(size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise TooLargeError(f"the answer has {size} bytes or more, and at most {most} were asked for")


class _Chunks:
    """A body in HTTP chunks, of at most ``most`` bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0
        self._trailer_bytes = 0
        self.rest = bytearray()
        """Bytes that are not parsed yet; after the end, bytes that do not belong to the body."""
        self._parts: list[bytes] = []
        self._last = False

    def feed(self, data: bytes) -> bytes | None:
        """Take bytes; the whole body once the last chunk has come. Raises `ValueError` if they are malformed."""
        rest = self.rest
        rest += data
        at = 0
        while (end := rest.find(b"\r\n", at)) >= 0:
            line = bytes(rest[at:end])
            if self._last:
                # Trailers, up to an empty line.
                at = end + 2
                if not line:
                    del rest[:at]
                    return b"".join(self._parts)
                self._trailer_bytes += len(line)
                if self._trailer_bytes > _LARGEST_HEAD_BYTES:
                    raise ValueError("its trailers do not end")
                continue
            size = _CHUNK_SIZE.fullmatch(line)
            if size is None or b"\r" in line or b"\0" in line:
                raise ValueError(f"bad chunk size {line[:20]!r}")
            start, stop = end + 2, end + 2 + int(size[1], 16)
            _require_fitting(self._size + stop - start, self._most)
            if start == stop:
                self._last, at = True, start
                continue
            if len(rest) < stop + 2:
                break
            if rest[stop : stop + 2] != b"\r\n":
                raise ValueError("a chunk is longer than it says")
            self._parts.append(bytes(rest[start:stop]))
            self._size += stop - start
            at = stop + 2
        else:
            if len(rest) - at > _LARGEST_HEAD_BYTES or b"\n" in rest[at:]:
                raise ValueError("a chunk's size does not end")
        del rest[:at]
        return None


def request_head(method: str, target: str, headers: Mapping[str, str], size: int) -> bytes:
    """The head of a request with a body of ``size`` bytes.

    Raises
    ------
    ValueError
        The target or a header has a character that would end it; the message names the header, not its value.
    """
    if _NOT_IN_A_TARGET.search(target):
        raise ValueError("the URL has spaces or control characters")
    for name, value in headers.items():
        if _NOT_IN_A_LINE.search(name) or _NOT_IN_A_LINE.search(value):
            raise ValueError(f"the header {name!r} has a line break")
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if size or method in ("PUT", "POST"):
        lines.append(f"content-length: {size}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
