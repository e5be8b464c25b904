"""An ingest service: measurements arrive, and every few seconds they are appended and committed.

Stop it with Ctrl-C (it commits what it has) and start it again: it goes on where the history ends.

    python examples/ingest_service.py /tmp/measurements --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal

import numpy as np
import zarr.api.asynchronous as zarr_async

import icechunk

STATIONS = 16


async def measure(queue: asyncio.Queue[np.ndarray], start: int) -> None:
    """Stand-in for a real source: one row of all stations every few milliseconds."""
    step = start
    while True:
        await queue.put(np.full(STATIONS, step, dtype="f4"))  # waits while the queue is full
        step += 1
        await asyncio.sleep(0.005)


async def append(repo: icechunk.Repository, rows: list[np.ndarray]) -> None:
    session = await repo.writable_session_async("main")
    array = await zarr_async.open_array(store=session.store, path="values")
    before = array.shape[0]
    await array.resize((before + len(rows), STATIONS))
    await array.setitem((slice(before, None), slice(None)), np.stack(rows))
    snapshot = await session.commit_async(f"{len(rows)} rows", {"first_row": before})
    print(f"committed rows {before} to {before + len(rows)} as {snapshot}", flush=True)


async def rows_so_far(repo: icechunk.Repository) -> int:
    session = await repo.readonly_session_async("main")
    if not await session.store.exists("values/zarr.json"):
        session = await repo.writable_session_async("main")
        await zarr_async.create_array(
            session.store, name="values", shape=(0, STATIONS), chunks=(256, STATIONS), dtype="f4"
        )
        await session.commit_async("an empty array")
        return 0
    return int((await zarr_async.open_array(store=session.store, path="values")).shape[0])


async def serve(folder: str, seconds: float, every: float) -> None:
    stop = asyncio.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    async with await icechunk.Repository.open_or_create_async(icechunk.local_filesystem_storage(folder)) as repo:
        queue: asyncio.Queue[np.ndarray] = asyncio.Queue(maxsize=10_000)
        source = asyncio.create_task(measure(queue, await rows_so_far(repo)))
        ending = asyncio.get_running_loop().call_later(seconds, stop.set)
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), every)
            if stop.is_set():
                source.cancel()
            rows = [queue.get_nowait() for _ in range(queue.qsize())]
            if rows:
                await append(repo, rows)
        ending.cancel()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder")
    arguments.add_argument("--seconds", type=float, default=60, help="how long to run")
    arguments.add_argument("--every", type=float, default=2, help="seconds between commits")
    options = arguments.parse_args()
    asyncio.run(serve(options.folder, options.seconds, options.every))
