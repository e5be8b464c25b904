"""What the ten-thousandth commit costs beside the first ones, and what a long history costs who opens it.

    python -m tools.bench.growth memory|local [--commits 10000]

Prints one JSON object. CPU time of the whole process, background checkpoints included, since nothing here waits for a
network. A process of its own: resident memory counts what was ever touched.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import icechunk
from icechunk.repository import Repository
from icechunk.storage.base import Storage
from icechunk.storage.memory import MemoryStorage
from icechunk.testing.wrapping import WrappingStorage
from tools import oracle

__all__ = ["CASE", "measure", "rows", "table"]

CASE = "growth"
CEILING = 1.3
"""How many times as much the last commits, and the first read after many, may cost."""
OPEN_CEILING = 3.0
"""How many times as much opening may: whoever opens gets and unpacks `repo`, which names all snapshots."""
RESIDENT_CEILING_KIB = 0.5
"""For each commit, once the caches are full."""

WARM_UP = 200
WINDOW = 500
SHORT = 100
"""Commits of the history that long ones are compared with by who opens."""
FULL = 4000
"""Commits after which no cache grows any more."""

_TAIL = 32
_OPENS = 15
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
    """The resident set now; 0 where the system does not tell."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE")) / 2**20


async def _create(storage: Storage) -> Repository:
    repository = await Repository.create_async(storage, config=icechunk.RepositoryConfig(caching=_CACHES))
    session = await repository.writable_session_async("main")
    session.set_metadata("/a", _ARRAY)
    await session.commit_async("the array")
    return repository


async def _commit(repository: Repository, count: int) -> float:
    """CPU seconds of each of ``count`` commits of one chunk of a few bytes."""
    began = time.process_time()
    for i in range(count):
        session = await repository.writable_session_async("main")
        await session.set_chunk("/a", (i % 4,), b"%d" % i)
        await session.commit_async("one more")
    return (time.process_time() - began) / count


async def _open(storage: Storage) -> dict[str, float]:
    """CPU seconds of opening as another process would, and of the first read; the best of a few."""
    best = {"open": float("inf"), "first read": float("inf")}
    for _ in range(_OPENS):
        began = time.process_time()
        repository = await Repository.open_async(WrappingStorage(storage))
        opened = time.process_time()
        session = await repository.readonly_session_async("main")
        await session.get_chunk("/a", (0,), None)
        best["first read"] = min(best["first read"], time.process_time() - opened)
        best["open"] = min(best["open"], opened - began)
        await repository.aclose()
    return best


async def _measure(kind: str, commits: int) -> dict[str, float]:
    with place(kind) as storage:
        repository = await _create(storage)
        await _commit(repository, SHORT)
        await repository.checkpoint_async()
        short = await _open(storage)
        await _commit(repository, WARM_UP - SHORT)
        first = await _commit(repository, WINDOW)
        rest = max(0, commits - WARM_UP - 2 * WINDOW - _TAIL)
        filling = min(rest, max(0, FULL - WARM_UP - WINDOW))
        await _commit(repository, filling)
        before = resident_mib()
        await _commit(repository, rest - filling)
        last = await _commit(repository, WINDOW)
        after = resident_mib()
        await repository.checkpoint_async()
        long = await _open(storage)
        await _commit(repository, _TAIL)
        behind = await _open(storage)
        await repository.aclose()
        return {
            "commit, first": first,
            "commit, last": last,
            "resident KiB per commit": (after - before) * 1024 / max(1, rest - filling + WINDOW),
            "resident MiB": after,
            "open, short": short["open"],
            "open, long": long["open"],
            "open, long, behind": behind["open"],
            "first read, short": short["first read"],
            "first read, long": long["first read"],
        }


def measure(kind: str, commits: int) -> dict[str, float]:
    """Make ``commits`` small commits on a storage of this kind; seconds of CPU, but for the resident memory."""
    return asyncio.run(_measure(kind, commits))


def rows(commits: int) -> list[dict[str, Any]]:
    """Measure on both kinds of storage, each in a process of its own."""
    found: list[dict[str, Any]] = []
    for kind in ("memory", "local"):
        print(f"{CASE} on {kind} storage, {commits} commits", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "tools.bench.growth", kind, "--commits", str(commits)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=oracle.PROJECT, check=True, timeout=3600)
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        for what, early, late, ceiling in (
            ("commit", "commit, first", "commit, last", CEILING),
            ("open", "open, short", "open, long", OPEN_CEILING),
            (f"open, {_TAIL} commits after `repo`", "open, short", "open, long, behind", None),
            ("first read", "first read, short", "first read, long", CEILING),
        ):
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
    parser.add_argument("kind", choices=["memory", "local"])
    parser.add_argument("--commits", type=int, default=10_000)
    options = parser.parse_args()
    print(json.dumps(measure(options.kind, options.commits)))


if __name__ == "__main__":
    main()
