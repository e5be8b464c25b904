"""Value classes of history, status, conflicts and virtual references."""

from __future__ import annotations

import pickle
import re
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from icechunk import errors
from icechunk.conflicts import (
    BasicConflictSolver,
    Conflict,
    ConflictDetector,
    ConflictSolver,
    ConflictType,
    RebaseFailedError,
    VersionSelection,
)
from icechunk.errors import ConflictError, IcechunkError, InvalidInputError
from icechunk.ops import (
    Attribution,
    ChunkStorageStats,
    FeatureFlag,
    GCSummary,
    RepoAvailability,
    RepoStatus,
    SessionMode,
    SpecVersion,
    Update,
    UpdateType,
)
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import Setting, redacted_url, unset
from icechunk.snapshots import Diff, ManifestFileInfo, SnapshotInfo
from icechunk.virtual import ChunkType, VirtualChunkSpec
from tests.raising import raises

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
STATUS = RepoStatus(RepoAvailability.read_only, NOW, "why")
VALUES: list[Any] = [
    STATUS,
    Attribution(client="c/1"),
    FeatureFlag(id=3, name="move_node", default_enabled=True),
    SnapshotInfo(id="X", parent_id=None, written_at=NOW, message="m", metadata={"a": [1]}),
    ManifestFileInfo(id="X", size_bytes=1, num_chunk_refs=2),
    Diff(new_groups={"/"}, updated_chunks={"/a": [[1, 2]]}, moved_nodes=[("/a", "/b")]),
    GCSummary(chunks_deleted=3, delete_errors=["x"]),
    ChunkStorageStats(native_bytes=1, virtual_bytes=2, inlined_bytes=3),
    UpdateType.NewCommit("main", "X"),
    UpdateType.RepoStatusChanged(STATUS),
    Update(kind=UpdateType.GCRan(), updated_at=NOW),
    Conflict(ConflictType.ChunkDoubleUpdate, "/a", [[1, 2]]),
    BasicConflictSolver(on_chunk_conflict=VersionSelection.Fail),
    ConflictDetector(),
    VirtualChunkSpec([1, 2], "s3://b/x", 0, 5, "etag", NOW),
    SpecVersion.v1,
    SessionMode.rearrange,
    ChunkType.inline,
    VersionSelection.UseOurs,
    ConflictType.ChunkDoubleUpdate,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__qualname__)
def test_values_pickle_compare_and_show_themselves(value: Any) -> None:
    assert pickle.loads(pickle.dumps(value)) == value
    assert value != object()
    assert repr(value)
    assert str(value)


def test_spec_versions_are_ordered_among_themselves_and_with_numbers() -> None:
    assert SpecVersion.v1 < SpecVersion.v2
    assert SpecVersion.v1 <= 1 < SpecVersion.v2
    assert SpecVersion.v2 >= SpecVersion.v2 > 1
    assert SpecVersion.current() is max(SpecVersion.v1, SpecVersion.v2) is SpecVersion.v2
    assert repr(SpecVersion.v2) == "SpecVersion.v2 (current)"


def test_enums_equal_their_number_where_the_official_ones_do() -> None:
    assert ChunkType.virtual == 2
    assert RepoAvailability.read_only == 1
    assert SessionMode.writable != 1
    assert VersionSelection.UseOurs != 1
    assert ConflictType.ChunkDoubleUpdate != 6
    assert int(ConflictType.ChunkDoubleUpdate) == 6
    assert ConflictType(6) is ConflictType.ChunkDoubleUpdate
    assert str(ConflictType.ChunkDoubleUpdate) == "Chunk double update"
    assert repr(ConflictType.ChunkDoubleUpdate) == "ChunkDoubleUpdate"


def test_a_status_is_of_now_unless_said_otherwise() -> None:
    before = datetime.now(UTC)
    assert before <= RepoStatus(RepoAvailability.online).set_at <= datetime.now(UTC)
    with pytest.raises(TypeError, match=re.escape("RepoStatus.set_at")):
        RepoStatus(RepoAvailability.online, datetime(2026, 1, 1))
    with pytest.raises(TypeError):
        RepoStatus(1)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        STATUS.availability = RepoAvailability.online  # type: ignore[misc]


def test_a_feature_flag_without_a_setting_has_its_default() -> None:
    assert FeatureFlag(id=3, name="n", default_enabled=True).enabled
    assert not FeatureFlag(id=3, name="n", default_enabled=True, setting=False).enabled


@pytest.mark.parametrize("good", ["a", "a/1.0", "A_b-c.d+e!#$%&'*^`|~", "x" * 128])
def test_clients_are_a_name_with_an_optional_version(good: str) -> None:
    assert Attribution(client=good).client == good


@pytest.mark.parametrize("bad", ["", "a/1/2", "a b", "é", "/1", "a/", "x@y", "a:b", "a(b)", "x" * 129, "a\nb"])
def test_client_names_that_do_not_fit_a_header_are_refused(bad: str) -> None:
    with pytest.raises(InvalidInputError):
        Attribution(client=bad)


