"""Repositories of every layout through the public API: created, found, converted, and the same to their users."""

from __future__ import annotations

import asyncio
import logging
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.config import EngineConfig
from icechunk.format.keys import MANIFESTS_PREFIX, REPO_KEY
from icechunk.format.repo.codec import decode_repo, encode_repo
from icechunk.format.repo.repo_info import Status, StatusChanged, Update
from icechunk.log.repository.port import Layout
from icechunk.storage.port import Storage
from tests.inside import core_of
from tests.raising import raises

LAYOUTS = [(None, "log", 2), (2, "repo", 2), (1, "refs", 1)]
by_layout = pytest.mark.parametrize(("asked", "layout", "version"), LAYOUTS, ids=[case[1] for case in LAYOUTS])


async def write(repo: icechunk.Repository, name: str, *, size: int = 100, branch: str = "main") -> str:
    """Commit an array of four chunks."""
    session = await repo.writable_session_async(branch)
    array = await zarr.api.asynchronous.create_array(
        store=session.store, name=name, shape=(size,), chunks=(-(-size // 4),), dtype="f8", compressors=None
    )
    await array.setitem(slice(None), np.arange(size, dtype="f8"))
    return await session.commit_async(f"wrote {name}", {"name": name})


async def read(repo: icechunk.Repository, name: str, **version: Any) -> np.ndarray:
    session = await repo.readonly_session_async(**(version or {"branch": "main"}))
    array = await zarr.api.asynchronous.open_array(store=session.store, path=name, mode="r")
    return np.asarray(await array.getitem(slice(None)))


async def messages(repo: icechunk.Repository) -> list[str]:
    return [info.message async for info in repo.async_ancestry(branch="main")]


@by_layout
async def test_a_session_is_rebased_over_commits_of_another_client(
    storage: Storage, asked: int | None, layout: str, version: int
) -> None:
    repo = await icechunk.Repository.create_async(storage, spec_version=asked)
    await write(repo, "base")
    session = await repo.writable_session_async("main")
    array = await zarr.api.asynchronous.open_array(store=session.store, path="base", mode="r+")
    await array.setitem(0, -1.0)
    other = await icechunk.Repository.open_async(storage)
    for name in ("a", "b"):
        await write(other, name)
    await session.commit_async("late", rebase_with=icechunk.ConflictDetector())
    assert await messages(repo) == ["late", "wrote b", "wrote a", "wrote base", "Repository initialized"]
    await repo.aclose()
    await other.aclose()


@by_layout
async def test_a_client_that_has_only_opened_rebases_and_merges_over_commits_of_another(
    storage: Storage, asked: int | None, layout: str, version: int
) -> None:
    repo = await icechunk.Repository.create_async(storage, spec_version=asked)
    await write(repo, "base")
    other = await icechunk.Repository.open_async(storage)
    session = await other.writable_session_async("main")
    fork = session.fork()
    array = await zarr.api.asynchronous.open_array(store=fork.store, path="base", mode="r+")
    await array.setitem(0, -1.0)
    await write(repo, "a")
    await session.rebase_async(icechunk.ConflictDetector())
    await session.merge_async(fork)
    await write(repo, "b")
    await session.commit_async("late", rebase_with=icechunk.ConflictDetector())
    assert await messages(repo) == ["late", "wrote b", "wrote a", "wrote base", "Repository initialized"]
    assert (await read(repo, "base"))[0] == -1.0
    await repo.aclose()
    await other.aclose()


@by_layout
async def test_the_layout_of_an_existing_repository_is_recognised(
    storage: Storage, asked: int | None, layout: str, version: int
) -> None:
    made = await icechunk.Repository.create_async(storage, spec_version=asked)
    first = await write(made, "a")
    await made.create_tag_async("t", first)
    await made.create_branch_async("dev", first)
    await write(made, "b", branch="dev")
    await made.aclose()
    repo = await icechunk.Repository.open_async(storage)
    assert (await icechunk.Repository.exists_async(storage), repo.layout) == (True, layout)
    assert await icechunk.Repository.fetch_spec_version_async(storage) == version
    assert (await repo.list_branches_async(), await repo.list_tags_async()) == ({"main", "dev"}, {"t"})
    np.testing.assert_array_equal(await read(repo, "b", branch="dev"), np.arange(100.0))
    np.testing.assert_array_equal(await read(repo, "a", tag="t"), np.arange(100.0))
    np.testing.assert_array_equal(await read(repo, "a", snapshot_id=first), np.arange(100.0))
    assert await messages(repo) == ["wrote a", "Repository initialized"]
    changes = await repo.diff_async(from_branch="main", to_branch="dev")
    assert changes.new_arrays == {"/b"}
    copy = pickle.loads(pickle.dumps(repo)) if not isinstance(storage, icechunk.storage.memory.MemoryStorage) else repo
    assert core_of(copy).settings == core_of(repo).settings or layout != "log"
    await repo.reset_branch_async("dev", first)
    await repo.delete_branch_async("dev")
    await repo.delete_tag_async("t")
    assert (await repo.list_branches_async(), await repo.list_tags_async()) == ({"main"}, set())
    stale = await repo.writable_session_async("main")
    await write(repo, "c")
    with pytest.raises(icechunk.ConflictError):
        await stale.commit_async("too late", allow_empty=True)
    await repo.aclose()


@by_layout
async def test_configuration_is_persisted_in_each(
    storage: Storage, asked: int | None, layout: str, version: int
) -> None:
    config = icechunk.RepositoryConfig(inline_chunk_threshold_bytes=9)
    await (await icechunk.Repository.create_async(storage, config=config, spec_version=asked)).aclose()
    found = await icechunk.Repository.fetch_config_async(storage)
    assert found is not None
    assert found.inline_chunk_threshold_bytes == 9
    repo = await icechunk.Repository.open_async(storage, icechunk.RepositoryConfig(inline_chunk_threshold_bytes=10))
    await repo.save_config_async()
    again = await icechunk.Repository.open_async(storage)
    assert again.config.inline_chunk_threshold_bytes == 10
    stale = await icechunk.Repository.open_async(storage)
    other = await again.reopen_async(icechunk.RepositoryConfig(inline_chunk_threshold_bytes=12))
    await other.save_config_async()
    with pytest.raises(icechunk.ConflictError):
        await stale.save_config_async()
    for each in (repo, again, stale, other):
        await each.aclose()


async def test_opening_an_empty_place_is_refused(storage: Storage) -> None:
    with pytest.raises(icechunk.RepositoryNotFoundError):
        await icechunk.Repository.fetch_config_async(storage)
    assert await icechunk.Repository.fetch_spec_version_async(storage) is None
    with raises(icechunk.RepositoryNotFoundError, "repository-not-found", storage.describe()) as error:
        await icechunk.Repository.open_async(storage)
    for found in (error.value, pickle.loads(pickle.dumps(error.value))):
        assert ["'repo'" in note for note in found.__notes__] == [True]


@pytest.mark.parametrize(("asked", "objects"), [(None, 1), (2, 4), (1, 4)])
async def test_an_explicit_version_has_one_object_for_each_chunk_and_one_manifest_for_each_array(
    asked: int | None, objects: int
) -> None:
    storage = icechunk.in_memory_storage()
    repo = await icechunk.Repository.create_async(storage, spec_version=asked)
    session = await repo.writable_session_async("main")
    for name in ("a", "b"):
        array = await zarr.api.asynchronous.create_array(
            store=session.store, name=name, shape=(2000,), chunks=(1000,), dtype="f8", compressors=None
        )
        await array.setitem(slice(None), np.arange(2000.0))
    await session.commit_async("two arrays of two chunks")
    if asked is None:
        await repo.checkpoint_async()  # until then its manifest may be in the log only
    keys = [info.key async for page in storage.list_pages() for info in page]
    assert len([key for key in keys if key.startswith("chunks/")]) == objects
    assert len([key for key in keys if key.startswith(MANIFESTS_PREFIX)]) == (1 if asked is None else 2)
    await repo.aclose()


async def test_packs_can_be_asked_for_where_they_are_off_by_default() -> None:
    storage = icechunk.in_memory_storage()
    config = icechunk.RepositoryConfig(engine=EngineConfig(pack_threshold_bytes=1 << 20))
    repo = await icechunk.Repository.create_async(storage, config=config, spec_version=2)
    await write(repo, "a", size=4000)
    assert len([info async for page in storage.list_pages("chunks/") for info in page]) == 1
    await repo.aclose()


async def test_configuration_and_environment_choose_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    async def layout(**arguments: Any) -> Layout:
        repo = await icechunk.Repository.create_async(icechunk.in_memory_storage(), **arguments)
        await repo.aclose()
        return repo.layout

    def config(name: Any) -> icechunk.RepositoryConfig:
        return icechunk.RepositoryConfig(engine=EngineConfig(layout=name))

    assert await layout(config=config("refs")) is Layout.REFS
    assert await layout(config=config("log"), spec_version=2) is Layout.LOG
    monkeypatch.setenv("ICECHUNK_LAYOUT", "repo")
    assert await layout() is Layout.REPO
    assert await layout(config=config("log")) is Layout.LOG
    assert await layout(spec_version=1) is Layout.REFS
    for arguments in (
        {"config": config("refs"), "spec_version": 2},
        {"config": config("repo"), "spec_version": 1},
        {"spec_version": 3},
    ):
        with pytest.raises(icechunk.InvalidInputError):
            await layout(**arguments)
    monkeypatch.setenv("ICECHUNK_LAYOUT", "other")
    with raises(icechunk.InvalidInputError, "invalid-setting", "ICECHUNK_LAYOUT"):
        await layout()


async def test_converting_there_and_back_loses_nothing(storage: Storage) -> None:
    repo = await icechunk.Repository.create_async(storage)
    await write(repo, "a")
    await repo.set_metadata_async({"k": 1})
    for i, layout in enumerate(("repo", "log", "log", "repo")):
        await repo.convert_async(layout)
        assert repo.layout == layout
        await write(repo, f"in_{layout}_{i}")
    assert await messages(repo) == [
        "wrote in_repo_3",
        "wrote in_log_2",
        "wrote in_log_1",
        "wrote in_repo_0",
        "wrote a",
        "Repository initialized",
    ]
    assert await repo.get_metadata_async() == {"k": 1}
    kinds = [type(entry.kind).__name__ async for entry in repo.ops_log_async()]
    assert kinds.count("NewCommit") == 5
    again = await icechunk.Repository.open_async(storage)
    assert again.layout == "repo"
    np.testing.assert_array_equal(await read(again, "in_log_1"), np.arange(100.0))
    await again.aclose()
    await repo.aclose()


async def test_a_client_that_did_not_convert_has_to_open_again(storage: Storage) -> None:
    repo = await icechunk.Repository.create_async(storage)
    other = await icechunk.Repository.open_async(storage)
    session = await other.writable_session_async("main")
    await repo.convert_async("repo")
    with raises(icechunk.SessionStateError, "not-allowed", "open it again"):  # words: the remedy
        await session.commit_async("too late", allow_empty=True)
    again = await icechunk.Repository.open_async(storage)
    await write(again, "a")
    for each in (repo, other, again):
        await each.aclose()


async def test_format_1_is_not_converted_and_unknown_layouts_are_refused() -> None:
    repo = await icechunk.Repository.create_async(icechunk.in_memory_storage(), spec_version=1)
    with raises(icechunk.InvalidInputError, "invalid-repository-migration", "upgrade_icechunk_repository"):
        await repo.convert_async("log")
    with pytest.raises(icechunk.InvalidInputError):
        await repo.convert_async("zip")
    await repo.aclose()


async def test_format_1_refuses_operations_that_it_lacks(storage: Storage) -> None:
    repo = await icechunk.Repository.create_async(storage, spec_version=1)
    for refused in (
        repo.get_metadata_async(),
        repo.set_metadata_async({"a": 1}),
        repo.get_status_async(),
        repo.set_status_async(icechunk.RepoStatus(icechunk.RepoAvailability.read_only)),
        repo.feature_flags_async(),
        repo.set_feature_flag_async("move_node", False),
        repo.rearrange_session_async("main"),
        anext(repo.ops_log_async()),
    ):
        with raises(icechunk.FormatError, "unsupported-spec-version", "upgrade_icechunk_repository"):
            await refused
    with raises(icechunk.InvalidInputError, "invalid-ref-name", "'a/b'"):
        await repo.create_branch_async("a/b", "1CECHNKREP0F1RSTCMT0")
    await repo.aclose()


async def test_a_log_that_was_taken_over_is_sealed_and_reported_by_the_next_opening(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    repo = await icechunk.Repository.create_async(storage)
    await repo.checkpoint_async()
    before = (await storage.get(REPO_KEY)).data
    stranded = await write(repo, "a")
    await repo.aclose()
    # As the official library's set_status does it: a copy, a line in the ops log, and `extra` dropped.
    info = decode_repo(before)
    status = Status(availability=0, set_at_us=info.status.set_at_us, reason=None)
    line = Update(
        change=StatusChanged(status=status), updated_at_us=info.updates[0].updated_at_us + 1, backup_path=None
    )
    updates = (line, replace(info.updates[0], backup_path="repo.1.X"), *info.updates[1:])
    await storage.put("overwritten/repo.1.X", before)
    await storage.put(REPO_KEY, encode_repo(replace(info, status=status, extra=None, updates=updates)))
    with caplog.at_level(logging.ERROR):
        again = await icechunk.Repository.open_async(storage)
    assert "taken over" in caplog.text
    assert stranded in caplog.text
    assert again.layout == "repo"
    await write(again, "b")
    caplog.clear()
    await (await icechunk.Repository.open_async(storage)).aclose()
    assert not caplog.records
    await again.aclose()


@pytest.mark.parametrize("layout", ["log", "repo", "refs"])
async def test_the_creator_of_a_repository_can_save_its_configuration_again(layout: Any) -> None:
    options = icechunk.RepositoryConfig(engine=icechunk.config.EngineConfig(layout=layout))
    storage = icechunk.in_memory_storage()
    repo = await icechunk.Repository.create_async(storage, options)
    repo.config.max_concurrent_requests = 9
    await repo.save_config_async()
    stored = await icechunk.Repository.fetch_config_async(storage)
    assert stored is not None
    assert stored.max_concurrent_requests == 9


async def test_no_more_partial_values_are_fetched_at_a_time_than_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    running = most = 0

    async def counted(store: icechunk.IcechunkStore, key: str, *_: object) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    options = icechunk.RepositoryConfig(get_partial_values_concurrency=3)
    repo = await icechunk.Repository.create_async(icechunk.in_memory_storage(), options)
    store = (await repo.readonly_session_async("main")).store
    monkeypatch.setattr(icechunk.IcechunkStore, "get", counted)
    prototype = zarr.core.buffer.default_buffer_prototype()
    await store.get_partial_values(prototype, [(f"a/c/{i}", None) for i in range(20)])
    assert most == 3
