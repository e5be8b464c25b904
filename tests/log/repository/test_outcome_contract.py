"""The promises of every layout about the outcome of a change (rules 2 and 3), for any fate of requests and callers.

One contract for the three of them. What a layout does in its own way is tested beside it.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from icechunk.errors import (
    AlreadyExistsError,
    CommitOutcomeUnknown,
    ConflictError,
    InvalidInputError,
    SessionStateError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId, encode_id
from icechunk.format.keys import snapshot_key
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.format.snapshot.codec import encode_snapshot
from icechunk.format.values import Snapshot
from icechunk.log.repository import events as e
from icechunk.log.repository import settle
from icechunk.log.repository.create import create_log, create_ref_files, create_repo_object
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import Layout, Propose, RepositoryLog, SwapToken
from icechunk.log.repository.state import RepoState
from icechunk.storage import outcome
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.outcome import refused, unsent
from icechunk.testing.scripted import ManualClock, Request, ScriptedStorage, Send, lost_answer
from tests.log.repository.strategies import an_id
from tests.log.repository.told import Told
from tests.log.repository.world import until
from tests.raising import raises

CREATE: dict[Layout, Callable[..., Awaitable[RepositoryLog]]] = {
    Layout.LOG: create_log,
    Layout.REPO: create_repo_object,
    Layout.REFS: create_ref_files,
}
ALL = list(Layout)
GROUPING = [Layout.LOG, Layout.REPO]
"""Layouts in which callers share an attempt."""
REPLACING = [Layout.REPO, Layout.REFS]
"""Layouts in which a change replaces an object, so that a look from before it cannot be added to the state."""


def writes(request: Request) -> bool:
    """Whether a request makes a change visible, in whatever layout."""
    key = request.key
    return request.verb in ("put", "delete") and (key == "repo" or key.startswith(("log/", "refs/")))


class Outcomes:
    """A repository of some layout, and clients of it."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.clock = ManualClock()
        self.store = MemoryStorage(self.clock.sources())
        self.logs: list[RepositoryLog] = []

    async def create(self) -> tuple[RepositoryLog, ScriptedStorage]:
        storage = ScriptedStorage(self.store)
        log = await CREATE[self.layout](storage, self.clock.sources())
        self.logs.append(log)
        await log.append(lambda _: [e.BranchCreated(name="precious", snapshot=FIRST_SNAPSHOT)])
        await quiet(log)
        storage.requests.clear()
        return log, storage

    async def open(self) -> tuple[RepositoryLog, ScriptedStorage]:
        storage = ScriptedStorage(self.store)
        log = await open_repository(storage, self.clock.sources())
        self.logs.append(log)
        await log.prepare_writes()
        return log, storage

    async def commit(self, i: int, parent: ObjectId = FIRST_SNAPSHOT, branch: str = "main") -> Propose:
        """A commit of an empty snapshot; in format 1 its file is written at once."""
        self.clock.move(1)
        snapshot = Snapshot(id=an_id(i), parent_id=parent, flushed_at_us=self.clock.now_us, message=str(i), nodes={})
        if self.layout is Layout.REFS:
            await self.store.put(snapshot_key(snapshot.id), encode_snapshot(snapshot, 1))
        record = SnapshotRecord(
            id=snapshot.id, parent=parent, flushed_at_us=snapshot.flushed_at_us, message=str(i), metadata={}
        )
        return lambda _: [e.CommitAdded(branch=branch, snapshot=record)]

    async def state(self) -> RepoState:
        """As a client sees it that has just opened the repository; with the ancestry of ``main``."""
        log = await open_repository(self.store, self.clock.sources())
        await log.learn([log.state.branches["main"]], ancestry=True)
        state = log.state
        await log.aclose()
        return state

    async def history(self) -> list[ObjectId]:
        """Commits on ``main``, oldest first."""
        state = await self.state()
        return [record.id for record in state.ancestry(state.branches["main"])][-2::-1]

    async def aclose(self) -> None:
        for log in self.logs:
            await log.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "the logs left tasks behind"


async def quiet(log: RepositoryLog) -> None:
    """Wait for what the log does in the background."""
    tasks = [task for task in getattr(log, "tasks", ()) if not task.done()]
    if tasks:
        await asyncio.wait(tasks)


