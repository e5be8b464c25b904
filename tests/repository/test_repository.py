"""The repository's API, on memory, local disk and S3."""

from __future__ import annotations

import contextlib
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import zarr

import icechunk
from icechunk.config import RepositoryConfig
from icechunk.errors import (
    AlreadyExistsError,
    ConflictError,
    ErrorKind,
    IcechunkError,
    InvalidInputError,
    ReadOnlyError,
    RefNotFoundError,
    RepositoryNotFoundError,
    SessionStateError,
    SnapshotNotFoundError,
)
from icechunk.log.repository.port import Layout
from icechunk.repository import Repository
from icechunk.runtime.checks import WrongTypeError
from icechunk.runtime.twins import run_sync
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from tests.inside import core_of
from tests.raising import raises

UNKNOWN = "00000000000000000000"


@pytest.fixture
def memory() -> Repository:
    return Repository.create(MemoryStorage())


def commit(repository: Repository, value: int, branch: str = "main", **arguments: Any) -> str:
    session = repository.writable_session(branch)
    zarr.open_group(session.store, mode="a").attrs["value"] = value
    return session.commit(f"value {value}", **arguments)


def value_of(session: icechunk.Session) -> object:
    return zarr.open_group(session.store, mode="r").attrs["value"]


# -- coming into being -------------------------------------------------------------------------------------------------


def test_create_open_and_exists(storage: Storage) -> None:
    assert not Repository.exists(storage)
    assert Repository.fetch_spec_version(storage) is None
    with raises(RepositoryNotFoundError, "repository-not-found", storage.describe()):
        Repository.open(storage)
    created = Repository.create(storage)
    assert Repository.exists(storage)
    assert Repository.fetch_spec_version(storage) == 2
    first = created.lookup_branch("main")
    assert Repository.open(storage).lookup_branch("main") == first == "1CECHNKREP0F1RSTCMT0"
    assert Repository.open_or_create(storage).lookup_branch("main") == first
    assert created.layout is Layout.LOG
    assert created.spec_version == 2
    with pytest.raises(InvalidInputError) as refused:
        Repository.create(storage)
    assert refused.value.kind == ErrorKind.PARENT_DIRECTORY_NOT_CLEAN
    with raises(AlreadyExistsError, "parent-directory-not-clean", storage.describe()):
        Repository.create(storage, check_clean_root=False)


def test_open_or_create_creates_where_there_is_nothing(storage: Storage) -> None:
    commit(Repository.open_or_create(storage), 1)
    assert value_of(Repository.open_or_create(storage).readonly_session("main")) == 1


def test_a_change_of_one_client_is_seen_by_another_at_its_next_call(storage: Storage) -> None:
    ours = Repository.create(storage)
    theirs = Repository.open(storage)
    snapshot_id = commit(ours, 1)
    assert theirs.lookup_branch("main") == snapshot_id
    assert value_of(theirs.readonly_session("main")) == 1
    ours.create_tag("v1", snapshot_id)
    assert theirs.list_tags() == {"v1"}


# -- configuration -----------------------------------------------------------------------------------------------------


def test_the_callers_options_take_precedence_over_the_persisted_ones(storage: Storage) -> None:
    with raises(RepositoryNotFoundError, "repository-not-found", storage.describe()):
        Repository.fetch_config(storage)
    created = Repository.create(storage, RepositoryConfig(inline_chunk_threshold_bytes=7, max_concurrent_requests=3))
    assert created.config.inline_chunk_threshold_bytes == 7
    fetched = Repository.fetch_config(storage)
    assert fetched is not None
    assert fetched.inline_chunk_threshold_bytes == 7
    opened = Repository.open(storage, RepositoryConfig(inline_chunk_threshold_bytes=9))
    assert (opened.config.inline_chunk_threshold_bytes, opened.config.max_concurrent_requests) == (9, 3)
    again = opened.reopen(RepositoryConfig(max_concurrent_requests=4))
    assert (again.config.inline_chunk_threshold_bytes, again.config.max_concurrent_requests) == (9, 4)
    # Nothing was saved on the way.
    assert Repository.fetch_config(storage) == fetched


