"""Upgrades from format 1 to format 2: nothing is lost, at whatever step it stops and whichever client commits
meanwhile."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import zarr
from zarr.core.buffer import cpu

import icechunk
from icechunk.errors import (
    FormatError,
    InvalidInputError,
    ReadOnlyError,
    SessionStateError,
    SnapshotNotFoundError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId, encode_id, object_id_from_text
from icechunk.format.keys import CONFIG_KEY, REFS_PREFIX, REPO_KEY
from icechunk.log.repository.ref_files.names import close_ref, encode_ref, read_ref
from icechunk.runtime.twins import run_sync
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import (
    ANY,
    ByteRange,
    DeleteResult,
    GetResult,
    Matches,
    Precondition,
    PutResult,
    Storage,
)
from icechunk.testing.faulty import Fault, FaultyStorage, PlannedRequest, scripted
from icechunk.testing.wrapping import WrappingStorage
from tests.raising import raises
from tools.interop.dump import dump

pytestmark = pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")


def fill(storage: Storage) -> icechunk.Repository:
    """A repository of format 1 with some of everything."""
    config = icechunk.RepositoryConfig(inline_chunk_threshold_bytes=33)
    repo = icechunk.Repository.create(storage, config, spec_version=1)
    first = commit(repo, "main", 0)
    second = commit(repo, "main", 1)
    repo.create_tag("t é", first)
    repo.create_tag("gone", first)
    repo.delete_tag("gone")
    repo.create_branch("dev é", second)
    commit(repo, "dev é", 2)
    repo.create_branch("lost", first)
    commit(repo, "lost", 3)
    repo.delete_branch("lost")
    return repo


def commit(repo: icechunk.Repository, branch: str, number: int) -> str:
    session = repo.writable_session(branch)
    array = zarr.create_array(session.store, name=f"a{number}", shape=(4,), chunks=(2,), dtype="i4")
    array[:] = number
    return session.commit(f"commit {number}", {"number": number})


def small(storage: Storage) -> icechunk.Repository:
    """Each kind of ref, and as few files as that takes."""
    repo = icechunk.Repository.create(storage, icechunk.RepositoryConfig(), spec_version=1)
    first = repo.lookup_branch("main")
    repo.create_branch("dev é", first)
    session = repo.writable_session("dev é")
    zarr.create_group(session.store)
    tip = session.commit("one")
    repo.create_tag("t", tip)
    repo.create_tag("gone", tip)
    repo.delete_tag("gone")
    return repo


def refs(repo: icechunk.Repository) -> dict[str, Any]:
    """Every ref with its history, and the configuration."""
    return {
        **{name: [info.id for info in repo.ancestry(branch=name)] for name in repo.list_branches()},
        **{f"tag {name}": [info.id for info in repo.ancestry(tag=name)] for name in repo.list_tags()},
        "config": repo.config,
    }


def seen(repo: icechunk.Repository) -> dict[str, Any]:
    """The view of a reader; the same before and after."""
    return {**dump(repo), "metadata": None, "inline": repo.config.inline_chunk_threshold_bytes}


async def seen_async(repo: icechunk.Repository) -> dict[str, Any]:
    """`seen`, which blocks and has loops of its own."""
    return await anyio.to_thread.run_sync(seen, repo)


async def keys(storage: Storage, prefix: str = "") -> dict[str, bytes]:
    listed = [item.key async for page in storage.list_pages(prefix) for item in page]
    return {key: (await storage.get(key)).data for key in listed}


def test_everything_is_unchanged_and_the_refs_are_deleted(tmp_path: Path) -> None:
    storage = icechunk.local_filesystem_storage(str(tmp_path))
    repo = fill(storage)
    before = seen(repo)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    upgraded = icechunk.upgrade_icechunk_repository(repo, dry_run=False)
    assert upgraded.layout == "repo"
    assert upgraded.spec_version == icechunk.SpecVersion.v2
    assert seen(upgraded) == before == seen(icechunk.Repository.open(storage))
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left - files == {tmp_path / "repo"}
    assert {path.relative_to(tmp_path).parts[0] for path in files - left} == {"refs", "config.yaml"}
    with pytest.raises(icechunk.AlreadyExistsError):
        upgraded.create_tag("gone", upgraded.lookup_branch("main"))
    changes = [type(update.kind).__name__ for update in upgraded.ops_log()]
    assert changes[0] == "RepoMigrated"
    assert changes[-1] == "RepoInitialized"
    times = [update.updated_at for update in upgraded.ops_log()]
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == len(times)
    assert upgraded.get_status().availability == icechunk.RepoAvailability.online


def test_an_upgraded_repository_goes_on_in_either_layout_of_format_2() -> None:
    repo = icechunk.upgrade_icechunk_repository(fill(icechunk.in_memory_storage()), dry_run=False)
    # What is seen includes parts of arrays at the tips of branches and tags only: this tip stays one.
    repo.create_tag("upgraded", repo.lookup_branch("main"))
    before = seen(repo)["snapshots"]
    for number, layout in enumerate(("log", "repo", "log"), 10):
        commit(repo, "main", number)
        session = repo.writable_session("main")
        zarr.open_array(session.store, path="a0", mode="r+")[1:3] = number
        session.amend(f"amended {number}")
        repo.convert(layout)
        assert repo.layout == layout
    repo.set_metadata({"now": "possible"})
    after = seen(repo)["snapshots"]
    assert {id: after[id] for id in before} == before
    array = zarr.open_array(repo.readonly_session("main").store, path="a0")
    np.testing.assert_array_equal(array[:], [0, 12, 12, 0])
    changed = repo.diff(from_branch="main", to_branch="main")
    assert not changed.new_arrays
    diff = repo.diff(from_snapshot_id=repo.lookup_tag("t é"), to_branch="main")
    assert diff.new_arrays == {"/a1", "/a10", "/a11", "/a12"}


def test_the_object_that_was_upgraded_is_invalidated() -> None:
    repo = fill(icechunk.in_memory_storage())
    session = repo.writable_session("main")
    upgraded = icechunk.upgrade_icechunk_repository(repo, dry_run=False)
    assert upgraded is not repo
    for use in (repo.list_branches, lambda: repo.config, lambda: repo.spec_version, lambda: repr(repo)):
        with pytest.raises(RuntimeError, match=re.escape("upgrade_icechunk_repository()")):
            use()
    untyped: Any = repo
    with pytest.raises(AttributeError):
        _ = untyped.no_such_name
    with raises(FormatError, "unsupported-spec-version", "open it again"):  # words: the remedy
        session.commit("too late", allow_empty=True)


async def test_a_dry_run_logs_the_steps_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    storage = icechunk.in_memory_storage()
    repo = fill(storage)
    before = await keys(storage)
    with caplog.at_level(logging.INFO, "icechunk.log.repository.ref_files.upgrade"):
        same = icechunk.upgrade_icechunk_repository(repo, dry_run=True)
    assert await keys(storage) == before
    assert (same.spec_version, repo.spec_version) == (icechunk.SpecVersion.v1, icechunk.SpecVersion.v1)
    assert "found 2 branches, 1 tags, 1 deleted tags and 4 snapshots" in caplog.text
    assert "dry run, nothing was written" in caplog.text


@pytest.mark.parametrize("layout", ["log", "repo"])
async def test_format_2_is_refused_and_left_as_it_was(layout: str) -> None:
    storage = icechunk.in_memory_storage()
    repo = icechunk.Repository.create(storage, spec_version=2)
    repo.convert(layout)
    before = await keys(storage)
    for dry_run in (True, False):
        with raises(SessionStateError, "invalid-repository-migration"):
            icechunk.upgrade_icechunk_repository(repo, dry_run=dry_run)
    assert repo.list_branches() == {"main"}
    assert await keys(storage) == before


async def test_files_of_format_1_may_stay() -> None:
    storage = icechunk.in_memory_storage()
    repo = fill(storage)
    before = await keys(storage)
    upgraded = icechunk.upgrade_icechunk_repository(repo, dry_run=False, delete_unused_v1_files=False)
    after = await keys(storage)
    assert set(after) - set(before) == {REPO_KEY}
    assert {key: after[key] for key in before} == before
    commit(upgraded, "main", 9)
    with raises(SessionStateError, "invalid-repository-migration"):
        icechunk.upgrade_icechunk_repository(upgraded, dry_run=False)
    assert set(await keys(storage, REFS_PREFIX)) == {key for key in before if key.startswith(REFS_PREFIX)}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dry_run": False, "prefetch_concurrency": 0}, InvalidInputError),
        ({"dry_run": False, "prefetch_concurrency": "many"}, TypeError),
        ({"dry_run": None}, TypeError),
    ],
)
async def test_arguments_that_do_not_fit_change_nothing(options: dict[str, Any], error: type[Exception]) -> None:
    storage = icechunk.in_memory_storage()
    repo = fill(storage)
    before = await keys(storage)
    with pytest.raises(error):
        icechunk.upgrade_icechunk_repository(repo, **options)
    assert await keys(storage) == before
    assert repo.list_branches() == {"main", "dev é"}


async def test_a_missing_snapshot_ends_it_before_anything_is_written() -> None:
    storage = icechunk.in_memory_storage()
    repo = fill(storage)
    tip = repo.lookup_branch("dev é")
    parent = next(info.parent_id for info in repo.ancestry(branch="dev é"))
    await storage.delete([f"snapshots/{parent}"])
    before = await keys(storage)
    with raises(SnapshotNotFoundError, "snapshot-not-found", parent):
        icechunk.upgrade_icechunk_repository(repo, dry_run=False)
    assert await keys(storage) == before
    assert repo.lookup_branch("dev é") == tip


async def test_a_broken_snapshot_that_no_ref_reaches_does_not_matter() -> None:
    storage = icechunk.in_memory_storage()
    repo = fill(storage)
    await storage.put("snapshots/00000000000000000000", b"broken")
    await storage.put("snapshots/not an id", b"broken")
    branches = {name: repo.lookup_branch(name) for name in repo.list_branches()}
    icechunk.upgrade_icechunk_repository(repo, dry_run=False)
    upgraded = icechunk.Repository.open(storage)
    assert upgraded.spec_version == 2
    assert {name: upgraded.lookup_branch(name) for name in upgraded.list_branches()} == branches


def test_a_storage_that_can_only_be_read_is_refused() -> None:
    class Readable(WrappingStorage):
        supports_writes = False

    storage = MemoryStorage()
    fill(storage)
    with pytest.raises(ReadOnlyError):
        icechunk.upgrade_icechunk_repository(icechunk.Repository.open(Readable(storage)), dry_run=False)


class Crash(BaseException):
    """The process ends here."""


def requests_of_an_upgrade() -> int:
    storage = FaultyStorage(MemoryStorage())
    repo = small(storage)
    count = 0

    def plan(request: PlannedRequest) -> Fault:
        nonlocal count
        count += 1
        return Fault.NONE

    storage.plan = plan
    icechunk.upgrade_icechunk_repository(repo, dry_run=False)
    return count


def interrupted(at: int, fault: Fault | None) -> None:
    """Upgrade with one bad request, then again until it is done: all is as before."""
    inner = MemoryStorage()
    repo = small(inner)
    before = refs(repo)
    storage = FaultyStorage(inner)
    count = 0

    def plan(request: PlannedRequest) -> Fault:
        nonlocal count
        count += 1
        if count - 1 != at:
            return Fault.NONE
        if fault is None:
            raise Crash
        return fault

    repo = icechunk.Repository.open(storage)
    storage.plan = plan
    try:
        icechunk.upgrade_icechunk_repository(repo, dry_run=False)
    except (Crash, BaseExceptionGroup, StorageError):
        storage.plan = lambda request: Fault.NONE
        # In every state it can be read, and is as before.
        again = icechunk.Repository.open(storage) if at else repo
        assert refs(again) == before
        with suppress(SessionStateError):  # it was finished
            icechunk.upgrade_icechunk_repository(again, dry_run=False)
    run_sync(storage.deliver())
    upgraded = icechunk.Repository.open(storage)
    assert upgraded.layout == "repo"
    assert refs(upgraded) == before
    assert {key for key in run_sync(keys(inner)) if key.startswith((REFS_PREFIX, CONFIG_KEY))} == set()
    commit(upgraded, "dev é", 20)
    upgraded.create_tag("later", upgraded.lookup_branch("main"))


@pytest.mark.parametrize("fault", [None, Fault.FAIL_BEFORE, Fault.LOSE_ANSWER, Fault.LATE, Fault.DUPLICATE])
def test_interrupted_at_any_request_it_loses_nothing_and_can_be_run_again(fault: Fault | None) -> None:
    total = requests_of_an_upgrade()
    assert 20 < total < 60
    for at in range(total):
        interrupted(at, fault)


class Interleaved(WrappingStorage):
    """Does something once, before the request with that number."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.before: Callable[[int], Awaitable[None]] | None = None
        self.count = 0

    async def _step(self) -> None:
        self.count += 1
        if self.before is not None:
            await self.before(self.count - 1)

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        await self._step()
        return await super().get(key, byte_range)

    async def put(self, key: str, *args: Any, **options: Any) -> PutResult:
        await self._step()
        return await super().put(key, *args, **options)

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        await self._step()
        return await super().delete(keys)


