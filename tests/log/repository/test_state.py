"""The fold: what each event does, and that what is refused changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import (
    AlreadyExistsError,
    ConflictError,
    FormatError,
    IcechunkError,
    InvalidInputError,
    ReadOnlyError,
    RefNotFoundError,
    SessionStateError,
    SnapshotNotFoundError,
)
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.repo import repo_info as stored
from icechunk.format.repo.codec import decode_repo, encode_and_keep, encode_repo
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.log.repository import events as e
from icechunk.log.repository.state import (
    READ_ONLY,
    RepoState,
    UpdateLog,
    apply,
    from_repo_info,
    initial_state,
    reparented,
    resting_on,
    rewritten_as,
    to_repo_info,
    try_apply_all,
)
from tests.log.repository.strategies import EVENTS, an_id
from tests.raising import raises


def record(i: int, parent: ObjectId | None, at: int | None = None) -> SnapshotRecord:
    return SnapshotRecord(id=an_id(i), parent=parent, flushed_at_us=at or 1000 + i, message=f"m{i}", metadata={"i": i})


def fresh() -> RepoState:
    root = SnapshotRecord(
        id=FIRST_SNAPSHOT, parent=None, flushed_at_us=1000, message="Repository initialized", metadata={}
    )
    return initial_state(root, time_us=1001, config=None)


def after(state: RepoState, *events: e.Event, time_us: int = 5000, since_us: int | None = None) -> RepoState:
    for event in events:
        state = apply(state, event, time_us=time_us, since_us=since_us)
    return state


def commit(i: int, parent: ObjectId, branch: str = "main") -> e.CommitAdded:
    return e.CommitAdded(branch=branch, snapshot=record(i, parent))


def test_a_commit_moves_its_branch_and_is_in_the_ops_log() -> None:
    state = after(fresh(), commit(1, FIRST_SNAPSHOT))
    assert state.branch_tip("main") == an_id(1)
    assert [one.id for one in state.ancestry(an_id(1))] == [an_id(1), FIRST_SNAPSHOT]
    newest = next(iter(state.updates))
    assert newest.change == stored.NewCommit(branch="main", snapshot=an_id(1))


def test_a_commit_on_a_stale_parent_is_a_conflict_that_names_both_tips() -> None:
    state = after(fresh(), commit(1, FIRST_SNAPSHOT))
    with pytest.raises(ConflictError) as caught:
        after(state, commit(2, FIRST_SNAPSHOT))
    assert caught.value.expected_parent == "1CECHNKREP0F1RSTCMT0"
    assert caught.value.kind == "commit-conflict"


def test_times_in_the_fold_increase_with_any_clocks_of_the_writers() -> None:
    state = after(fresh(), commit(1, FIRST_SNAPSHOT), time_us=9_000)
    state = after(state, commit(2, an_id(1)), time_us=3)
    assert [update.updated_at_us for update in state.updates] == [9_001, 9_000, 1_001]


def test_a_snapshot_that_is_not_younger_than_its_parent_is_refused() -> None:
    state = after(fresh(), commit(1, FIRST_SNAPSHOT))
    with pytest.raises(InvalidInputError) as caught:
        after(state, e.CommitAdded(branch="main", snapshot=record(2, an_id(1), at=1001)))
    assert caught.value.kind == "snapshot-timestamp"


def test_a_commit_with_files_older_than_the_collection_cutoff_is_refused() -> None:
    state = after(fresh(), e.CollectionRan(cutoff_us=7_000))
    for since_us in (6_999, None):
        with pytest.raises(SessionStateError):
            after(state, commit(1, FIRST_SNAPSHOT), since_us=since_us)
    assert after(state, commit(1, FIRST_SNAPSHOT), since_us=7_000).branch_tip("main") == an_id(1)


def test_the_cutoff_of_collections_never_goes_back() -> None:
    state = after(fresh(), e.CollectionRan(cutoff_us=7_000), e.CollectionRan(cutoff_us=3_000))
    assert state.gc_cutoff_us == 7_000
    with pytest.raises(SessionStateError):
        after(state, commit(1, FIRST_SNAPSHOT), since_us=5_000)


def test_a_collection_drops_unreachable_snapshots_and_keeps_young_detached_ones() -> None:
    state = after(
        fresh(),
        commit(1, FIRST_SNAPSHOT),
        commit(2, an_id(1)),
        e.BranchReset(name="main", snapshot=an_id(1), expected=None),
        e.DetachedSnapshotAdded(snapshot=record(3, FIRST_SNAPSHOT, at=9_000)),
    )
    state = after(state, e.CollectionRan(cutoff_us=8_000))
    assert set(state.snapshots) == {FIRST_SNAPSHOT, an_id(1), an_id(3)}


REFUSALS = [
    (e.BranchCreated(name="main", snapshot=FIRST_SNAPSHOT), AlreadyExistsError, "branch-already-exists"),
    (e.BranchCreated(name="b2", snapshot=an_id(99)), SnapshotNotFoundError, "snapshot-not-found"),
    (e.BranchReset(name="nope", snapshot=FIRST_SNAPSHOT, expected=None), RefNotFoundError, "ref-not-found"),
    (e.BranchReset(name="main", snapshot=an_id(99), expected=None), SnapshotNotFoundError, "snapshot-not-found"),
    (e.BranchReset(name="main", snapshot=an_id(1), expected=an_id(5)), ConflictError, "branch-update-conflict"),
    (e.BranchDeleted(name="main"), SessionStateError, "cannot-delete-main"),
    (e.BranchDeleted(name="nope"), RefNotFoundError, "ref-not-found"),
    (e.TagCreated(name="t", snapshot=FIRST_SNAPSHOT), AlreadyExistsError, "tag-already-exists"),
    (e.TagCreated(name="gone", snapshot=FIRST_SNAPSHOT), AlreadyExistsError, "tag-previously-deleted"),
    (e.TagCreated(name="new", snapshot=an_id(99)), SnapshotNotFoundError, "snapshot-not-found"),
    (e.TagDeleted(name="nope"), RefNotFoundError, "ref-not-found"),
    (commit(1, an_id(1)), InvalidInputError, "duplicate-snapshot-id"),
    (commit(2, FIRST_SNAPSHOT), ConflictError, "commit-conflict"),
    (commit(2, FIRST_SNAPSHOT, "nope"), RefNotFoundError, "ref-not-found"),
    (
        e.CommitAmended(branch="b", previous=FIRST_SNAPSHOT, snapshot=record(4, None)),
        SessionStateError,
        "no-amend-for-initial-commit",
    ),
    (e.ConfigReplaced(config={}, expected={"a": 1}, check=True), ConflictError, "config-updated"),
    (e.ExpirationRan(released=(FIRST_SNAPSHOT,)), ConflictError, "repo-info-updated"),
    (
        e.SnapshotsRewritten(replaced=((an_id(99), an_id(98)),), keep=False),
        SnapshotNotFoundError,
        "snapshot-not-found",
    ),
    (
        e.SnapshotsRewritten(replaced=((FIRST_SNAPSHOT, an_id(98)),), keep=False),
        SessionStateError,
        "no-amend-for-initial-commit",
    ),
    (
        e.SnapshotsRewritten(replaced=((an_id(1), an_id(98)), (an_id(1), an_id(97))), keep=False),
        InvalidInputError,
        "duplicate-snapshot-id",
    ),
    (
        e.SnapshotsRewritten(replaced=((an_id(1), an_id(1)),), keep=False),
        InvalidInputError,
        "duplicate-snapshot-id",
    ),
]


@pytest.mark.parametrize(("event", "error", "kind"), REFUSALS, ids=lambda value: type(value).__name__)
def test_a_refused_event_has_a_reason_and_leaves_the_state_unchanged(event: e.Event, error: type, kind: str) -> None:
    state = after(
        fresh(),
        commit(1, FIRST_SNAPSHOT),
        e.BranchCreated(name="b", snapshot=FIRST_SNAPSHOT),
        e.TagCreated(name="t", snapshot=an_id(1)),
        e.TagCreated(name="gone", snapshot=an_id(1)),
        e.TagDeleted(name="gone"),
    )
    before = to_repo_info(state)
    with pytest.raises(error) as caught:
        after(state, event)
    assert isinstance(caught.value, IcechunkError)
    assert caught.value.kind == kind
    assert to_repo_info(state) == before


def test_a_read_only_repository_refuses_everything_but_a_new_status() -> None:
    state = after(fresh(), e.StatusSet(availability=READ_ONLY, reason="moving house"))
    for event in (
        commit(1, FIRST_SNAPSHOT),
        e.BranchCreated(name="b", snapshot=FIRST_SNAPSHOT),
        e.TagDeleted(name="x"),
    ):
        with raises(ReadOnlyError, "read-only-repository", "moving"):
            after(state, event)
    assert after(state, e.StatusSet(availability=0), commit(1, FIRST_SNAPSHOT)).branch_tip("main") == an_id(1)


def test_nothing_follows_a_seal() -> None:
    state = after(fresh(), e.Sealed())
    for event in (commit(1, FIRST_SNAPSHOT), e.Void(), e.Sealed()):
        with pytest.raises(SessionStateError):
            after(state, event)


def test_an_entry_with_one_event_that_does_not_apply_is_void_as_a_whole() -> None:
    state = fresh()
    events = (commit(1, FIRST_SNAPSHOT), commit(2, FIRST_SNAPSHOT))
    assert try_apply_all(state, events, time_us=5, since_us=None) is None
    assert try_apply_all(state, (commit(1, FIRST_SNAPSHOT), commit(2, an_id(1))), time_us=5, since_us=None) is not None


def test_an_expiration_reparents_survivors_and_lists_the_released_snapshots() -> None:
    state = after(fresh(), commit(1, FIRST_SNAPSHOT), commit(2, an_id(1)), commit(3, an_id(2)))
    state = after(
        state,
        e.ExpirationRan(
            released=(an_id(1), an_id(2)),
            reparented=(
                e.Reparented(id=an_id(3), parent=FIRST_SNAPSHOT, pruned_ancestor_tx_logs=(an_id(1), an_id(2))),
            ),
        ),
    )
    assert [one.id for one in state.ancestry(an_id(3))] == [an_id(3), FIRST_SNAPSHOT]
    assert state.snapshots[an_id(3)].pruned_ancestor_tx_logs == (an_id(1), an_id(2))


@pytest.mark.parametrize("onto_first", [True, False])
def test_survivors_list_the_logs_of_the_ancestors_that_they_lose(onto_first: bool) -> None:
    state = after(fresh(), *(commit(i, an_id(i - 1) if i > 1 else FIRST_SNAPSHOT) for i in range(1, 7)))
    once = reparented(state.snapshots, {an_id(2), an_id(3)}, onto_first=onto_first)
    lost = (an_id(1), an_id(2), an_id(3)) if onto_first else (an_id(2), an_id(3))
    parent = FIRST_SNAPSHOT if onto_first else an_id(1)
    assert once == (e.Reparented(id=an_id(4), parent=parent, pruned_ancestor_tx_logs=lost),)
    released = (an_id(1), an_id(2), an_id(3)) if onto_first else (an_id(2), an_id(3))
    state = after(state, e.ExpirationRan(released=released, reparented=once))
    again = reparented(state.snapshots, {an_id(4), an_id(5)}, onto_first=onto_first)
    lost = (*lost, an_id(4), an_id(5)) if onto_first else (an_id(2), an_id(3), an_id(4), an_id(5))
    assert again == (e.Reparented(id=an_id(6), parent=parent, pruned_ancestor_tx_logs=lost),)


def test_an_expiration_may_name_an_id_twice() -> None:
    state = after(
        fresh(), e.DetachedSnapshotAdded(snapshot=record(1, None)), e.BranchCreated(name="b", snapshot=an_id(1))
    )
    state = after(state, e.ExpirationRan(released=(an_id(1), an_id(1)), deleted_branches=("b", "b")))
    assert set(state.snapshots) == {FIRST_SNAPSHOT}
    assert set(state.branches) == {"main"}


def rewritable() -> RepoState:
    """main: 1, 2; a tag at 1; a branch at 2; a detached child of 2."""
    return after(
        fresh(),
        commit(1, FIRST_SNAPSHOT),
        commit(2, an_id(1)),
        e.TagCreated(name="t", snapshot=an_id(1)),
        e.BranchCreated(name="also", snapshot=an_id(2)),
        e.DetachedSnapshotAdded(snapshot=record(3, an_id(2))),
    )


@pytest.mark.parametrize("keep", [False, True])
def test_rewritten_snapshots_take_the_place_of_the_old_ones_everywhere(keep: bool) -> None:
    before = rewritable()
    event = e.SnapshotsRewritten(replaced=((an_id(1), an_id(11)), (an_id(2), an_id(12))), keep=keep)
    state = after(before, event, time_us=7_000, since_us=0)
    assert state.branch_tip("main") == state.branch_tip("also") == an_id(12)
    assert state.tag_target("t") == an_id(11)
    assert [one.id for one in state.ancestry(an_id(3))] == [an_id(3), an_id(12), an_id(11), FIRST_SNAPSHOT]
    for old, new in event.replaced:
        known, instead = before.snapshots[old], state.snapshots[new]
        assert (instead.flushed_at_us, instead.message, instead.metadata) == (
            known.flushed_at_us,
            known.message,
            known.metadata,
        )
        assert rewritten_as(state, old) == (new if keep else old)
        assert (old in state.snapshots) is keep
    newest = state.updates.newest()
    assert [update.change for update in newest[:2]] == [
        stored.CommitAmended(branch="main", previous_snapshot=an_id(2), snapshot=an_id(12)),
        stored.CommitAmended(branch="also", previous_snapshot=an_id(2), snapshot=an_id(12)),
    ]
    assert newest[0].updated_at_us > newest[1].updated_at_us >= 7_000
    assert state.last_time_us >= newest[0].updated_at_us


def test_replaced_snapshots_stay_until_a_collection_whose_cutoff_is_after_the_rewriting() -> None:
    state = rewritable()
    event = e.SnapshotsRewritten(replaced=((an_id(1), an_id(11)), (an_id(2), an_id(12))), keep=True)
    state = after(state, event, time_us=7_000)
    assert an_id(2) in after(state, e.CollectionRan(cutoff_us=7_000)).snapshots
    assert set(after(state, e.CollectionRan(cutoff_us=9_000)).snapshots) == {FIRST_SNAPSHOT, an_id(11), an_id(12)}


def test_a_snapshot_that_was_rewritten_twice_is_found() -> None:
    state = after(rewritable(), e.SnapshotsRewritten(replaced=((an_id(2), an_id(12)),), keep=True))
    state = after(state, e.SnapshotsRewritten(replaced=((an_id(12), an_id(22)),), keep=True))
    assert rewritten_as(state, an_id(2)) == an_id(22)
    assert state.snapshots[an_id(22)].metadata == {"i": 2}


def test_a_rewriting_without_a_branch_at_a_replaced_snapshot_is_a_collection_in_the_ops_log() -> None:
    state = after(rewritable(), e.SnapshotsRewritten(replaced=((an_id(1), an_id(11)),), keep=False))
    assert next(iter(state.updates)).change == stored.GCRan()
    assert [one.id for one in state.ancestry(an_id(2))] == [an_id(2), an_id(11), FIRST_SNAPSHOT]


def test_a_rewriting_with_files_older_than_the_collection_cutoff_is_refused() -> None:
    state = after(rewritable(), e.CollectionRan(cutoff_us=7_000))
    for since_us in (6_999, None):
        with pytest.raises(SessionStateError) as caught:
            after(state, e.SnapshotsRewritten(replaced=((an_id(1), an_id(11)),), keep=False), since_us=since_us)
        assert caught.value.kind == "commit-not-allowed"


def test_feature_flags_go_on_off_and_back_to_their_default() -> None:
    state = after(fresh(), e.FeatureFlagSet(flag=3, value=False), e.FeatureFlagSet(flag=4, value=True))
    assert (state.enabled_feature_flags, state.disabled_feature_flags) == (frozenset({4}), frozenset({3}))
    state = after(state, e.FeatureFlagSet(flag=3, value=None))
    assert state.disabled_feature_flags == frozenset()


@settings(max_examples=200)
@given(st.lists(EVENTS, max_size=12), st.integers(0, 9000))
def test_any_sequence_folds_to_a_state_that_holds_together(events: list[e.Event], time_us: int) -> None:
    state = fresh()
    for event in events:
        try:
            state = apply(state, event, time_us=time_us, since_us=5000)
        except IcechunkError:
            continue
    assert "main" in state.branches
    for target in (*state.branches.values(), *state.tags.values()):
        assert target in state.snapshots
    for one in state.snapshots.values():
        assert one.parent is None or one.parent in state.snapshots
    times = [update.updated_at_us for update in state.updates]
    assert times == sorted(set(times), reverse=True)
    assert not set(state.tags) & set(state.deleted_tags)
    assert from_repo_info(to_repo_info(state)) == replace(state, gc_cutoff_us=0)


def test_an_entry_is_not_void_because_a_file_is_damaged() -> None:
    """Whether its events apply is not known then, and two readers must not differ."""
    state = after(fresh(), commit(1, FIRST_SNAPSHOT))
    version, payload = unseal(encode_repo(to_repo_info(state)), FileType.REPO_INFO)
    at = payload[:].index(b"m1")
    damaged = from_repo_info(decode_repo(seal(FileType.REPO_INFO, version, payload[:at] + b"\xff" + payload[at + 1 :])))
    with pytest.raises(FormatError):
        try_apply_all(damaged, (commit(2, an_id(1)),), time_us=9000, since_us=None)


def test_a_state_based_on_its_file_is_equal_and_drops_updates_that_are_in_a_backup() -> None:
    state = after(fresh(), commit(1, FIRST_SNAPSHOT))
    written = encode_and_keep(to_repo_info(state, updates=state.updates.newest(1), repo_before_updates="repo.x"))
    later = after(state, commit(2, an_id(1)))
    for by_us in (state, None):
        resting = resting_on(later, written.info, by_us)
        assert resting.snapshots == later.snapshots
        assert [*resting.updates] == [*later.updates][:2]
        assert replace(resting, updates=later.updates, repo_before_updates=None) == later
        assert resting.repo_before_updates == "repo.x"


def test_updates_are_packed_before_they_are_many() -> None:
    log = UpdateLog.of()
    for i in range(2000):
        log = log.pushed(stored.Update(change=stored.GCRan(), updated_at_us=i))
        assert len(log.fresh) < 600
    assert [update.updated_at_us for update in log] == list(range(1999, -1, -1))


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_ops_log_is_persistent_and_finds_newer_updates(n: int, after_n: int) -> None:
    log = UpdateLog.of()
    versions = []
    for i in range(n):
        versions.append(log)
        log = log.pushed(stored.Update(change=stored.GCRan(), updated_at_us=i))
    assert [len(version) for version in versions] == list(range(n))
    assert [update.updated_at_us for update in log.newer_than(after_n)] == list(range(n - 1, after_n, -1))