def test_a_repository_created_without_options_persists_none() -> None:
    storage = MemoryStorage()
    Repository.create(storage)
    assert Repository.fetch_config(storage) is None


def test_a_saved_configuration_is_used_by_the_next_open(storage: Storage) -> None:
    Repository.create(storage)
    Repository.open(storage, RepositoryConfig(inline_chunk_threshold_bytes=11)).save_config()
    assert Repository.open(storage).config.inline_chunk_threshold_bytes == 11


def test_saving_over_a_configuration_of_another_client_is_a_conflict() -> None:
    storage = MemoryStorage()
    Repository.create(storage)
    mine = Repository.open(storage, RepositoryConfig(inline_chunk_threshold_bytes=1))
    theirs = Repository.open(storage, RepositoryConfig(inline_chunk_threshold_bytes=2))
    theirs.save_config()
    with pytest.raises(ConflictError) as conflict:
        mine.save_config()
    assert conflict.value.kind == ErrorKind.CONFIG_UPDATED
    theirs.save_config()
    again = mine.reopen()
    again.save_config()
    saved = Repository.fetch_config(storage)
    assert saved is not None
    assert saved.inline_chunk_threshold_bytes == 1


def test_options_that_no_repository_can_work_with_are_refused_before_anything_is_written() -> None:
    storage = MemoryStorage()
    with pytest.raises(InvalidInputError):
        Repository.create(storage, RepositoryConfig(max_concurrent_requests=0))
    assert not Repository.exists(storage)
    repository = Repository.create(storage)
    with pytest.raises(InvalidInputError):
        Repository.open(storage, RepositoryConfig(max_concurrent_requests=0))
    with pytest.raises(InvalidInputError):
        repository.reopen(RepositoryConfig(max_concurrent_requests=0))


# -- branches and tags -------------------------------------------------------------------------------------------------


def test_branches_are_created_listed_reset_and_deleted(storage: Storage) -> None:
    repository = Repository.create(storage)
    first = repository.lookup_branch("main")
    second = commit(repository, 1)
    repository.create_branch("dev", first)
    assert repository.list_branches() == {"main", "dev"}
    third = commit(repository, 2, "dev")
    assert repository.lookup_branch("dev") == third
    assert repository.lookup_branch("main") == second
    repository.reset_branch("dev", second, from_snapshot_id=third)
    assert repository.lookup_branch("dev") == second
    with pytest.raises(ConflictError) as conflict:
        repository.reset_branch("dev", first, from_snapshot_id=third)
    assert conflict.value.kind == ErrorKind.BRANCH_UPDATE_CONFLICT
    assert (conflict.value.expected_parent, conflict.value.actual_parent) == (third, second)
    repository.delete_branch("dev")
    assert repository.list_branches() == {"main"}
    # The snapshots of a deleted branch stay.
    assert repository.lookup_snapshot(third).message == "value 2"
    repository.create_branch("dev", third)
    assert value_of(repository.readonly_session("dev")) == 2


def test_the_name_of_a_deleted_tag_is_never_used_again(storage: Storage) -> None:
    repository = Repository.create(storage)
    first, second = repository.lookup_branch("main"), commit(repository, 1)
    repository.create_tag("v1", first)
    assert repository.lookup_tag("v1") == first
    with pytest.raises(AlreadyExistsError) as refused:
        repository.create_tag("v1", second)
    assert refused.value.kind == ErrorKind.TAG_ALREADY_EXISTS
    repository.delete_tag("v1")
    assert repository.list_tags() == set()
    with pytest.raises(AlreadyExistsError) as refused:
        Repository.open(storage).create_tag("v1", second)
    assert refused.value.kind == ErrorKind.TAG_PREVIOUSLY_DELETED
    with pytest.raises(RefNotFoundError):
        repository.delete_tag("v1")


