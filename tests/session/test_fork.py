"""Forks: they begin with their parent's changes, write independently, are pickled, and are merged again."""

from __future__ import annotations

import asyncio
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import zarr

import icechunk
from icechunk import ConflictDetector, ForkSession, RebaseFailedError, Repository, Session
from icechunk.distributed import extract_session, merge_sessions
from icechunk.errors import ErrorKind, ReadOnlyError, SessionStateError
from icechunk.testing.recording import RecordingStorage
from tests.log.session.builders import native

N = 20


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    repo = Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repo")))
    session = repo.writable_session("main")
    for name in ("a", "b", "g/x"):
        array = zarr.create_array(session.store, name=name, shape=(N,), chunks=(1,), dtype="i4", fill_value=-1)
        array[:5] = np.arange(5)
    session.commit("base")
    return repo


def put(session: Session, name: str, index: int, value: int) -> None:
    zarr.open_array(session.store, path=name)[index] = value


def get(session: Session, name: str = "a") -> list[int]:
    return [int(value) for value in np.asarray(zarr.open_array(session.store, path=name, mode="r")[:])]


def create(session: Session, name: str) -> None:
    zarr.create_array(session.store, name=name, shape=(4,), chunks=(1,), dtype="i4", fill_value=0)


def travel(fork: ForkSession) -> ForkSession:
    arrived: ForkSession = pickle.loads(pickle.dumps(fork))
    return arrived


def test_a_fork_begins_with_all_changes_of_its_parent_and_counts_none_of_them_as_its_own(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 0, 50)
    create(session, "new")
    fork = session.fork()
    assert isinstance(fork, ForkSession)
    assert not fork.read_only
    assert fork.branch is None
    assert not fork.has_uncommitted_changes
    assert fork.status().is_empty()
    assert get(fork)[0] == 50
    put(fork, "new", 1, 1)
    put(fork, "a", 1, 51)
    assert fork.has_uncommitted_changes
    assert fork.status().updated_chunks.keys() == {"/a", "/new"}
    assert not fork.status().new_arrays
    fork.discard_changes()
    assert not fork.has_uncommitted_changes
    assert get(fork)[:2] == [50, 1]


def test_forks_and_parent_do_not_see_each_other_before_the_merge(repo: Repository) -> None:
    session = repo.writable_session("main")
    one, two = session.fork(), session.fork()
    put(one, "a", 1, 51)
    put(two, "a", 2, 52)
    put(session, "a", 3, 53)
    assert get(one)[1:4] == [51, 2, 3]
    assert get(two)[1:4] == [1, 52, 3]
    session.merge(one, two)
    assert get(session)[1:4] == [51, 52, 53]
    session.commit("merged")
    assert get(repo.readonly_session("main"))[1:4] == [51, 52, 53]


def test_a_fork_returned_from_another_process_has_its_changes(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 0, 50)
    there = travel(session.fork())
    assert get(there)[0] == 50
    put(there, "a", 1, 51)
    create(there, "new")
    put(there, "new", 2, 7)
    back = travel(there)
    session.merge(back)
    session.commit("merged")
    reader = repo.readonly_session("main")
    assert get(reader)[:2] == [50, 51]
    assert get(reader, "new") == [0, 0, 7, 0]


def test_forks_of_forks_come_back_through_their_parent(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 0, 50)
    child = travel(session.fork())
    put(child, "a", 1, 51)
    create(child, "new")
    grandchild = travel(child.fork())
    put(grandchild, "a", 2, 52)
    put(grandchild, "new", 0, 9)
    assert get(grandchild)[:3] == [50, 51, 52]
    child.merge(grandchild)
    put(session, "a", 3, 53)
    session.merge(travel(child))
    assert get(session)[:4] == [50, 51, 52, 53]
    assert get(session, "new")[0] == 9


def test_merging_a_fork_twice_or_an_unchanged_fork_changes_nothing(repo: Repository) -> None:
    session = repo.writable_session("main")
    fork = session.fork()
    create(fork, "new")
    put(fork, "new", 0, 1)
    session.merge(fork)
    put(session, "a", 0, 77)
    session.merge(fork, session.fork(), session)
    session.merge()
    assert get(session)[0] == 77
    assert get(session, "new")[0] == 1


def update(session: Session, name: str, value: int) -> None:
    zarr.open_array(session.store, path=name).attrs["k"] = value


