"""A store, a clock and clients of the log layout, for tests of its rules."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from icechunk.format.ids import ObjectId
from icechunk.format.repo_values import NewCommit
from icechunk.refs.create import create_log
from icechunk.refs.entry import slot_key
from icechunk.refs.log_layout import LogLayout
from icechunk.storage.memory import MemoryStorage
from icechunk.testing.scripted import ManualClock, Request, ScriptedStorage
from icechunk.testing.simulation import commit_proposal
from tests.refs.strategies import an_id

__all__ = ["DAY_S", "World", "settled", "slots", "until"]

DAY_S = 24 * 3600.0


class World:
    """One store in memory, one clock, and as many clients as a test opens."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MemoryStorage(self.clock.sources())
        self.logs: list[LogLayout] = []

    async def create(self, **options: object) -> tuple[LogLayout, ScriptedStorage]:
        storage = ScriptedStorage(self.store)
        log = await create_log(storage, self.clock.sources(), **options)
        self.logs.append(log)
        return log, storage

    async def open(self, *, skew_s: float = 0) -> tuple[LogLayout, ScriptedStorage]:
        storage = ScriptedStorage(self.store)
        log = await LogLayout.open(storage, self.clock.sources(skew_s=skew_s))
        self.logs.append(log)
        return log, storage

    def commit(self, i: int, branch: str = "main", parent: ObjectId | None = None):
        return commit_proposal(an_id(i), branch, parent=parent, now_us=self.clock.now_us)

    async def history(self) -> list[ObjectId]:
        log = await LogLayout.open(self.store, self.clock.sources())
        return [update.change.snapshot async for update in log.updates() if isinstance(update.change, NewCommit)][::-1]

    async def prune(self, epoch: str, last: int) -> None:
        """What a pruner does after it has announced and waited."""
        self.clock.move(7.1 * DAY_S)
        await self.store.delete(slot_key(epoch, n) for n in range(1, last + 1))


async def until(happened: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if happened():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never happened")


def slots(request: Request) -> bool:
    return request.verb == "put" and request.key.startswith("log/")


async def settled(world: World) -> tuple[LogLayout, ScriptedStorage]:
    """A log whose store has been checked, so that only swaps are left to script."""
    log, storage = await world.create()
    await log.prepare_writes()
    return log, storage
