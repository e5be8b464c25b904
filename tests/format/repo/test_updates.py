from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from icechunk.errors import FormatError
from icechunk.format.envelope import FileType, seal, unseal
from icechunk.format.ids import ObjectId
from icechunk.format.repo.codec import GCRan, NewCommit, RepoInfo, Status, Update, decode_repo, encode_repo
from icechunk.format.repo.updates import UpdateList
from tests.raising import raises
from tools.fuzz.strategies import updates

STATUS = Status(set_at_us=0)


def commit(i: int, backup: str | None = None) -> Update:
    return Update(
        change=NewCommit(branch="main", snapshot=ObjectId(i.to_bytes(12))), updated_at_us=i, backup_path=backup
    )


def stored(newest_first: list[Update]) -> UpdateList:
    found = decode_repo(encode_repo(RepoInfo(status=STATUS, updates=newest_first))).updates
    assert isinstance(found, UpdateList)
    return found


LISTS = st.lists(st.integers(0, 3).map(commit) | updates, max_size=6)


@pytest.fixture(autouse=True, params=[0, 12], ids=["by column", "one by one"])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few updates are copied another way than many."""
    monkeypatch.setattr("icechunk.format.repo.update_encoding._FEW", request.param)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(LISTS, LISTS, st.integers(-9, 9), st.integers(-9, 9), st.text(max_size=3))
def test_a_list_equals_a_tuple_after_any_files(
    old: list[Update], new: list[Update], first: int, end: int, backup: str
) -> None:
    joined, model = stored(old).after(new), (*new, *old)
    for _ in range(2):
        assert joined == model
        assert (len(joined), [*joined], (*joined[first:end],)) == (len(model), [*model], model[first:end])
        assert joined[first:end] == model[first:end]
        assert joined[::-1] == model[::-1]
        if -len(model) <= first < len(model):
            assert joined[first] == model[first]
        else:
            with pytest.raises(IndexError):
                joined[first]
        settled = [one if one.backup_path is not None else replace(one, backup_path=backup) for one in model]
        assert joined.with_backup(backup) == settled
        assert stored([*joined.with_backup(backup)]) == settled
        assert decode_repo(encode_repo(RepoInfo(status=STATUS, updates=joined.with_backup(backup)))).updates == settled
        assert decode_repo(encode_repo(RepoInfo(status=STATUS, updates=joined[first:end]))).updates == model[first:end]
        assert joined.packed(2) == model
        joined = stored([*joined])


def test_commits_are_written_again_without_being_decoded() -> None:
    log = stored([commit(i, f"repo.{i}" if i % 3 else None) for i in range(1000, 0, -1)])
    longer = log.after([Update(change=GCRan(), updated_at_us=1001)])
    again = decode_repo(encode_repo(RepoInfo(status=STATUS, updates=longer[:900]))).updates
    assert log.read_count == 0
    assert again[0] == Update(change=GCRan(), updated_at_us=1001)
    assert [one.updated_at_us for one in again] == list(range(1001, 101, -1))
    assert again[2] == commit(999, None)
    assert again[3] == commit(998, "repo.998")


def test_a_damaged_update_fails_only_the_reads_of_that_update() -> None:
    middle_us = 0x0102030405060708
    info = RepoInfo(status=STATUS, updates=[commit(3), Update(change=GCRan(), updated_at_us=middle_us), commit(1)])
    version, payload = unseal(encode_repo(info), FileType.REPO_INFO)
    # After its time come the offset of the change, and its type: 13 is a collection, 99 is unknown.
    at = payload[:].index(middle_us.to_bytes(8, "little")) + 8 + 4
    assert payload[at] == 13
    found = decode_repo(seal(FileType.REPO_INFO, version, payload[:at] + b"\x63" + payload[at + 1 :])).updates
    assert (found[0], found[2]) == (commit(3), commit(1))
    with raises(FormatError, "unsupported-spec-version", 99):
        found[1]
    with raises(FormatError, "unsupported-spec-version", 99):
        encode_repo(replace(info, updates=found))
