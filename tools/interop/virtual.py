"""Virtual references written and read by either library: the same script on ours and on the official one.

``python -m tools.interop.virtual write|read PATH FOLDER``: FOLDER has the file ``f``. Writing prints the snapshot's id;
reading prints, for each array, its references and its bytes, or the kind of error that reading it ends with.
"""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import icechunk

__all__ = ["access", "config", "read", "write"]

MANY = 1200


def prefix(folder: Path) -> str:
    """The container's."""
    return f"file://{folder}/"


def config(folder: Path) -> Any:
    """A configuration with one container, called ``local``."""
    made = icechunk.RepositoryConfig.default()
    made.set_virtual_chunk_container(
        icechunk.VirtualChunkContainer(prefix(folder), icechunk.local_filesystem_store(str(folder)), name="local")
    )
    return made


def access(folder: Path) -> Any:
    """The authorisation of the container."""
    return {prefix(folder): icechunk.credentials.LocalFileSystemAccess}


def write(repo: Any, folder: Path) -> str:
    """Commit arrays with virtual references of every kind."""
    session = repo.writable_session("main")
    store = session.store
    zarr.create_group(store)
    where = prefix(folder)
    modified = datetime.fromtimestamp((folder / "f").stat().st_mtime, UTC)

    def array(name: str, chunks: int = 4) -> None:
        zarr.create_array(
            store, name=name, shape=(10 * chunks,), chunks=(10,), dtype="u1", filters=None, compressors=None
        )

    for name, location, checksum in [
        ("plain", f"{where}f", None),
        ("encoded", f"{where}%66", None),
        ("named", "vcc://local/f", None),
        ("dots", "vcc://local/x/../f", None),
        ("recent", f"{where}f", modified + timedelta(seconds=5)),
        ("changed", f"{where}f", modified - timedelta(seconds=60)),
        ("etag", f"{where}f", "another"),
        ("missing", f"{where}nothing", None),
    ]:
        array(name)
        for i in (0, 2):
            store.set_virtual_ref(f"{name}/c/{i}", location, offset=20 * i, length=10, checksum=checksum)
    array("short")
    store.set_virtual_ref("short/c/0", f"{where}f", offset=10**6, length=10)
    array("foreign")
    store.set_virtual_ref("foreign/c/0", "s3://unknown/x", offset=1, length=10, validate_container=False)
    array("mixed")
    store.set_virtual_refs(
        "/mixed",
        [
            icechunk.VirtualChunkSpec([1], f"{where}f", 30, 10, None, modified + timedelta(seconds=5)),
            icechunk.VirtualChunkSpec([3], "vcc://local/f", 40, 10),
        ],
    )
    zarr.open_array(store, path="mixed")[:10] = 9
    array("many", MANY)
    locations = [f"{where}copies/of/one/file/{i:05d}/f" for i in range(MANY)]
    offsets = np.arange(MANY, dtype=np.uint64) % np.uint64(900)
    store.set_virtual_refs_arr("/many", (MANY,), locations, offsets, np.full(MANY, 10, np.uint64))
    snapshot: str = session.commit("virtual")
    return snapshot


async def _references(store: Any, name: str) -> list[Any]:
    found = []
    async for coords, kinds, locations, offsets, lengths, inline in store.array_chunk_iterator(f"/{name}", 100):
        for i, row in enumerate(coords.tolist()):
            data = inline.get(i)
            row_of = [row, int(kinds[i]), locations[i], int(offsets[i]), int(lengths[i]), data and data.hex()]
            found.append(row_of)
    return sorted(found)


def read(session: Any) -> dict[str, Any]:
    """References and bytes of every array."""
    store = session.store
    result: dict[str, Any] = {"locations": sorted(session.all_virtual_chunk_locations())}
    for name in sorted(zarr.open_group(store, mode="r").array_keys()):
        references = asyncio.run(_references(store, name))
        try:
            values = np.asarray(zarr.open_array(store, path=name, mode="r")[...]).tobytes().hex()
        except icechunk.IcechunkError as error:
            values = f"{type(error).__name__} {error.kind}"
        result[name] = {"references": references, "values": values}
    return result


def main(arguments: list[str]) -> None:
    """See the module."""
    verb, path, place = arguments
    folder = Path(place)
    storage = icechunk.local_filesystem_storage(path)
    if verb == "write":
        print(json.dumps(write(icechunk.Repository.create(storage, config(folder), access(folder)), folder)))
        return
    repo = icechunk.Repository.open(storage, config(folder), access(folder))
    print(json.dumps(read(repo.readonly_session("main"))))


if __name__ == "__main__":
    main(sys.argv[1:])
