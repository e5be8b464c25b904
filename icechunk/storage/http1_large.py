"""Large bodies of plain connections, moved by a thread each.

Megabytes cost milliseconds of system calls, most of it in the kernel, without the interpreter's lock. On the loop's
thread they hold up everything else; in a thread they go on beside it. A thread sends one body, or receives what is
left of one into its final place, on a duplicate of the connection's socket: whatever becomes of the connection
meanwhile, the thread never touches a descriptor that somebody else was given since.

The loop decides everything. A thread only moves bytes, counts them, and tells the loop once that it has ended.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Final

from icechunk.storage.http1_messages import LARGE_BYTES

__all__ = ["Move", "Threads"]

# Each wake-up of a thread waits for the interpreter's lock: few of them, with much to take.
_LEAST_RECEIVED: Final = 2 * 1024 * 1024
_NOTHING: Final = memoryview(b"")
_POSSIBLE: Final = sys.platform != "win32"


class Threads:
    """How many threads may move bodies at the same time, on one event loop; the others are moved by the loop."""

    def __init__(self, limit: int) -> None:
        self._free = limit if _POSSIBLE else 0

    @property
    def are_free(self) -> bool:
        """Whether one may be had."""
        return self._free > 0

    def try_send(
        self, transport: asyncio.Transport, data: memoryview, quiet_s: float, ended: Callable[[Move], None]
    ) -> Move | None:
        """Begin to send; None where the loop has to. Nothing else may be written until it has ended."""
        return self._try_start(transport, data, quiet_s, ended, receives=False)

    def try_receive(
        self, transport: asyncio.Transport, into: memoryview, quiet_s: float, ended: Callable[[Move], None]
    ) -> Move | None:
        """Begin to fill ``into``; None where the loop has to. The transport has to be paused until it has ended.

        Parameters
        ----------
        quiet_s
            The move fails with `TimeoutError` where nothing moves for so long.
        ended
            Called on the loop once, when the thread is gone.
        """
        return self._try_start(transport, into, quiet_s, ended, receives=True)

    def _try_start(
        self,
        transport: asyncio.Transport,
        data: memoryview,
        quiet_s: float,
        ended: Callable[[Move], None],
        *,
        receives: bool,
    ) -> Move | None:
        if (
            not self._free
            or len(data) < LARGE_BYTES
            or transport.get_extra_info("sslcontext") is not None
            or transport.is_closing()
            or transport.get_write_buffer_size()
            or (connected := transport.get_extra_info("socket")) is None
        ):
            return None
        try:
            duplicate = socket.socket(
                connected.family, connected.type, connected.proto, fileno=os.dup(connected.fileno())
            )
        except OSError:
            # Out of descriptors, most likely: the loop needs none.
            return None
        duplicate.settimeout(quiet_s)
        self._free -= 1

        def end() -> None:
            self._free += 1
            ended(move)

        move = Move(duplicate, data, asyncio.get_running_loop(), end)
        try:
            _thread.start_new_thread(move.receive if receives else move.send, ())
        except RuntimeError:
            self._free += 1
            duplicate.close()
            return None
        return move


class Move:
    """Bytes on their way in one direction."""

    __slots__ = ("_data", "_end", "_lock", "_loop", "_size", "_socket", "error", "moved")

    def __init__(
        self,
        duplicate: socket.socket,
        data: memoryview,
        loop: asyncio.AbstractEventLoop,
        end: Callable[[], None],
    ) -> None:
        self._socket = duplicate
        self._data = data
        self._size = len(data)
        self._loop = loop
        self._end = end
        self._lock = threading.Lock()
        self.moved = 0
        """Bytes so far."""
        self.error: Exception | None = None
        """Why it ended before its time; None also where the peer closed the connection."""

    @property
    def is_complete(self) -> bool:
        """Whether all bytes were moved."""
        return self.moved == self._size

    def stop(self) -> None:
        """Make the thread end at once; the connection is of no use afterwards."""
        # Not while the thread closes: the number would be somebody else's already.
        with self._lock, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    # -- in the thread ---------------------------------------------------------------------------------------------

    def send(self) -> None:
        """Send everything."""
        self._run(self._send)

    def receive(self) -> None:
        """Receive until everything is there, or the peer closes the connection."""
        self._run(self._receive)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.error = error.with_traceback(None)
        self._data = _NOTHING
        with self._lock:
            self._socket.close()
        # A loop that is closed waits for nothing any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end)

    def _send(self) -> None:
        while self.moved < self._size:
            count = self._socket.send(self._data[self.moved :])
            if self.moved + count == self._size:
                # Whoever sees that all is sent counts its memory as free.
                self._data = _NOTHING
            self.moved += count

    def _receive(self) -> None:
        least, most = 1, _LEAST_RECEIVED
        while (left := self._size - self.moved) > 0:
            if least != min(left, most):
                least = min(left, most)
                self._wake_at(least)
            try:
                count = self._socket.recv_into(self._data[self.moved :])
            except TimeoutError:
                if least == 1:
                    raise
                # Less came than wakes us, maybe: a slow line.
                most = 1
                continue
            if not count:
                return
            self.moved += count
        if least > 1:
            self._wake_at(1)

    def _wake_at(self, least_bytes: int) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least_bytes)
