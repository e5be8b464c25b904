"""HTTP/1.1 for object stores: kept connections, one request at a time on each, whole answers.

The general client of aiohttp spends three quarters of its time on features that these exchanges never use (cookies,
redirects, compression, streams, tracing), and copies each byte of an answer three times on the loop's thread. Here a
request is written as one piece where it is small, and in pieces that wait for the peer where it is large; the pieces of
a small answer are joined once, when the last has come, and a large one is received into its final place.

One request is one try: nothing is sent again, no redirect is followed. How many there are at once is the callers' to
bound. A connection is kept only where every byte of the request was sent and every byte of the answer was read.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
import ssl
import sys
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, cast

from aiohappyeyeballs import start_connection

from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import in_thread
from icechunk.storage.buffers import Buffers
from icechunk.storage.http.messages import BadAnswerError, Reading, Response, TooLargeError, request_head
from icechunk.storage.http.proxies import Proxies, Proxy, ProxyError
from icechunk.storage.patience import Patience, Watch, watching
from icechunk.storage.retry import note_repeats

if sys.platform == "linux":
    import fcntl
    import termios

__all__ = ["BadAnswerError", "Connections", "NotConnectedError", "Origin", "Response", "SilentError", "TooLargeError"]

_KEEPALIVE_S: Final = 15.0
_ONE_WRITE_BYTES: Final = 64 * 1024
# Small enough for other tasks to run in between.
_PIECE_BYTES: Final = 256 * 1024
# asyncio's own would be new memory for each piece, whose first touch costs more than copying out of this. The beginning
# of a large answer is received here too; the rest goes directly to its final place.
_INBOX_BYTES: Final = 64 * 1024
# A quarter of a millisecond.
_TURN_BYTES: Final = 1024 * 1024
_HAPPY_EYEBALLS_S: Final = 0.25
_SLOWEST_BYTES_PER_S: Final = 1024
"""Slower answers are given up, after twice the time that a peer may be silent: they would never end."""
_CLOSE_S: Final = 1.0


class SilentError(TimeoutError):
    """Nothing moved in either direction for much longer than this service ever needs."""


class NotConnectedError(Exception):
    """No connection could be made: the request certainly never left. The cause is the `OSError`."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The target of requests."""

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
        For origins of scheme ``https``: a context, or a function that makes it in a thread at first use; None: the
        system's.
    proxies
        The proxies of requests; None: those of the environment.
    """

    def __init__(
        self,
        tls: ssl.SSLContext | Callable[[], ssl.SSLContext] | None = None,
        proxies: Proxies | None = None,
    ) -> None:
        self._tls = tls or ssl.create_default_context
        self._proxies = Proxies() if proxies is None else proxies
        self._routes: dict[Origin, Proxy | None] = {}
        self._patience: dict[Origin, Patience] = {}
        self._idle: dict[Origin, deque[tuple[_Connection, float]]] = {}
        self._open: set[_Connection] = set()
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
        most_bytes: int | None = None,
        patience: float = math.inf,
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
            Without the last, an answer that comes very slowly is given up too.
        most_bytes
            See `Reading`.
        patience
            How many times as long as `Patience` says to wait while nothing moves, the request's body or the answer;
            infinite: ``read_s``.

        Raises
        ------
        NotConnectedError
            No connection.
        TooLargeError
            The answer is larger than it may be.
        BadAnswerError, OSError
            The connection broke, or the bytes that came are no answer.
        TimeoutError
            A limit passed.
        ValueError
            The request cannot be sent as it is; nothing was sent.
        """
        proxy = self._route(origin)
        if proxy is not None and origin.scheme == "http":
            host = f"[{origin.host}]" if ":" in origin.host else origin.host
            target = f"http://{host}:{origin.port}{target}"
            headers = {**headers, **proxy.headers}
        head = request_head(method, target, headers, len(body))
        learned = self._patience.setdefault(origin, Patience())
        connection = self._kept(origin) or await self._connect(origin, proxy, connect_s, learned)
        large_bytes = len(body) if len(body) > _ONE_WRITE_BYTES else 0
        waiting = learned.begin(large_bytes)
        still_s, body_s = waiting.still_s * patience, waiting.body_s * patience
        watch = watching.get()
        if watch is not None:
            watch.note(asyncio.get_running_loop().time(), learned.recent)
        reading = Reading(method == "HEAD", self._buffers, most_bytes)
        try:
            response = await connection.request(head, body, reading, read_s, total_s, still_s, body_s, watch)
        except SilentError:
            connection.abort()
            learned.missed(waiting)
            note_repeats(abandoned=1)
            # The idle connections to the same place may have become silent for the same reason.
            self._drop(origin)
            raise
        except BaseException:
            connection.abort()
            raise
        finally:
            learned.end(large_bytes)
        learned.answered(waiting, connection.waited_s, connection.took_s)
        self._keep(origin, connection)
        return response

    async def aclose(self) -> None:
        """Close the connections that wait for a request, and keep none any more.

        Exchanges under way, which may belong to other callers, are not disturbed; each connection is closed when its
        exchange ends.
        """
        self._closed = True
        waiting = [connection for idle in self._idle.values() for connection, _ in idle]
        self._idle.clear()
        for connection in waiting:
            connection.abort()
        if waiting:
            # An event loop that never reports the end of a connection must not block the close.
            await asyncio.wait([connection.closed for connection in waiting], timeout=_CLOSE_S)

    def _kept(self, origin: Origin) -> _Connection | None:
        idle = self._idle.get(origin)
        now = asyncio.get_running_loop().time()
        while idle:
            connection, since = idle.pop()
            if connection.reusable and now - since < _KEEPALIVE_S:
                return connection
            connection.abort()
        return None

    def _drop(self, origin: Origin) -> None:
        for connection, _ in self._idle.pop(origin, ()):
            connection.abort()

    def _keep(self, origin: Origin, connection: _Connection) -> None:
        idle = self._idle.setdefault(origin, deque())
        now = asyncio.get_running_loop().time()
        if connection.reusable and not self._closed:
            idle.append((connection, now))
        else:
            connection.abort()
        while idle and now - idle[0][1] >= _KEEPALIVE_S:
            idle.popleft()[0].abort()

    def _route(self, origin: Origin) -> Proxy | None:
        if origin not in self._routes:
            try:
                self._routes[origin] = self._proxies.proxy_for(origin.scheme, origin.host, origin.port)
            except ProxyError as error:
                raise NotConnectedError(str(error)) from error
        return self._routes[origin]

    async def _connect(self, origin: Origin, proxy: Proxy | None, connect_s: float, learned: Patience) -> _Connection:
        loop = asyncio.get_running_loop()
        began = loop.time()
        connection = _Connection(loop, self._open, self._buffers, self._inbox)
        try:
            async with asyncio.timeout(connect_s):
                if proxy is None:
                    await self._open_to(connection, origin.scheme, origin.host, origin.port)
                else:
                    await self._open_through(connection, proxy, origin, connect_s)
        except OSError as error:  # also TimeoutError
            connection.abort()
            raise NotConnectedError(str(error)) from error
        except BaseException:
            # Some event loops do not close the transport of a cancelled connection themselves.
            connection.abort()
            raise
        learned.connected(loop.time() - began)
        return connection

    async def _open_to(self, connection: _Connection, scheme: str, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        addresses: list[Any]
        if (address := _address_of(host)) is not None:
            addresses = [(address, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))]
        else:
            addresses = list(await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        # asyncio's own race of addresses leaves a socket unclosed where it is cancelled at its end.
        connected = await start_connection(addresses, happy_eyeballs_delay=_HAPPY_EYEBALLS_S)
        try:
            tls = await self._context() if scheme == "https" else None
        except BaseException:
            connected.close()
            raise
        await loop.create_connection(lambda: connection, sock=connected, ssl=tls, server_hostname=host if tls else None)

    async def _open_through(self, connection: _Connection, proxy: Proxy, origin: Origin, connect_s: float) -> None:
        try:
            await self._open_to(connection, proxy.scheme, proxy.host, proxy.port)
            if origin.scheme == "http":
                return
            place = f"[{origin.host}]:{origin.port}" if ":" in origin.host else f"{origin.host}:{origin.port}"
            head = request_head("CONNECT", place, {"host": place, **proxy.headers}, 0)
            response = await connection.request(
                head, b"", Reading(False, self._buffers, tunnel=True), connect_s, None, connect_s, 0.0
            )
        except OSError as error:
            raise ProxyError(f"the proxy {proxy.named} does not answer ({error})") from error
        if response.status >= 300:
            raise ProxyError(f"the proxy {proxy.named} answered {response.status}")
        await connection.start_tls(await self._context(), origin.host)

    async def _context(self) -> ssl.SSLContext:
        if not isinstance(self._tls, ssl.SSLContext):
            # It reads the certificates of all authorities.
            self._tls = await in_thread(self._tls)
        return self._tls


@lru_cache(maxsize=64)
def _untaken_bytes(transport: asyncio.Transport) -> int | None:
    """Bytes that the kernel holds and the peer has not confirmed; None where this system does not say."""
    connected = transport.get_extra_info("socket")
    if connected is None or sys.platform != "linux":
        return None
    try:
        return int.from_bytes(fcntl.ioctl(connected.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return None


def _address_of(host: str) -> socket.AddressFamily | None:
    """The family of an address; None for a name."""
    try:
        return socket.AF_INET if ipaddress.ip_address(host).version == 4 else socket.AF_INET6
    except ValueError:
        return None


class _Connection(asyncio.BufferedProtocol):
    """One connection; `request` may be called again once it has returned and `reusable` is true.

    Parameters
    ----------
    inbox
        Shared by the connections of the loop: received bytes stay in it for the length of one call.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        open_connections: set[_Connection],
        buffers: Buffers,
        inbox: memoryview,
    ) -> None:
        self._loop = loop
        self._inbox = inbox
        self._buffers = buffers
        self._open = open_connections
        self._transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[None] = loop.create_future()
        self._answer: asyncio.Future[Response] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._paused = False
        self.reusable = False

    # -- of the caller ---------------------------------------------------------------------------------------------

    async def request(
        self,
        head: bytes,
        body: bytes | memoryview,
        reading: Reading,
        read_s: float,
        total_s: float | None,
        still_s: float,
        body_s: float,
        watch: Watch | None = None,
    ) -> Response:
        """Send one request and wait for its answer; see `Connections.exchange`.

        ``still_s``, ``body_s``: as for `Waiting`; ``still_s`` of at least ``read_s``: there is no such limit.
        ``watch`` notes the bytes that come.
        """
        loop, transport = self._loop, self._opened()
        answer: asyncio.Future[Response] = loop.create_future()
        self._answer = answer
        self._reading = reading
        self._watch_of_caller = watch
        self._heard = now = loop.time()
        self._read_s = read_s
        self._still_s = still_s
        self._began = now
        self._body_s = body_s
        self._body_bytes = len(body)
        self._handed = 0
        self._taken = 0
        self._moved_at = now
        self._received = 0
        self.waited_s = self.took_s = 0.0
        self._is_sent = is_small = len(body) <= _ONE_WRITE_BYTES
        self._sent_at: float | None = now if is_small else None
        self._deadline = None if total_s is None else now + total_s
        self.reusable = False
        if self.closed.done():
            self._fail(BadAnswerError("the connection was closed before the request"))
        self._watch()
        try:
            if is_small:
                transport.write(head + bytes(body) if body else head)
            else:
                transport.write(head)
                if not await self._write(memoryview(body)):
                    return await answer
            response = await answer
            self.reusable = (
                self._is_sent
                and reading.keep
                and not transport.is_closing()
                # Bytes that the kernel has not taken yet belong to this request.
                and not transport.get_write_buffer_size()
            )
            return response
        finally:
            self._answer = None
            self._timer.cancel()

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Go on encrypted, with the server behind the proxy that this is a connection to."""
        transport = await self._loop.start_tls(self._opened(), self, context, server_hostname=host)
        if transport is None:
            raise BadAnswerError("the proxy closed the connection")
        self._transport = transport

    def abort(self) -> None:
        """Close at once."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def _opened(self) -> asyncio.Transport:
        if self._transport is None:
            raise BadAnswerError("the connection was closed before the request")
        return self._transport

    async def _write(self, body: memoryview) -> bool:
        """Send a large body; False if the answer came first, so that the rest was not sent."""
        answer = self._answer
        for start in range(0, len(body), _PIECE_BYTES):
            if answer is None or answer.done():
                return False
            self._opened().write(body[start : start + _PIECE_BYTES])
            self._handed = min(start + _PIECE_BYTES, len(body))
            if self._paused:
                self._writable = self._loop.create_future()
                await self._writable
                self._writable = None
            else:
                await asyncio.sleep(0)
        self._is_sent = True
        self._sent_at = self._loop.time()
        self._timer.cancel()
        self._watch()
        return True

    def _watch(self) -> None:
        at = min(self._heard + self._read_s, self._too_slow_at(), self._silent_at())
        at = at if self._deadline is None else min(at, self._deadline)
        self._timer: asyncio.TimerHandle = self._loop.call_at(at, self._look)

    def _too_slow_at(self) -> float:
        """Time at which an answer of the bytes that came so far is too slow."""
        if self._sent_at is None:
            return math.inf
        return self._sent_at + 2 * self._read_s + self._received / _SLOWEST_BYTES_PER_S

    def _silent_at(self) -> float:
        """Time at which the silence, without any byte in either direction, is too long."""
        if self._still_s >= self._read_s:
            return math.inf
        at = max(self._heard, self._sent_at or 0.0, self._moved_at)
        return (at if self._received else max(at, self._began + self._body_s)) + self._still_s

    def _note_movement(self, now: float) -> None:
        """Find out whether the peer took more of a large body since the last time."""
        if self._received or self._body_bytes <= _ONE_WRITE_BYTES or self._transport is None:
            return
        untaken = _untaken_bytes(self._transport)
        if untaken is not None:
            taken = self._handed - untaken - self._transport.get_write_buffer_size()
        else:
            # While it is being sent, the longest time that the peer may be silent decides.
            taken = self._taken + (self._sent_at is None)
        if taken > self._taken:
            self._taken = taken
            self._moved_at = now

    def _look(self) -> None:
        now = self._loop.time()
        self._note_movement(now)
        if self._deadline is not None and now >= self._deadline:
            self._fail(TimeoutError("no complete answer in time"))
        elif now >= self._silent_at():
            self._fail(SilentError(f"nothing moved for {self._still_s:g} s"))
        elif now >= self._heard + self._read_s:
            self._fail(TimeoutError(f"no byte arrived for {self._read_s:g} s"))
        elif now >= self._too_slow_at():
            self._fail(TimeoutError(f"only {self._received} bytes came in {now - (self._sent_at or now):.0f} s"))
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
        if not self.closed.done():
            self.closed.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        rest = None if self._answer is None else self._reading.rest
        return rest[:_TURN_BYTES] if rest else self._inbox

    def buffer_updated(self, nbytes: int) -> None:
        answer = self._answer
        if answer is None or answer.done():
            # Bytes without a request: the next answer could not be distinguished from them.
            self.abort()
            return
        now = self._loop.time()
        if self._sent_at is not None:
            if not self._received:
                self.took_s = now - self._began
            waited_s = now - max(self._heard, self._sent_at)
            if waited_s > self.waited_s:
                self.waited_s = waited_s
        self._heard = now
        self._received += nbytes
        if self._watch_of_caller is not None:
            self._watch_of_caller.note(now)
        try:
            reading = self._reading
            # Nothing has changed since `get_buffer`.
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
