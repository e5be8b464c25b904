"""Sessions that survive their process: checkpointed, resumed elsewhere, committed once, or ended with a reason."""

from __future__ import annotations

import asyncio
import random
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import icechunk
from icechunk import ConflictDetector, Repository, Session
from icechunk.config import EngineConfig
from icechunk.errors import (
    CommitOutcomeUnknown,
    ErrorKind,
    FormatError,
    InvalidInputError,
    ReadOnlyError,
    SessionEndedError,
    SessionNotFoundError,
    SessionStateError,
    StorageError,
)
from icechunk.format.keys import CHUNKS_PREFIX, SESSIONS_PREFIX
from icechunk.storage import outcome
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import PutResult, Storage
from icechunk.testing.recording import RecordingStorage
from icechunk.testing.wrapping import WrappingStorage
from tests.maintenance.helpers import by_layout

N = 40


async def new_repo(storage: Storage, version: int | None = None) -> Repository:
    """With an array of `N` chunks, all -1, each too large to be inline."""
    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 0
    repo = await Repository.create_async(storage, config, spec_version=version)
    await repo.save_config_async()
    session = await repo.writable_session_async("main")
    await zarr.api.asynchronous.create_array(
        store=session.store, name="a", shape=(N,), chunks=(1,), dtype="i4", fill_value=-1
    )
    await session.commit_async("array")
    return repo


async def put(session: Session, index: int | slice, value: int) -> None:
    array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r+")
    await array.setitem(index, value)


async def get(session: Session) -> list[int]:
    array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r")
    return [int(value) for value in np.asarray(await array.getitem(slice(None)))]


async def committed(repo: Repository) -> list[int]:
    return await get(await repo.readonly_session_async("main"))


async def messages(repo: Repository) -> list[str]:
    return [info.message async for info in repo.async_ancestry(branch="main")][:-2]


async def segments(storage: Storage) -> list[str]:
    return [info.key async for page in storage.list_pages(SESSIONS_PREFIX) for info in page]


def values(**changed: int) -> list[int]:
    return [changed.get(f"_{i}", -1) for i in range(N)]


