"""Running a few coroutines at once, with one plain exception at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

__all__ = ["run_all", "run_each"]

T = TypeVar("T")


async def run_all(*work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Run all at once; the first error cancels the others and is raised as itself, not in a group."""
    try:
        # Not anyio's: its wrapper leaves a coroutine never awaited where it is cancelled before its first step.
        async with asyncio.TaskGroup() as group:
            for item in work:
                group.create_task(item())
    except BaseExceptionGroup as errors:
        raise _first(errors) from None


async def run_each(work: Callable[[T], Awaitable[Any]], items: Iterable[T], *, limit: int) -> None:
    """Run ``work`` for every item, at most ``limit`` at once; errors as in `run_all`."""
    todo = list(items)
    waiting = iter(todo)

    async def worker() -> None:
        for item in waiting:
            await work(item)

    await run_all(*[worker] * min(limit, len(todo)))


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    for error in errors.exceptions:
        found = _first(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, Exception):
            return found
    return found
