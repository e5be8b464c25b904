"""Rebasing real sessions: no change is lost, nothing is uploaded twice, and conflicts are reported."""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import zarr

import icechunk
from icechunk import (
    BasicConflictSolver,
    ConflictDetector,
    ConflictError,
    RebaseFailedError,
    Repository,
    Session,
    VersionSelection,
)
from icechunk.errors import ErrorKind, IcechunkError, RefNotFoundError, SessionStateError
from icechunk.format.ids import object_id_from_text
from icechunk.format.keys import transaction_key
from icechunk.format.transaction import decode_transaction_log
from icechunk.log.repository.port import SwapToken
from icechunk.log.session.plan.reuse import Earlier
from icechunk.session.content import SessionContent
from icechunk.session.rebase import advance
from icechunk.storage.memory import MemoryStorage
from icechunk.testing.recording import RecordingStorage
from tests.raising import raises

N = 64
DETECT = ConflictDetector()
OURS = BasicConflictSolver()


@pytest.fixture
def storage() -> RecordingStorage:
    return RecordingStorage(MemoryStorage())


@pytest.fixture
def repo(storage: RecordingStorage) -> Repository:
    # Files that are embedded in the log could not be counted, nor lost.
    config = icechunk.RepositoryConfig(
        inline_chunk_threshold_bytes=0, engine=icechunk.EngineConfig(small_commit_bytes=0)
    )
    repo = Repository.create(storage, config)
    session = repo.writable_session("main")
    for name in ("a", "b"):
        array = zarr.create_array(session.store, name=name, shape=(N,), chunks=(1,), dtype="i4", fill_value=-1)
        array[:] = np.arange(N)
    session.commit("base")
    return repo


def put(session: Session, name: str, index: int, value: int) -> None:
    zarr.open_array(session.store, path=name)[index] = value


def commit(repo: Repository, name: str, index: int, value: int, message: str = "theirs") -> str:
    session = repo.writable_session("main")
    put(session, name, index, value)
    return session.commit(message)


def values(repo: Repository, name: str = "a") -> list[int]:
    array = zarr.open_array(repo.readonly_session("main").store, path=name, mode="r")
    return [int(value) for value in np.asarray(array[:])]


def messages(repo: Repository) -> list[str]:
    return [info.message for info in repo.ancestry(branch="main")]


def test_a_rebased_session_commits_on_top_of_the_winner_and_both_changes_are_there(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 1, 101)
    tip = commit(repo, "a", 2, 102)
    with pytest.raises(ConflictError):
        session.commit("ours")
    session.rebase(DETECT)
    assert session.snapshot_id == tip
    assert session.has_uncommitted_changes
    session.commit("ours")
    assert values(repo)[:4] == [0, 101, 102, 3]
    assert messages(repo)[:3] == ["ours", "theirs", "base"]


def test_rebasing_where_nothing_landed_changes_nothing(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 1, 101)
    before = session.snapshot_id
    session.rebase(DETECT)
    assert session.snapshot_id == before
    session.commit("ours")
    assert values(repo)[1] == 101


def test_a_failed_rebase_stops_before_the_first_commit_that_conflicts_and_can_be_continued(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 0, 100)
    first = commit(repo, "b", 0, 7)
    second = commit(repo, "a", 0, 8)
    third = commit(repo, "a", 0, 9)
    with pytest.raises(RebaseFailedError) as failed:
        session.rebase(DETECT)
    assert failed.value.snapshot == second
    assert [(str(c.conflict_type), c.path, c.conflicted_chunks) for c in failed.value.conflicts] == [
        ("Chunk double update", "/a", [[0]])
    ]
    assert session.snapshot_id == first
    assert not session.read_only
    session.rebase(OURS)
    assert session.snapshot_id == third
    session.commit("ours")
    assert values(repo)[0] == 100
    assert values(repo, "b")[0] == 7


def test_many_winners_without_conflict_cost_one_snapshot(repo: Repository, storage: RecordingStorage) -> None:
    session = repo.writable_session("main")
    put(session, "a", 0, 100)
    for i in range(1, 6):
        commit(repo, "a", i, 100 + i)
    storage.clear()
    session.rebase(DETECT)
    assert storage.count("get", "snapshots/") <= 1
    session.commit("ours")
    assert values(repo)[:6] == [100, 101, 102, 103, 104, 105]


def test_commit_rebases_by_itself_when_it_has_a_solver(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 1, 101)
    commit(repo, "a", 2, 102)
    session.commit("ours", rebase_with=DETECT)
    assert session.read_only
    assert values(repo)[1:3] == [101, 102]


