"""When the files embedded in a client's entries become objects, on a store with latency, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from icechunk.format.ids import ObjectId
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.objects import read_repo
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import RepositoryLog
from icechunk.storage.memory import MemoryStorage
from icechunk.testing.wrapping import WrappingStorage
from tools.simulator.loop import VirtualLoop
from tools.simulator.writers import commit_proposal

ROUND_TRIP_S = 0.02


class Far(WrappingStorage):
    """A store a round trip away, which notes when each PUT began."""

    def __init__(self, inner: MemoryStorage) -> None:
        super().__init__(inner)
        self.puts: list[tuple[float, str]] = []

    async def get(self, *arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(ROUND_TRIP_S)
        return await self.inner.get(*arguments, **options)

    async def put(self, key: str, *arguments: Any, **options: Any) -> Any:
        self.puts.append((asyncio.get_running_loop().time(), key))
        await asyncio.sleep(ROUND_TRIP_S)
        return await self.inner.put(key, *arguments, **options)

    def began_s(self, start: str) -> list[float]:
        """Times of the PUTs of keys that start so."""
        return [at_s for at_s, key in self.puts if key.startswith(start)]


class Client:
    """A client of a log that was just created, and its commits, each of which embeds a file."""

    def __init__(self) -> None:
        self.rng = random.Random(0)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.sources = loop.sources(self.rng.randbytes)
        self.store = MemoryStorage(self.sources)
        self.far = Far(self.store)

    async def open(self) -> LogLayout:
        await (await create_log(self.store, self.sources)).aclose()
        return await self.join()

    async def join(self) -> LogLayout:
        """Another client of the log."""
        log = await open_repository(self.far, self.sources)
        assert isinstance(log, LogLayout)
        await log.prepare_writes()
        self.far.puts.clear()
        return log

    async def checkpoint_n(self) -> int:
        """The last slot that ``repo`` holds."""
        found = await read_repo(self.store, self.sources)
        assert found is not None
        assert found.known.marker is not None
        return found.known.marker.n

    async def commit(self, log: RepositoryLog) -> None:
        id = ObjectId(self.rng.randbytes(12))
        proposal = commit_proposal(id, "main", now_us=self.sources.wall_us())
        await log.append(proposal, files={f"snapshots/{id.hex()}": b"small"})

    async def commit_until(self, log: LogLayout, end_s: float) -> None:
        """Four callers that commit again and again, so that one of them always waits."""

        async def work(delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            while asyncio.get_running_loop().time() < end_s:
                await self.commit(log)

        await asyncio.gather(*(work(i * ROUND_TRIP_S / 4) for i in range(4)))


def run(body: Callable[[Client], Awaitable[None]]) -> None:
    async def main() -> None:
        await body(Client())

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


def test_files_and_repo_are_put_after_the_callers_that_wait() -> None:
    async def body(client: Client) -> None:
        log = await client.open()
        await client.commit_until(log, asyncio.get_running_loop().time() + 0.5)
        await asyncio.sleep(1)
        entries_s, files_s = client.far.began_s("log/"), client.far.began_s("snapshots/")
        assert len(entries_s) > 20
        assert len(files_s) == len(log.state.snapshots) - 1
        landed_s = max(entries_s) + ROUND_TRIP_S
        for put_s in (min(files_s), min(client.far.began_s("repo"))):
            assert landed_s <= put_s + 1e-6 < landed_s + 30 * ROUND_TRIP_S
        await log.aclose()

    run(body)


def test_files_and_repo_are_put_after_a_second_if_callers_always_wait() -> None:
    async def body(client: Client) -> None:
        log = await client.open()
        began_s = asyncio.get_running_loop().time()
        await client.commit_until(log, began_s + 4)
        for start in ("snapshots/", "repo"):
            assert 1 <= min(client.far.began_s(start)) - began_s < 1 + 12 * ROUND_TRIP_S
        # At most those of the last second and of a batch on its way are missing.
        assert len(client.far.began_s("snapshots/")) > len(log.state.snapshots) / 2
        await log.aclose()
        assert len({key for _, key in client.far.puts if key.startswith("snapshots/")}) == len(log.state.snapshots) - 1

    run(body)


def test_a_requested_checkpoint_does_not_wait_for_callers() -> None:
    async def body(client: Client) -> None:
        log = await client.open()
        began_s = asyncio.get_running_loop().time()
        work = asyncio.ensure_future(client.commit_until(log, began_s + 0.8))
        await asyncio.sleep(0.2)
        head = log.n
        await log.checkpoint()
        assert asyncio.get_running_loop().time() - began_s < 0.2 + 10 * ROUND_TRIP_S
        assert log.view.checkpoint_n >= head > 0
        await work
        await log.aclose()

    run(body)


async def crowd(client: Client, seconds: float) -> list[LogLayout]:
    """Clients that have committed at the same time, again and again."""
    logs = [await client.open(), *[await client.join() for _ in range(3)]]
    end_s = asyncio.get_running_loop().time() + seconds

    async def work(log: LogLayout) -> None:
        while asyncio.get_running_loop().time() < end_s:
            await log.refresh()
            await client.commit(log)

    await asyncio.gather(*(work(log) for log in logs))
    return logs


def test_in_a_crowd_each_file_is_put_about_once_and_repo_is_seldom_written() -> None:
    async def body(client: Client) -> None:
        logs = await crowd(client, 8)
        commits = max(log.n for log in logs)
        assert commits > 150
        # The writer of each 16th slot brings it up to the head, in a few round trips.
        assert commits - await client.checkpoint_n() < 48
        # If each client put its own files, and wrote checkpoints on its own, it would be twice as many.
        assert len(client.far.began_s("snapshots/")) < 1.5 * commits
        assert len(client.far.began_s("repo")) < commits / 8
        for log in logs:
            await log.aclose()

    run(body)


def test_after_a_crowd_the_rest_is_put_soon() -> None:
    async def body(client: Client) -> None:
        logs = await crowd(client, 3)
        commits = max(log.n for log in logs)
        await asyncio.sleep(5)
        put = {key for _, key in client.far.puts if key.startswith("snapshots/")}
        assert len(put) == commits
        assert await client.checkpoint_n() == commits
        for log in logs:
            await log.aclose()

    run(body)


def test_a_client_that_ends_in_a_crowd_puts_its_files_first() -> None:
    async def body(client: Client) -> None:
        logs = await crowd(client, 1)
        last = max(logs, key=lambda log: log.n)
        assert last.view.crowd.is_busy(client.sources.elapsed_us())
        began_s = asyncio.get_running_loop().time()
        await last.aclose()
        assert asyncio.get_running_loop().time() - began_s < 20 * ROUND_TRIP_S
        put = {key for _, key in client.far.puts if key.startswith("snapshots/")}
        assert len(put) >= last.n
        for log in logs:
            await log.aclose()

    run(body)