def remove(session: Session, name: str) -> None:
    zarr.core.sync.sync(session.store.delete_dir(name))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda s: create(s, "new"), lambda f: create(f, "new")),
        (lambda s: put(s, "b", 0, 1), lambda f: remove(f, "b")),
        (lambda s: remove(s, "b"), lambda f: put(f, "b", 0, 1)),
        (lambda s: update(s, "b", 1), lambda f: remove(f, "b")),
        (lambda s: remove(s, "b"), lambda f: update(f, "b", 1)),
        (lambda s: update(s, "b", 1), lambda f: update(f, "b", 2)),
        (lambda s: create(s, "g/new"), lambda f: remove(f, "g")),
        (lambda s: remove(s, "g"), lambda f: put(f, "g/x", 0, 1)),
    ],
)
def test_changes_that_exclude_each_other_are_refused_and_nothing_is_merged(
    repo: Repository, ours: Callable[[Session], None], theirs: Callable[[Session], None]
) -> None:
    session = repo.writable_session("main")
    create(session, "inherited")
    fork, innocent = session.fork(), session.fork()
    put(innocent, "a", 7, 7)
    theirs(fork)
    ours(session)
    before = str(session.status())
    with pytest.raises(SessionStateError) as refused:
        session.merge(innocent, fork)
    assert refused.value.kind == ErrorKind.MERGE_FAILED
    assert str(session.status()) == before
    session.merge(innocent)
    assert get(session)[7] == 7


def test_both_may_delete_one_node(repo: Repository) -> None:
    session = repo.writable_session("main")
    fork = session.fork()
    remove(fork, "b")
    remove(session, "b")
    session.merge(fork)
    assert session.status().deleted_arrays == {"/b"}


def test_a_fork_does_not_undo_its_parents_changes_of_inherited_chunks(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 0, 50)
    fork = session.fork()
    put(session, "a", 0, 99)
    put(fork, "a", 1, 51)
    session.merge(fork)
    assert get(session)[:2] == [99, 51]


def test_a_fork_commits_and_rebases_nothing_and_only_writable_sessions_fork(repo: Repository) -> None:
    session = repo.writable_session("main")
    fork = session.fork()
    put(fork, "a", 0, 1)
    for refused_call in (lambda: fork.commit("x"), lambda: fork.rebase(ConflictDetector())):
        with pytest.raises(SessionStateError) as refused:
            refused_call()
        assert refused.value.kind == ErrorKind.COMMIT_NOT_ALLOWED
    with pytest.raises(SessionStateError) as refused:
        repo.readonly_session("main").fork()
    assert refused.value.kind == ErrorKind.CANNOT_FORK_READ_ONLY_SESSION
    with pytest.raises(ValueError, match=re.escape("Session.fork()")):
        pickle.dumps(session)
    with pytest.raises(ValueError, match=re.escape("Session.fork()")):
        pickle.dumps(session.store)
    with pytest.raises(TypeError):
        session.merge(3)  # type: ignore[arg-type]
    session.merge(fork)
    session.commit("done")
    with pytest.raises(ReadOnlyError):
        session.merge(fork)


def test_a_fork_is_merged_after_its_parent_was_rebased_unless_it_conflicts(repo: Repository) -> None:
    session = repo.writable_session("main")
    create(session, "new")
    fork, other = session.fork(), session.fork()
    put(fork, "a", 1, 51)
    put(fork, "new", 0, 1)
    put(other, "a", 2, 52)
    winner = repo.writable_session("main")
    put(winner, "a", 2, 2)
    winner.commit("winner")
    session.rebase(ConflictDetector())
    session.merge(travel(fork))
    with pytest.raises(RebaseFailedError):
        session.merge(other)
    session.commit("merged")
    assert get(repo.readonly_session("main"))[1:3] == [51, 2]


def test_a_fork_of_another_history_is_refused(repo: Repository) -> None:
    repo.create_branch("dev", repo.lookup_branch("main"))
    session = repo.writable_session("dev")
    put(session, "a", 0, 1)
    session.commit("dev")
    fork = repo.writable_session("dev").fork()
    put(fork, "a", 1, 51)
    with pytest.raises(SessionStateError) as refused:
        repo.writable_session("main").merge(fork)
    assert refused.value.kind == ErrorKind.MERGE_FAILED


def test_chunks_are_durable_before_a_fork_is_made_and_before_it_is_pickled(tmp_path: Path) -> None:
    storage = RecordingStorage(icechunk.local_filesystem_storage(str(tmp_path / "repo")), turns=0)
    repo = Repository.create(storage, icechunk.RepositoryConfig(inline_chunk_threshold_bytes=0))
    session = repo.writable_session("main")
    create(session, "a")
    put(session, "a", 0, 50)
    fork = session.fork()
    assert storage.count("put", "chunks/") == 1

    async def elsewhere() -> None:
        # On a loop that has ended before any caller waits for its uploads.
        await fork._content.set_chunk("/a", (1,), b"\1\0\0\0")

    asyncio.run(elsewhere())
    state = fork.__getstate__()
    assert fork._content.puts.is_idle
    assert storage.count("put", "chunks/") >= 2
    assert fork._content.origin is not None
    assert state["position"] == fork._content.origin.position