async def test_a_commit_of_another_client_is_taken_over_or_refused_whenever_it_comes() -> None:
    outcomes = []
    for at in range(requests_of_an_upgrade()):
        inner = MemoryStorage()
        small(inner)
        storage = Interleaved(inner)
        repo = await icechunk.Repository.open_async(storage)
        session = await (await icechunk.Repository.open_async(inner)).writable_session_async("main")
        await session.store.set("late/zarr.json", cpu.Buffer.from_bytes(b'{"zarr_format":3,"node_type":"group"}'))
        landed: list[str] = []

        async def step(n: int, at: int = at, session: Any = session, landed: list[str] = landed) -> None:
            if n == at:
                with suppress(FormatError):
                    landed.append(await session.commit_async("late"))

        storage.count, storage.before = 0, step
        upgraded = await icechunk.upgrade_icechunk_repository_async(repo, dry_run=False)
        storage.before = None
        history = [info.id async for info in upgraded.async_ancestry(branch="main")]
        assert (landed == history[:1]) == bool(landed), at
        outcomes.append(bool(landed))
    # Commits before the announcement land; later ones are refused with the advice to open the repository again.
    assert True in outcomes
    assert False in outcomes
    assert outcomes == sorted(outcomes, reverse=True)


async def test_a_commit_whose_answer_was_lost_and_which_was_taken_over_has_landed() -> None:
    inner = MemoryStorage()
    fill(inner)
    storage = FaultyStorage(inner)
    client = await icechunk.Repository.open_async(storage)
    session = await client.writable_session_async("main")
    await session.store.set("late/zarr.json", cpu.Buffer.from_bytes(b'{"zarr_format":3,"node_type":"group"}'))
    upgraded = False
    original = storage.put

    async def put(key: str, *args: Any, **options: Any) -> PutResult:
        nonlocal upgraded
        try:
            return await original(key, *args, **options)
        finally:
            if key.startswith(REFS_PREFIX) and not upgraded:
                upgraded = True
                other = await icechunk.Repository.open_async(inner)
                await icechunk.upgrade_icechunk_repository_async(other, dry_run=False)

    storage.plan = scripted({("put", 0): Fault.LOSE_ANSWER}, "refs/branch.main/")
    storage.put = put  # type: ignore[method-assign]
    snapshot = await session.commit_async("late")
    assert upgraded
    found = await icechunk.Repository.open_async(inner)
    assert await found.lookup_branch_async("main") == snapshot


