"""Sessions: their states, and what each allows."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
import zarr

import icechunk
from icechunk.errors import ConflictError, ErrorKind, ReadOnlyError, SessionStateError
from icechunk.ops import SessionMode
from icechunk.repository import Repository
from icechunk.runtime.twins import run_sync
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from tests.raising import raises

GROUP = b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'


@pytest.fixture
def repository() -> Repository:
    return Repository.create(MemoryStorage())


def group_named(name: str) -> bytes:
    return GROUP.replace(b"{}", b'{"name": "%s"}' % name.encode())


def changed(repository: Repository, name: str = "x", branch: str = "main") -> icechunk.Session:
    session = repository.writable_session(branch)
    session._content.set_metadata(f"/{name}", GROUP)
    return session


def nodes(session: icechunk.Session) -> list[str]:
    return [node.path for node in session._content.log.nodes("/")]


def test_a_session_is_read_only_after_its_commit_and_based_on_the_new_snapshot(storage: Storage) -> None:
    repository = Repository.create(storage)
    session = changed(repository)
    assert (session.read_only, session.mode, session.branch) == (False, SessionMode.writable, "main")
    assert session.snapshot_id == repository.lookup_branch("main")
    assert session.has_uncommitted_changes
    snapshot_id = session.commit("first")
    assert (session.read_only, session.mode, session.branch) == (True, SessionMode.readonly, None)
    assert session.snapshot_id == snapshot_id == repository.lookup_branch("main")
    assert not session.has_uncommitted_changes
    assert "/x" in nodes(session)
    with pytest.raises(ReadOnlyError):
        session._content.set_metadata("/y", GROUP)
    with pytest.raises(SessionStateError) as refused:
        session.commit("second")
    assert refused.value.kind == ErrorKind.COMMIT_NOT_ALLOWED
    assert nodes(Repository.open(storage).readonly_session("main")) == nodes(session)


def test_a_read_only_session_refuses_everything_that_writes(repository: Repository) -> None:
    session = repository.readonly_session("main")
    calls: list[Any] = [
        lambda: session._content.set_metadata("/x", GROUP),
        lambda: session._content.delete_node("/x"),
        lambda: session._content.clear(),
        lambda: session.discard_changes(),
    ]
    for call in calls:
        with pytest.raises(ReadOnlyError):
            call()
    with pytest.raises(SessionStateError) as refused:
        session.commit("x")
    assert refused.value.kind == ErrorKind.COMMIT_NOT_ALLOWED
    with pytest.raises(ValueError, match="read-only"):  # words: zarr's own
        zarr.open_group(session.store, mode="w")
    assert session.status().is_empty()


def test_of_two_sessions_on_one_snapshot_the_second_to_commit_is_refused_and_keeps_its_changes(
    storage: Storage,
) -> None:
    repository = Repository.create(storage)
    base = repository.lookup_branch("main")
    winner, loser = changed(repository, "winner"), changed(repository, "loser")
    new = winner.commit("winner")
    for _ in range(2):
        with pytest.raises(ConflictError) as conflict:
            loser.commit("loser")
        assert conflict.value.kind == ErrorKind.COMMIT_CONFLICT
        assert (conflict.value.expected_parent, conflict.value.actual_parent) == (base, new)
    assert not loser.read_only
    assert loser.has_uncommitted_changes
    assert "/loser" in nodes(loser)
    assert next(repository.ancestry(branch="main")).message == "winner"


def test_a_conflict_with_another_process_is_found_too(storage: Storage) -> None:
    ours, theirs = Repository.create(storage), Repository.open(storage)
    mine = changed(ours)
    new = changed(theirs).commit("theirs")
    with pytest.raises(ConflictError) as conflict:
        mine.commit("mine")
    assert conflict.value.actual_parent == new


def test_sessions_on_different_branches_do_not_conflict(repository: Repository) -> None:
    repository.create_branch("dev", repository.lookup_branch("main"))
    one, other = changed(repository), changed(repository, branch="dev")
    one.commit("one")
    other.commit("other")
    assert repository.lookup_branch("dev") == other.snapshot_id
    assert repository.lookup_branch("main") == one.snapshot_id


def test_a_commit_to_a_branch_that_was_deleted_or_reset_is_a_conflict(repository: Repository) -> None:
    first = repository.lookup_branch("main")
    repository.create_branch("dev", first)
    session = changed(repository, branch="dev")
    repository.delete_branch("dev")
    with pytest.raises(ConflictError) as conflict:
        session.commit("x")
    assert conflict.value.actual_parent is None
    changed(repository).commit("on main")
    session = changed(repository, "y")
    repository.reset_branch("main", first)
    with pytest.raises(ConflictError) as conflict:
        session.commit("x")
    assert conflict.value.actual_parent == first


def test_an_empty_commit_is_refused_unless_it_is_wanted(repository: Repository) -> None:
    session = repository.writable_session("main")
    with raises(SessionStateError, "no-changes-to-commit", "allow_empty=True"):
        session.commit("nothing")
    assert not session.read_only
    snapshot_id = session.commit("nothing", allow_empty=True)
    assert repository.lookup_branch("main") == snapshot_id
    assert repository.lookup_snapshot(snapshot_id).message == "nothing"


def test_discarding_drops_every_change(repository: Repository) -> None:
    session = changed(repository)
    array = zarr.create_array(session.store, name="a", shape=(4,), chunks=(1,), dtype="i4")
    array[:] = 1
    session.discard_changes()
    assert not session.has_uncommitted_changes
    assert session.status().is_empty()
    assert nodes(session) == nodes(repository.readonly_session("main"))
    session._content.set_metadata("/y", GROUP)
    session.commit("y")
    assert "/x" not in nodes(session)


def test_status_lists_the_changes_of_a_commit(repository: Repository) -> None:
    session = repository.writable_session("main")
    array = zarr.create_array(session.store, name="a", shape=(4,), chunks=(2,), dtype="i4")
    array[:2] = 1
    status = session.status()
    assert status.new_arrays == {"/a"}
    assert {path: [tuple(c) for c in coords] for path, coords in status.updated_chunks.items()} == {"/a": [(0,)]}
    session.commit("a")
    assert session.status().is_empty()
    session = repository.writable_session("main")
    zarr.open_array(session.store, path="a", mode="a").attrs["units"] = "m"
    assert session.status().updated_arrays == {"/a"}
    session = repository.writable_session("main")
    session._content.delete_node("/a")
    assert session.status().deleted_arrays == {"/a"}


def test_sessions_do_not_see_each_others_changes(repository: Repository) -> None:
    one, other = changed(repository, "one"), changed(repository, "other")
    assert "/other" not in nodes(one)
    assert "/one" not in nodes(other)
    assert nodes(repository.readonly_session("main")) == nodes(repository.writable_session("main"))


@pytest.mark.parametrize(
    ("message", "metadata"),
    [(None, None), (3, None), (b"x", None), ("\ud800", None), ("m", "text"), ("m", {1: 2}), ("m", {"a": b"x"})],
)
def test_a_commit_with_bad_words_writes_nothing_and_the_session_goes_on(message: Any, metadata: Any) -> None:
    storage = MemoryStorage()
    repository = Repository.create(storage)
    session = changed(repository)
    before = keys(storage)
    with pytest.raises(icechunk.InvalidInputError):
        session.commit(message, metadata)
    assert keys(storage) == before
    assert not session.read_only
    session.commit("good")


def keys(storage: Storage) -> set[str]:
    async def look() -> set[str]:
        return {item.key async for page in storage.list_pages() for item in page}

    return run_sync(look())


def test_a_read_only_session_pickles_and_a_writable_one_points_to_fork(storage: Storage) -> None:
    if isinstance(storage, MemoryStorage):
        pytest.skip("memory storage belongs to its process")
    session = changed(Repository.create(storage))
    with pytest.raises(ValueError, match=re.escape("Session.fork()")):
        pickle.dumps(session)
    session.commit("x")
    arrived = pickle.loads(pickle.dumps(session))
    assert arrived == session
    assert nodes(arrived) == nodes(session)


def test_equality_is_that_of_read_only_sessions_on_one_snapshot(repository: Repository) -> None:
    one, other = repository.readonly_session("main"), repository.readonly_session("main")
    assert one == other
    writable = repository.writable_session("main")
    assert writable == writable
    assert writable != repository.writable_session("main")
    assert writable != one
    assert one != "session"


def test_representations_name_the_snapshot_and_the_branch(repository: Repository) -> None:
    session = changed(repository)
    assert session.snapshot_id in repr(session)
    assert "main" in str(session)
    assert "icechunk-repr" in session._repr_html_()