class Interrupted(WrappingStorage):
    """Stops for ever before, or after, a write whose key begins with a text."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.before: tuple[str, ...] = ()
        self.after: tuple[str, ...] = ()
        self.stopped = asyncio.Event()
        self.go_on = asyncio.Event()

    async def put(self, key: str, *args: Any, **named: Any) -> PutResult:
        if key.startswith(self.before or ("\0",)):
            self.stopped.set()
            await self.go_on.wait()
        result = await super().put(key, *args, **named)
        if key.startswith(self.after or ("\0",)):
            self.stopped.set()
            await asyncio.Event().wait()
        return result


@by_layout
async def test_a_session_goes_on_in_another_process_and_the_one_before_is_fenced(
    storage: Storage, version: int | None
) -> None:
    repo = await new_repo(storage, version)
    session = await repo.writable_session_async("main")
    assert session.id is None
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    await put(session, 2, 2)
    assert await session.checkpoint_async() == id == session.id
    await put(session, 3, 3)
    elsewhere = await Repository.open_async(storage)
    (listed,) = await elsewhere.sessions_async()
    assert (listed.id, listed.branch, listed.snapshot_id) == (id, "main", session.snapshot_id)
    assert listed.created_at <= listed.written_at + timedelta(seconds=2)
    assert listed.leased_until - listed.written_at == timedelta(days=7)
    resumed = await elsewhere.resume_session_async(id)
    assert (resumed.id, resumed.branch, resumed.has_uncommitted_changes) == (id, "main", True)
    assert await get(resumed) == values(_1=1, _2=2)
    await put(resumed, 4, 4)
    for attempt in (session.checkpoint_async, lambda: session.commit_async("twice"), session.abandon_async):
        with pytest.raises(SessionEndedError) as fenced:
            await attempt()
        assert fenced.value.kind == ErrorKind.SESSION_FENCED
    snapshot = await resumed.commit_async("once")
    assert await committed(repo) == values(_1=1, _2=2, _4=4)
    assert await messages(repo) == ["once"]
    assert await elsewhere.sessions_async() == []
    # Where the first process would write next, and the end.
    assert [key[-1] for key in await segments(storage)] == ["3", "5"]
    fresh = await repo.writable_session_async("main")
    assert fresh.id is None
    for attempt in (session.checkpoint_async, lambda: session.commit_async("twice")):
        with pytest.raises(SessionEndedError):
            await attempt()
    with pytest.raises(SessionEndedError) as ended:
        await repo.resume_session_async(id)
    assert (ended.value.kind, ended.value.snapshot_id) == (ErrorKind.SESSION_COMMITTED, snapshot)
    await repo.aclose()
    await elsewhere.aclose()


@by_layout
async def test_an_abandoned_session_leaves_only_the_record_of_its_end(storage: Storage, version: int | None) -> None:
    repo = await new_repo(storage, version)
    session = await repo.writable_session_async("main")
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    await session.abandon_async()
    assert session.read_only
    assert await get(session) == values()
    assert len(await segments(storage)) == 1
    with pytest.raises(SessionEndedError) as ended:
        await repo.resume_session_async(id)
    assert (ended.value.kind, ended.value.snapshot_id) == (ErrorKind.SESSION_ABANDONED, None)
    with pytest.raises(ReadOnlyError):
        await session.checkpoint_async()
    with pytest.raises(SessionNotFoundError):
        await repo.resume_session_async(session.snapshot_id)
    with pytest.raises(InvalidInputError):
        await repo.resume_session_async("none")
    await repo.aclose()


async def test_the_cost_of_a_checkpoint_is_in_proportion_to_the_new_events() -> None:
    storage = RecordingStorage(MemoryStorage())
    repo = await new_repo(storage)
    session = await repo.writable_session_async("main")
    await put(session, slice(0, 20), 1)
    await session.checkpoint_async()
    sizes = []
    for i in range(20, 24):
        await put(session, i, i)
        storage.clear()
        await session.checkpoint_async()
        assert storage.count("put", SESSIONS_PREFIX) == storage.count("put", CHUNKS_PREFIX) == 1
        # The pack with the chunk, the segment, and beside that a look at the log.
        assert storage.dependent_rounds() == 2
        sizes.append(sum(request.size for request in storage.requests if request.key.startswith(SESSIONS_PREFIX)))
    assert max(sizes) - min(sizes) < 10
    assert max(sizes) < 1500
    storage.clear()
    await put(session, 30, 30)
    await session.commit_async("all")
    assert storage.count("put", SESSIONS_PREFIX) == 2
    assert storage.count("delete") == 1
    session = await repo.writable_session_async("main")
    storage.clear()
    await put(session, 31, 31)
    await session.commit_async("not persisted")
    assert not any(request.key.startswith(SESSIONS_PREFIX) for request in storage.requests)
    await repo.aclose()


async def test_rollbacks_rebases_and_discards_are_in_the_segments_too(storage: Storage) -> None:
    repo = await new_repo(storage)
    session = await repo.writable_session_async("main")
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    savepoint = session.savepoint()
    await put(session, 2, 2)
    await session.checkpoint_async()
    session.rollback(savepoint)
    await put(session, 3, 3)
    await session.checkpoint_async()
    other = await repo.writable_session_async("main")
    await put(other, 9, 9)
    tip = await other.commit_async("other")
    await session.rebase_async(ConflictDetector())
    await put(session, 4, 4)
    await session.checkpoint_async()
    session = await (await Repository.open_async(storage)).resume_session_async(id)
    assert session.snapshot_id == tip
    assert await get(session) == values(_1=1, _3=3, _4=4, _9=9)
    session.discard_changes()
    await put(session, 5, 5)
    await session.checkpoint_async()
    session = await repo.resume_session_async(id)
    await session.commit_async("rest")
    assert await committed(repo) == values(_5=5, _9=9)
    await repo.aclose()


@by_layout
@pytest.mark.parametrize("landed", [True, False])
async def test_a_commit_whose_process_died_counts_once(version: int | None, landed: bool, tmp_path: Path) -> None:
    inner = MemoryStorage()
    repo = await new_repo(inner, version)
    interrupted = Interrupted(inner)
    dying = await Repository.open_async(interrupted)
    session = await dying.writable_session_async("main")
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    await put(session, 2, 2)
    swap = ("log/", "repo", "refs/")
    if landed:
        interrupted.after = swap
    else:
        interrupted.before = swap
    committing = asyncio.ensure_future(session.commit_async("from the dead"))
    await interrupted.stopped.wait()
    other = await repo.writable_session_async("main")
    if landed:
        with pytest.raises(SessionEndedError) as ended:
            await repo.resume_session_async(id)
        assert ended.value.kind == ErrorKind.SESSION_COMMITTED
        tip = next(iter([info.id async for info in repo.async_ancestry(branch="main")]))
        assert ended.value.snapshot_id == tip
        assert await messages(repo) == ["from the dead"]
    else:
        await put(other, 9, 9)
        await other.commit_async("other")
        resumed = await repo.resume_session_async(id)
        assert await get(resumed) == values(_1=1, _2=2)
        await resumed.commit_async("resumed", rebase_with=ConflictDetector())
        assert await messages(repo) == ["resumed", "other"]
    assert await committed(repo) == values(_1=1, _2=2, **({} if landed else {"_9": 9}))
    committing.cancel()
    with pytest.raises((asyncio.CancelledError, CommitOutcomeUnknown)):
        await committing


@by_layout
async def test_a_commit_that_lands_after_the_session_was_resumed_is_not_repeated(version: int | None) -> None:
    inner = MemoryStorage()
    repo = await new_repo(inner, version)
    interrupted = Interrupted(inner)
    slow = await Repository.open_async(interrupted)
    session = await slow.writable_session_async("main")
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    interrupted.before = ("log/", "repo", "refs/")
    committing = asyncio.ensure_future(session.commit_async("slow"))
    await interrupted.stopped.wait()
    resumed = await repo.resume_session_async(id)
    await put(resumed, 2, 2)
    interrupted.go_on.set()
    snapshot = await committing
    with pytest.raises(SessionEndedError) as ended:
        await resumed.commit_async("again", rebase_with=ConflictDetector())
    assert (ended.value.kind, ended.value.snapshot_id) == (ErrorKind.SESSION_COMMITTED, snapshot)
    with pytest.raises(SessionEndedError):
        await resumed.rebase_async(ConflictDetector())
    assert await messages(repo) == ["slow"]
    assert await committed(repo) == values(_1=1)
    await repo.aclose()
    await slow.aclose()


class LosesAnswers(WrappingStorage):
    """Fails writes of segments: before they happen, or after."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.happens: bool | None = None
        self.readable = True

    async def put(self, key: str, *args: Any, **named: Any) -> PutResult:
        if key.startswith(SESSIONS_PREFIX) and self.happens is False:
            raise StorageError("no answer")
        result = await super().put(key, *args, **named)
        if key.startswith(SESSIONS_PREFIX) and self.happens is True:
            raise StorageError("no answer")
        return result

    async def get(self, key: str, byte_range: Any = None) -> Any:
        if key.startswith(SESSIONS_PREFIX) and not self.readable:
            raise StorageError("no answer")
        return await super().get(key, byte_range)


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("happens", [True, False])
async def test_a_checkpoint_without_an_answer_loses_and_doubles_nothing(
    happens: bool, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "backoff_s", lambda *_: 0.0)
    storage = LosesAnswers(MemoryStorage())
    repo = await new_repo(storage)
    session = await repo.writable_session_async("main")
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    await put(session, 2, 2)
    storage.happens, storage.readable = happens, readable
    if happens and readable:
        await session.checkpoint_async()
    else:
        with pytest.raises(StorageError):
            await session.checkpoint_async()
    storage.happens, storage.readable = None, True
    await put(session, 3, 3)
    await session.checkpoint_async()
    resumed = await repo.resume_session_async(id)
    assert await get(resumed) == values(_1=1, _2=2, _3=3)
    await resumed.commit_async("all")
    await repo.aclose()


