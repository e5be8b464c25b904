"""Running a few coroutines at once, with one plain exception at the end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import anyio

__all__ = ["run_all", "run_each"]

T = TypeVar("T")


async def run_all(*work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    """Run all at once; the first error cancels the others and is raised as itself, not in a group."""
    try:
        async with anyio.create_task_group() as group:
            for item in work:
                group.start_soon(item)
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