@pytest.fixture
async def world(request: pytest.FixtureRequest) -> AsyncIterator[Outcomes]:
    a_world = Outcomes(request.param)
    yield a_world
    await a_world.aclose()


every_layout = pytest.mark.parametrize("world", ALL, indirect=True, ids=str)
replacing_layouts = pytest.mark.parametrize("world", REPLACING, indirect=True, ids=str)
log_layout = pytest.mark.parametrize("world", [Layout.LOG], indirect=True, ids=str)
grouping_layouts = pytest.mark.parametrize("world", GROUPING, indirect=True, ids=str)


def delete_precious(_: RepoState) -> Sequence[e.Event]:
    return [e.BranchDeleted(name="precious")]


def reset_precious(_: RepoState) -> Sequence[e.Event]:
    return [e.BranchReset(name="precious", snapshot=an_id(1), expected=None)]


def tag_one(_: RepoState) -> Sequence[e.Event]:
    return [e.TagCreated(name="wrong", snapshot=an_id(1))]


def branch_off(_: RepoState) -> Sequence[e.Event]:
    return [e.BranchCreated(name="wrong", snapshot=an_id(1))]


UNWANTED: dict[str, Propose] = {
    "delete": delete_precious,
    "reset": reset_precious,
    "tag": tag_one,
    "branch": branch_off,
}
every_change = pytest.mark.parametrize("change", UNWANTED)


def refusing(request: Request) -> None:
    raise refused(StorageError(f"AccessDenied: no {request.verb} for you"))


def first_alone(answer: Callable[[Request], None]) -> Callable[[Request], None]:
    """The answer to the first request; those after it are executed."""
    answers = iter([answer])

    def answered(request: Request) -> None:
        for each in answers:
            each(request)

    return answered


def losing(request: Request) -> None:
    raise lost_answer()


def not_sending(request: Request) -> None:
    raise unsent(StorageError("connection refused"))


def answering_writes(storage: ScriptedStorage, answer: Callable[[Request], None]) -> list[Send]:
    """Writes get this answer instead of being executed; returns functions that execute them after all."""
    held: list[Send] = []

    async def script(request: Request, send: Send) -> object:
        if writes(request):
            held.append(send)
            answer(request)
        return await send()

    storage.script = script
    return held


def holding_writes(storage: ScriptedStorage) -> asyncio.Event:
    """Writes get no answer before the gate is opened, and are then lost without having been executed."""
    gate = asyncio.Event()

    async def script(request: Request, send: Send) -> object:
        if writes(request):
            await gate.wait()
            raise lost_answer()
        return await send()

    storage.script = script
    return gate


def sent(storage: ScriptedStorage) -> list[Request]:
    return [request for request in storage.requests if writes(request) and request.key != "repo"] or [
        request for request in storage.requests if writes(request)
    ]


# ------------------------------------------------------------------ a refusal is a refusal


@every_layout
@pytest.mark.parametrize("change", [*UNWANTED, "commit"])
async def test_a_refusal_is_raised_at_once_with_the_stores_message_and_nothing_stays_pending(
    world: Outcomes, change: str
) -> None:
    log, storage = await world.create()
    await log.append(await world.commit(1))
    await quiet(log)
    storage.requests.clear()
    answering_writes(storage, refusing)
    told = Told()
    propose = UNWANTED[change] if change in UNWANTED else await world.commit(2, an_id(1))
    with raises(StorageError, "storage-other", "AccessDenied") as caught:
        await log.append(told.of(propose))
    assert caught.value.refused
    assert told[-1] is None
    assert len(sent(storage)) == 1
    before = await world.state()
    storage.script = None
    # A refused change can be requested again, and later changes do not execute it.
    await log.append(await world.commit(3, an_id(1)))
    after = await world.state()
    assert (after.branches["precious"], dict(after.tags)) == (before.branches["precious"], {})
    assert await world.history() == [an_id(1), an_id(3)]


@every_layout
async def test_a_refused_change_can_be_committed_once_it_is_allowed(world: Outcomes) -> None:
    log, storage = await world.create()
    propose = await world.commit(1)
    answering_writes(storage, refusing)
    with pytest.raises(StorageError):
        await log.append(propose)
    storage.script = None
    await log.append(propose)
    assert await world.history() == [an_id(1)]


