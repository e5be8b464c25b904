"""Schedules on a local disk whose power fails: unsynced writes are dropped, torn or reordered.

Clients of one machine commit to one repository on a real folder, tag and convert it, through the local storage, on
virtual time; all that they ask of the system is recorded (`tools.simulator.power_loss`). Then the power fails at a
point chosen by chance: the folder is made as it may be found then, and new clients open it, read all of its history,
and go on. What was acknowledged before that point must be there; what was under way may be. The history is judged by
the same checker as that of any other schedule.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final
from unittest import mock

from icechunk import Repository
from icechunk.config import RepositoryConfig
from icechunk.errors import (
    AlreadyExistsError,
    CommitOutcomeUnknown,
    ConflictError,
    FormatError,
    IcechunkError,
    SessionStateError,
)
from icechunk.log.repository.open import create_repository
from icechunk.log.repository.port import Layout
from icechunk.runtime.threads import ProcessPool
from icechunk.session.core import Core
from icechunk.storage.local import folders
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.local.syncs import Promises
from tools.simulator import power_loss, sessions
from tools.simulator.checker import MAIN, ROOT, Operation, View, check
from tools.simulator.cluster import Report, told_error
from tools.simulator.faults import Fault
from tools.simulator.loop import VirtualLoop
from tools.simulator.power_loss import Loss, Recorder

__all__ = ["simulate_power_loss"]

_FAULTS: Final = {Loss.ALL: Fault.POWER_DROPPED, Loss.BYTES: Fault.POWER_EMPTIED, Loss.ANY: Fault.POWER_TORN}
_BEGAN_US: Final = 1_577_836_800_000_000
"""Virtual wall clock at the beginning, µs since the Unix epoch."""
_RANDOM: Final = re.compile(r"[0-9A-Z]{20,}|[0-9a-f]+-[0-9a-f]{24}|[0-9]{10,}")
"""Parts of names that hold the time or the number of a process."""
_KINDS: Final = (
    Promises(),
    Promises(names_follow_files=True, syncs_all=True, flushes_all=True),
    Promises(orders=True, names_follow_files=True, syncs_all=True, flushes_all=True),
)
"""Promises of a file system: only those of POSIX, those of btrfs, and those of ext4 and XFS."""


_OF_ANOTHER_LAYOUT: Final = (ConflictError, SessionStateError)
"""Errors of a client whose repository was converted under it."""


class _DiskLoop(VirtualLoop):
    """A virtual loop on which a call of the system takes a random time, so that those of several clients interleave."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = self.create_future()

        def call() -> None:
            try:
                result = func(*args)
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self.call_later(self._rng.uniform(0.0001, 0.002), call)
        return future


def _start(_: ProcessPool, work: Callable[[], object], then: Callable[[], object]) -> None:
    """As `ProcessPool.start`, in the loop's time."""

    def both() -> None:
        work()
        then()

    asyncio.get_running_loop().run_in_executor(None, both)


