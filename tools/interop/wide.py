"""A hierarchy of some hundred arrays, made, changed and read by whichever library the environment has.

python -m tools.interop.wide create PLACE VERSION | change PLACE NUMBER | read PLACE
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from zarr.core.buffer import cpu, default_buffer_prototype

import icechunk

ARRAYS = 400
CHUNK = b"x" * 600


def document(attribute: int) -> bytes:
    """An array's ``zarr.json``."""
    return json.dumps(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [8, 4],
            "data_type": "int8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [8, 2]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "bytes"}],
            "dimension_names": ["time", None],
            "attributes": {"number": attribute},
        }
    ).encode()


async def _create(store: Any) -> None:
    for n in range(ARRAYS):
        path = f"g{n // 20:02}/é{n}" if n % 7 == 0 else f"g{n // 20:02}/a{n}"
        # Some documents are equal, which this package writes once for several arrays.
        await store.set(f"{path}/zarr.json", cpu.Buffer.from_bytes(document(n if n % 2 else n % 3)))
        if n % 3 == 0:
            await store.set(f"{path}/c/0/1", cpu.Buffer.from_bytes(CHUNK))


async def _change(store: Any, n: int) -> None:
    await store.set("g01/a22/zarr.json", cpu.Buffer.from_bytes(document(n)))
    await store.set(f"new{n}/zarr.json", cpu.Buffer.from_bytes(document(n)))
    await store.set("g03/a60/c/0/0", cpu.Buffer.from_bytes(CHUNK + b"%d" % n))
    await store.delete_dir(f"g05/a{100 + n}")


async def contents(store: Any) -> dict[str, str]:
    """Every value, in hexadecimal."""
    found = {}
    async for key in store.list():
        value = await store.get(key, default_buffer_prototype())
        found[key] = value.to_bytes().hex()
    return dict(sorted(found.items()))


def run(verb: str, place: str, number: int = 0) -> Any:
    """Do what the command line asks for."""
    storage = icechunk.local_filesystem_storage(place)
    if verb == "read":
        return asyncio.run(contents(icechunk.Repository.open(storage).readonly_session("main").store))
    if verb == "create":
        config = icechunk.RepositoryConfig(inline_chunk_threshold_bytes=0)
        session = icechunk.Repository.create(storage, config, spec_version=number).writable_session("main")
        asyncio.run(_create(session.store))
    else:
        session = icechunk.Repository.open(storage).writable_session("main")
        asyncio.run(_change(session.store, number))
    return str(session.commit(verb))


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))))
