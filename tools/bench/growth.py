"""Costs of the ten-thousandth commit compared with the hundredth, and of opening a long history.

    python -m tools.bench.growth memory|local|wire [--commits 10000]

Prints one JSON object. In memory and on local disk that is CPU time of the whole process, background checkpoints
included, since nothing here waits for a network. ``wire`` is what a user waits for: opening and the first read of the
same two histories on MinIO behind 20 ms. A process of its own: resident memory counts what was ever touched.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import icechunk
from icechunk.repository import Repository
from icechunk.runtime.tasks import run_jobs
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from icechunk.testing.wrapping import WrappingStorage
from tools import oracle
from tools.bench import wire

__all__ = ["CASE", "measure", "rows", "table"]

CASE = "growth"
CEILING = 1.3
"""Greatest ratio of the last commits' cost, and of opening and the first read after many, to the cost at the
beginning."""
LATENCY_MS = 20
RESIDENT_CEILING_KIB = 1.5
"""KiB that a commit may add once the caches are full: the history itself, and what encoding all of it takes for a
moment; from run to run it is half as much or twice."""

SHORT = 100
"""Commits of the history that the long one is compared with."""
FULL = 4000
"""Commits after which no cache grows any more."""

_TAIL = 32
_TURNS, _WINDOW = 12, 40
"""Number of turns, and commits in each, that are made on the short and on the long history."""
_OPENS = 40
_CACHES = icechunk.CachingConfig(num_snapshot_nodes=1000, num_chunk_refs=4000, num_transaction_changes=1000)
"""Small ones, so that they are full before the history is long."""
_ARRAY = (
    b'{"zarr_format": 3, "node_type": "array", "shape": [4], "data_type": "int8", "chunk_grid": {"name": "regular", '
    b'"configuration": {"chunk_shape": [1]}}, "chunk_key_encoding": {"name": "default"}, "fill_value": 0, '
    b'"codecs": [{"name": "bytes"}], "attributes": {}}'
)


@contextlib.contextmanager
def place(kind: str) -> Iterator[Storage]:
    """An empty storage."""
    if kind == "memory":
        yield MemoryStorage()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield icechunk.local_filesystem_storage(folder)


def resident_mib() -> float:
    """The resident set now; 0 where the system does not report it."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE")) / 2**20


async def _create(storage: Storage) -> Repository:
    repository = await Repository.create_async(storage, config=icechunk.RepositoryConfig(caching=_CACHES))
    session = await repository.writable_session_async("main")
    session._content.set_metadata("/a", _ARRAY)
    await session.commit_async("the array")
    return repository


async def _commit(repository: Repository, count: int) -> float:
    """CPU seconds of each of ``count`` commits of one chunk of a few bytes."""
    began = time.process_time()
    for i in range(count):
        session = await repository.writable_session_async("main")
        await session._content.set_chunk("/a", (i % 4,), b"%d" % i)
        await session.commit_async("one more")
    return (time.process_time() - began) / max(1, count)