@every_layout
async def test_a_refusal_after_a_request_without_answer_is_no_refusal(world: Outcomes) -> None:
    log, storage = await world.create()
    propose = await world.commit(1)
    answers = iter([losing, refusing])
    held = answering_writes(storage, lambda request: next(answers)(request))
    with raises(CommitOutcomeUnknown, "commit-outcome-unknown", "AccessDenied") as caught:
        await log.append(propose)
    assert len(held) == 2
    storage.script = None
    await held[0]()
    assert await log.settle(caught.value.token)
    assert await world.history() == [an_id(1)]


@every_layout
async def test_a_request_that_never_left_is_known_not_to_have_landed(world: Outcomes) -> None:
    log, storage = await world.create()
    propose, told = await world.commit(1), Told()
    answering_writes(storage, not_sending)
    with pytest.raises(StorageError) as caught:
        await log.append(told.of(propose))
    assert caught.value.unsent
    assert not told.is_open
    assert len(sent(storage)) > 1, "it may be mended meanwhile"
    storage.script = None
    await log.append(propose)
    assert await world.history() == [an_id(1)]


# ------------------------------------------- a told attempt is never sent again


async def told_unknown(log: RepositoryLog, storage: ScriptedStorage, propose: Propose, how: str) -> Told:
    """Ask for a change whose outcome the caller does not learn, and whose requests do not arrive."""
    told = Told()
    if how == "lost":
        answering_writes(storage, losing)
        with pytest.raises(CommitOutcomeUnknown):
            await log.append(told.of(propose))
    else:
        gate = holding_writes(storage)
        deadline_s = 0.02 if how == "deadline" else None
        task = asyncio.ensure_future(log.append(told.of(propose), deadline_s=deadline_s))
        await until(lambda: any(map(writes, storage.requests)))
        if how == "cancelled":
            task.cancel()
        await asyncio.wait({task})
        gate.set()
    assert told.is_open
    return told


@every_layout
@pytest.mark.parametrize("how", ["lost", "deadline", "cancelled"])
@every_change
async def test_a_change_is_never_sent_again_once_its_caller_was_notified(
    world: Outcomes, change: str, how: str
) -> None:
    log, storage = await world.create()
    await log.append(await world.commit(1))
    await quiet(log)
    storage.requests.clear()
    await told_unknown(log, storage, UNWANTED[change], how)
    unwanted = {request.data for request in sent(storage)}
    count = len(storage.requests)
    storage.script = None
    await log.append(await world.commit(2, an_id(1)))
    later = [request for request in storage.requests[count:] if writes(request)]
    assert not unwanted & {request.data for request in later if request.verb == "put"} - {b""}
    assert not [request for request in later if request.verb == "delete"]
    state = await world.state()
    assert state.branches["precious"] == FIRST_SNAPSHOT
    assert "wrong" not in state.branches
    assert not state.tags
    assert await world.history() == [an_id(1), an_id(2)]


@every_layout
async def test_a_commit_is_not_sent_by_the_next_one_once_its_caller_was_notified(world: Outcomes) -> None:
    log, storage = await world.create()
    told = await told_unknown(log, storage, await world.commit(1), "lost")
    storage.script = None
    await log.append(await world.commit(2))
    assert await world.history() == [an_id(2)]
    assert not await log.settle(next(token for token in told if token is not None))


@grouping_layouts
async def test_a_caller_learns_that_its_change_lost_its_place_to_a_later_one(world: Outcomes) -> None:
    log, storage = await world.create()
    told = await told_unknown(log, storage, await world.commit(1), "lost")
    storage.script = None
    await log.append(await world.commit(2))
    assert not told.is_open


@every_layout
async def test_a_told_change_that_landed_meanwhile_is_recognised_by_the_next_one(world: Outcomes) -> None:
    log, storage = await world.create()
    told = Told()
    held = answering_writes(storage, losing)
    with pytest.raises(CommitOutcomeUnknown):
        await log.append(told.of(await world.commit(1)))
    storage.script = None
    await held[0]()
    with pytest.raises(ConflictError):
        await log.append(await world.commit(2))
    await log.append(await world.commit(3, an_id(1)))
    assert told.is_open, "it landed: no caller holds the token any more"
    token = pickle.loads(pickle.dumps(told[-1]))
    assert await log.settle(token)
    assert await world.history() == [an_id(1), an_id(3)]


