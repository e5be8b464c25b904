"""Events of every kind, small enough to collide often."""

from __future__ import annotations

from hypothesis import strategies as st

from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.log.repository import events as e


def an_id(i: int) -> ObjectId:
    return ObjectId(i.to_bytes(12))


NAMES = st.sampled_from(["main", "a", "b", "é/.."])
IDS = st.integers(1, 6).map(an_id) | st.just(FIRST_SNAPSHOT)
RECORDS = st.builds(
    SnapshotRecord,
    id=IDS,
    parent=IDS,
    flushed_at_us=st.integers(1000, 1010),
    message=st.text(max_size=3),
    metadata=st.dictionaries(st.text(max_size=2), st.integers() | st.binary(max_size=2), max_size=1),
)
EVENTS = st.one_of(
    st.builds(e.CommitAdded, branch=NAMES, snapshot=RECORDS),
    st.builds(e.CommitAmended, branch=NAMES, previous=IDS, snapshot=RECORDS),
    st.builds(e.DetachedSnapshotAdded, snapshot=RECORDS),
    st.builds(e.BranchCreated, name=NAMES, snapshot=IDS),
    st.builds(e.BranchReset, name=NAMES, snapshot=IDS, expected=st.none() | IDS),
    st.builds(e.BranchDeleted, name=NAMES),
    st.builds(e.TagCreated, name=NAMES, snapshot=IDS),
    st.builds(e.TagDeleted, name=NAMES),
    st.builds(e.MetadataUpdated, metadata=st.dictionaries(NAMES, st.none() | st.floats(allow_nan=False), max_size=2)),
    st.builds(e.StatusSet, availability=st.integers(0, 2), reason=st.none() | NAMES),
    st.builds(e.FeatureFlagSet, flag=st.integers(0, 9), value=st.none() | st.booleans()),
    st.builds(e.CollectionRan, cutoff_us=st.integers(0, 1010)),
    st.builds(e.SnapshotsRewritten, replaced=st.lists(st.tuples(IDS, IDS), max_size=2).map(tuple), keep=st.booleans()),
    st.builds(e.ExpirationRan, released=st.lists(IDS, max_size=2).map(tuple)),
    st.just(e.Void(nonce=b"\0" * 16)),
)
