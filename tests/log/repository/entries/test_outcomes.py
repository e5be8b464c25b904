"""Rule 3 of the log layout: three outcomes, and who is told which.

Each test fails where its rule is left out. Where the loss can be shown, the test runs a second time with the rule
switched off, and sees the loss.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from icechunk.errors import (
    CommitOutcomeUnknown,
    ConflictError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.log.repository import events as e
from icechunk.log.repository import settle
from icechunk.log.repository.entries.entry import encode_entry, encode_events, slot_key
from icechunk.log.repository.port import SwapToken
from icechunk.testing.scripted import Request, Send, lost_answer
from tests.log.repository.strategies import an_id
from tests.log.repository.world import World, settled, slots, until, waiting_for

# ---------------------------------------------------------------- rule 3


async def test_a_deadline_gives_an_outcome_that_is_unknown_and_a_token_that_settles_it(world: World) -> None:
    log, storage = await world.create()
    gate = asyncio.Event()

    storage.script = waiting_for(gate, slots)
    with pytest.raises(CommitOutcomeUnknown) as caught:
        await log.append(world.commit(1), deadline_s=0.05)
    token = pickle.loads(pickle.dumps(caught.value.token))
    assert (token.epoch, token.n, token.snapshots) == (log.epoch, 1, (an_id(1),))
    gate.set()
    assert await log.settle(token)
    assert await world.history() == [an_id(1)]


async def test_settling_from_another_process_fills_the_slot_so_that_a_late_put_finds_it_taken(world: World) -> None:
    log, storage = await world.create()
    await log.prepare_writes()
    late: list[Request] = []

    async def travel(request: Request, send: Send) -> object:
        if request.key.startswith("log/"):
            if request.verb == "put":
                late.append(request)
            raise lost_answer()
        return await send()

    storage.script = travel
    with pytest.raises(CommitOutcomeUnknown) as caught:
        await log.append(world.commit(1))
    other, _ = await world.open()
    assert not await other.settle(caught.value.token)
    for request in late:
        with pytest.raises(StorageError):
            await world.store.put(request.key, request.data, request.precondition)
    assert await world.history() == []
    await other.append(world.commit(2))
    assert await world.history() == [an_id(2)]
    assert not await other.settle(caught.value.token)


async def test_a_cancelled_caller_leaves_and_the_group_goes_on(world: World) -> None:
    log, storage = await world.create()
    await log.prepare_writes()
    gate = asyncio.Event()

    storage.script = waiting_for(gate, slots)
    first = asyncio.ensure_future(log.append(world.commit(1)))
    second = asyncio.ensure_future(log.append(lambda state: [e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)]))
    await until(lambda: any(slots(request) for request in storage.requests))
    third = asyncio.ensure_future(log.append(world.commit(3)))
    await asyncio.sleep(0)
    first.cancel()
    third.cancel()
    await asyncio.sleep(0)
    gate.set()
    assert "t" in (await second).tags
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(asyncio.CancelledError):
        await third
    assert await world.history() == [an_id(1)], "the first was in the entry, the third not yet"


async def test_closing_with_an_entry_in_flight_says_that_its_outcome_is_unknown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle, "CLOSE_GRACE_S", 0.01)
    log, storage = await world.create()
    await log.prepare_writes()

    async def hang(request: Request, send: Send) -> object:
        if slots(request):
            await asyncio.Event().wait()
        return await send()

    storage.script = hang
    waiting = asyncio.ensure_future(log.append(world.commit(1)))
    await until(lambda: any(slots(request) for request in storage.requests))
    await log.aclose()
    with pytest.raises(CommitOutcomeUnknown) as caught:
        await waiting
    assert caught.value.token.snapshots == (an_id(1),)
    with pytest.raises(SessionStateError):
        await log.append(world.commit(2))


STALE: dict[str, tuple[Callable[[World], Any], Callable[[World], Any]]] = {
    "commit on a new tip": (lambda w: w.commit(1), lambda w: w.commit(2, parent=an_id(1))),
    "tag on a new snapshot": (
        lambda w: w.commit(1),
        lambda w: lambda state: [e.TagCreated(name="t", snapshot=an_id(1))],
    ),
    "delete of a new branch": (
        lambda w: lambda state: [e.BranchCreated(name="b", snapshot=FIRST_SNAPSHOT)],
        lambda w: lambda state: [e.BranchDeleted(name="b")],
    ),
    "configuration that was changed": (
        lambda w: lambda state: [e.ConfigReplaced(config={"a": 1})],
        lambda w: lambda state: [e.ConfigReplaced(config={"a": 2}, expected={"a": 1}, check=True)],
    ),
}


@pytest.mark.parametrize("case", STALE)
async def test_a_client_that_has_not_looked_for_a_while_looks_before_it_refuses(world: World, case: str) -> None:
    log, storage = await settled(world)
    other, _ = await world.open()
    theirs, mine = STALE[case]
    await other.append(theirs(world))
    storage.requests.clear()
    await log.append(mine(world))
    assert len([r for r in storage.requests if slots(r)]) == 1, "what was bound to lose is not sent"


async def test_a_refusal_costs_one_look_where_there_is_no_news_and_what_applies_none(world: World) -> None:
    log, storage = await settled(world)
    storage.requests.clear()
    outcomes = await asyncio.gather(
        *(log.append(world.commit(i, parent=an_id(9))) for i in range(3)), log.append(world.commit(5)),
        return_exceptions=True,
    )  # fmt: skip
    assert [type(outcome) for outcome in outcomes[:3]] == [ConflictError] * 3
    assert not isinstance(outcomes[3], BaseException)
    assert len(storage.of("get")) == 1
    storage.requests.clear()
    await log.append(world.commit(6))
    assert not [r for r in storage.of("get") if r.key != "repo"]


async def test_callers_who_come_while_the_client_looks_are_neither_lost_nor_refused_by_that_look(world: World) -> None:
    log, storage = await settled(world)
    other, _ = await world.open()
    late: list[asyncio.Future[object]] = []

    async def more_come(request: Request, send: Send) -> object:
        answer = None
        try:
            answer = await send()
        finally:
            if request.verb == "get" and request.key.startswith("log/") and not late:
                # After the look found nothing.
                await other.append(world.commit(1))
                late.append(asyncio.ensure_future(log.append(world.commit(2, parent=an_id(1)))))
                await asyncio.sleep(0)
        return answer

    storage.script = more_come
    with pytest.raises(ConflictError):
        await log.append(world.commit(3, parent=an_id(9)))
    await late[0]
    assert await world.history() == [an_id(1), an_id(2)]


# ---------------------------------------------------------------- rule 3: who is told what was sent


class Told(list[Any]):
    """What a caller was told of its entry."""

    @property
    def open_(self) -> bool:
        return bool(self) and self[-1] is not None


async def test_who_is_cancelled_before_the_entry_is_sent_was_told_nothing_and_nothing_lands(world: World) -> None:
    log, storage = await settled(world)
    gate = asyncio.Event()

    storage.script = waiting_for(gate, slots)
    first = asyncio.ensure_future(log.append(world.commit(1)))
    await until(lambda: any(slots(request) for request in storage.requests))
    told = Told()
    second = asyncio.ensure_future(log.append(world.commit(2), on_sent=told.append))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait({second})
    gate.set()
    await first
    assert told == []
    assert await world.history() == [an_id(1)]


async def test_who_is_cancelled_during_the_put_holds_the_token_that_settles_it(world: World) -> None:
    log, storage = await settled(world)
    gate, told = asyncio.Event(), Told()

    async def hold(request: Request, send: Send) -> object:
        if slots(request):
            assert told.open_, "told before it is sent"
            await gate.wait()
        return await send()

    storage.script = hold
    caller = asyncio.ensure_future(log.append(world.commit(1), on_sent=told.append))
    await until(lambda: any(slots(request) for request in storage.requests))
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert [(token.n, token.snapshots) for token in told] == [(1, (an_id(1),))]
    gate.set()
    assert await log.settle(told[-1])
    assert told.open_, "landed: nobody takes the token back"
    assert await world.history() == [an_id(1)]


async def test_who_was_cancelled_during_a_put_that_lost_is_told_that_nothing_is_open_any_more(world: World) -> None:
    log, storage = await settled(world)
    other, _ = await world.open()
    gate, told = asyncio.Event(), Told()

    storage.script = waiting_for(gate, slots)
    caller = asyncio.ensure_future(log.append(world.commit(1), on_sent=told.append))
    await until(lambda: any(slots(request) for request in storage.requests))
    caller.cancel()
    await asyncio.wait({caller})
    await other.append(world.commit(2))
    gate.set()
    await until(lambda: not told.open_)
    assert [token is None for token in told] == [False, True]
    await log.append(world.commit(3))
    assert len(told) == 2, "it is not sent again"
    assert await world.history() == [an_id(2), an_id(3)]


async def test_who_waits_on_after_a_loss_is_told_of_the_next_entry(world: World) -> None:
    log, _ = await settled(world)
    other, _ = await world.open()
    await other.append(world.commit(1))
    told = Told()
    await log.append(world.commit(2), on_sent=told.append)
    assert [token and token.n for token in told] == [1, None, 2]
    assert await log.settle(told[-1])


async def test_a_token_left_open_by_silence_is_taken_back_when_the_next_swap_sees_the_loss(world: World) -> None:
    log, storage = await settled(world)
    other, _ = await world.open()
    told = Told()

    async def silence(request: Request, send: Send) -> object:
        if request.key.startswith("log/"):
            raise lost_answer()
        return await send()

    storage.script = silence
    with pytest.raises(CommitOutcomeUnknown):
        await log.append(world.commit(1), on_sent=told.append)
    assert told.open_
    storage.script = None
    await other.append(world.commit(2))
    await log.append(world.commit(3))
    assert not told.open_


async def test_a_callback_that_fails_harms_nobody(world: World, caplog: pytest.LogCaptureFixture) -> None:
    log, _ = await world.create()

    def fail(token: SwapToken | None) -> None:
        raise KeyError("mine")

    await log.append(world.commit(1), on_sent=fail)
    assert "callback" in caplog.text
    assert await world.history() == [an_id(1)]


async def test_a_token_of_an_entry_that_is_void_as_a_whole_did_not_land(world: World) -> None:
    log, _ = await settled(world)
    tag = e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)
    for n, events in ((1, [tag, tag]), (2, [tag, *world.commit(1, parent=an_id(7))(log.state)])):
        data = encode_entry(
            n=n, nonce=b"x" * 16, time_us=world.clock.now_us, since_us=None, events=encode_events(events)
        )
        await world.store.put(slot_key(log.epoch, n), data)
    other, _ = await world.open()
    for one in (log, other):
        assert not await one.settle(SwapToken(epoch=log.epoch, n=1, nonces=(b"x" * 16,)))
        assert not await one.settle(SwapToken(epoch=log.epoch, n=2, nonces=(b"x" * 16,), snapshots=(an_id(1),)))
        assert "t" not in one.state.tags