class _Machine:
    """One machine with a folder: its clients, and what they were told."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, root: Path, layout: Layout, report: Report) -> None:
        self.loop = loop
        self.rng = rng
        self.root = root
        self.layout = layout
        self.report = report
        self.now: Callable[[], int] = lambda: 0
        """The number of events so far."""
        self.converts = layout is not Layout.REFS and rng.random() < 0.3
        """Whether clients convert the repository, there and back."""
        self._commits = 0
        # Files have times of the system's clock, which is later: nothing here is so old that anything depends on it.
        self.sources = loop.sources(rng.randbytes, lambda: _BEGAN_US + int(loop.now_s * 1e6))

    def note(self, who: str, what: str) -> None:
        """Write something down in the trace."""
        self.report.trace.note(self.loop.now_s, who, what)

    async def work(self, name: str, rounds: int) -> None:
        """Commit again and again, from one client or a new one each time."""
        rng = self.rng
        repository = await self.opened()
        for _ in range(rounds):
            await asyncio.sleep(rng.uniform(0, 0.01))
            ended = False
            try:
                await self._change(name, repository)
            except _OF_ANOTHER_LAYOUT as error:
                self.note(name, f"must open the repository again: {str(error).replace(str(self.root), '…')}")
                ended = True
            if ended or rng.random() < 0.2:
                await repository.aclose()
                repository = await self.opened()
        if rng.random() < 0.5:
            await repository.aclose()

    async def _change(self, name: str, repository: Repository) -> None:
        rng = self.rng
        await self._commit(name, repository)
        if rng.random() < 0.15:
            await repository.checkpoint_async()
        if rng.random() < 0.2:
            await self._tag(name, repository)
        if self.converts and rng.random() < 0.3:
            await self._convert(name, repository)

    async def opened(self) -> Repository:
        """The repository of a new client."""
        config = RepositoryConfig(inline_chunk_threshold_bytes=4)
        core = Core(LocalStorage(str(self.root), self.sources), config, sources=self.sources)
        await core.load_config()
        return Repository(core)

    async def _commit(self, name: str, repository: Repository) -> None:
        rng = self.rng
        session = await repository.writable_session_async(MAIN)
        base = await _message(repository, session.snapshot_id)
        self._commits += 1
        writes = {}
        for key in rng.sample(sessions.CHUNKS, rng.choice((1, 2, 4))):
            writes[key] = f"v{self._commits}-{key[-1]}"
            await sessions.set_chunk(session, key, writes[key])
        op = Operation(
            client=name,
            verb="commit",
            ref=MAIN,
            commit=f"{name}c{self._commits}",
            parent=base,
            writes=writes,
            began=self.now(),
        )
        self.report.history.append(op)
        self.note(name, f"asks for commit {op.commit} on {base}")
        with self._told(op, op.commit, refusal=ConflictError):
            await session.commit_async(op.commit)

    async def _tag(self, name: str, repository: Repository) -> None:
        tip = await repository.lookup_branch_async(MAIN)
        op = Operation(client=name, verb="create-tag", ref=f"t{self.rng.randrange(4)}", began=self.now())
        op.commit = await _message(repository, tip)
        self.report.history.append(op)
        with self._told(op, f"tag {op.ref} = {op.commit}", refusal=AlreadyExistsError):
            await repository.create_tag_async(op.ref, tip)

    @contextlib.contextmanager
    def _told(self, op: Operation, what: str, *, refusal: type[IcechunkError]) -> Iterator[None]:
        """Note the outcome that a client is told of the operation in the block."""
        try:
            yield
        except refusal:
            op.outcome = "refused"
        except CommitOutcomeUnknown:
            op.outcome = "unknown"
        except SessionStateError:
            op.outcome = "failed"
            raise
        else:
            op.outcome = "ok"
        finally:
            op.ended = self.now()
            self.note(op.client, f"is told {op.outcome} about {what}")

    async def _convert(self, name: str, repository: Repository) -> None:
        target = self.rng.choice((Layout.LOG, Layout.REPO))
        self.note(name, f"converts the repository to {target.value}")
        try:
            await repository.convert_async(target)
        except IcechunkError as error:
            # Another client converts it at the same time.
            self.note(name, f"fails to: {str(error).replace(str(self.root), '…')}")
        else:
            self.report.conversions += 1


async def _message(repository: Repository, snapshot_id: str) -> str:
    async for info in repository.async_ancestry(snapshot_id=snapshot_id):
        return ROOT if info.parent_id is None else info.message
    return ""


@cache
def _template(layout: Layout) -> dict[str, bytes]:
    """The files of a repository with one array, by path."""
    with tempfile.TemporaryDirectory(prefix="icechunk-simulated-disk-", dir=_memory()) as folder:
        root = Path(folder, "repository")
        _make_repository(root, layout)
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _make_repository(root: Path, layout: Layout) -> None:
    loop = VirtualLoop()
    machine = _Machine(loop, random.Random(0), root, layout, Report(seed=0))

    async def create() -> None:
        log = await create_repository(LocalStorage(str(machine.root), machine.sources), layout, machine.sources)
        await log.aclose()
        repository = await machine.opened()
        await sessions.make_array(repository)
        await repository.aclose()

    with mock.patch.object(ProcessPool, "start", _start):
        loop.run_until_complete(create())
    loop.close()


def _memory() -> str | None:
    """A folder in memory, where this machine has one: a sync takes no time there."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def simulate_power_loss(seed: int, layout: Layout) -> Report:
    """Run the schedule of a seed on a disk whose power fails; as `tools.simulator.simulation.simulate`."""
    rng = random.Random(f"disk {seed}")
    report = Report(seed=seed, profile=f"{layout.value}-disk")
    promises = rng.choice(_KINDS)
    template = _template(layout)
    with (
        mock.patch.object(folders, "promises_of", return_value=promises),
        mock.patch.object(ProcessPool, "start", _start),
        # The system's clock decides otherwise whether the folder of a young file is synced once more; a seed must.
        mock.patch.object(folders, "_CLOCK_GRAIN_NS", 1 << 62),
        tempfile.TemporaryDirectory(prefix="icechunk-simulated-disk-", dir=_memory()) as folder,
    ):
        live, image = Path(folder, "live"), Path(folder, "image")
        for name, data in template.items():
            path = live / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        try:
            _run(report, rng, live, image, layout, promises)
        except Exception as error:
            report.problems.append(told_error(error))
    return report


