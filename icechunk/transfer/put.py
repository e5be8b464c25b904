"""The put pool: write-behind of chunk objects, in bounded memory.

`PutPool.put` takes the bytes, starts the upload and returns; nothing of it is visible before the commit, so no
promise changes. The commit calls `PutPool.flush`, which returns only when every byte is durable. On a local disk,
writing takes no longer than a copy, and durability takes long. There `put` waits until the object is written, and
`flush` makes all objects durable at once, so that nothing is written to the folder after a call has returned.

Ownership: an upload runs as a task of the loop on which it was put, but the *bytes* belong to the pool until they are
durable. A flush on another loop (zarr's synchronous API writes on zarr's loop, then the user commits from another one)
therefore waits for uploads that other loops started. If such a loop has stopped, its task was cancelled, or the loop
does not respond because its thread waits for this very flush, the flush uploads those bytes again itself. Object ids
are random, so writing the same bytes to the same key twice is harmless.

Memory: all writable sessions of a repository share one bound (`PutMemory`). Bytes are reserved before they are taken,
first come, first served. Bytes of failed uploads stay in memory. A caller that finds the memory full of them, or of
packs that no task is sending, sends them, whichever session they belong to, and raises their error. So the bound also
holds while the storage fails. The bytes of each session are counted separately, so that the room of a session that was
dropped without a commit is released automatically.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import field
from functools import partial
from typing import Any, Final, Protocol

from icechunk.errors import AccessDeniedError, StorageError
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.twins import blocked_loop
from icechunk.storage.port import Put, Storage
from icechunk.transfer.limiter import WRITE, Gates

__all__ = ["Holding", "PutMemory", "PutPool", "Room"]


@dataclass(slots=True, eq=False)
class Holding:
    """The bytes that one session holds."""

    bytes: int = 0


@dataclass(slots=True, eq=False)
class Room:
    """A caller that waits for room."""

    size: int
    holding: Holding
    owner: Holder
    woken: concurrent.futures.Future[bool] = field(default_factory=concurrent.futures.Future)
    """True: the room is reserved. False: the waiter should check the state again."""


class Holder(Protocol):
    """The owner of reserved room: the put pool of a session."""

    @property
    def has_pending_errors(self) -> bool:
        """Whether an upload failed and the session has not been notified."""
        ...

    @property
    def is_still(self) -> bool:
        """Whether none of its bytes is being uploaded."""
        ...


class PutMemory:
    """Bytes of one repository that are not durable yet, in all loops and threads.

    Every change is made under ``lock``; no method waits.

    Parameters
    ----------
    max_bytes
        Largest number of bytes; a single object that is larger is admitted alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.lock: threading.Lock = threading.Lock()
        self.waiting: deque[Room] = deque()
        self._bytes = 0
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()
        # A finaliser may run anywhere, also while the lock is held, so it only appends a note.
        self._dropped: deque[Holding] = deque()

    @property
    def bytes(self) -> int:
        """Bytes reserved."""
        return self._bytes

    def join(self, holder: Holder) -> Holding:
        """Count a session's bytes from now on, and for as long as ``holder`` lives."""
        holding = Holding()
        with self.lock:
            # The notes are otherwise read when room is reserved, which sessions with small writes never do.
            self._collect()
            self._holders.add(holder)
        weakref.finalize(holder, self._dropped.append, holding).atexit = False
        return holding

    def holders(self) -> list[Holder]:
        """All owners that may hold bytes."""
        with self.lock:
            return list(self._holders)

    def fits(self, size_bytes: int) -> bool:
        """Under the lock: whether ``size_bytes`` more bytes may be reserved now."""
        self._collect()
        return not self._bytes or self._bytes + size_bytes <= self.max_bytes

    def add(self, holding: Holding, size_bytes: int) -> None:
        """Under the lock: add this number of bytes (negative: subtract) to the session's bytes in memory."""
        holding.bytes += size_bytes
        self._bytes += size_bytes

    def is_still(self) -> bool:
        """Under the lock: whether nothing is being uploaded that could make room."""
        return all(holder.is_still for holder in list(self._holders))

    def let_in(self) -> None:
        """Under the lock: reserve room for the next waiters, and wake the first if it has to send bytes itself."""
        self.admit()
        if (
            self.waiting
            and not self.waiting[0].woken.done()
            and (self.waiting[0].owner.has_pending_errors or self.is_still())
        ):
            self.waiting[0].woken.set_result(False)

    def admit(self) -> None:
        """Under the lock: reserve room for the next waiters."""
        while self.waiting and self.fits(self.waiting[0].size):
            room = self.waiting.popleft()
            self.add(room.holding, room.size)
            if room.woken.done():
                room.woken = concurrent.futures.Future()
            room.woken.set_result(True)

    def _collect(self) -> None:
        while self._dropped:
            holding = self._dropped.popleft()
            self.add(holding, -holding.bytes)