@grouping_layouts
async def test_a_told_change_that_lands_just_before_the_next_one_is_seen_by_it(world: Outcomes) -> None:
    log, storage = await world.create()
    held = answering_writes(storage, losing)
    with pytest.raises(CommitOutcomeUnknown):
        await log.append(delete_precious)

    async def overtake(request: Request, send: Send) -> object:
        if writes(request):
            storage.script = None
            await held[0]()
        return await send()

    storage.script = overtake
    state = await log.append(await world.commit(2))
    assert "precious" not in state.branches
    assert await world.history() == [an_id(2)]


@grouping_layouts
async def test_several_told_changes_are_settled_by_the_one_that_took_their_place(world: Outcomes) -> None:
    log, storage = await world.create()
    told = [Told(), Told(), Told()]
    held: list[list[Send]] = []
    for i in range(3):
        held.append(answering_writes(storage, losing))
        with pytest.raises(CommitOutcomeUnknown):
            await log.append(told[i].of(await world.commit(i + 1)))
    storage.script = None
    await held[1][0]()
    await log.append(await world.commit(9, an_id(2)))
    assert [each.is_open for each in told] == [False, True, False]
    for send in (held[0][0], held[2][0]):
        with pytest.raises(StorageError):
            await send()
    assert await world.history() == [an_id(2), an_id(9)]


@grouping_layouts
async def test_only_the_newest_told_attempts_are_remembered(world: Outcomes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "ROUNDS", 1)
    log, storage = await world.create()
    assert isinstance(log, settle.SwappedLog)
    answering_writes(storage, losing)
    told = [Told() for _ in range(40)]
    for i, each in enumerate(told):
        with pytest.raises(CommitOutcomeUnknown):
            await log.append(each.of(await world.commit(i + 1)))
    assert len(log._told) <= 16
    storage.script = None
    await log.append(await world.commit(99))
    assert not told[-1].is_open
    first = told[0][-1]
    assert first is not None, "no client remembers it"
    assert not await log.settle(first)


@grouping_layouts
async def test_a_refresh_notifies_callers_that_left(world: Outcomes) -> None:
    log, storage = await world.create()
    told = await told_unknown(log, storage, await world.commit(1), "lost")
    storage.script = None
    other, _ = await world.open()
    await other.append(await world.commit(2))
    await log.refresh()
    assert not told.is_open


# ------------------------------------------------------------- callers who share an attempt


@grouping_layouts
@pytest.mark.parametrize("first_lands", [False, True])
async def test_callers_that_shared_an_attempt_with_a_leaving_one_go_on_in_another(
    world: Outcomes, first_lands: bool
) -> None:
    log, storage = await world.create()
    gate = asyncio.Event()
    count = 0

    async def script(request: Request, send: Send) -> object:
        nonlocal count
        if writes(request):
            count += 1
            if count == 1:
                await gate.wait()
                raise lost_answer()
            if count == 2 and first_lands:
                await world.store.put(first.key, first.data, first.precondition)
        return await send()

    storage.script = script
    told = Told(), Told()
    leaving = asyncio.ensure_future(log.append(told[0].of(delete_precious)))
    staying = asyncio.ensure_future(log.append(told[1].of(await world.commit(1))))
    await until(lambda: count == 1)
    first = next(request for request in storage.requests if writes(request))
    leaving.cancel()
    await asyncio.wait({leaving})
    gate.set()
    state = await staying
    assert await world.history() == [an_id(1)]
    assert ("precious" in state.branches) is not first_lands
    assert ("precious" in (await world.state()).branches) is not first_lands
    assert told[0].is_open is first_lands
    tokens = [token for token in told[1] if token is not None]
    assert await log.settle(tokens[-1])
    assert len(tokens[-1].nonces) == 2, "either of the two may have been the one"


