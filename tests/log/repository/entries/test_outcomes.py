"""Rule 3 of the log layout: three outcomes, and which caller gets which.

Each test fails where its rule is left out. Where the loss can be shown, the test runs a second time with the rule
switched off, and sees the loss.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from icechunk.errors import (
    CommitOutcomeUnknown,
    ConflictError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.log.repository import events as e
from icechunk.log.repository.entries import client
from icechunk.log.repository.entry import encode_entry, slot_key
from icechunk.log.repository.event_json import encode_events
from icechunk.log.repository.port import SwapToken
from icechunk.testing.scripted import Request, Send
from tests.log.repository.strategies import an_id
from tests.log.repository.told import Told
from tests.log.repository.world import DAY_S, World, put_entry, settled, slots

# ---------------------------------------------------------------- rule 3


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


async def test_a_refusal_costs_one_look_if_there_is_no_new_entry_and_an_event_that_applies_costs_none(
    world: World,
) -> None:
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


async def test_a_client_that_has_not_looked_for_a_while_opens_the_log_before_it_writes(world: World) -> None:
    log, storage = await world.create()
    await log.append(world.commit(1))
    world.clock.move(4 * DAY_S)
    storage.requests.clear()
    await log.append(world.commit(2))
    sent = [(request.verb, request.key) for request in storage.requests]
    first_write = next(at for at, request in enumerate(storage.requests) if slots(request))
    assert ("get", "repo") in sent[:first_write]
    assert await world.history() == [an_id(1), an_id(2)]


async def test_callers_that_arrive_during_a_look_are_neither_lost_nor_refused_by_it(world: World) -> None:
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


# ---------------------------------------------------------------- rule 3: callers learn what was sent


async def test_a_caller_that_waits_on_after_a_loss_gets_the_token_of_the_next_entry(world: World) -> None:
    log, _ = await settled(world)
    other, _ = await world.open()
    await other.append(world.commit(1))
    told = Told()
    await log.append(told.of(world.commit(2)))
    assert [token and token.n for token in told] == [1, None, 2]
    assert told[-1] is not None
    assert await log.settle(told[-1])


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


async def test_settling_does_not_rely_on_a_slot_that_may_have_been_pruned_and_filled_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_MANY_NONCES", 0)
    log, _ = await world.create()
    sleepless, _ = await world.open()
    token = SwapToken(epoch=log.epoch, n=1, nonces=(b"x" * 16,), known_us=world.clock.now_us)
    await log.append(lambda _: [e.TagCreated(name="theirs", snapshot=FIRST_SNAPSHOT)])
    await log.append(world.commit(1))
    await log.checkpoint()
    for _ in range(3):
        await sleepless.refresh()
        world.clock.move(3 * DAY_S)
    await sleepless.refresh()
    await world.store.delete([slot_key(log.epoch, 1)])
    await put_entry(world.store, log.epoch, 1, e.TagCreated(name="late", snapshot=FIRST_SNAPSHOT))
    with pytest.raises(CommitOutcomeUnknown):
        await sleepless.settle(token)
