"""A tiny S3 over raw sockets that misbehaves on demand: one behaviour for each request, in order."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

OK = "ok"
RESET = "reset"
"""Nothing is done; the connection is reset."""
LOSE = "lose"
"""The request is executed; the connection is reset instead of an answer."""
LOSE_THEN_REPLACE = "lose-then-replace"
"""As LOSE, and another client replaces the object at once."""
TRUNCATE = "truncate"
"""The answer's body ends in the middle."""
HANG = "hang"
"""No answer, ever."""
STALL = "stall"
"""Headers and half the body, then nothing."""


@dataclass(frozen=True)
class Say:
    """Answer this, whatever was asked."""

    status: int
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    carry_out: bool = False


@dataclass
class Seen:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class FaultyS3:
    """Objects by path, behaviours still to come, requests seen."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.behaviours: list[str | Say] = []
        self.faulty: Callable[[Seen], str | Say] | None = None
        """Decides instead of ``behaviours``, where it is set."""
        self.most_at_once: int | None = None
        """More requests than this at a time are answered with SlowDown."""
        self.hold_s = 0.0
        """Seconds that an answer takes."""
        self.seen: list[Seen] = []
        self.at_once = 0
        self.peak = 0
        """Requests that were there at the same time at the most."""
        self.refused = 0
        """Requests answered with SlowDown for being too many."""
        self.connections = 0
        """Open now."""
        self.clock_s: float | None = 1e9
        """The service's clock, seconds since 1970; None: this machine's."""
        self.port = 0
        self.arrived = asyncio.Event()
        self._hanging = asyncio.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def methods(self) -> list[str]:
        return [seen.method for seen in self.seen]

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                first = await reader.readexactly(1)
                if first == b"\x16":  # a TLS greeting
                    writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
                    return
                head = (first + await reader.readuntil(b"\r\n\r\n")).decode()
                line, *rest = head.strip().split("\r\n")
                method, path, _ = line.split(" ")
                headers = {n.lower(): v for n, v in (row.split(": ", 1) for row in rest)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                seen = Seen(method, path, headers, body)
                self.seen.append(seen)
                self.arrived.set()
                if not await self.behave(seen, writer):
                    return

    async def behave(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        self.at_once += 1
        self.peak = max(self.peak, self.at_once)
        try:
            too_many = self.most_at_once is not None and self.at_once > self.most_at_once
            self.refused += too_many
            if self.hold_s:
                await asyncio.sleep(self.hold_s)
            return await self._behave(seen, writer, Say(503, "SlowDown") if too_many else self.next_behaviour(seen))
        finally:
            self.at_once -= 1

    def next_behaviour(self, seen: Seen) -> str | Say:
        if self.faulty is not None:
            return self.faulty(seen)
        return self.behaviours.pop(0) if self.behaviours else OK

    async def _behave(self, seen: Seen, writer: asyncio.StreamWriter, behaviour: str | Say) -> bool:
        if isinstance(behaviour, Say):
            if behaviour.carry_out:
                self.carry_out(seen)
            text = f"<Error><Code>{behaviour.code}</Code><Message>m</Message></Error>" if behaviour.code else ""
            self.answer(writer, seen, behaviour.status, text.encode(), behaviour.headers)
            return True
        if behaviour == RESET:
            self.reset(writer)
            return False
        if behaviour == HANG:
            await self._hanging.wait()
            return False
        status, body, headers = self.carry_out(seen)
        if behaviour in (LOSE, LOSE_THEN_REPLACE):
            if behaviour == LOSE_THEN_REPLACE:
                self.objects[seen.path] = (b"another's", {})
            self.reset(writer)
            return False
        if behaviour in (TRUNCATE, STALL):
            self.answer(writer, seen, status, body, headers, only=len(body) // 2)
            await writer.drain()
            if behaviour == STALL:
                await self._hanging.wait()
            writer.close()
            return False
        self.answer(writer, seen, status, body, headers)
        await writer.drain()
        return True

    def carry_out(self, seen: Seen) -> tuple[int, bytes, dict[str, str]]:
        if seen.method == "GET" and "list-type=2" in seen.path:
            return 200, self.listing(seen.path), {}
        current = self.objects.get(seen.path)
        etag = None if current is None else f'"{hashlib.md5(current[0]).hexdigest()}"'
        if seen.method == "PUT":
            if "if-none-match" in seen.headers and current is not None:
                return 412, b"<Error><Code>PreconditionFailed</Code></Error>", {}
            if "if-match" in seen.headers and current is None:
                return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
            if "if-match" in seen.headers and seen.headers["if-match"] != etag:
                return 412, b"<Error><Code>PreconditionFailed</Code></Error>", {}
            self.objects[seen.path] = (seen.body, {n: v for n, v in seen.headers.items() if "x-amz-meta" in n})
            return 200, b"", {"ETag": f'"{hashlib.md5(seen.body).hexdigest()}"'}
        if seen.method == "DELETE":
            self.objects.pop(seen.path, None)
            return 204, b"", {}
        if current is None or etag is None:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
        headers = {"ETag": etag, "Last-Modified": formatdate(self.clock_s, usegmt=True), **current[1]}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", seen.headers.get("range", ""))
        if match is None or seen.method != "GET":
            return 200, current[0], headers
        start, size = int(match[1]), len(current[0])
        if start >= size:
            return 416, b"<Error><Code>InvalidRange</Code></Error>", {}
        part = current[0][start : int(match[2]) + 1 if match[2] else size]
        return 206, part, {**headers, "Content-Range": f"bytes {start}-{start + len(part) - 1}/{size}"}

    def listing(self, path: str) -> bytes:
        place, _, query = path.partition("?")
        asked = dict(parse_qsl(query, keep_blank_values=True))
        after, most = asked.get("start-after", ""), int(asked.get("max-keys", "1000"))
        inside = place.rstrip("/") + "/"
        keys = sorted(unquote(found.removeprefix(inside)) for found in self.objects if found.startswith(inside))
        keys = [key for key in keys if key.startswith(asked.get("prefix", "")) and key > after]
        rows = "".join(
            f"<Contents><Key>{quote(key)}</Key><Size>{len(self.objects[inside + quote(key)][0])}</Size>"
            f'<ETag>"{hashlib.md5(self.objects[inside + quote(key)][0]).hexdigest()}"</ETag>'
            f"<LastModified>{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}</LastModified></Contents>"
            for key in keys[:most]
        )
        cut = "true" if len(keys) > most else "false"
        return (
            f"<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>{cut}</IsTruncated>{rows}"
            "</ListBucketResult>"
        ).encode()

    def answer(
        self,
        writer: asyncio.StreamWriter,
        seen: Seen,
        status: int,
        body: bytes,
        headers: dict[str, str],
        only: int | None = None,
    ) -> None:
        rows = {"Content-Length": str(len(body)), "Date": formatdate(self.clock_s, usegmt=True), **headers}
        text = "".join(f"{name}: {value}\r\n" for name, value in rows.items())
        writer.write(f"HTTP/1.1 {status} X\r\n{text}\r\n".encode())
        if seen.method != "HEAD":
            writer.write(body[:only])

    def reset(self, writer: asyncio.StreamWriter) -> None:
        connection: Any = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[FaultyS3]:
    """A server on the running loop."""
    faulty = FaultyS3()
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        faulty.connections += 1
        try:
            await faulty.handle(reader, writer)
        except asyncio.CancelledError:
            pass
        finally:
            tasks.discard(task)
            faulty.connections -= 1
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    faulty.port = server.sockets[0].getsockname()[1]
    try:
        yield faulty
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