def _run(report: Report, rng: random.Random, live: Path, image: Path, layout: Layout, promises: Promises) -> None:
    loop = _DiskLoop(rng)
    machine = _Machine(loop, rng, live, layout, report)
    recorder = Recorder(live)
    first = len(recorder.events)
    machine.now = lambda: len(recorder.events)

    async def life() -> None:
        clients = rng.choice((1, 2, 2, 3))
        await asyncio.gather(*(machine.work(f"m{n}", rng.choice((1, 2, 3))) for n in range(clients)))

    try:
        with recorder.recording():
            loop.run_until_complete(life())
    finally:
        loop.close()
    end = rng.randint(first, len(recorder.events))
    loss = rng.choice((Loss.ANY, Loss.ANY, Loss.ALL, Loss.BYTES))
    report.injected[_FAULTS[loss]] += 1
    for number, event in enumerate(recorder.events[first:end], first):
        what = event.path or (f"file {event.file}" if event.file else "")
        machine.note("disk", f"{number}: {event.verb} {_RANDOM.sub('…', what)}".rstrip())
    machine.note("disk", f"the power fails after event {end} of {len(recorder.events)}: {_FAULTS[loss].value}")
    power_loss.Trace(recorder.events, promises).image(end, image, loss, rng)
    # Calls from after that moment never were, and those without an answer by then are open.
    report.history[:] = [op for op in report.history if op.began < end]
    for op in report.history:
        if op.ended is None or op.ended > end:
            op.ended, op.outcome = None, "open"
        elif op.outcome == "refused":
            # Perhaps by a change that was not acknowledged, and is lost.
            op.outcome = "failed"
    _go_on(report, rng, image, layout, len(recorder.events) + 1)


def _go_on(report: Report, rng: random.Random, image: Path, layout: Layout, now: int) -> None:
    """Open the folder as it was found, read all of it, and commit once more."""
    loop = VirtualLoop()
    machine = _Machine(loop, rng, image, layout, report)
    ticks = iter(range(now, now + 1000))
    machine.now = lambda: next(ticks)
    machine._commits = 1000

    async def read_all() -> None:
        repository = await machine.opened()
        await _read_history(machine, repository)
        await repository.aclose()

    async def check_all() -> None:
        await read_all()
        await machine.work("n1", 1)
        # A client of its own, which knows nothing.
        await read_all()

    try:
        loop.run_until_complete(check_all())
    except (IcechunkError, FormatError) as error:
        report.problems.append(f"after the power failure: {type(error).__name__}: {error}")
    finally:
        loop.close()
    start = View(branches={MAIN: (ROOT, sessions.FIRST)}, tags={})
    verdict = check(report.history, independent=layout is Layout.REFS, start=start)
    report.problems += verdict.problems
    report.undecided = verdict.undecided
    for op in report.history:
        report.outcomes[op.outcome] += 1


async def _read_history(machine: _Machine, repository: Repository) -> None:
    """Enter the whole history of ``main`` and the chunks of each of its commits into the history of outcomes."""
    began, found = machine.now(), [info async for info in repository.async_ancestry(branch=MAIN)]
    names = [ROOT if info.parent_id is None else info.message for info in found]
    tags = {
        name: await _message(repository, await repository.lookup_tag_async(name))
        for name in sorted(await repository.list_tags_async())
    }
    view = View(branches={MAIN: tuple(names[::-1])}, tags=tags)
    machine.report.history.append(
        Operation(client="z", verb="read", began=began, ended=machine.now(), outcome="ok", seen=view)
    )
    machine.note("z", f"sees {'←'.join(names[::-1])}")
    for info, name in zip(found, names, strict=True):
        if name == ROOT:
            continue
        session = await repository.readonly_session_async(snapshot_id=info.id)
        content = {key: await sessions.get_chunk(session, key) for key in sessions.CHUNKS}
        now = machine.now()
        machine.report.history.append(
            Operation(client="z", verb="read-content", commit=name, began=now, ended=now, outcome="ok", content=content)
        )
