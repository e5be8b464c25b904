"""The official library reads our checkpoint as a whole repository, and is refused every change."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import icechunk
from icechunk.format.ids import encode_id
from icechunk.format.keys import snapshot_key, transaction_key
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.format.snapshot.codec import encode_snapshot
from icechunk.format.transaction import encode_transaction_log
from icechunk.format.values import Snapshot, TransactionLog
from icechunk.log.repository import events as e
from icechunk.log.repository.convert import convert_to_log
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.entries.takeover import seal_abandoned
from icechunk.log.repository.objects import read_repo
from icechunk.repository import Repository
from icechunk.runtime.clock import SYSTEM
from icechunk.storage.local.storage import LocalStorage
from tests.log.repository.world import open_log
from tests.nodes import write_node
from tests.official import need_official
from tools import oracle

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _official() -> None:
    need_official()


READ = """
import datetime, json, sys
import icechunk as ic
repo = ic.Repository.open(ic.local_filesystem_storage(sys.argv[1]))
refused, now = {}, datetime.datetime.now(datetime.timezone.utc)
def attempt(name, action):
    try:
        action()
        refused[name] = None
    except Exception as error:
        refused[name] = [type(error).__name__, getattr(error, "kind", ""), str(error)]
tip = repo.lookup_branch("main")
attempt("session", lambda: repo.writable_session("main"))
attempt("branch", lambda: repo.create_branch("x", tip))
attempt("delete branch", lambda: repo.delete_branch("b/é"))
attempt("reset", lambda: repo.reset_branch("main", tip))
attempt("tag", lambda: repo.create_tag("x", tip))
attempt("delete tag", lambda: repo.delete_tag("t"))
attempt("config", lambda: repo.save_config())
attempt("metadata", lambda: repo.set_metadata({"a": 1}))
attempt("expire", lambda: repo.expire_snapshots(older_than=now))
attempt("collect", lambda: repo.garbage_collect(now))
print(json.dumps({
    "history": [[s.id, s.message, s.metadata] for s in repo.ancestry(branch="main")],
    "branches": sorted(repo.list_branches()), "tags": sorted(repo.list_tags()),
    "updates": [type(u.kind).__name__ for u in repo.ops_log()],
    "metadata": repo.metadata if not hasattr(repo, "get_metadata") else repo.get_metadata(),
    "inline": repo.config.inline_chunk_threshold_bytes,
    "refused": refused,
    "session": repo.readonly_session("main").snapshot_id,
}))
"""

TAKE_OVER = """
import sys
import icechunk as ic
repo = ic.Repository.open(ic.local_filesystem_storage(sys.argv[1]))
repo.set_status(ic.RepoStatus(ic.RepoAvailability.online))
repo.create_tag("theirs", repo.lookup_branch("main"))
"""

WRITE = """
import sys
import icechunk as ic
repo = ic.Repository.open(ic.local_filesystem_storage(sys.argv[1]))
session = repo.writable_session("main")
import zarr
zarr.create_group(session.store, attributes={"by": "them"})
print(session.commit("theirs"))
"""


def run(script: str, path: Path) -> str:
    python = oracle.ensure(oracle.OFFICIAL_CURRENT)
    done = subprocess.run(
        [str(python), "-c", script, str(path)],
        cwd=path.parent,
        capture_output=True,
        text=True,
        env=oracle.environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def commit(log: LogLayout, storage: LocalStorage, i: int) -> str:
    state = log.state
    tip = state.branch_tip("main")
    at_us = max(SYSTEM.wall_us(), state.snapshots[tip].flushed_at_us + 1)
    id, message, metadata = SYSTEM.new_object_id(), f"commit {i}", {"i": i, "é": [None, 1.5]}
    snapshot = Snapshot(id=id, flushed_at_us=at_us, message=message, metadata=metadata)
    await storage.put(snapshot_key(id), encode_snapshot(snapshot))
    await storage.put(transaction_key(id), encode_transaction_log(TransactionLog(id=id)))
    record = SnapshotRecord(id=id, parent=tip, flushed_at_us=at_us, message=message, metadata=metadata)
    await log.append(lambda state: [e.CommitAdded(branch="main", snapshot=record)])
    return encode_id(id)


async def test_the_checkpoint_reads_as_a_whole_repository_and_refuses_every_change(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "repo")
    log = await create_log(storage, config={"inline_chunk_threshold_bytes": 12}, updates_per_file=4)
    ids = []
    for i in range(6):
        ids.append(await commit(log, storage, i))
        await log.checkpoint()
    await log.append(
        lambda state: [
            e.TagCreated(name="t", snapshot=state.branch_tip("main")),
            e.BranchCreated(name="b/é", snapshot=state.branch_tip("main")),
            e.TagCreated(name="gone", snapshot=state.branch_tip("main")),
            e.TagDeleted(name="gone"),
            e.MetadataReplaced(metadata={"k": [1, None]}),
            e.FeatureFlagSet(flag=3, value=False),
        ]
    )
    await log.aclose()
    before = (await storage.get("repo")).data
    seen = json.loads(run(READ, tmp_path / "repo"))
    assert [entry[0] for entry in seen["history"]] == [*ids[::-1], "1CECHNKREP0F1RSTCMT0"]
    assert seen["history"][0][1:] == ["commit 5", {"i": 5, "é": [None, 1.5]}]
    assert (seen["branches"], seen["tags"]) == (["b/é", "main"], ["t"])
    assert seen["metadata"] == {"k": [1, None]}
    assert seen["inline"] == 12
    assert seen["session"] == ids[-1]
    assert len(seen["updates"]) == 1 + 6 + 6
    assert seen["updates"][-1] == "RepoInitialized"
    for name, error in seen["refused"].items():
        assert error is not None, name
        assert error[:2] == ["ReadOnlyError", "read-only-repository"], (name, error)
    assert "log layout" in seen["refused"]["tag"][2]
    assert (await storage.get("repo")).data == before


async def test_a_takeover_by_the_official_library_is_found_and_reported(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "repo")
    log = await create_log(storage)
    await commit(log, storage, 1)
    await log.checkpoint()
    run(TAKE_OVER, tmp_path / "repo")
    stranded_id = await commit(log, storage, 2)
    await log.aclose()
    found = await read_repo(storage, SYSTEM)
    assert found is not None
    assert found.known.marker is None
    report = log.view.stranded or await seal_abandoned(storage, SYSTEM, found)
    assert report is not None
    assert report.after == 1
    assert stranded_id in report.describe("here")
    assert "theirs" in found.info.tags


async def test_a_converted_repository_is_written_by_the_official_library_and_comes_back(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "repo")
    log = await create_log(storage)
    ours = await commit(log, storage, 1)
    await log.convert_to_repo_object()
    await log.aclose()
    theirs = run(WRITE, tmp_path / "repo").strip()
    await convert_to_log(storage, SYSTEM)
    again = await open_log(storage)
    ours_again = await commit(again, storage, 2)
    history = [encode_id(one.id) for one in again.state.ancestry(again.state.branch_tip("main"))]
    await again.aclose()
    assert history == [ours_again, theirs, ours, "1CECHNKREP0F1RSTCMT0"]
    assert json.loads(run(READ, tmp_path / "repo"))["session"] == ours_again


CONTINUE = """
import json, sys
import icechunk as ic
repo = ic.Repository.open(ic.local_filesystem_storage(sys.argv[1]))
def history():
    return {
        "history": [[s.id, s.message, s.metadata] for s in repo.ancestry(branch="main")],
        "updates": [
            [type(u.kind).__name__, getattr(u.kind, "branch", None), getattr(u.kind, "new_snap_id", None)]
            for u in repo.ops_log()
        ],
    }