async def test_a_chunk_that_cannot_be_written_is_in_no_segment() -> None:
    class NoChunks(WrappingStorage):
        refusing = False

        async def put(self, key: str, *args: Any, **named: Any) -> PutResult:
            if self.refusing and key.startswith(CHUNKS_PREFIX):
                raise StorageError("no chunks today")
            return await super().put(key, *args, **named)

    storage = NoChunks(MemoryStorage())
    repo = await new_repo(storage)
    session = await repo.writable_session_async("main")
    storage.refusing = True
    await put(session, 1, 1)
    with pytest.raises(StorageError):
        await session.checkpoint_async()
    assert await segments(storage) == []
    storage.refusing = False
    id = await session.checkpoint_async()
    assert await get(await repo.resume_session_async(id)) == values(_1=1)
    await repo.aclose()


async def test_a_session_for_moves_stays_one() -> None:
    storage = MemoryStorage()
    repo = await new_repo(storage)
    session = await repo.rearrange_session_async("main")
    await session.move_async("/a", "/b")
    resumed = await repo.resume_session_async(await session.checkpoint_async())
    assert resumed.mode == icechunk.SessionMode.rearrange
    await resumed.commit_async("moved")
    assert (await repo.readonly_session_async("main"))._content.node("/b") is not None
    await repo.aclose()


