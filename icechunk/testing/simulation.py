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
import contextlib
import random
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from icechunk.errors import (
    CommitOutcomeUnknown,
    IcechunkError,
    ObjectNotFoundError,
    PreconditionFailedError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId, encode_id
from icechunk.format.keys import snapshot_key, transaction_key
from icechunk.format.repo import decode_repo
from icechunk.format.repo_values import NewCommit, SnapshotRecord, Update
from icechunk.format.tables import ManifestFile
from icechunk.maintenance.collect import collect_garbage
from icechunk.maintenance.expire import expire
from icechunk.maintenance.limits import Limits
from icechunk.maintenance.prune import prune_log
from icechunk.refs.base import SwapToken
from icechunk.refs.create import create_log
from icechunk.refs.events import CommitAdded, Event
from icechunk.refs.log_checkpoint import convert_to_log
from icechunk.refs.log_layout import LogLayout
from icechunk.refs.marker import decode_marker
from icechunk.refs.state import RepoState
from icechunk.sources import Sources
from icechunk.storage.base import (
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
from icechunk.testing.simulated_files import commit_files, missing_files

__all__ = ["Report", "SimulatedStorage", "SimulatedStore", "VirtualLoop", "commit_proposal", "simulate"]

_START_US = 1_790_000_000_000_000
_DAY_S = 86_400.0
T = TypeVar("T")


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
            await asyncio.sleep(self._rng.uniform(0.4, 9) * _DAY_S)

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
            data=found.data,
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


@dataclass(slots=True, kw_only=True)
class Report:
    """What happened under one seed."""

    seed: int
    acknowledged: set[ObjectId] = field(default_factory=set)
    failed: set[ObjectId] = field(default_factory=set)
    unknown: int = 0
    """Outcomes that were unknown at first."""
    conversions: int = 0
    crashes: int = 0
    pruned: int = 0
    collected: int = 0
    """Objects deleted by collections."""
    problems: list[str] = field(default_factory=list)
    """Broken promises; none, it is hoped."""


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


class _Cluster:
    def __init__(self, loop: VirtualLoop, seed: int, *, calm: bool, collect: bool) -> None:
        self.loop = loop
        self.collect = collect
        self.manifests: dict[ObjectId, tuple[ManifestFile, ...]] = {FIRST_SNAPSHOT: ()}
        self.rng = random.Random(seed)
        self.store = SimulatedStore(loop)
        self.report = Report(seed=seed)
        self.calm = calm

    def sources(self, skew_us: int = 0) -> Sources:
        rng = random.Random(self.rng.getrandbits(64))
        return Sources(
            wall_us=lambda: self.loop.now_us() + skew_us,
            elapsed_us=lambda: int(self.loop.time() * 1e6),
            random_bytes=rng.randbytes,
            sleep=asyncio.sleep,
        )

    def client(self, faults: Faults | None = None) -> tuple[SimulatedStorage, Sources]:
        usual = Faults(lost=0, late=0, doubled=0, dropped=0, pause=0) if self.calm else Faults()
        storage = SimulatedStorage(self.store, random.Random(self.rng.getrandbits(64)), faults or usual)
        return storage, self.sources(self.rng.randrange(-5_000_000, 5_000_000))

    def reliable(self) -> tuple[SimulatedStorage, Sources]:
        return self.client(Faults(lost=0, late=0, doubled=0, dropped=0, pause=0))

    async def open(self, storage: SimulatedStorage, sources: Sources) -> LogLayout | None:
        """Open, patiently; None where the repository is not a log at present, again and again."""
        for _ in range(60):
            try:
                return await LogLayout.open(storage, sources)
            except SessionStateError:
                await asyncio.sleep(30)
            except StorageError:
                await asyncio.sleep(1)
        return None

    async def writer(self, commits: int) -> None:
        rng = random.Random(self.rng.getrandbits(64))
        storage, sources = self.client()
        log = await self.open(storage, sources)
        for _ in range(commits):
            if log is None:
                return
            if rng.random() < 0.03:
                self._crash(log)
                log = await self.open(storage, sources)
                continue
            if rng.random() < 0.15:
                await asyncio.sleep(rng.choice((1, 4, 20)) * rng.random() * _DAY_S)
            await asyncio.gather(*(self._commit(log, rng, storage, sources) for _ in range(rng.choice((1, 1, 1, 3)))))
            if rng.random() < 0.1:
                await self._quietly(log.checkpoint())
            if log.ended is not None or rng.random() < 0.05:
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
                await asyncio.sleep(rng.choice((1, 2000, _DAY_S, 4 * _DAY_S)) * rng.random())
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

    async def _quietly(self, action: Coroutine[Any, Any, T]) -> None:
        try:
            await action
        except IcechunkError:
            return

    def _crash(self, log: LogLayout) -> None:
        self.report.crashes += 1
        for task in log.tasks:
            task.cancel()

    async def reader(self, looks: int) -> None:
        rng = random.Random(self.rng.getrandbits(64))
        storage, sources = self.client()
        log = await self.open(storage, sources)
        seen: list[ObjectId] = []
        for _ in range(looks):
            if log is None:
                return
            await asyncio.sleep(rng.choice((0.05, 2, 1000, 2 * _DAY_S, 12 * _DAY_S)) * rng.random())
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

    async def pruner(self, rounds: int) -> None:
        for _ in range(rounds):
            storage, sources = self.client()
            log = await self.open(storage, sources)
            if log is not None:
                with contextlib.suppress(IcechunkError):
                    self.report.pruned += await prune_log(log, storage, sources)
                await log.aclose()
            await asyncio.sleep(self.rng.choice((0.5, 3, 7.5)) * _DAY_S)

    async def collector(self, rounds: int) -> None:
        rng = random.Random(self.rng.getrandbits(64))
        limits = Limits(max_concurrent_deletes=2, max_concurrent_manifest_fetches=4, max_snapshots_in_memory=4)
        for _ in range(rounds):
            await asyncio.sleep(rng.choice((5, 3600, 2 * _DAY_S)) * rng.random())
            storage, sources = self.client()
            log = await self.open(storage, sources)
            if log is None:
                continue
            age_s = rng.choice((0, 5, 600, _DAY_S, 5 * _DAY_S))
            if rng.random() < 0.6:
                old_us = self.loop.now_us() - int(age_s * 1e6)
                await self._quietly(
                    expire(
                        log,
                        storage,
                        older_than_us=old_us,
                        delete_expired_branches=False,
                        delete_expired_tags=False,
                        level=1,
                    )
                )
            task = asyncio.ensure_future(
                collect_garbage(
                    log,
                    storage,
                    sources,
                    older_than_us=self.loop.now_us() - int(age_s * 1e6),
                    limits=limits,
                    dry_run=False,
                )
            )
            if rng.random() < 0.2:
                # It dies on the way.
                await asyncio.sleep(rng.uniform(0, 3))
                task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and task.exception() is None:
                result = task.result()
                self.report.collected += result.snapshots_deleted + result.chunks_deleted
            elif not task.cancelled() and not isinstance(task.exception(), IcechunkError):
                self.report.problems.append(f"a collection failed: {task.exception()!r}")
            await log.aclose()

    async def auditor(self, rounds: int) -> None:
        """Looks whether what history needs is there, also between collections."""
        rng = random.Random(self.rng.getrandbits(64))
        for _ in range(rounds):
            await asyncio.sleep(rng.choice((5, 3600, 2 * _DAY_S)) * rng.random())
            storage, sources = self.reliable()
            log = await self.open(storage, sources)
            if log is None:
                continue
            missing = missing_files(log.state, self.store.contents() | log.carried_files())
            if missing:
                # Unless they left the history in the meantime.
                state = await log.refresh()
                still = {key for _, key in missing_files(state, self.store.contents() | log.carried_files())}
                if lost := still & {key for _, key in missing}:
                    self.report.problems.append(f"{len(lost)} files are lost that history needs")

    async def converter(self, rounds: int) -> None:
        rng = random.Random(self.rng.getrandbits(64))
        for _ in range(rounds):
            await asyncio.sleep(rng.uniform(0.2, 3) * _DAY_S)
            storage, sources = self.client()
            log = await self.open(storage, sources)
            if log is None:
                continue
            task = asyncio.ensure_future(log.convert_to_repo_object())
            await asyncio.wait({task}, timeout=rng.choice((0.2, 1000)))
            if not task.done():
                # It dies after its seal, perhaps: whoever comes next finishes what it began.
                self._crash(log)
                task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()
            self.report.conversions += 1
            await asyncio.sleep(rng.uniform(0, 60))
            reliable, clock = self.reliable()
            try:
                await LogLayout.open(reliable, clock)
            except SessionStateError:
                await convert_to_log(reliable, clock)

    async def run(self, *, writers: int, commits: int, convert: bool) -> None:
        storage, sources = self.reliable()
        created = await create_log(storage, sources, updates_per_file=20)
        await created.aclose()
        actors = [self.writer(commits) for _ in range(writers)] + [self.reader(2 * commits) for _ in range(2)]
        actors.append(self.pruner(8))
        if self.collect:
            actors += [self.collector(2 * commits), self.collector(commits), self.auditor(commits)]
        if convert:
            actors.append(self.converter(2))
        await asyncio.gather(*actors)
        if self.store.travelling:
            await asyncio.wait(self.store.travelling)
        await self._verify()

    async def _verify(self) -> None:
        report = self.report
        storage, sources = self.reliable()
        try:
            await LogLayout.open(storage, sources)
        except SessionStateError:
            await convert_to_log(storage, sources)
        log = await LogLayout.open(storage, sources)
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
        elif missing := missing_files(log.state, self.store.contents() | log.carried_files()):
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
