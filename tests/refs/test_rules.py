"""The rules of the log layout, one by one: each test fails where its rule is left out.

Where the loss can be shown, the test runs a second time with the rule switched off, and sees the loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from icechunk.errors import (
    AlreadyExistsError,
    CommitOutcomeUnknown,
    ConflictError,
    FormatError,
    IcechunkError,
    InvalidInputError,
    ObjectNotFoundError,
    ReadOnlyError,
    RepositoryNotFoundError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.repo import decode_repo, encode_repo
from icechunk.format.repo_values import NewCommit, Status
from icechunk.maintenance.collect import collect_garbage
from icechunk.maintenance.limits import Limits
from icechunk.refs import events as e
from icechunk.refs import log_checkpoint, log_layout, log_reader, log_view, swap, swapping
from icechunk.refs.base import Layout, SwapToken
from icechunk.refs.create import create_log
from icechunk.refs.detect import detect
from icechunk.refs.entry import decode_entry, encode_entry, encode_events, slot_key
from icechunk.refs.log_checkpoint import convert_to_log, write_checkpoint
from icechunk.refs.log_layout import LogLayout
from icechunk.refs.log_reader import read_repo
from icechunk.refs.marker import decode_marker
from icechunk.refs.takeover import seal_abandoned
from icechunk.storage.base import ANY, Absent, GetResult, Matches, PutResult
from icechunk.storage.memory import MemoryStorage
from icechunk.testing.scripted import ManualClock, Request, ScriptedStorage, Send, lost_answer
from icechunk.testing.simulation import commit_proposal
from tests.refs.strategies import an_id

DAY_S = 24 * 3600.0


class World:
    """One store in memory, one clock, and as many clients as a test opens."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MemoryStorage(self.clock.sources())
        self.logs: list[LogLayout] = []

    async def create(self, **options: object) -> tuple[LogLayout, ScriptedStorage]:
        storage = ScriptedStorage(self.store)
        log = await create_log(storage, self.clock.sources(), **options)
        self.logs.append(log)
        return log, storage

    async def open(self, *, skew_s: float = 0) -> tuple[LogLayout, ScriptedStorage]:
        storage = ScriptedStorage(self.store)
        log = await LogLayout.open(storage, self.clock.sources(skew_s=skew_s))
        self.logs.append(log)
        return log, storage

    def commit(self, i: int, branch: str = "main", parent: ObjectId | None = None):
        return commit_proposal(an_id(i), branch, parent=parent, now_us=self.clock.now_us)

    async def history(self) -> list[ObjectId]:
        log = await LogLayout.open(self.store, self.clock.sources())
        return [update.change.snapshot async for update in log.updates() if isinstance(update.change, NewCommit)][::-1]

    async def prune(self, epoch: str, last: int) -> None:
        """What a pruner does after it has announced and waited."""
        self.clock.move(7.1 * DAY_S)
        await self.store.delete(slot_key(epoch, n) for n in range(1, last + 1))


@pytest.fixture
async def world():
    a_world = World()
    yield a_world
    for log in a_world.logs:
        await log.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}, "the logs left tasks behind"


