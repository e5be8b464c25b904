"""The store of a simulation: a loop with a virtual clock, what is stored, and each client's faulty way to it."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from icechunk.errors import ObjectNotFoundError, PreconditionFailedError, StorageError
from icechunk.format.keys import snapshot_key, transaction_key
from icechunk.format.repo.codec import decode_repo
from icechunk.log.repository.marker import decode_marker
from icechunk.storage.port import (
    ANY,
    Absent,
    ByteRange,
    DeleteResult,
    GetResult,
    Matches,
    ObjectInfo,
    ObjectKind,
    Precondition,
    PutResult,
    Storage,
    Version,
)

__all__ = ["DAY_S", "Faults", "SimulatedStorage", "SimulatedStore", "VirtualLoop"]

DAY_S: Final = 86_400.0
_START_US: Final = 1_790_000_000_000_000


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting, moves the loop's clock to when something happens."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("simulation is stuck: nothing will ever happen")
        self.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which waiting takes no time."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def now_us(self) -> int:
        """Virtual time, µs since the epoch."""
        return _START_US + int(self._jumping.now_s * 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    data: bytes
    version: Version
    modified_us: int


class SimulatedStore:
    """What is stored, and everything that is still travelling towards it."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.objects: dict[str, _Stored] = {}
        self.checkpoints: list[tuple[str, int]] = []
        self.carried: dict[str, bytes] = {}
        """Every file that was ever to ride in an entry."""
        self.missing: list[str] = []
        """Of those, what a ``repo`` object named when there was no such object."""
        self.travelling: set[asyncio.Task[None]] = set()
        self._writes = 0

    def write(self, key: str, data: bytes, precondition: Precondition) -> PutResult:
        """Execute a PUT, now."""
        found = self.objects.get(key)
        match precondition:
            case Absent():
                if found is not None:
                    raise PreconditionFailedError(f"{key!r} exists")
            case Matches(version):
                if found is None or found.version != version:
                    raise PreconditionFailedError(f"{key!r} has changed")
            case _:
                pass
        self._writes += 1
        now_us = self.loop.now_us() // 1_000_000 * 1_000_000
        self.objects[key] = _Stored(data=data, version=Version(str(self._writes)), modified_us=now_us)
        if key == "repo":
            info = decode_repo(data)
            marker = decode_marker(info.extra)
            named = [key(id) for id in info.snapshots for key in (snapshot_key, transaction_key)]
            self.missing += [key for key in named if key in self.carried and not self._stands(key)]
            self.checkpoints.append(("", 0) if marker is None else (marker.epoch, marker.n))
        return PutResult(version=self.objects[key].version, date_us=now_us)

    def _stands(self, key: str) -> bool:
        found = self.objects.get(key)
        return found is not None and found.data == self.carried[key]

    def contents(self) -> dict[str, bytes]:
        """What is there, by key."""
        return {key: stored.data for key, stored in self.objects.items()}

    def write_later(self, delay_s: float, key: str, data: bytes, precondition: Precondition) -> None:
        """Execute a PUT after a delay; nobody hears of it."""

        async def travel() -> None:
            await asyncio.sleep(delay_s)
            try:
                self.write(key, data, precondition)
            except PreconditionFailedError:
                return

        task = self.loop.create_task(travel())
        self.travelling.add(task)
        task.add_done_callback(self.travelling.discard)


@dataclass(slots=True, kw_only=True)
class Faults:
    """Probabilities, per request."""

    lost: float = 0.05
    """Executed, but the answer does not arrive."""
    late: float = 0.04
    """No answer, and executed some time later."""
    doubled: float = 0.05
    """Executed, and executed again later."""
    dropped: float = 0.05
    """Neither executed nor answered."""
    pause: float = 0.004
    """The client stops for days, before the request leaves or before it sees the answer."""


class SimulatedStorage(Storage):
    """One client's way to the store."""

    def __init__(self, store: SimulatedStore, rng: random.Random, faults: Faults) -> None:
        self._store = store
        self._rng = rng
        self.faults = faults

    async def _way(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.001, 0.05))
        if self._rng.random() < self.faults.pause:
            await asyncio.sleep(self._rng.uniform(0.4, 9) * DAY_S)

    async def _read_fault(self) -> None:
        await self._way()
        if self._rng.random() < self.faults.dropped:
            await asyncio.sleep(1)
            raise StorageError("the answer to a read was lost")

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        await self._read_fault()
        found = self._store.objects.get(key)
        date_us = self._store.loop.now_us()
        await self._way()
        if found is None:
            raise ObjectNotFoundError(f"no object {key!r}")
        return GetResult(
            body=found.data,
            size=len(found.data),
            version=found.version,
            modified_us=found.modified_us,
            date_us=date_us // 1_000_000 * 1_000_000,
        )

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        content, rng, faults = bytes(data), self._rng, self.faults
        await self._way()
        fate = rng.random()
        if fate < faults.dropped + faults.late:
            patience_s = rng.uniform(0.5, 3)
            if fate < faults.late:
                # Often just when the client, out of patience, reads the slot and sends again.
                delay_s = patience_s + rng.choice((-0.5, 0.2, 0.2, 0.4, 20, 3600)) * rng.random()
                self._store.write_later(delay_s, key, content, precondition)
            await asyncio.sleep(patience_s)
            raise StorageError(f"PUT of {key!r} timed out")
        answer = self._store.write(key, content, precondition)
        if rng.random() < faults.doubled:
            self._store.write_later(rng.choice((0.5, 20, 3600)) * rng.random(), key, content, precondition)
        await self._way()
        if rng.random() < faults.lost:
            raise StorageError(f"the answer to PUT of {key!r} was lost")
        return answer

    async def head(self, key: str) -> ObjectInfo:
        await self._read_fault()
        found = self._store.objects.get(key)
        if found is None:
            raise ObjectNotFoundError(f"no object {key!r}")
        return ObjectInfo(key=key, size=len(found.data), version=found.version, modified_us=found.modified_us)

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        after = start_after or ""
        while True:
            await self._read_fault()
            keys = sorted(key for key in self._store.objects if key.startswith(prefix) and key > after)[:page_size]
            page = [
                ObjectInfo(key=key, size=len(found.data), version=found.version, modified_us=found.modified_us)
                for key in keys
                for found in (self._store.objects[key],)
            ]
            if page:
                yield page
            if len(page) < page_size:
                return
            after = page[-1].key

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        wanted = list(keys)
        await self._read_fault()
        for key in wanted:
            self._store.objects.pop(key, None)
        await self._way()
        if self._rng.random() < self.faults.lost:
            raise StorageError("the answer to a deletion was lost")
        return DeleteResult(deleted=len(wanted))

    async def copy(self, source: str, target: str) -> PutResult:
        await self._way()
        found = self._store.objects.get(source)
        if found is None:
            raise ObjectNotFoundError(f"no object {source!r}")
        return self._store.write(target, found.data, ANY)

    async def aclose(self) -> None:
        return None

    @property
    def supports_writes(self) -> bool:
        return True

    def describe(self) -> str:
        return "simulation"
