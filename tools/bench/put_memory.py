"""Peak memory of writing an array through zarr and the put pool.

    python -m tools.bench.put_memory [--mib 1024] [--chunk-mib 4] [--bound-mib 64] [--on local|minio]

Prints one JSON object: MiB of the peak resident set above what it was once the array was made, and what of it is above
the bound. A process of its own, since a peak cannot be reset.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import tempfile
from collections.abc import Iterator

import numpy as np
import zarr

import icechunk
from tools.bench import wire

MIB = 1024 * 1024


def peak_mib() -> float:
    """Largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.contextmanager
def place(kind: str) -> Iterator[icechunk.Storage]:
    """An empty storage."""
    if kind == "local":
        # Files may follow a commit for a moment.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            yield icechunk.local_filesystem_storage(folder)
        return
    with wire.minio() as options:
        yield wire.storage_at(options, "put-memory")


def measure(mib: int, chunk_mib: int, bound_mib: int, kind: str) -> dict[str, float]:
    """Write ``mib`` MiB in chunks and commit."""
    config = icechunk.RepositoryConfig(engine=icechunk.EngineConfig(put_memory_bytes=bound_mib * MIB))
    with place(kind) as storage:
        repo = icechunk.Repository.create(storage, config)
        session = repo.writable_session("main")
        array = zarr.create_array(
            store=session.store,
            name="a",
            shape=(mib * MIB,),
            chunks=(chunk_mib * MIB,),
            dtype="u1",
            compressors=None,
            fill_value=255,
        )
        data = np.zeros(mib * MIB, np.uint8)
        data += 1
        before = peak_mib()
        array[:] = data
        session.commit("written")
        above = peak_mib() - before
    return {"above_array_mib": round(above, 1), "above_array_and_bound_mib": round(above - bound_mib, 1)}


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--chunk-mib", type=int, default=4)
    parser.add_argument("--bound-mib", type=int, default=64)
    parser.add_argument("--on", choices=["local", "minio"], default="minio")
    options = parser.parse_args()
    print(json.dumps(measure(options.mib, options.chunk_mib, options.bound_mib, options.on)))


if __name__ == "__main__":
    main()