async def until(happened: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if happened():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never happened")


def slots(request: Request) -> bool:
    return request.verb == "put" and request.key.startswith("log/")


# ---------------------------------------------------------------- steady state


async def test_a_commit_is_one_put_and_a_refresh_without_news_one_get(world: World):
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


async def test_opening_takes_two_requests_where_the_checkpoint_is_current(world: World):
    log, _ = await world.create()
    await log.append(world.commit(1))
    await log.aclose()
    _, storage = await world.open()
    assert sorted(request.verb for request in storage.requests) == ["get", "list"]


async def test_a_refresh_far_behind_reads_the_tail_at_once_and_once(world: World):
    log, _ = await world.create()
    reader, storage = await world.open()
    for i in range(1, 31):
        await log.append(world.commit(i))
    storage.requests.clear()
    assert await reader.refresh() == log.state
    assert len(storage.of("list")) == 1
    assert len(storage.of("get")) <= 31


async def test_callers_who_wait_together_share_one_entry(world: World):
    log, storage = await world.create()
    await log.prepare_writes()
    await asyncio.gather(*(log.append(world.commit(i)) for i in range(1, 51)))
    assert log.n == 1
    assert sum(slots(request) for request in storage.requests) == 1
    assert await world.history() == [an_id(i) for i in range(1, 51)]


# ---------------------------------------------------------------- rule 1


async def test_a_client_has_one_slot_in_flight_and_fills_them_in_order(world: World):
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


async def test_a_store_that_ignores_if_none_match_is_found_out_before_anything_is_written(world: World):
    log, _ = await world.create()
    await log.append(world.commit(1))
    await log.checkpoint()
    other, storage = await world.open()

    async def ignore(request: Request, send: Send) -> object:
        if request.verb == "put" and request.precondition == Absent():
            return await world.store.put(request.key, request.data, ANY)
        return await send()

    storage.script = ignore
    with pytest.raises(StorageError, match="If-None-Match") as caught:
        await other.append(world.commit(2))
    assert caught.value.kind == "storage-config"
    storage.script = None
    assert not any(request.key == slot_key(log.epoch, 2) for request in storage.of("put"))
    assert await world.history() == [an_id(1)]


async def test_the_store_is_checked_once(world: World):
    log, storage = await world.create()
    await log.prepare_writes()
    await log.append(world.commit(1))
    again = LogLayout(storage, world.clock.sources(), await log_reader.open_head(storage, world.clock.sources()))
    world.logs.append(again)
    storage.requests.clear()
    await again.append(world.commit(2))
    assert [request.verb for request in storage.requests if request.key != "repo"] == ["put"]


async def test_a_storage_that_is_set_to_do_without_conditional_writes_can_only_be_read(world: World):
    log, _ = await world.create()
    await log.append(world.commit(1))
    sources = world.clock.sources()
    for missing in (Absent, Matches):
        storage = _Unconditional(world.store, missing)
        reader = await LogLayout.open(storage, sources)
        assert reader.state == log.state
        assert await reader.refresh() == log.state
        for refused in (
            reader.append(world.commit(2)),
            reader.prepare_writes(),
            reader.checkpoint(),
            create_log(_Unconditional(MemoryStorage(), missing), sources),
            convert_to_log(storage, sources),
        ):
            with pytest.raises(StorageError, match="conditional writes") as caught:
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


async def test_a_commit_that_landed_but_lost_its_answer_is_not_committed_twice(world: World):
    log, storage = await world.create()

    async def lose_first(request: Request, send: Send) -> object:
        answer = await send()
        if slots(request) and len([r for r in storage.requests if slots(r)]) == 1:
            raise lost_answer()
        return answer

    storage.script = lose_first
    await log.append(world.commit(1))
    assert await world.history() == [an_id(1)]
    assert len([request for request in storage.requests if slots(request)]) == 1


@pytest.mark.parametrize("rule", [True, False])
async def test_while_a_put_may_still_arrive_the_same_bytes_are_sent_again(
    world: World, rule: bool, monkeypatch: pytest.MonkeyPatch
):
    log, storage = await world.create()
    late: list[Request] = []

    async def travel(request: Request, send: Send) -> object:
        if slots(request) and not late:
            late.append(request)
            raise lost_answer()
        return await send()

    if not rule:
        # As one would without it: the slot is empty, so it failed.
        def give_up(attempt: object, answer: swap.SlotAnswer) -> object:
            raise SessionStateError("failed")

        monkeypatch.setattr(swap, "from_slot", give_up)
        monkeypatch.setattr(swap, "_ROUNDS", 1)
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
async def test_an_entry_of_another_writer_is_not_taken_for_ones_own(
    world: World, rule: bool, monkeypatch: pytest.MonkeyPatch
):
    log, _ = await world.create()
    other, _ = await world.open()
    await other.append(world.commit(1))
    if not rule:
        monkeypatch.setattr(swap, "from_slot", lambda attempt, answer: swap.Landed() if answer.entry else swap.Reopen())
    refused = pytest.raises(ConflictError) if rule else contextlib.nullcontext()
    with refused:
        await log.append(world.commit(2, parent=FIRST_SNAPSHOT))
    assert await world.history() == [an_id(1)]


async def test_every_entry_has_a_nonce_of_its_own(world: World):
    log, storage = await world.create()
    for i in range(1, 4):
        await log.append(world.commit(i))
    nonces = {decode_entry(request.data, n=n).nonce for n, request in enumerate(filter(slots, storage.requests), 1)}
    assert len(nonces) == 3


async def test_no_other_bytes_and_no_other_slot_before_the_last_attempt_is_settled(world: World):
    log, storage = await world.create()
    await log.prepare_writes()

    async def silence(request: Request, send: Send) -> object:
        if request.key.startswith("log/"):
            raise lost_answer()
        return await send()

    storage.script = silence
    with pytest.raises(CommitOutcomeUnknown) as caught:
        await log.append(world.commit(1))
    with pytest.raises(IcechunkError, match="nothing landed"):
        await log.append(world.commit(2))
    assert len({request.data for request in storage.requests if slots(request)}) == 1
    storage.script = None
    await log.append(world.commit(3))
    assert await world.history() == [an_id(1), an_id(3)]
    assert await log.settle(caught.value.token)


# ---------------------------------------------------------------- rule 3


async def test_a_deadline_gives_an_outcome_that_is_unknown_and_a_token_that_settles_it(world: World):
    log, storage = await world.create()
    gate = asyncio.Event()

    async def hold(request: Request, send: Send) -> object:
        if slots(request):
            await gate.wait()
        return await send()

    storage.script = hold
    with pytest.raises(CommitOutcomeUnknown) as caught:
        await log.append(world.commit(1), deadline_s=0.05)
    token = pickle.loads(pickle.dumps(caught.value.token))
    assert token == SwapToken(epoch=log.epoch, n=1, nonce=token.nonce, snapshots=(an_id(1),))
    gate.set()
    assert await log.settle(token)
    assert await world.history() == [an_id(1)]


async def test_settling_from_another_process_fills_the_slot_so_that_a_late_put_finds_it_taken(world: World):
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


async def test_a_cancelled_caller_leaves_and_the_group_goes_on(world: World):
    log, storage = await world.create()
    await log.prepare_writes()
    gate = asyncio.Event()

    async def hold(request: Request, send: Send) -> object:
        if slots(request):
            await gate.wait()
        return await send()

    storage.script = hold
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
):
    monkeypatch.setattr(log_layout, "_CLOSE_GRACE_S", 0.01)
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


