"""Appends small rows at a steady rate, and looks whether memory and the cost of a commit stay what they were.

    python -m tools.soak_appender --minutes 10 --rate 20000

One service puts so many rows a second, ten at a time, on local disk, and commits about ten times a second. Of the
last quarter of the run and of the second one the median CPU time of a commit's rows and the largest resident memory are
compared; the first quarter warms caches up. The exit code is 1 if the rate was not kept, if either grew by more than
a quarter, or if a row is not there once.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.api.asynchronous as azarr

import icechunk

MOST_GROWTH = 1.25
_SLICE_S = 0.01
_CHUNK_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Part:
    """Measured in about a second."""

    rows: int
    commits: int
    cpu_s: float
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a run."""

    rate: float
    """Rows a second that were committed."""
    parts: tuple[Part, ...]
    problems: tuple[str, ...]


_MEASURES: Mapping[str, Callable[[list[Part]], float]] = {
    "CPU time of a row": lambda parts: statistics.median(part.cpu_s / max(part.rows, 1) for part in parts),
    "CPU time of a commit": lambda parts: statistics.median(part.cpu_s / max(part.commits, 1) for part in parts),
    "memory": lambda parts: max(part.resident_bytes for part in parts),
}


def resident_bytes() -> int:
    """Memory of this process now."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


async def run(seconds: float, rate: int, *, place: str, put_rows: int = 10) -> Result:
    """Append for so long, and check."""
    repo = await icechunk.Repository.create_async(icechunk.local_filesystem_storage(place))
    session = await repo.writable_session_async("main")
    for name in ("row", "sensor", "value"):
        await azarr.create_array(
            store=session.store,
            name=name,
            shape=(0,),
            chunks=(_CHUNK_ROWS,),
            dtype="f4" if name == "value" else "i8",
            dimension_names=("row",),
        )
    await session.commit_async("arrays")
    parts: list[Part] = []
    put = 0
    async with repo.appender("main", dim="row", source="soak", every=0.1, max_rows=10**6) as appender:
        began = time.perf_counter()
        next_part_s, before, cpu_s = 1.0, appender.stats(), time.process_time()
        while (passed_s := time.perf_counter() - began) < seconds:
            due = min(int(passed_s * rate), put + rate)
            while put < due:
                ids = np.arange(put, put + put_rows)
                data = {"row": ids, "sensor": ids % 17, "value": (ids % 1000).astype("f4")}
                put += put_rows
                await appender.put(data, offset=put)
            if passed_s >= next_part_s:
                now, now_s = appender.stats(), time.process_time()
                rows, commits = now.rows_committed - before.rows_committed, now.commits - before.commits
                parts.append(Part(rows, commits, now_s - cpu_s, resident_bytes()))
                next_part_s, before, cpu_s = passed_s + 1.0, now, now_s
            await asyncio.sleep(_SLICE_S)
        await appender.flush()
        taken_s = time.perf_counter() - began
    problems = _grown(parts)
    if put < 0.98 * rate * seconds:
        problems.append(f"{put / seconds:.0f} rows a second were put, not {rate}")
    reader = (await repo.readonly_session_async("main")).store

    def read(name: str) -> Any:
        return zarr.open_array(reader, path=name, mode="r")[:]

    if not np.array_equal(await asyncio.to_thread(read, "row"), np.arange(put)):
        problems.append("the rows are not each there once, in order")
    await repo.aclose()
    return Result(put / taken_s, tuple(parts), tuple(problems))


def _grown(parts: list[Part]) -> list[str]:
    quarter = len(parts) // 4
    if not quarter:
        return ["too short to compare"]
    found = []
    early, late = parts[quarter : 2 * quarter], parts[-quarter:]
    for what, measure in _MEASURES.items():
        growth = measure(late) / measure(early)
        if growth > MOST_GROWTH:
            found.append(f"{what} grew {growth:.2f} times between the second and the last quarter")
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=int, default=20_000, help="rows a second (default 20000)")
    parser.add_argument("--put-rows", type=int, default=10, help="rows of each put (default 10)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-appender-", ignore_cleanup_errors=True) as folder:
        found = asyncio.run(run(60 * args.minutes, args.rate, place=f"{folder}/repository", put_rows=args.put_rows))
    every = max(1, len(found.parts) // 20)
    for number, part in enumerate(found.parts):
        if number % every == 0:
            cpu_ms = 1000 * part.cpu_s / max(part.commits, 1)
            memory_mib = part.resident_bytes / 2**20
            costs = f"{cpu_ms:7.2f} ms {memory_mib:7.1f} MiB"
            print(f"{number + 1:5} s {part.rows:7} rows {part.commits:4} commits {costs}")
    print("\n".join(found.problems))
    print(f"{found.rate:.0f} rows a second, {len(found.problems)} problems")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
