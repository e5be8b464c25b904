"""The cost of the feed's questions: changes between two versions, the last writers of chunks, the chunks that exist.

    python -m tools.bench.feed [--commits 10000] [--references 100000000]

Prints one JSON object. An array of 10 million chunks gets so many commits that change ten chunks each; a new client
asks what they changed, what the last tenth and the last hundred of them changed, and which commits wrote a region, or
the whole array, last. Another array has so many references, and a third a tenth of them, in every second place of its
grid so that no manifest fills its bounding box: all must be read. Told are seconds, CPU seconds of all threads, reads,
and the memory that a question needs above what was held before it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

import icechunk
from icechunk.format.values import ID12, NATIVE, ChunkRefs
from icechunk.repository import Repository
from icechunk.testing.recording import RecordingStorage
from tools import oracle
from tools.bench.huge import array_document

__all__ = ["CASE", "CEILINGS_S", "measure", "rows", "table"]

CASE = "feed"
CEILINGS_S = {
    "changes of all commits": 2.0,
    "blame of 10 000 chunks": 2.0,
    "coverage, half of the chunks": 5.0,
    "coverage, all chunks": 5.0,
}
"""Seconds that a question may take."""

_ROWS, _COLUMNS = 10_000, 1_000
_SPLIT_ROWS = 10
"""Rows of chunks in one manifest of the array that is changed: a commit writes the one that it changes."""
_BLOCK = 1_000_000
_CHANGED = 10


def _refs(coords: np.ndarray[Any, Any], seed: int) -> ChunkRefs:
    count = len(coords)
    words = np.zeros((count, 3), "<u4")
    words[:, 0] = seed
    return ChunkRefs(
        coords=coords,
        kind=np.full(count, NATIVE, np.uint8),
        offset=np.arange(count, dtype=np.uint64) * np.uint64(1000),
        length=np.full(count, 1000, np.uint64),
        chunk_id=words.view(ID12).reshape(count),
        location=np.full(count, -1, np.int32),
    )


def _places(first: int, count: int, columns: int) -> np.ndarray[Any, Any]:
    """Coordinates of chunks by number, in a grid of so many columns."""
    return np.stack(np.divmod(np.arange(first, first + count, dtype=np.uint32), np.uint32(columns)), -1)


async def _filled(
    storage: Any, grid: tuple[int, int], references: int, step: int, config: icechunk.RepositoryConfig | None = None
) -> str:
    """Write an array of so many references along its rows, in every so many-th column; the snapshot."""
    repository = await Repository.create_async(storage, config)
    session = await repository.writable_session_async("main")
    session._content.set_metadata("/a", array_document(grid))
    for first in range(0, references, _BLOCK):
        coords = _places(first, min(_BLOCK, references - first), grid[1] // step)
        coords[:, 1] *= step
        session._content.set_references("/a", _refs(coords, first))
    made = await session.commit_async("many references")
    await repository.aclose()
    return made


def _memory(name: str) -> float:
    """A line of the process's memory, MiB; NaN where the system does not tell."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024
    except (OSError, StopIteration):
        return float("nan")


def _forget_peak() -> None:
    gc.collect()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


async def _asked(storage: Any, what: str, question: Any) -> tuple[dict[str, float], Any]:
    """The cost of a question of a client with empty caches, and its answer."""
    async with await Repository.open_async(storage) as repository:
        _forget_peak()
        held = _memory("VmRSS")
        began, work = time.perf_counter(), time.process_time()
        answer = await question(repository)
        cost = {what: time.perf_counter() - began, f"{what}, CPU s": time.process_time() - work}
        cost[f"{what}, MiB"] = _memory("VmHWM") - held
    recording = RecordingStorage(storage, turns=0)
    async with await Repository.open_async(recording) as repository:
        recording.clear()
        await question(repository)
        cost[f"{what}, reads"] = recording.count("get")
    return cost, answer