def test_unknown_names_and_ids_are_refused_by_name(memory: Repository) -> None:
    first = memory.lookup_branch("main")
    refusals: list[tuple[Any, type[IcechunkError], str]] = [
        (lambda: memory.lookup_branch("nope"), RefNotFoundError, "nope"),
        (lambda: memory.lookup_tag("nope"), RefNotFoundError, "nope"),
        (lambda: memory.delete_branch("nope"), RefNotFoundError, "nope"),
        (lambda: memory.delete_tag("nope"), RefNotFoundError, "nope"),
        (lambda: memory.reset_branch("nope", first), RefNotFoundError, "nope"),
        (lambda: memory.writable_session("nope"), RefNotFoundError, "nope"),
        (lambda: memory.readonly_session("nope"), RefNotFoundError, "nope"),
        (lambda: memory.readonly_session(tag="nope"), RefNotFoundError, "nope"),
        (lambda: memory.readonly_session("nope", as_of=datetime.now(UTC)), RefNotFoundError, "nope"),
        (lambda: list(memory.ancestry(branch="nope")), RefNotFoundError, "nope"),
        (lambda: memory.readonly_session(snapshot_id=UNKNOWN), SnapshotNotFoundError, UNKNOWN),
        (lambda: memory.lookup_snapshot(UNKNOWN), SnapshotNotFoundError, UNKNOWN),
        (lambda: memory.list_manifest_files(UNKNOWN), SnapshotNotFoundError, UNKNOWN),
        (lambda: memory.create_branch("dev", UNKNOWN), SnapshotNotFoundError, UNKNOWN),
        (lambda: memory.create_tag("v1", UNKNOWN), SnapshotNotFoundError, UNKNOWN),
        (lambda: memory.reset_branch("main", UNKNOWN), SnapshotNotFoundError, UNKNOWN),
        (lambda: memory.diff(from_snapshot_id=UNKNOWN, to_branch="main"), SnapshotNotFoundError, UNKNOWN),
        (lambda: memory.lookup_snapshot("not an id"), InvalidInputError, "not an id"),
        (lambda: memory.create_branch("dev", "short"), InvalidInputError, "short"),
        (lambda: memory.create_branch("main", first), AlreadyExistsError, "main"),
        (lambda: memory.delete_branch("main"), SessionStateError, "main"),
    ]
    before = memory.lookup_branch("main"), memory.list_branches(), memory.list_tags(), len(list(memory.ops_log()))
    for call, error, named in refusals:
        with pytest.raises(error, match=re.escape(named)):
            call()
    after = memory.lookup_branch("main"), memory.list_branches(), memory.list_tags(), len(list(memory.ops_log()))
    assert after == before


# -- looking back ------------------------------------------------------------------------------------------------------


def test_ancestry_is_newest_first_and_linear(storage: Storage) -> None:
    repository = Repository.create(storage)
    ids = [repository.lookup_branch("main"), *(commit(repository, n, metadata={"n": n}) for n in range(3))]
    repository.create_tag("v", ids[2])
    history = list(repository.ancestry(branch="main"))
    assert [info.id for info in history] == ids[::-1]
    assert [info.parent_id for info in history] == [*ids[-2::-1], None]
    assert [info.message for info in history] == ["value 2", "value 1", "value 0", "Repository initialized"]
    assert history[0].metadata == {"n": 2}
    assert [info.id for info in repository.ancestry(tag="v")] == ids[2::-1]
    assert [info.id for info in repository.ancestry(snapshot_id=ids[1])] == ids[1::-1]
    assert repository.lookup_snapshot(ids[1]) == history[2]
    assert all(info.written_at.tzinfo is UTC for info in history)


