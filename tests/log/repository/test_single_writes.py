"""The promises of every single conditional write (rules 1 and 2), whatever becomes of its requests.

One contract for all places where such a write is made; changes for which callers wait have `test_outcome_contract`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from icechunk.errors import AlreadyExistsError, ObjectNotFoundError, PreconditionFailedError, StorageError
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.keys import snapshot_key
from icechunk.format.snapshot.codec import encode_snapshot
from icechunk.format.values import Snapshot
from icechunk.log.repository import events as e
from icechunk.log.repository.convert import convert_to_log
from icechunk.log.repository.create import create_log, create_ref_files, create_repo_object
from icechunk.log.repository.entries.checkpoint import finish_conversion, write_checkpoint
from icechunk.log.repository.entries.embedded import EmbeddedInTail
from icechunk.log.repository.entries.reader import Opened, open_head
from icechunk.log.repository.entries.takeover import seal_log
from icechunk.log.repository.entry import slot_key
from icechunk.log.repository.events import CONVERT, TAKEOVER, Sealed
from icechunk.log.repository.objects import read_repo, read_slot
from icechunk.log.repository.open import detect, open_repository
from icechunk.log.repository.port import Layout, SwapToken
from icechunk.log.repository.ref_files.names import MARK_BYTES, encode_ref, is_closed, known_mark, mark_of, marks_after
from icechunk.log.repository.ref_files.upgrade import upgrade
from icechunk.log.repository.tokens import REFS_TOKEN, REPO_TOKEN
from icechunk.log.session.segment import SegmentHead, SegmentKind, Slot, encode_segment, segment_key
from icechunk.maintenance.ref_history import Links
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.outcome import is_refusal, refused
from icechunk.storage.port import Absent, Matches, Storage
from icechunk.testing.scripted import ManualClock, Request, ScriptedStorage, Send, lost_answer
from icechunk.transfer.segments import add_segment
from tests.log.repository.strategies import an_id
from tests.log.repository.world import put_entry

MAIN = "refs/branch.main/ref.json"


class Place:
    """A place where a single conditional write is made."""

    key = "repo"
    condition: type[Absent | Matches] = Matches
    recognises_its_own = True
    """Whether a write whose answer was lost is known to be the client's own."""

    async def prepare(self, store: Storage) -> None:
        """Make the state that must be there before."""

    async def write(self, storage: Storage, sources: Sources) -> Any:
        """Make the write; what it returns."""
        raise NotImplementedError

    async def overtake(self, store: Storage) -> None:
        """Make the change that another client makes in this place."""
        raise NotImplementedError

    async def check(self, store: Storage, result: Any) -> None:
        """The write landed, or the other client's did, if that is as good."""
        raise NotImplementedError

    async def check_overtaken(self, store: Storage, result: Any) -> None:
        """The other client's write landed."""
        await self.check(store, result)

    def is_it(self, request: Request) -> bool:
        return request.verb == "put" and request.key == self.key and isinstance(request.precondition, self.condition)


class CreatesLog(Place):
    condition: type[Absent | Matches] = Absent

    async def write(self, storage: Storage, sources: Sources) -> Any:
        return await create_log(storage, sources, check_clean_root=False)

    async def overtake(self, store: Storage) -> None:
        await create_log(store, check_clean_root=False)

    async def check(self, store: Storage, result: Any) -> None:
        found = await read_repo(store, SYSTEM)
        assert found is not None
        assert found.known.marker is not None
        assert found.known.marker.epoch == result.epoch

    async def check_overtaken(self, store: Storage, result: Any) -> None:
        assert isinstance(result, AlreadyExistsError)


class CreatesRepoObject(CreatesLog):
    async def overtake(self, store: Storage) -> None:
        await create_repo_object(store, check_clean_root=False)

    async def write(self, storage: Storage, sources: Sources) -> Any:
        return await create_repo_object(storage, sources, check_clean_root=False)

    async def check(self, store: Storage, result: Any) -> None:
        assert (await store.get("repo")).version == result.version


class CreatesFirstSnapshot(CreatesLog):
    key = snapshot_key(FIRST_SNAPSHOT)

    async def overtake(self, store: Storage) -> None:
        other = MemoryStorage()
        await create_log(other)
        await store.put(self.key, (await other.get(self.key)).data, Absent())

    async def check_overtaken(self, store: Storage, result: Any) -> None:
        await self.check(store, result)


class CreatesRefFiles(CreatesLog):
    key = MAIN
    recognises_its_own = False

    async def write(self, storage: Storage, sources: Sources) -> Any:
        return await create_ref_files(storage, sources, check_clean_root=False)

    async def overtake(self, store: Storage) -> None:
        await create_ref_files(store, check_clean_root=False)

    async def check(self, store: Storage, result: Any) -> None:
        assert dict(result.state.branches) == {"main": FIRST_SNAPSHOT}
        assert await detect(store) is Layout.REFS


