"""A web service: slices of one array for many clients, from one event loop.

Every request reads the newest committed version; a client that needs a fixed one names a snapshot or tag.

    python examples/slice_server.py /tmp/measurements --port 8080
    curl 'http://127.0.0.1:8080/values?start=0&stop=3'
"""

from __future__ import annotations

import argparse

import numpy as np
import zarr.api.asynchronous as zarr_async
from aiohttp import web

import icechunk

REPOSITORY = web.AppKey("repository", icechunk.Repository)


async def slice_of(request: web.Request) -> web.Response:
    repo, query = request.app[REPOSITORY], request.query
    try:
        if tag := query.get("tag"):
            session = await repo.readonly_session_async(tag=tag)
        elif snapshot := query.get("snapshot"):
            session = await repo.readonly_session_async(snapshot_id=snapshot)
        else:
            session = await repo.readonly_session_async("main")
        path = request.match_info["path"]
        if not await session.store.exists(f"{path}/zarr.json"):
            raise web.HTTPNotFound(text=f"no array {path!r}\n")
        array = await zarr_async.open_array(store=session.store, path=path)
        rows = np.asarray(
            await array.getitem(slice(int(query.get("start", 0)), int(query.get("stop", array.shape[0]))))
        )
    except icechunk.NotFoundError as error:
        raise web.HTTPNotFound(text=f"{error}\n") from error
    except ValueError as error:
        raise web.HTTPBadRequest(text=f"{error}\n") from error
    return web.json_response({"snapshot": session.snapshot_id, "values": rows.tolist()})


async def application(folder: str) -> web.Application:
    app = web.Application()
    app[REPOSITORY] = await icechunk.Repository.open_async(icechunk.local_filesystem_storage(folder))
    app.router.add_get("/{path:.+}", slice_of)
    return app


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder")
    arguments.add_argument("--port", type=int, default=8080)
    options = arguments.parse_args()
    web.run_app(application(options.folder), host="127.0.0.1", port=options.port)