@pytest.mark.parametrize("names", [{}, {"branch": "main", "tag": "v"}, {"tag": "v", "snapshot_id": UNKNOWN}])
def test_exactly_one_way_to_name_a_version_is_accepted(memory: Repository, names: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one"):  # words: it has no kind
        memory.readonly_session(**names)
    with pytest.raises(ValueError, match="exactly one"):  # words: it has no kind
        list(memory.ancestry(**names))


def test_every_kind_of_change_is_in_the_ops_log(memory: Repository) -> None:
    first = memory.lookup_branch("main")
    second = commit(memory, 1)
    memory.create_branch("dev", first)
    memory.reset_branch("dev", second)
    memory.delete_branch("dev")
    memory.create_tag("v1", first)
    memory.delete_tag("v1")
    memory.set_metadata({"a": 1})
    memory.save_config()
    memory.set_feature_flag("move_node", False)
    memory.set_status(icechunk.RepoStatus(icechunk.RepoAvailability.read_only, limited_availability_reason="audit"))
    kinds = [update.kind for update in memory.ops_log()][::-1]
    expected = [
        icechunk.UpdateType.RepoInitialized(),
        icechunk.UpdateType.NewCommit("main", second),
        icechunk.UpdateType.BranchCreated("dev"),
        icechunk.UpdateType.BranchReset("dev", first),
        icechunk.UpdateType.BranchDeleted("dev", second),
        icechunk.UpdateType.TagCreated("v1"),
        icechunk.UpdateType.TagDeleted("v1", first),
        icechunk.UpdateType.MetadataChanged(),
        icechunk.UpdateType.ConfigChanged(),
        icechunk.UpdateType.FeatureFlagChanged(3, False),
    ]
    assert [repr(kind) for kind in kinds[:-1]] == [repr(kind) for kind in expected]
    assert isinstance(kinds[-1], icechunk.UpdateType.RepoStatusChanged)
    times = [update.updated_at for update in memory.ops_log()]
    assert times == sorted(set(times), reverse=True)


def test_the_difference_of_two_versions_is_the_changes_of_the_commits_between_them(storage: Storage) -> None:
    repository = Repository.create(storage)
    first = repository.lookup_branch("main")
    session = repository.writable_session("main")
    array = zarr.open_group(session.store, mode="a").create_array("x", shape=(4,), chunks=(2,), dtype="i4")
    array[:] = 1
    second = session.commit("x")
    session = repository.writable_session("main")
    zarr.open_array(session.store, path="x", mode="a")[3] = 2
    third = session.commit("change")
    repository.create_tag("v", second)
    whole = repository.diff(from_snapshot_id=first, to_branch="main")
    assert whole.new_arrays == {"/x"}
    last = repository.diff(from_tag="v", to_snapshot_id=third)
    assert (last.new_arrays, last.updated_arrays) == (set(), set())
    assert {path: [tuple(c) for c in coords] for path, coords in last.updated_chunks.items()} == {"/x": [(1,)]}
    assert repository.diff(from_branch="main", to_snapshot_id=third).is_empty()
    with pytest.raises(InvalidInputError) as refused:
        repository.diff(from_snapshot_id=third, to_snapshot_id=first)
    assert refused.value.kind == ErrorKind.BAD_SNAPSHOT_CHAIN_FOR_DIFF


def test_manifest_files_of_a_version_are_those_on_storage(storage: Storage) -> None:
    repository = Repository.create(storage)
    assert repository.list_manifest_files(repository.lookup_branch("main")) == []
    session = repository.writable_session("main")
    array = zarr.open_group(session.store, mode="a").create_array("x", shape=(4,), chunks=(2,), dtype="i4")
    array[:] = 1
    (file,) = repository.list_manifest_files(session.commit("x"))
    assert file.num_chunk_refs == 2
    # Files of a small commit are embedded in the log, and objects at the latest when a checkpoint refers to them.
    repository.checkpoint()

    async def size() -> int:
        return (await storage.head(f"manifests/{file.id}")).size

    assert run_sync(size()) == file.size_bytes


# -- sessions by version -----------------------------------------------------------------------------------------------


def test_readonly_sessions_by_branch_tag_snapshot_and_time(storage: Storage) -> None:
    repository = Repository.create(storage)
    ids = [commit(repository, n) for n in range(3)]
    repository.create_tag("v0", ids[0])
    assert value_of(repository.readonly_session("main")) == 2
    assert value_of(repository.readonly_session(tag="v0")) == 0
    assert value_of(repository.readonly_session(snapshot_id=ids[1])) == 1
    written = repository.lookup_snapshot(ids[1]).written_at
    # At the very instant it was written a version is there; a µs earlier the one before is.
    assert repository.readonly_session("main", as_of=written).snapshot_id == ids[1]
    assert repository.readonly_session("main", as_of=written - timedelta(microseconds=1)).snapshot_id == ids[0]
    assert repository.readonly_session("main", as_of=datetime.now(UTC) + timedelta(days=1)).snapshot_id == ids[2]
    with pytest.raises(SnapshotNotFoundError) as refused:
        repository.readonly_session("main", as_of=datetime(1990, 1, 1, tzinfo=UTC))
    assert refused.value.kind == ErrorKind.NO_SNAPSHOT_AT_TIME


def test_as_of_needs_a_branch_and_a_time_zone(memory: Repository) -> None:
    now = datetime.now(UTC)
    with pytest.raises(ValueError, match=re.escape("branch")):
        memory.readonly_session(as_of=now)
    with pytest.raises(ValueError, match=re.escape("branch")):
        memory.readonly_session(tag="v", as_of=now)
    with raises(WrongTypeError, "invalid-setting", "as_of", "timezone.utc"):
        memory.readonly_session("main", as_of=now.replace(tzinfo=None))
    with raises(WrongTypeError, "invalid-setting", "as_of", "datetime"):
        memory.readonly_session("main", as_of="2020-01-01")  # type: ignore[arg-type]


def test_a_session_keeps_reading_its_version_while_the_branch_moves(memory: Repository) -> None:
    commit(memory, 1)
    session = memory.readonly_session("main")
    commit(memory, 2)
    assert value_of(session) == 1


# -- transactions ------------------------------------------------------------------------------------------------------


def test_a_transaction_commits_at_its_end(memory: Repository) -> None:
    with memory.transaction("main", message="done", metadata={"by": "me"}) as store:
        zarr.open_group(store, mode="a").attrs["value"] = 1
    (newest, _) = memory.ancestry(branch="main")
    assert (newest.message, newest.metadata) == ("done", {"by": "me"})


def test_a_transaction_that_raises_leaves_nothing(memory: Repository) -> None:
    before = memory.lookup_branch("main")
    with contextlib.suppress(LookupError), memory.transaction("main", message="never") as store:
        zarr.open_group(store, mode="a").attrs["value"] = 1
        raise LookupError
    assert memory.lookup_branch("main") == before


def test_a_transaction_that_changes_nothing_raises(memory: Repository) -> None:
    with pytest.raises(SessionStateError) as refused, memory.transaction("main", message="nothing"):
        pass
    assert refused.value.kind == ErrorKind.NO_CHANGES_TO_COMMIT


async def test_an_asynchronous_transaction_commits_or_leaves_nothing() -> None:
    repository = await Repository.create_async(MemoryStorage())
    async with repository.transaction_async("main", message="done") as store:
        await zarr.api.asynchronous.open_group(store, mode="a")
    with contextlib.suppress(LookupError):
        async with repository.transaction_async("main", message="never") as store:
            await zarr.api.asynchronous.open_group(store, path="x", mode="a")
            raise LookupError
    assert [info.message async for info in repository.async_ancestry(branch="main")][:-1] == ["done"]


# -- what it keeps about itself ----------------------------------------------------------------------------------------


def test_metadata_is_set_as_a_whole_and_updated_by_key(storage: Storage) -> None:
    repository = Repository.create(storage)
    assert repository.metadata == {}
    repository.set_metadata({"a": 1, "b": [None, {"c": 1.5}]})
    assert repository.update_metadata({"a": 2, "d": "é"}) == {"a": 2, "b": [None, {"c": 1.5}], "d": "é"}
    assert Repository.open(storage).get_metadata() == {"a": 2, "b": [None, {"c": 1.5}], "d": "é"}
    repository.set_metadata({})
    assert Repository.open(storage).metadata == {}


def test_updates_of_metadata_by_two_clients_both_hold() -> None:
    storage = MemoryStorage()
    ours = Repository.create(storage)
    theirs = Repository.open(storage)
    ours.update_metadata({"a": 1})
    assert theirs.update_metadata({"b": 2}) == {"a": 1, "b": 2}


def test_metadata_of_a_commit_overrides_default_metadata(memory: Repository) -> None:
    memory.set_default_commit_metadata({"author": "me", "host": "here"})
    snapshot_id = commit(memory, 1, metadata={"host": "there"})
    assert memory.lookup_snapshot(snapshot_id).metadata == {"author": "me", "host": "there"}
    assert memory.default_commit_metadata() == {"author": "me", "host": "here"}
    with pytest.raises(TypeError):
        memory.set_default_commit_metadata({"author": object()})


def test_a_read_only_repository_takes_no_change_but_of_its_status(storage: Storage) -> None:
    repository = Repository.create(storage)
    begun = repository.writable_session("main")
    zarr.open_group(begun.store, mode="a").attrs["value"] = 1
    first = repository.lookup_branch("main")
    repository.set_status(icechunk.RepoStatus(icechunk.RepoAvailability.read_only, limited_availability_reason="audit"))
    other = Repository.open(storage)
    assert other.status.availability == icechunk.RepoAvailability.read_only
    assert other.status.limited_availability_reason == "audit"
    refused: list[Any] = [
        lambda: begun.commit("x"),
        lambda: other.writable_session("main"),
        lambda: other.create_branch("dev", first),
        lambda: other.reset_branch("main", first),
        lambda: other.delete_branch("dev"),
        lambda: other.create_tag("v1", first),
        lambda: other.set_metadata({"a": 1}),
        lambda: other.update_metadata({"a": 1}),
        lambda: other.save_config(),
        lambda: other.set_feature_flag("move_node", False),
    ]
    for call in refused:
        with raises(ReadOnlyError, "read-only-repository", "audit"):
            call()
    assert other.readonly_session("main").snapshot_id == first
    other.set_status(icechunk.RepoStatus(icechunk.RepoAvailability.online))
    # The refused changes are not lost.
    begun.commit("x")
    assert value_of(Repository.open(storage).readonly_session("main")) == 1


def test_operations_whose_feature_flag_is_off_are_refused(memory: Repository) -> None:
    first = memory.lookup_branch("main")
    memory.create_tag("v0", first)
    other = memory.reopen()
    for name in ("create_tag", "delete_tag", "move_node"):
        memory.set_feature_flag(name, False)
    assert {flag.name for flag in other.disabled_feature_flags()} == {"create_tag", "delete_tag", "move_node"}
    assert other.enabled_feature_flags() == []
    calls: list[Callable[[], None]] = [lambda: other.create_tag("v1", first), lambda: other.delete_tag("v0")]
    for call in calls:
        with pytest.raises(SessionStateError) as refused:
            call()
        assert refused.value.kind == ErrorKind.FEATURE_FLAG_DISABLED
    assert other.list_tags() == {"v0"}
    memory.set_feature_flag("create_tag", None)
    memory.set_feature_flag("delete_tag", True)
    other.create_tag("v1", first)
    other.delete_tag("v0")
    with pytest.raises(InvalidInputError) as invalid:
        memory.set_feature_flag("no_such_feature", True)
    assert invalid.value.kind == ErrorKind.INVALID_FEATURE_FLAG


# -- form --------------------------------------------------------------------------------------------------------------


def twins() -> Iterator[tuple[str, str]]:
    for name in dir(Repository):
        if name.startswith("_") or name == "aclose":
            continue
        if name.startswith("async_"):
            yield name, name.removeprefix("async_")
        elif name.endswith("_async"):
            yield name, name.removesuffix("_async")


@pytest.mark.parametrize(("asynchronous", "synchronous"), list(twins()))
def test_each_asynchronous_method_has_a_synchronous_twin_with_the_same_parameters(
    asynchronous: str, synchronous: str
) -> None:
    ours, twin = (inspect.signature(getattr(Repository, name)) for name in (asynchronous, synchronous))
    assert ours.parameters == twin.parameters


def test_a_repository_pickles_and_opens_again_where_it_arrives(storage: Storage) -> None:
    if isinstance(storage, MemoryStorage):
        pytest.skip("memory storage belongs to its process")
    repository = Repository.create(storage, RepositoryConfig(inline_chunk_threshold_bytes=7))
    repository.set_default_commit_metadata({"by": "me"})
    commit(repository, 1)
    arrived = pickle.loads(pickle.dumps(repository))
    assert value_of(arrived.readonly_session("main")) == 1
    assert arrived.config == repository.config
    assert arrived.default_commit_metadata() == {"by": "me"}
    commit(arrived, 2)
    assert value_of(repository.readonly_session("main")) == 2


async def test_a_closed_repository_opens_again_when_it_is_used_again() -> None:
    async with await Repository.create_async(MemoryStorage()) as repository:
        first = await repository.lookup_branch_async("main")
    assert await repository.lookup_branch_async("main") == first
    await repository.create_tag_async("v1", first)
    await repository.aclose()
    await repository.aclose()
    assert await repository.list_tags_async() == {"v1"}


def test_representations_name_the_place(memory: Repository) -> None:
    assert "icechunk.Repository" in repr(memory)
    assert memory.storage.describe() in str(memory)
    assert "icechunk-repr" in memory._repr_html_()


def test_a_change_that_another_client_has_made_possible_meanwhile_is_not_refused() -> None:
    storage = MemoryStorage()
    ours = Repository.create(storage)
    theirs = Repository.open(storage)
    snapshot_id = commit(ours, 1)
    ours.create_branch("dev", snapshot_id)
    # Each call comes from a client that has not looked since.
    theirs.delete_branch("dev")
    assert ours.list_branches() == {"main"}
    newer = commit(ours, 2)
    Repository.create_tag(theirs, "v1", newer)
    assert ours.lookup_tag("v1") == newer


async def test_a_clock_that_does_not_advance_hides_no_commit() -> None:
    storage = MemoryStorage()
    writer = await Repository.create_async(storage)
    reader = await Repository.open_async(storage)
    core = core_of(reader)
    core.sources = replace(core.sources, elapsed_us=lambda: 0)
    await core._logs.aclose()  # private: a loop that opens within one step of the clock
    await core.log()
    session = await writer.writable_session_async("main")
    tip = await session.commit_async("acknowledged", allow_empty=True)
    assert await reader.lookup_branch_async("main") == tip


async def test_a_session_that_knows_its_outcome_leaves_nothing_to_settle() -> None:
    repo = await Repository.create_async(MemoryStorage())
    session = await repo.writable_session_async("main")
    assert session.unsettled_commit is None
    with pytest.raises(SessionStateError):
        await repo.settle_async(session.unsettled_commit)


def test_what_is_no_id_and_no_token_is_refused() -> None:
    repo = Repository.create(MemoryStorage())
    for call in (
        lambda: repo.create_tag("v1", "main"),
        lambda: repo.create_branch("dev", "main"),
        lambda: repo.inspect_snapshot("main"),
        lambda: repo.inspect_snapshot("1CECHNKREP0F1RSTCMT1"),
        lambda: repo.lookup_snapshot("main"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            call()
        assert caught.value.kind == ErrorKind.INVALID_SNAPSHOT_ID
    for other in (lambda: repo.settle("x"), lambda: list(repo.watch_sync(5, stop_at_end=True))):  # type: ignore[arg-type]
        with pytest.raises(InvalidInputError) as caught:
            other()
        assert caught.value.kind == ErrorKind.INVALID_SETTING
