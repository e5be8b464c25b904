"""Turns of clients that write to one log at the same time."""

from __future__ import annotations

import asyncio

import pytest

from icechunk.log.repository.entries.crowd import TAG_BYTES, Crowd, new_tag, tag_of
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.entry import slot_key
from icechunk.testing.scripted import ScriptedStorage
from tests.log.repository.strategies import an_id
from tests.log.repository.world import World, until

TRIP_US = 20_000


def nonce(client: int) -> bytes:
    return new_tag(lambda count: bytes([client]) * count).ljust(16, b"\0")


def crowd_of(*clients: int, me: int = 0, interval_us: int = 30_000, trip_us: int = TRIP_US) -> tuple[Crowd, int]:
    """What client ``me`` knows after entries of these clients, and when it read the last of them, µs."""
    crowd, now_us = Crowd(nonce(me)[:TAG_BYTES]), 0
    crowd.note_trip(trip_us)
    for n, client in enumerate(clients, 1):
        now_us += interval_us
        crowd.note(n, nonce(client), now_us)
    return crowd, now_us


def test_the_turn_is_that_of_the_client_that_has_waited_longest() -> None:
    entries = (0, 1, 2, 3, 0, 1, 2)
    aheads = []
    for client in range(4):
        crowd, now_us = crowd_of(*entries, me=client)
        aheads.append(crowd.ahead(now_us))
    # 3 is next, then 0, 1, 2: each client finds the same order.
    assert aheads == [1, 2, 3, 0]


def test_a_log_is_busy_while_entries_of_others_come_soon_one_after_the_other() -> None:
    crowd, now_us = crowd_of(1, 0, 2, 1)
    assert crowd.is_busy(now_us)
    assert crowd.is_busy(now_us + 16 * 30_000)
    assert not crowd.is_busy(now_us + 17 * 30_000)
    alone, now_us = crowd_of(0, 0, 0, 0)
    assert not alone.is_busy(now_us)
    slow, now_us = crowd_of(1, 0, 1, interval_us=300_000)
    assert not slow.is_busy(now_us)
    assert not Crowd(nonce(0)[:TAG_BYTES]).is_busy(0)


def test_a_client_without_an_entry_waits_for_no_turn() -> None:
    crowd, now_us = crowd_of(1, 2, 3, 1, 2, 3)
    assert crowd.ahead(now_us) == 0


def test_members_let_newcomers_in_first_for_a_while() -> None:
    crowd, now_us = crowd_of(1, 0, 1, 2, me=0)
    assert crowd.ahead(now_us) == 1
    assert crowd.ahead(now_us + 4 * TRIP_US) == 0
    crowd.note(5, nonce(1), now_us + 30_000)
    assert crowd.ahead(now_us + 30_000) == 0


def test_turns_pass_that_are_not_used() -> None:
    crowd, now_us = crowd_of(1, 2, 0, 1, 2, 0, me=0)
    assert [crowd.ahead(now_us + trips * TRIP_US) for trips in (0, 3, 4, 8, 60)] == [2, 2, 1, 0, 0]


def test_entries_of_a_client_without_a_tag_are_in_no_order() -> None:
    """Each would be the turn of a client that never comes again."""
    assert tag_of(bytes([7]) * 16) is None
    crowd, now_us = crowd_of(1, 2, 0, 1, 2, 0, me=0)
    for n in range(7, 20):
        now_us += 30_000
        crowd.note(n, bytes([n]) * 16, now_us)
    crowd.note(20, nonce(1), now_us)
    assert crowd.ahead(now_us) == 1
    crowd.note(21, nonce(2), now_us)
    assert crowd.ahead(now_us) == 0


def test_turns_pass_although_a_client_writes_out_of_turn() -> None:
    crowd, now_us = crowd_of(1, 2, 0, 1, 2, 0, me=0)
    for n, trips in enumerate((1, 2, 3, 4, 6, 8), 7):
        crowd.note(n, bytes([n]) * 16, now_us + trips * TRIP_US)
        assert crowd.ahead(now_us + trips * TRIP_US) == 2 - trips // 4


def test_a_client_that_lets_its_turn_pass_is_forgotten() -> None:
    crowd, now_us = crowd_of(3, 1, 0, *(1, 0) * 2, me=0)
    assert crowd.ahead(now_us) == 1
    crowd, now_us = crowd_of(3, 1, 2, 0, *(1, 2, 0) * 2, me=0)
    assert crowd.ahead(now_us) == 2


def test_there_are_no_turns_where_clients_are_not_in_each_others_way() -> None:
    for crowd, now_us in (
        crowd_of(1, 2, 0, 1, 2, 0, interval_us=7 * TRIP_US),
        crowd_of(1, 2, 0, 1, 2, 0, interval_us=5_000, trip_us=2_000),
        crowd_of(1, 2, 0, 1, 2, 0, trip_us=0),
    ):
        assert crowd.ahead(now_us) == 0


def test_as_many_entries_are_expected_as_the_pace_says() -> None:
    crowd, now_us = crowd_of(1, 2, 0, 1, 2, 0)
    assert [crowd.expected(now_us + passed) for passed in (0, 29_000, 30_000, 95_000, 10**9)] == [1, 1, 2, 4, 16]


