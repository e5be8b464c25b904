"""The repo-object layout: many writers, of whose requests some are lost, late or doubled."""

from __future__ import annotations

import asyncio
import random

import pytest

from icechunk.errors import (
    CommitOutcomeUnknown,
    IcechunkError,
)
from icechunk.format.ids import ObjectId
from icechunk.format.repo.values import NewCommit
from icechunk.log.repository.create import create_repo_object
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import SwapToken
from icechunk.runtime.clock import Sources
from icechunk.storage.port import Storage
from tools.simulator.simulation import commit_proposal
from tools.simulator.storage import Faults, SimulatedStorage, SimulatedStore, VirtualLoop


def _crowd(seed: int) -> list[str]:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(_crowd_on(loop, seed))
    finally:
        loop.close()


async def _crowd_on(loop: VirtualLoop, seed: int) -> list[str]:
    rng, store = random.Random(seed), SimulatedStore(loop)

    def client(faults: Faults) -> tuple[Storage, Sources]:
        own = random.Random(rng.getrandbits(64))
        sources = Sources(
            wall_us=loop.now_us,
            elapsed_us=lambda: int(loop.time() * 1e6),
            random_bytes=own.randbytes,
            sleep=asyncio.sleep,
        )
        return SimulatedStorage(store, random.Random(rng.getrandbits(64)), faults), sources

    calm = Faults(lost=0, late=0, doubled=0, dropped=0, pause=0)
    creator = await create_repo_object(*client(calm), updates_per_file=4)
    acknowledged, failed, unknown = set[ObjectId](), set[ObjectId](), dict[ObjectId, SwapToken]()

    async def work(who: int) -> None:
        storage, sources = client(Faults(pause=0.0))
        while True:
            try:
                log = await open_repository(storage, sources, updates_per_file=4)
                break
            except IcechunkError:
                await asyncio.sleep(1)
        for i in range(6):
            id = ObjectId((who * 1000 + i + 1).to_bytes(12))
            try:
                await log.append(
                    commit_proposal(id, "main", now_us=loop.now_us()), deadline_s=rng.choice([None, None, 3.0])
                )
                acknowledged.add(id)
            except CommitOutcomeUnknown as error:
                unknown[id] = error.token
            except IcechunkError:
                failed.add(id)
            await asyncio.sleep(rng.random())
        await log.aclose()

    await asyncio.gather(*(work(who) for who in range(4)))
    log = await open_repository(*client(calm))
    for id, token in unknown.items():
        (acknowledged if await log.settle(token) else failed).add(id)
    while store.travelling:
        await asyncio.gather(*store.travelling)
    state = await log.refresh()
    told = [update.change.snapshot async for update in log.updates() if isinstance(update.change, NewCommit)]
    linear = [record.id for record in state.ancestry(state.branches["main"])][:-1]
    await creator.aclose()
    await log.aclose()
    return [
        *(["a commit is in the ops log twice"] if len(told) != len(set(told)) else []),
        *(["the branch is not its ops log"] if linear != told else []),
        *(["acknowledged and lost"] if acknowledged - set(told) else []),
        *(["failed and there"] if failed & set(told) else []),
        *(["nothing happened"] if not acknowledged else []),
    ]


@pytest.mark.parametrize("seed", range(30))
def test_a_crowd_under_lost_late_and_doubled_requests_keeps_every_promise(seed: int) -> None:
    assert _crowd(seed) == []
