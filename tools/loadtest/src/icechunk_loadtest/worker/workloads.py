"""The workloads, each with three steps: `prepare`, `run` and `check`.

Only `run` is measured; `check` reads the stored data afterwards. All loops are bounded by
the numbers of the `Spec` and by its `seconds`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import zarr.api.asynchronous as zarr_async

from .content import Content, Corrupt
from .meter import Meter
from .objects import bounded
from .target import Target
from .targets import IcechunkTarget, set_zarr_concurrency

__all__ = ["WORKLOADS", "Run", "Spec"]

READERS_REFRESH = 16
"""Reads after which a reader of the mixed workload looks at the newest version."""
MAX_TRIES = 1_000
"""Attempts of one contended commit before it counts as an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The numbers of one run in one worker."""

    workload: str
    """A key of `WORKLOADS`."""
    chunks: int
    """Chunks in the array, at least 1."""
    chunk_bytes: int
    """Bytes of a chunk, at least 16."""
    ops: int
    """Operations to do, where the workload counts operations; for each task where several contend."""
    tasks: int
    """Tasks at a time, at least 1."""
    seconds: float
    """Time after which no operation begins any more."""
    index: int = 0
    """Number of this worker among those that run together; 0 is the one that prepares and checks."""
    seed: int = 0
    """Seed of contents and of random choices."""


class Run:
    """One workload on one target, in this worker."""

    def __init__(self, spec: Spec, target: Target) -> None:
        self.spec = spec
        self.target = target
        self.content = Content(spec.chunk_bytes, spec.seed)
        self.meter = Meter()
        self.acknowledged: list[str] = []
        self.data: Any = None
        self.read: Any = None
        self.appended = 0
        self._random = random.Random(f"{spec.seed}/{spec.index}")

    async def prepare(self) -> None:
        """Prepare the run: the first worker makes the dataset, the others open it."""
        if self.spec.index == 0:
            await WORKLOADS[self.spec.workload].prepare(self)
        else:
            await self.target.attach()

    async def run(self) -> None:
        """The measured part; a failure is counted, and ends it."""
        with self.meter.measuring():
            try:
                async with asyncio.timeout(self.spec.seconds * 2 + 60):
                    with set_zarr_concurrency(self.spec.tasks):
                        await WORKLOADS[self.spec.workload].run(self)
            except Exception as error:
                for leaf in _leaves(error):
                    self.failed(leaf)

    async def check(self, acknowledged: list[str]) -> list[str]:
        """Check the stored data and return problems; `acknowledged` are the messages of all workers' commits."""
        try:
            await WORKLOADS[self.spec.workload].check(self, acknowledged)
        except Exception as error:
            for leaf in _leaves(error):
                self.meter.problem(f"{type(leaf).__name__}: {leaf}")
        problems: list[str] = self.meter.result()["problems"]
        return problems

    def failed(self, error: BaseException) -> None:
        """Count an error, and note it as a problem where data were wrong."""
        self.meter.error(error)
        if isinstance(error, Corrupt):
            self.meter.problem(str(error))

    @property
    def over(self) -> bool:
        """Whether no further operation may begin."""
        return self.meter.elapsed_s >= self.spec.seconds

    def any_chunk(self) -> int:
        """The index of a random chunk."""
        return self._random.randrange(self.spec.chunks)

    async def read_and_check(self, index: int, *, at_least: int = 0) -> None:
        """Read one chunk and compare every byte."""
        with self.meter.operation("read", units=1, read=self.spec.chunk_bytes):
            data = await self.target.read(index)
        self.content.check(index, data, at_least=at_least)
        self.meter.bytes_verified += data.size


async def _create(run: Run) -> None:
    await run.target.create(run.spec.chunks)
    await run.target.attach()


async def _fill(run: Run) -> None:
    await run.target.create(run.spec.chunks)
    await run.target.begin()
    await run.target.write_all(run.content.chunks(0, run.spec.chunks))
    await run.target.commit("all chunks")
    await run.target.attach()


async def _nothing(run: Run, acknowledged: list[str]) -> None:
    return


