"""Rules 1 and 2 of the log layout, and the requests of the steady state: slots in order, once, and settled.

Each test fails where its rule is left out. Where the loss can be shown, the test runs a second time with the rule
switched off, and sees the loss.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from icechunk.errors import (
    ConflictError,
    IcechunkError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.log.repository.convert import convert_to_log
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries import reader as log_reader
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.entry import decode_entry, slot_key
from icechunk.log.repository.open import open_repository
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.outcome import Fate
from icechunk.storage.port import ANY, Absent, Matches
from icechunk.testing.scripted import Request, ScriptedStorage, Send, lost_answer
from tests.log.repository.strategies import an_id
from tests.log.repository.world import World, slots
from tests.raising import raises

# ---------------------------------------------------------------- steady state


async def test_a_commit_is_one_put_and_a_refresh_without_new_entries_one_get(world: World) -> None:
    log, storage = await world.create()
    await log.prepare_writes()
    await log.append(world.commit(1))
    storage.requests.clear()
    await log.append(world.commit(2))
    assert [request.verb for request in storage.requests if request.key != "repo"] == ["put"]
    await log.checkpoint()
    storage.requests.clear()
    await log.refresh()
    assert [(request.verb, request.key) for request in storage.requests] == [("get", slot_key(log.epoch, 3))]


async def test_opening_takes_two_requests_where_the_checkpoint_is_current(world: World) -> None:
    log, _ = await world.create()
    await log.append(world.commit(1))
    await log.aclose()
    _, storage = await world.open()
    assert sorted(request.verb for request in storage.requests) == ["get", "list"]


async def test_a_refresh_far_behind_reads_the_tail_at_once_and_once(world: World) -> None:
    log, _ = await world.create()
    reader, storage = await world.open()
    for i in range(1, 31):
        await log.append(world.commit(i))
    storage.requests.clear()
    assert await reader.refresh() == log.state
    assert len(storage.of("list")) == 1
    assert len(storage.of("get")) <= 31


async def test_callers_that_wait_together_share_one_entry(world: World) -> None:
    log, storage = await world.create()
    await log.prepare_writes()
    await asyncio.gather(*(log.append(world.commit(i)) for i in range(1, 51)))
    assert log.n == 1
    assert sum(slots(request) for request in storage.requests) == 1
    assert await world.history() == [an_id(i) for i in range(1, 51)]


# ---------------------------------------------------------------- rule 1


async def test_a_client_has_one_slot_in_flight_and_fills_them_in_order(world: World) -> None:
    log, storage = await world.create()
    in_flight, most, order = 0, 0, []

    async def watch(request: Request, send: Send) -> object:
        nonlocal in_flight, most
        if not slots(request):
            return await send()
        in_flight += 1
        most = max(most, in_flight)
        order.append(request.key)
        await asyncio.sleep(0)
        answer = await send()
        in_flight -= 1
        return answer

    storage.script = watch

    async def writer(i: int) -> None:
        for k in range(4):
            await log.append(world.commit(10 * i + k + 1))
            await asyncio.sleep(0)

    await asyncio.gather(*(writer(i) for i in range(5)))
    assert most == 1
    assert order == [slot_key(log.epoch, n) for n in range(1, log.n + 1)]


async def test_a_store_that_ignores_if_none_match_is_found_out_before_anything_is_written(world: World) -> None:
    log, _ = await world.create()
    await log.append(world.commit(1))
    await log.checkpoint()
    other, storage = await world.open()

    async def ignore(request: Request, send: Send) -> object:
        if request.verb == "put" and request.precondition == Absent():
            return await world.store.put(request.key, request.data, ANY)
        return await send()

    storage.script = ignore
    with raises(StorageError, "storage-config", "If-None-Match"):
        await other.append(world.commit(2))
    storage.script = None
    assert not any(request.key == slot_key(log.epoch, 2) for request in storage.of("put"))
    assert await world.history() == [an_id(1)]


async def test_the_store_is_checked_once(world: World) -> None:
    log, storage = await world.create()
    await log.prepare_writes()
    await log.append(world.commit(1))
    opened = await log_reader.open_head(storage, world.clock.sources())
    assert isinstance(opened, log_reader.Opened)
    again = LogLayout(storage, world.clock.sources(), opened)
    world.logs.append(again)
    storage.requests.clear()
    await again.append(world.commit(2))
    assert [request.verb for request in storage.requests if request.key != "repo"] == ["put"]


async def test_a_storage_that_is_set_to_do_without_conditional_writes_can_only_be_read(world: World) -> None:
    log, _ = await world.create()
    await log.append(world.commit(1))
    sources = world.clock.sources()
    for missing in (Absent, Matches):
        storage = _Unconditional(world.store, missing)
        reader = await open_repository(storage, sources)
        assert reader.state == log.state
        assert await reader.refresh() == log.state
        for refused in (
            reader.append(world.commit(2)),
            reader.prepare_writes(),
            reader.checkpoint(),
            create_log(_Unconditional(MemoryStorage(), missing), sources),
            convert_to_log(storage, sources),
        ):
            with raises(
                StorageError, "storage-config", "unsafe_use_conditional_create", "unsafe_use_conditional_update"
            ) as caught:
                await refused
            assert caught.value.kind == "storage-config"
        assert not storage.of("put")
        await reader.aclose()
    assert await world.history() == [an_id(1)]


class _Unconditional(ScriptedStorage):
    def __init__(self, inner: MemoryStorage, missing: type) -> None:
        super().__init__(inner)
        self.missing = missing

    @property
    def atomic_preconditions(self) -> frozenset[type]:
        return super().atomic_preconditions - {self.missing}


# ---------------------------------------------------------------- rule 2


@pytest.mark.parametrize("rule", [True, False])
async def test_while_a_put_may_still_arrive_the_same_bytes_are_sent_again(
    world: World, rule: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, storage = await world.create()
    late: list[Request] = []

    async def travel(request: Request, send: Send) -> object:
        if slots(request) and not late:
            late.append(request)
            raise lost_answer()
        return await send()

    if not rule:
        # As one would without it: the slot is empty, so it failed.
        async def give_up(self: LogLayout, attempt: object) -> Fate:
            return Fate.REFUSED

        monkeypatch.setattr(LogLayout, "_look", give_up)
    storage.script = travel
    reported_failed = False
    try:
        await log.append(world.commit(1))
    except IcechunkError:
        reported_failed = True
    storage.script = None
    for request in late:
        if rule:
            assert {r.data for r in storage.requests if slots(r)} == {request.data}
        with contextlib.suppress(StorageError):
            await world.store.put(request.key, request.data, request.precondition)
    landed = await world.history() == [an_id(1)]
    assert landed
    assert reported_failed is not rule


@pytest.mark.parametrize("rule", [True, False])
async def test_an_entry_of_another_writer_is_not_taken_for_the_clients_own(
    world: World, rule: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, _ = await world.create()
    other, _ = await world.open()
    await other.append(world.commit(1))
    if not rule:
        monkeypatch.setattr(LogLayout, "_fate_by", lambda self, attempt, nonce: Fate.LANDED)
    refused = pytest.raises(ConflictError) if rule else contextlib.nullcontext()
    with refused:
        await log.append(world.commit(2, parent=FIRST_SNAPSHOT))
    assert await world.history() == [an_id(1)]


async def test_every_entry_has_a_nonce_of_its_own(world: World) -> None:
    log, storage = await world.create()
    for i in range(1, 4):
        await log.append(world.commit(i))
    nonces = {decode_entry(request.data, n=n).nonce for n, request in enumerate(filter(slots, storage.requests), 1)}
    assert len(nonces) == 3
