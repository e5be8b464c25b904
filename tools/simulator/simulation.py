"""A cluster of log clients in one deterministic simulator.

Theory: an asyncio loop whose clock is virtual runs every client; an in-memory store between them delays, loses,
repeats and postpones requests, and stops clients for days or for ever, all by one seeded generator. A seed
therefore is a schedule, and reproduces what it found. A pruner prunes the log; most commits carry files (rule 15), and
on request they have chunks and manifests too, and somebody expires snapshots and collects garbage.

What is checked: an acknowledged commit is in history exactly once; one that was reported as failed is not; each
branch is linear; a reader never goes back and misses nothing that was acknowledged before it looked; a checkpoint
never goes back within its epoch, and what it names stands; a reader finds the files of the history that it sees.
Where garbage is collected meanwhile: whatever the history refers to is there.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from icechunk.errors import (
    CommitOutcomeUnknown,
    IcechunkError,
    ObjectNotFoundError,
    StorageError,
)
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.keys import snapshot_key
from icechunk.format.repo.values import NewCommit, SnapshotRecord, Update
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries.checkpoint import convert_to_log
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.events import CommitAdded, Event
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import SwapToken
from icechunk.log.repository.state import RepoState
from icechunk.runtime.clock import Sources
from tools.simulator.clients import Clients, Report
from tools.simulator.files import commit_files, missing_files
from tools.simulator.storage import DAY_S, SimulatedStorage, VirtualLoop
from tools.simulator.upkeep import auditor, collector, converter, pruner

__all__ = ["commit_proposal", "simulate"]


def commit_proposal(
    snapshot: ObjectId, branch: str, *, parent: ObjectId | None = None, now_us: int
) -> Callable[[RepoState], list[Event]]:
    """A commit of an otherwise empty snapshot on the branch's tip, or on a parent that may be stale."""

    def propose(state: RepoState) -> list[Event]:
        stands_on = parent if parent is not None else state.branch_tip(branch)
        known = state.snapshots.get(stands_on)
        record = SnapshotRecord(
            id=snapshot,
            parent=stands_on,
            flushed_at_us=max(now_us, known.flushed_at_us + 1 if known else 0),
            message=encode_id(snapshot),
            metadata={},
        )
        return [CommitAdded(branch=branch, snapshot=record)]

    return propose


