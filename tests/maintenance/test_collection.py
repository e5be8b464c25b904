"""Collection: unreferenced objects go, reachable ones stay, during writes and after an interruption at any step."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import icechunk
from icechunk.errors import FormatError, InvalidInputError, ReadOnlyError, SessionStateError, StorageError
from icechunk.format.ids import object_id_from_text
from icechunk.format.keys import chunk_key
from icechunk.format.repo.codec import decode_repo
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import DeleteResult, ObjectInfo, Storage
from icechunk.testing.faulty import Fault, FaultyStorage, PlannedRequest
from icechunk.testing.recording import RecordingStorage
from icechunk.testing.wrapping import WrappingStorage
from tests.inside import content_of, core_of, log_of
from tests.maintenance.helpers import AgedStorage, History, ago, by_layout, folders, read, sizes
from tests.raising import raises


async def with_garbage(storage: Storage, version: int | None) -> History:
    """main: first, c1; an abandoned branch of two commits; a branch that was reset; half a commit."""
    history = await History.create(storage, version)
    await history.repo.create_branch_async("gone", history.ids["first"])
    await history.commit("g1", 1, branch="gone")
    await history.commit("g2", 2, branch="gone")
    await history.repo.delete_branch_async("gone")
    await history.commit("c1", 3)
    session = await history.repo.writable_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r+")
    await array.setitem(slice(0, 2), 99)
    await content_of(session).puts.flush()
    # The small objects of a log's commits are put in the background; from here on they exist.
    await history.repo.checkpoint_async()
    return history


@pytest.mark.thorough
@by_layout
async def test_a_collection_deletes_unreachable_objects_and_reports_them(storage: Storage, version: int | None) -> None:
    aged = AgedStorage(storage)
    history = await with_garbage(aged, version)
    c1 = await history.repo.lookup_snapshot_async(history.ids["c1"])
    await history.repo.expire_snapshots_async(c1.written_at)
    before = await sizes(aged)
    dry = await history.repo.garbage_collect_async(ago(hours=-1), dry_run=True)
    assert await sizes(aged) == before
    done = await history.repo.garbage_collect_async(ago(hours=-1))
    after = await sizes(aged)
    gone = {key: before[key] for key in before.keys() - after.keys()}
    assert dry == done
    assert not after.keys() - before.keys()
    assert folders(gone) == {
        "snapshots": done.snapshots_deleted,
        "transactions": done.transaction_logs_deleted,
        "manifests": done.manifests_deleted,
        "chunks": done.chunks_deleted,
    }
    assert sum(gone.values()) == done.bytes_deleted
    assert (done.objects_failed_to_delete, done.delete_errors) == (0, [])
    # Two abandoned commits and an expired one, whose transaction log is still listed where there are lists.
    logs = 3 if version == 1 else 2
    assert folders(gone) == {"snapshots": 3, "transactions": logs, "manifests": 3, "chunks": 4}
    await history.check({"c1"})
    await history.commit("c2", 4)
    await history.check({"c1", "c2"})


class SlowManifests(WrappingStorage):
    """The manifests of small commits are long on their way."""

    async def put(self, key, data, precondition=None, **kwargs):  # type: ignore[no-untyped-def]
        if key.startswith("manifests/"):
            await asyncio.sleep(0.2)
        return await self.inner.put(key, data, precondition, **kwargs)


async def test_a_dry_run_counts_objects_that_small_commits_are_still_putting() -> None:
    history = await History.create(SlowManifests(MemoryStorage()), None)
    await history.repo.create_branch_async("gone", history.ids["first"])
    await history.commit("g1", 1, branch="gone")
    await history.repo.delete_branch_async("gone")
    dry = await history.repo.garbage_collect_async(ago(hours=-1), dry_run=True)
    assert dry.manifests_deleted == 1
    assert dry == await history.repo.garbage_collect_async(ago(hours=-1))


@by_layout
async def test_young_objects_stay(version: int | None) -> None:
    storage = MemoryStorage()
    history = await with_garbage(storage, version)
    before = await sizes(storage)
    assert (await history.repo.garbage_collect_async(ago(hours=1))).bytes_deleted == 0
    assert await sizes(storage) == before


@by_layout
async def test_names_that_are_no_ids_and_other_folders_are_left_alone(version: int | None) -> None:
    storage = AgedStorage(MemoryStorage())
    history = await History.create(storage, version)
    others = ["chunks/README", "chunks/0000000000000000000G.bak", "sessions/x/1", "attributes/0000000000000000000G"]
    for key in (*others, "chunks/0000000000000000000G"):
        await storage.put(key, b"?")
    assert (await history.repo.garbage_collect_async(ago())).chunks_deleted == 1
    for key in others:
        await storage.head(key)


@pytest.mark.parametrize("version", [None, 2], ids=["log", "repo"])
async def test_a_pack_stays_as_long_as_one_of_its_chunks_is_needed(version: int | None) -> None:
    storage = MemoryStorage()
    history = await History.create(storage, version, pack_threshold_bytes=1 << 20)
    assert folders(await sizes(storage))["chunks"] == 1
    assert (await history.repo.chunk_storage_stats_async()).native_bytes == 80
    for chunk in range(9):
        await history.commit(f"c{chunk}", chunk)
    await history.repo.expire_snapshots_async(ago(days=-1))
    assert (await history.repo.garbage_collect_async(ago(), repack=False)).chunks_deleted == 0
    # One chunk of the first pack is left, and nine packs of one chunk each.
    assert (await history.repo.chunk_storage_stats_async()).native_bytes == 80
    await history.check({"c8"})
    await history.commit("last", 9)
    await history.repo.expire_snapshots_async(ago(days=-1))
    assert (await history.repo.garbage_collect_async(ago())).chunks_deleted == 1
    await history.check({"last"})


@pytest.mark.parametrize("version", [None, 2], ids=["log", "repo"])
async def test_a_session_that_began_before_the_cutoff_is_refused_and_has_to_repeat_its_work(
    version: int | None,
) -> None:
    storage = AgedStorage(MemoryStorage())
    history = await History.create(storage, version)
    stale = await history.repo.writable_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=stale.store, path="a", mode="r+")
    await array.setitem(slice(0, 2), 5)
    fork = stale.fork()
    await history.repo.garbage_collect_async(ago())
    other = await icechunk.Repository.open_async(storage)
    for session in (stale, fork):
        # The session of a client that does not know of the collection.
        content_of(session).core = core_of(other) if session is stale else content_of(session).core
    with raises(SessionStateError, "commit-not-allowed"):
        await stale.commit_async("late")
    with raises(SessionStateError, "commit-not-allowed"):
        await stale.flush_async("late")
    with raises(SessionStateError, "commit-not-allowed"):
        await stale.amend_async("late")
    fresh = await history.repo.writable_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=fresh.store, path="a", mode="r+")
    await array.setitem(slice(2, 4), 5)
    await fresh.merge_async(fork)
    # The oldest of all parts decides.
    with raises(SessionStateError, "commit-not-allowed"):
        await fresh.commit_async("merged")
    await history.commit("c1", 1)
    await history.check({"first", "c1"})


async def test_the_cutoff_of_the_repo_object_is_kept_by_a_conversion_there_and_back() -> None:
    history = await History.create(MemoryStorage(), 2)
    await history.repo.garbage_collect_async(ago(hours=1))
    cutoff = (await log_of(history.repo)).state.gc_cutoff_us
    assert cutoff
    await history.repo.convert_async("log")
    assert (await log_of(history.repo)).state.gc_cutoff_us == cutoff
    await history.repo.convert_async("repo")
    assert (await log_of(history.repo)).state.gc_cutoff_us == cutoff
    await history.commit("c1", 1)
    reader = await icechunk.Repository.open_async(history.repo.storage)
    assert (await log_of(reader)).state.gc_cutoff_us == cutoff


@by_layout
async def test_commits_during_a_collection_are_kept(version: int | None) -> None:
    inner = MemoryStorage()
    history = await with_garbage(AgedStorage(inner), version)

    class Meanwhile(AgedStorage):
        """Commits when the first listing begins, files of which look old."""

        done = False

        async def list_pages(self, prefix: str = "", **options: Any) -> AsyncIterator[list[ObjectInfo]]:
            if prefix == "chunks/" and not self.done:
                self.done = True
                await history.commit("c2", 5)
            async for page in super().list_pages(prefix, **options):
                yield page

    collector = await icechunk.Repository.open_async(Meanwhile(inner))
    core = core_of(collector)
    elapsed = core.sources.elapsed_us
    # Every deletion looks again: a second passes between any two readings of this clock.
    ticks = iter(range(1, 10**9))
    log = await core.log()
    from dataclasses import replace

    from icechunk.maintenance.collect import collect_garbage
    from icechunk.maintenance.limits import Limits

    sources = replace(core.sources, elapsed_us=lambda: elapsed() + next(ticks) * 2_000_000)
    await collect_garbage(
        log,
        core.storage,
        sources,
        older_than_us=int(ago().timestamp() * 1e6),
        limits=Limits(),
        dry_run=False,
    )
    await history.check({"first", "c1", "c2"})


@by_layout
@pytest.mark.parametrize("kind", ["snapshots", "manifests"])
async def test_nothing_is_deleted_where_something_reachable_cannot_be_read(version: int | None, kind: str) -> None:
    storage = AgedStorage(MemoryStorage())
    history = await with_garbage(storage, version)
    session = await history.repo.readonly_session_async("main")
    snapshot = content_of(session).log.base
    id = snapshot.id if kind == "snapshots" else next(iter(snapshot.manifest_files))
    key = chunk_key(id).replace("chunks/", f"{kind}/")
    for damage in ("corrupt", "missing"):
        if damage == "missing":
            await storage.delete([key])
        else:
            await storage.put(key, b"not a file of ours")
        before = await sizes(storage)
        repo = await icechunk.Repository.open_async(storage)
        with raises(
            FormatError, "object-not-found" if damage == "missing" else "invalid-file-format", object_text(key)
        ):
            await repo.garbage_collect_async(ago(hours=-1))
        with raises(
            FormatError, "object-not-found" if damage == "missing" else "invalid-file-format", object_text(key)
        ):
            await repo.chunk_storage_stats_async()
        assert await sizes(storage) == before


def object_text(key: str) -> str:
    return key.rpartition("/")[2]


@pytest.mark.thorough
@by_layout
async def test_a_collection_that_ends_at_any_step_leaves_everything_readable_and_the_next_one_finishes(
    version: int | None,
) -> None:
    clean = AgedStorage(MemoryStorage())
    history = await with_garbage(clean, version)
    await history.repo.garbage_collect_async(ago(hours=-1))
    expected = folders(await sizes(clean))
    steps = 0
    while True:
        inner = MemoryStorage()
        history = await with_garbage(AgedStorage(inner), version)
        await history.repo.aclose()
        count = 0

        def dies(request: PlannedRequest, at: int = steps) -> Fault:
            nonlocal count
            count += 1
            return Fault.FAIL_BEFORE if count > at else Fault.NONE

        faulty = FaultyStorage(AgedStorage(inner))
        repo = await icechunk.Repository.open_async(faulty)
        await repo.list_branches_async()
        # A clock that does not wait.
        core_of(repo).sources = type(core_of(repo).sources)(sleep=lambda _: asyncio.sleep(0))
        faulty.plan = dies
        died = True
        try:
            summary = await repo.garbage_collect_async(ago(hours=-1))
            died = summary.objects_failed_to_delete > 0
        except (StorageError, FormatError, icechunk.IcechunkError):
            pass
        faulty.plan = lambda request: Fault.NONE
        await repo.aclose()
        survivor = History(await icechunk.Repository.open_async(AgedStorage(inner)))
        survivor.ids, survivor.values = history.ids, history.values
        await survivor.check({"first", "c1"})
        await survivor.repo.garbage_collect_async(ago(hours=-1))
        assert folders(await sizes(inner)) == expected
        await survivor.check({"first", "c1"})
        if not died:
            break
        steps += 1
    assert steps > 5


class Undeletable(WrappingStorage):
    """Deletes nothing: all fail, or every second object."""

    def __init__(self, inner: Storage, *, raises: bool) -> None:
        super().__init__(inner)
        self.raises = raises
        self.asked = 0

    async def delete(self, keys):  # type: ignore[no-untyped-def]
        wanted = list(keys)
        self.asked += 1
        if self.raises:
            raise StorageError("no such luck")
        done = await self.inner.delete(wanted[::2])
        return DeleteResult(deleted=done.deleted, failures=tuple((key, "it is stuck") for key in wanted[1::2]))


@pytest.mark.parametrize("version", [None, 1], ids=["log", "refs"])
async def test_objects_that_cannot_be_deleted_are_counted_and_reported(version: int | None) -> None:
    storage = Undeletable(AgedStorage(MemoryStorage()), raises=False)
    history = await with_garbage(storage, version)
    before = await sizes(storage)
    summary = await history.repo.garbage_collect_async(ago(hours=-1))
    left = (await sizes(storage)).keys()
    gone = before.keys() - left
    assert summary.objects_failed_to_delete == 4
    assert len(summary.delete_errors) == 4
    assert "it is stuck" in summary.delete_errors[0]
    assert summary.bytes_deleted == sum(before[key] for key in gone)
    assert len(gone) == 5


async def test_deleting_stops_after_too_many_failures_in_a_row() -> None:
    storage = Undeletable(AgedStorage(MemoryStorage()), raises=True)
    history = await with_garbage(storage, None)
    with raises(StorageError, "gc-deletes-failing", "transactions/"):
        await history.repo.garbage_collect_async(
            ago(hours=-1), max_consecutive_delete_failures=2, max_concurrent_deletes=1
        )
    assert storage.asked == 2
    await history.check({"first", "c1"})


async def test_a_large_folder_is_listed_in_parts_and_deleted_in_batches() -> None:
    storage = RecordingStorage(AgedStorage(MemoryStorage()), turns=0)
    history = await History.create(storage, None)
    ids = np.random.default_rng(0).bytes(12 * 2500)
    for i in range(2500):
        await storage.inner.put(chunk_key(object_id_from_text_bytes(ids[12 * i : 12 * i + 12])), b"x")
    storage.clear()
    summary = await history.repo.garbage_collect_async(ago(), max_concurrent_deletes=2)
    assert (summary.chunks_deleted, summary.bytes_deleted) == (2500, 2500)
    listings = {request.key for request in storage.requests if request.verb == "list"}
    assert {"chunks/", "chunks/Z"} <= listings
    assert storage.count("delete", "chunks/") >= 3
    again = await History.create(RecordingStorage(AgedStorage(MemoryStorage()), turns=0), None)
    assert (await again.repo.garbage_collect_async(ago(), max_concurrent_listings=1)).bytes_deleted == 0


def object_id_from_text_bytes(raw: bytes):  # type: ignore[no-untyped-def]
    from icechunk.format.ids import ObjectId

    return ObjectId(raw)


@pytest.mark.parametrize(
    "name",
    [
        "max_snapshots_in_memory",
        "max_compressed_manifest_mem_bytes",
        "max_decoded_manifest_mem_bytes",
        "max_concurrent_manifest_fetches",
        "max_concurrent_deletes",
        "max_consecutive_delete_failures",
        "max_concurrent_listings",
    ],
)
async def test_bounds_below_one_are_refused(name: str) -> None:
    history = await History.create(MemoryStorage(), None)
    for value in (0, -1, 1.5, "7", True):
        with pytest.raises((InvalidInputError, TypeError), match=re.escape(name)):
            await history.repo.garbage_collect_async(ago(), **{name: value})  # type: ignore[arg-type]
    await history.repo.garbage_collect_async(ago(), **{name: 1})  # type: ignore[arg-type]


@by_layout
async def test_a_storage_that_can_only_be_read_is_left_alone(version: int | None) -> None:
    class ReadOnly(WrappingStorage):
        @property
        def supports_writes(self) -> bool:
            return False

    inner = AgedStorage(MemoryStorage())
    history = await with_garbage(inner, version)
    await history.repo.aclose()
    repo = await icechunk.Repository.open_async(ReadOnly(inner))
    with pytest.raises(ReadOnlyError):
        await repo.garbage_collect_async(ago())
    with pytest.raises(ReadOnlyError):
        await repo.expire_snapshots_async(ago(days=-1))
    assert (await repo.garbage_collect_async(ago(hours=-1), dry_run=True)).bytes_deleted > 0


async def test_the_checkpoint_omits_the_snapshots_before_they_are_deleted() -> None:
    storage = AgedStorage(MemoryStorage())
    history = await with_garbage(storage, None)
    await history.repo.garbage_collect_async(ago(hours=-1))
    info = decode_repo((await storage.get("repo")).data)
    assert len(info.snapshots) == 3


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["commit", "branch", "delete", "tag", "flush", "expire", "collect"]), st.integers(0, 9)),
    max_size=14,
)


@pytest.mark.thorough
@given(ACTIONS, st.sampled_from([None, 2, 1]))
@settings(max_examples=30)
def test_after_any_history_everything_reachable_reads_back_and_no_garbage_is_left(
    actions: list[tuple[str, int]], version: int | None
) -> None:
    async def run() -> None:
        storage = MemoryStorage()
        history = await History.create(storage, version)
        repo = history.repo
        for i, (action, choice) in enumerate(actions):
            branches = sorted(await repo.list_branches_async())
            branch = branches[choice % len(branches)]
            tip = await repo.lookup_branch_async(branch)
            match action:
                case "commit" | "flush":
                    if tip in history.values:
                        await history.commit(f"s{i}", choice, branch=branch, how=action)
                case "branch":
                    await repo.create_branch_async(f"b{i}", tip)
                case "delete":
                    if branch != "main":
                        await repo.delete_branch_async(branch)
                case "tag":
                    await repo.create_tag_async(f"t{i}", tip)
                case "expire":
                    info = await repo.lookup_snapshot_async(tip)
                    await repo.expire_snapshots_async(
                        info.written_at,
                        delete_expired_branches=choice > 4,
                        delete_expired_tags=choice % 2 == 0,
                    )
                case _:
                    await repo.garbage_collect_async(ago())
        await history.check()
        await repo.garbage_collect_async(ago(minutes=-1))
        await history.check()
        fresh = await icechunk.Repository.open_async(storage)
        reached, manifests, chunks = {"1CECHNKREP0F1RSTCMT0"}, set(), set()
        refs = [{"branch": b} for b in await fresh.list_branches_async()]
        refs += [{"tag": t} for t in await fresh.list_tags_async()]
        for ref in refs:
            async for info in fresh.async_ancestry(**ref):
                reached.add(info.id)
        for id in reached:
            for file in await fresh.list_manifest_files_async(id):
                manifests.add(file.id)
                manifest = await core_of(fresh).assets.manifest(object_id_from_text(file.id))
                for refs_of in manifest.arrays.values():
                    chunks |= {chunk_key(row.tobytes()) for row in refs_of.chunk_id}
        keys = (await sizes(storage)).keys()
        assert {key for key in keys if key.startswith("snapshots/")} == {f"snapshots/{id}" for id in reached}
        assert {key for key in keys if key.startswith("manifests/")} == {f"manifests/{id}" for id in manifests}
        assert {key for key in keys if key.startswith("chunks/")} == chunks
        assert (await fresh.chunk_storage_stats_async()).native_bytes == 8 * len(chunks)
        await fresh.aclose()
        await repo.aclose()

    asyncio.run(run())


@pytest.mark.minio
@by_layout
async def test_on_minio(minio_storage: Storage, version: int | None) -> None:
    aged = AgedStorage(minio_storage)
    history = await with_garbage(aged, version)
    before = await sizes(aged)
    await history.repo.expire_snapshots_async(ago(minutes=-1))
    done = await history.repo.garbage_collect_async(ago() + timedelta(days=1))
    gone = before.keys() - (await sizes(aged)).keys()
    # Two abandoned commits, and the first one, whose chunks but one are still those of c1.
    assert folders(gone)["snapshots"] == done.snapshots_deleted == 3
    assert folders(gone)["chunks"] == done.chunks_deleted == 4
    assert (await history.repo.chunk_storage_stats_async()).native_bytes == 80
    await history.check({"c1"})
    np.testing.assert_array_equal(await read(history.repo), history.values[history.ids["c1"]])


def test_the_routine_maintenance_of_the_page_keeps_tags_and_branches() -> None:
    page = (Path(__file__).parents[2] / "docs" / "forgetting.md").read_text(encoding="utf-8")
    source = page.partition("## Routine maintenance")[2].partition("```python\n")[2].partition("```")[0]
    storage = MemoryStorage()
    repo = icechunk.Repository.create(storage)
    tip = repo.lookup_branch("main")
    repo.create_tag("v1", tip)
    repo.create_branch("dev", tip)
    exec(compile(source, "docs/forgetting.md", "exec"), {"storage": storage})
    repo = icechunk.Repository.open(storage)
    assert (repo.list_tags(), repo.list_branches()) == ({"v1"}, {"main", "dev"})