class SealsLog(Place):
    condition: type[Absent | Matches] = Absent
    epoch = ""

    async def prepare(self, store: Storage) -> None:
        log = await create_log(store)
        self.epoch, self.key = log.epoch, slot_key(log.epoch, 1)
        await log.aclose()

    async def write(self, storage: Storage, sources: Sources) -> Any:
        return await seal_log(storage, sources, self.epoch, 0)

    async def overtake(self, store: Storage) -> None:
        await put_entry(store, self.epoch, 1, e.Sealed(reason=CONVERT))

    async def check(self, store: Storage, result: Any) -> None:
        assert result == (0, Sealed(reason=TAKEOVER))
        assert await read_slot(store, self.epoch, 2) is None

    async def check_overtaken(self, store: Storage, result: Any) -> None:
        assert result == (0, Sealed(reason=CONVERT))


class SealsLogThatGoesOn(SealsLog):
    async def overtake(self, store: Storage) -> None:
        await put_entry(store, self.epoch, 1, e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT))

    async def check_overtaken(self, store: Storage, result: Any) -> None:
        assert result == (1, Sealed(reason=TAKEOVER))


class WritesCheckpoint(Place):
    opened: Opened

    async def prepare(self, store: Storage) -> None:
        log = await create_log(store)
        await put_entry(store, log.epoch, 1, e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT))
        opened = await open_head(store, SYSTEM)
        assert isinstance(opened, Opened)
        self.opened = opened

    async def write(self, storage: Storage, sources: Sources) -> Any:
        return await write_checkpoint(
            storage,
            sources,
            self.opened.head,
            self.opened.known,
            embedded=EmbeddedInTail(storage, self.opened.tail),
            updates_per_file=1000,
        )

    async def overtake(self, store: Storage) -> None:
        await self.write(store, SYSTEM)

    async def check(self, store: Storage, result: Any) -> None:
        found = await read_repo(store, SYSTEM)
        assert found is not None
        assert found.known == result.known
        assert found.known.marker is not None
        assert found.known.marker.n == 1


class FinishesConversion(WritesCheckpoint):
    async def prepare(self, store: Storage) -> None:
        log = await create_log(store)
        await put_entry(store, log.epoch, 1, e.Sealed(reason=CONVERT))
        opened = await open_head(store, SYSTEM)
        assert isinstance(opened, Opened)
        self.opened = opened

    async def write(self, storage: Storage, sources: Sources) -> Any:
        embedded = EmbeddedInTail(storage, self.opened.tail)
        await finish_conversion(storage, sources, self.opened.head, embedded=embedded, updates_per_file=1000)

    async def check(self, store: Storage, result: Any) -> None:
        assert await detect(store) is Layout.REPO


class ConvertsToLog(Place):
    async def prepare(self, store: Storage) -> None:
        await create_repo_object(store)

    async def write(self, storage: Storage, sources: Sources) -> Any:
        return await convert_to_log(storage, sources)

    async def overtake(self, store: Storage) -> None:
        await convert_to_log(store, SYSTEM)

    async def check(self, store: Storage, result: Any) -> None:
        found = await read_repo(store, SYSTEM)
        assert found is not None
        assert found.known.marker is not None
        assert found.known.marker.epoch == result


class AnnouncesUpgrade(Place):
    condition: type[Absent | Matches] = Absent

    async def prepare(self, store: Storage) -> None:
        await create_ref_files(store)

    async def write(self, storage: Storage, sources: Sources) -> Any:
        await upgrade(storage, sources, dry_run=False, delete_ref_files=True)

    async def overtake(self, store: Storage) -> None:
        await self.write(store, SYSTEM)

    async def check(self, store: Storage, result: Any) -> None:
        assert await detect(store) is Layout.REPO
        log = await open_repository(store)
        assert dict(log.state.branches) == {"main": FIRST_SNAPSHOT}
        assert log.state.status.availability == 0


class PutsUpgradeOnline(AnnouncesUpgrade):
    condition = Matches


class ClosesBranch(AnnouncesUpgrade):
    key = MAIN
    condition = Matches

    async def overtake(self, store: Storage) -> None:
        found = await store.get(MAIN)
        if not is_closed(found.data):
            await store.put(MAIN, encode_ref(FIRST_SNAPSHOT, b"\n"), Matches(found.version))


