"""Looks that are spared right after a change of one's own show what the look would have shown."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import replace

import pytest

from icechunk.errors import ConflictError
from icechunk.format.ids import ObjectId
from icechunk.refs.create import create_log
from icechunk.refs.log_layout import LogLayout
from icechunk.refs.recency import Recency
from icechunk.repository import Repository
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Storage
from icechunk.storage.memory import MemoryStorage
from icechunk.testing.recording import RecordingStorage
from icechunk.testing.simulated_clients import Clients
from icechunk.testing.simulated_storage import Faults, SimulatedStorage, VirtualLoop
from icechunk.testing.simulation import commit_proposal
from icechunk.testing.wrapping import WrappingStorage

MS = 1_000
GROUP = b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'


def after_exchanges(count: int, *, look_us: int = 20 * MS, swap_us: int = 20 * MS, size_bytes: int = 1000) -> Recency:
    """Of a client whose last swap was sent at 0."""
    known = Recency()
    for _ in range(count):
        known.looked(look_us)
        known.landed(sent_us=0, answered_us=swap_us, size_bytes=size_bytes)
    return known


def test_a_look_is_spared_for_a_moment_after_a_swap_that_was_as_quick_as_ever():
    assert after_exchanges(3).spare_look(20 * MS)
    assert after_exchanges(3).spare_look(24 * MS - 1)
    assert not after_exchanges(3).spare_look(24 * MS)
    assert not after_exchanges(3).spare_look(20 * MS - 1)  # a clock that went back


def test_of_three_looks_one_is_made():
    known, spared = after_exchanges(3), []
    for turn in range(1, 10):
        known.landed(sent_us=turn * 1000 * MS, answered_us=turn * 1000 * MS + 20 * MS, size_bytes=1000)
        spared.append(known.spare_look(turn * 1000 * MS + 20 * MS))
        if not spared[-1]:
            known.looked(20 * MS)
    assert spared == [True, True, False] * 3


def test_nothing_is_spared_while_others_write():
    known = after_exchanges(5)
    known.met_others()
    for turn in range(1, 5):
        known.landed(sent_us=turn * 1000 * MS, answered_us=turn * 1000 * MS + 20 * MS, size_bytes=1000)
        assert known.spare_look(turn * 1000 * MS + 20 * MS) == (turn >= 3)


def test_nothing_is_spared_after_an_answer_that_took_half_as_long_again():
    known = after_exchanges(3)
    known.landed(sent_us=100 * MS, answered_us=129 * MS, size_bytes=1000)
    assert known.spare_look(129 * MS)
    known.landed(sent_us=200 * MS, answered_us=230 * MS, size_bytes=1000)
    assert not known.spare_look(230 * MS)


def test_nothing_is_spared_before_it_is_known_how_quick_exchanges_are():
    assert not Recency().spare_look(0)
    assert not after_exchanges(2).spare_look(20 * MS)
    assert not after_exchanges(3, size_bytes=1 << 20).spare_look(20 * MS)


def test_nothing_is_spared_where_looks_are_cheap():
    assert not after_exchanges(3, look_us=1 * MS, swap_us=2 * MS).spare_look(2 * MS)


# -- a cluster ---------------------------------------------------------------------------------------------------------


class Steady(SimulatedStorage):
    """No way takes less than 10 ms; most take little more, some much."""

    async def _way(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.010, 0.0125) + (self._rng.random() < 0.05) * self._rng.random() * 0.2)


class Cluster(Clients):
    """Clients that open sessions and commit at once, again and again."""

    spared = 0
    missed = 0

    def client(self, faults: Faults | None = None) -> tuple[SimulatedStorage, Sources]:
        storage, sources = super().client(Faults(lost=0, late=0, doubled=0, dropped=0, pause=0))
        return Steady(self.store, random.Random(self.rng.getrandbits(64)), storage.faults), sources

    async def writer(self, commits: int) -> None:
        rng = random.Random(self.rng.getrandbits(64))
        storage, sources = self.client()
        log = await LogLayout.open(storage, sources)
        for _ in range(commits):
            if rng.random() < 0.3:
                # Now and then long enough for somebody else to be alone.
                await asyncio.sleep(rng.choice((0.001, 0.003, 0.1, 3)) * rng.random())
            acknowledged = set(self.report.acknowledged)
            current = log.spare_look()
            state = log.state if current else await log.refresh()
            history = {record.id for record in state.ancestry(state.branch_tip("main"))}
            self.spared += bool(current)
            self.missed += not acknowledged <= history
            snapshot = ObjectId(rng.randbytes(12))
            await log.append(commit_proposal(snapshot, "main", now_us=sources.wall_us()))
            self.report.acknowledged.add(snapshot)
        await log.aclose()

    async def run(self, writers: int, commits: int) -> None:
        storage, sources = self.client()
        await (await create_log(storage, sources)).aclose()
        await asyncio.gather(*(self.writer(commits) for _ in range(writers)))


def simulated(seed: int, *, writers: int = 3, commits: int = 30) -> Cluster:
    loop = VirtualLoop()
    try:
        cluster = Cluster(loop, seed, calm=True, collect=False)
        loop.run_until_complete(cluster.run(writers, commits))
        return cluster
    finally:
        loop.close()


def test_no_look_is_spared_that_would_have_shown_an_acknowledged_commit():
    clusters = [simulated(seed) for seed in range(4)]
    assert not sum(cluster.missed for cluster in clusters)
    assert sum(cluster.spared for cluster in clusters) > 20


def test_the_simulator_notices_when_looks_are_spared_for_longer(monkeypatch: pytest.MonkeyPatch):
    def longer(self: Recency, now_us: int) -> bool:
        return self._answered_us is not None and now_us - self._sent_us < 100 * MS

    monkeypatch.setattr(Recency, "spare_look", longer)
    assert any(simulated(seed).missed for seed in range(6))


async def _race(cluster: Cluster) -> tuple[int, int]:
    """Commits of one who never pauses, and of one who starts when the first is well under way."""
    storage, sources = cluster.client()
    await (await create_log(storage, sources)).aclose()
    first, second = [await LogLayout.open(*cluster.client()) for _ in range(2)]
    done = [0, 0]

    async def write(log: LogLayout, who: int) -> None:
        rng = random.Random(who)
        while cluster.loop.time() < 10:
            state = log.state if log.spare_look() else await log.refresh()
            tip = state.branch_tip("main")
            propose = commit_proposal(ObjectId(rng.randbytes(12)), "main", parent=tip, now_us=cluster.loop.now_us())
            with suppress(ConflictError):
                await log.append(propose)
                done[who] += 1

    racing = asyncio.create_task(write(first, 0))
    await asyncio.sleep(1)
    await write(second, 1)
    await racing
    for log in (first, second):
        await log.aclose()
    return done[0], done[1]


@pytest.mark.parametrize("seed", range(3))
def test_who_spares_looks_leaves_slots_to_others(seed: int):
    loop = VirtualLoop()
    try:
        cluster = Cluster(loop, seed, calm=True, collect=False)
        first, second = loop.run_until_complete(_race(cluster))
    finally:
        loop.close()
    assert first > 20
    assert second > 20


# -- counted -----------------------------------------------------------------------------------------------------------


class SomeWayOff(WrappingStorage):
    """Every exchange about the log takes 5 ms by its clock, and no time."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.clock_us = SYSTEM.elapsed_us()

    async def get(self, key, *args, **named):
        self.clock_us += 5 * MS * key.startswith("log/")
        return await super().get(key, *args, **named)

    async def put(self, key, *args, **named):
        self.clock_us += 5 * MS * key.startswith("log/")
        return await super().put(key, *args, **named)


async def test_a_session_right_after_a_commit_begins_without_a_request():
    memory = MemoryStorage()
    far = SomeWayOff(memory)
    recording = RecordingStorage(far)
    repository = await Repository.create_async(recording)
    log = await repository._core.log()
    assert isinstance(log, LogLayout)
    log._view.sources = replace(SYSTEM, elapsed_us=lambda: far.clock_us)
    other = await Repository.open_async(memory)
    for n in range(6):
        session = await repository.writable_session_async("main")
        session.set_metadata(f"/n{n}", GROUP)
        await session.commit_async(f"n{n}")
        gets = recording.count("get")
        again = await repository.writable_session_async("main")
        assert recording.count("get") - gets == (0 if n >= 2 else 1)
        assert again.snapshot_id == await other.lookup_branch_async("main")
        await repository.checkpoint_async()
        far.clock_us += 1000 * MS
    # Some time later somebody else's commit is seen.
    session = await other.writable_session_async("main")
    session.set_metadata("/theirs", GROUP)
    tip = await session.commit_async("theirs")
    assert (await repository.writable_session_async("main")).snapshot_id == tip