async def _prepare_write(run: Run) -> None:
    await _create(run)
    run.data = run.content.chunks(0, run.spec.chunks)


async def _write(run: Run) -> None:
    spec, target = run.spec, run.target
    with run.meter.operation("write", units=spec.chunks, written=run.data.size):
        await target.begin()
        await target.write_all(run.data)
        await target.commit("all chunks")


async def _check_written(run: Run, acknowledged: list[str]) -> None:
    run.data = None
    await run.target.attach()
    run.content.check_all(await run.target.read_all())
    run.meter.bytes_verified += run.spec.chunks * run.spec.chunk_bytes


async def _read(run: Run) -> None:
    size = run.spec.chunks * run.spec.chunk_bytes
    with run.meter.operation("read all", units=run.spec.chunks, read=size):
        run.read = await run.target.read_all()


async def _check_read(run: Run, acknowledged: list[str]) -> None:
    data, run.read = run.read, None
    if data is not None:
        run.content.check_all(data)
        run.meter.bytes_verified += data.size


async def _read_random(run: Run) -> None:
    chosen = [run.any_chunk() for _ in range(run.spec.ops)]
    await bounded(run.read_and_check, chosen, run.spec.tasks, lambda: run.over)


async def _mixed(run: Run) -> None:
    """Readers look up chunks of ever newer versions while one writer keeps rewriting and committing."""
    spec, target = run.spec, run.target
    committed = 0
    reading = True

    async def write() -> None:
        nonlocal committed
        while reading and not run.over:
            version = committed + 1
            batch = [run.any_chunk() for _ in range(min(spec.tasks, spec.chunks))]
            with run.meter.operation(
                "write and commit", units=len(set(batch)), written=len(set(batch)) * spec.chunk_bytes
            ):
                await target.begin()
                async with asyncio.TaskGroup() as group:
                    for index in set(batch):
                        group.create_task(target.write(index, run.content.chunk(index, version)))
                await target.commit(f"version {version}")
            committed = version

    async def read() -> None:
        for turn in range(max(spec.ops // spec.tasks, 1)):
            if run.over:
                return
            if turn % READERS_REFRESH == 0:
                with run.meter.operation("refresh"):
                    await target.refresh()
            await run.read_and_check(run.any_chunk())

    writing = asyncio.create_task(write())
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(spec.tasks):
                group.create_task(read())
    finally:
        reading = False
        await writing


async def _append(run: Run) -> None:
    for turn in range(run.spec.ops):
        if run.over:
            return
        data = run.content.chunks(run.spec.chunks + turn, 1)
        with run.meter.operation("append and commit", units=1, written=data.size):
            await run.target.begin()
            await run.target.extend(data)
            await run.target.commit(f"append {turn}")
        run.appended += 1


async def _ingest(run: Run) -> None:
    async with run.target.ingesting() as put:
        for turn in range(run.spec.ops):
            if run.over:
                return
            data = run.content.chunks(run.spec.chunks + turn, 1)
            with run.meter.operation("put, durable", units=1, written=data.size):
                await put(data, turn)
            run.appended += 1


async def _check_appended(run: Run, acknowledged: list[str]) -> None:
    await run.target.attach()
    data = await run.target.read_all()
    wanted = (run.spec.chunks + run.appended) * run.spec.chunk_bytes
    if data.size < wanted:
        raise Corrupt(f"the array has {data.size} bytes where {wanted} were appended and committed")
    run.content.check_all(data)
    run.meter.bytes_verified += data.size


def _icechunk(run: Run) -> IcechunkTarget:
    if not isinstance(run.target, IcechunkTarget):
        raise TypeError("only icechunk has commits")
    return run.target


async def _commit_one(run: Run, name: str, value: int) -> None:
    import icechunk

    target = _icechunk(run)
    with run.meter.operation("commit", units=1):
        for _ in range(MAX_TRIES):
            try:
                await target.touch(name, value)
                break
            except icechunk.ConflictError:
                run.meter.conflicts += 1
        else:
            raise RuntimeError(f"{name} lost {MAX_TRIES} races")
    run.acknowledged.append(f"{name} {value}")


async def _prepare_contention(run: Run) -> None:
    await _create(run)
    target = _icechunk(run)
    session = await target.repo.writable_session_async("main")
    # the common parent exists before the race: two writers that both make it would conflict for another reason
    await zarr_async.open_group(session.store, path="writers", mode="a")
    await session.commit_async("a group for writers")
    await target.attach()


async def _commit_tasks(run: Run) -> None:
    async def one(task: int) -> None:
        for turn in range(run.spec.ops):
            if run.over:
                return
            await _commit_one(run, f"w{run.spec.index}t{task}", turn)

    async with asyncio.TaskGroup() as group:
        for task in range(run.spec.tasks):
            group.create_task(one(task))


async def _check_history(run: Run, acknowledged: list[str]) -> None:
    target = _icechunk(run)
    await target.attach()
    history = await target.history()
    for message in acknowledged:
        if history.count(message) != 1:
            raise Corrupt(f"acknowledged commit {message!r} is {history.count(message)} times in the history")


async def _cold_open(run: Run) -> None:
    for _ in range(run.spec.ops):
        if run.over:
            return
        index = run.any_chunk()
        with run.meter.operation("open to first chunk", units=1, read=run.spec.chunk_bytes):
            await run.target.attach()
            data = await run.target.read(index)
        run.content.check(index, data)
        run.meter.bytes_verified += data.size


async def _prepare_idle(run: Run) -> None:
    await _create(run)
    run.data = await _icechunk(run).repo.writable_session_async("main")


async def _idle(run: Run) -> None:
    """For `seconds`: nothing, with a repository and a session open."""
    with run.meter.operation("idle", units=1):
        await asyncio.sleep(run.spec.seconds)


async def _soak(run: Run) -> None:
    """For `seconds`: readers read at random, and now and then one rewrites chunks and commits them."""
    spec, target = run.spec, run.target
    committed = 0

    async def write() -> None:
        nonlocal committed
        while not run.over:
            version = committed + 1
            index = run.any_chunk()
            try:
                with run.meter.operation("write and commit", units=1, written=spec.chunk_bytes):
                    await target.begin()
                    await target.write(index, run.content.chunk(index, version))
                    await target.commit(f"version {version}")
                committed = version
                with run.meter.operation("refresh"):
                    await target.refresh()
            except Exception as error:
                run.failed(error)
                await asyncio.sleep(0.05)

    async def read() -> None:
        while not run.over:
            try:
                await run.read_and_check(run.any_chunk())
            except Exception as error:
                run.failed(error)
                await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as group:
        group.create_task(write())
        for _ in range(spec.tasks):
            group.create_task(read())


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


@dataclass(frozen=True, slots=True)
class Workload:
    """Three steps of a workload."""

    prepare: Callable[[Run], Awaitable[None]]
    """Not measured."""
    run: Callable[[Run], Awaitable[None]]
    """Measured."""
    check: Callable[[Run, list[str]], Awaitable[None]] = _nothing
    """Not measured; raises where something is wrong."""


WORKLOADS = {
    "write_small": Workload(_prepare_write, _write, _check_written),
    "write_large": Workload(_prepare_write, _write, _check_written),
    "read_small": Workload(_fill, _read, _check_read),
    "read_large": Workload(_fill, _read, _check_read),
    "read_random": Workload(_fill, _read_random),
    "mixed": Workload(_fill, _mixed),
    "append": Workload(_fill, _append, _check_appended),
    "ingest": Workload(_fill, _ingest, _check_appended),
    "commit": Workload(_prepare_contention, _commit_tasks, _check_history),
    "commit_tasks": Workload(_prepare_contention, _commit_tasks, _check_history),
    "commit_processes": Workload(_prepare_contention, _commit_tasks, _check_history),
    "cold_open": Workload(_fill, _cold_open),
    "idle": Workload(_prepare_idle, _idle),
    "soak": Workload(_fill, _soak),
}
"""Workloads by name; the catalogue of `icechunk_loadtest.plan` describes them."""