async def test_two_upgrades_at_the_same_time_come_to_one_result() -> None:
    storage = MemoryStorage()
    before = await seen_async(fill(storage))
    repos = [await icechunk.Repository.open_async(storage) for _ in range(3)]
    upgraded: list[icechunk.Repository] = []

    async def upgrade(repo: icechunk.Repository) -> None:
        with suppress(SessionStateError):
            upgraded.append(await icechunk.upgrade_icechunk_repository_async(repo, dry_run=False))

    async with anyio.create_task_group() as group:
        for repo in repos:
            group.start_soon(upgrade, repo)
    assert upgraded
    assert await seen_async(icechunk.Repository.open(storage)) == before
    assert await keys(storage, REFS_PREFIX) == {}


async def stopped_halfway(storage: MemoryStorage) -> icechunk.Repository:
    """A repository whose upgrade was interrupted when ``repo`` had been announced and ``main`` been closed."""
    fill(storage)
    faulty = FaultyStorage(storage)
    repo = icechunk.Repository.open(faulty)
    announced = False

    def plan(request: PlannedRequest) -> Fault:
        nonlocal announced
        if announced and request.verb == "put" and request.key == REPO_KEY:
            raise Crash
        announced |= request.verb == "put" and request.key == REPO_KEY
        return Fault.NONE

    faulty.plan = plan
    with pytest.raises(Crash):
        icechunk.upgrade_icechunk_repository(repo, dry_run=False)
    return icechunk.Repository.open(storage)