@pytest.mark.parametrize(("choice", "expected"), [("UseOurs", 101), ("UseTheirs", 7)])
def test_the_solver_decides_which_chunk_stays(repo: Repository, choice: str, expected: int) -> None:
    session = repo.writable_session("main")
    put(session, "a", 1, 101)
    put(session, "a", 2, 102)
    commit(repo, "a", 1, 7)
    session.commit("ours", rebase_with=BasicConflictSolver(on_chunk_conflict=getattr(VersionSelection, choice)))
    assert values(repo)[1:3] == [expected, 102]


def test_a_commit_whose_rebase_fails_leaves_a_session_that_can_be_changed_and_committed(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 1, 101)
    commit(repo, "a", 1, 7)
    with pytest.raises(RebaseFailedError) as failed:
        session.commit("ours", rebase_with=DETECT)
    assert failed.value.kind == ErrorKind.REBASE_FAILED
    assert not session.read_only
    assert session.has_uncommitted_changes
    session.commit("ours", rebase_with=OURS)
    assert values(repo)[1] == 101


def test_rebase_tries_bound_the_tries(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 1, 101)
    commit(repo, "a", 2, 7)
    with pytest.raises(ConflictError):
        session.commit("ours", rebase_with=OURS, rebase_tries=0)
    session.commit("ours", rebase_with=OURS, rebase_tries=1)
    session = repo.writable_session("main")
    with pytest.raises(IcechunkError):
        session.commit("ours", rebase_tries=-1)
    with pytest.raises(TypeError):
        session.commit("ours", rebase_with=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        session.rebase(3)  # type: ignore[arg-type]


def test_a_transaction_rebases(repo: Repository) -> None:
    with repo.transaction("main", message="ours", rebase_with=DETECT) as store:
        commit(repo, "a", 1, 7)
        zarr.open_array(store, path="a")[2] = 8
    assert values(repo)[1:3] == [7, 8]
    assert messages(repo)[0] == "ours"


async def test_writers_at_once_all_land_with_rebase_and_nothing_is_lost(repo: Repository) -> None:
    async def writer(i: int) -> None:
        session = await repo.writable_session_async("main")
        await session.store.set(f"a/c/{i}", zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(b"\1\0\0\0"))
        await session.commit_async(f"writer {i}", rebase_with=DETECT)

    before = zarr.open_array((await repo.readonly_session_async("main")).store, path="a", mode="r")
    assert before.compressors is not None
    async with asyncio.TaskGroup() as group:
        for i in range(8):
            group.create_task(writer(i))
    history = [info.message async for info in repo.async_ancestry(branch="main")]
    assert sorted(history[:8]) == [f"writer {i}" for i in range(8)]
    reader = await repo.readonly_session_async("main")
    for i in range(8):
        assert await reader._content.get_chunk("/a", (i,), None) == b"\1\0\0\0"


async def commit_six(storage: RecordingStorage, spec_version: int | None) -> None:
    """Six sessions of one base that commit at the same time."""
    repo = await Repository.create_async(storage, spec_version=spec_version)
    root = await repo.writable_session_async("main")
    await zarr.api.asynchronous.create_group(store=root.store)
    await root.commit_async("root")
    sessions = [await repo.writable_session_async("main") for _ in range(6)]
    for number, session in enumerate(sessions):
        await zarr.api.asynchronous.create_group(store=session.store, path=f"group-{number}")
    storage.clear()
    await asyncio.gather(*(one.commit_async("m", rebase_with=DETECT) for one in sessions))
    assert len([info async for info in repo.async_ancestry(branch="main")]) == 8


async def test_commits_of_one_process_to_one_branch_share_an_entry_and_none_loses(storage: RecordingStorage) -> None:
    await commit_six(storage, None)
    slots = {request.key for request in storage.requests if request.verb == "put" and request.key.startswith("log/")}
    # The first may have left before the others were there.
    assert len(slots) <= 2


async def test_in_format_2_they_share_replacements_of_repo_and_each_is_encoded_once(storage: RecordingStorage) -> None:
    await commit_six(storage, 2)
    # Each puts its files before the next one is made, so some replacements leave before all are there.
    assert storage.count("put", "repo") <= 4
    assert storage.count("put", "snapshots/") == 6


async def test_the_changes_that_a_commit_leaves_in_memory_are_those_in_its_file(
    repo: Repository, storage: RecordingStorage
) -> None:
    session = await repo.writable_session_async("main")
    store, prototype = session.store, zarr.core.buffer.default_buffer_prototype()
    await zarr.api.asynchronous.create_group(store=store, path="new")
    for i in (9, 3, 70, 4):
        with contextlib.suppress(icechunk.InvalidInputError):
            await store.set(f"a/c/{i}", prototype.buffer.from_bytes(bytes(4)))
    await store.delete("a/c/5")
    document = await store.get("b/zarr.json", prototype)
    assert document is not None
    await store.set("b/zarr.json", prototype.buffer.from_bytes(document.to_bytes() + b" "))
    id = object_id_from_text(await session.commit_async("changes"))
    assets = repo._core.assets  # private: nothing public shows where a transaction log comes from
    storage.clear()
    kept = await assets.transaction_log(id)
    assert not storage.requests
    read = decode_transaction_log((await storage.get(transaction_key(id))).data, expected_id=id)
    assert {i: coords.tolist() for i, coords in kept.updated_chunks.items()} == {
        i: coords.tolist() for i, coords in read.updated_chunks.items()
    }
    assert replace(kept, updated_chunks={}) == replace(read, updated_chunks={})


@pytest.mark.parametrize("kept_refs", [0, 100], ids=["digests", "references"])
def test_a_commit_that_lost_uploads_neither_chunks_nor_equal_manifests_again(
    repo: Repository, storage: RecordingStorage, kept_refs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icechunk.session.commit.Earlier", lambda: Earlier(kept_refs))
    session = repo.writable_session("main")
    put(session, "a", 1, 101)
    lost: list[str] = []

    async def rebase_and_count(content: SessionContent, branch: str, solver: icechunk.ConflictSolver) -> None:
        storage.clear()
        await advance(content, branch, solver)

    monkeypatch.setattr("icechunk.session.commit.advance", rebase_and_count)
    # The branch moves between the look at it and the swap.
    note = session._content.note_sent

    def overtaken(token: SwapToken | None) -> None:
        note(token)
        if not lost:
            lost.append("once")
            commit(Repository.open(storage), "b", 3, 33)

    session._content.note_sent = overtaken  # type: ignore[method-assign]
    asyncio.run(session.commit_async("ours", rebase_with=DETECT))
    assert storage.count("put", "chunks/") == storage.count("put", "manifests/") == 0
    assert storage.count("put", "snapshots/") == 1
    assert values(repo)[1] == 101
    assert values(repo, "b")[3] == 33


def test_a_rebase_needs_a_session_that_goes_to_a_branch(repo: Repository) -> None:
    with pytest.raises(SessionStateError) as refused:
        repo.readonly_session("main").rebase(DETECT)
    assert refused.value.kind == ErrorKind.COMMIT_NOT_ALLOWED


def test_a_reset_branch_is_no_base_to_rebase_on(repo: Repository) -> None:
    first = list(repo.ancestry(branch="main"))[-1].id
    session = repo.writable_session("main")
    put(session, "a", 1, 101)
    repo.reset_branch("main", first)
    with raises(ConflictError, "commit-conflict", "'main'") as caught:
        session.rebase(DETECT)
    assert (caught.value.expected_parent, caught.value.actual_parent) == (session.snapshot_id, first)
    assert not session.read_only


def test_a_deleted_branch_is_named(repo: Repository) -> None:
    repo.create_branch("dev", repo.lookup_branch("main"))
    session = repo.writable_session("dev")
    put(session, "a", 1, 101)
    repo.delete_branch("dev")
    with pytest.raises(RefNotFoundError):
        session.rebase(DETECT)


def test_a_lost_transaction_log_refuses_the_rebase(repo: Repository, storage: RecordingStorage) -> None:
    session = repo.writable_session("main")
    put(session, "a", 1, 101)
    # Elsewhere: a process keeps the small logs that it wrote itself.
    tip = commit(Repository.open(storage), "a", 2, 7)
    asyncio.run(storage.delete([transaction_key(object_id_from_text(tip))]))
    with pytest.raises(SessionStateError) as refused:
        session.rebase(DETECT)
    assert refused.value.kind == ErrorKind.REBASE_TX_LOG_PRUNED


def test_a_rebase_over_expired_commits_looks_at_their_changes(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 0, 100)
    other = repo.writable_session("main")
    put(other, "b", 1, 100)
    commit(repo, "a", 0, 1)
    commit(repo, "b", 0, 2)
    assert len(repo.expire_snapshots(datetime.now(UTC))) == 2
    with pytest.raises(RebaseFailedError) as caught:
        session.commit("ours", rebase_with=DETECT)
    assert [conflict.path for conflict in caught.value.conflicts] == ["/a"]
    other.commit("ours", rebase_with=DETECT)
    assert (values(repo)[0], values(repo, "b")[:2]) == (1, [2, 100])


def test_savepoints_are_invalid_after_a_rebase(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 1, 101)
    savepoint = session.savepoint()
    commit(repo, "a", 2, 7)
    session.rebase(DETECT)
    session.savepoint()
    with pytest.raises(SessionStateError):
        session.rollback(savepoint)


def test_the_page_about_commits_that_meet_others_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "committing.md").read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    for source in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(source, "docs/committing.md", "exec"), names)
    assert capsys.readouterr().out.splitlines() == [
        "rebased [1 1 2 2]",
        "conflict [('/a', [[0]])]",
        "solved [10 10  2  2]",
        "amended ['mine, and the other chunk', 'theirs']",
        "flushed False",
    ]