async def _open(storage: Storage, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of opening as another process would, and of the first read."""
    began = clock()
    repository = await Repository.open_async(WrappingStorage(storage))
    opened = clock()
    session = await repository.readonly_session_async("main")
    await session._content.get_chunk("/a", (0,), None)
    read = clock()
    await repository.aclose()
    return opened - began, read - opened


async def _opens(*storages: Storage, clock: Callable[[], float] = time.process_time) -> list[tuple[float, float]]:
    """As `_open`, the best of a few, in turns: other work on the machine slows all of them."""
    found = [[await _open(storage, clock) for storage in storages] for _ in range(_OPENS)]
    return [(min(one[i][0] for one in found), min(one[i][1] for one in found)) for i in range(len(storages))]


async def _measure(kind: str, commits: int) -> dict[str, float]:
    with place(kind) as place_of_long, place(kind) as place_of_short:
        long, short = await _create(place_of_long), await _create(place_of_short)
        await _commit(short, SHORT)
        rest = max(0, commits - _TURNS * _WINDOW - _TAIL)
        filling = min(rest, FULL)
        await _commit(long, filling)
        before = resident_mib()
        await _commit(long, rest - filling)
        after = resident_mib()
        turns = [[await _commit(one, _WINDOW) for one in (short, long)] for _ in range(_TURNS)]
        await short.checkpoint_async()
        await long.checkpoint_async()
        opened = await _opens(place_of_short, place_of_long)
        await _commit(long, _TAIL)
        behind = await _opens(place_of_long)
        await short.aclose()
        await long.aclose()
        return {
            "commit, short": statistics.median(turn[0] for turn in turns),
            "commit, long": statistics.median(turn[1] for turn in turns),
            "resident KiB per commit": (after - before) * 1024 / max(1, rest - filling),
            "resident MiB": after,
            "open, short": opened[0][0],
            "open, long": opened[1][0],
            "open, long, behind": behind[0][0],
            "first read, short": opened[0][1],
            "first read, long": opened[1][1],
        }


async def _history(commits: int) -> MemoryStorage:
    storage = MemoryStorage()
    repository = await _create(storage)
    await _commit(repository, commits)
    await repository.checkpoint_async()
    await repository.aclose()
    return storage


async def _copy(source: Storage, target: Storage) -> None:
    async def one(key: str) -> None:
        await target.put(key, (await source.get(key)).data)

    async for page in source.list_pages():
        await run_jobs([partial(one, item.key) for item in page])


async def _measure_wire(options: Mapping[str, str], commits: int) -> dict[str, float]:
    short, long = wire.storage_at(options, "short"), wire.storage_at(options, "long")
    await _copy(await _history(SHORT), short)
    await _copy(await _history(commits), long)
    opened = await _opens(short, long, clock=time.perf_counter)
    await short.aclose()
    await long.aclose()
    return {
        "open, short": opened[0][0],
        "open, long": opened[1][0],
        "first read, short": opened[0][1],
        "first read, long": opened[1][1],
    }


def measure(kind: str, commits: int) -> dict[str, float]:
    """Make ``commits`` small commits; seconds as described above, but for the resident memory."""
    if kind == "wire":
        with wire.minio(LATENCY_MS) as options:
            return asyncio.run(_measure_wire(options, commits))
    return asyncio.run(_measure(kind, commits))


def rows(commits: int) -> list[dict[str, Any]]:
    """Measure on each kind of storage, in a process of its own."""
    found: list[dict[str, Any]] = []
    for kind in ("memory", "local", "wire"):
        print(f"{CASE} on {kind} storage, {commits} commits", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "tools.bench.growth", kind, "--commits", str(commits)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=oracle.PROJECT, check=True, timeout=3600)
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        for what, early, late, ceiling in (
            ("commit", "commit, short", "commit, long", CEILING),
            ("open", "open, short", "open, long", CEILING),
            (f"open, {_TAIL} commits after `repo`", "open, short", "open, long, behind", None),
            ("first read", "first read, short", "first read, long", CEILING),
        ):
            if late not in figures:
                continue
            ratio = figures[late] / figures[early]
            found.append(
                {
                    "case": CASE,
                    "what": f"{what}, {kind}",
                    "early_s": figures[early],
                    "late_s": figures[late],
                    "times_as_much": ratio,
                    "ceiling": ceiling,
                    "ok": ceiling is None or ratio <= ceiling,
                }
            )
        if kind == "local":
            # Memory storage itself keeps what is committed.
            per_commit = figures["resident KiB per commit"]
            ok = per_commit <= RESIDENT_CEILING_KIB
            found.append({"case": CASE, "what": "resident KiB per commit", "value": per_commit, "ok": ok})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'case':8}{'what':38}{'early':>12}{'late':>12}{'× as much':>11}{'ceiling':>9}"]
    for row in found:
        if "value" in row:
            lines.append(f"{row['case']:8}{row['what']:38}{row['value']:>24.2f}")
            continue
        ceiling = "" if row["ceiling"] is None else f"{row['ceiling']:.1f}" + ("" if row["ok"] else " !")
        lines.append(
            f"{row['case']:8}{row['what']:38}{row['early_s'] * 1e3:>9.2f} ms{row['late_s'] * 1e3:>9.2f} ms"
            f"{row['times_as_much']:>11.2f}{ceiling:>9}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("kind", choices=["memory", "local", "wire"])
    parser.add_argument("--commits", type=int, default=10_000)
    options = parser.parse_args()
    print(json.dumps(measure(options.kind, options.commits)))


if __name__ == "__main__":
    main()