def test_entries_are_expected_without_turns_too_but_not_many() -> None:
    crowd, now_us = crowd_of(1, 2, 0, 1, 2, 0, interval_us=5_000, trip_us=2_000)
    assert [crowd.expected(now_us + passed) for passed in (0, 5_000, 35_000, 40_000, 10**9)] == [1, 2, 8, 0, 0]


def test_no_entries_are_expected_of_a_slow_log_nor_of_this_client_alone() -> None:
    for crowd, now_us in (
        crowd_of(1, 2, 0, 1, 2, 0, interval_us=260_000, trip_us=2_000),
        crowd_of(0, 0, 0, 0),
        crowd_of(1, *(0,) * 16),
        crowd_of(1, *(0,) * 16, interval_us=5_000, trip_us=2_000),
    ):
        assert crowd.expected(now_us) == 0


def test_a_request_that_was_held_up_does_not_count() -> None:
    crowd, _ = crowd_of()
    crowd.note_trip(5 * TRIP_US)
    assert crowd.trip_us == TRIP_US
    for _ in range(16):
        crowd.note_trip(3 * TRIP_US)
    assert crowd.trip_us == 3 * TRIP_US


# ------------------------------------------------------------------------ in the log layout


@pytest.fixture
def crowded(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A store a round trip away: on the clock of tests requests take no time."""
    monkeypatch.setattr(Crowd, "trip_us", TRIP_US)
    return world


async def taking_turns(world: World) -> tuple[LogLayout, ScriptedStorage, LogLayout]:
    """Two clients that have written in turn; the next turn is the second one's."""
    first, storage = await world.create()
    second, _ = await world.open()
    for log in (first, second):
        await log.prepare_writes()
    for i in range(4):
        for log in (second, first):
            world.clock.move(0.03)
            await log.append(world.commit(10 * i + (log is first) + 1))
    await second.refresh()
    return first, storage, second


async def test_the_nonces_of_a_client_begin_with_its_tag(crowded: World) -> None:
    first, _, second = await taking_turns(crowded)
    nonces = [first.view.nonce_of(first.epoch, n) or b"" for n in range(1, 9)]
    assert [nonce[:TAG_BYTES] for nonce in nonces] == [second.view.crowd.tag, first.view.crowd.tag] * 4
    assert len({nonce[TAG_BYTES:] for nonce in nonces}) == 8


async def test_a_client_looks_until_the_one_before_it_has_taken_its_turn(crowded: World) -> None:
    first, _, second = await taking_turns(crowded)
    waiting = asyncio.create_task(first.refresh_in_turn())
    await asyncio.sleep(0)
    crowded.clock.move(0.03)
    state = await second.refresh_in_turn()
    assert not waiting.done()
    await second.append(crowded.commit(100))
    assert state.branches["main"] != an_id(100)
    assert (await waiting).branches["main"] == an_id(100)


async def test_a_client_goes_on_if_the_one_before_it_lets_its_turn_pass(crowded: World) -> None:
    first, _, _ = await taking_turns(crowded)
    waiting = asyncio.create_task(first.refresh_in_turn())
    # private: it has begun to ask for the slot
    await until(lambda: bool(first._asks))
    crowded.clock.move(4 * TRIP_US / 1e6)
    await waiting
    assert first.n == 8


async def test_a_wait_for_a_turn_that_is_cancelled_or_closed_leaves_nothing_behind(crowded: World) -> None:
    first, _, _ = await taking_turns(crowded)
    waiting = asyncio.create_task(first.refresh_in_turn())
    # private: it has begun to ask for the slot
    await until(lambda: bool(first._asks))
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()


async def test_in_a_crowd_a_look_reads_the_expected_slots_at_once_and_lists_nothing(crowded: World) -> None:
    first, storage, second = await taking_turns(crowded)
    for i in range(3):
        crowded.clock.move(0.03)
        await second.append(crowded.commit(100 + i))
    before = len(storage.requests)
    await first.refresh()
    assert first.n == 11
    keys = [(one.verb, one.key) for one in storage.requests[before:]]
    assert keys == [("get", slot_key(first.epoch, n)) for n in range(9, 14)]


async def test_a_client_that_commits_alone_and_fast_asks_for_one_slot(world: World) -> None:
    log, storage = await world.create()
    for i in range(4):
        log.view.crowd.note_trip(TRIP_US)
        world.clock.move(0.03)
        await log.append(world.commit(1 + i))
    before = len(storage.requests)
    await log.refresh()
    assert [(one.verb, one.key) for one in storage.requests[before:]] == [("get", slot_key(log.epoch, 5))]


async def test_a_slot_beyond_an_absent_one_does_not_hold_up_a_look(crowded: World) -> None:
    first, _, second = await taking_turns(crowded)
    await second.append(crowded.commit(100))
    await second.append(crowded.commit(101))
    await crowded.store.delete([slot_key(first.epoch, 9)])
    await first.refresh()
    assert first.n == 8


async def test_a_quiet_client_looks_once(world: World) -> None:
    log, storage = await world.create()
    await log.append(world.commit(1))
    before = len(storage.requests)
    await log.refresh_in_turn()
    assert [(one.verb, one.key) for one in storage.requests[before:]] == [("get", slot_key(log.epoch, 2))]