async def settled(world: World) -> tuple[LogLayout, ScriptedStorage]:
    """A log whose store has been checked, so that only swaps are left to script."""
    log, storage = await world.create()
    await log.prepare_writes()
    return log, storage


STALE: dict[str, tuple[Callable[[World], object], Callable[[World], object]]] = {
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
async def test_a_client_that_has_not_looked_for_a_while_looks_before_it_refuses(world: World, case: str):
    log, storage = await settled(world)
    other, _ = await world.open()
    theirs, mine = STALE[case]
    await other.append(theirs(world))
    storage.requests.clear()
    await log.append(mine(world))
    assert len([r for r in storage.requests if slots(r)]) == 1, "what was bound to lose is not sent"


async def test_a_refusal_costs_one_look_where_there_is_no_news_and_what_applies_none(world: World):
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


async def test_callers_who_come_while_the_client_looks_are_neither_lost_nor_refused_by_that_look(world: World):
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


class Told(list):
    """What a caller was told of its entry."""

    @property
    def open_(self) -> bool:
        return bool(self) and self[-1] is not None


async def test_who_is_cancelled_before_the_entry_is_sent_was_told_nothing_and_nothing_lands(world: World):
    log, storage = await settled(world)
    gate = asyncio.Event()

    async def hold(request: Request, send: Send) -> object:
        if slots(request):
            await gate.wait()
        return await send()

    storage.script = hold
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


async def test_who_is_cancelled_during_the_put_holds_the_token_that_settles_it(world: World):
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


async def test_who_was_cancelled_during_a_put_that_lost_is_told_that_nothing_is_open_any_more(world: World):
    log, storage = await settled(world)
    other, _ = await world.open()
    gate, told = asyncio.Event(), Told()

    async def hold(request: Request, send: Send) -> object:
        if slots(request):
            await gate.wait()
        return await send()

    storage.script = hold
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


async def test_who_waits_on_after_a_loss_is_told_of_the_next_entry(world: World):
    log, _ = await settled(world)
    other, _ = await world.open()
    await other.append(world.commit(1))
    told = Told()
    await log.append(world.commit(2), on_sent=told.append)
    assert [token and token.n for token in told] == [1, None, 2]
    assert await log.settle(told[-1])


async def test_a_token_left_open_by_silence_is_taken_back_when_the_next_swap_sees_the_loss(world: World):
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


async def test_a_callback_that_fails_harms_nobody(world: World, caplog: pytest.LogCaptureFixture):
    log, _ = await world.create()

    def fail(token: SwapToken | None) -> None:
        raise KeyError("mine")

    await log.append(world.commit(1), on_sent=fail)
    assert "callback" in caplog.text
    assert await world.history() == [an_id(1)]


async def test_a_token_of_an_entry_that_is_void_as_a_whole_did_not_land(world: World):
    log, _ = await settled(world)
    tag = e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)
    for n, events in ((1, [tag, tag]), (2, [tag, *world.commit(1, parent=an_id(7))(log.state)])):
        data = encode_entry(
            n=n, nonce=b"x" * 16, time_us=world.clock.now_us, since_us=None, events=encode_events(events)
        )
        await world.store.put(slot_key(log.epoch, n), data)
    other, _ = await world.open()
    for one in (log, other):
        assert not await one.settle(SwapToken(epoch=log.epoch, n=1, nonce=b"x" * 16))
        assert not await one.settle(SwapToken(epoch=log.epoch, n=2, nonce=b"x" * 16, snapshots=(an_id(1),)))
        assert "t" not in one.state.tags


# ---------------------------------------------------------------- rule 4


async def test_in_a_group_each_is_validated_after_the_ones_before(world: World):
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


