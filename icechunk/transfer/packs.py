"""Packs: small chunks share chunk objects of a few MiB.

One request writes or reads hundreds of chunks: a native reference has an offset and a length, so every reader of the
format understands a pack. `put` returns a chunk's object and offset at once; the pack is uploaded when it is full, at
the flush before the commit, or when the put pool needs room and has nothing else to upload. A chunk that is overwritten
or deleted before the commit leaves its bytes unused in the pack, and nothing is moved for it.

A pack never crosses a fork: parent and child would fill one object with different bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import overload

from icechunk.errors import ErrorKind, SessionStateError
from icechunk.format.ids import ObjectId
from icechunk.format.keys import chunk_key
from icechunk.runtime.loops import running_loop
from icechunk.transfer.put import PutPool

__all__ = ["Packs"]


class _Pack:
    __slots__ = ("id", "octets", "size")

    def __init__(self, id: ObjectId) -> None:
        self.id = id
        # Each chunk is copied once: the contents are the object that is uploaded.
        self.octets = BytesIO()
        self.size = 0


class Packs:
    """Chunks of one writable session that are being stored, shared by every loop and thread of one process.

    Parameters
    ----------
    pool
        Uploads the objects, in bounded memory.
    new_object_id
        Source of ids.
    threshold_bytes
        Chunks of this size and above get an object of their own; 0: all do.
    size_bytes
        A pack of this size is uploaded.
    """

    def __init__(
        self, pool: PutPool, new_object_id: Callable[[], ObjectId], *, threshold_bytes: int, size_bytes: int
    ) -> None:
        self._pool = pool
        pool.holds_back(self)
        self._new_object_id = new_object_id
        self._threshold_bytes = threshold_bytes
        self._size_bytes = size_bytes
        self._open: _Pack | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    async def put(self, data: bytes | memoryview) -> tuple[ObjectId, int]:
        """Take a chunk, and return its future object and offset. Waits, and raises, as `PutPool.reserve` does.

        The memory of ``data`` must not change before this has returned.

        Raises
        ------
        SessionStateError
            This process was forked from the one that the session began in.
        """
        self._require_own_process()
        if len(data) >= self._threshold_bytes:
            id = self._new_object_id()
            await self._pool.reserve(len(data))
            # The caller waits until it is written there, and nothing refers to it before: a copy would take longer.
            self._pool.take(chunk_key(id), data if self._pool.writes_through else bytes(data))
            await self._pool.written(chunk_key(id))
            return id, 0
        await self._pool.reserve(len(data))
        place = self._pack(data)
        await self._pool.written(chunk_key(place[0]))
        return place

    def put_nowait(self, data: bytes | memoryview) -> tuple[ObjectId, int] | None:
        """The same for a chunk that is packed, if there is room at once and no error is pending; else None.

        If the pack is full then, also None where its caller has to wait until it is written (`PutPool.writes_through`),
        and in a thread without a running loop, which its upload needs.
        """
        if len(data) >= self._threshold_bytes or not self._pool.reserve_nowait(len(data)):
            return None
        if os.getpid() == self._pid:
            place = self._pack(data, sending=running_loop() is not None and not self._pool.writes_through)
            if place is not None:
                return place
        self._pool.release(len(data))
        return None

    @overload
    def _pack(self, data: bytes | memoryview) -> tuple[ObjectId, int]: ...
    @overload
    def _pack(self, data: bytes | memoryview, *, sending: bool) -> tuple[ObjectId, int] | None: ...
    def _pack(self, data: bytes | memoryview, *, sending: bool = True) -> tuple[ObjectId, int] | None:
        with self._lock:
            pack = self._open
            offset = 0 if pack is None else pack.size
            full = offset + len(data) >= self._size_bytes or self._pool.is_starving
            if full and not sending:
                return None
            if pack is None:
                pack = self._open = _Pack(self._new_object_id())
            pack.size += pack.octets.write(data)
            if full:
                self._open = None
                self._send(pack)
        return pack.id, offset

    @property
    def is_idle(self) -> bool:
        """Whether everything taken so far is durable, or forgotten."""
        return self._open is None and self._pool.is_durable

    def wrote(self, key: str) -> None:
        """As `PutPool.wrote`."""
        self._pool.wrote(key)

    async def flush(self) -> None:
        """Return once everything taken so far is durable. Raises as `PutPool.flush` and `put` do."""
        self._require_own_process()
        self.send_held_back()
        await self._pool.flush()

    async def finish_writes(self) -> list[str]:
        """As `PutPool.finish_writes`."""
        self._require_own_process()
        self.send_held_back()
        return await self._pool.finish_writes()

    def require_kept(self, keys: Iterable[str]) -> None:
        """As `PutPool.require_kept`."""
        self._pool.require_kept(keys)

    def synced(self, keys: Iterable[str], *, lost: bool = False) -> None:
        """As `PutPool.synced`."""
        self._pool.synced(keys, lost=lost)

    def pending(self, id: ObjectId, offset: int, length: int) -> bytes | None:
        """The bytes of a chunk that is not durable yet, so that a session reads its own writes; None once it is
        durable."""
        with self._lock:
            if self._open is not None and self._open.id == id:
                with self._open.octets.getbuffer() as octets:
                    return bytes(octets[offset : offset + length])
            if not self._pool.in_flight:
                return None
            data = self._pool.pending(chunk_key(id))
        return None if data is None else data[offset : offset + length]

    def discard(self) -> None:
        """Drop all bytes that have not been uploaded."""
        with self._lock:
            pack, self._open = self._open, None
        if pack is not None:
            self._pool.release(pack.size)
        self._pool.discard()

    def send_held_back(self) -> None:
        with self._lock:
            pack, self._open = self._open, None
            if pack is not None:
                self._send(pack)

    def _send(self, pack: _Pack) -> None:
        # Under the lock: a reader finds the bytes in the open pack or in the pool.
        self._pool.take(chunk_key(pack.id), pack.octets.getvalue())

    def _require_own_process(self) -> None:
        if os.getpid() != self._pid:
            raise SessionStateError(
                "a writable session does not cross a fork of its process: parent and child would write one object "
                "with different bytes. Open a writable session in the child",
                ErrorKind.COMMIT_NOT_ALLOWED,
            )
