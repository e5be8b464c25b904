"""zarr's fused codec pipeline on our stores, and on zarr's own.

The case ``sync`` of ``python -m tools.bench``, which needs zarr 3.3 or later: arrays of 1 000 chunks are written and
read as a whole through the pipeline, which calls ``get_sync`` and ``set_sync``, in memory and on local disk. What is
official elsewhere is `zarr.storage.MemoryStore` or `zarr.storage.LocalStore` here. Both are measured in one process, in
turn, and the least processor time counts: zarr's own work, the same for both, is included. The commit is not, which
`LocalStore` does not have.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from tools import oracle

__all__ = ["CASE", "rows"]

CASE = "sync"
CHUNKS = 1_000
SIZES = {"256 B": 256, "16 KiB": 16 * 1024, "256 KiB": 256 * 1024}
"""Bytes of a chunk. The smallest are inline."""
FLOOR = 1 / 1.2
_PIPELINE = "zarr.core.codec_pipeline.FusedCodecPipeline"


def rows(repeat: int) -> list[dict[str, Any]]:
    """A row for each place, size and direction; ``official_s`` is the time of zarr's own store."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.sync_path", str(repeat)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=oracle.PROJECT,
        check=True,
        timeout=600.0,
    )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return [
        {
            "case": CASE,
            "what": what,
            "ours_s": ours_s,
            "official_s": zarr_s,
            "times_as_fast": zarr_s / ours_s,
            "floor": FLOOR,
            "ok": zarr_s / ours_s >= FLOOR,
        }
        for what, (ours_s, zarr_s) in found.items()
    ]


def _measured(repeat: int) -> dict[str, tuple[float, float]]:
    import numpy as np
    import zarr
    from zarr.storage import LocalStore, MemoryStore

    import icechunk

    zarr.config.set({"codec_pipeline.path": _PIPELINE})

    def turn(store: Any, data: Any, read_from: Callable[[], Any]) -> tuple[float, float]:
        array = zarr.create_array(
            store, name="a", shape=data.shape, chunks=(data.size // CHUNKS,), dtype="u1", compressors=None
        )
        started = time.process_time()
        array[:] = data
        write_s = time.process_time() - started
        array = zarr.open_array(read_from(), path="a", mode="r")
        started = time.process_time()
        found = array[:]
        read_s = time.process_time() - started
        if not np.array_equal(found, data):
            raise AssertionError("what was read is not what was written")
        return write_s, read_s

    def ours(storage: Any, data: Any) -> tuple[float, float]:
        repository = icechunk.Repository.create(storage)
        session = repository.writable_session("main")

        def committed() -> Any:
            session.commit("an array")
            return repository.readonly_session("main").store

        return turn(session.store, data, committed)

    def theirs(store: Any, data: Any) -> tuple[float, float]:
        return turn(store, data, lambda: store)

    found: dict[str, tuple[float, float]] = {}
    for name, size in SIZES.items():
        data = np.random.default_rng(0).integers(0, 255, CHUNKS * size, dtype="u1")
        times: dict[str, list[tuple[float, float]]] = {}
        for _ in range(1 + repeat):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                places: dict[str, Callable[[], tuple[float, float]]] = {
                    "memory ours": partial(ours, icechunk.in_memory_storage(), data),
                    "memory zarr": partial(theirs, MemoryStore(), data),
                    "local ours": partial(ours, icechunk.local_filesystem_storage(f"{folder}/ours"), data),
                    "local zarr": partial(theirs, LocalStore(f"{folder}/zarr"), data),
                }
                for place, work in places.items():
                    times.setdefault(place, []).append(work())
        for place in ("memory", "local"):
            for i, verb in enumerate(("write", "read")):
                # The first turn loads modules.
                least = [min(one[i] for one in times[f"{place} {who}"][1:]) for who in ("ours", "zarr")]
                found[f"{verb} {name}, {place}, CPU"] = least[0], least[1]
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(_measured(int(sys.argv[1]))))