async def test_a_change_whose_fate_cannot_be_found_out_is_unknown_and_not_made_again() -> None:
    world = Outcomes(Layout.REPO)
    log, storage = await world.create()
    gate = asyncio.Event()
    count = 0
    looks: list[Request] = []

    async def script(request: Request, send: Send) -> object:
        nonlocal count
        if writes(request):
            count += 1
            if count == 1:
                await gate.wait()
                raise lost_answer()
            # The first attempt has been executed when the second one arrives.
            await world.store.put(first.key, first.data, first.precondition)
        elif count == 2 and request.key == "repo":
            looks.append(request)
            if len(looks) > 2:
                # The second attempt is known to have lost; now the first one is looked for.
                raise StorageError("the store does not answer")
        return await send()

    storage.script = script
    told = Told(), Told()
    leaving = asyncio.ensure_future(log.append(told[0].of(delete_precious)))
    staying = asyncio.ensure_future(log.append(told[1].of(await world.commit(1))))
    await until(lambda: count == 1)
    first = next(request for request in storage.requests if writes(request))
    leaving.cancel()
    await asyncio.wait({leaving})
    gate.set()
    with pytest.raises(CommitOutcomeUnknown) as caught:
        await staying
    storage.script = None
    assert caught.value.token is not None
    assert await log.settle(caught.value.token)
    assert await world.history() == [an_id(1)]
    await world.aclose()


@grouping_layouts
async def test_a_call_is_not_refused_because_of_one_that_does_not_land(world: Outcomes) -> None:
    log, storage = await world.create()

    def branch_off_root(_: RepoState) -> Sequence[e.Event]:
        return [e.BranchCreated(name="b", snapshot=FIRST_SNAPSHOT)]

    answering_writes(storage, first_alone(refusing))
    first, second = await asyncio.gather(
        log.append(branch_off_root), log.append(branch_off_root), return_exceptions=True
    )
    assert isinstance(first, StorageError)
    assert first.refused
    assert isinstance(second, RepoState)
    assert "b" in (await world.state()).branches


@grouping_layouts
async def test_a_call_is_refused_because_of_one_that_shared_its_turn_and_landed(world: Outcomes) -> None:
    log, storage = await world.create()
    first, second = await asyncio.gather(
        log.append(await world.commit(1)), log.append(await world.commit(2)), return_exceptions=True
    )
    assert isinstance(first, RepoState)
    assert isinstance(second, ConflictError)
    assert second.actual_parent == encode_id(an_id(1))
    assert len(sent(storage)) == 1
    assert await world.history() == [an_id(1)]


@grouping_layouts
async def test_a_call_that_wants_nothing_because_of_another_waits_for_it(world: Outcomes) -> None:
    log, storage = await world.create()

    def once(state: RepoState) -> Sequence[e.Event]:
        return [] if "b" in state.branches else [e.BranchCreated(name="b", snapshot=FIRST_SNAPSHOT)]

    answering_writes(storage, first_alone(refusing))
    first, second = await asyncio.gather(log.append(once), log.append(once), return_exceptions=True)
    assert isinstance(first, StorageError)
    assert isinstance(second, RepoState)
    assert "b" in second.branches
    assert "b" in (await world.state()).branches


# --------------------------------------------------------------------- lost answers


@every_layout
async def test_a_change_that_landed_but_lost_its_answer_is_not_made_twice(world: Outcomes) -> None:
    log, storage = await world.create()
    propose = await world.commit(1)

    async def lose(request: Request, send: Send) -> object:
        answer = await send()
        if writes(request):
            storage.script = None
            raise lost_answer()
        return answer

    storage.script = lose
    await log.append(propose)
    assert await world.history() == [an_id(1)]


@every_layout
async def test_the_same_bytes_are_sent_while_the_place_is_unchanged_and_the_caller_waits(world: Outcomes) -> None:
    log, storage = await world.create()
    propose = await world.commit(1)

    async def drop(request: Request, send: Send) -> object:
        if writes(request) and len([r for r in storage.requests if writes(r)]) < 3:
            raise lost_answer()
        return await send()

    storage.script = drop
    await log.append(propose)
    tries = [request for request in storage.requests if writes(request)][:3]
    assert len({(request.key, request.data, request.precondition) for request in tries}) == 1


@every_layout
@pytest.mark.parametrize("late_lands", [True, False])
async def test_an_unknown_outcome_is_settled_either_way_by_any_client(world: Outcomes, late_lands: bool) -> None:
    log, storage = await world.create()
    held = answering_writes(storage, losing)
    with pytest.raises(CommitOutcomeUnknown) as unknown:
        await log.append(await world.commit(1))
    token = pickle.loads(pickle.dumps(unknown.value.token))
    assert token.snapshots == (an_id(1),)
    storage.script = None
    if late_lands:
        await held[0]()
    other, _ = await world.open()
    assert await other.settle(token) is late_lands
    for send in held[1:]:
        with pytest.raises(StorageError):
            await send()
    assert await log.settle(token) is late_lands
    assert await world.history() == ([an_id(1)] if late_lands else [])
    await log.append(await world.commit(2, an_id(1) if late_lands else FIRST_SNAPSHOT))
    assert (await world.history())[-1] == an_id(2)


