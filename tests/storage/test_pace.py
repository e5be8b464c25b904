"""The pace that a service is asked at, learned from its refusals."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.storage.retry import Pace


async def test_nothing_is_bounded_until_the_service_asks_for_it() -> None:
    pace = Pace()
    async with asyncio.timeout(5):
        for _ in range(5000):
            await pace.enter()
    assert (pace.limit, pace.in_flight) == (None, 5000)


async def test_refusals_of_one_moment_halve_the_bound_once_and_those_sent_since_again() -> None:
    pace = Pace()
    epochs = [await pace.enter() for _ in range(64)]
    for epoch in epochs:
        pace.leave(epoch, True)
    assert pace.limit == 32
    epochs = [await pace.enter() for _ in range(32)]
    waiting = asyncio.ensure_future(pace.enter())
    await asyncio.sleep(0)
    assert not waiting.done()
    pace.leave(epochs[0], True)
    assert pace.limit == 16
    waiting.cancel()


async def test_bound_is_one_at_the_least_and_vanishes_once_all_is_well() -> None:
    pace = Pace()
    for _ in range(20):
        pace.leave(await pace.enter(), True)
    assert pace.limit == 1
    answers = 0
    while pace.limit is not None:
        pace.leave(await pace.enter(), False)
        answers += 1
    assert 500 < answers < 1000


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([True, False, None]), st.none() | st.integers(0, 6)), max_size=40
    )
)
def test_every_request_has_a_turn_even_if_others_are_refused_or_cancelled(
    visits: list[tuple[int, bool | None, int | None]],
) -> None:
    async def main() -> None:
        pace = Pace()

        async def visit(turns: int, refused: bool | None) -> None:
            epoch = await pace.enter()
            outcome = None
            try:
                for _ in range(turns):
                    await asyncio.sleep(0)
                outcome = refused
            finally:
                pace.leave(epoch, outcome)

        tasks = []
        for turns, refused, cancel_after in visits:
            task = asyncio.ensure_future(visit(turns, refused))
            tasks.append(task)
            if cancel_after is not None:
                for _ in range(cancel_after):
                    await asyncio.sleep(0)
                task.cancel()
        async with asyncio.timeout(10):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(error) for error in results} <= {type(None), asyncio.CancelledError}
        assert pace.in_flight == 0
        assert not pace._waiting

    asyncio.run(main())
