"""HTTP/1.1 as an object store speaks it: kept connections, one request at a time on each, whole answers.

The general client of aiohttp spends three quarters of its time on what these exchanges never use (cookies, redirects,
compression, streams, tracing), and copies each byte of an answer three times on the loop's thread. Here a request is
written as one piece where it is small, and in pieces that wait for the peer where it is large; the pieces of a small
answer are joined once, when the last has come, and a large one is received into its final place. Megabytes are sent by
threads beside the loop where the connection is plain (`icechunk.storage.http.large_bodies`).

One request is one try: nothing is sent again, no redirect is followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, cast

from aiohappyeyeballs import start_connection

from icechunk.storage.http.buffers import Buffers
from icechunk.storage.http.large_bodies import Move, Threads
from icechunk.storage.http.messages import BadAnswerError, Reading, Response, request_head

__all__ = ["BadAnswerError", "Connections", "NotConnectedError", "Origin", "Response"]

_CONNECTIONS: Final = 512
_KEEPALIVE_S: Final = 15.0
_ONE_WRITE_BYTES: Final = 64 * 1024
# Small enough for others to have their turn in between.
_PIECE_BYTES: Final = 256 * 1024
# asyncio's own would be new memory for each piece, whose first touch costs more than copying out of this. What begins a
# large answer comes here too; the more of it goes to its final place, the better.
_INBOX_BYTES: Final = 64 * 1024
# A quarter of a millisecond.
_TURN_BYTES: Final = 1024 * 1024
_HAPPY_EYEBALLS_S: Final = 0.25
_THREADS: Final = 16
# What an answer to a request that was read to its end leaves to the thread that sent it: to notice.
_LAST_SEND_S: Final = 0.1


class NotConnectedError(Exception):
    """No connection could be made: the request certainly never left. The cause is the `OSError`."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where requests go."""

    scheme: str
    """``http`` or ``https``."""
    host: str
    """Name or address, an IPv6 address without brackets."""
    port: int


