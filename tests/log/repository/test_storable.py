"""A checkpoint can hold everything that the fold accepts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import IcechunkError, InvalidInputError
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.format.repo.codec import decode_repo, encode_repo
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.log.repository import events as e
from icechunk.log.repository.entry import decode_entry, encode_entry
from icechunk.log.repository.event_json import encode_events
from icechunk.log.repository.marker import checkpoint_info, decode_marker, state_of
from icechunk.log.repository.queue import build, proposal_of
from icechunk.log.repository.state import LAST_TIME_US, RepoState, apply, initial_state, to_repo_info, try_apply_all
from tests.log.repository.strategies import an_id

NUMBERS = st.integers(-2, 4) | st.sampled_from([255, 256, 65_535, 65_536, LAST_TIME_US, LAST_TIME_US + 1, 2**63])
TEXTS = st.text(st.characters(exclude_categories=()), max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | TEXTS | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=5,
)
METADATA = st.dictionaries(TEXTS, VALUES, max_size=2)
RECORDS = st.builds(
    SnapshotRecord, id=st.just(an_id(1)), parent=st.just(FIRST_SNAPSHOT), flushed_at_us=NUMBERS, message=TEXTS,
    metadata=METADATA,
)  # fmt: skip
WILD = st.one_of(
    st.builds(e.CommitAdded, branch=st.just("main"), snapshot=RECORDS),
    st.builds(e.DetachedSnapshotAdded, snapshot=RECORDS),
    st.builds(e.BranchCreated, name=TEXTS, snapshot=st.just(FIRST_SNAPSHOT)),
    st.builds(e.TagCreated, name=TEXTS, snapshot=st.just(FIRST_SNAPSHOT)),
    st.builds(e.ConfigReplaced, config=VALUES),
    st.builds(e.MetadataReplaced, metadata=METADATA),
    st.builds(e.MetadataUpdated, metadata=METADATA),
    st.builds(e.StatusSet, availability=NUMBERS, reason=st.none() | TEXTS),
    st.builds(e.FeatureFlagSet, flag=NUMBERS, value=st.none() | st.booleans()),
    st.builds(e.CollectionRan, cutoff_us=NUMBERS),
    st.builds(e.RepositoryMigrated, from_version=NUMBERS, to_version=NUMBERS),
)


def fresh() -> RepoState:
    root = SnapshotRecord(id=FIRST_SNAPSHOT, parent=None, flushed_at_us=0, message="", metadata={})
    return initial_state(root, time_us=0, config=None)


def canonical(value: object) -> object:
    """Without the order of keys, and with NaN equal to NaN."""
    match value:
        case dict():
            return [[key, canonical(value[key])] for key in sorted(value)]
        case list():
            return [canonical(item) for item in value]
        case float():
            return repr(value)
        case SnapshotRecord():
            return [replace(value, metadata={}), canonical(value.metadata)]
    return value


@settings(max_examples=150)
@given(st.lists(WILD, max_size=4), NUMBERS)
def test_every_event_that_the_fold_accepts_is_written_to_a_checkpoint_and_read_back_equal(
    events: list[e.Event], time_us: int
) -> None:
    state = fresh()
    for event in events:
        # As decoded from an entry, and as given by a caller that bypasses entries.
        try:
            decoded = decode_entry(
                encode_entry(n=1, nonce=b"x" * 16, time_us=max(0, time_us), since_us=1, events=encode_events([event])),
                n=1,
            )
        except (IcechunkError, ValueError, TypeError):
            continue
        state = try_apply_all(state, decoded.events, time_us=decoded.time_us, since_us=LAST_TIME_US) or state
    info = checkpoint_info(state, epoch="E", n=1)
    found = decode_repo(encode_repo(info))
    assert canonical(dict(found.snapshots)) == canonical(dict(info.snapshots))
    assert canonical(found.metadata) == canonical(info.metadata)
    assert canonical(found.config) == canonical(info.config)
    assert (found.branches, found.tags, found.updates) == (info.branches, info.tags, info.updates)
    assert found.enabled_feature_flags == info.enabled_feature_flags
    again = state_of(found, decode_marker(found.extra))
    assert (again.status, again.gc_cutoff_us, again.last_time_us) == (
        state.status, state.gc_cutoff_us, state.last_time_us,
    )  # fmt: skip


@settings(max_examples=80)
@given(WILD)
def test_an_event_that_came_through_no_entry_is_refused_as_well(event: e.Event) -> None:
    try:
        state = apply(fresh(), event, time_us=1, since_us=LAST_TIME_US)
    except IcechunkError:
        return
    again = decode_repo(encode_repo(to_repo_info(state)))
    assert (again.branches, again.tags) == (dict(state.branches), dict(state.tags))
    assert canonical(again.metadata) == canonical(dict(state.metadata))


BAD = [
    e.MetadataUpdated(metadata={"a\0b": 1}),
    e.MetadataReplaced(metadata={"a": {"b": [{"\0": 1}]}}),
    e.ConfigReplaced(config={"\0bytes": "AA=="}),
    e.ConfigReplaced(config={"a": "\ud800"}),
    e.MetadataUpdated(metadata={"\udfff": 1}),
    e.MetadataUpdated(metadata={"a": 2**64}),
    e.MetadataUpdated(metadata={"a": -(2**63) - 1}),
    e.BranchCreated(name="\ud800", snapshot=FIRST_SNAPSHOT),
    e.TagCreated(name="\ud800", snapshot=FIRST_SNAPSHOT),
    e.StatusSet(availability=3),
    e.StatusSet(availability=300),
    e.StatusSet(availability=1, reason="\ud800"),
    e.FeatureFlagSet(flag=70_000, value=True),
    e.RepositoryMigrated(from_version=1, to_version=256),
    e.CollectionRan(cutoff_us=LAST_TIME_US + 1),
    e.DetachedSnapshotAdded(
        snapshot=SnapshotRecord(id=an_id(1), parent=None, flushed_at_us=1, message="\ud800", metadata={})
    ),
    e.DetachedSnapshotAdded(
        snapshot=SnapshotRecord(id=an_id(1), parent=None, flushed_at_us=2**62, message="", metadata={})
    ),
]


@pytest.mark.parametrize("event", BAD, ids=repr)
def test_events_that_a_checkpoint_cannot_hold_are_refused_before_an_entry_is_built(event: e.Event) -> None:
    with pytest.raises(InvalidInputError):
        apply(fresh(), event, time_us=1, since_us=None)
    waiting: Any = SimpleNamespace(proposal=proposal_of(lambda state: [event]), since_us=None, files={})
    group = build(fresh(), [waiting], time_us=1)
    assert not group.members
    assert isinstance(group.refused[0][1], InvalidInputError)


def test_configuration_may_be_nested_as_deep_as_a_checkpoint_holds_and_no_deeper() -> None:
    def nested(depth: int) -> object:
        return {"a": nested(depth - 1)} if depth else 1

    state = apply(fresh(), e.ConfigReplaced(config=nested(100)), time_us=1, since_us=None)
    assert decode_repo(encode_repo(to_repo_info(state))).config == nested(100)
    with pytest.raises(InvalidInputError):
        apply(fresh(), e.ConfigReplaced(config=nested(101)), time_us=1, since_us=None)


def test_an_entry_with_a_time_after_the_year_9999_is_void() -> None:
    assert try_apply_all(fresh(), (e.MetadataUpdated(metadata={}),), time_us=LAST_TIME_US + 1, since_us=None) is None
