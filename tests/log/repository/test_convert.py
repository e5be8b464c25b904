"""Conversion between log and repo object while others write, under lost, late and doubled requests."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from icechunk.errors import CommitOutcomeUnknown, IcechunkError, SessionStateError
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.repo.values import NewCommit
from icechunk.log.repository.convert import convert_log
from icechunk.log.repository.create import create_log, create_repo_object
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.entries.reader import read_slot
from icechunk.log.repository.events import TagCreated
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import Layout, RepositoryLog, SwapToken
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from tools.simulator.simulation import commit_proposal
from tools.simulator.storage import Faults, SimulatedStorage, SimulatedStore, VirtualLoop

CALM = Faults(lost=0, late=0, doubled=0, dropped=0, pause=0)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    # Failing checkpoints are what the simulator is made of.
    caplog.set_level(logging.CRITICAL)


class Crowd:
    """Writers that take the repository as they find it, and a converter."""

    def __init__(self, loop: VirtualLoop, seed: int) -> None:
        self.loop, self.rng, self.store = loop, random.Random(seed), SimulatedStore(loop)
        self.acknowledged: set[ObjectId] = set()
        self.failed: set[ObjectId] = set()
        self.unknown: dict[ObjectId, SwapToken] = {}
        self.conversions = 0

    def client(self, faults: Faults) -> tuple[Storage, Sources]:
        own = random.Random(self.rng.getrandbits(64))
        sources = Sources(
            wall_us=self.loop.now_us,
            elapsed_us=lambda: int(self.loop.time() * 1e6),
            random_bytes=own.randbytes,
            sleep=asyncio.sleep,
        )
        return SimulatedStorage(self.store, random.Random(self.rng.getrandbits(64)), faults), sources

    async def open(self, storage: Storage, sources: Sources) -> RepositoryLog:
        for _ in range(100):
            try:
                return await open_repository(storage, sources)
            except IcechunkError:
                await asyncio.sleep(1)
        raise AssertionError("cannot be opened")

    async def write(self, who: int) -> None:
        storage, sources = self.client(Faults(pause=0.0))
        log = await self.open(storage, sources)
        for i in range(8):
            id = ObjectId((who * 1000 + i + 1).to_bytes(12))
            propose = commit_proposal(id, "main", now_us=self.loop.now_us())
            for _ in range(20):
                try:
                    await log.append(propose, deadline_s=self.rng.choice([None, None, 3.0]))
                    self.acknowledged.add(id)
                except CommitOutcomeUnknown as error:
                    self.unknown[id] = error.token
                except SessionStateError:
                    # It has another layout by now: nothing landed.
                    await log.aclose()
                    log = await self.open(storage, sources)
                    continue
                except IcechunkError:
                    self.failed.add(id)
                break
            await asyncio.sleep(self.rng.random())
        await log.aclose()

    async def convert(self) -> None:
        storage, sources = self.client(Faults(pause=0.0))
        for _ in range(6):
            await asyncio.sleep(self.rng.random() * 2)
            log = await self.open(storage, sources)
            try:
                await convert_log(log, storage, sources, Layout.REPO if isinstance(log, LogLayout) else Layout.LOG)
                self.conversions += 1
            except IcechunkError:
                pass
            await log.aclose()

    async def run(self) -> list[str]:
        creator = await create_repo_object(*self.client(CALM))
        await creator.aclose()
        await asyncio.gather(self.convert(), *(self.write(who) for who in range(3)))
        log = await open_repository(*self.client(CALM))
        for id, token in self.unknown.items():
            (self.acknowledged if await log.settle(token) else self.failed).add(id)
        while self.store.travelling:
            await asyncio.gather(*self.store.travelling)
        state = await log.refresh()
        told = [update.change.snapshot async for update in log.updates() if isinstance(update.change, NewCommit)]
        linear = [record.id for record in state.ancestry(state.branches["main"])][:-1]
        await log.aclose()
        return [
            *(["a commit is in the ops log twice"] if len(told) != len(set(told)) else []),
            *(["the branch is not its ops log"] if linear != told else []),
            *(["acknowledged and lost"] if self.acknowledged - set(told) else []),
            *(["failed and there"] if self.failed & set(told) else []),
            *(["nothing happened"] if not self.acknowledged or not self.conversions else []),
        ]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_acknowledged_is_lost_while_the_layout_changes(seed: int) -> None:
    loop = VirtualLoop()
    try:
        assert loop.run_until_complete(Crowd(loop, seed).run()) == []
    finally:
        loop.close()


@pytest.mark.parametrize("landed", [True, False])
async def test_a_token_of_the_log_is_settled_after_the_conversion(landed: bool) -> None:
    storage = MemoryStorage()
    log = await create_log(storage)
    event = TagCreated(name="t", snapshot=FIRST_SNAPSHOT)
    await log.append(lambda _: [event])
    slot = await read_slot(storage, log.epoch, log.n)
    assert slot is not None
    token = SwapToken(
        epoch=log.epoch, n=log.n, nonces=(slot[0].nonce if landed else b"x" * 16,), known_us=slot[1].date_us
    )
    await convert_log(log, storage, SYSTEM, Layout.REPO)
    now = await open_repository(storage)
    assert await now.settle(token) is landed
    for each in (log, now):
        await each.aclose()