async def test_sessions_that_cannot_be_persisted_are_refused() -> None:
    storage = MemoryStorage()
    repo = await new_repo(storage)
    with pytest.raises(ReadOnlyError):
        await (await repo.readonly_session_async("main")).checkpoint_async()
    session = await repo.writable_session_async("main")
    with pytest.raises(SessionStateError) as refused:
        await session.fork().checkpoint_async()
    assert refused.value.kind == ErrorKind.NOT_ALLOWED
    with pytest.raises(SessionStateError) as not_persisted:
        await session.collect_forks_async()
    assert not_persisted.value.kind == ErrorKind.NOT_ALLOWED
    for lease in (timedelta(0), timedelta(seconds=-1)):
        with pytest.raises(InvalidInputError):
            await session.checkpoint_async(lease=lease)
    assert await segments(storage) == []
    await repo.aclose()


async def test_a_segment_that_cannot_be_read_names_itself() -> None:
    storage = MemoryStorage()
    repo = await new_repo(storage)
    session = await repo.writable_session_async("main")
    ids = []
    for damage in ("gone", "cut", "foreign"):
        session = await repo.writable_session_async("main")
        await put(session, 1, 1)
        ids.append(await session.checkpoint_async())
        await put(session, 2, 2)
        await session.checkpoint_async()
        key = f"{SESSIONS_PREFIX}{ids[-1]}/00000001"
        data = (await storage.get(key)).data
        await storage.delete([key])
        if damage != "gone":
            await storage.put(key, data[:-9] if damage == "cut" else b"something else")
        with pytest.raises(FormatError):
            await repo.resume_session_async(ids[-1])
    assert {one.id for one in await repo.sessions_async()} == set(ids)
    await repo.aclose()


def test_threads_and_loops_may_checkpoint_one_session_at_the_same_time(tmp_path: Path) -> None:
    storage = icechunk.local_filesystem_storage(str(tmp_path / "repo"))
    repo = asyncio.run(new_repo(storage))
    session = repo.writable_session("main")
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for j in range(i * 4, i * 4 + 4):
                zarr.open_array(session.store, path="a", mode="r+")[j] = j
                session.checkpoint()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert session.id is not None
    resumed = repo.resume_session(session.id)
    assert asyncio.run(get(resumed)) == [*range(20), *[-1] * 20]
    resumed.commit("by many")
    assert not repo.sessions()