class SettlesRepoObject(Place):
    token: SwapToken

    async def prepare(self, store: Storage) -> None:
        log = await create_repo_object(store)
        self.token = SwapToken(epoch=f"{REPO_TOKEN}{log.version}", nonces=(b"x" * 16,), snapshots=(an_id(1),))

    async def write(self, storage: Storage, sources: Sources) -> Any:
        log = await open_repository(storage, sources)
        try:
            return await log.settle(self.token)
        finally:
            await log.aclose()

    async def overtake(self, store: Storage) -> None:
        other = await open_repository(store)
        await other.append(lambda _: [e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT)])

    async def check(self, store: Storage, result: Any) -> None:
        assert result is False
        assert f"{REPO_TOKEN}{(await store.get('repo')).version}" != self.token.epoch


class SettlesRefFiles(SettlesRepoObject):
    key = MAIN

    async def prepare(self, store: Storage) -> None:
        await create_ref_files(store)
        found = await store.get(MAIN)
        nonce = b"x" * MARK_BYTES + found.version.encode() + b"\0" + known_mark(found.data)
        self.token = SwapToken(epoch=f"{REFS_TOKEN}{MAIN}", nonces=(nonce,), snapshots=(an_id(1),))

    async def overtake(self, store: Storage) -> None:
        found = await store.get(MAIN)
        marks = mark_of(b"overtake") + marks_after(found.data)
        await store.put(MAIN, encode_ref(FIRST_SNAPSHOT, marks), Matches(found.version))

    async def check(self, store: Storage, result: Any) -> None:
        assert result is False
        assert not self.token.nonces[0][MARK_BYTES:].startswith((await store.get(MAIN)).version.encode())


class SetsParent(Place):
    """A snapshot's file of format 1 gets another parent, as by an expiration."""

    key = snapshot_key(an_id(3))

    async def prepare(self, store: Storage) -> None:
        await store.put(self.key, self.file(an_id(2)), Absent())

    def file(self, parent: ObjectId) -> bytes:
        return encode_snapshot(Snapshot(id=an_id(3), parent_id=parent, flushed_at_us=0, message="third"), 1, 1)

    async def write(self, storage: Storage, sources: Sources) -> Any:
        await Links(storage, sources).set_parent(an_id(3), an_id(1), 1)

    async def overtake(self, store: Storage) -> None:
        await store.put(self.key, self.file(FIRST_SNAPSHOT), Matches((await store.get(self.key)).version))

    async def check(self, store: Storage, result: Any) -> None:
        assert (await store.get(self.key)).data == self.file(an_id(1))


class AddsSegment(Place):
    """A session is persisted: the next segment of its log."""

    key = segment_key(Slot(an_id(4), None, 1))
    condition: type[Absent | Matches] = Absent
    mine, theirs = (
        SegmentHead(kind=SegmentKind.CHECKPOINT, nonce=bytes([i]) * 16, base=FIRST_SNAPSHOT) for i in (1, 2)
    )

    async def write(self, storage: Storage, sources: Sources) -> Any:
        return await add_segment(
            storage, sources, Slot(an_id(4), None, 1), self.mine.nonce, encode_segment(self.mine, ())
        )

    async def overtake(self, store: Storage) -> None:
        await store.put(self.key, encode_segment(self.theirs, ()), Absent())

    async def check(self, store: Storage, result: Any) -> None:
        assert result is None
        assert (await store.get(self.key)).data == encode_segment(self.mine, ())

    async def check_overtaken(self, store: Storage, result: Any) -> None:
        assert result == self.theirs
        assert (await store.get(self.key)).data == encode_segment(self.theirs, ())


PLACES: list[type[Place]] = [
    CreatesLog, CreatesRepoObject, CreatesFirstSnapshot, CreatesRefFiles, SealsLog, SealsLogThatGoesOn,
    WritesCheckpoint, FinishesConversion, ConvertsToLog, AnnouncesUpgrade, PutsUpgradeOnline, ClosesBranch,
    SettlesRepoObject, SettlesRefFiles, SetsParent, AddsSegment,
]  # fmt: skip
everywhere = pytest.mark.parametrize("kind", PLACES, ids=lambda kind: kind.__name__)


class Trial:
    """One write, with a script for its requests."""

    def __init__(self, kind: type[Place]) -> None:
        self.clock = ManualClock()
        self.place = kind()
        self.store = MemoryStorage(self.clock.sources())
        self.storage = ScriptedStorage(self.store)

    async def run(self, *answers: Callable[[Send], Any]) -> Any:
        """Write. The first requests of the write get these answers, in order; later ones are executed."""
        await self.place.prepare(self.store)
        coming = iter(answers)

        async def script(request: Request, send: Send) -> object:
            answer = next(coming, None) if self.place.is_it(request) else None
            return await (send() if answer is None else answer(send))

        self.storage.script = script
        return await self.place.write(self.storage, self.clock.sources())

    @property
    def requests(self) -> int:
        """Requests of the write."""
        return sum(map(self.place.is_it, self.storage.requests))


