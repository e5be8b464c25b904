"""`Repository.inspect_*` and `ancestry_graph` on every layout."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import zarr

import icechunk
from icechunk.config import EngineConfig
from icechunk.errors import (
    ErrorKind,
    FormatError,
    InvalidInputError,
    ObjectNotFoundError,
    RefNotFoundError,
    SnapshotNotFoundError,
)
from icechunk.format.ids import object_id_from_text
from icechunk.format.keys import manifest_key, snapshot_key, transaction_key
from icechunk.runtime.about import VERSION
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from tests.raising import raises
from tests.test_layouts import by_layout, write

MISSING = "0" * 20
INSPECTORS = ("inspect_snapshot_async", "inspect_manifest_async", "inspect_transaction_log_async")


@by_layout
async def test_files_of_every_layout_are_described(
    storage: Storage, asked: int | None, layout: str, version: int
) -> None:
    repo = await icechunk.Repository.create_async(storage, spec_version=asked)
    first = await write(repo, "a")
    second = await write(repo, "b")
    described = await repo.inspect_snapshot_async(second)
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert (described["id"], described["commit_message"]) == (second, "wrote b")
    assert described["metadata"] == {"name": "b"}
    assert [node["path"] for node in described["nodes"]] == ["/", "/a", "/b"]
    assert described["header"] == {
        "written_by": icechunk.user_agent(),
        "app_name": "aioicechunk",
        "app_version": VERSION,
        "spec_version": f"{version}.0",
        "file_type": "snapshot",
        "compression": "zstd",
    }
    array = described["nodes"][1]
    assert array["shape"] == [{"array_length": 100, "num_chunks": 4}]
    files = {file.id: file for file in await repo.list_manifest_files_async(second)}
    assert set(files) == {file["id"] for file in described["manifests"]}
    manifest = await repo.inspect_manifest_async(array["manifest_refs"][0]["id"])
    assert [entry["node_id"] for entry in manifest["arrays"]] == [array["id"]]
    assert manifest["total_inline"] + manifest["total_native"] == files[manifest["id"]].num_chunk_refs == 4
    changes = await repo.inspect_transaction_log_async(first)
    assert changes["new_arrays"] == [array["id"]]
    assert changes["updated_chunks"] == [{"node_id": array["id"], "chunks": [[0], [1], [2], [3]]}]
    assert changes["header"]["file_type"] == "transaction-log"


@by_layout
async def test_the_repository_as_a_whole_is_described_as_it_is_now(
    asked: int | None, layout: str, version: int
) -> None:
    repo = await icechunk.Repository.create_async(MemoryStorage(), spec_version=asked)
    tip = await write(repo, "a")
    if version == 1:
        with raises(FormatError, "unsupported-spec-version", "upgrade_icechunk_repository"):
            await repo.inspect_repo_info_async()
        return
    await repo.create_tag_async("t", tip)
    described = await repo.inspect_repo_info_async()
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert (described["branches"], described["tags"]) == ({"main": tip}, {"t": tip})
    assert described["header"]["file_type"] == "repo-info"
    assert described["latest_updates"][0]["update_type"] == {"type": "TagCreatedUpdate", "name": "t"}
    assert described["latest_updates"][-1]["update_type"] == {"type": "RepoInitializedUpdate"}
    assert {snapshot["id"] for snapshot in described["snapshots"]} == {
        info.id async for info in repo.async_ancestry(branch="main")
    }


@pytest.mark.parametrize("name", INSPECTORS)
async def test_malformed_ids_and_ids_of_missing_objects_are_different_errors(name: str) -> None:
    repo = await icechunk.Repository.create_async(MemoryStorage())
    look = getattr(repo, name)
    for bad in ("", "abc", "!" * 20, MISSING + "0", None, 7):
        with raises(InvalidInputError, "invalid-snapshot-id"):
            await look(bad)
    with pytest.raises((SnapshotNotFoundError, ObjectNotFoundError), match=re.escape(MISSING)):
        await look(MISSING)


@pytest.mark.parametrize("name", INSPECTORS)
async def test_a_file_of_another_type_than_its_key_is_an_error(name: str) -> None:
    storage = MemoryStorage()
    repo = await icechunk.Repository.create_async(storage)
    tip = object_id_from_text(await write(repo, "a"))
    await repo.checkpoint_async()  # until then its files may be in the log only
    other = object_id_from_text(MISSING)
    for key in (snapshot_key, manifest_key, transaction_key):
        await storage.put(key(other), (await storage.get(snapshot_key(tip))).data)
    with raises(FormatError, "invalid-file-format", MISSING):
        await getattr(repo, name)(MISSING)
    for key in (snapshot_key, manifest_key, transaction_key):
        await storage.put(key(other), b"not ours")
    with raises(FormatError, "invalid-file-format", MISSING, "magic"):
        await getattr(repo, name)(MISSING)


async def test_the_file_is_read_and_not_a_cached_copy() -> None:
    storage = MemoryStorage()
    repo = await icechunk.Repository.create_async(storage)
    tip = await write(repo, "a")
    await repo.checkpoint_async()  # until then its files may be in the log only
    await storage.delete([snapshot_key(object_id_from_text(tip))])
    with pytest.raises(SnapshotNotFoundError):
        await repo.inspect_snapshot_async(tip)


def test_values_that_json_does_not_have_are_still_json() -> None:
    repo = icechunk.Repository.create(icechunk.in_memory_storage())
    session = repo.writable_session("main")
    zarr.create_group(session.store)
    tip = session.commit("x", {"nan": float("nan"), "list": [float("inf"), 1.5]})
    expected = {"nan": None, "list": [None, 1.5]}
    assert repo.inspect_snapshot(tip)["metadata"] == expected
    snapshots = {snapshot["id"]: snapshot["metadata"] for snapshot in repo.inspect_repo_info()["snapshots"]}
    assert snapshots[tip] == expected


@pytest.mark.parametrize("asked", [None, 2])
async def test_changes_of_expired_ancestors_are_listed_with_those_of_the_snapshot_after_them(asked: int | None) -> None:
    storage = MemoryStorage()
    config = icechunk.RepositoryConfig(engine=EngineConfig(small_commit_bytes=0))
    repo = await icechunk.Repository.create_async(storage, config, spec_version=asked)
    expired = [await write(repo, name) for name in "abc"]
    before = [await repo.inspect_transaction_log_async(id) for id in expired]
    tip = await write(repo, "d")
    own = await repo.inspect_transaction_log_async(tip)
    [newest, *_] = [info async for info in repo.async_ancestry(branch="main")]
    assert set(await repo.expire_snapshots_async(newest.written_at)) == set(expired)
    described = await repo.inspect_transaction_log_async(tip)
    assert described["header"] == own["header"]
    assert set(described["new_arrays"]) == {array for changes in (*before, own) for array in changes["new_arrays"]}
    assert len(described["updated_chunks"]) == 4
    assert described["synthetic_composite"]["merged_pruned_ancestor_tx_logs"] == expired
    assert described["synthetic_composite"]["missing_tx_logs"] == []
    await storage.delete([transaction_key(object_id_from_text(expired[1]))])
    again = await icechunk.Repository.open_async(storage)
    described = await again.inspect_transaction_log_async(tip)
    assert described["synthetic_composite"]["missing_tx_logs"] == [expired[1]]
    assert len(described["updated_chunks"]) == 3


@by_layout
async def test_history_is_drawn_whole_or_from_one_snapshot(asked: int | None, layout: str, version: int) -> None:
    repo = await icechunk.Repository.create_async(MemoryStorage(), spec_version=asked)
    first = await write(repo, "a")
    await repo.create_branch_async("dev", first)
    tip = await write(repo, "b")
    side = await write(repo, "c", branch="dev")
    await repo.create_tag_async("kept", side)
    await repo.reset_branch_async("dev", first)
    assert str(await repo.ancestry_graph_async(plain=True)).splitlines() == [
        f"  ● {side[:8]} (kept) wrote c",
        "  │ ",
        f"● │ {tip[:8]} (main) wrote b",
        "│ │ ",
        f"●─╯ {first[:8]} (dev) wrote a",
        "│   ",
        "●   1CECHNKR Repository initialized",
    ]
    for one in ({"branch": "main"}, {"snapshot_id": tip}):
        assert str(await repo.ancestry_graph_async(plain=True, **one)).splitlines() == [
            f"● {tip[:8]} (main) wrote b",
            "│ ",
            f"● {first[:8]} (dev) wrote a",
            "│ ",
            "● 1CECHNKR Repository initialized",
        ]
    assert str(await repo.ancestry_graph_async(tag="kept")).startswith("\x1b[")


@by_layout
async def test_a_flushed_snapshot_is_drawn_when_it_is_asked_for(asked: int | None, layout: str, version: int) -> None:
    repo = await icechunk.Repository.create_async(MemoryStorage(), spec_version=asked)
    tip = await write(repo, "a")
    session = await repo.writable_session_async("main")
    await zarr.api.asynchronous.create_group(store=session.store, path="flushed")
    flushed = await session.flush_async("flushed")
    graph = str(await repo.ancestry_graph_async(snapshot_id=flushed, plain=True))
    assert graph.startswith(f"● {flushed[:8]} flushed\n│ \n● {tip[:8]} (main) wrote a\n")
    assert "flushed" not in str(await repo.ancestry_graph_async(plain=True))


async def test_drawing_nothing_that_exists_is_refused() -> None:
    repo = await icechunk.Repository.create_async(MemoryStorage())
    with pytest.raises(InvalidInputError) as caught:
        await repo.ancestry_graph_async(branch="main", tag="x")
    assert caught.value.kind == ErrorKind.INVALID_SETTING
    with pytest.raises(InvalidInputError):
        await repo.coverage_async("a", branch="main", tag="x")
    with pytest.raises(RefNotFoundError):
        await repo.ancestry_graph_async(branch="nope")
    with pytest.raises(RefNotFoundError):
        await repo.ancestry_graph_async(tag="nope")
    with pytest.raises(SnapshotNotFoundError):
        await repo.ancestry_graph_async(snapshot_id=MISSING)


def test_graphs_are_public_and_the_synchronous_twins_draw_them_too() -> None:
    repo = icechunk.Repository.create(icechunk.in_memory_storage())
    graph = repo.ancestry_graph()
    assert isinstance(graph, icechunk.AncestryGraph)
    assert graph._repr_svg_().startswith("<svg ")
    assert list(inspect.signature(repo.ancestry_graph).parameters) == ["branch", "tag", "snapshot_id", "plain"]


def test_the_configuration_that_a_repository_was_created_with_can_be_changed_and_saved() -> None:
    storage = icechunk.in_memory_storage()
    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 8
    repo = icechunk.Repository.create(storage, config)
    repo.config.inline_chunk_threshold_bytes = 9
    repo.save_config()
    saved = icechunk.Repository.fetch_config(storage)
    assert saved is not None
    assert saved.inline_chunk_threshold_bytes == 9
