"""A climate service in one file: hourly measurements arrive, daily means are kept in step, slices are served.

Any number of workers serve. The one that holds the lock also ingests and derives. When it is killed, another takes
over: rows continue behind the last one that was committed, and the means behind the last change that they contain.

    CLIMATE=/tmp/climate uvicorn --app-dir examples climate_service:app --workers 2
    curl 'http://127.0.0.1:8000/' 'http://127.0.0.1:8000/means?start=0&stop=3'
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import xarray as xr
import zarr.api.asynchronous as zarr_async
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import icechunk

STATIONS, HOURS = 8, 24
DERIVED = "derived_up_to"


async def measure(after: int) -> AsyncIterator[tuple[int, xr.Dataset]]:
    """Example of a source that can be read from any offset on: the temperatures of one hour."""
    for hour in range(after + 1, 1_000_000):
        time = np.datetime64("2026-01-01", "ns") + np.timedelta64(hour, "h")
        values = np.full((1, STATIONS), hour, "f4")
        yield hour, xr.Dataset({"temperature": (("time", "station"), values)}, coords={"time": [time]})
        await asyncio.sleep(0.01)


async def ingest(repo: icechunk.Repository) -> None:
    async with repo.appender("main", dim="time", source="stations", every=0.3) as appender:
        async for hour, dataset in measure(-1 if appender.position is None else appender.position):
            await appender.put(dataset, offset=hour)


async def derive(repo: icechunk.Repository) -> None:
    """Follow the changes of the temperatures, each once: a mean and the token of what it contains are one commit."""
    history = [info async for info in repo.async_ancestry(branch="main")]
    token = next((info.metadata[DERIVED] for info in history if DERIVED in info.metadata), "")
    async for event in repo.watch("main", since=token, idle_s=0.5):
        commit, before = event.snapshot, event.previous_snapshot_id
        if event.kind != "commit" or commit is None or before is None or DERIVED in commit.metadata:
            continue
        session = await repo.writable_session_async("main")
        changed = await repo.changes_async(before, commit.id)
        rows = [where[0] for change in changed if change.path == "/temperature" for where in change.slices]
        if not rows:
            continue
        days = sorted({day for part in rows for day in range(part.start // HOURS, math.ceil(part.stop / HOURS))})
        source = await zarr_async.open_array(store=session.store, path="temperature")
        means = await zarr_async.open_array(store=session.store, path="means")
        await means.resize((math.ceil(source.shape[0] / HOURS), STATIONS))
        for day in days:
            values = np.asarray(await source.getitem(slice(day * HOURS, (day + 1) * HOURS)))
            await means.setitem(day, values.mean(axis=0))
        metadata = {DERIVED: event.token}
        await session.commit_async(f"means of {len(days)} days", metadata, rebase_with=icechunk.ConflictDetector())


async def lead(repo: icechunk.Repository, lock: Path) -> None:
    with lock.open("w") as file:
        while True:  # the lock of a killed process is free
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            await asyncio.sleep(0.2)
        session = await repo.writable_session_async("main")
        if not await session.store.exists("means/zarr.json"):
            await zarr_async.create_array(
                store=session.store, name="means", shape=(0, STATIONS), chunks=(HOURS, STATIONS), dtype="f4"
            )
            await session.commit_async("means, empty")
        async with asyncio.TaskGroup() as group:
            group.create_task(ingest(repo))
            group.create_task(derive(repo))


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    folder = os.environ["CLIMATE"]
    async with await icechunk.Repository.open_or_create_async(folder) as repo:
        app.state.repo, leading = repo, asyncio.create_task(lead(repo, Path(f"{folder}.lock")))
        # A worker that fails to lead ends, as if it were killed; the server starts another.
        leading.add_done_callback(lambda task: None if task.cancelled() else os._exit(1))
        yield
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)


async def newest(request: Request) -> JSONResponse:
    info = await anext(request.app.state.repo.async_ancestry(branch="main"))
    return JSONResponse({"snapshot": info.id, "message": info.message, "worker": os.getpid()})


async def slice_of(request: Request) -> JSONResponse:
    query = {name: int(value) for name, value in request.query_params.items()}
    session = await request.app.state.repo.readonly_session_async("main")
    path = request.path_params["path"]
    if not await session.store.exists(f"{path}/zarr.json"):
        return JSONResponse({"error": f"there is no {path}"}, 404)
    array = await zarr_async.open_array(store=session.store, path=path)
    values = np.asarray(await array.getitem(slice(query.get("start"), query.get("stop"))))
    return JSONResponse({"snapshot": session.snapshot_id, "values": values.tolist()})


app = Starlette(routes=[Route("/", newest), Route("/{path:path}", slice_of)], lifespan=lifespan)
