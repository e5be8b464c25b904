"""The messages of HTTP/1.1, without I/O: the head of a request, and an answer as it comes in, cut anywhere.

The pieces of a small answer are joined once, when the last has come. A large one of known size is put into its final
place as it comes, by whoever receives it: see `Reading.rest`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from multidict import CIMultiDict

from icechunk.storage.http.buffers import Buffers

__all__ = ["LARGE_BYTES", "BadAnswerError", "Reading", "Response", "request_head"]

LARGE_BYTES: Final = 1024 * 1024
"""Bodies of this size and above are sent by a thread, and received in place."""

_LARGEST_HEAD_BYTES: Final = 64 * 1024
# Room is made for no more than this on the word of a header.
_LARGEST_IN_PLACE_BYTES: Final = 256 * 1024 * 1024


class BadAnswerError(ConnectionError):
    """What came is no complete answer."""


@dataclass(frozen=True, slots=True)
class Response:
    """A complete answer."""

    status: int
    headers: CIMultiDict[str]
    body: bytes | memoryview
    """A view, of bytes that nobody changes any more, where it is large."""


class Reading:
    """An answer as it comes in."""

    __slots__ = (
        "_bodiless",
        "_buffers",
        "_chunks",
        "_head",
        "_headers",
        "_left",
        "_parts",
        "_size",
        "_status",
        "_whole",
        "keep",
    )

    def __init__(self, bodiless: bool, buffers: Buffers) -> None:
        self._bodiless = bodiless
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
        self.keep = False
        """Whether the connection may be used again after this answer."""

    def feed(self, data: bytes) -> Response | None:
        """Take bytes; the answer once it is complete. Raises ValueError where it is none."""
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
        if self._size is None or self._left > 0:
            return None
        if self._left < 0:
            self.keep = False
            self._parts[-1] = self._parts[-1][: self._left]
        return self._response()

    @property
    def rest(self) -> memoryview | None:
        """Where the rest of a large body belongs, for whoever receives it; `fill` has to follow."""
        return None if self._whole is None else self._whole[len(self._whole) - self._left :]

    def fill(self, count: int) -> Response | None:
        """So many bytes of `rest` are there; the answer once it is complete."""
        self._left -= count
        return None if self._left else self._response()

    def at_end(self) -> Response | None:
        """The answer where the end of the connection is its end; None where it is incomplete."""
        if self._head is None and self._size is None and self._chunks is None:
            return self._response()
        return None

    def missing(self) -> str:
        """What an incomplete answer lacks, for a message."""
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
        """Take bytes of the head; what comes after it once it is complete."""
        while True:
            data = self._head + data if self._head else data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > _LARGEST_HEAD_BYTES or not b"HTTP/1."[: len(data)] == data[:7]:
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
            if not data:
                return None

    def _parse_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0") or not rest[:3].isdigit():
            raise ValueError(f"it begins with {first[:40]!r}")
        self._status = int(rest[:3])
        headers = self._headers = CIMultiDict()
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name[-1].isspace() or name[0].isspace():
                raise ValueError(f"bad header {line[:80]!r}")
            headers.add(name, value.strip(" \t"))
        connection = headers.get("connection", "").lower()
        self.keep = version == "HTTP/1.1" and "close" not in connection
        if self._bodiless or self._status in (204, 304):
            self._size = self._left = 0
        elif "transfer-encoding" in headers:
            if headers["transfer-encoding"].lower() != "chunked":
                raise ValueError(f"unknown transfer-encoding {headers['transfer-encoding']!r}")
            self._chunks = _Chunks()
        elif (length := headers.get("content-length")) is not None:
            if not length.isdigit() or len(set(headers.getall("content-length"))) > 1:
                raise ValueError(f"bad content-length {length!r}")
            self._size = self._left = int(length)
            if LARGE_BYTES <= self._size <= _LARGEST_IN_PLACE_BYTES:
                self._whole = self._buffers.take(self._size)
        else:
            self.keep = False


class _Chunks:
    """A body in chunks of HTTP."""

    def __init__(self) -> None:
        self.rest = bytearray()
        """What has not been understood yet; after the end, what does not belong to the body."""
        self._parts: list[bytes] = []
        self._last = False

    def feed(self, data: bytes) -> bytes | None:
        """Take bytes; the whole body once the last chunk has come. Raises ValueError on nonsense."""
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
                continue
            digits = line.split(b";", 1)[0].strip()
            if not digits or digits.strip(b"0123456789abcdefABCDEF"):
                raise ValueError(f"bad chunk size {digits[:20]!r}")
            start, stop = end + 2, end + 2 + int(digits, 16)
            if start == stop:
                self._last, at = True, start
                continue
            if len(rest) < stop + 2:
                break
            if rest[stop : stop + 2] != b"\r\n":
                raise ValueError("a chunk is longer than it says")
            self._parts.append(bytes(rest[start:stop]))
            at = stop + 2
        else:
            if len(rest) - at > _LARGEST_HEAD_BYTES:
                raise ValueError("a chunk's size does not end")
        del rest[:at]
        return None


def request_head(method: str, target: str, headers: Mapping[str, str], size: int) -> bytes:
    """The head of a request with a body of ``size`` bytes. Raises ValueError where a header has a line break."""
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if size or method in ("PUT", "POST"):
        lines.append(f"content-length: {size}")
    text = "\r\n".join(lines)
    if text.count("\n") != len(lines) - 1 or text.count("\r") != len(lines) - 1:
        raise ValueError("a header has a line break")
    return (text + "\r\n\r\n").encode("latin-1")
