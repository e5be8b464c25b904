"""Micro-benchmarks of the session log: single chunk calls, bulk writes, compaction.

Run ``python -m tools.bench.session_log`` from the repository's root; one line per figure: the best
of several runs, in CPU time, since nothing here waits.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable

import numpy as np

from icechunk.format.ids import FIRST_SNAPSHOT, NodeId, ObjectId
from icechunk.format.values import NATIVE, ChunkRefs, Manifest, NodeSnapshot, Snapshot
from icechunk.log.session.columns import find
from icechunk.log.session.log import SessionLog
from icechunk.log.session.plan.compaction import Placed, Policy, new_manifests, new_snapshot, placed, plan

EMPTY = Snapshot(id=FIRST_SNAPSHOT, flushed_at_us=1, message="")


def array_json(*shape: int) -> bytes:
    return json.dumps(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": "int32",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1] * len(shape)}},
            "chunk_key_encoding": {"name": "default"},
            "fill_value": 0,
            "codecs": [],
        }
    ).encode()


def refs(coords: np.ndarray) -> ChunkRefs:
    n = len(coords)
    return ChunkRefs(
        coords=coords.astype(np.uint32),
        kind=np.full(n, NATIVE, np.uint8),
        offset=np.zeros(n, np.uint64),
        length=np.full(n, 100, np.uint64),
        chunk_id=np.frombuffer(os.urandom(12 * n), "V12"),
        location=np.full(n, -1, np.int32),
    )


class Bench:
    """One in-memory repository."""

    def __init__(self) -> None:
        self.base = EMPTY
        self.manifests: dict[ObjectId, Manifest] = {}

    def log(self) -> SessionLog:
        return SessionLog(self.base, lambda: NodeId(os.urandom(8)))

    def commit(self, log: SessionLog) -> None:
        planned = plan(log, Policy())
        places: list[Placed] = []
        found = {i: self.manifests[i] for i in planned.manifests_to_read}
        for manifest in new_manifests(planned, found, lambda: ObjectId(os.urandom(12))):
            self.manifests[manifest.id] = manifest
            places.append(placed(manifest, 1))
        self.base = new_snapshot(
            planned,
            places,
            snapshot_id=ObjectId(os.urandom(12)),
            parent_id=None,
            flushed_at_us=self.base.flushed_at_us + 1,
            message="",
            metadata={},
        )


def report(name: str, seconds: float, calls: int = 1) -> None:
    value = f"{seconds * 1e3:9.1f} ms" if calls == 1 else f"{seconds / calls * 1e6:9.2f} µs a call"
    print(f"{name:48s} {value}", flush=True)


def best(run: Callable[[], object], times: int = 3) -> float:
    taken = []
    for _ in range(times):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


def single_calls() -> None:
    log = Bench().log()
    log.set_metadata("/g/a", array_json(1000, 1000, 10))
    spots = list(itertools.product(range(200), range(100), (3,)))
    node = log.node("/g/a")
    assert node is not None
    n = len(spots)
    report("node", best(lambda: [log.node("/g/a") for _ in spots]), n)

    def set_inline() -> None:
        for c in spots:
            log.set_inline(node, c, b"12345678")

    def set_native() -> None:
        for c in spots:
            log.set_native(node, c, ObjectId(bytes(12)), 0, 9)

    report("set_inline", best(set_inline), n)
    report("set_native", best(set_native), n)
    report("chunk, written one at a time", best(lambda: [log.chunk(node, c) for c in spots]), n)


def million() -> None:
    grid = np.stack(np.meshgrid(np.arange(1000), np.arange(1000), indexing="ij"), -1).reshape(-1, 2)
    rng = np.random.default_rng(0)
    for name, rows in (("in order", grid), ("shuffled", rng.permutation(grid))):
        columns = refs(rows)
        bench = Bench()
        log = bench.log()
        log.set_metadata("/a", array_json(2000, 1000))
        node = log.node("/a")
        assert node is not None
        array: NodeSnapshot = node
        report(f"set_refs of 1 M, {name}", best(lambda: log.set_refs(array, columns), 1))  # noqa: B023
        spots = [tuple(r) for r in rng.integers(0, 1000, (20_000, 2)).tolist()]
        report("chunk, written in bulk", best(lambda: [log.chunk(array, c) for c in spots]), len(spots))  # noqa: B023
        report("commit of 1 M (plan and compact)", best(lambda: bench.commit(log), 1))  # noqa: B023
    manifest = next(iter(bench.manifests.values()))
    ((_, held),) = manifest.arrays.items()
    spots = [tuple(r) for r in held.coords[:20_000].tolist()]
    report("find in a manifest of 62 500", best(lambda: [find(held, c) for c in spots]), len(spots))
    for name, rows in (("append of 1 000", grid[:1000] + np.array([1000, 0])), ("1 000 anywhere", grid[::1000])):
        log = bench.log()
        node = log.node("/a")
        assert node is not None
        log.set_refs(node, refs(rows))
        report(f"commit to 1 M: {name}", best(lambda: bench.commit(log), 1))  # noqa: B023


def small_arrays() -> None:
    bench = Bench()
    for name in ("created", "updated"):
        log = bench.log()
        for i in range(5000):
            if name == "created":
                log.set_metadata(f"/a{i}", array_json(2))
            node = log.node(f"/a{i}")
            assert node is not None
            log.set_native(node, (0,), ObjectId(bytes(12)), 0, 1)
            log.set_native(node, (1,), ObjectId(bytes(12)), 0, 1)
        report(f"commit of 5 000 arrays of 2 chunks, {name}", best(lambda: bench.commit(log), 1))  # noqa: B023


if __name__ == "__main__":
    single_calls()
    million()
    small_arrays()