async def test_what_a_proposal_raises_reaches_its_caller_alone(world: World):
    log, _ = await world.create()

    def refuse(state: object) -> list[e.Event]:
        raise KeyError("mine")

    refused, fine = await asyncio.gather(log.append(refuse), log.append(world.commit(1)), return_exceptions=True)
    assert isinstance(refused, KeyError)
    assert not isinstance(fine, Exception)


async def test_an_entry_with_a_stale_event_is_void_for_everybody(world: World):
    log, _ = await world.create()
    events = encode_events([*world.commit(1)(log.state), *world.commit(2)(log.state)])
    data = encode_entry(n=1, nonce=b"x" * 16, time_us=world.clock.now_us, since_us=None, events=events)
    await world.store.put(slot_key(log.epoch, 1), data)
    await log.refresh()
    other, _ = await world.open()
    assert log.n == other.n == 1
    assert log.state == other.state
    assert list(log.state.snapshots) == [FIRST_SNAPSHOT]


async def test_an_entry_of_a_newer_version_stops_readers_and_writers(world: World):
    log, _ = await world.create()
    data = encode_entry(n=1, nonce=b"x" * 16, time_us=1, since_us=None, events=[{"kind": "telepathy"}])
    await world.store.put(slot_key(log.epoch, 1), data)
    with pytest.raises(FormatError, match="upgrade"):
        await log.refresh()
    with pytest.raises(FormatError, match="upgrade"):
        await LogLayout.open(world.store, world.clock.sources())
    with pytest.raises(IcechunkError):
        await log.append(world.commit(1))


# ---------------------------------------------------------------- rule 5


def without_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (swap, swapping, log_view, log_reader):
        monkeypatch.setattr(module, "still_proves", lambda proof, answer: True)


@pytest.mark.parametrize("rule", [True, False])
async def test_a_writer_that_slept_while_its_slot_was_pruned_is_not_told_that_it_committed(
    world: World, rule: bool, monkeypatch: pytest.MonkeyPatch
):
    if not rule:
        without_proof(monkeypatch)
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
async def test_a_reader_that_slept_does_not_take_a_pruned_slot_for_no_news(
    world: World, rule: bool, monkeypatch: pytest.MonkeyPatch
):
    if not rule:
        without_proof(monkeypatch)
    log, _ = await world.create()
    reader, _ = await world.open()
    await log.append(world.commit(1))
    await log.checkpoint()
    await world.prune(log.epoch, 1)
    state = await reader.refresh()
    assert (state.branch_tip("main") == an_id(1)) is rule


async def test_an_answer_that_came_too_late_but_landed_is_found_in_history(world: World):
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


async def test_a_commit_that_landed_before_a_conversion_and_a_prune_is_found_in_the_repo_object(world: World):
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
async def test_opening_never_skips_a_gap(world: World, rule: bool, monkeypatch: pytest.MonkeyPatch):
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

        async def skipping(storage, epoch, after, end):
            found = [await log_reader.read_slot(storage, epoch, n) for n in range(after + 1, end + 1)]
            return [entry[0] for entry in found if entry is not None]

        def fold_anyhow(head, entry):
            state = log_reader.try_apply_all(head.state, entry.events, time_us=entry.time_us, since_us=None)
            return log_reader.Head(epoch=head.epoch, n=entry.n, state=state or head.state)

        monkeypatch.setattr(log_reader, "read_tail", skipping)
        monkeypatch.setattr(log_reader, "fold_entry", fold_anyhow)
    opened = await LogLayout.open(storage, world.clock.sources())
    assert ("b" in opened.state.branches) is rule


async def test_a_slot_that_is_missing_for_good_is_an_error_that_names_it(world: World):
    log, _ = await world.create()
    await log.append(world.commit(1))
    await log.checkpoint()
    epoch = log.epoch
    for n in (3, 4):
        data = encode_entry(n=n, nonce=b"x" * 16, time_us=1, since_us=None, events=encode_events([e.Void()]))
        await world.store.put(slot_key(epoch, n), data)
    with pytest.raises(FormatError, match="slot 2 of the log is missing"):
        await LogLayout.open(world.store, world.clock.sources())


async def test_keys_that_are_no_slots_are_ignored(world: World):
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
async def test_opening_sees_through_pages_that_end_early_although_more_follow(world: World, page_size: int):
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
        answer = await send()
        if request.verb == "list":
            items = [item for page in answer for item in page]
            return [items[i : i + page_size] for i in range(0, len(items), page_size)]
        return answer

    storage.script = short
    opened = await LogLayout.open(storage, world.clock.sources())
    assert opened.state == await log.refresh()
    assert opened.n == 6


# ---------------------------------------------------------------- rule 7


