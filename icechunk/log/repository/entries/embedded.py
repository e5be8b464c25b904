"""Files embedded in entries, and making objects of them (rule 15).

A small commit's files are in its entry, which alone makes them durable: every client that folds the entry has them.
They must be objects before a checkpoint passes the entry, since a client that opens from then on does not fold it.
So:

- the writer puts them in the background once its entry has landed, and not before its waiting callers, since a put
  takes as much of the loop's time as a third of a small commit, nor while other clients write too, whose checkpoints
  put them; if syncs are deferred, as on a local disk, it puts them before it notifies any caller, without waiting for
  the disk;
- a client that writes a checkpoint, or ends the log, first puts those after the marker of which it knows no object.

Both put with ``If-None-Match: *``, so neither disturbs the other, and a 412 means that the object exists. An object
that arrives late, even after a collection, has the bytes that belong to its random name: at worst it is garbage again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Final, Protocol

from icechunk.errors import IcechunkError
from icechunk.log.repository.entry import Entry
from icechunk.log.repository.objects import put_once, read_slot
from icechunk.runtime.clock import Sources
from icechunk.runtime.tasks import finish_task, run_jobs
from icechunk.storage.port import Absent, GetResult, Put, Storage

__all__ = ["Embedded", "EmbeddedFiles", "EmbeddedInTail", "make_durable"]

_LOG: Final = logging.getLogger(__name__)
_MAX_BYTES: Final = 32 * 1024 * 1024
_ATTEMPTS: Final = 4
_FIRST_PAUSE_S: Final = 0.1
_AT_ONCE: Final = 16
_SLOTS_AT_ONCE: Final = 64
"""Entries that are in memory at the same time while their files are made durable."""


class Embedded(Protocol):
    """The files embedded in the entries of one log."""

    async def materialize(self, after: int, end: int) -> None:
        """See to it that the files of the entries after a slot, up to another one (inclusive), exist as objects."""

    async def embedded_files(self, after: int, end: int) -> Mapping[str, bytes]:
        """The files of the entries after a slot, up to another one (inclusive), that have no known object."""


class EmbeddedInTail(Embedded):
    """Embedded files of a client that has just read the whole tail, or an entry of it, and has put nothing yet."""

    def __init__(self, storage: Storage, tail: Iterable[Entry]) -> None:
        self._storage = storage
        self._by_slot = {entry.n: entry.objects for entry in tail}

    async def materialize(self, after: int, end: int) -> None:
        files = await self.embedded_files(after, end)
        await run_jobs([partial(put_once, self._storage, key, data) for key, data in files.items()], limit=_AT_ONCE)

    async def embedded_files(self, after: int, end: int) -> Mapping[str, bytes]:
        return {key: data for n, files in self._by_slot.items() if after < n <= end for key, data in files.items()}


async def make_durable(storage: Storage, epoch: str, after: int, end: int) -> bool:
    """If syncs are deferred: make durable objects of the files of entries.

    Parameters
    ----------
    after, end
        The slots after ``after`` up to ``end`` (inclusive). A missing slot has been pruned, so its files are durable.

    Returns
    -------
    bool
        Whether slot ``end`` is there.
    """
    entries: list[tuple[Entry, GetResult] | None] = []
    for first in range(after + 1, end + 1, _SLOTS_AT_ONCE):
        slots = range(first, min(first + _SLOTS_AT_ONCE, end + 1))
        entries = await run_jobs([partial(read_slot, storage, epoch, n) for n in slots])
        files = [item for found in entries if found is not None for item in found[0].objects.items()]
        # Also those that are there: after a power failure they may be torn.
        await storage.put_unsynced([Put(key, data, Absent()) for key, data in files])
        await storage.barrier(key for key, _ in files)
    return bool(entries) and entries[-1] is not None


class EmbeddedFiles:
    """Embedded files that one client has read, and of which it knows no object. Belongs to one event loop.

    Bounded: past 32 MiB the oldest bytes go, and are read again from their slots should a checkpoint of this client
    need them. (A client that only reads never writes one.)
    """

    def __init__(self, storage: Storage, sources: Sources) -> None:
        self._storage = storage
        self._sources = sources
        self._by_slot: dict[int, dict[str, bytes]] = {}
        self._bytes = 0
        self.dropped: int = 0
        """The last slot whose bytes were dropped from memory; 0: none."""
        self._own: deque[int] = deque()
        self._putting = asyncio.Lock()
        """Held while files are put, so that none is put by the background and by a checkpoint at the same time."""
        self._closes = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        """Puts the files of this client's own entries."""

    def __len__(self) -> int:
        return sum(len(files) for files in self._by_slot.values())

    # -------------------------------------------------------------- knowing

    def remember(self, n: int, files: Mapping[str, bytes]) -> None:
        """An entry has been folded in which these are embedded."""
        if not files or n in self._by_slot:
            return
        self._by_slot[n] = dict(files)
        self._bytes += sum(map(len, files.values()))
        while self._bytes > _MAX_BYTES and len(self._by_slot) > 1:
            oldest = min(self._by_slot)
            self.dropped = max(self.dropped, oldest)
            self._forget(oldest)

    def forget_through(self, n: int) -> None:
        """A checkpoint holds the entries up to this one."""
        for slot in [slot for slot in self._by_slot if slot <= n]:
            self._forget(slot)

    def clear(self) -> None:
        """Another log, or another tail of it."""
        self._by_slot.clear()
        self._bytes = self.dropped = 0

    def find(self, key: str) -> bytes | None:
        """An embedded file of which no object is known; None: none of that name."""
        return next((files[key] for files in self._by_slot.values() if key in files), None)

    def all(self) -> dict[str, bytes]:
        """All of them, by key."""
        return {key: data for files in self._by_slot.values() for key, data in files.items()}

    def _forget(self, n: int) -> None:
        self._bytes -= sum(map(len, self._by_slot.pop(n, {}).values()))

    def _exists(self, n: int, key: str) -> None:
        files = self._by_slot.get(n, {})
        self._bytes -= len(files.pop(key, b""))
        if not files:
            self._by_slot.pop(n, None)

    # -------------------------------------------------------------- putting

    def put_soon(self, n: int, quiet: Callable[[], Awaitable[None]]) -> None:
        """An entry of this client's own has landed: put its files in the background, once ``quiet`` has returned, or at
        the latest when this client ends. ``quiet`` raises no error."""
        if n not in self._by_slot or self._closes.is_set():
            return
        self._own.append(n)
        if self.task is None or self.task.done():
            self.task = asyncio.get_running_loop().create_task(self._put_own(quiet), name="icechunk log files")

    async def _put_own(self, quiet: Callable[[], Awaitable[None]]) -> None:
        waits = [asyncio.ensure_future(quiet()), asyncio.ensure_future(self._closes.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        why: Exception | None = None
        for attempt in range(_ATTEMPTS):
            if attempt:
                await self._sources.sleep(_FIRST_PAUSE_S * 2**attempt)
            try:
                while self._own:
                    slots = tuple(self._own)
                    await self._put(slots)
                    for _ in slots:
                        self._own.popleft()
                return
            except (IcechunkError, OSError) as error:
                why = error
        # Nothing is lost: they stay in their entries, and the next checkpoint puts them first.
        self._own.clear()
        _LOG.warning("files of commits to %s are not put yet, a checkpoint will: %s", self._storage.describe(), why)

    async def materialize(self, after: int, end: int) -> None:
        """See to it that the files of the entries after slot ``after`` up to ``end`` exist as objects.

        Raises
        ------
        StorageError
            One of them could not be put.
        """
        await self._put([n for n in sorted(self._by_slot) if after < n <= end])

    async def materialize_dropped(self, epoch: str, after: int, end: int) -> None:
        """The same for entries whose bytes were dropped from memory: they are read again."""
        for n in range(after + 1, min(end, self.dropped) + 1):
            found = await read_slot(self._storage, epoch, n)
            if found is not None:
                await EmbeddedInTail(self._storage, [found[0]]).materialize(after, end)

    async def get(self, epoch: str, after: int, end: int) -> dict[str, bytes]:
        """The files of the entries after slot ``after`` up to ``end`` that have no known object."""
        found: dict[str, bytes] = {}
        for n in range(after + 1, end + 1):
            if n <= self.dropped and (slot := await read_slot(self._storage, epoch, n)) is not None:
                found |= slot[0].objects
            found |= self._by_slot.get(n, {})
        return found

    async def find_in_log(self, epoch: str, after: int, end: int, key: str) -> bytes | None:
        """Look for a file in the entries after slot ``after`` up to ``end``, also if its object is known."""
        for n in range(end, after, -1):
            found = await read_slot(self._storage, epoch, n)
            if found is not None and key in found[0].objects:
                return found[0].objects[key]
        return None

    async def find_dropped(self, epoch: str, after: int, key: str) -> bytes | None:
        """Look for a file in the entries whose bytes were dropped from memory."""
        return await self.find_in_log(epoch, after, self.dropped, key)

    async def _put(self, slots: Iterable[int]) -> None:
        async with self._putting:
            files = [(n, key, data) for n in slots for key, data in self._by_slot.get(n, {}).items()]
            if files:
                # In memory a put waits for nothing, and a task for each would take most of the time.
                in_memory = self._storage.batches_reads and not self._storage.defers_syncs
                limit = 1 if in_memory else _AT_ONCE
                await run_jobs([partial(self._put_one, *file) for file in files], limit=limit)

    async def _put_one(self, n: int, key: str, data: bytes) -> None:
        await put_once(self._storage, key, data)
        self._exists(n, key)

    async def finish(self, grace_s: float) -> None:
        """Begin no more; wait for those under way."""
        self._closes.set()
        await finish_task(self.task, grace_s)
