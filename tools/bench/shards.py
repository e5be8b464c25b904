"""Inner chunks of one large shard, read at random."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr

import icechunk
from tools.bench.wire import storage_at

__all__ = ["shards"]

INNER = 10_000
INNER_VALUES = 256
ONE_AT_A_TIME = 300


def shards(options: Mapping[str, Any]) -> dict[str, float]:
    """Seconds to read 10 000 inner chunks of 1 KiB of one shard: a value of each in one selection, and 300 of them at
    random, one after the other. Each by a new repository object, the index of the shard included.

    The selection is one request; the rest of its time is zarr's own, which decodes each inner chunk.
    """
    prefix = f"bench/{uuid.uuid4().hex}"
    data = np.random.default_rng(0).integers(0, 2**31, INNER * INNER_VALUES, dtype="i4")
    session = icechunk.Repository.create(storage_at(options, prefix)).writable_session("main")
    array = zarr.create_array(
        store=session.store,
        name="a",
        shape=data.shape,
        chunks=(INNER_VALUES,),
        shards=data.shape,
        dtype="i4",
        compressors=None,
    )
    array[:] = data
    session.commit("a shard")
    order = np.random.default_rng(1).permutation(INNER)
    seconds: dict[str, float] = {}

    array = _opened(options, prefix)
    started = time.perf_counter()
    found = array.get_orthogonal_selection((order * INNER_VALUES,))
    seconds["all in one selection"] = time.perf_counter() - started
    if not np.array_equal(found, data[order * INNER_VALUES]):
        raise AssertionError("what was read is not what was written")

    array = _opened(options, prefix)
    started = time.perf_counter()
    for i in order[:ONE_AT_A_TIME].tolist():
        part = np.asarray(array[i * INNER_VALUES : (i + 1) * INNER_VALUES])
        if part[0] != data[i * INNER_VALUES]:
            raise AssertionError("what was read is not what was written")
    seconds["one at a time"] = time.perf_counter() - started
    return seconds


def _opened(options: Mapping[str, Any], prefix: str) -> Any:
    store = icechunk.Repository.open(storage_at(options, prefix)).readonly_session("main").store
    return zarr.open_array(store, path="a", mode="r")
