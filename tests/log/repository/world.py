"""A store, a clock and clients of a layout, for tests of its rules."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from icechunk.format.ids import ObjectId
from icechunk.format.repo.repo_info import NewCommit
from icechunk.log.repository import events as e
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.entry import encode_entry, slot_key
from icechunk.log.repository.event_json import encode_events
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import RepositoryLog
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from icechunk.testing.scripted import ManualClock, Request, Script, ScriptedStorage, Send, lost_answer
from tests.log.repository.strategies import an_id
from tools.simulator.simulation import commit_proposal

__all__ = [
    "DAY_S",
    "World",
    "held_back",
    "losing_the_answer",
    "open_log",
    "put_entry",
    "replaces_repo",
    "settled",
    "slots",
    "until",
    "waiting_for",
]

DAY_S = 24 * 3600.0


class World:
    """One store in memory, one clock, and as many clients of a layout as a test opens."""

    def __init__(self, create: Callable[..., Awaitable[Any]] = create_log) -> None:
        self._create = create
        self.clock = ManualClock()
        self.store = MemoryStorage(self.clock.sources())
        self.logs: list[RepositoryLog] = []

    async def create(self, **options: object) -> tuple[Any, ScriptedStorage]:
        storage = ScriptedStorage(self.store)
        log = await self._create(storage, self.clock.sources(), **options)
        self.logs.append(log)
        return log, storage

    async def open(self, *, skew_s: float = 0, **options: Any) -> tuple[Any, ScriptedStorage]:
        storage = ScriptedStorage(self.store)
        log = await open_repository(storage, self.clock.sources(skew_s=skew_s), **options)
        self.logs.append(log)
        return log, storage

    async def aclose(self) -> None:
        """End all clients; nothing of them may be left."""
        for log in self.logs:
            await log.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "the logs left tasks behind"

    def commit(self, i: int, branch: str = "main", parent: ObjectId | None = None) -> Any:
        return commit_proposal(an_id(i), branch, parent=parent, now_us=self.clock.now_us)

    async def history(self) -> list[ObjectId]:
        log = await open_repository(self.store, self.clock.sources())
        return [update.change.snapshot async for update in log.updates() if isinstance(update.change, NewCommit)][::-1]

    async def prune(self, epoch: str, last: int) -> None:
        """The deletions of a pruner after it has announced and waited."""
        self.clock.move(7.1 * DAY_S)
        await self.store.delete(slot_key(epoch, n) for n in range(1, last + 1))


async def open_log(storage: Storage, sources: Sources = SYSTEM) -> LogLayout:
    """`open_repository`, where it finds a log."""
    log = await open_repository(storage, sources)
    assert isinstance(log, LogLayout)
    return log


async def until(happened: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if happened():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never happened")


def slots(request: Request) -> bool:
    return request.verb == "put" and request.key.startswith("log/")


def replaces_repo(request: Request) -> bool:
    """Whether it is a PUT of ``repo``."""
    return request.verb == "put" and request.key == "repo"


def waiting_for(gate: asyncio.Event, matches: Callable[[Request], bool]) -> Script:
    """Requests that match wait at the gate."""

    async def script(request: Request, send: Send) -> object:
        if matches(request):
            await gate.wait()
        return await send()

    return script


def held_back(late: list[Send], matches: Callable[[Request], bool]) -> Script:
    """Requests that match get no answer; what is in ``late`` sends them after all."""

    async def script(request: Request, send: Send) -> object:
        if matches(request):
            late.append(send)
            raise lost_answer()
        return await send()

    return script


def losing_the_answer(storage: ScriptedStorage, matches: Callable[[Request], bool]) -> Script:
    """The first request that matches is executed, and its answer lost; later ones succeed."""

    async def script(request: Request, send: Send) -> object:
        answer = await send()
        if matches(request):
            storage.script = None
            raise lost_answer()
        return answer

    return script


async def settled(world: World) -> tuple[LogLayout, ScriptedStorage]:
    """A log whose store has been checked, so that only swaps are left to script."""
    log, storage = await world.create()
    await log.prepare_writes()
    return log, storage


async def put_entry(store: Storage, epoch: str, n: int, *events: e.Event, time_us: int = 1, **options: Any) -> None:
    """Write the entry of another client into a slot."""
    data = encode_entry(n=n, nonce=b"x" * 16, time_us=time_us, since_us=None, events=encode_events(events), **options)
    await store.put(slot_key(epoch, n), data)