async def test_an_older_checkpoint_never_replaces_a_newer_one(world: World):
    log, _ = await world.create()
    old, storage = await world.open()
    await log.append(world.commit(1))
    behind = await world.store.get("repo")

    await log.append(world.commit(2))
    await log.checkpoint()
    await old.refresh()
    await log.append(world.commit(3))
    await log.checkpoint()
    newest = await world.store.get("repo")

    async def trust_what_it_once_read(request: Request, send: Send) -> object:
        return (
            behind
            if request.key == "repo" and request.verb == "get" and len(storage.of("get", "repo")) == 2
            else await send()
        )

    storage.script = trust_what_it_once_read
    await old.checkpoint()
    assert await world.store.get("repo") == newest
    assert all(isinstance(request.precondition, Matches) for request in storage.of("put", "repo"))


async def test_a_checkpoint_of_an_earlier_life_of_the_log_is_not_written(world: World):
    log, _ = await world.create()
    sleeper, _ = await world.open()
    for i in (1, 2, 3):
        await log.append(world.commit(i))
    await sleeper.refresh()
    head, known = sleeper._view.head, sleeper._view.known
    await log.convert_to_repo_object()
    await convert_to_log(world.store, world.clock.sources())
    now = await world.store.get("repo")
    marker = decode_marker(decode_repo(now.data).extra)
    assert marker is not None
    assert marker.n == 0 < head.n
    await write_checkpoint(world.store, world.clock.sources(), head, known, updates_per_file=1000)
    await sleeper.checkpoint()
    assert await world.store.get("repo") == now


async def test_the_marker_carries_what_the_format_has_no_field_for(world: World):
    log, _ = await world.create()
    await log.append(lambda state: [e.StatusSet(availability=1, reason="frozen"), e.StatusSet(availability=0)])
    await log.append(lambda state: [e.CollectionRan(cutoff_us=12345)])
    await log.checkpoint()
    info = decode_repo((await world.store.get("repo")).data)
    assert info.status.availability == 1
    assert "log/" in (info.status.reason or "")
    other, _ = await world.open()
    assert other.state == log.state
    assert other.state.status.availability == 0
    assert other.state.gc_cutoff_us == 12345


async def test_a_real_read_only_status_survives_checkpoint_and_open(world: World):
    log, _ = await world.create()
    await log.append(lambda state: [e.StatusSet(availability=1, reason="frozen")])
    await log.aclose()
    other, _ = await world.open()
    with pytest.raises(ReadOnlyError, match="frozen"):
        await other.append(world.commit(1))


# ---------------------------------------------------------------- rule 8


async def test_a_conversion_leaves_a_repo_object_without_marker_and_nothing_lands_after_it(world: World):
    log, _ = await world.create()
    other, _ = await world.open()
    await log.append(world.commit(1))
    await log.convert_to_repo_object()
    with pytest.raises(SessionStateError, match="open it again"):
        await other.append(world.commit(2))
    info = decode_repo((await world.store.get("repo")).data)
    assert info.extra is None
    assert info.status.availability == 0
    assert set(info.snapshots) == {FIRST_SNAPSHOT, an_id(1)}
    assert await detect(world.store) is Layout.REPO


@pytest.mark.parametrize("who", ["opener", "writer", "reader"])
async def test_whoever_folds_a_seal_finishes_the_conversion(world: World, who: str):
    log, storage = await world.create()
    other, _ = await world.open()
    await log.append(world.commit(1))

    async def die_after_the_seal(request: Request, send: Send) -> object:
        if request.key == "repo":
            raise lost_answer()
        return await send()

    storage.script = die_after_the_seal
    with pytest.raises(StorageError):
        await log.convert_to_repo_object()
    assert await detect(world.store) is Layout.LOG
    match who:
        case "opener":
            with pytest.raises(SessionStateError):
                await LogLayout.open(world.store, world.clock.sources())
        case "writer":
            with pytest.raises(SessionStateError):
                await other.append(world.commit(2))
        case "reader":
            assert (await other.refresh()).branch_tip("main") == an_id(1)
    assert await detect(world.store) is Layout.REPO
    found = await read_repo(world.store, world.clock.sources())
    assert found is not None
    assert found.info.branches["main"] == an_id(1)
    storage.script = None


async def test_after_there_and_back_a_reader_follows_into_the_new_log(world: World):
    log, _ = await world.create()
    reader, _ = await world.open()
    await log.append(world.commit(1))
    await log.convert_to_repo_object()
    await convert_to_log(world.store, world.clock.sources())
    new, _ = await world.open()
    await new.append(world.commit(2))
    assert (await reader.refresh()).branch_tip("main") == an_id(2)


async def take_over(world: World) -> None:
    """What the official library does when somebody sets the status online: back up, drop `extra`."""
    info = decode_repo((await world.store.get("repo")).data)
    await world.store.copy("repo", "overwritten/repo.taken")
    newest = info.updates[0]
    await world.store.put(
        "repo",
        encode_repo(
            replace(
                info,
                extra=None,
                status=Status(availability=0, set_at_us=newest.updated_at_us + 1, reason=None),
                updates=(
                    replace(newest, updated_at_us=newest.updated_at_us + 1),
                    replace(newest, backup_path="repo.taken"),
                    *info.updates[1:],
                ),
            )
        ),
    )