async def test_an_unfinished_upgrade_can_be_read_and_its_status_gives_the_reason_why_it_cannot_be_written() -> None:
    storage = MemoryStorage()
    repo = await stopped_halfway(storage)
    assert set(repo.list_branches()) == {"main", "dev é"}
    with raises(ReadOnlyError, "read-only-repository", "upgrade_icechunk_repository"):
        repo.create_tag("x", repo.lookup_branch("main"))


async def test_an_unfinished_upgrade_shows_commits_made_since() -> None:
    storage = MemoryStorage()
    reader = await stopped_halfway(storage)
    tip, other = await reader.lookup_branch_async("main"), await reader.lookup_branch_async("dev é")
    assert tip != other
    branch = next(key for key in await keys(storage, REFS_PREFIX) if "branch.dev" in key)
    found, moved = await storage.get(branch), object_id_from_text(tip)
    await storage.put(branch, close_ref(moved), Matches(found.version))
    again = await icechunk.Repository.open_async(storage)
    session = await reader.readonly_session_async("dev é")
    assert (await again.lookup_branch_async("dev é"), session.snapshot_id) == (tip, tip)
    upgraded = await icechunk.upgrade_icechunk_repository_async(again, dry_run=False)
    assert await upgraded.lookup_branch_async("dev é") == tip
    await reader.aclose()