@grouping_layouts
@pytest.mark.parametrize("late_lands", [True, False])
async def test_a_change_without_a_snapshot_is_settled_too(world: Outcomes, late_lands: bool) -> None:
    log, storage = await world.create()
    held = answering_writes(storage, losing)
    with pytest.raises(CommitOutcomeUnknown) as unknown:
        await log.append(delete_precious)
    if late_lands:
        await held[0]()
    other, _ = await world.open()
    assert await other.settle(unknown.value.token) is late_lands
    await other.append(await world.commit(1))
    assert await other.settle(unknown.value.token) is late_lands
    assert ("precious" in (await world.state()).branches) is not late_lands


async def test_a_change_without_a_snapshot_cannot_be_settled_in_format_1() -> None:
    world = Outcomes(Layout.REFS)
    log, storage = await world.create()
    answering_writes(storage, losing)
    with pytest.raises(CommitOutcomeUnknown) as unknown:
        await log.append(delete_precious)
    storage.script = None
    with pytest.raises(CommitOutcomeUnknown):
        await log.settle(unknown.value.token)
    await world.aclose()


@every_layout
async def test_a_deadline_gives_a_token_and_the_request_goes_on(world: Outcomes) -> None:
    log, storage = await world.create()
    gate = asyncio.Event()

    async def wait(request: Request, send: Send) -> object:
        if writes(request):
            await gate.wait()
        return await send()

    storage.script = wait
    with pytest.raises(CommitOutcomeUnknown) as unknown:
        await log.append(await world.commit(1), deadline_s=0.02)
    gate.set()
    assert await log.settle(unknown.value.token)
    assert await world.history() == [an_id(1)]


@every_layout
async def test_a_caller_cancelled_during_the_request_holds_the_token_that_settles_it(world: Outcomes) -> None:
    log, storage = await world.create()
    gate, told = asyncio.Event(), Told()

    async def wait(request: Request, send: Send) -> object:
        if writes(request):
            assert told.is_open, "told before anything is sent"
            await gate.wait()
        return await send()

    storage.script = wait
    caller = asyncio.ensure_future(log.append(told.of(await world.commit(1))))
    await until(lambda: any(map(writes, storage.requests)))
    caller.cancel()
    await asyncio.wait({caller})
    assert caller.cancelled()
    assert [token.snapshots for token in told if token is not None] == [(an_id(1),)]
    gate.set()
    assert await log.settle(told[-1])  # type: ignore[arg-type]
    assert told.is_open, "it landed: no caller holds the token any more"
    assert await world.history() == [an_id(1)]


@every_layout
async def test_a_caller_cancelled_during_a_request_that_lost_learns_that_nothing_is_pending(world: Outcomes) -> None:
    log, storage = await world.create()
    other, _ = await world.open()
    gate, told = asyncio.Event(), Told()

    async def wait(request: Request, send: Send) -> object:
        if writes(request):
            await gate.wait()
        return await send()

    storage.script = wait
    caller = asyncio.ensure_future(log.append(told.of(await world.commit(1))))
    await until(lambda: any(map(writes, storage.requests)))
    caller.cancel()
    await asyncio.wait({caller})
    await other.append(await world.commit(2))
    gate.set()
    await until(lambda: not told.is_open)
    await log.append(await world.commit(3, an_id(2)))
    assert [token is None for token in told] == [False, True], "it is not sent again"
    assert await world.history() == [an_id(2), an_id(3)]


