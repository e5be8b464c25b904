"""Running several reads at once, with the first error as it was raised; and waiting for tasks to end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import anyio

__all__ = ["finish_task", "run_all", "run_pair"]

T = TypeVar("T")
U = TypeVar("U")


async def run_all(jobs: Sequence[Callable[[], Awaitable[T]]], *, limit: int = 32) -> list[T]:
    """Run the jobs, at most ``limit`` at a time; results in the order of the jobs.

    The first failure cancels the others and is raised as it is, not in a group.
    """
    if len(jobs) == 1:
        return [await jobs[0]()]
    results: dict[int, T] = {}
    failures: list[Exception] = []
    waiting = iter(range(len(jobs)))

    async with anyio.create_task_group() as group:

        async def work() -> None:
            for i in waiting:
                try:
                    results[i] = await jobs[i]()
                except Exception as error:
                    failures.append(error)
                    group.cancel_scope.cancel()
                    return

        for _ in range(min(limit, len(jobs))):
            group.start_soon(work)
    if failures:
        raise failures[0]
    return [results[i] for i in range(len(jobs))]


async def run_pair(first: Callable[[], Awaitable[T]], second: Callable[[], Awaitable[U]]) -> tuple[T, U]:
    """Run two jobs of different types at once; errors as in `run_all`."""
    firsts: list[T] = []
    seconds: list[U] = []

    async def run_first() -> None:
        firsts.append(await first())

    async def run_second() -> None:
        seconds.append(await second())

    await run_all([run_first, run_second])
    return firsts[0], seconds[0]


async def finish_task(task: asyncio.Task[None] | None, grace_s: float) -> None:
    """Wait for a task of the log, and cancel it where it takes too long."""
    if task is None or task.done() or task is asyncio.current_task():
        return
    await asyncio.wait({task}, timeout=grace_s)
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
