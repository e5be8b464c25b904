"""Real processes on one local repository: every acknowledged commit is in history exactly once."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from icechunk.errors import ConflictError
from icechunk.format.ids import encode_id
from icechunk.format.repo.repo_info import NewCommit
from icechunk.log.repository.create import create_log
from icechunk.log.repository.open import open_repository
from icechunk.runtime.clock import SYSTEM
from icechunk.storage.local.storage import LocalStorage
from tests.log.repository.world import open_log
from tools.simulator.simulation import commit_proposal

PROCESSES = int(os.environ.get("ICECHUNK_TEST_PROCESSES", "3"))
COMMITS = int(os.environ.get("ICECHUNK_TEST_COMMITS", "8"))


async def work(path: str, commits: int) -> None:
    """Commit that often, each time from the tip that is known, and again from a fresh one on conflict."""
    log = await open_repository(LocalStorage(path))
    for _ in range(commits):
        while True:
            snapshot, parent = SYSTEM.new_object_id(), log.state.branch_tip("main")
            try:
                await log.append(commit_proposal(snapshot, "main", parent=parent, now_us=SYSTEM.wall_us()))
            except ConflictError:
                await log.refresh()
                continue
            print(encode_id(snapshot), flush=True)
            break
    await log.aclose()


@pytest.mark.thorough
async def test_processes_that_commit_to_one_local_repository_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "repo"
    await (await create_log(LocalStorage(path))).aclose()
    command = [sys.executable, __file__, str(path), str(COMMITS)]
    root = Path(__file__).parents[3]
    started = [
        subprocess.Popen(  # noqa: ASYNC220  (spawning is quick, and nothing else runs here)
            command, stdout=subprocess.PIPE, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, text=True
        )
        for _ in range(PROCESSES)
    ]
    outputs = [await asyncio.to_thread(process.communicate) for process in started]
    assert [process.returncode for process in started] == [0] * PROCESSES
    acknowledged = [line for output, _ in outputs for line in output.split()]
    log = await open_log(LocalStorage(path))
    history = [encode_id(u.change.snapshot) async for u in log.updates() if isinstance(u.change, NewCommit)]
    assert len(acknowledged) == PROCESSES * COMMITS
    assert sorted(history) == sorted(acknowledged)
    assert [encode_id(one.id) for one in log.state.ancestry(log.state.branch_tip("main"))][:-1] == history
    assert log.view.checkpoint_n == log.n, "the last one to close leaves a current checkpoint"


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], int(sys.argv[2])))