async def test_a_takeover_is_found_at_the_next_checkpoint_sealed_and_reported(
    world: World, caplog: pytest.LogCaptureFixture
):
    log, storage = await world.create()

    async def no_checkpoint(request: Request, send: Send) -> object:
        if request.key == "repo" and request.verb == "put":
            raise lost_answer()
        return await send()

    await log.append(world.commit(1))
    await log.checkpoint()
    storage.script = no_checkpoint
    await log.append(world.commit(2))
    await until(lambda: all(task.done() for task in log.tasks))
    storage.script = None
    await take_over(world)
    taken = await world.store.get("repo")
    await log.checkpoint()
    assert log.stranded is not None
    assert [entry.n for entry in log.stranded.entries] == [2]
    with pytest.raises(SessionStateError, match="taken over") as caught:
        await log.append(world.commit(3))
    assert "only" in str(caught.value)
    assert await world.store.get("repo") == taken
    last = decode_entry((await world.store.get(slot_key(log.epoch, 3))).data, n=3)
    assert last.events == (e.Sealed(reason="takeover"),)
    await world.store.get(slot_key(log.epoch, 2))


async def test_a_takeover_is_found_when_opening(world: World):
    log, _ = await world.create()
    await log.append(world.commit(1))
    await log.aclose()
    epoch = log.epoch
    data = encode_entry(
        n=2,
        nonce=b"x" * 16,
        time_us=world.clock.now_us,
        since_us=None,
        events=encode_events(world.commit(2)(log.state)),
    )
    await world.store.put(slot_key(epoch, 2), data)
    await take_over(world)
    found = await read_repo(world.store, world.clock.sources())
    assert found is not None
    with pytest.raises(SessionStateError, match="1 entries after slot 1 are in the log only") as caught:
        await LogLayout.open(world.store, world.clock.sources())
    assert caught.value.kind == "unsupported-operation-for-version"
    await world.store.delete([slot_key(epoch, 3)])
    stranded = await seal_abandoned(world.store, world.clock.sources(), found)
    assert stranded is not None
    assert (stranded.after, [entry.n for entry in stranded.entries]) == (1, [2])
    assert await seal_abandoned(world.store, world.clock.sources(), found) is None


# ---------------------------------------------------------------- rule 11


async def test_of_racing_creators_exactly_one_wins_and_its_first_snapshot_stays(world: World):
    for seed in range(6):
        a_world = World()
        sources = a_world.clock.sources()
        outcomes = await asyncio.gather(
            *(create_log(ScriptedStorage(_Jittery(a_world.store, seed * 7 + i)), sources) for i in range(4)),
            return_exceptions=True,
        )
        winners = [outcome for outcome in outcomes if isinstance(outcome, LogLayout)]
        assert len(winners) == 1
        assert all(isinstance(o, LogLayout | AlreadyExistsError | InvalidInputError) for o in outcomes)
        opened = await LogLayout.open(a_world.store, sources)
        assert opened.epoch == winners[0].epoch


class _Jittery(ScriptedStorage):
    def __init__(self, inner: MemoryStorage, seed: int) -> None:
        super().__init__(inner)
        rng = random.Random(seed)

        async def jitter(request: Request, send: Send) -> object:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            answer = await send()
            if request.verb == "put" and rng.random() < 0.3:
                raise lost_answer()
            return answer

        self.script = jitter


async def test_a_creator_whose_answer_was_lost_knows_its_own_success(world: World):
    storage = ScriptedStorage(world.store)

    async def lose(request: Request, send: Send) -> object:
        answer = await send()
        if request.verb == "put" and len([r for r in storage.requests if r.key == request.key]) == 1:
            raise lost_answer()
        return answer

    storage.script = lose
    log = await create_log(storage, world.clock.sources())
    assert (await LogLayout.open(world.store, world.clock.sources())).epoch == log.epoch


async def test_a_second_creator_uses_the_first_snapshot_that_is_there(world: World):
    early = ScriptedStorage(world.store)

    async def die_before_repo(request: Request, send: Send) -> object:
        if request.key == "repo":
            raise OSError("died")
        return await send()

    early.script = die_before_repo
    with pytest.raises(OSError, match="died"):
        await create_log(early, world.clock.sources())
    before = await world.store.get("snapshots/1CECHNKREP0F1RSTCMT0")
    born_us = world.clock.now_us
    world.clock.move(60)
    log = await create_log(world.store, world.clock.sources(), check_clean_root=False)
    assert log.state.snapshots[FIRST_SNAPSHOT].flushed_at_us == born_us
    assert (await world.store.get("snapshots/1CECHNKREP0F1RSTCMT0")).data == before.data


