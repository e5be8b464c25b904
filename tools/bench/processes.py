"""Processes that commit to one branch as often as they can, each retrying from a fresh session when it loses a race.

python -m tools.bench.processes OPTIONS
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Mapping
from typing import Any

from zarr.core.buffer import default_buffer_prototype

import icechunk
from tools.bench.wire import storage_at

__all__ = ["contend_processes"]

COUNTS = (8, 16)
SECONDS = 10.0
"""Time for which the processes of a measurement commit."""


def contend_processes(options: Mapping[str, Any]) -> dict[str, float]:
    """Seconds a commit that the branch got; of the slowest of a hundred commits, from the session to the commit that
    won its race; and seconds a commit of the process that got the fewest.

    A commit that is not through when time is up counts with the time it has taken, so that one that starves is seen.
    """
    seconds: dict[str, float] = {}
    for latency, endpoint in options["endpoints"].items():
        place = {**options, "endpoint": endpoint}
        for count in COUNTS:
            what = f"{count} processes{latency}"
            commits, waits = _measure(place, count)
            seconds[what] = SECONDS / max(1, sum(commits))
            seconds[f"{what}, p99"] = sorted(waits)[int(len(waits) * 0.99)]
            seconds[f"{what}, least"] = SECONDS / max(0.5, min(commits))
    return seconds


def _measure(place: Mapping[str, Any], count: int) -> tuple[list[int], list[float]]:
    prefix = f"bench/{uuid.uuid4().hex}"
    repository = icechunk.Repository.create(storage_at(place, prefix))
    session = repository.writable_session("main")
    asyncio.run(session.store.set("zarr.json", _group({})))
    session.commit("a group")
    workers = [_worker({**place, "prefix": prefix, "number": number}) for number in range(count)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            if worker.stdout.readline() != "ready\n":
                raise RuntimeError("a process ended early")
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        answers = [json.loads(worker.communicate(timeout=SECONDS + 60)[0].splitlines()[-1]) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    commits = [answer["commits"] for answer in answers]
    reopened = icechunk.Repository.open(storage_at(place, prefix))
    found = sum(1 for one in reopened.ancestry(branch="main") if one.message.startswith("process "))
    # A commit that was under way when time was up may have landed.
    if not sum(commits) <= found <= sum(commits) + count:
        raise AssertionError(f"{sum(commits)} commits were acknowledged, the branch has {found}")
    return commits, [wait for answer in answers for wait in answer["waits"]]


def _worker(options: Mapping[str, Any]) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tools.bench.processes", json.dumps(options)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _group(attributes: Mapping[str, Any]) -> Any:
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return default_buffer_prototype().buffer.from_bytes(json.dumps(document).encode())


async def _commit(repository: Any, number: int, turn: int) -> None:
    while True:
        session = await repository.writable_session_async("main")
        await session.store.set(f"group{number}/zarr.json", _group({"turn": turn}))
        try:
            await session.commit_async(f"process {number}, {turn}")
        except icechunk.ConflictError:
            continue
        return


async def _work(options: Mapping[str, Any]) -> None:
    repository = await icechunk.Repository.open_async(storage_at(options, options["prefix"]))
    await repository.readonly_session_async("main")
    print("ready", flush=True)
    sys.stdin.readline()
    waits: list[float] = []
    started = time.perf_counter()
    end = started + SECONDS
    while (began := time.perf_counter()) < end:
        try:
            await asyncio.wait_for(_commit(repository, options["number"], len(waits)), end - began)
        except TimeoutError:
            break
        waits.append(time.perf_counter() - began)
    pending = time.perf_counter() - began
    print(json.dumps({"commits": len(waits), "waits": [*waits, pending]}), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    asyncio.run(_work(json.loads(sys.argv[1])))
