"""The put pool: write-behind of chunk objects, in bounded memory.

`PutPool.put` takes the bytes, starts the upload and returns; nothing of it is visible before the commit, so no
promise changes. The commit calls `PutPool.flush`, which returns only when every byte is durable.

Who owns what: an upload runs as a task of the loop on which it was put, but the *bytes* belong to the pool until
they are durable. So a flush on another loop (zarr's synchronous API writes on zarr's loop, then the user commits
from his) waits for what others started. Where that loop has stopped, the task was cancelled, or the loop is the very
one whose thread waits for this flush, it uploads those bytes again itself: object ids are random, so the same bytes
at the same key twice are harmless.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from dataclasses import dataclass, field
from functools import partial

import anyio

from icechunk.errors import StorageError
from icechunk.storage.base import Storage
from icechunk.sync import blocked_loop

__all__ = ["PutPool"]


@dataclass(slots=True, eq=False)
class _Pending:
    """Bytes on their way."""

    key: str
    data: bytes
    loop: asyncio.AbstractEventLoop | None
    """The loop whose task uploads them; None when nobody does."""
    done: concurrent.futures.Future[None] = field(default_factory=concurrent.futures.Future)
    """Resolves when the present attempt has ended; the pool's lock guards its replacement."""
    error: BaseException | None = None
    """Why the last attempt failed."""


class PutPool:
    """Uploads in flight for one writable session, seen from every loop and thread.

    Parameters
    ----------
    storage
        Where objects go, with ``kind="chunk"``.
    max_bytes
        Bytes held at the most; the next `put` waits while they are reached. One object larger than that
        travels alone.
    max_requests
        Uploads in flight at the most, in each loop.
    """

    def __init__(self, storage: Storage, *, max_bytes: int, max_requests: int) -> None:
        self._storage = storage
        self._max_bytes = max_bytes
        self._max_requests = max_requests
        self._pending: dict[str, _Pending] = {}
        self._bytes = 0
        self._lock = threading.Lock()
        self._limiters: dict[int, tuple[asyncio.AbstractEventLoop, anyio.CapacityLimiter]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._news: list[_Pending] = []
        """Failures that nobody has been told of."""

    @property
    def in_flight(self) -> int:
        """Objects that are not durable yet."""
        return len(self._pending)

    def pending(self, key: str) -> bytes | None:
        """Bytes of an object on its way, so that a session can read what it wrote; None once it is durable."""
        item = self._pending.get(key)
        return item.data if item is not None else None

    async def put(self, key: str, data: bytes) -> None:
        """Take an object and upload it behind the caller's back.

        Waits only while the pool is full. After cancellation the object is either not taken or on its way.

        Raises
        ------
        StorageError
            An earlier upload failed for good. It is raised once here; the bytes are kept, and `flush` tries again.
        """
        await self.wait_for_room(len(data))
        self.take(key, data)

    async def wait_for_room(self, size_bytes: int) -> None:
        """Wait until so many bytes fit in. Raises as `put` does."""
        self._raise_news()
        while (busy := self._oldest_if_full(size_bytes)) is not None:
            await _wait(busy)
            self._raise_news()

    def is_full(self, size_bytes: int) -> bool:
        """Whether that many bytes would have to wait."""
        return self._bytes + size_bytes > self._max_bytes

    def take(self, key: str, data: bytes) -> None:
        """Take an object without waiting for room, and start its upload on the running loop."""
        item = _Pending(key, data, asyncio.get_running_loop())
        with self._lock:
            self._pending[key] = item
            self._bytes += len(data)
        self._start(item)

    async def flush(self) -> None:
        """Return once everything taken so far is durable.

        Raises
        ------
        StorageError
            Some object could not be written. All bytes are kept; a later flush tries again.
        """
        here = asyncio.get_running_loop()
        blocked = blocked_loop.get()
        tried: set[_Pending] = set()
        while True:
            with self._lock:
                items = [item for item in self._pending.values() if item not in tried]
                adopted = {
                    item
                    for item in items
                    if item.loop is None or not item.loop.is_running() or (item.loop is blocked and blocked is not here)
                }
                for item in adopted:
                    item.loop, item.done, item.error = here, concurrent.futures.Future(), None
                self._news = [item for item in self._news if item.error is not None]
            for item in adopted:
                self._start(item)
            if not items:
                break
            for item in items:
                await _wait(item)
                if item.error is not None and item in adopted:
                    tried.add(item)
        failed = [item for item in tried if item.error is not None]
        if failed:
            with self._lock:
                self._news.clear()
            raise StorageError(
                f"{len(failed)} chunk objects could not be written, the first is {failed[0].key!r}: "
                f"{failed[0].error}; nothing was committed, and committing again tries again"
            ) from failed[0].error

    def discard(self) -> None:
        """Forget what has not been uploaded, and every failure: the session that wanted it is gone."""
        with self._lock:
            self._pending.clear()
            self._news.clear()
            self._bytes = 0

    def _start(self, item: _Pending) -> None:
        task = asyncio.ensure_future(self._upload(item, item.done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task cancelled before its first step never runs its own clean-up.
        task.add_done_callback(partial(self._end_if_cancelled, item, item.done))

    async def _upload(self, item: _Pending, done: concurrent.futures.Future[None]) -> None:
        try:
            async with self._limiter():
                await self._storage.put(item.key, item.data, kind="chunk")
        except asyncio.CancelledError as error:
            self._end(item, done, error)
            raise
        except BaseException as error:
            self._end(item, done, error)
        else:
            self._end(item, done, None)

    def _end_if_cancelled(self, item: _Pending, done: concurrent.futures.Future[None], _: object) -> None:
        if not done.done():
            self._end(item, done, asyncio.CancelledError())

    def _end(self, item: _Pending, done: concurrent.futures.Future[None], error: BaseException | None) -> None:
        with self._lock:
            if error is None:
                if self._pending.get(item.key) is item:
                    del self._pending[item.key]
                    self._bytes -= len(item.data)
            elif item.done is done:
                item.loop = None
                # A cancelled task says nothing about the storage: the next flush simply uploads again.
                item.error = None if isinstance(error, asyncio.CancelledError) else error
                if item.error is not None:
                    self._news.append(item)
        if not done.done():
            done.set_result(None)

    def _limiter(self) -> anyio.CapacityLimiter:
        loop = asyncio.get_running_loop()
        known = self._limiters.get(id(loop))
        if known is None or known[0] is not loop:
            known = self._limiters[id(loop)] = (loop, anyio.CapacityLimiter(self._max_requests))
        return known[1]

    def _oldest_if_full(self, size: int) -> _Pending | None:
        with self._lock:
            if not self._pending or self._bytes + size <= self._max_bytes:
                return None
            # Failed and abandoned objects keep their bytes, but waiting for them would never end.
            return next((item for item in self._pending.values() if not item.done.done()), None)

    def _raise_news(self) -> None:
        if not self._news:
            return
        with self._lock:
            failed = self._news.pop() if self._news else None
        if failed is None:
            return
        raise StorageError(
            f"an earlier chunk could not be written to {failed.key!r}: {failed.error}; "
            "it is kept and the commit tries again"
        ) from failed.error


async def _wait(item: _Pending) -> None:
    future = item.done
    if not future.done():
        await asyncio.shield(asyncio.wrap_future(future))