def test_a_large_base_is_not_pickled_but_read_on_arrival(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icechunk.session.session._EMBEDDED_BYTES", 0)
    fork = repo.writable_session("main").fork()
    assert fork.__getstate__()["snapshot"] is None
    assert get(travel(fork))[:3] == [0, 1, 2]


def test_forks_that_arrive_in_one_process_share_their_connections(repo: Repository) -> None:
    session = repo.writable_session("main")
    one, two = travel(session.fork()), travel(session.fork())
    assert one._content.core is two._content.core
    assert one._content.core is not session._content.core


def test_sessions_are_extracted_and_merged_however_they_are_nested(repo: Repository) -> None:
    session = repo.writable_session("main")
    forks = [session.fork() for _ in range(5)]
    for i, fork in enumerate(forks):
        put(fork, "a", 5 + i, i)
    array = zarr.open_array(forks[0].store, path="a")
    assert extract_session(array) is forks[0]
    merged = merge_sessions(forks[0], [forks[1], forks[0]], [[forks[2]], [forks[3], forks[4]]])
    session.merge(merged)
    assert get(session)[5:10] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=re.escape("merge_sessions")):
        merge_sessions()
    with pytest.raises(TypeError):
        merge_sessions(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        extract_session(zarr.zeros((2,)))


def write_part(fork: ForkSession, part: int) -> ForkSession:
    for i in range(part * 5, part * 5 + 5):
        put(fork, "a", i, 100 + i)
    return fork


@pytest.mark.thorough
def test_processes_write_one_array_through_forks(repo: Repository) -> None:
    session = repo.writable_session("main")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        forks = list(pool.map(write_part, [session.fork() for _ in range(4)], range(4)))
    session.merge(*forks)
    session.commit("written by many")
    assert get(repo.readonly_session("main")) == [100 + i for i in range(N)]


def test_many_inherited_references_are_not_pickled_with_each_copy_of_a_fork(tmp_path: Path) -> None:
    storage = RecordingStorage(icechunk.local_filesystem_storage(str(tmp_path / "repo")), turns=0)
    repo = Repository.create(storage)
    root = repo.writable_session("main")
    zarr.create_group(root.store)
    root.commit("root")
    session = repo.writable_session("main")
    count = 20_000
    zarr.create_array(session.store, name="a", shape=(count,), chunks=(1,), dtype="i4", fill_value=-1)
    session._content.set_references("/a", native(np.arange(count).reshape(-1, 1)))
    put(session, "a", 7, 70)
    forks = [session.fork() for _ in range(4)]
    storage.clear()
    sent = [pickle.dumps(fork) for fork in forks]
    assert max(map(len, sent)) < 10_000
    assert storage.count("put", "snapshots/") == 1
    assert storage.count("put", "log/") == storage.count("put", "transactions/") == 0
    copies = [pickle.loads(data) for data in sent]
    for i, copy in enumerate(copies):
        assert not copy.has_uncommitted_changes
        assert zarr.open_array(copy.store, path="a")[7] == 70
        put(copy, "a", 100 + i, i)
        grandchild = travel(copy.fork())
        put(grandchild, "a", 200 + i, i)
        copy.merge(grandchild)
    back = [pickle.dumps(copy) for copy in copies]
    assert max(map(len, back)) < 10_000
    put(session, "a", 8, 80)
    winner = repo.writable_session("main")
    zarr.create_group(winner.store, path="winner")
    winner.commit("winner")
    session.rebase(ConflictDetector())
    session.merge(*map(pickle.loads, back))
    session.commit("merged")
    array = zarr.open_array(repo.readonly_session("main").store, path="a", mode="r")
    assert [array[i] for i in (7, 8, 100, 103, 200, 203)] == [70, 80, 0, 3, 0, 3]
    assert len(zarr.core.sync.sync(references(repo))) == count


async def references(repo: Repository) -> list[tuple[int, ...]]:
    session = await repo.readonly_session_async("main")
    return [coords async for coords in session.chunk_coordinates("/a")]


def test_a_fork_deletes_and_replaces_references_that_it_inherited_in_files(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icechunk.session.session._EMBEDDED_BYTES", 0)
    session = repo.writable_session("main")
    create(session, "new")
    create(session, "gone")
    put(session, "new", 0, 1)
    put(session, "gone", 0, 1)
    fork = travel(session.fork())
    remove(fork, "gone")
    put(fork, "new", 0, 2)
    update(fork, "new", 3)
    session.merge(travel(fork))
    assert session.status().new_arrays == {"/new"}
    assert get(session, "new") == [2, 0, 0, 0]
    assert zarr.open_array(session.store, path="new").attrs["k"] == 3
