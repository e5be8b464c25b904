"""Workers without handles: forks that join a session by its id, and hand over their changes through the repository."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import zarr

import icechunk
from icechunk import ConflictDetector, ForkSession, MergeFailedError, RebaseFailedError, Repository
from icechunk.errors import ErrorKind, InvalidInputError, SessionEndedError, SessionNotFoundError
from icechunk.format.values import Snapshot
from icechunk.log.session.events import Event
from icechunk.log.session.log import SessionLog
from icechunk.storage.port import Storage
from tests.log.session.builders import native
from tests.maintenance.helpers import by_layout
from tests.raising import raises
from tests.session.test_session_checkpoint import N, committed, get, new_repo, put, segments, values

WORKER = """
import sys
import icechunk, zarr
location, id, begin, end = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
fork = icechunk.Repository.open(icechunk.local_filesystem_storage(location)).join_session(id)
array = zarr.open_array(fork.store, path="new", mode="r+")
for i in range(begin, end):
    array[i] = i
fork.checkpoint()
"""


@by_layout
async def test_changes_that_forks_hand_over_are_collected_once(storage: Storage, version: int | None) -> None:
    repo = await new_repo(storage, version)
    session = await repo.writable_session_async("main")
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    assert await session.collect_forks_async() == 0
    elsewhere = await Repository.open_async(storage)
    forks = [await elsewhere.join_session_async(id) for _ in range(3)]
    for i, fork in enumerate(forks):
        assert isinstance(fork, ForkSession)
        assert (fork.id, fork.branch, fork.has_uncommitted_changes) == (id, None, False)
        assert (await get(fork))[1] == 1
        await put(fork, 10 + i, i)
    await put(session, 2, 2)
    await forks[0].checkpoint_async()
    await forks[1].checkpoint_async()
    assert await session.collect_forks_async() == 2
    await forks[1].checkpoint_async()
    await put(forks[0], 20, 20)
    await forks[0].checkpoint_async()
    await forks[2].checkpoint_async()
    assert await session.collect_forks_async() == 2
    assert await session.collect_forks_async() == 0
    assert await get(session) == values(_1=1, _2=2, _10=0, _11=1, _12=2, _20=20)
    await session.commit_async("by many")
    assert await committed(repo) == values(_1=1, _2=2, _10=0, _11=1, _12=2, _20=20)
    assert len(await segments(storage)) == 1
    await put(forks[2], 30, 30)
    with pytest.raises(SessionEndedError) as ended:
        await forks[2].checkpoint_async()
    assert ended.value.kind == ErrorKind.SESSION_COMMITTED
    with pytest.raises(SessionNotFoundError):
        await repo.join_session_async(session.snapshot_id)
    await repo.aclose()
    await elsewhere.aclose()


@pytest.mark.parametrize("is_collected", [True, False])
async def test_a_commit_without_what_forks_have_handed_over_is_warned_of(
    storage: Storage, caplog: pytest.LogCaptureFixture, is_collected: bool
) -> None:
    repo = await new_repo(storage)
    session = await repo.writable_session_async("main")
    fork = await repo.join_session_async(await session.checkpoint_async())
    await put(fork, 10, 1)
    await fork.checkpoint_async()
    if is_collected:
        await session.collect_forks_async()
    await session.commit_async("done", allow_empty=True)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (not is_collected)
    await repo.aclose()


async def test_a_process_that_resumed_the_session_collects_and_passes_over_merged_forks(
    storage: Storage,
) -> None:
    repo = await new_repo(storage)
    session = await repo.writable_session_async("main")
    id = await session.checkpoint_async()
    early, late = await repo.join_session_async(id), await repo.join_session_async(id)
    await put(early, 1, 1)
    await early.checkpoint_async()
    await session.collect_forks_async()
    await put(session, 2, 2)
    await session.checkpoint_async()
    await put(late, 3, 3)
    await late.checkpoint_async()
    await put(early, 4, 4)
    await early.checkpoint_async()
    resumed = await (await Repository.open_async(storage)).resume_session_async(id)
    assert await resumed.collect_forks_async() == 2
    assert await get(resumed) == values(_1=1, _2=2, _3=3, _4=4)
    await resumed.commit_async("all")
    assert await committed(repo) == values(_1=1, _2=2, _3=3, _4=4)
    await repo.aclose()


async def test_a_session_that_was_rebased_collects_forks_that_joined_before(storage: Storage) -> None:
    repo = await new_repo(storage)
    session = await repo.writable_session_async("main")
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    fork, conflicting = await repo.join_session_async(id), await repo.join_session_async(id)
    await put(fork, 2, 2)
    await fork.checkpoint_async()
    await put(conflicting, 9, 99)
    other = await repo.writable_session_async("main")
    await put(other, 9, 9)
    await other.commit_async("other")
    await session.rebase_async(ConflictDetector())
    await session.checkpoint_async()
    resumed = await (await Repository.open_async(storage)).resume_session_async(id)
    assert await resumed.collect_forks_async() == 1
    assert await get(resumed) == values(_1=1, _2=2, _9=9)
    await conflicting.checkpoint_async()
    with pytest.raises(RebaseFailedError):
        await resumed.collect_forks_async()
    assert await get(resumed) == values(_1=1, _2=2, _9=9)
    await repo.aclose()


@by_layout
@pytest.mark.parametrize("goes_on", ["here", "resumed"])
async def test_nodes_of_a_fork_that_was_merged_before_a_rebase_are_no_conflict(
    storage: Storage, version: int | None, goes_on: str
) -> None:
    repo = await new_repo(storage, version)
    session = await repo.writable_session_async("main")
    id = await session.checkpoint_async()
    fork, late = await repo.join_session_async(id), await repo.join_session_async(id)
    array = await zarr.api.asynchronous.create_array(store=fork.store, name="w", shape=(2,), chunks=(1,), dtype="i4")
    await array.setitem(0, 1)
    await fork.checkpoint_async()
    assert await session.collect_forks_async() == 1
    other = await repo.writable_session_async("main")
    await put(other, 9, 9)
    await other.commit_async("other")
    await session.rebase_async(ConflictDetector())
    await session.checkpoint_async()
    if goes_on == "here":
        await array.setitem(1, 2)
        await fork.checkpoint_async()
    else:
        session = await (await Repository.open_async(storage)).resume_session_async(id)
    await put(late, 3, 3)
    await late.checkpoint_async()
    assert await session.collect_forks_async() == 2
    await session.commit_async("all")
    assert await committed(repo) == values(_3=3, _9=9)
    merged = await zarr.api.asynchronous.open_array(store=session.store, path="w", mode="r")
    assert np.asarray(await merged.getitem(...)).tolist() == [1, 2 if goes_on == "here" else 0]
    await repo.aclose()


@by_layout
async def test_the_base_of_forks_that_joined_before_a_rebase_is_kept_for_them(
    storage: Storage, version: int | None
) -> None:
    repo = await new_repo(storage, version)
    session = await repo.writable_session_async("main")
    await put(session, 1, 1)
    id = await session.checkpoint_async()
    fork = await repo.join_session_async(id)
    await put(fork, 2, 2)
    await fork.checkpoint_async()
    for i in (8, 9):
        other = await repo.writable_session_async("main")
        await put(other, i, i)
        await other.commit_async("other")
        await session.rebase_async(ConflictDetector())
        await session.checkpoint_async()
    late = datetime.now(UTC) + timedelta(minutes=1)
    await repo.expire_snapshots_async(late)
    await repo.garbage_collect_async(late)
    resumed = await (await Repository.open_async(storage)).resume_session_async(id)
    assert await resumed.collect_forks_async() == 1
    await resumed.commit_async("all")
    assert await committed(repo) == values(_1=1, _2=2, _8=8, _9=9)
    await repo.aclose()


async def test_what_a_session_wrote_is_folded_once_for_all_forks_that_joined_then(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = await new_repo(storage, None)
    session = await repo.writable_session_async("main")
    n_inherited = 30
    for value in range(n_inherited):
        await put(session, 1, value)
        id = await session.checkpoint_async()

    async def folds_of(n_forks: int) -> int:
        forks = [await repo.join_session_async(id) for _ in range(n_forks)]
        for fork in forks:
            zarr.open_group(fork.store, mode="a").attrs["fork"] = 1
            await fork.checkpoint_async()
        count = 0
        replay, rebased = SessionLog.replay, SessionLog.rebased

        def replay_counted(log: SessionLog, events: Iterable[Event]) -> None:
            nonlocal count
            count += len(found := list(events))
            replay(log, found)

        def rebased_counted(log: SessionLog, base: Snapshot, events: Iterable[Event] | None = None) -> SessionLog:
            nonlocal count
            count += len(found := list(log.events if events is None else events))
            return rebased(log, base, found)

        with monkeypatch.context() as patch:
            patch.setattr(SessionLog, "replay", replay_counted)
            patch.setattr(SessionLog, "rebased", rebased_counted)
            assert await session.collect_forks_async(on_conflict="ours") == n_forks
        return count

    few, many = await folds_of(2), await folds_of(12)
    assert many - few < 10 * n_inherited / 2


async def test_conflicts_between_forks_are_those_of_a_merge(storage: Storage) -> None:
    repo = await new_repo(storage)
    session = await repo.writable_session_async("main")
    id = await session.checkpoint_async()
    for value in (5, 6):
        fork = await repo.join_session_async(id)
        await put(fork, 1, value)
        await put(fork, 2, 2)
        await put(fork, value, value)
        await fork.checkpoint_async()
    with pytest.raises(MergeFailedError) as failed:
        await session.collect_forks_async()
    assert [conflict.path for conflict in failed.value.conflicts] == ["/a"]
    assert not session.has_uncommitted_changes
    assert await session.collect_forks_async(on_conflict="theirs") == 2
    assert (await get(session))[2:7] == [2, -1, -1, 5, 6]
    assert (await get(session))[1] in (5, 6)
    with pytest.raises(icechunk.InvalidInputError):
        await session.collect_forks_async(on_conflict="mine")  # type: ignore[arg-type]
    await repo.aclose()


async def test_a_fork_that_discards_its_changes_hands_over_nothing(storage: Storage) -> None:
    repo = await new_repo(storage)
    session = await repo.writable_session_async("main")
    id = await session.checkpoint_async()
    fork = await repo.join_session_async(id)
    await put(fork, 1, 1)
    await fork.checkpoint_async()
    fork.discard_changes()
    await put(fork, 2, 2)
    await fork.checkpoint_async()
    lost = await repo.join_session_async(id)
    await put(lost, 3, 3)
    await lost.checkpoint_async()
    await lost.abandon_async()
    assert await session.collect_forks_async() == 1
    assert await get(session) == values(_2=2)
    await repo.aclose()


def test_a_joined_fork_travels_and_every_copy_hands_over_for_itself(tmp_path: Path) -> None:
    repo = Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repo")))
    session = repo.writable_session("main")
    count = 20_000
    zarr.create_array(session.store, name="a", shape=(count,), chunks=(1,), dtype="i4", fill_value=-1)
    id = session.checkpoint()
    small = repo.join_session(id)
    session._content.set_references("/a", native(np.arange(count).reshape(-1, 1)))
    session.checkpoint()
    large = repo.join_session(id)
    for i, fork in enumerate([small, large]):
        data = pickle.dumps(fork)
        assert len(data) < 10_000
        for j in range(2):
            copy = pickle.loads(data)
            zarr.open_array(copy.store, path="a", mode="r+")[2 * i + j] = 2 * i + j
            copy.checkpoint()
    assert session.collect_forks(on_conflict="theirs") == 4
    assert [int(v) for v in np.asarray(zarr.open_array(session.store, path="a", mode="r")[:4])] == [0, 1, 2, 3]


@pytest.mark.thorough
def test_processes_write_one_array_given_a_location_and_a_session_id(tmp_path: Path) -> None:
    location = str(tmp_path / "repo")
    repo = Repository.create(icechunk.local_filesystem_storage(location))
    session = repo.writable_session("main")
    zarr.create_array(session.store, name="new", shape=(N,), chunks=(1,), dtype="i4", fill_value=-1)
    id = session.checkpoint()
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, location, id, str(begin), str(begin + 10)])
        for begin in range(0, N, 10)
    ]
    assert [worker.wait() for worker in workers] == [0] * 4
    assert session.collect_forks() == 4
    session.commit("by processes")
    found = zarr.open_array(repo.readonly_session("main").store, path="new", mode="r")[:]
    np.testing.assert_array_equal(np.asarray(found), np.arange(N))


def test_texts_that_are_no_ids_of_sessions_are_refused() -> None:
    repo = icechunk.Repository.create(icechunk.in_memory_storage())
    for id in ("nonsense", "", 5):
        for call in (repo.resume_session, repo.join_session):
            with raises(InvalidInputError, "invalid-setting"):
                call(id)  # type: ignore[arg-type]  # that is the point