async def _changes(storage: Any, commits: int) -> dict[str, float]:
    condition = icechunk.ManifestSplitCondition.AnyArray()
    split = icechunk.ManifestSplittingConfig.from_dict(
        {condition: {icechunk.ManifestSplitDimCondition.Axis(0): _SPLIT_ROWS}}
    )
    config = icechunk.RepositoryConfig(manifest=icechunk.ManifestConfig(splitting=split))
    first = await _filled(storage, (_ROWS, _COLUMNS), _ROWS * _COLUMNS, 1, config)
    made = [first]
    expected = np.zeros((_ROWS, _COLUMNS), np.int32)
    async with await Repository.open_async(storage) as repository:
        for number in range(commits):
            session = await repository.writable_session_async("main")
            start = number * 7919 % _ROWS * _COLUMNS + number % (_COLUMNS - _CHANGED)
            places = _places(start, _CHANGED, _COLUMNS)
            session._content.set_references("/a", _refs(places, number))
            made.append(await session.commit_async(f"commit {number}"))
            expected[tuple(places.T)] = number + 1
    seconds: dict[str, float] = {}
    questions = {"all": commits, "a tenth of the": max(commits // 10, 1), "100": min(commits, 100)}
    for name, count in questions.items():
        what = f"changes of {name} commits"
        since = made[-1 - count]
        cost, answer = await _asked(storage, what, lambda repo, since=since: repo.changes_async(since))
        seconds |= cost
        change = answer.arrays["/a"]
        if not np.array_equal(change.chunks, np.argwhere(expected > commits - count)):
            raise AssertionError("other chunks have changed")
        began = time.perf_counter()
        seconds[f"{what}, boxes"] = len(change.boxes)
        seconds[f"{what}, boxes s"] = time.perf_counter() - began
    for what, rows_, columns in (("10 000", 100, 100), ("all", _ROWS, _COLUMNS)):
        region = (slice(0, rows_), slice(0, columns))
        ask = lambda repo, region=region: repo.blame_async("a", region)  # noqa: E731
        cost, blame = await _asked(storage, f"blame of {what} chunks", ask)
        seconds |= cost
        writers = np.array([made.index(id) for id in blame.snapshots])
        if not np.array_equal(writers[blame.index], expected[:rows_, :columns]):
            raise AssertionError("other commits have written the chunks")
    return seconds


async def _coverage(folder: str, references: int) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for what, step, count in (
        ("half of a tenth of the", 2, references // 10),
        ("half of the", 2, references),
        ("all", 1, references),
    ):
        columns = 10_000 * step
        grid = (-(-count // 10_000), columns)
        storage = icechunk.local_filesystem_storage(f"{folder}/{step}-{count}")
        await _filled(storage, grid, count, step)
        cost, found = await _asked(storage, f"coverage, {what} chunks", lambda repo: repo.coverage_async("a"))
        if int(found.sum()) != count or found.shape != grid:
            raise AssertionError(f"{found.sum()} chunks of {found.shape}")
        seconds |= cost
    return seconds


def measure(commits: int, references: int) -> dict[str, float]:
    """Seconds of each question, and counts of its reads."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        storage = icechunk.local_filesystem_storage(f"{folder}/changes")
        return asyncio.run(_changes(storage, commits)) | asyncio.run(_coverage(folder, references))


def rows(commits: int, references: int) -> list[dict[str, Any]]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "tools.bench.feed", "--commits", str(commits), "--references", str(references)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=oracle.PROJECT, check=True, timeout=3600)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return [
        {
            "case": CASE,
            "what": what,
            "ours_s": taken_s,
            "cpu_s": found[f"{what}, CPU s"],
            "mib": found[f"{what}, MiB"],
            "reads": found[f"{what}, reads"],
            "ceiling_s": CEILINGS_S.get(what),
            "ok": taken_s <= CEILINGS_S.get(what, float("inf")),
        }
        for what, taken_s in found.items()
        if f"{what}, reads" in found
    ]


def table(found: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'case':6}{'what':40}{'seconds':>10}{'CPU s':>8}{'MiB':>7}{'reads':>8}{'ceiling':>9}"]
    for row in found:
        ceiling = "" if row["ceiling_s"] is None else f"{row['ceiling_s']:.1f}" + ("" if row["ok"] else " !")
        costs = f"{row['ours_s']:>10.2f}{row['cpu_s']:>8.2f}{row['mib']:>7.0f}{row['reads']:>8.0f}"
        lines.append(f"{row['case']:6}{row['what']:40}{costs}{ceiling:>9}")
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--commits", type=int, default=10_000)
    parser.add_argument("--references", type=int, default=100_000_000)
    options = parser.parse_args()
    print(json.dumps(measure(options.commits, options.references)))


if __name__ == "__main__":
    main()
