"""Expiration: old snapshots leave the history, and nothing else changes."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import icechunk
from icechunk.errors import ReadOnlyError, SnapshotNotFoundError
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.log.repository.events import BranchCreated, CollectionRan, CommitAdded, DetachedSnapshotAdded, TagCreated
from icechunk.log.repository.state import RepoState, apply, initial_state
from icechunk.maintenance.expire import expiration
from icechunk.maintenance.expire_ref_files import shorten
from icechunk.maintenance.ref_history import Link
from icechunk.ops import RepoAvailability, RepoStatus
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from tests.maintenance.helpers import History, ago, by_layout
from tests.raising import raises


async def five(storage: Storage, version: int | None) -> tuple[History, datetime]:
    """first, c1, c2 │ c3, c4, with a branch at c1 and a tag at c2; and the time in between."""
    history = await History.create(storage, version)
    await history.commit("c1", 1)
    await history.commit("c2", 2)
    info = await history.repo.lookup_snapshot_async(history.ids["c2"])
    await history.commit("c3", 3)
    await history.commit("c4", 4)
    await history.repo.create_branch_async("old", history.ids["c1"])
    await history.repo.create_tag_async("t", history.ids["c2"])
    return history, info.written_at + timedelta(microseconds=1)


@by_layout
async def test_expired_snapshots_leave_the_history_and_the_rest_reads_back(
    storage: Storage, version: int | None
) -> None:
    history, between = await five(storage, version)
    gone = await history.repo.expire_snapshots_async(between)
    if version == 1:
        # As in the official library: what leaves the history of one ref counts, though another points to it.
        assert gone == {history.ids[name] for name in ("first", "c1", "c2")}
        assert await history.names() == ["c4", "c3", "root"]
        assert await history.names(tag="t") == ["c2", "root"]
    else:
        assert gone == {history.ids["first"]}
        assert await history.names() == ["c4", "c3", "c2", "c1", "root"]
        assert await history.names(tag="t") == ["c2", "c1", "root"]
    assert await history.names(branch="old") == ["c1", "root"]
    await history.check({"c1", "c2", "c3", "c4"})


@by_layout
@pytest.mark.parametrize(("branches", "tags"), [(True, False), (False, True), (True, True)])
async def test_old_refs_are_deleted_with_their_snapshots_on_request(
    version: int | None, branches: bool, tags: bool
) -> None:
    history, between = await five(MemoryStorage(), version)
    await history.repo.expire_snapshots_async(between, delete_expired_branches=branches, delete_expired_tags=tags)
    assert await history.repo.list_branches_async() == ({"main"} if branches else {"main", "old"})
    assert await history.repo.list_tags_async() == (set() if tags else {"t"})
    left = {"c3", "c4"} | ({"c1"} if not branches else set()) | ({"c2"} if not tags else set())
    await history.check(left)


@by_layout
async def test_a_tip_stays_however_old_it_is(version: int | None) -> None:
    history, _ = await five(MemoryStorage(), version)
    gone = await history.repo.expire_snapshots_async(
        ago(days=-1), delete_expired_branches=True, delete_expired_tags=True
    )
    assert await history.names() == ["c4", "root"]
    assert gone == {id for name, id in history.ids.items() if name != "c4" or version == 1}
    assert await history.repo.list_branches_async() == {"main"}
    await history.commit("c5", 5)
    assert await history.names() == ["c5", "c4", "root"]
    assert await history.repo.expire_snapshots_async(ago(days=-1)) == {history.ids["c4"]} | (
        {history.ids["c5"]} if version == 1 else set()
    )


@pytest.mark.parametrize("version", [None, 2], ids=["log", "repo"])
async def test_an_expired_snapshot_is_not_found_and_the_diff_over_the_gap_is_whole(version: int | None) -> None:
    history, between = await five(MemoryStorage(), version)
    await history.repo.expire_snapshots_async(between, delete_expired_branches=True, delete_expired_tags=True)
    with raises(SnapshotNotFoundError, "snapshot-not-found", history.ids["c1"]):
        await history.repo.readonly_session_async(snapshot_id=history.ids["c1"])
    with pytest.raises(SnapshotNotFoundError):
        await history.repo.create_tag_async("late", history.ids["c1"])
    diff = await history.repo.diff_async(from_snapshot_id="1CECHNKREP0F1RSTCMT0", to_snapshot_id=history.ids["c3"])
    assert diff.new_arrays == {"/a"}
    await history.repo.garbage_collect_async(ago())
    whole = await history.repo.diff_async(from_snapshot_id="1CECHNKREP0F1RSTCMT0", to_snapshot_id=history.ids["c4"])
    assert whole.new_arrays == {"/a"}
    kinds = [type(update.kind).__name__ async for update in history.repo.ops_log_async()]
    assert kinds[:2] == ["GCRan", "ExpirationRan"]


@pytest.mark.parametrize("version", [None, 2], ids=["log", "repo"])
async def test_a_session_on_an_expired_snapshot_rebases_onto_the_remaining_history(version: int | None) -> None:
    history = await History.create(MemoryStorage(), version)
    await history.commit("c1", 1)
    session = await history.repo.writable_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r+")
    await array.setitem(slice(18, 20), 7)
    await history.commit("c2", 2)
    await history.commit("c3", 3)
    await history.repo.expire_snapshots_async(ago(days=-1))
    new = await session.commit_async("rebased", rebase_with=icechunk.BasicConflictSolver())
    expected = history.values[history.ids["c3"]].copy()
    expected[18:] = 7
    history.ids["rebased"], history.values[new] = new, expected
    assert await history.names() == ["rebased", "c3", "root"]
    await history.check({"rebased", "c3"})


@by_layout
@pytest.mark.parametrize("bad", [datetime(2026, 1, 1), None, "yesterday"])
async def test_a_time_without_a_zone_is_refused(version: int | None, bad: object) -> None:
    history = await History.create(MemoryStorage(), version)
    for call in (history.repo.expire_snapshots_async, history.repo.garbage_collect_async):
        with pytest.raises(TypeError):
            await call(bad)  # type: ignore[arg-type]
    assert await history.names() == ["first", "root"]


@pytest.mark.parametrize("version", [None, 2], ids=["log", "repo"])
async def test_a_read_only_repository_is_left_alone(version: int | None) -> None:
    history = await History.create(MemoryStorage(), version)
    await history.repo.set_status_async(RepoStatus(RepoAvailability.read_only))
    with pytest.raises(ReadOnlyError):
        await history.repo.expire_snapshots_async(ago(days=-1))
    for dry_run in (True, False):
        with pytest.raises(ReadOnlyError):
            await history.repo.garbage_collect_async(ago(), dry_run=dry_run)
    assert (await history.repo.chunk_storage_stats_async()).native_bytes == 80


@by_layout
async def test_a_time_long_ago_changes_nothing(version: int | None) -> None:
    history = await History.create(MemoryStorage(), version)
    assert await history.repo.expire_snapshots_async(datetime(1960, 1, 1, tzinfo=UTC)) == set()
    assert (await history.repo.garbage_collect_async(datetime(1960, 1, 1, tzinfo=UTC))).bytes_deleted == 0
    assert await history.names() == ["first", "root"]


async def test_another_reader_of_format_1_finds_the_remaining_history_when_files_are_deleted() -> None:
    history, between = await five(MemoryStorage(), 1)
    reader = await icechunk.Repository.open_async(history.repo.storage)
    assert (await reader.lookup_snapshot_async(history.ids["c3"])).parent_id == history.ids["c2"]
    await history.repo.expire_snapshots_async(between, delete_expired_branches=True, delete_expired_tags=True)
    await history.repo.garbage_collect_async(ago())
    assert [info.message async for info in reader.async_ancestry(branch="main")] == [
        "c4",
        "c3",
        "Repository initialized",
    ]


async def test_sync_twins_do_the_same() -> None:
    history, between = await five(MemoryStorage(), None)
    assert history.repo.expire_snapshots(between) == {history.ids["first"]}
    assert history.repo.garbage_collect(ago(days=1)).snapshots_deleted == 0
    assert history.repo.chunk_storage_stats().native_bytes > 0
    assert history.repo.prune_log() == 0
    with pytest.warns(DeprecationWarning, match=re.escape("native_bytes")):
        assert history.repo.total_chunks_storage() == history.repo.chunk_storage_stats().native_bytes
    with pytest.warns(DeprecationWarning, match=re.escape("native_bytes")):
        await history.repo.total_chunks_storage_async()


# ------------------------------------------------------------------------------------------- decisions


def test_a_history_of_format_1_is_cut_below_its_oldest_young_snapshot() -> None:
    chain = [
        Link(id=ObjectId(bytes([i]) * 12), parent=ObjectId(bytes([i - 1]) * 12) if i else None, flushed_at_us=i * 10)
        for i in range(5, -1, -1)
    ]
    fate = shorten(chain, 30)
    assert (fate.edited, fate.released) == (chain[2].id, frozenset({chain[3].id, chain[4].id}))
    assert shorten(chain, 1000).edited == chain[0].id
    assert shorten(chain, 1000).tip_is_old
    assert shorten(chain, 0) == shorten(chain, 10).__class__(
        edited=None, root=chain[-1].id, released=frozenset(), tip_is_old=False
    )
    assert shorten(chain[-1:], 1000).edited is None


@st.composite
def histories(draw: st.DrawFn) -> RepoState:
    """A graph with branches, tags and detached snapshots; snapshot i is written at i."""
    root = SnapshotRecord(id=FIRST_SNAPSHOT, parent=None, flushed_at_us=0, message="", metadata={})
    state = initial_state(root, time_us=1, config=None)
    tips = {"main": FIRST_SNAPSHOT}
    for i in range(1, draw(st.integers(1, 14))):
        name = draw(st.sampled_from(sorted(tips)))
        parent = draw(st.sampled_from(sorted(state.snapshots))) if draw(st.booleans()) else tips[name]
        record = SnapshotRecord(id=ObjectId(i.to_bytes(12)), parent=parent, flushed_at_us=i, message="", metadata={})
        events: list[object]
        if parent == tips[name]:
            events = [CommitAdded(branch=name, snapshot=record)]
            tips[name] = record.id
        else:
            events = [DetachedSnapshotAdded(snapshot=record)]
        if draw(st.integers(0, 3)) == 0:
            events.append(TagCreated(name=f"t{i}", snapshot=record.id))
        if draw(st.integers(0, 3)) == 0:
            events.append(BranchCreated(name=f"b{i}", snapshot=record.id))
            tips[f"b{i}"] = record.id
        for event in events:
            state = apply(state, event, time_us=1, since_us=None)  # type: ignore[arg-type]
    return state


def logs_between(state: RepoState, snapshot: ObjectId) -> list[ObjectId]:
    """All transaction logs from the first snapshot to this one, newest first."""
    return [id for record in state.ancestry(snapshot) for id in (record.id, *reversed(record.pruned_ancestor_tx_logs))]


@given(histories(), st.integers(0, 15), st.booleans(), st.booleans(), st.integers(0, 15))
@settings(max_examples=150)
def test_expiring_and_collecting_keep_every_ref_and_all_transaction_logs_in_order(
    state: RepoState, older: int, branches: bool, tags: bool, cutoff: int
) -> None:
    event = expiration(state, older_than_us=older, delete_expired_branches=branches, delete_expired_tags=tags)
    expired = apply(state, event, time_us=1, since_us=None)
    after = apply(expired, CollectionRan(cutoff_us=cutoff), time_us=1, since_us=None)
    for found in (expired, after):
        for ref, tip in (*found.branches.items(), *found.tags.items()):
            assert tip == {**state.branches, **state.tags}[ref]
            assert logs_between(found, tip) == logs_between(state, tip)
            assert [*found.ancestry(tip)][-1].id == FIRST_SNAPSHOT
        for record in found.snapshots.values():
            assert record.parent is None or record.parent in found.snapshots
    tips = {*expired.branches.values(), *expired.tags.values()}
    assert all(
        record.flushed_at_us >= older or record.id in tips or record.id == FIRST_SNAPSHOT
        for record in expired.snapshots.values()
    )
    reached = after.reachable() | {FIRST_SNAPSHOT}
    assert all(record.id in reached or record.flushed_at_us >= cutoff for record in after.snapshots.values())
    assert "main" in expired.branches
    if not branches:
        assert set(expired.branches) == set(state.branches)