@grouping_layouts
async def test_a_cancelled_caller_leaves_and_the_others_of_its_attempt_go_on(world: Outcomes) -> None:
    log, storage = await world.create()
    gate = asyncio.Event()

    async def wait(request: Request, send: Send) -> object:
        if writes(request):
            await gate.wait()
        return await send()

    storage.script = wait
    first = asyncio.ensure_future(log.append(await world.commit(1)))
    second = asyncio.ensure_future(log.append(lambda _: [e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)]))
    await until(lambda: any(map(writes, storage.requests)))
    third = asyncio.ensure_future(log.append(await world.commit(3, an_id(1))))
    await asyncio.sleep(0)
    first.cancel()
    third.cancel()
    await asyncio.wait({first, third})
    gate.set()
    assert "t" in (await second).tags
    assert first.cancelled()
    assert third.cancelled()
    assert await world.history() == [an_id(1)], "the first was in the attempt, the third not yet"


@every_layout
async def test_a_caller_cancelled_before_anything_is_sent_gets_no_token(world: Outcomes) -> None:
    log, storage = await world.create()
    gate = asyncio.Event()

    async def wait(request: Request, send: Send) -> object:
        if writes(request):
            await gate.wait()
        return await send()

    storage.script = wait
    first = asyncio.ensure_future(log.append(await world.commit(1)))
    await until(lambda: any(map(writes, storage.requests)))
    told = Told()
    second = asyncio.ensure_future(log.append(told.of(await world.commit(2, an_id(1)))))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait({second})
    gate.set()
    await first
    assert told == []
    assert await world.history() == [an_id(1)]


@every_layout
async def test_silence_makes_the_sent_change_unknown_and_refuses_waiting_ones(world: Outcomes) -> None:
    log, storage = await world.create()
    answering_writes(storage, losing)
    propose, next_one = await world.commit(1), await world.commit(2, an_id(1))
    first = asyncio.ensure_future(log.append(propose))
    await until(lambda: any(map(writes, storage.requests)))
    second = asyncio.ensure_future(log.append(next_one))
    outcomes = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [CommitOutcomeUnknown, SessionStateError]


@every_layout
async def test_closing_with_a_change_in_flight_makes_its_outcome_unknown(
    world: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle, "CLOSE_GRACE_S", 0.01)
    log, storage = await world.create()

    async def hang(request: Request, send: Send) -> object:
        if writes(request):
            await asyncio.Event().wait()
        return await send()

    storage.script = hang
    waiting = asyncio.ensure_future(log.append(await world.commit(1)))
    await until(lambda: any(map(writes, storage.requests)))
    storage.script = None
    await log.aclose()
    with pytest.raises(CommitOutcomeUnknown) as unknown:
        await waiting
    other, _ = await world.open()
    assert not await other.settle(unknown.value.token)
    with pytest.raises(SessionStateError):
        await log.append(await world.commit(2))


@every_layout
async def test_a_failing_callback_affects_no_other_caller(world: Outcomes, caplog: pytest.LogCaptureFixture) -> None:
    log, _ = await world.create()

    class Failing(Told):
        def append(self, token: SwapToken | None) -> None:
            raise KeyError("mine")

    await log.append(Failing().of(await world.commit(1)))
    assert "callback" in caplog.text
    assert await world.history() == [an_id(1)]


# ------------------------------------------------------------------------ the store's clock


@every_layout
async def test_a_slow_request_does_not_put_the_stores_clock_ahead(world: Outcomes) -> None:
    _, _ = await world.create()
    storage = ScriptedStorage(world.store)

    async def slow(request: Request, send: Send) -> object:
        world.clock.move(300)
        return await send()

    storage.script = slow
    log = await open_repository(storage, world.clock.sources())
    world.logs.append(log)
    for look in (False, True):
        if look:
            await log.refresh()
        # A file that is written now must not be older than `since`, for which this is used.
        assert log.store_time_us <= world.clock.now_us
    storage.script = None


# ------------------------------------------------------------------------- lost races


@every_layout
async def test_a_lost_race_costs_the_write_and_a_look(world: Outcomes) -> None:
    log, storage = await world.create()
    other, _ = await world.open()
    theirs, mine = await world.commit(1), await world.commit(2)
    asked: list[str] = []

    async def be_overtaken(request: Request, send: Send) -> object:
        if writes(request) and not asked:
            await other.append(theirs)
        if asked or writes(request):
            asked.append(request.verb)
        return await send()

    storage.script = be_overtaken
    with pytest.raises(ConflictError):
        await log.append(mine)
    # In the log the loss itself says what was first; then one look more, before anything is refused.
    assert asked[:2] == ["put", "get"]
    if world.layout is Layout.LOG:
        assert asked == ["put", "get", "get"]
    assert await world.history() == [an_id(1)]