@pytest.mark.parametrize("name", ["workload", "principal"])
def test_workloads_and_principals_are_printable_ascii(name: str) -> None:
    for good in ("", "a b", "x@y.z", "a:b/c/"):
        assert getattr(Attribution(**{name: good}), name) == good
    for bad in ("é", "a(b)", "a;b", "a=b", 'a"b', "a\\b", "x" * 129, "a\nb"):
        with raises(InvalidInputError, "invalid-setting", name):
            Attribution(**{name: bad})


def test_kinds_of_update_are_update_types_and_match_by_position() -> None:
    kind: Any = UpdateType.BranchDeleted("b", "X")
    assert isinstance(kind, UpdateType)
    assert repr(kind) == 'icechunk.ops.UpdateType.BranchDeleted(name="b", previous_snap_id="X")'
    match kind:
        case UpdateType.BranchDeleted(name, snapshot):
            assert (name, snapshot) == ("b", "X")
        case _:
            pytest.fail("not matched")


def test_storage_stats_add_up() -> None:
    stats = ChunkStorageStats(native_bytes=1, virtual_bytes=2, inlined_bytes=3)
    assert stats.total_bytes() == 6
    assert stats.non_virtual_bytes() == 4
    assert stats + stats == ChunkStorageStats(native_bytes=2, virtual_bytes=4, inlined_bytes=6)
    with pytest.raises(TypeError):
        stats + 3  # type: ignore[operator]


def test_a_diff_is_plain_values_of_the_changes() -> None:
    empty: dict[str, Any] = dict.fromkeys(
        ("new_groups", "deleted_groups", "deleted_arrays", "updated_groups", "updated_arrays"), frozenset()
    )
    changes = SimpleNamespace(
        **empty,
        new_arrays=frozenset({"/a"}),
        updated_chunks={"/a": np.array([[0, 1], [2, 3]], dtype="u4")},
        moved_nodes=(("/x", "/y"),),
    )
    diff = Diff.of(changes)
    assert diff.updated_chunks == {"/a": [[0, 1], [2, 3]]}
    assert diff.new_arrays == {"/a"}
    assert not diff.is_empty()
    assert str(diff).splitlines()[:2] == ["Nodes moved/renamed:", "    /x -> /y"]
    assert Diff().is_empty()
    assert str(Diff()) == "No changes\n"
    assert "<b>" not in Diff(new_groups={"/<b>"})._repr_html_()


def test_virtual_chunk_specs_refuse_values_that_cannot_be_stored() -> None:
    assert VirtualChunkSpec((1, 2), "s3://b/x", 0, 5).index == [1, 2]  # type: ignore[arg-type]
    for arguments in (([-1], "x", 0, 1), ([2**32], "x", 0, 1), ([1], "x", -1, 1), ([1], "x", 0, 2**64)):
        with pytest.raises(InvalidInputError):
            VirtualChunkSpec(*arguments)
    with pytest.raises(TypeError, match=re.escape("VirtualChunkSpec.last_updated_at_checksum")):
        VirtualChunkSpec([1], "x", 0, 1, None, datetime(2026, 1, 1))
    assert "SECRET" not in repr(VirtualChunkSpec([1], "https://u:SECRET@h/x?sig=SECRET", 0, 1))


def test_solvers_are_chosen_among_two() -> None:
    solver = BasicConflictSolver()
    assert isinstance(solver, ConflictSolver)
    assert isinstance(ConflictDetector(), ConflictSolver)
    assert solver.on_chunk_conflict is VersionSelection.UseOurs
    with pytest.raises(TypeError):
        ConflictSolver()
    with pytest.raises(TypeError):
        BasicConflictSolver(on_chunk_conflict=1)  # type: ignore[arg-type]


def test_a_pickled_rebase_failure_keeps_its_conflicts() -> None:
    conflicts = [Conflict(ConflictType.ChunkDoubleUpdate, "/a", [[1]])]
    error = RebaseFailedError("SNAP", conflicts)
    assert isinstance(error, ConflictError)
    assert error.args == ("SNAP", conflicts)
    assert error.kind == "rebase-failed"
    assert error.expected_parent is None
    again = pickle.loads(pickle.dumps(error))
    assert (again.snapshot, again.conflicts, str(again)) == ("SNAP", conflicts, str(error))


def test_every_error_pickles_with_its_kind() -> None:
    classes = [getattr(errors, name) for name in errors.__all__]
    for cls in classes:
        if isinstance(cls, type) and issubclass(cls, IcechunkError):
            error = cls("m")
            again = pickle.loads(pickle.dumps(error))
            assert (type(again), str(again), again.kind) == (cls, str(error), error.kind)


@pytest.mark.parametrize(
    "url", ["s3:///x", "file:///x", "s3://b/x", "memory:", "/data/repo|icechunk:@tag.v1", "./repo"]
)
def test_urls_without_secrets_are_shown_as_they_are(url: str) -> None:
    assert redacted_url(url) == url


def test_a_default_that_is_shown_in_the_place_of_none_is_made_when_it_is_shown() -> None:
    made = []

    def default() -> int:
        made.append(1)
        return 7

    @dataclass(slots=True, repr=False)
    class Settings(Setting):
        late: int | None = unset(default)
        early: int | None = unset(8)
        none: int | None = unset()

    assert made == []
    assert str(Settings()).splitlines()[1:] == ["late: 7 (default)", "early: 8 (default)", "none: None"]
    assert str(Settings(late=1)).splitlines()[1] == "late: 1"
