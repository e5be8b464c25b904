"""An ingest service: measurements arrive, and every few seconds they are appended and committed, each once.

Stop it with Ctrl-C, or kill it, and start it again: it goes on behind the last committed row.

    python examples/ingest_service.py /tmp/measurements --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator

import numpy as np
import xarray as xr

import icechunk

STATIONS = 16


async def measure(after: int) -> AsyncIterator[tuple[int, xr.Dataset]]:
    """Example of a source that can be read from any offset on: one row of all stations every few milliseconds."""
    offset = after + 1
    while True:
        time = np.datetime64("2026-01-01", "ns") + np.timedelta64(offset, "s")
        row = np.full((1, STATIONS), offset, "f4")
        yield offset, xr.Dataset({"values": (("time", "station"), row)}, coords={"time": [time]})
        offset += 1
        await asyncio.sleep(0.005)


async def serve(folder: str, seconds: float, every: float) -> None:
    async with (
        await icechunk.Repository.open_or_create_async(folder) as repo,
        repo.appender("main", dim="time", source="stations", every=every) as appender,
    ):
        begun = -1 if appender.position is None else appender.position
        stop = asyncio.get_running_loop().time() + seconds
        async for offset, dataset in measure(after=begun):
            await appender.put(dataset, offset=offset)
            if asyncio.get_running_loop().time() > stop:
                break
        await appender.flush()
        stats = appender.stats()
        print(f"committed rows {begun + 1} to {begun + stats.rows_committed} in {stats.commits} commits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="where the repository is, or will be")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure (default: 10)")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between commits (default: 2)")
    args = parser.parse_args()
    asyncio.run(serve(args.folder, args.seconds, args.every))


if __name__ == "__main__":
    main()