@pytest.mark.parametrize("held_up_s", [0, 600])
@log_layout  # the other layouts pause as `repo_update_retries` says, or not at all
async def test_losers_pause_as_long_as_swaps_take(world: Outcomes, held_up_s: float) -> None:
    log, storage = await world.create()
    other, _ = await world.open()
    pauses: list[float] = []
    sleep = log._sources.sleep  # type: ignore[attr-defined]

    async def listen(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(seconds)

    object.__setattr__(log._sources, "sleep", listen)  # type: ignore[attr-defined]
    losses = 0

    async def be_held_up(request: Request, send: Send) -> object:
        world.clock.move(held_up_s)
        return await send()

    storage.script = be_held_up
    await log.append(lambda _: [e.TagCreated(name="first", snapshot=FIRST_SNAPSHOT)])

    async def lose_often(request: Request, send: Send) -> object:
        nonlocal losses
        if writes(request) and losses < 6:
            losses += 1
            world.clock.move(0.010)
            await other.append(lambda _: [e.TagCreated(name=f"t{losses}", snapshot=FIRST_SNAPSHOT)])
        return await send()

    storage.script = lose_often
    await log.append(await world.commit(1))
    assert losses == 6
    # After a checkpoint that was held up comes a pause of its own.
    assert max(pause for pause in pauses if pause != 30.0) <= 16 * 0.011
    assert await world.history() == [an_id(1)]


@log_layout
async def test_a_refused_loser_pauses_after_the_look_that_its_caller_writes_upon(world: Outcomes) -> None:
    log, storage = await world.create()
    other, _ = await world.open()
    theirs, mine = await world.commit(1), await world.commit(2)
    done: list[str] = []
    sleep = log._sources.sleep  # type: ignore[attr-defined]

    async def listen(seconds: float) -> None:
        done.append("pause")
        await sleep(seconds)

    object.__setattr__(log._sources, "sleep", listen)  # type: ignore[attr-defined]

    async def be_overtaken(request: Request, send: Send) -> object:
        if writes(request) and not done:
            world.clock.move(0.010)
            await other.append(theirs)
        if done or writes(request):
            done.append(request.verb)
        return await send()

    storage.script = be_overtaken
    with pytest.raises(ConflictError):
        await log.append(mine)
    assert done == ["put", "get", "get", "pause"]


# ------------------------------------------------------------- what a client sees, and creation


@every_layout
async def test_a_late_answer_does_not_replace_a_newer_state(world: Outcomes) -> None:
    log, storage = await world.create()
    other, _ = await world.open()
    first, second = await world.commit(1), await world.commit(2, parent=an_id(1))

    async def answer_late(request: Request, send: Send) -> object:
        answer = await send()
        if writes(request):
            storage.script = None
            await other.append(second)
            assert (await log.refresh()).branches["main"] == an_id(2)
        return answer

    storage.script = answer_late
    await log.append(first)
    assert log.state.branches["main"] == an_id(2)
    assert an_id(1) in log.state.snapshots


@replacing_layouts
async def test_a_look_during_which_a_change_lands_is_repeated(world: Outcomes) -> None:
    log, storage = await world.create()
    other, _ = await world.open()
    first, second = await world.commit(1), await world.commit(2, parent=an_id(1))
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def hold_the_first_look(request: Request, send: Send) -> object:
        try:
            return await send()
        finally:
            if request.verb == "get" and not asked.is_set():
                asked.set()
                await go_on.wait()

    storage.script = hold_the_first_look
    look = asyncio.create_task(log.refresh())
    await asked.wait()
    await log.append(first)
    await other.append(second)
    go_on.set()
    assert (await look).branches["main"] == an_id(2)


@pytest.mark.parametrize("layout", ALL, ids=str)
async def test_exactly_one_of_many_creators_succeeds(layout: Layout) -> None:
    clock = ManualClock()
    store = MemoryStorage(clock.sources())
    results = await asyncio.gather(
        *(CREATE[layout](store, clock.sources(), check_clean_root=False) for _ in range(5)), return_exceptions=True
    )
    [made] = [result for result in results if not isinstance(result, BaseException)]
    assert sum(isinstance(result, AlreadyExistsError | InvalidInputError) for result in results) == 4
    await made.aclose()