async def executed_and_lost(send: Send) -> object:
    await send()
    raise lost_answer()


async def executed_and_turned_down(send: Send) -> object:
    """As by a proxy that sends a request twice: the second one finds the first one's object."""
    await send()
    raise PreconditionFailedError("it has another version")


async def lost(send: Send) -> object:
    raise lost_answer()


async def denied(send: Send) -> object:
    raise refused(StorageError("not for you"))


@everywhere
async def test_a_write_whose_answer_was_lost_is_not_made_again(kind: type[Place]) -> None:
    trial = Trial(kind)
    if not trial.place.recognises_its_own:
        with pytest.raises(StorageError) as caught:
            await trial.run(executed_and_lost)
        assert not is_refusal(caught.value)
        assert not isinstance(caught.value, AlreadyExistsError)
    else:
        await trial.place.check(trial.store, await trial.run(executed_and_lost))
    assert trial.requests == 1


@everywhere
async def test_a_write_that_did_not_arrive_is_sent_again(kind: type[Place]) -> None:
    trial = Trial(kind)
    await trial.place.check(trial.store, await trial.run(lost))
    assert trial.requests == 2


@everywhere
async def test_a_write_that_arrives_late_changes_nothing(kind: type[Place]) -> None:
    trial, late = Trial(kind), list[Send]()

    async def held(send: Send) -> object:
        late.append(send)
        raise lost_answer()

    result = await trial.run(held)
    before = {item.key: item.version async for page in trial.store.list_pages() for item in page}
    with pytest.raises(StorageError):
        await late[0]()
    assert {item.key: item.version async for page in trial.store.list_pages() for item in page} == before
    await trial.place.check(trial.store, result)


@everywhere
async def test_a_refusal_that_is_certain_ends_it_at_once(kind: type[Place]) -> None:
    trial = Trial(kind)
    with pytest.raises(StorageError) as caught:
        await trial.run(denied, denied)
    assert is_refusal(caught.value)
    assert trial.requests == 1


@everywhere
async def test_a_refusal_after_a_request_without_answer_is_not_certain(kind: type[Place]) -> None:
    trial = Trial(kind)
    with pytest.raises(StorageError) as caught:
        await trial.run(lost, denied, denied)
    assert not is_refusal(caught.value)
    assert trial.requests == 2


@everywhere
async def test_a_write_that_finds_its_own_bytes_has_landed(kind: type[Place]) -> None:
    trial = Trial(kind)
    if not trial.place.recognises_its_own:
        with pytest.raises(AlreadyExistsError):
            await trial.run(executed_and_turned_down)
    else:
        await trial.place.check(trial.store, await trial.run(executed_and_turned_down))
    assert trial.requests == 1


@everywhere
@pytest.mark.parametrize("answered", [True, False])
async def test_a_write_whose_place_is_taken_by_another_client(kind: type[Place], answered: bool) -> None:
    trial = Trial(kind)

    async def too_late(send: Send) -> object:
        await trial.place.overtake(trial.store)
        if answered:
            return await send()
        raise lost_answer()

    if not answered and not trial.place.recognises_its_own:
        with pytest.raises(StorageError):
            await trial.run(too_late)
        return
    try:
        result = await trial.run(too_late)
    except AlreadyExistsError as error:
        result = error
    await trial.place.check_overtaken(trial.store, result)


@everywhere
async def test_a_store_that_never_answers_ends_it_as_uncertain(kind: type[Place]) -> None:
    trial = Trial(kind)
    with pytest.raises(StorageError) as caught:
        await trial.run(*[lost] * 1000)
    assert not is_refusal(caught.value)
    assert 2 <= trial.requests <= 20


async def test_a_segment_whose_slot_was_taken_and_emptied_is_not_sent_again() -> None:
    trial = Trial(AddsSegment)

    async def gone(send: Send) -> object:
        raise PreconditionFailedError("it exists already")

    with pytest.raises(ObjectNotFoundError):
        await trial.run(gone)
    assert [request.verb for request in trial.storage.requests] == ["put", "get"]
    assert not [item async for page in trial.store.list_pages() for item in page]


async def test_a_segment_that_finds_its_slot_taken_costs_the_write_and_a_look() -> None:
    trial = Trial(AddsSegment)
    await trial.place.overtake(trial.store)
    await trial.place.check_overtaken(trial.store, await trial.run())
    assert [request.verb for request in trial.storage.requests] == ["put", "get"]
