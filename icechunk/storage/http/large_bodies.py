"""Large bodies of requests on plain connections, sent by a thread each.

Megabytes cost milliseconds of system calls, most of it in the kernel, without the interpreter's lock. On the loop's
thread they hold up everything else; in a thread they go on beside it. A thread sends one body, on a duplicate of the
connection's socket: even if the connection is closed meanwhile, the thread never touches a descriptor that was reused
since. To receive large answers so gains nothing: the loop does it in place, with a fifth less CPU than
threads that wait for the interpreter's lock at each wake-up.

The loop decides everything. A thread only moves bytes, counts them, and notifies the loop once that it has ended.
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

from icechunk.storage.http.messages import LARGE_BYTES

__all__ = ["Move", "Threads"]

_NOTHING: Final = memoryview(b"")
_POSSIBLE: Final = sys.platform != "win32"


class Threads:
    """Number of threads that may send bodies at the same time, on one event loop; the loop sends the others."""

    def __init__(self, limit: int) -> None:
        self._free = limit if _POSSIBLE else 0

    def try_send(
        self, transport: asyncio.Transport, data: memoryview, quiet_s: float, ended: Callable[[Move], None]
    ) -> Move | None:
        """Begin to send; None where the loop has to. Nothing else may be written until it has ended.

        Parameters
        ----------
        quiet_s
            The move fails with `TimeoutError` where nothing moves for so long.
        ended
            Called on the loop once, when the thread is gone.
        """
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
            # Most likely there are no descriptors left: the loop needs none.
            return None
        duplicate.settimeout(quiet_s)
        self._free -= 1

        def end() -> None:
            self._free += 1
            ended(move)

        move = Move(duplicate, data, asyncio.get_running_loop(), end)
        try:
            _thread.start_new_thread(move.send, ())
        except RuntimeError:
            self._free += 1
            duplicate.close()
            return None
        return move


class Move:
    """Bytes on their way to the peer."""

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
        self.moved: int = 0
        """Bytes so far."""
        self.error: Exception | None = None
        """Why it ended before its time."""

    @property
    def is_complete(self) -> bool:
        """Whether all bytes were moved."""
        return self.moved == self._size

    def stop(self) -> None:
        """Make the thread end at once; the connection is of no use afterwards."""
        # Not while the thread closes: the descriptor's number could be reused already.
        with self._lock, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    # -- in the thread ---------------------------------------------------------------------------------------------

    def send(self) -> None:
        """Send everything."""
        try:
            self._send()
        except Exception as error:
            self.error = error.with_traceback(None)
        self._data = _NOTHING
        with self._lock:
            self._socket.close()
        # The loop is closed, and nothing waits for the transfer.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end)

    def _send(self) -> None:
        while self.moved < self._size:
            count = self._socket.send(self._data[self.moved :])
            if self.moved + count == self._size:
                # The memory counts as free once all of it was sent.
                self._data = _NOTHING
            self.moved += count