@pytest.mark.parametrize("check", [True, False])
async def test_a_repository_of_format_1_is_not_created_over(world: World, check: bool):
    await world.store.put("refs/branch.main/ref.json", b'{"snapshot":"x"}')
    with pytest.raises(InvalidInputError) as caught:
        await create_log(world.store, world.clock.sources(), check_clean_root=check)
    assert caught.value.kind == "parent-directory-not-clean"
    assert await detect(world.store) is Layout.REFS
    with pytest.raises(ObjectNotFoundError):
        await world.store.get("repo")


async def test_a_root_with_anything_in_it_is_not_clean_and_an_existing_repository_is_not_replaced(world: World):
    await world.store.put("readme.txt", b"hello")
    with pytest.raises(InvalidInputError, match=r"readme\.txt"):
        await create_log(world.store, world.clock.sources())
    await create_log(world.store, world.clock.sources(), check_clean_root=False)
    before = await world.store.get("repo")
    with pytest.raises(AlreadyExistsError):
        await create_log(world.store, world.clock.sources(), check_clean_root=False)
    assert await world.store.get("repo") == before


async def test_opening_nothing_says_so(world: World):
    with pytest.raises(RepositoryNotFoundError):
        await LogLayout.open(world.store, world.clock.sources())
    assert await detect(world.store) is None


async def test_a_foreign_repo_object_is_a_format_error(world: World):
    await world.store.put("repo", b"not ours at all")
    with pytest.raises(FormatError):
        await LogLayout.open(world.store, world.clock.sources())


# ---------------------------------------------------------------- rule 13


@pytest.mark.parametrize("skew_s", [-700, 700])
async def test_a_writer_whose_clock_is_far_off_refuses_to_write(world: World, skew_s: float):
    await world.create()
    off, _ = await world.open(skew_s=skew_s)
    with pytest.raises(SessionStateError, match="Set the clock"):
        await off.append(world.commit(1))
    near, _ = await world.open(skew_s=skew_s / 2)
    await near.append(world.commit(1))
    assert await world.history() == [an_id(1)]


async def test_times_in_history_increase_although_clocks_differ(world: World):
    await world.create()
    ahead, _ = await world.open(skew_s=300)
    behind, _ = await world.open(skew_s=-300)
    for i in range(1, 7):
        await (ahead if i % 2 else behind).append(world.commit(i))
    times = [update.updated_at_us async for update in ahead.updates()]
    assert times == sorted(set(times), reverse=True)
    flushed = [one.flushed_at_us for one in ahead.state.ancestry(ahead.state.branch_tip("main"))]
    assert flushed == sorted(set(flushed), reverse=True)


# ---------------------------------------------------------------- ops log


async def test_a_long_ops_log_goes_on_in_backups_and_is_told_once(world: World):
    log, _ = await world.create(updates_per_file=3)
    for i in range(1, 12):
        await log.append(world.commit(i))
        await log.checkpoint()
    info = decode_repo((await world.store.get("repo")).data)
    assert len(info.updates) <= 3
    assert info.repo_before_updates is not None
    other, _ = await world.open()
    for one in (log, other):
        assert [u.change.snapshot async for u in one.updates() if isinstance(u.change, NewCommit)] == [
            an_id(i) for i in range(11, 0, -1)
        ]
    assert len(other.state.updates) <= 3


async def test_files_that_ride_in_entries_stand_on_their_own_before_a_checkpoint_passes_them(world: World):
    log, storage = await world.create()
    data = encode_entry(
        n=1,
        nonce=b"x" * 16,
        time_us=world.clock.now_us,
        since_us=None,
        events=encode_events(world.commit(1)(log.state)),
        objects={"snapshots/SMALL": b"small"},
    )
    await world.store.put(slot_key(log.epoch, 1), data)
    await log.refresh()
    assert log.carried_object("snapshots/SMALL") == b"small"
    storage.requests.clear()
    await log.checkpoint()
    assert [request.key for request in storage.of("put")] == ["snapshots/SMALL", "repo"]
    assert isinstance(await world.store.get("snapshots/SMALL"), GetResult)
    assert log.carried_object("snapshots/SMALL") is None


async def test_a_store_without_a_clock_is_trusted_by_the_clients_own(world: World):
    log, _ = await world.create()
    storage = ScriptedStorage(world.store)

    async def no_date(request: Request, send: Send) -> object:
        answer = await send()
        if isinstance(answer, PutResult):
            return PutResult(version=answer.version, date_us=None)
        if isinstance(answer, GetResult):
            return GetResult(
                body=answer.data, size=answer.size, version=answer.version, modified_us=answer.modified_us, date_us=None
            )
        return answer

    storage.script = no_date
    reader = await LogLayout.open(storage, world.clock.sources())
    world.logs.append(reader)
    await log.append(world.commit(1))
    await log.checkpoint()
    await world.prune(log.epoch, 1)
    assert (await reader.refresh()).branch_tip("main") == an_id(1)
    await reader.append(world.commit(2))
    assert await world.history() == [an_id(1), an_id(2)]


