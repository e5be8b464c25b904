"""The cost of the feed's questions: changes between two versions, the last writers of chunks, the chunks that exist.

    python -m tools.bench.feed [--commits 10000] [--references 100000000]

Prints one JSON object. An array of 10 million chunks gets so many commits that change ten chunks each; a new client
asks what they changed, what the last hundred of them changed, and who wrote a region last. Another array has so many
references, in every second place of its grid so that no manifest fills its bounding box: all must be read.
"""

from __future__ import annotations

import argparse
import asyncio
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
CEILINGS_S = {"changes of all commits": 2.0, "coverage, half of the chunks": 5.0, "coverage, all chunks": 5.0}
"""Seconds that a question may take."""

_ROWS, _COLUMNS = 10_000, 1_000
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


async def _filled(storage: Any, grid: tuple[int, int], references: int, step: int) -> str:
    """Write an array of so many references along its rows, in every so many-th column; the snapshot."""
    repository = await Repository.create_async(storage)
    session = await repository.writable_session_async("main")
    session._content.set_metadata("/a", array_document(grid))
    for first in range(0, references, _BLOCK):
        coords = _places(first, min(_BLOCK, references - first), grid[1] // step)
        coords[:, 1] *= step
        session._content.set_references("/a", _refs(coords, first))
    made = await session.commit_async("many references")
    await repository.aclose()
    return made


async def _asked(storage: Any, question: Any) -> tuple[float, int, Any]:
    """Seconds of a question of a client with empty caches, and how many files another such client reads."""
    async with await Repository.open_async(storage) as repository:
        began = time.perf_counter()
        answer = await question(repository)
        taken_s = time.perf_counter() - began
    recording = RecordingStorage(storage, turns=0)
    async with await Repository.open_async(recording) as repository:
        recording.clear()
        await question(repository)
        reads = recording.count("get")
    return taken_s, reads, answer


async def _changes(storage: Any, commits: int) -> dict[str, float]:
    first = await _filled(storage, (_ROWS, _COLUMNS), _ROWS * _COLUMNS, 1)
    made = [first]
    async with await Repository.open_async(storage) as repository:
        for number in range(commits):
            session = await repository.writable_session_async("main")
            start = number * 7919 % _ROWS * _COLUMNS + number % (_COLUMNS - _CHANGED)
            session._content.set_references("/a", _refs(_places(start, _CHANGED, _COLUMNS), number))
            made.append(await session.commit_async(f"commit {number}"))
    seconds: dict[str, float] = {}
    few = made[-min(101, len(made))]
    for what, since in (("changes of all commits", first), ("changes of 100 commits", few)):
        taken_s, reads, answer = await _asked(storage, lambda repo, since=since: repo.changes_async(since))
        seconds[what] = taken_s
        seconds[f"{what}, reads"] = reads
        if not len(answer.arrays["/a"].chunks):
            raise AssertionError("nothing has changed")
        began = time.perf_counter()
        seconds[f"{what}, boxes"] = len(answer.arrays["/a"].boxes)
        seconds[f"{what}, boxes s"] = time.perf_counter() - began
    region = (slice(0, 100), slice(0, 100))
    seconds["blame of 10 000 chunks"], _, _ = await _asked(storage, lambda repo: repo.blame_async("a", region))
    return seconds


async def _coverage(folder: str, references: int) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for what, step in (("all", 1), ("half of the", 2)):
        columns = 10_000 * step
        grid = (-(-references // 10_000), columns)
        storage = icechunk.local_filesystem_storage(f"{folder}/{step}")
        await _filled(storage, grid, references, step)
        taken_s, reads, found = await _asked(storage, lambda repo: repo.coverage_async("a"))
        if int(found.sum()) != references or found.shape != grid:
            raise AssertionError(f"{found.sum()} chunks of {found.shape}")
        seconds[f"coverage, {what} chunks"] = taken_s
        seconds[f"coverage, {what} chunks, reads"] = reads
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
            "reads": found.get(f"{what}, reads"),
            "ceiling_s": CEILINGS_S.get(what),
            "ok": taken_s <= CEILINGS_S.get(what, float("inf")),
        }
        for what, taken_s in found.items()
        if f"{what}, reads" in found or what.startswith("blame")
    ]


def table(found: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'case':6}{'what':32}{'seconds':>10}{'reads':>10}{'ceiling':>9}"]
    for row in found:
        reads = "" if row["reads"] is None else f"{row['reads']:.0f}"
        ceiling = "" if row["ceiling_s"] is None else f"{row['ceiling_s']:.1f}" + ("" if row["ok"] else " !")
        lines.append(f"{row['case']:6}{row['what']:32}{row['ours_s']:>10.2f}{reads:>10}{ceiling:>9}")
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
