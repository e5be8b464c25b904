"""Many writers on one repository: whatever was acknowledged is in the history exactly once, and nothing else is."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zarr

import icechunk
from icechunk.storage import Storage
from icechunk.storage.memory import MemoryStorage
from tests.conftest import BUCKET
from tests.nodes import write_node
from tools import hammer, oracle, services

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[1]


def run_hammer(spec: str, notes: Path, *, workers: int, commits: int, fatal: int = 0, seed: int = 0) -> None:
    command = [sys.executable, "-m", "tools.hammer", spec, str(notes)]
    command += ["--workers", str(workers), "--commits", str(commits), "--fatal", str(fatal), "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


def acknowledged(notes: Path) -> dict[str, str]:
    """Snapshot id by the message of each commit that was acknowledged."""
    found = {}
    for path in notes.iterdir():
        # A worker that was killed may have left half a line.
        for line in path.read_text().split("\n")[:-1]:
            worker, n, rest = line.split(maxsplit=2)
            if worker != "#":
                found[f"{worker}/{n}"] = rest
    return found


def check_history(storage: Storage, notes: Path) -> list[icechunk.SnapshotInfo]:
    """Open the repository, and hold its history against the notes."""
    repository = icechunk.Repository.open(storage)
    history = list(repository.ancestry(branch="main"))
    ids = {info.message: info.id for info in history}
    times = Counter(info.message for info in history)
    for message, snapshot_id in acknowledged(notes).items():
        assert times[message] == 1, f"acknowledged commit {message} is {times[message]} times in the history"
        assert ids[message] == snapshot_id
    assert max(times.values()) == 1
    assert len({info.id for info in history}) == len(history)
    written = [info.written_at for info in reversed(history)]
    assert written == sorted(set(written))
    for child, parent in itertools.pairwise(history):
        assert child.parent_id == parent.id
    assert history[-1].parent_id is None
    # Each worker's last acknowledged commit is in the last state.
    group = zarr.open_group(repository.readonly_session("main").store, mode="r")
    last: dict[str, int] = {}
    for info in history[:-1]:
        worker, n = info.message.split("/")
        last[f"worker-{worker}"] = max(last.get(f"worker-{worker}", -1), int(n))
    assert dict(group.attrs) == last
    return history


def hammer_local(tmp_path: Path, *, workers: int, commits: int, fatal: int = 0, seed: int = 0) -> list[str]:
    path, notes = tmp_path / "repository", tmp_path / "notes"
    storage = icechunk.local_filesystem_storage(str(path))
    icechunk.Repository.create(storage)
    run_hammer(str(path), notes, workers=workers, commits=commits, fatal=fatal, seed=seed)
    history = check_history(storage, notes)
    if not fatal:
        assert len(acknowledged(notes)) == workers * commits == len(history) - 1
    return [info.id for info in history]


def test_acknowledged_commits_of_several_processes_are_in_the_history_exactly_once(tmp_path: Path) -> None:
    hammer_local(tmp_path, workers=4, commits=10)


OFFICIAL_HISTORY = """
import json, sys, icechunk
repository = icechunk.Repository.open(icechunk.local_filesystem_storage(sys.argv[1]))
print(json.dumps([info.id for info in repository.ancestry(branch="main")]))
"""


@pytest.mark.oracle
def test_eight_processes_commit_fifty_times_each_and_the_official_library_sees_the_same_history(tmp_path: Path) -> None:
    python = oracle.find(oracle.OFFICIAL_CURRENT)
    if python is None:
        pytest.skip("no environment with the official library: python tools/oracle.py 2.3.0 makes one")
    history = hammer_local(tmp_path, workers=8, commits=50)
    # The last writer leaves a checkpoint of everything behind.
    command = [str(python), "-c", OFFICIAL_HISTORY, str(tmp_path / "repository")]
    done = subprocess.run(
        command, cwd=tmp_path, env={"ICECHUNK_LOG": "error"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == history


@pytest.mark.minio
def test_eight_processes_commit_fifty_times_each_to_one_repository_on_minio(
    tmp_path: Path, minio: services.S3Service
) -> None:
    spec = json.dumps(
        {
            "bucket": BUCKET,
            "prefix": f"hammer-{tmp_path.name}",
            "endpoint_url": minio.endpoint,
            "region": minio.region,
            "allow_http": True,
            "force_path_style": True,
            "access_key_id": minio.access_key,
            "secret_access_key": minio.secret_key,
        }
    )
    storage = hammer.storage_from(spec)
    icechunk.Repository.create(storage)
    run_hammer(spec, tmp_path / "notes", workers=8, commits=50)
    history = check_history(storage, tmp_path / "notes")
    assert len(acknowledged(tmp_path / "notes")) == 400 == len(history) - 1


@pytest.mark.parametrize("seed", range(2))
def test_workers_that_are_killed_lose_nothing_that_was_acknowledged(tmp_path: Path, seed: int) -> None:
    hammer_local(tmp_path, workers=5, commits=8, fatal=3, seed=seed)


async def commit_until_it_succeeds(repository: icechunk.Repository, branch: str, name: str) -> str:
    while True:
        session = await repository.writable_session_async(branch)
        await write_node(session, f"/{name}", b'{"zarr_format": 3, "node_type": "group", "attributes": {}}')
        try:
            return await session.commit_async(name)
        except icechunk.ConflictError:
            continue


async def test_sixty_four_tasks_on_one_branch_all_commit_in_the_end() -> None:
    repository = await icechunk.Repository.create_async(MemoryStorage())
    names = [f"task-{n}" for n in range(64)]
    ids = await asyncio.gather(*(commit_until_it_succeeds(repository, "main", name) for name in names))
    history = [info async for info in repository.async_ancestry(branch="main")]
    assert {info.message: info.id for info in history[:-1]} == dict(zip(names, ids, strict=True))
    session = await repository.readonly_session_async("main")
    assert {key async for key in session.store.list()} == {f"{name}/zarr.json" for name in names}


async def test_sixty_four_tasks_on_branches_of_their_own_share_log_entries() -> None:
    storage = MemoryStorage()
    repository = await icechunk.Repository.create_async(storage)
    first = await repository.lookup_branch_async("main")
    branches = [f"branch-{n}" for n in range(64)]
    await asyncio.gather(*(repository.create_branch_async(branch, first) for branch in branches))
    ids = await asyncio.gather(*(commit_until_it_succeeds(repository, branch, "x") for branch in branches))
    for branch, snapshot_id in zip(branches, ids, strict=True):
        assert await repository.lookup_branch_async(branch) == snapshot_id
    slots = [item async for page in storage.list_pages("log/") for item in page]
    assert len(slots) < 20  # 128 changes: those that waited at the same time are in one entry
