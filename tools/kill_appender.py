"""Kills two ingest services at random moments, and sees that every row is there once, in order.

    python -m tools.kill_appender --kills 1000

Each consumer appends rows of its own source to one array, a batch about every 20 ms, so the two also place their rows
behind one another's. One of them is killed with SIGKILL again and again, and starts again where its position says. At
the end the rows of each source must be 0, 1, 2, … without a gap and without a repetition, and none
may be missing of those that a consumer knew to be committed.

The last line sums up: 0 lost, 0 doubled, and how many batches a second were committed while both consumers ran.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import zarr

import icechunk

SOURCES = 2
LONGEST_LIFE_S = 0.4


def consume(place: str, source: int, progress: Connection) -> None:
    """Append rows of a source from its position on, for ever."""

    async def serve() -> None:
        repo = await icechunk.Repository.open_async(icechunk.local_filesystem_storage(place))
        async with repo.appender("main", dim="row", source=f"s{source}", every=0.02, max_rows=7) as appender:
            begin = -1 if appender.position is None else appender.position
            progress.send(begin)
            for offset in range(begin + 1, 1_000_000):
                await appender.put({"source": np.array([source]), "offset": np.array([offset])}, offset=offset)
                await asyncio.sleep(0.001)

    asyncio.run(serve())


@dataclass(frozen=True, slots=True)
class Result:
    """The findings after all kills."""

    kills: int
    rows: int
    commits: int
    lost: int
    """Rows that are missing below a later one of the same source, or below a position that a consumer began at."""
    doubled: int
    """Rows that are there more than once."""
    problems: tuple[str, ...]


def run(kills: int, *, seed: int = 0, place: str | None = None) -> Result:
    """Kill so often, and check."""
    chance = random.Random(seed)
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["icechunk", "icechunk.appender", "icechunk.repository", "zarr"])
    with tempfile.TemporaryDirectory(prefix="kill-appender-") as folder:
        place = place or f"{folder}/repository"
        repo = icechunk.Repository.create(icechunk.local_filesystem_storage(place))
        with repo.transaction("main", message="arrays") as store:
            for name in ("source", "offset"):
                zarr.create_array(store, name=name, shape=(0,), chunks=(64,), dtype="i8", dimension_names=("row",))

        def start(source: int) -> tuple[Any, Connection]:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=consume, args=(place, source, theirs), daemon=True)
            process.start()
            theirs.close()
            return process, mine

        running = [start(source) for source in range(SOURCES)]
        positions: list[list[int]] = [[] for _ in range(SOURCES)]
        problems = []
        for kill in range(kills):
            source = kill % SOURCES
            process, progress = running[source]
            if progress.poll(60):
                positions[source].append(progress.recv())
            else:
                problems.append(f"consumer {source} does not begin")
            time.sleep(chance.random() * LONGEST_LIFE_S)
            process.kill()
            process.join()
            progress.close()
            running[source] = start(source)
        for process, progress in running:
            process.kill()
            process.join()
            progress.close()
        found_in = repo.readonly_session("main").store
        source_of, offset_of = (
            np.asarray(zarr.open_array(found_in, path=name, mode="r")[:]) for name in ("source", "offset")
        )
        lost = doubled = 0
        for source in range(SOURCES):
            found = offset_of[source_of == source]
            distinct = np.unique(found)
            expected = max([*positions[source], int(distinct[-1]) if len(distinct) else -1]) + 1
            lost += expected - len(distinct)
            doubled += len(found) - len(distinct)
            if not np.array_equal(found, np.arange(len(found))):
                problems.append(f"rows of source {source} are not each there once: {found[:50].tolist()}…")
            if positions[source] != sorted(positions[source]) or len(found) <= positions[source][-1]:
                problems.append(f"consumer {source} began behind rows that are not there: {positions[source][-5:]}")
        commits = sum(1 for _ in repo.ancestry(branch="main")) - 2
        return Result(kills, len(offset_of), commits, lost, doubled, tuple(problems))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    began = time.perf_counter()
    found = run(args.kills, seed=args.seed)
    seconds = time.perf_counter() - began
    for problem in found.problems:
        print(problem)
    print(
        f"{found.kills} kills in {seconds:.0f} s, seed {args.seed}: {found.rows} rows in {found.commits} commits "
        f"({found.commits / seconds:.0f} a second), {found.lost} lost, {found.doubled} doubled, "
        f"{len(found.problems)} problems"
    )
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
