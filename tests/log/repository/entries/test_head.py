"""Rules 5 and 6 of the log layout: the proof of the head, and opening.

Each test fails where its rule is left out. Where the loss can be shown, the test runs a second time with the rule
switched off, and sees the loss.
"""

from __future__ import annotations

from typing import Any

import pytest

from icechunk.errors import (
    ConflictError,
    FormatError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.log.repository import events as e
from icechunk.log.repository import objects
from icechunk.log.repository.entries import client
from icechunk.log.repository.entries import layout as swapping
from icechunk.log.repository.entries import reader as log_reader
from icechunk.log.repository.entry import Entry, encode_entry, slot_key
from icechunk.log.repository.event_json import encode_events
from icechunk.log.repository.objects import read_repo
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.state import try_apply_all
from icechunk.storage.port import Storage
from icechunk.testing.scripted import Request, ScriptedStorage, Send, lost_answer
from tests.log.repository.strategies import an_id
from tests.log.repository.world import DAY_S, World, open_log, put_entry, settled, slots
from tests.raising import raises

# ---------------------------------------------------------------- rule 5


def without_freshness(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (swapping, client, log_reader, objects):
        monkeypatch.setattr(module, "is_fresh", lambda freshness, answer: True)


@pytest.mark.parametrize("rule", [True, False])
async def test_a_writer_that_slept_while_its_slot_was_pruned_does_not_report_a_commit(
    world: World, rule: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rule:
        without_freshness(monkeypatch)
    log, storage = await world.create()
    await log.prepare_writes()
    other, _ = await world.open()

    async def sleep_before_sending(request: Request, send: Send) -> object:
        if slots(request) and world.clock.now_us < start_us + DAY_S * 1e6:
            await other.append(world.commit(1))
            await other.append(world.commit(2))
            await other.checkpoint()
            await world.prune(other.epoch, 2)
        return await send()

    start_us = world.clock.now_us
    storage.script = sleep_before_sending
    try:
        await log.append(world.commit(9, parent=FIRST_SNAPSHOT))
        acknowledged = True
    except ConflictError:
        acknowledged = False
    assert await world.history() == [an_id(1), an_id(2)]
    assert acknowledged is not rule


@pytest.mark.parametrize("rule", [True, False])
async def test_a_reader_that_slept_does_not_take_a_pruned_slot_for_the_end_of_the_log(
    world: World, rule: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rule:
        without_freshness(monkeypatch)
    log, _ = await world.create()
    reader, _ = await world.open()
    await log.append(world.commit(1))
    await log.checkpoint()
    await world.prune(log.epoch, 1)
    state = await reader.refresh()
    assert (state.branch_tip("main") == an_id(1)) is rule


async def test_an_answer_that_came_too_late_but_landed_is_found_in_history(world: World) -> None:
    log, storage = await world.create()
    await log.prepare_writes()

    async def late(request: Request, send: Send) -> object:
        answer = await send()
        if slots(request) and request.key == slot_key(log.epoch, 1):
            other, _ = await world.open()
            await other.append(world.commit(2))
            await other.checkpoint()
            await world.prune(log.epoch, 2)
            raise lost_answer()
        return answer

    storage.script = late
    state = await log.append(world.commit(1))
    assert state.branch_tip("main") == an_id(2)
    assert await world.history() == [an_id(1), an_id(2)]


async def test_a_commit_that_landed_before_a_conversion_and_a_prune_is_found_in_the_repo_object(world: World) -> None:
    log, storage = await settled(world)
    epoch = log.epoch

    async def late(request: Request, send: Send) -> object:
        answer = await send()
        if slots(request) and request.key == slot_key(epoch, 1):
            other, _ = await world.open()
            await other.convert_to_repo_object()
            world.clock.move(7.1 * DAY_S)
            await world.store.delete([slot_key(epoch, 1), slot_key(epoch, 2)])
            raise lost_answer()
        return answer

    storage.script = late
    await log.append(world.commit(1))
    found = await read_repo(world.store, world.clock.sources())
    assert found is not None
    assert found.info.branches["main"] == an_id(1)


# ---------------------------------------------------------------- rule 6


@pytest.mark.parametrize("rule", [True, False])
async def test_opening_never_skips_a_gap(world: World, rule: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = await world.create()
    for i in (1, 2, 3):
        await log.append(world.commit(i), deadline_s=5)
    await log.checkpoint()
    old_repo = await world.store.get("repo")
    await log.append(lambda state: [e.BranchCreated(name="b", snapshot=an_id(3))])
    await log.append(world.commit(4, "b"))
    await log.checkpoint()
    await world.store.delete([slot_key(log.epoch, 4)])
    storage = ScriptedStorage(world.store)

    async def stale_repo(request: Request, send: Send) -> object:
        # GET repo was answered before the checkpoint, the listing after the prune.
        return (
            old_repo
            if request.verb == "get" and request.key == "repo" and len(storage.of("get", "repo")) == 1
            else await send()
        )

    storage.script = stale_repo
    if not rule:

        async def skipping(storage: Storage, epoch: str, after: int, end: int) -> list[Entry]:
            found = [await objects.read_slot(storage, epoch, n) for n in range(after + 1, end + 1)]
            return [entry[0] for entry in found if entry is not None]

        def fold_anyhow(head: log_reader.Head, entry: Entry) -> log_reader.Head:
            state = try_apply_all(head.state, entry.events, time_us=entry.time_us, since_us=None)
            return log_reader.Head(epoch=head.epoch, n=entry.n, state=state or head.state)

        monkeypatch.setattr(log_reader, "read_tail", skipping)
        monkeypatch.setattr(log_reader, "fold_entry", fold_anyhow)
    opened = await open_repository(storage, world.clock.sources())
    assert ("b" in opened.state.branches) is rule


async def test_a_slot_that_is_missing_for_good_is_an_error_that_names_it(world: World) -> None:
    log, _ = await world.create()
    await log.append(world.commit(1))
    await log.checkpoint()
    epoch = log.epoch
    for n in (3, 4):
        await put_entry(world.store, epoch, n, e.Void())
    with raises(FormatError, "invalid-file-format", slot_key(log.epoch, 2)):
        await open_repository(world.store, world.clock.sources())


async def test_keys_that_are_no_slots_are_ignored(world: World) -> None:
    log, _ = await world.create()
    await log.append(world.commit(1))
    for key in (
        f"log/{log.epoch}/junk",
        f"log/{log.epoch}.floor/00000001",
        f"log/{log.epoch}/0000/1",
        "log/0/00000000",
    ):
        await world.store.put(key, b"junk")
    other, _ = await world.open()
    assert other.state == log.state


@pytest.mark.parametrize("page_size", [1, 3])
async def test_opening_sees_through_pages_that_end_early_although_more_follow(world: World, page_size: int) -> None:
    log, _ = await world.create()
    for i in range(1, 6):
        await log.append(world.commit(i))
    # After the checkpoint.
    events = encode_events(world.commit(6)(log.state))
    data = encode_entry(n=6, nonce=b"x" * 16, time_us=world.clock.now_us, since_us=None, events=events)
    await world.store.put(slot_key(log.epoch, 6), data)
    # Of an older life that sorts first, so that our slots are on a later page.
    for n in range(1, 5):
        await world.store.put(slot_key("0" * 28, n), b"of another life")
    storage = ScriptedStorage(world.store)

    async def short(request: Request, send: Send) -> object:
        answer: Any = await send()
        if request.verb == "list":
            items = [item for page in answer for item in page]
            return [items[i : i + page_size] for i in range(0, len(items), page_size)]
        return answer

    storage.script = short
    opened = await open_log(storage, world.clock.sources())
    assert opened.state == await log.refresh()
    assert opened.n == 6
