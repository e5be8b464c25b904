"""Amending a branch's tip, and snapshots that no branch points to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import icechunk
from icechunk import ConflictError, Repository, Session
from icechunk.errors import ErrorKind, SessionStateError
from icechunk.log.session.log import SessionLog
from icechunk.log.session.merge.diff import combined, diff
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import PutResult, Storage
from icechunk.testing.wrapping import WrappingStorage
from tests.log.session.builders import Repo, array_json, group_json, native


@pytest.fixture
def repo() -> Repository:
    repo = Repository.create(icechunk.in_memory_storage())
    session = repo.writable_session("main")
    array = zarr.create_array(session.store, name="a", shape=(6,), chunks=(1,), dtype="i4", fill_value=-1)
    array[:3] = [0, 1, 2]
    session.commit("base")
    return repo


def put(session: Session, index: int, value: int) -> None:
    zarr.open_array(session.store, path="a")[index] = value


def get(repo: Repository, **version: Any) -> list[int]:
    store = repo.readonly_session(**(version or {"branch": "main"})).store
    return [int(value) for value in np.asarray(zarr.open_array(store, path="a", mode="r")[:])]


def history(repo: Repository) -> list[str]:
    return [info.message for info in repo.ancestry(branch="main")]


def test_an_amended_tip_is_replaced_and_its_log_has_the_changes_of_both(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, 3, 30)
    old = session.commit("to be amended")
    session = repo.writable_session("main")
    put(session, 4, 40)
    new = session.amend("amended", metadata={"k": 1})
    assert session.read_only
    assert session.snapshot_id == new
    assert history(repo) == ["amended", "base", "Repository initialized"]
    assert next(iter(repo.ancestry(branch="main"))).metadata == {"k": 1}
    assert get(repo) == [0, 1, 2, 30, 40, -1]
    assert get(repo, snapshot_id=old) == [0, 1, 2, 30, -1, -1]
    base = list(repo.ancestry(branch="main"))[1].id
    assert repo.diff(from_snapshot_id=base, to_branch="main").updated_chunks == {"/a": [[3], [4]]}


def test_an_amendment_needs_changes_and_a_tip_that_is_not_the_first_snapshot(repo: Repository) -> None:
    with pytest.raises(SessionStateError) as refused:
        repo.writable_session("main").amend("nothing")
    assert refused.value.kind == ErrorKind.NO_CHANGES_TO_COMMIT
    repo.writable_session("main").amend("only the message", allow_empty=True)
    assert history(repo)[0] == "only the message"
    assert get(repo)[:3] == [0, 1, 2]
    empty = Repository.create(icechunk.in_memory_storage())
    session = empty.writable_session("main")
    zarr.create_group(session.store)
    with pytest.raises(SessionStateError) as refused:
        session.amend("first")
    assert refused.value.kind == ErrorKind.NO_AMEND_FOR_INITIAL_COMMIT
    session.commit("first")


def test_an_amendment_of_a_tip_that_moved_is_a_conflict(repo: Repository) -> None:
    session, winner = repo.writable_session("main"), repo.writable_session("main")
    put(winner, 3, 30)
    winner.commit("winner")
    put(session, 4, 40)
    with pytest.raises(ConflictError):
        session.amend("late")
    assert not session.read_only
    assert history(repo)[0] == "winner"


def test_writers_amend_one_tip_in_turn_each_after_a_rebase(repo: Repository) -> None:
    sessions = [repo.writable_session("main") for _ in range(4)]
    for i, session in enumerate(sessions):
        put(session, i, 10 + i)
    sessions[0].amend("amended 0")
    for i, session in enumerate(sessions[1:], 1):
        with pytest.raises(ConflictError):
            session.amend(f"amended {i}")
        session.rebase(icechunk.ConflictDetector())
        session.amend(f"amended {i}")
    assert get(repo)[:4] == [10, 11, 12, 13]
    assert history(repo) == ["amended 3", "Repository initialized"]
    last = repo.writable_session("main")
    put(last, 4, 14)
    last.commit("on top")
    assert get(repo)[:5] == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("amendments", [1, 2])
def test_a_session_on_an_amended_tip_rebases_over_the_amendments_and_later_commits(
    repo: Repository, amendments: int
) -> None:
    session = repo.writable_session("main")
    for i in range(amendments):
        amending = repo.writable_session("main")
        zarr.open_array(amending.store, path="a").attrs["n"] = i
        amending.amend(f"amended {i}")
    after = repo.writable_session("main")
    put(after, 3, 30)
    after.commit("after")
    put(session, 4, 40)
    with pytest.raises(icechunk.RebaseFailedError) as refused:
        session.commit("late", rebase_with=icechunk.ConflictDetector())
    assert [c.path for c in refused.value.conflicts] == ["/a"]
    session.discard_changes()
    zarr.create_group(session.store, path="new")
    session.commit("late", rebase_with=icechunk.ConflictDetector())
    assert history(repo)[:2] == ["late", "after"]
    assert get(repo)[3] == 30


def test_changes_of_the_amended_snapshot_itself_are_no_conflict(repo: Repository) -> None:
    tip = repo.writable_session("main")
    zarr.open_array(tip.store, path="a").attrs["n"] = 1
    zarr.create_group(tip.store, path="g")
    tip.commit("tip")
    session, amending = repo.writable_session("main"), repo.writable_session("main")
    zarr.open_group(amending.store, path="g").attrs["n"] = 2
    amending.amend("amended")
    put(session, 4, 40)
    session.rebase(icechunk.ConflictDetector())
    session.amend("both")
    assert get(repo)[4] == 40
    assert zarr.open_group(repo.readonly_session("main").store, path="g", mode="r").attrs["n"] == 2


class Meanwhile(WrappingStorage):
    """Runs something once, just before an object is written whose key begins so."""

    def __init__(self, inner: Storage, prefix: str) -> None:
        super().__init__(inner)
        self.prefix = prefix
        self.act: Callable[[], Awaitable[object]] | None = None

    async def put(self, key: str, *args: Any, **kwargs: Any) -> PutResult:
        if key.startswith(self.prefix) and self.act is not None:
            act, self.act = self.act, None
            await act()
        return await self.inner.put(key, *args, **kwargs)


@pytest.mark.parametrize(("version", "prefix"), [(None, "log/"), (2, "snapshots/"), (2, "repo")])
async def test_an_amendment_lands_whose_tip_got_another_parent_by_an_expiration_meanwhile(
    version: int | None, prefix: str
) -> None:
    inner = MemoryStorage()
    repo = await Repository.create_async(inner, spec_version=version)
    for i in range(3):
        session = await repo.writable_session_async("main")
        await zarr.api.asynchronous.create_group(store=session.store, path=f"g{i}")
        await session.commit_async(f"{i}")
    storage = Meanwhile(inner, prefix)
    client = await Repository.open_async(storage)
    session = await client.writable_session_async("main")
    await zarr.api.asynchronous.create_group(store=session.store, path="amended")
    storage.act = lambda: repo.expire_snapshots_async(datetime.now(UTC) + timedelta(days=1))
    new = await session.amend_async("amended")
    assert storage.act is None
    fresh = await Repository.open_async(inner)
    infos = [info async for info in fresh.async_ancestry(branch="main")]
    assert [info.message for info in infos] == ["amended", "Repository initialized"]
    assert infos[0].id == new
    found = await fresh.diff_async(from_snapshot_id=infos[1].id, to_branch="main")
    assert found.new_groups == {"/", "/g0", "/g1", "/g2", "/amended"}


def test_a_branch_that_was_reset_is_nothing_to_rebase_onto(repo: Repository) -> None:
    before = repo.lookup_branch("main")
    writer = repo.writable_session("main")
    put(writer, 3, 30)
    writer.commit("gone")
    session = repo.writable_session("main")
    repo.reset_branch("main", before)
    put(session, 4, 40)
    with pytest.raises(ConflictError):
        session.rebase(icechunk.ConflictDetector())


def test_a_flushed_snapshot_is_read_by_its_id_and_no_branch_moves(repo: Repository) -> None:
    session, winner = repo.writable_session("main"), repo.writable_session("main")
    put(winner, 3, 30)
    tip = winner.commit("winner")
    put(session, 4, 40)
    flushed = session.flush("flushed", metadata={"k": 1})
    assert session.read_only
    assert session.snapshot_id == flushed
    assert repo.lookup_branch("main") == tip
    assert get(repo, snapshot_id=flushed) == [0, 1, 2, -1, 40, -1]
    assert [info.message for info in repo.ancestry(snapshot_id=flushed)][:2] == ["flushed", "base"]
    repo.create_branch("kept", flushed)
    assert get(repo, branch="kept")[4] == 40
    assert repo.writable_session("main").flush("nothing changed")


def test_a_fork_is_not_flushed_or_amended(repo: Repository) -> None:
    fork = repo.writable_session("main").fork()
    put(fork, 4, 40)
    for call in (fork.flush, fork.amend):
        with pytest.raises(SessionStateError) as refused:
            call("x")
        assert refused.value.kind == ErrorKind.COMMIT_NOT_ALLOWED


CHANGES = st.lists(
    st.tuples(st.sampled_from(["array", "group", "delete", "chunk", "move"]), st.integers(0, 2), st.integers(0, 3)),
    max_size=6,
)


def change(log: SessionLog, changes: list[tuple[str, int, int]], mark: int) -> None:
    for kind, i, n in changes:
        path = f"/{i}"
        node = log.node(path)
        if kind == "delete" and node is not None:
            log.delete_node(path)
        elif kind == "chunk" and node is not None and node.shape:
            log.set_refs(node, native(np.array([[n]]), 10 * mark + n + 1))
        elif kind == "move" and node is not None and log.node(f"/m{n}") is None:
            log.move_node(path, f"/m{n}")
        elif kind == "array" and (node is None or node.shape):
            log.set_metadata(path, array_json([4], mark=mark, n=n))
        elif kind == "group" and (node is None or not node.shape):
            log.set_metadata(path, group_json(mark=mark, n=n))


@settings(max_examples=80)
@given(CHANGES, CHANGES, CHANGES)
def test_the_combined_transaction_log_equals_both_logs_in_a_row(
    before: list[tuple[str, int, int]], first: list[tuple[str, int, int]], second: list[tuple[str, int, int]]
) -> None:
    repo = Repo()
    logs = []
    start = repo.snapshot
    for mark, changes in enumerate((before, first, second)):
        log = repo.log()
        if not mark:
            log.set_metadata("/", group_json())
        change(log, changes, mark)
        logs.append(repo.commit(log).transaction)
        if not mark:
            start = repo.snapshot
    one = combined(logs[1], logs[2])
    assert one.id == logs[2].id
    as_two, as_one = diff(logs[1:], start, repo.snapshot), diff([one], start, repo.snapshot)
    for name in ("new_groups", "new_arrays", "deleted_groups", "deleted_arrays", "updated_groups", "updated_arrays"):
        assert getattr(as_one, name) == getattr(as_two, name), name
    assert as_one.moved_nodes == as_two.moved_nodes
    assert {p: c.tolist() for p, c in as_one.updated_chunks.items()} == {
        p: c.tolist() for p, c in as_two.updated_chunks.items()
    }
    known = [one.new_groups, one.deleted_groups, one.updated_groups, one.new_arrays, one.deleted_arrays]
    known.append(one.updated_arrays)
    assert sum(map(len, known)) == len(frozenset().union(*known))
