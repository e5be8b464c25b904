from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.errors import InvalidInputError
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.repo import codec
from icechunk.format.repo.codec import RepoInfo, SnapshotRecord, Status, decode_repo, encode_repo
from tests.raising import raises
from tools.fuzz.strategies import repo_infos

OTHER = ObjectId(b"o" * 12)


@settings(max_examples=80)
@given(repo_infos())
def test_repo_infos_come_back_as_they_were(info: RepoInfo) -> None:
    again = decode_repo(encode_repo(info))
    assert again == info
    assert list(again.snapshots) == list(info.snapshots)
    assert list(again.branches) == sorted(info.branches, key=str.encode)


def record(id: ObjectId, parent: ObjectId | None) -> SnapshotRecord:
    return SnapshotRecord(id=id, parent=parent, flushed_at_us=1, message="m")


def test_a_branch_without_its_snapshot_is_refused() -> None:
    info = RepoInfo(branches={"main": OTHER}, snapshots={}, status=Status(set_at_us=0))
    with raises(InvalidInputError, "serialization", "'main'"):
        encode_repo(info)


@settings(max_examples=80)
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=9), st.sampled_from([FIRST_SNAPSHOT, OTHER])))
def test_many_branches_are_written_as_a_few_are(branches: dict[str, ObjectId]) -> None:
    info = RepoInfo(
        branches=branches,
        tags=dict.fromkeys(branches, OTHER),
        snapshots={id: record(id, None) for id in (FIRST_SNAPSHOT, OTHER)},
        status=Status(set_at_us=0),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_FEW_REFS", len(branches))
        expected = encode_repo(info)
        patch.setattr(codec, "_FEW_REFS", 0)
        assert encode_repo(info) == expected
    assert decode_repo(expected).branches == branches


def test_a_missing_parent_becomes_none() -> None:
    info = RepoInfo(snapshots={OTHER: record(OTHER, FIRST_SNAPSHOT)}, status=Status(set_at_us=0))
    assert decode_repo(encode_repo(info)).snapshots[OTHER].parent is None


def test_absent_flags_and_empty_flags_stay_different() -> None:
    info = RepoInfo(status=Status(set_at_us=0), enabled_feature_flags=frozenset())
    again = decode_repo(encode_repo(info))
    assert again.enabled_feature_flags == frozenset()
    assert again.disabled_feature_flags is None