def after(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


@pytest.mark.thorough
@by_layout
async def test_a_collection_keeps_the_objects_and_the_base_of_a_leased_session(
    storage: Storage, version: int | None
) -> None:
    repo = await new_repo(storage, version)
    session = await repo.writable_session_async("main")
    await put(session, slice(0, 10), 7)
    id = await session.checkpoint_async()
    other = await repo.writable_session_async("main")
    await put(other, 30, 30)
    await other.commit_async("other")
    await repo.expire_snapshots_async(after(60))
    await repo.garbage_collect_async(after(60))
    elsewhere = await Repository.open_async(storage)
    resumed = await elsewhere.resume_session_async(id)
    assert await get(resumed) == [7] * 10 + [-1] * 30
    await resumed.commit_async("survived", rebase_with=ConflictDetector())
    assert await committed(repo) == [7] * 10 + [-1] * 20 + [30] + [-1] * 9
    await repo.garbage_collect_async(after(60))
    assert await committed(await Repository.open_async(storage)) == [7] * 10 + [-1] * 20 + [30] + [-1] * 9
    await repo.aclose()
    await elsewhere.aclose()


@pytest.mark.thorough
@by_layout
async def test_a_collection_ends_a_session_after_its_lease(storage: Storage, version: int | None) -> None:
    repo = await new_repo(storage, version)
    chunks = len([info async for page in storage.list_pages(CHUNKS_PREFIX) for info in page])
    session = await repo.writable_session_async("main")
    await put(session, slice(0, 10), 7)
    id = await session.checkpoint_async(lease=timedelta(microseconds=1))
    for _ in range(3):  # a store's clock may be seconds behind its answers' dates
        preview = await repo.garbage_collect_async(after(60), dry_run=True)
        if preview.chunks_deleted:
            break
    assert len(await segments(storage)) == 1
    summary = await repo.garbage_collect_async(after(60))
    # In the log layout they share a pack.
    assert preview.chunks_deleted == summary.chunks_deleted == (1 if version is None else 10)
    assert len([info async for page in storage.list_pages(CHUNKS_PREFIX) for info in page]) == chunks
    assert len(await segments(storage)) == 1
    assert await repo.sessions_async() == []
    for attempt in (
        session.checkpoint_async,
        lambda: session.commit_async("late"),
        lambda: repo.resume_session_async(id),
        lambda: repo.join_session_async(id),
    ):
        with pytest.raises(SessionEndedError) as ended:
            await attempt()
        assert ended.value.kind == ErrorKind.SESSION_EXPIRED
    assert await committed(repo) == values()
    await repo.aclose()


async def test_the_first_checkpoint_after_a_collection_of_its_uploads_is_refused() -> None:
    repo = await new_repo(MemoryStorage())
    session = await repo.writable_session_async("main")
    await put(session, 1, 1)
    await repo.garbage_collect_async(after(60))
    with pytest.raises(SessionEndedError) as ended:
        await session.checkpoint_async()
    assert ended.value.kind == ErrorKind.SESSION_EXPIRED
    await repo.garbage_collect_async(after(60))
    assert await repo.sessions_async() == []
    await repo.aclose()


@by_layout
@pytest.mark.parametrize("how", ["amended", "reset"])
async def test_a_base_that_no_ref_reaches_any_more_stays_for_its_sessions(version: int | None, how: str) -> None:
    storage = MemoryStorage()
    repo = await new_repo(storage, version)
    first = [info.id async for info in repo.async_ancestry(branch="main")][-1]
    session = await repo.writable_session_async("main")
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    amending = await repo.writable_session_async("main")
    await put(amending, 2, 2)
    if how == "amended" and version != 1:
        await amending.amend_async("amended")
    else:
        await repo.reset_branch_async("main", first)
    await repo.garbage_collect_async(after(60))
    elsewhere = await Repository.open_async(storage)
    assert await get(await elsewhere.resume_session_async(id)) == values(_1=1)
    await repo.aclose()
    await elsewhere.aclose()


@by_layout
async def test_a_collection_leaves_the_id_of_a_snapshot_that_a_session_may_have_committed(version: int | None) -> None:
    inner = MemoryStorage()
    config = icechunk.RepositoryConfig(
        inline_chunk_threshold_bytes=0, engine=EngineConfig(pack_threshold_bytes=1 << 20, repack_below_percent=100)
    )
    repo = await Repository.create_async(inner, config, spec_version=version)
    for value in range(3):
        session = await repo.writable_session_async("main")
        if value == 0:
            await zarr.api.asynchronous.create_array(
                store=session.store, name="a", shape=(N,), chunks=(1,), dtype="i4", fill_value=-1
            )
        await put(session, slice(value, N), value)
        await session.commit_async(str(value))
    # So that the pack of the first commit is mostly dead.
    await repo.expire_snapshots_async(after(60))
    interrupted = Interrupted(inner)
    dying = await Repository.open_async(interrupted, config)
    session = await dying.writable_session_async("main")
    await put(session, 1, 11)
    id = await session.checkpoint_async()
    interrupted.after = ("log/", "repo", "refs/")
    committing = asyncio.ensure_future(session.commit_async("from the dead"))
    await interrupted.stopped.wait()
    repo = await Repository.open_async(inner, config)
    tip = await repo.lookup_branch_async("main")
    await repo.garbage_collect_async(after(60))
    with pytest.raises(SessionEndedError) as ended:
        await repo.resume_session_async(id)
    assert (ended.value.kind, ended.value.snapshot_id) == (ErrorKind.SESSION_COMMITTED, tip)
    summary = await repo.garbage_collect_async(after(60))
    assert summary.snapshots_rewritten > 0
    committing.cancel()
    with pytest.raises((asyncio.CancelledError, CommitOutcomeUnknown)):
        await committing


async def test_a_session_whose_commit_is_cancelled_after_it_landed_is_read_only() -> None:
    inner = MemoryStorage()
    repo = await new_repo(inner)
    interrupted = Interrupted(inner)
    slow = await Repository.open_async(interrupted)
    session = await slow.writable_session_async("main")
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    interrupted.before = (f"{SESSIONS_PREFIX}{id}/00000003",)
    committing = asyncio.ensure_future(session.commit_async("landed"))
    await interrupted.stopped.wait()
    committing.cancel()
    await asyncio.sleep(0)
    interrupted.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await committing
    assert (session.read_only, session.unsettled_commit) == (True, None)
    assert session.snapshot_id == await repo.lookup_branch_async("main")
    with pytest.raises(SessionEndedError) as ended:
        await repo.resume_session_async(id)
    assert (ended.value.kind, ended.value.snapshot_id) == (ErrorKind.SESSION_COMMITTED, session.snapshot_id)
    assert len(await segments(inner)) == 2
    await repo.aclose()
    await slow.aclose()


class Unsteady(WrappingStorage):
    """Every request takes a random number of turns of the loop, before it happens and after."""

    def __init__(self, inner: Storage, chance: random.Random) -> None:
        super().__init__(inner)
        self.chance = chance

    async def pause(self) -> None:
        for _ in range(self.chance.choice((0, 1, 3, 20, 200))):
            await asyncio.sleep(0)

    async def put(self, key: str, *args: Any, **named: Any) -> PutResult:
        await self.pause()
        result = await super().put(key, *args, **named)
        await self.pause()
        return result

    async def get(self, key: str, byte_range: Any = None) -> Any:
        await self.pause()
        result = await super().get(key, byte_range)
        await self.pause()
        return result


@by_layout
@pytest.mark.parametrize("seed", range(12))
async def test_however_holders_interleave_and_die_the_session_is_committed_once(version: int | None, seed: int) -> None:
    inner = MemoryStorage()
    chance = random.Random(seed)
    repo = await new_repo(inner, version)
    session = await repo.writable_session_async("main")
    await put(session, 0, 1)
    id = await session.checkpoint_async()
    landed: list[str] = []

    async def hold(number: int) -> None:
        own = await Repository.open_async(Unsteady(inner, chance))
        for _ in range(6):
            try:
                held = await own.resume_session_async(id)
                await put(held, number, number)
                if chance.random() < 0.5:
                    await held.checkpoint_async()
                committing = asyncio.ensure_future(held.commit_async(f"held {number}", rebase_with=ConflictDetector()))
                await asyncio.wait([committing], timeout=0.002 if chance.random() < 0.5 else None)
                if committing.done():
                    landed.append(await committing)
                    return
                # This holder dies; what it has sent may land nevertheless.
                committing.cancel()
                await asyncio.gather(committing, return_exceptions=True)
            except SessionEndedError as error:
                if error.kind == ErrorKind.SESSION_COMMITTED:
                    return
                if error.kind != ErrorKind.SESSION_FENCED:
                    raise

    async def commit_others() -> None:
        own = await Repository.open_async(Unsteady(inner, chance))
        for i in range(3):
            other = await own.writable_session_async("main")
            await put(other, 30 + i, i)
            await other.commit_async(f"other {i}", rebase_with=ConflictDetector())

    await asyncio.gather(*(hold(number) for number in range(1, 5)), commit_others())
    with suppress(SessionEndedError):
        await (await repo.resume_session_async(id)).commit_async("held at last", rebase_with=ConflictDetector())
    found = await messages(await Repository.open_async(inner))
    assert len([message for message in found if message.startswith("held")]) == 1
    assert sorted(message for message in found if message.startswith("other")) == ["other 0", "other 1", "other 2"]
    assert len(landed) <= 1
    assert (await committed(repo))[0] == 1
    with pytest.raises(SessionEndedError) as ended:
        await repo.resume_session_async(id)
    assert ended.value.kind == ErrorKind.SESSION_COMMITTED


@pytest.mark.parametrize("ends", ["committed", "abandoned"])
async def test_a_process_that_lost_a_session_cannot_commit_it_after_its_end(ends: str) -> None:
    storage = MemoryStorage()
    repo = await new_repo(storage)
    stale = await repo.writable_session_async("main")
    await put(stale, 1, 1)
    id = await stale.checkpoint_async()
    resumed = await (await Repository.open_async(storage)).resume_session_async(id)
    if ends == "committed":
        await resumed.commit_async("once")
    else:
        await resumed.abandon_async()
    before = await messages(repo)
    solver = icechunk.BasicConflictSolver(on_chunk_conflict=icechunk.VersionSelection.UseOurs)
    with pytest.raises(SessionEndedError):
        await stale.rebase_async(solver)
    with pytest.raises(SessionEndedError):
        await stale.commit_async("again", rebase_with=solver)
    assert await messages(repo) == before
    await repo.aclose()


async def test_a_session_that_ends_while_it_is_resumed_is_not_resumed() -> None:
    class EndsMeanwhile(WrappingStorage):
        end: Any = None

        async def put(self, key: str, *args: Any, **named: Any) -> PutResult:
            if key.startswith(SESSIONS_PREFIX) and self.end is not None:
                end, self.end = self.end, None
                await end()
            return await super().put(key, *args, **named)

    inner = MemoryStorage()
    repo = await new_repo(inner)
    session = await repo.writable_session_async("main")
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    meanwhile = EndsMeanwhile(inner)
    late = await Repository.open_async(meanwhile)
    meanwhile.end = lambda: session.commit_async("once")
    with pytest.raises(SessionEndedError) as ended:
        await late.resume_session_async(id)
    assert ended.value.kind == ErrorKind.SESSION_COMMITTED
    assert await messages(repo) == ["once"]
    await repo.aclose()
    await late.aclose()


@pytest.mark.parametrize("going_on", ["resume_session_async", "join_session_async"])
async def test_a_session_that_ends_while_it_is_read_is_told_to_have_ended(going_on: str) -> None:
    class Rewritten(WrappingStorage):
        """The second segment is read last, after the session has ended and another process has taken the free slot."""

        meanwhile: Any = None
        others = 2
        others_read = asyncio.Event()

        async def get(self, key: str, byte_range: Any = None) -> Any:
            if self.meanwhile is None or not key.startswith(SESSIONS_PREFIX):
                return await super().get(key, byte_range)
            if not key.endswith("2"):
                result = await super().get(key, byte_range)
                self.others -= 1
                if not self.others:
                    self.others_read.set()
                return result
            await self.others_read.wait()
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()
            return await super().get(key, byte_range)

    inner = MemoryStorage()
    repo = await new_repo(inner)
    session = await repo.writable_session_async("main")
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    stalled = Interrupted(inner)
    stalled.before = (f"{SESSIONS_PREFIX}{id}/00000002",)
    stalling = asyncio.ensure_future((await Repository.open_async(stalled)).resume_session_async(id))
    await stalled.stopped.wait()
    for number in (2, 3):
        await put(session, number, number)
        await session.checkpoint_async()

    async def end() -> None:
        await session.commit_async("once")
        stalled.go_on.set()
        with pytest.raises(SessionEndedError):
            await stalling

    rewritten = Rewritten(inner)
    reader = await Repository.open_async(rewritten)
    rewritten.meanwhile = end
    with pytest.raises(SessionEndedError) as ended:
        await getattr(reader, going_on)(id)
    assert (ended.value.kind, ended.value.snapshot_id) == (
        ErrorKind.SESSION_COMMITTED,
        await repo.lookup_branch_async("main"),
    )
    await repo.aclose()
    await reader.aclose()