_LEFT_TO_PUT: Final = 4
"""Objects that a put makes durable as soon as threads for them would."""
PATIENCE_S = 1.0
"""Seconds after which a loop that does not respond is assumed to wait for this caller."""

# A loop refers to its tasks weakly: an upload that another loop has taken over, or whose session is gone, would be
# destroyed in the middle of its request.
_uploads: set[asyncio.Task[None]] = set()


@dataclass(slots=True, eq=False)
class _Pending:
    """Bytes of one object that are not durable yet."""

    key: str
    data: bytes | memoryview
    loop: asyncio.AbstractEventLoop | None
    """The loop whose task uploads them; None if no task does."""
    done: concurrent.futures.Future[None] = field(default_factory=concurrent.futures.Future)
    """Resolves when the present attempt has ended; the pool's lock guards its replacement."""
    task: asyncio.Task[None] | None = None
    """The present attempt."""
    error: BaseException | None = None
    """Error of the last attempt; None: it has not failed."""


class HoldsBack(Protocol):
    """Holds uploads back, so that they may become fewer and larger."""

    def send_held_back(self) -> None:
        """Start them now, on the running loop: no upload in flight could make room."""


class PutPool:
    """Uploads in flight for one writable session, shared by every loop and thread.

    Parameters
    ----------
    storage
        Where objects go, with ``kind="chunk"``.
    memory
        Bounds the bytes held; `put` waits while it is full.
    gates
        Bound the uploads in flight, in each loop.
    patience_s
        Time in seconds within which another loop must respond.
    """

    def __init__(self, storage: Storage, *, memory: PutMemory, gates: Gates, patience_s: float = PATIENCE_S) -> None:
        self._storage = storage
        self._memory = memory
        self._gates = gates
        self._patience_s = patience_s
        self._pending: dict[str, _Pending] = {}
        self._unsynced: dict[str, bool] = {}
        """Keys of objects that are written and not durable yet, oldest first; True: a sync failed, so they may be
        lost."""
        self._holding = memory.join(self)
        self._lock = memory.lock
        self._pending_errors: list[_Pending] = []
        """Failed uploads whose error has not been raised yet."""
        self._holds_back: weakref.ref[HoldsBack] | None = None

    def holds_back(self, holder: HoldsBack) -> None:
        """Say which object holds uploads back, to be asked for them when the pool needs room. It is kept weakly."""
        # A session that is dropped goes at once, not with the next collection of cycles.
        self._holds_back = weakref.ref(holder)

    def _send_held_back(self) -> None:
        holder = None if self._holds_back is None else self._holds_back()
        if holder is not None:
            holder.send_held_back()

    @property
    def is_durable(self) -> bool:
        """Whether everything taken so far is durable before what is put from now on, or forgotten."""
        return not self._pending and not self._unsynced

    @property
    def writes_through(self) -> bool:
        """Whether `put` waits until the object is written, so that nothing is written after it returns."""
        return self._storage.defers_syncs

    @property
    def in_flight(self) -> int:
        """Objects that are not written yet."""
        return len(self._pending)

    @property
    def held_bytes(self) -> int:
        """Bytes that are not durable yet, and bytes reserved for more."""
        return self._holding.bytes

    @property
    def has_pending_errors(self) -> bool:
        """Whether an upload failed whose error has not been raised yet."""
        return bool(self._pending_errors)

    @property
    def is_still(self) -> bool:
        """Whether nothing is being uploaded; under the memory's lock."""
        return all(item.loop is None for item in self._pending.values())

    def pending(self, key: str) -> bytes | None:
        """Bytes of an object that is not durable yet, so that a session can read its own writes; None once it is
        durable."""
        item = self._pending.get(key)
        return bytes(item.data) if item is not None else None

    @property
    def is_starving(self) -> bool:
        """Whether a caller waits for room while no upload in flight could make it."""
        if not self._memory.waiting:
            return False
        with self._lock:
            return self._memory.is_still()

    async def put(self, key: str, data: bytes) -> None:
        """Take an object and upload it in the background. Waits, and raises, as `reserve` and `written` do.

        After cancellation the object is either not taken or being uploaded.
        """
        await self.reserve(len(data))
        self.take(key, data)
        await self.written(key)

    async def written(self, key: str) -> None:
        """If `writes_through`: wait until an object that was taken is written, or has failed.

        Raises
        ------
        StorageError
            Some object could not be written, as `reserve` says.
        """
        item = self._pending.get(key)
        if item is None or not self.writes_through:
            return
        await asyncio.wait({asyncio.wrap_future(item.done)})
        self._raise_pending_errors()

    async def reserve(self, size_bytes: int) -> None:
        """Wait until ``size_bytes`` bytes fit, and keep that room for `take` or `release`.

        Raises
        ------
        StorageError
            An earlier upload failed for good. It is raised once; the bytes are kept, and `flush` tries again, as
            does a later call that finds the memory full. No room is reserved.
        """
        self._raise_pending_errors()
        if self.reserve_nowait(size_bytes):
            return
        memory = self._memory
        with self._lock:
            room = Room(size_bytes, self._holding, self)
            memory.waiting.append(room)
        resent: set[_Pending] = set()
        try:
            while not await self._woken(room, resent):
                with self._lock:
                    if room in memory.waiting:
                        room.woken = concurrent.futures.Future()
                self._raise_pending_errors(resent)
        except BaseException:
            with self._lock:
                if room in memory.waiting:
                    memory.waiting.remove(room)
                else:
                    memory.add(self._holding, -size_bytes)
                memory.let_in()
            raise

    def reserve_nowait(self, size_bytes: int) -> bool:
        """Reserve the room if that is possible at once; returns whether it was. False while an error is pending, which
        `reserve` raises."""
        memory = self._memory
        if self._pending_errors:
            return False
        with self._lock:
            if memory.waiting or not memory.fits(size_bytes):
                return False
            memory.add(self._holding, size_bytes)
            return True

    def take(self, key: str, data: bytes | memoryview) -> None:
        """Take an object for which room is reserved, and start its upload on the running loop.

        Memory that may change later is only for callers that wait until it is `written`.
        """
        item = _Pending(key, data, asyncio.get_running_loop())
        with self._lock:
            self._pending[key] = item
        self._start(item)

    def wrote(self, key: str) -> None:
        """An object of the session was written elsewhere, unsynced; the next `flush` makes it durable too."""
        if self.writes_through:
            with self._lock:
                self._unsynced[key] = False

    def release(self, size_bytes: int) -> None:
        """Return reserved room for bytes that will not be taken."""
        with self._lock:
            self._memory.add(self._holding, -size_bytes)
            self._memory.let_in()

    async def flush(self) -> None:
        """Return once everything taken before the call is durable before what is put from now on (`Storage.barrier`).

        Raises
        ------
        StorageError
            Some object could not be written. All bytes are kept; a later flush tries again.
        """
        await self._finish()
        await self._sync()

    async def finish_writes(self) -> list[str]:
        """As `flush`, but that a few objects may be left to be made durable by the put that refers to them.

        Returns
        -------
        list[str]
            Their keys, for `Storage.put_before`; `synced` is to say what became of them.
        """
        await self._finish()
        with self._lock:
            keys = list(self._unsynced)
        self.require_kept(keys)
        if len(keys) <= _LEFT_TO_PUT:
            return keys
        await self._sync()
        return []

    def require_kept(self, keys: Iterable[str]) -> None:
        """Raise `StorageError` where one of these objects, which were written unsynced, may be lost."""
        lost = next((key for key in keys if self._unsynced.get(key)), None)
        if lost is not None:
            raise StorageError(
                f"the disk lost object {lost!r} after it was written; nothing was committed. Look at the disk, "
                "and repeat the work in a new session"
            )

    def synced(self, keys: Iterable[str], *, lost: bool = False) -> None:
        """Objects that `finish_writes` left are durable now, or may be lost."""
        with self._lock:
            for key in keys:
                if key in self._unsynced and lost:
                    self._unsynced[key] = True
                else:
                    self._unsynced.pop(key, None)

    async def _finish(self) -> None:
        """Return once everything taken before the call is written; where syncs are not deferred, it is durable then."""
        with self._lock:
            wanted = list(self._pending.values())
            self._pending_errors = [item for item in self._pending_errors if item.error is not None]
        tried: set[_Pending] = set()
        unresponsive: set[asyncio.AbstractEventLoop] = set()
        while items := [item for item in wanted if self._is_pending(item) and item not in tried]:
            adopted = self._adopt(items, unresponsive)
            for item in items:
                await self._wait(item, unresponsive)
                if item.error is not None and item in adopted:
                    tried.add(item)
        failed = [item for item in tried if item.error is not None]
        if failed:
            with self._lock:
                self._pending_errors.clear()
            error = failed[0].error
            message = (
                f"{len(failed)} chunk objects could not be written, the first is {failed[0].key!r}: {error}; nothing "
                "was committed, and committing again tries again"
            )
            raise _larger(error, message) from error

    async def _sync(self) -> None:
        with self._lock:
            keys = list(self._unsynced)
        self.require_kept(keys)
        if not keys:
            return
        try:
            await self._storage.barrier(keys)
        except StorageError:
            with self._lock:
                # A system reports a failed write once: a second sync would find nothing left to write, and succeed.
                self._unsynced.update(dict.fromkeys((key for key in keys if key in self._unsynced), True))
            raise
        with self._lock:
            for key in keys:
                self._unsynced.pop(key, None)

    def discard(self) -> None:
        """Drop all bytes that have not been uploaded, and every failure: their session has ended."""
        with self._lock:
            items = list(self._pending.values())
            self._pending.clear()
            self._unsynced.clear()
            self._pending_errors.clear()
            self._memory.add(self._holding, -sum(len(item.data) for item in items))
            self._memory.let_in()
        for item in items:
            if item.loop is not None and item.task is not None:
                with contextlib.suppress(RuntimeError):  # its loop was closed
                    item.loop.call_soon_threadsafe(item.task.cancel)

    # -- uploads -------------------------------------------------------------------------------------------------

    def _adopt(self, items: Iterable[_Pending], unresponsive: set[asyncio.AbstractEventLoop]) -> set[_Pending]:
        """Upload on this loop those items that no other loop will upload."""
        here = asyncio.get_running_loop()
        blocked = blocked_loop.get()
        with self._lock:
            # In the order in which they were taken, which the order of a set of objects would not be.
            adopted = [
                item
                for item in items
                if self._is_pending(item)
                and (
                    item.loop is None
                    or not item.loop.is_running()
                    or (item.loop is not here and (item.loop is blocked or item.loop in unresponsive))
                )
            ]
            for item in adopted:
                item.loop, item.done, item.error = here, concurrent.futures.Future(), None
        for item in adopted:
            self._start(item)
        return set(adopted)

    def _start(self, item: _Pending) -> None:
        item.task = asyncio.ensure_future(self._upload(item, item.done))
        _uploads.add(item.task)
        item.task.add_done_callback(_uploads.discard)
        # A task cancelled before its first step never runs its own clean-up.
        item.task.add_done_callback(partial(self._end_if_cancelled, item, item.done))

    async def _upload(self, item: _Pending, done: concurrent.futures.Future[None]) -> None:
        gate, size = self._gates.here(), len(item.data)
        await gate.enter(size, WRITE)
        try:
            if self._storage.defers_syncs:
                await self._storage.put_unsynced([Put(item.key, item.data)])
            else:
                await self._storage.put(item.key, item.data, kind="chunk")
        except Exception as error:
            self._end(item, done, error)
        else:
            self._end(item, done, None)
        finally:
            gate.leave(size)

    def _end_if_cancelled(
        self, item: _Pending, done: concurrent.futures.Future[None], task: asyncio.Task[None]
    ) -> None:
        if not done.done():
            self._end(item, done, asyncio.CancelledError())
        if not task.cancelled():
            task.exception()  # marks it as seen: a KeyboardInterrupt has reached the loop itself

    def _end(self, item: _Pending, done: concurrent.futures.Future[None], error: BaseException | None) -> None:
        with self._lock:
            if not self._is_pending(item):
                pass  # durable by another attempt, or discarded
            elif error is None:
                del self._pending[item.key]
                if self._storage.defers_syncs:
                    self._unsynced[item.key] = False
                self._memory.add(self._holding, -len(item.data))
            elif item.done is done:
                item.loop = None
                # A cancelled task says nothing about the storage: the next flush uploads again.
                item.error = None if isinstance(error, asyncio.CancelledError) else error
                if item.error is not None:
                    self._pending_errors.append(item)
            self._memory.let_in()
        if not done.done():
            done.set_result(None)

    def _is_pending(self, item: _Pending) -> bool:
        return self._pending.get(item.key) is item

    # -- waiting -------------------------------------------------------------------------------------------------

    async def _woken(self, room: Room, resent: set[_Pending]) -> bool:
        """Wait for room. If no upload makes progress, send the bytes of every session; these are added to
        ``resent``."""
        unresponsive: set[asyncio.AbstractEventLoop] = set()
        while not room.woken.done():
            loops = self._resend(unresponsive, resent)
            if not await self._within_patience(room.woken):
                for loop in loops - unresponsive:
                    if not await self._answers(loop):
                        unresponsive.add(loop)
        return room.woken.result()

    def _resend(
        self, unresponsive: set[asyncio.AbstractEventLoop], resent: set[_Pending]
    ) -> set[asyncio.AbstractEventLoop]:
        """If no upload makes progress, send all bytes; returns the other loops that have uploads in flight."""
        # A function, so that no local variable keeps a session alive that is dropped during a wait.
        pools = [pool for pool in self._memory.holders() if isinstance(pool, PutPool)]
        with self._lock:
            self._memory.admit()
            still = self._memory.is_still()
            items = {pool: list(pool._pending.values()) for pool in pools}
        if still:
            for pool in pools:
                pool._send_held_back()
        if still or unresponsive:
            for pool in pools:
                resent |= pool._adopt(items[pool], unresponsive)
        here = asyncio.get_running_loop()
        return {item.loop for some in items.values() for item in some if item.loop not in (None, here)}

    async def _wait(self, item: _Pending, unresponsive: set[asyncio.AbstractEventLoop]) -> None:
        """Wait until the present attempt has ended, or its loop is found to be unresponsive."""
        done, loop, here = item.done, item.loop, asyncio.get_running_loop()
        while loop not in unresponsive and not await self._within_patience(done):
            if loop is not None and loop is not here and not await self._answers(loop):
                unresponsive.add(loop)

    async def _within_patience(self, future: concurrent.futures.Future[Any]) -> bool:
        if not future.done():
            await asyncio.wait({asyncio.wrap_future(future)}, timeout=self._patience_s)
        return future.done()

    async def _answers(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether a loop of another thread responds."""
        if not loop.is_running():
            return False
        answer: concurrent.futures.Future[None] = concurrent.futures.Future()
        try:
            loop.call_soon_threadsafe(answer.set_result, None)
        except RuntimeError:
            return False  # it was closed
        return await self._within_patience(answer)

    def _raise_pending_errors(self, resent: Collection[_Pending] = ()) -> None:
        failed = next((item for item in resent if item.error is not None), None)
        if self._pending_errors:
            with self._lock:
                while self._pending_errors:
                    item = self._pending_errors.pop()
                    if item.error is not None and self._is_pending(item):
                        failed = item
                        break
        if failed is None:
            return
        raise _larger(
            failed.error,
            f"an earlier chunk could not be written to {failed.key!r}: {failed.error}; "
            "it is kept and the commit tries again",
        ) from failed.error


def _larger(error: BaseException | None, message: str) -> StorageError:
    """The error that a session gets for a failed upload; it names the missing right, if that is the reason."""
    return error.with_message(message) if isinstance(error, AccessDeniedError) else StorageError(message)
