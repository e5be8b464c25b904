"""Costs of one array in a hierarchy of 1 000, 10 000 and 100 000 arrays, on local disk, with either library."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype

import icechunk

__all__ = ["wide"]

WIDTHS = {"1k": 1_000, "10k": 10_000, "100k": 100_000}
_GROUP = 100
_AT_ONCE = 500
_TURNS = 5


def wide(_: Mapping[str, Any]) -> dict[str, float]:
    """Seconds until one array of a repository is open, by a new repository object; and of a session that changes one
    attribute and commits. The best of some turns."""
    seconds: dict[str, float] = {}
    for name, width in WIDTHS.items():
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            storage = icechunk.local_filesystem_storage(folder)
            asyncio.run(_make(icechunk.Repository.create(storage), width))
            path = _path(width // 2)
            opened, changed = [], []
            for turn in range(_TURNS):
                started = time.perf_counter()
                repository = icechunk.Repository.open(icechunk.local_filesystem_storage(folder))
                array = zarr.open_array(repository.readonly_session("main").store, path=path, mode="r")
                opened.append(time.perf_counter() - started)
                if array.attrs.get("turn") != (turn - 1 if turn else None):
                    raise AssertionError("what was read is not what was written")
                started = time.perf_counter()
                session = repository.writable_session("main")
                zarr.open_array(session.store, path=path, mode="r+").attrs["turn"] = turn
                session.commit("an attribute")
                changed.append(time.perf_counter() - started)
            seconds |= {f"open one of {name}": min(opened), f"change one of {name}": min(changed)}
    return seconds


def _path(i: int) -> str:
    return f"group{i // _GROUP:04d}/array{i}"


async def _make(repository: Any, width: int) -> None:
    session = await repository.writable_session_async("main")
    store = session.store
    await zarr.api.asynchronous.create_array(
        store=store, name=_path(0), shape=(64,), chunks=(16,), dtype="f4", attributes={"units": "K"}
    )
    document = await store.get(f"{_path(0)}/zarr.json", default_buffer_prototype())
    for first in range(1, width, _AT_ONCE):
        some = range(first, min(width, first + _AT_ONCE))
        await asyncio.gather(*(store.set(f"{_path(i)}/zarr.json", document) for i in some))
    await session.commit_async("arrays")
