"""Work on items as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from icechunk.transfer.tasks import run_stream


async def test_no_more_is_asked_for_than_has_room() -> None:
    asked: list[int] = []
    done: list[int] = []
    most = 0

    async def items() -> AsyncGenerator[int, None]:
        for weight in (3, 3, 3, 20, 1, 1, 1, 1, 1):
            asked.append(weight)
            yield weight

    async def work(weight: int) -> None:
        nonlocal most
        # What was asked for last waits for room.
        most = max(most, sum(asked[:-1]) - sum(done))
        for _ in range(5):
            await asyncio.sleep(0)
        done.append(weight)

    await run_stream(work, items(), lambda weight: weight, limit=3, max_weight=7)
    assert sorted(done) == [1, 1, 1, 1, 1, 3, 3, 3, 20]
    assert most <= 20


async def test_an_error_ends_the_source_and_all_other_work_and_is_raised_as_itself() -> None:
    ended: list[str] = []

    async def items() -> AsyncGenerator[int, None]:
        try:
            for i in range(100):
                yield i
        finally:
            ended.append("items")

    async def work(item: int) -> None:
        if item == 3:
            raise KeyError("three")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("work")
            raise

    with pytest.raises(KeyError, match="three"):
        await run_stream(work, items(), lambda item: 1, limit=10, max_weight=10)
    assert ended.count("items") == 1
    assert ended.count("work") >= 3


async def test_an_error_of_the_source_cancels_what_it_gave() -> None:
    async def items() -> AsyncGenerator[int, None]:
        yield 1
        raise ValueError("no more")

    async def work(item: int) -> None:
        await asyncio.sleep(60)

    with pytest.raises(ValueError, match="no more"):
        await run_stream(work, items(), lambda item: 1, limit=10, max_weight=10)
