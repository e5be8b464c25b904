"""Rules 4, 10 and 13 of the log layout: an entry is one unit, a collection is an entry, times only grow.

Each test fails where its rule is left out. Where the loss can be shown, the test runs a second time with the rule
switched off, and sees the loss.
"""

from __future__ import annotations

import asyncio

import pytest

from icechunk.errors import (
    ConflictError,
    FormatError,
    IcechunkError,
    SessionStateError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.log.repository import events as e
from icechunk.log.repository.entry import Entry, decode_entry, encode_entry, slot_key
from icechunk.log.repository.event_json import encode_events
from icechunk.log.repository.open import open_repository
from icechunk.maintenance.collect import collect_garbage
from icechunk.maintenance.limits import Limits
from icechunk.storage.port import Absent
from tests.log.repository.strategies import an_id
from tests.log.repository.world import World
from tests.raising import raises

# ---------------------------------------------------------------- rule 4


async def test_in_a_group_each_is_validated_after_the_ones_before(world: World) -> None:
    log, _ = await world.create()
    await log.prepare_writes()
    stale = [log.append(world.commit(i, parent=FIRST_SNAPSHOT)) for i in (1, 2)]
    tag = log.append(lambda state: [e.TagCreated(name="t", snapshot=state.branch_tip("main"))])
    first, second, tagged = await asyncio.gather(*stale, tag, return_exceptions=True)
    assert not isinstance(first, Exception)
    assert isinstance(second, ConflictError)
    assert not isinstance(tagged, BaseException)
    assert tagged.tags["t"] == an_id(1)
    assert log.n == 1
    assert await world.history() == [an_id(1)]


async def test_an_error_of_a_proposal_reaches_its_caller_only(world: World) -> None:
    log, _ = await world.create()

    def refuse(state: object) -> list[e.Event]:
        raise KeyError("mine")

    refused, fine = [*await asyncio.gather(log.append(refuse), log.append(world.commit(1)), return_exceptions=True)]
    assert isinstance(refused, KeyError)
    assert not isinstance(fine, Exception)


async def test_an_entry_with_a_stale_event_is_void_for_every_client(world: World) -> None:
    log, _ = await world.create()
    events = encode_events([*world.commit(1)(log.state), *world.commit(2)(log.state)])
    data = encode_entry(n=1, nonce=b"x" * 16, time_us=world.clock.now_us, since_us=None, events=events)
    await world.store.put(slot_key(log.epoch, 1), data)
    await log.refresh()
    other, _ = await world.open()
    assert log.n == other.n == 1
    assert log.state == other.state
    assert list(log.state.snapshots) == [FIRST_SNAPSHOT]


async def test_an_entry_of_a_newer_version_stops_readers_and_writers(world: World) -> None:
    log, _ = await world.create()
    data = encode_entry(n=1, nonce=b"x" * 16, time_us=1, since_us=None, events=[{"kind": "telepathy"}])
    await world.store.put(slot_key(log.epoch, 1), data)
    with raises(FormatError, "unsupported-spec-version", slot_key(log.epoch, 1)):
        await log.refresh()
    with raises(FormatError, "unsupported-spec-version", slot_key(log.epoch, 1)):
        await open_repository(world.store, world.clock.sources())
    with pytest.raises(IcechunkError):
        await log.append(world.commit(1))


# ---------------------------------------------------------------- rule 13


@pytest.mark.parametrize("skew_s", [-700, 700])
async def test_a_writer_whose_clock_is_far_off_refuses_to_write(world: World, skew_s: float) -> None:
    await world.create()
    off, _ = await world.open(skew_s=skew_s)
    with raises(SessionStateError, "snapshot-timestamp", 700):
        await off.append(world.commit(1))
    near, _ = await world.open(skew_s=skew_s / 2)
    await near.append(world.commit(1))
    assert await world.history() == [an_id(1)]


async def test_times_in_history_increase_although_clocks_differ(world: World) -> None:
    await world.create()
    ahead, _ = await world.open(skew_s=300)
    behind, _ = await world.open(skew_s=-300)
    for i in range(1, 7):
        await (ahead if i % 2 else behind).append(world.commit(i))
    times = [update.updated_at_us async for update in ahead.updates()]
    assert times == sorted(set(times), reverse=True)
    flushed = [one.flushed_at_us for one in ahead.state.ancestry(ahead.state.branch_tip("main"))]
    assert flushed == sorted(set(flushed), reverse=True)


# --------------------------------------------------------------------------- rule 10: collection is an entry


async def test_a_commit_with_files_older_than_the_cutoff_is_refused_and_void_for_every_client(world: World) -> None:
    log, _ = await world.create()
    await log.append(world.commit(1))
    cutoff_us = log.store_time_us
    await log.append(lambda state: [e.CollectionRan(cutoff_us=cutoff_us)])
    for since_us in (None, cutoff_us - 1):
        with raises(SessionStateError, "commit-not-allowed"):
            await log.append(world.commit(2), since_us=since_us)
    # A client that did not look sends it all the same.
    events = encode_events(world.commit(2)(log.state))
    data = encode_entry(n=log.n + 1, nonce=b"n" * 16, time_us=world.clock.now_us, since_us=cutoff_us - 1, events=events)
    await world.store.put(slot_key(log.epoch, log.n + 1), data, Absent())
    other, _ = await world.open()
    assert other.state.branch_tip("main") == an_id(1) == (await log.refresh()).branch_tip("main")
    await log.append(world.commit(3), since_us=cutoff_us)
    assert (await other.refresh()).branch_tip("main") == an_id(3)


async def entries(world: World, epoch: str, last: int) -> list[Entry]:
    return [decode_entry((await world.store.get(slot_key(epoch, n))).data, n=n) for n in range(1, last + 1)]


async def test_an_entry_is_as_old_as_the_oldest_file_of_those_that_share_it(world: World) -> None:
    log, _ = await world.create()
    await log.prepare_writes()
    await log.append(lambda _: [e.BranchCreated(name="b", snapshot=FIRST_SNAPSHOT)])
    both = (log.append(world.commit(1), since_us=500), log.append(world.commit(2, branch="b"), since_us=900))
    await asyncio.gather(*both)
    _, shared = await entries(world, log.epoch, log.n)
    assert [type(event) for event in shared.events] == [e.CommitAdded] * 2
    assert shared.since_us == 500


async def test_a_collection_shares_its_entry_with_nothing(world: World) -> None:
    log, _ = await world.create()
    await log.prepare_writes()
    collection = e.CollectionRan(cutoff_us=1)
    await asyncio.gather(
        log.append(lambda _: [e.BranchCreated(name="b", snapshot=FIRST_SNAPSHOT)]),
        log.append(lambda _: [collection]),
        log.append(lambda _: [e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)]),
    )
    found = [entry.events for entry in await entries(world, log.epoch, log.n)]
    assert len(found) == 3
    assert found[1] == (collection,)


async def test_a_session_that_begins_after_a_collection_is_not_in_its_way(world: World) -> None:
    log, _ = await world.create()
    await collect_garbage(
        log, world.store, world.clock.sources(), older_than_us=1 << 60, limits=Limits(), dry_run=False
    )
    other, _ = await world.open(skew_s=-3)
    await other.append(world.commit(1), since_us=other.store_time_us)
    assert (await log.refresh()).branch_tip("main") == an_id(1)
