"""Forks of a session: written to, sent back, merged and committed."""

from __future__ import annotations

import pickle
import time
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr

import icechunk
from tools.bench.wire import storage_at

__all__ = ["merge"]

FORKS = 4
CHUNKS = 64
CHUNK_BYTES = 16 * 1024
TURNS = 3


def merge(options: Mapping[str, Any]) -> dict[str, float]:
    """Seconds to merge four forks that have written 64 chunks of 16 KiB each and came back as pickles, and to commit;
    and of all that with the writing. The best of some turns."""
    merged, everything = [], []
    each = CHUNKS * CHUNK_BYTES
    data = np.random.default_rng(0).integers(0, 255, each, dtype="u1")
    for _ in range(TURNS):
        repository = icechunk.Repository.create(storage_at(options, f"bench/{uuid.uuid4().hex}"))
        session = repository.writable_session("main")
        zarr.create_array(
            store=session.store, name="a", shape=(FORKS * each,), chunks=(CHUNK_BYTES,), dtype="u1", compressors=None
        )
        session.commit("an array")
        session = repository.writable_session("main")
        started = time.perf_counter()
        forks = [session.fork() for _ in range(FORKS)]
        for i, fork in enumerate(forks):
            zarr.open_array(fork.store, path="a", mode="r+")[i * each : (i + 1) * each] = data
        back = [pickle.loads(pickle.dumps(fork)) for fork in forks]
        written = time.perf_counter()
        session.merge(*back)
        session.commit("merged")
        ended = time.perf_counter()
        merged.append(ended - written)
        everything.append(ended - started)
    return {"merge and commit": min(merged), "write, merge and commit": min(everything)}