async def test_an_unfinished_upgrade_that_was_set_online_names_the_commits_it_lacks() -> None:
    storage = MemoryStorage()
    repo = await stopped_halfway(storage)
    repo.set_status(icechunk.RepoStatus(icechunk.RepoAvailability.online))
    branch = next(key for key in await keys(storage, REFS_PREFIX) if "branch.main" in key)
    unknown = read_ref(close_ref(ObjectId(b"x" * 12)), "")
    found = await storage.get(branch)
    await storage.put(branch, close_ref(unknown), Matches(found.version))
    before = await keys(storage)
    with raises(SessionStateError, "invalid-repository-migration", "'main'", encode_id(unknown)):
        icechunk.upgrade_icechunk_repository(repo, dry_run=False)
    assert await keys(storage) == before
    await storage.put(branch, found.data)
    icechunk.upgrade_icechunk_repository(repo, dry_run=False)
    assert await keys(storage, REFS_PREFIX) == {}


class LateTag(WrappingStorage):
    """Storage in which an old client creates a tag once ``repo`` has been replaced."""

    async def put(
        self, key: str, data: bytes | bytearray | memoryview, precondition: Precondition = ANY, **options: Any
    ) -> PutResult:
        answer = await super().put(key, data, precondition, **options)
        if key == REPO_KEY and isinstance(precondition, Matches):
            await self.inner.put("refs/tag.late/ref.json", encode_ref(FIRST_SNAPSHOT))
        return answer


async def test_refs_created_meanwhile_without_a_condition_are_kept_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage = LateTag(MemoryStorage())
    small(storage)
    repo = await icechunk.Repository.open_async(storage)
    with caplog.at_level(logging.WARNING, "icechunk.log.repository.ref_files.upgrade"):
        upgraded = await icechunk.upgrade_icechunk_repository_async(repo, dry_run=False)
    assert set(await keys(storage, REFS_PREFIX)) == {"refs/tag.late/ref.json"}
    assert "refs/tag.late/ref.json" in caplog.text
    assert await upgraded.list_tags_async() == {"t"}