class _Cluster(Clients):
    async def writer(self, commits: int) -> None:
        rng = random.Random(self.rng.getrandbits(64))
        storage, sources = self.client()
        log = await self.open(storage, sources)
        for _ in range(commits):
            if log is None:
                return
            if rng.random() < 0.03:
                self.crash(log)
                log = await self.open(storage, sources)
                continue
            if rng.random() < 0.15:
                await asyncio.sleep(rng.choice((1, 4, 20)) * rng.random() * DAY_S)
            await asyncio.gather(*(self._commit(log, rng, storage, sources) for _ in range(rng.choice((1, 1, 1, 3)))))
            if rng.random() < 0.1:
                await self.quietly(log.checkpoint())
            if log.view.left is not None or rng.random() < 0.05:
                await log.aclose()
                log = await self.open(storage, sources)
        if log is not None:
            await log.aclose()

    async def _commit(self, log: LogLayout, rng: random.Random, storage: SimulatedStorage, sources: Sources) -> None:
        snapshot, branch = ObjectId(rng.randbytes(12)), "main"
        parent = log.state.branch_tip(branch) if rng.random() < 0.3 else None
        deadline_s = rng.choice((None, None, None, 0.05, 1.0))
        since_us: int | None = None
        files = {snapshot_key(snapshot): b"the file of " + snapshot}
        if self.collect:
            since_us = log.store_time_us
            riding = await self._upload(storage, rng, snapshot, parent)
            if riding is None:
                self.report.failed.add(snapshot)
                return
            files = riding
        elif rng.random() < 0.2:
            files = {}
        self.store.carried.update(files)
        propose = commit_proposal(snapshot, branch, parent=parent, now_us=sources.wall_us())
        told: list[SwapToken | None] = []
        task = asyncio.ensure_future(
            log.append(propose, since_us=since_us, deadline_s=deadline_s, on_sent=told.append, files=files)
        )
        if rng.random() < 0.05:
            await asyncio.sleep(rng.uniform(0, 0.2))
            task.cancel()
        try:
            await asyncio.wait({task})
            task.result()
        except CommitOutcomeUnknown as error:
            self.report.unknown += 1
            await self._settle(log, snapshot, error.token)
        except asyncio.CancelledError:
            if told and told[-1] is not None:
                await self._settle(log, snapshot, told[-1])
            else:
                self.report.failed.add(snapshot)
        except IcechunkError:
            self.report.failed.add(snapshot)
        else:
            self.report.acknowledged.add(snapshot)

    async def _upload(
        self, storage: SimulatedStorage, rng: random.Random, snapshot: ObjectId, parent: ObjectId | None
    ) -> dict[str, bytes] | None:
        """What a session does before its swap; it may take days, and what is not answered is sent again.

        Returns the files that shall ride instead; None where something could not be put.
        """
        inherited = self.manifests.get(parent, ())[:3] if parent is not None else ()
        made = commit_files(
            snapshot,
            manifest=ObjectId(rng.randbytes(12)),
            chunk=ObjectId(rng.randbytes(12)),
            inherited=inherited,
            flushed_at_us=self.loop.now_us(),
        )
        self.manifests[snapshot] = (made.manifest, *inherited)
        rides = rng.random() < 0.6
        riding = {key: data for key, data in made.files if rides and not key.startswith("chunks/")}
        for key, data in made.files:
            if key in riding:
                continue
            if rng.random() < 0.1:
                await asyncio.sleep(rng.choice((1, 2000, DAY_S, 4 * DAY_S)) * rng.random())
            for _ in range(4):
                try:
                    await storage.put(key, data)
                    break
                except StorageError:
                    await asyncio.sleep(1)
            else:
                return None
        return riding

    async def _check_file(self, storage: SimulatedStorage, log: LogLayout, snapshot: ObjectId) -> None:
        """As `icechunk.transfer.assets` reads: the object, else what rides, else the object once more."""
        key = snapshot_key(snapshot)
        if key not in self.store.carried:
            return
        found: bytes | None = None
        try:
            for _ in range(2):
                try:
                    found = (await storage.get(key)).data
                except ObjectNotFoundError:
                    found = await log.find_file(key)
                if found is not None:
                    break
        except StorageError:
            return
        if found != self.store.carried[key]:
            self.report.problems.append("the file of a snapshot is nowhere")

    async def _settle(self, log: LogLayout, snapshot: ObjectId, token: SwapToken) -> None:
        await asyncio.sleep(1)
        for _ in range(5):
            try:
                landed = await log.settle(token)
            except IcechunkError:
                await asyncio.sleep(5)
                continue
            (self.report.acknowledged if landed else self.report.failed).add(snapshot)
            return

    async def reader(self, looks: int) -> None:
        rng = random.Random(self.rng.getrandbits(64))
        storage, sources = self.client()
        log = await self.open(storage, sources)
        seen: list[ObjectId] = []
        for _ in range(looks):
            if log is None:
                return
            await asyncio.sleep(rng.choice((0.05, 2, 1000, 2 * DAY_S, 12 * DAY_S)) * rng.random())
            acknowledged = set(self.report.acknowledged)
            try:
                state = await log.refresh()
            except StorageError:
                continue
            history = _history(state)
            if not self.collect and history[: len(seen)] != seen:
                self.report.problems.append("a reader went back")
            if not self.collect and (missing := acknowledged - set(history)):
                self.report.problems.append(f"a reader missed {len(missing)} acknowledged commits")
            seen = history
            if not self.collect:
                for snapshot in rng.sample(history, min(2, len(history))):
                    await self._check_file(storage, log, snapshot)
            if rng.random() < 0.1:
                log = await self.open(storage, sources)

    async def run(self, *, writers: int, commits: int, convert: bool) -> None:
        storage, sources = self.reliable()
        created = await create_log(storage, sources, updates_per_file=20)
        await created.aclose()
        actors = [self.writer(commits) for _ in range(writers)] + [self.reader(2 * commits) for _ in range(2)]
        actors.append(pruner(self, 8))
        if self.collect:
            actors += [collector(self, 2 * commits), collector(self, commits), auditor(self, commits)]
        if convert:
            actors.append(converter(self, 2))
        await asyncio.gather(*actors)
        if self.store.travelling:
            await asyncio.wait(self.store.travelling)
        await self._verify()

    async def _verify(self) -> None:
        report = self.report
        storage, sources = self.reliable()
        if not isinstance(await open_repository(storage, sources), LogLayout):
            await convert_to_log(storage, sources)
        log = await open_repository(storage, sources)
        assert isinstance(log, LogLayout)
        updates = [update async for update in log.updates()][::-1]
        history = [update.change.snapshot for update in updates if isinstance(update.change, NewCommit)]
        counted = set(history)
        if len(counted) < len(history):
            report.problems.append("a commit is in history twice")
        if lost := report.acknowledged - counted:
            report.problems.append(f"{len(lost)} acknowledged commits are lost")
        if visible := report.failed & counted:
            report.problems.append(f"{len(visible)} commits that were reported as failed are in history")
        if not self.collect:
            _check_linear(log.state, updates, report)
        elif missing := missing_files(log.state, self.store.contents() | log.view.carried.all()):
            report.problems.append(f"{len(missing)} files are lost that history needs in the end")
        if self.store.missing:
            report.problems.append(f"checkpoints named {len(self.store.missing)} files that were not there")
        times = [update.updated_at_us for update in updates]
        if times != sorted(set(times)):
            report.problems.append("times in the ops log do not increase")
        reached: dict[str, int] = {}
        for epoch, n in self.store.checkpoints:
            if epoch and n < reached.get(epoch, 0):
                report.problems.append("a checkpoint went back")
            reached[epoch] = n


def _history(state: RepoState) -> list[ObjectId]:
    return [record.id for record in state.ancestry(state.branch_tip("main"))][::-1]


def _check_linear(state: RepoState, updates: list[Update], report: Report) -> None:
    committed = [update.change.snapshot for update in updates if isinstance(update.change, NewCommit)]
    if _history(state)[1:] != committed:
        report.problems.append("history is not linear: the branch's ancestry is not its commits in order")


def simulate(
    seed: int, *, writers: int = 3, commits: int = 8, convert: bool = False, calm: bool = False, collect: bool = False
) -> Report:
    """Run a cluster under one schedule.

    Parameters
    ----------
    writers, commits
        How many clients write, and how often each.
    convert
        Whether somebody converts the repository to a repo object and back meanwhile.
    calm
        No faults; only interleavings.
    collect
        Whether commits upload files, and snapshots are expired and garbage collected meanwhile.

    Returns
    -------
    Report
        With its ``problems``, none if all promises held.
    """
    loop = VirtualLoop()
    try:
        cluster = _Cluster(loop, seed, calm=calm, collect=collect)
        loop.run_until_complete(cluster.run(writers=writers, commits=commits, convert=convert))
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        if pending:
            loop.run_until_complete(asyncio.wait(pending))
        return cluster.report
    finally:
        loop.close()