class Connections:
    """The connections of one event loop.

    Parameters
    ----------
    tls
        For origins of scheme ``https``.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._room = asyncio.Semaphore(_CONNECTIONS)
        self._idle: dict[Origin, deque[tuple[_Connection, float]]] = {}
        self._open: set[_Connection] = set()
        self._threads = Threads(_THREADS)
        self._buffers = Buffers()
        self._inbox = memoryview(bytearray(_INBOX_BYTES))
        self._closed = False

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
        """Send a request and wait for its whole answer. After cancellation the connection is closed.

        Parameters
        ----------
        target
            Path and query, encoded.
        headers
            All but ``content-length``; ``host`` included.
        connect_s, read_s, total_s
            Limits: for a connection, for the next sign of life of the peer, and for everything after connecting.

        Raises
        ------
        NotConnectedError
            No connection.
        BadAnswerError, OSError
            The connection broke, or what came is no answer.
        TimeoutError
            A limit passed.
        """
        async with self._room:
            connection = self._kept(origin) or await self._connect(origin, connect_s)
            if self._closed:
                # It was being made while all others were closed.
                connection.abort()
                raise BadAnswerError("the connections were closed before the request")
            try:
                response = await connection.request(
                    request_head(method, target, headers, len(body)), body, method == "HEAD", read_s, total_s
                )
            except BaseException:
                connection.abort()
                raise
            self._keep(origin, connection)
            return response

    async def aclose(self) -> None:
        """Close all connections; exchanges under way fail."""
        self._closed = True
        self._idle.clear()
        connections = tuple(self._open)
        for connection in connections:
            connection.abort()
        for connection in connections:
            await connection.closed

    def _kept(self, origin: Origin) -> _Connection | None:
        idle = self._idle.get(origin)
        now = asyncio.get_running_loop().time()
        while idle:
            connection, since = idle.pop()
            if connection.reusable and now - since < _KEEPALIVE_S:
                return connection
            connection.abort()
        return None

    def _keep(self, origin: Origin, connection: _Connection) -> None:
        idle = self._idle.setdefault(origin, deque())
        now = asyncio.get_running_loop().time()
        if connection.reusable and not self._closed:
            idle.append((connection, now))
        else:
            connection.abort()
        while idle and now - idle[0][1] >= _KEEPALIVE_S:
            idle.popleft()[0].abort()

    def _new_connection(self) -> _Connection:
        return _Connection(asyncio.get_running_loop(), self._open, self._threads, self._buffers, self._inbox)

    async def _connect(self, origin: Origin, connect_s: float) -> _Connection:
        loop = asyncio.get_running_loop()
        tls = (self._tls or ssl.create_default_context()) if origin.scheme == "https" else None
        try:
            async with asyncio.timeout(connect_s):
                if _is_address(origin.host):
                    _, connection = await loop.create_connection(
                        self._new_connection,
                        origin.host,
                        origin.port,
                        ssl=tls,
                    )
                else:
                    # asyncio's own race of addresses leaves a socket unclosed where it is cancelled at its end.
                    addresses = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
                    connected = await start_connection(addresses, happy_eyeballs_delay=_HAPPY_EYEBALLS_S)
                    _, connection = await loop.create_connection(
                        self._new_connection,
                        sock=connected,
                        ssl=tls,
                        server_hostname=origin.host if tls else None,
                    )
        except OSError as error:  # also TimeoutError
            raise NotConnectedError(str(error)) from error
        return connection


@lru_cache(maxsize=64)
def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Connection(asyncio.BufferedProtocol):
    """One connection; `request` may be called again once it has returned and `reusable` is true.

    Parameters
    ----------
    inbox
        Shared by the connections of the loop: what comes stays in it for the length of one call.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        open_connections: set[_Connection],
        threads: Threads,
        buffers: Buffers,
        inbox: memoryview,
    ) -> None:
        self._loop = loop
        self._inbox = inbox
        self._threads = threads
        self._buffers = buffers
        self._sending: Move | None = None
        self._open = open_connections
        self._transport: asyncio.Transport
        self.closed: asyncio.Future[None] = loop.create_future()
        self._answer: asyncio.Future[Response] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._paused = False
        self._lost = False
        self.reusable = False

    # -- of the caller ---------------------------------------------------------------------------------------------

    async def request(
        self, head: bytes, body: bytes | memoryview, bodiless: bool, read_s: float, total_s: float | None
    ) -> Response:
        """Send one request and wait for its answer; see `Connections.exchange`."""
        loop, transport = self._loop, self._transport
        answer: asyncio.Future[Response] = loop.create_future()
        self._answer = answer
        self._reading = Reading(bodiless, self._buffers)
        self._heard = now = loop.time()
        self._read_s = read_s
        self._deadline = None if total_s is None else now + total_s
        self.reusable = False
        if self.closed.done():
            self._fail(BadAnswerError("the connection was closed before the request"))
        timer = self._watch()
        try:
            if len(body) <= _ONE_WRITE_BYTES:
                transport.write(head + bytes(body) if body else head)
            else:
                transport.write(head)
                if not await self._write(memoryview(body)):
                    return await answer
            response = await answer
            sent = self._sending is None or (response.status < 300 and await self._sent())
            self.reusable = sent and self._reading.keep and not transport.is_closing()
            return response
        finally:
            self._answer = None
            (self._timer or timer).cancel()

    def abort(self) -> None:
        """Close at once."""
        self.reusable = False
        self._stop_sending()
        self._transport.abort()

    def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.stop()

    async def _write(self, body: memoryview) -> bool:
        """Send a large body; False where the answer came first, so that the rest was not sent. True too where a
        thread sends it."""
        answer = self._answer
        self._sending = self._threads.try_send(self._transport, body, self._read_s, self._end_of_send)
        if self._sending is not None:
            return True
        for start in range(0, len(body), _PIECE_BYTES):
            if answer is None or answer.done():
                return False
            self._transport.write(body[start : start + _PIECE_BYTES])
            if self._paused:
                self._writable = self._loop.create_future()
                await self._writable
                self._writable = None
            else:
                await asyncio.sleep(0)
        return True

    async def _sent(self) -> bool:
        """Whether a thread that sends has sent everything, of a request that was answered."""
        move = self._sending
        if move is not None and not move.is_complete:
            # Its last bytes were read before it could say so.
            ended = self._writable = self._loop.create_future()
            await asyncio.wait([ended], timeout=_LAST_SEND_S)
            self._writable = None
        return move is None or move.is_complete

    def _end_of_send(self, move: Move) -> None:
        if self._sending is move:
            self._sending = None
        self._heard = self._loop.time()
        if isinstance(move.error, TimeoutError):
            self._fail(TimeoutError(f"no sign of life for {self._read_s:g} s"))
        # Of every other error the reading side hears too, maybe after an answer.
        self._go_on_writing()
        self._end_if_closed()

    def _end_if_closed(self) -> None:
        if self._lost and self._sending is None and not self.closed.done():
            self.closed.set_result(None)

    def _watch(self) -> asyncio.TimerHandle:
        quiet_until = self._heard + self._read_s
        at = quiet_until if self._deadline is None else min(quiet_until, self._deadline)
        self._timer: asyncio.TimerHandle = self._loop.call_at(at, self._look)
        return self._timer

    def _look(self) -> None:
        now = self._loop.time()
        if self._deadline is not None and now >= self._deadline:
            self._fail(TimeoutError("no complete answer in time"))
        elif self._sending is not None:
            # The thread watches the line itself.
            self._heard = now
            self._watch()
        elif now >= self._heard + self._read_s:
            self._fail(TimeoutError(f"no sign of life for {self._read_s:g} s"))
        else:
            self._watch()

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self._go_on_writing()

    # -- of the transport ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._open.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._open.discard(self)
        self.reusable = False
        if self._answer is not None and not self._answer.done():
            response = None if error is not None else self._reading.at_end()
            if response is not None:
                self._answer.set_result(response)
            else:
                self._fail(error or BadAnswerError(self._reading.missing()))
        self._go_on_writing()
        self._lost = True
        self._stop_sending()
        self._end_if_closed()

    def get_buffer(self, sizehint: int) -> memoryview:
        rest = None if self._answer is None else self._reading.rest
        return rest[:_TURN_BYTES] if rest else self._inbox

    def buffer_updated(self, nbytes: int) -> None:
        answer = self._answer
        if answer is None or answer.done():
            # Nobody asked: whatever it is, the next answer cannot be told from it.
            self.abort()
            return
        self._heard = self._loop.time()
        try:
            reading = self._reading
            # In between nothing has changed: as in `get_buffer`.
            response = reading.fill(nbytes) if reading.rest else reading.feed(bytes(self._inbox[:nbytes]))
        except (BadAnswerError, ValueError) as error:
            self._fail(error if isinstance(error, BadAnswerError) else BadAnswerError(f"no HTTP answer: {error}"))
            self.abort()
            return
        if response is not None:
            answer.set_result(response)
            self._go_on_writing()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._heard = self._loop.time()
        self._go_on_writing()

    def _go_on_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
