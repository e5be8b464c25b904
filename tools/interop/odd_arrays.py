"""Arrays and chunks that the official library takes, and that no array of Zarr has.

``python -m tools.interop.odd_arrays PATH VERSION`` makes a repository of them, and prints the snapshot's id.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from zarr.core.buffer import cpu

import icechunk

__all__ = ["write"]

CHUNK = b"12345678"
SLASH = {"name": "default", "configuration": {"separator": "/"}}


def document(shape: list[int], chunks: list[int], encoding: Any = SLASH) -> bytes:
    """zarr.json of an array of bytes."""
    return json.dumps(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
            "chunk_key_encoding": encoding,
            "fill_value": 7,
            "codecs": [{"name": "bytes"}],
            "attributes": {},
        }
    ).encode()


def contents() -> dict[str, bytes]:
    """Keys and values, in the order in which they are set."""
    return {
        "zarr.json": b'{"zarr_format":3,"node_type":"group","attributes":{}}',
        "fine/zarr.json": document([8], [8]),
        "fine/c/0": CHUNK,
        # Chunks of other ranks than the array's, alone and beside one that fits.
        "scalar/zarr.json": document([], []),
        "scalar/c/0": CHUNK,
        "both/zarr.json": document([], []),
        "both/c/0": CHUNK,
        "both/c": CHUNK,
        "ranks/zarr.json": document([4, 4], [1, 1]),
        "ranks/c/0": CHUNK,
        "ranks/c/0/1": CHUNK,
        "ranks/c/0/1/2": CHUNK,
        # Chunk keys and grids that Zarr has no place for here.
        "dots/zarr.json": document([4], [1], {"name": "default", "configuration": {"separator": "."}}),
        "dots/c/0": CHUNK,
        "v2/zarr.json": document([4], [1], {"name": "v2", "configuration": {"separator": "."}}),
        "suffix/zarr.json": document([4], [1], {"name": "suffix", "configuration": {"suffix": ".x"}}),
        "huge/zarr.json": document([2**40], [1]),
        "empty/zarr.json": document([0], [1]),
        "empty/c/0": CHUNK,
        "lengthless/zarr.json": document([4], [0]),
        "lengthless/c/0": CHUNK,
        "grid/zarr.json": document([4], [1, 1]),
    }


async def _set(store: Any) -> None:
    for key, value in contents().items():
        await store.set(key, cpu.Buffer.from_bytes(value))


def write(path: str, version: int) -> str:
    """Make the repository."""
    config = icechunk.RepositoryConfig(inline_chunk_threshold_bytes=0)
    repo = icechunk.Repository.create(icechunk.local_filesystem_storage(path), config, spec_version=version)
    session = repo.writable_session("main")
    asyncio.run(_set(session.store))
    return str(session.commit("odd"))


if __name__ == "__main__":
    print(json.dumps(write(sys.argv[1], int(sys.argv[2]))))
