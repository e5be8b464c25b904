"""The bound on requests and bytes in flight."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.transfer.limiter import Gate


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5), st.none() | st.integers(0, 8)), max_size=30),
    st.integers(1, 4),
    st.none() | st.integers(1, 10),
)
def test_bounds_hold_and_every_request_enters_after_any_cancellation(
    visits: list[tuple[int, int, int | None]], max_requests: int, max_bytes: int | None
) -> None:
    async def main() -> None:
        gate = Gate(max_requests, max_bytes)

        async def visit(size: int, turns: int) -> None:
            await gate.enter(size)
            try:
                assert gate.requests <= max_requests
                assert max_bytes is None or gate.bytes <= max_bytes or gate.requests == 1
                for _ in range(turns):
                    await asyncio.sleep(0)
            finally:
                gate.leave(size)

        tasks = []
        for size, turns, cancel_after in visits:
            task = asyncio.ensure_future(visit(size, turns))
            tasks.append(task)
            if cancel_after is not None:
                for _ in range(cancel_after):
                    await asyncio.sleep(0)
                task.cancel()
        async with asyncio.timeout(10):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(error) for error in results} <= {type(None), asyncio.CancelledError}
        assert (gate.requests, gate.bytes) == (0, 0)

    asyncio.run(main())


async def test_the_first_request_goes_first_even_if_a_later_one_would_fit() -> None:
    gate = Gate(10, 10)
    order: list[int] = []

    async def visit(n: int, size: int) -> None:
        await gate.enter(size)
        order.append(n)
        await asyncio.sleep(0)
        gate.leave(size)

    await asyncio.gather(*[visit(n, size) for n, size in enumerate([8, 8, 1, 1])])
    assert order == [0, 1, 2, 3]


async def test_waiter_let_in_at_the_moment_of_its_cancellation_gives_its_place_on() -> None:
    gate = Gate(1)
    await gate.enter()
    first = asyncio.ensure_future(gate.enter())
    second = asyncio.ensure_future(gate.enter())
    await asyncio.sleep(0)
    gate.leave()
    first.cancel()
    await asyncio.wait_for(second, 5)
    assert gate.requests == 1