@pytest.mark.parametrize("who", ["converter", "opener"])
async def test_files_that_ride_in_entries_stand_on_their_own_before_a_conversion_ends_the_log(world: World, who: str):
    log, storage = await settled(world)
    data = encode_entry(
        n=1,
        nonce=b"x" * 16,
        time_us=world.clock.now_us,
        since_us=None,
        events=encode_events(world.commit(1)(log.state)),
        objects={"snapshots/SMALL": b"small"},
    )
    await world.store.put(slot_key(log.epoch, 1), data)
    if who == "converter":
        await log.convert_to_repo_object()
    else:
        seal = encode_entry(n=2, nonce=b"y" * 16, time_us=1, since_us=None, events=encode_events([e.Sealed()]))
        await world.store.put(slot_key(log.epoch, 2), seal)
        storage = ScriptedStorage(world.store)
        with pytest.raises(SessionStateError):
            await LogLayout.open(storage, world.clock.sources())
    assert [r.key for r in storage.of("put") if not slots(r)][-2:] == ["snapshots/SMALL", "repo"]
    assert await detect(world.store) is Layout.REPO


async def test_a_checkpoint_that_fails_unexpectedly_is_reported_and_commits_go_on(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    log, _ = await world.create()

    def fail(info: object) -> bytes:
        raise OverflowError("too much")

    with monkeypatch.context() as patch:
        patch.setattr(log_checkpoint, "encode_and_keep", fail)
        await log.append(world.commit(1))
        await until(lambda: all(task.done() for task in log.tasks))
        assert "report this" in caplog.text
    await log.append(world.commit(2))
    await until(lambda: all(task.done() for task in log.tasks))
    assert log.checkpoint_n == 2


async def test_checkpoints_take_a_small_share_of_the_time_however_long_they_take(world: World):
    log, storage = await settled(world)

    async def slow(request: Request, send: Send) -> object:
        if request.verb == "put" and request.key == "repo":
            world.clock.move(0.1)
        return await send()

    storage.script = slow
    began_us = world.clock.now_us
    for i in range(1, 40):
        await log.append(world.commit(i))
        await asyncio.sleep(0)
    await until(lambda: all(task.done() for task in log.tasks))
    assert log.checkpoint_n == log.n == 39, "the last one is written, sooner or later"
    checkpoints = len(storage.of("put", "repo")) - 1
    assert checkpoints * 0.1 <= (world.clock.now_us - began_us) / 1e6 / 8


async def test_closing_does_not_wait_for_a_pause_between_checkpoints(world: World):
    _, storage = await settled(world)
    clock = ManualClock(world.clock.now_us)

    async def for_ever(seconds: float) -> None:
        await asyncio.Event().wait()

    patient = await LogLayout.open(storage, replace(clock.sources(), sleep=for_ever))
    await patient.append(world.commit(1))
    await until(lambda: patient.checkpoint_n == 1)
    await patient.append(world.commit(2))
    await asyncio.sleep(0)
    assert not all(task.done() for task in patient.tasks)
    await asyncio.wait_for(patient.aclose(), 5)
    assert patient.checkpoint_n == 2


# --------------------------------------------------------------------------- rule 10: collection is an entry


async def test_a_commit_with_files_older_than_the_cutoff_is_refused_and_void_for_everybody(world: World):
    log, _ = await world.create()
    await log.append(world.commit(1))
    cutoff_us = log.store_time_us
    await log.append(lambda state: [e.CollectionRan(cutoff_us=cutoff_us)])
    for since_us in (None, cutoff_us - 1):
        with pytest.raises(SessionStateError, match="repeat the work"):
            await log.append(world.commit(2), since_us=since_us)
    # Somebody who did not look sends it all the same.
    events = encode_events(world.commit(2)(log.state))
    data = encode_entry(n=log.n + 1, nonce=b"n" * 16, time_us=world.clock.now_us, since_us=cutoff_us - 1, events=events)
    await world.store.put(slot_key(log.epoch, log.n + 1), data, Absent())
    other, _ = await world.open()
    assert other.state.branch_tip("main") == an_id(1) == (await log.refresh()).branch_tip("main")
    await log.append(world.commit(3), since_us=cutoff_us)
    assert (await other.refresh()).branch_tip("main") == an_id(3)


async def test_a_session_that_begins_after_a_collection_is_not_in_its_way(world: World):
    log, _ = await world.create()
    await collect_garbage(
        log, world.store, world.clock.sources(), older_than_us=1 << 60, limits=Limits(), dry_run=False
    )
    other, _ = await world.open(skew_s=-3)
    await other.append(world.commit(1), since_us=other.store_time_us)
    assert (await log.refresh()).branch_tip("main") == an_id(1)