before = history()
import zarr
for i in range(40):
    session = repo.writable_session("main")
    zarr.create_group(session.store, attributes={"by": "them", "i": i}, overwrite=True)
    session.commit(f"theirs {i}", metadata={"i": i} if i % 2 else None)
print(json.dumps({"before": before, "after": history()}))
"""


async def _history(repository: Repository) -> dict[str, list[list[object]]]:
    updates = [update async for update in repository.ops_log_async()]
    return {
        "history": [[s.id, s.message, s.metadata] async for s in repository.async_ancestry(branch="main")],
        "updates": [
            [type(u.kind).__name__, getattr(u.kind, "branch", None), getattr(u.kind, "new_snap_id", None)]
            for u in updates
        ],
    }


async def test_a_long_history_is_copied_by_columns_from_file_to_file_of_both_libraries(tmp_path: Path) -> None:
    path = tmp_path / "repo"
    repository = await Repository.create_async(icechunk.local_filesystem_storage(str(path)), spec_version=2)

    async def work(count: int) -> None:
        for i in range(count):
            session = await repository.writable_session_async("main")
            await write_node(session, "/", b'{"zarr_format": 3, "node_type": "group", "attributes": {"i": %d}}' % i)
            metadata = {"i": i, "é": ["x" * i, None]} if i % 3 else None
            await session.commit_async(f"ours {i} " + "ü" * (i % 5), metadata=metadata)
        await repository.create_branch_async(f"b{count}", await repository.lookup_branch_async("main"))

    await work(60)
    middle = [s async for s in repository.async_ancestry(branch="main")][30]
    await repository.expire_snapshots_async(middle.written_at)
    ours = await _history(repository)
    await work(3)
    assert (await _history(repository))["history"][3:] == ours["history"]
    ours = await _history(repository)
    seen = json.loads(run(CONTINUE, path))
    assert seen["before"] == ours
    assert await _history(repository) == seen["after"]
    await work(5)
    ours = await _history(repository)
    await repository.aclose()
    assert ours["history"][5:] == seen["after"]["history"]
    assert ours["updates"][6:] == seen["after"]["updates"]
    assert json.loads(run(CONTINUE, path))["before"] == ours
