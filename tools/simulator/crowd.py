"""Clients that commit to one branch as often as they can, and so take turns.

Turns are advice, so no fault in them breaks a promise about what was committed. They promise that commits go on: no
client of a crowd waits for long, whatever the others do. So the schedule has two parts. In the first there are faults,
as in all schedules, and the promises about outcomes are checked. In the second there are none any more. Clients that
have died or fallen silent hold their turns, some are slow, some think before they write, some know of no turns, and
each of the others has to get its commits within so many round trips.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from icechunk.log.repository.entries.crowd import TAG_BYTES, Crowd
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.port import RepositoryLog
from icechunk.log.repository.state import MAIN
from tools.simulator.checker import Operation
from tools.simulator.cluster import Client, Cluster
from tools.simulator.writers import commit

__all__ = ["crowd"]

_WAY_S: Final = (0.009, 0.012)
"""Time of a request to the store, and of its answer back, s; of a slow client three times as long."""
_TRIP_S: Final = sum(_WAY_S)
_TRIES: Final = 20
"""Tries of a commit while there are faults: a client that loses more often may go on without it."""
_CALM_TRIES: Final = 200
_TURNS: Final = 3
"""Turns that each client has to get when there are no faults any more."""
_LATE: Final = 2
"""Late turns of one client that are too many."""
_STALLED_TRIPS: Final = 15
"""Round trips of each commit of all clients, above which a late turn counts.

Where others commit meanwhile, a client may lose races to those that take no turns.
"""
_SHORT_THOUGHT: Final = 1
"""Round trips that each client may think. One that thinks for longer, or whose requests do, may lose all races."""
_LEAST_TRIPS: Final = 60
_TRIPS_OF_EACH: Final = 15
"""Round trips within which a commit has to be through: of any client, and more for each client of the crowd."""


class _NoTurns(Crowd):
    """Turns as a client of an earlier version knows them: none, and each of its nonces is all random."""

    def __init__(self, client: Client) -> None:
        self._random_bytes = client.sources.random_bytes
        super().__init__(b"")

    @property
    def tag(self) -> bytes:
        return self._random_bytes(TAG_BYTES)

    @tag.setter
    def tag(self, value: bytes) -> None:
        pass

    @property
    def interval_us(self) -> float:
        return 0.0


class _Member:
    """One client of the crowd: its process, which may be replaced, and its habits."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        rng = cluster.rng
        self.cluster = cluster
        # The first one is as all should be, so that others are compared with it.
        odd = number > 0
        self.untagged = odd and rng.random() < 0.15
        self.way = 3 if odd and rng.random() < 0.15 else 1
        self.thinks_trips = rng.choice((0, 0, 0, 1, 4, 30)) if odd else 0
        self.leaves = odd and rng.random() < 0.25
        """Whether it dies, or falls silent, when it has committed once without faults."""
        self.commits_at_once = 2 if rng.random() < 0.1 else 1
        self.turns = 0
        """Commits since there are no faults any more."""
        self.late_turns = 0
        self.needs_turns = self.thinks_trips <= _SHORT_THOUGHT and self.way == 1
        """Whether it has to get its turns, and has not got all of them."""
        self.client: Client | None = None
        self.log: RepositoryLog | None = None

    async def open(self) -> bool:
        """Whether its process lives and has the log open."""
        if self.client is None or self.client.dead or self.log is None:
            self.client = self.cluster.client("k")
            low, high = _WAY_S
            self.client.storage.way_s = low * self.way, high * self.way
            self.log = await self.client.open()
            if self.untagged and isinstance(self.log, LogLayout):
                self.log.view.crowd = _NoTurns(self.client)
        return self.log is not None and not self.client.dead

    async def commit(self, *, tries: int) -> bool:
        """Commit from a fresh state, and again until a race is won; whether it was."""
        client, log = self.client, self.log
        assert client is not None
        assert log is not None
        for _ in range(tries):
            if client.dead:
                return False
            if await client.run(log.refresh() if self.untagged else log.refresh_in_turn()) is None:
                await asyncio.sleep(_TRIP_S)
                continue
            if self.thinks_trips:
                await asyncio.sleep(self.thinks_trips * _TRIP_S * self.cluster.rng.random())
            op = Operation(client=client.name, verb="commit", ref=MAIN, began=0)
            await commit(self.cluster, client, log, op, log.state.branches[MAIN], pinned=True)
            if op.outcome == "ok":
                return True
        return False

    async def commit_amid_faults(self, rounds: int) -> None:
        """Commit so many times, with a new process after each death."""
        rng = self.cluster.rng
        for _ in range(rounds):
            if rng.random() < 0.1:
                await asyncio.sleep(rng.choice((10, 200)) * _TRIP_S * rng.random())
            if await self.open():
                await asyncio.gather(*(self.commit(tries=_TRIES) for _ in range(self.commits_at_once)))

    async def commit_in_time(self, members: Sequence[_Member]) -> None:
        """Commit without faults until every member has had its turns, and see that no commit takes too long."""
        cluster, client = self.cluster, self.client
        assert client is not None
        while self.needs_turns or any(other.needs_turns for other in members):
            if self.leaves and self.turns:
                if cluster.rng.random() < 0.5:
                    client.crash()
                self.needs_turns = False
                return
            began_s, before = cluster.loop.now_s, sum(other.turns for other in members)
            committed = await self.commit(tries=_CALM_TRIES)
            trips = (cluster.loop.now_s - began_s) / _TRIP_S
            if self.needs_turns and not client.dead:
                landed = sum(other.turns for other in members) - before + 1
                late = trips > _LEAST_TRIPS + _TRIPS_OF_EACH * len(members)
                self.late_turns += not committed or (late and trips > _STALLED_TRIPS * landed)
                if self.late_turns == _LATE:
                    cluster.problem(f"{client.name} waits {trips:.0f} round trips, as one of {len(members)} clients")
            self.turns += 1
            if client.dead or not committed or self.turns == _TURNS:
                self.needs_turns = False
            if client.dead:
                return

    async def leave(self) -> None:
        """Close the log, if its process lives."""
        if self.client is not None and self.log is not None and not self.client.dead:
            await self.client.run(self.log.aclose())


async def crowd(cluster: Cluster, count: int, rounds: int) -> None:
    """So many clients commit amid faults, so many times each; then without."""
    members = [_Member(cluster, number) for number in range(count)]
    await asyncio.gather(*(member.commit_amid_faults(rounds) for member in members))
    while cluster.store.travelling:
        await asyncio.wait(cluster.store.travelling)
    cluster.end_of_faults()
    # Opened together, so that all begin at the same time.
    opened = await asyncio.gather(*(member.open() for member in members))
    if not all(opened):
        cluster.problem("the repository cannot be opened, although there are no faults any more")
        return
    await asyncio.gather(*(member.commit_in_time(members) for member in members))
    for member in members:
        await member.leave()
