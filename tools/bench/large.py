"""Large chunks through zarr's own API: ours and official 2.3.0 in turn, and obstore's bare requests beside them.

    python -m tools.bench.large write|read|raw PLACE [--chunks 256] [--codec none|default]

The case ``large`` of ``python -m tools.bench``: 256 chunks of 4 MiB that do not compress, and the first 8 of a process,
on MinIO without added latency and on local disk. Each run is a process of its own, and the median of the repeats
counts; CPU time is the process's own, all threads together. The bare requests put and get the same bytes, as many at a
time as zarr does. Once they stop there (``read, bytes alone``); the other time the received bytes are copied into one
array, as every reader of an array must do, and ours is compared with that.

Each process reads a few times, into an array that is there already: a virtual machine may have to fetch fresh memory
from its host page by page, and whether a GiB of it takes 0.1 s or 3 s is chance. Memory that a library allocates for
itself is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from tools import oracle
from tools.bench import wire

__all__ = ["CASE", "rows", "table"]

CASE = "large"
CHUNKS = 256
COLD_CHUNKS = 8
CHUNK_BYTES = 4 * 1024 * 1024
AT_ONCE = 10
"""zarr's own default."""
READS = 3
"""Reads of one process."""
TIMEOUT_S = 300.0
FLOORS = {
    ("minio", "write", "official"): 1.1,
    ("minio", "read", "official"): 1.1,
    ("minio", "write", "raw"): 0.85,
    ("minio", "read", "raw"): 0.85,
    ("local", "write", "official"): 1.0,
    ("local", "read", "official"): 2.0,
}
"""Least ratio of their wall time to ours with all chunks."""

Samples = dict[str, list[float]]
"""Seconds of each repeat, by what was measured."""


def _data(chunks: int) -> Any:
    return np.random.default_rng(0).integers(0, 2**32, (chunks, CHUNK_BYTES // 4), dtype=np.uint32)


def _storage(place: Mapping[str, str]) -> Any:
    if "folder" in place:
        import icechunk

        return icechunk.local_filesystem_storage(place["folder"])
    return wire.storage_at(place, "large")


@contextlib.contextmanager
def _timed(found: Samples, what: str) -> Iterator[None]:
    if what not in found:
        # Files of earlier runs would be written to the disk meanwhile.
        os.sync()
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    found.setdefault(what, []).append(time.perf_counter() - wall)
    found.setdefault(f"{what}, CPU", []).append(time.process_time() - cpu)


def write(place: Mapping[str, str], chunks: int, codec: str) -> Samples:
    """Seconds to write the array into a new repository, and to commit it."""
    import zarr

    import icechunk

    samples: Samples = {}
    data = _data(chunks)
    session = icechunk.Repository.create(_storage(place)).writable_session("main")
    options: dict[str, Any] = {"compressors": None} if codec == "none" else {}
    array = zarr.create_array(
        store=session.store, name="a", shape=data.shape, chunks=(1, data.shape[1]), dtype=data.dtype, **options
    )
    with _timed(samples, "write"):
        array[:] = data
        session.commit("large chunks")
    return samples


def read(place: Mapping[str, str], chunks: int, codec: str) -> Samples:
    """Seconds to read the whole array once, of a repository that is open already."""
    import zarr
    from zarr.core.buffer.cpu import NDBuffer

    import icechunk

    samples: Samples = {}
    session = icechunk.Repository.open(_storage(place)).readonly_session("main")
    array = zarr.open_array(session.store, path="a", mode="r")
    found = np.empty(array.shape, array.dtype)
    for _ in range(READS):
        found[:] = 0
        with _timed(samples, "read"):
            array.get_basic_selection(slice(None), out=NDBuffer.from_numpy_array(found))
    if not np.array_equal(found, _data(chunks)):
        raise AssertionError("what was read is not what was written")
    return samples


def raw(place: Mapping[str, str], chunks: int, codec: str) -> Samples:
    """Seconds to put, and to get, the same bytes with obstore alone."""
    from obstore.store import S3Store

    samples: Samples = {}
    data = _data(chunks)
    store = S3Store(
        place["bucket"],
        prefix="raw",
        region="us-east-1",
        endpoint=place["endpoint"],
        access_key_id=place["access_key_id"],
        secret_access_key=place["secret_access_key"],
        client_options={"allow_http": True},
        virtual_hosted_style_request=False,
    )

    async def put(n: int) -> None:
        await store.put_async(str(n), memoryview(data[n]).cast("B"), use_multipart=False)

    async def get(n: int) -> None:
        answer = await store.get_async(str(n))
        if len(await answer.bytes_async()) != CHUNK_BYTES:
            raise AssertionError("bytes are missing")

    async def get_into(found: Any, n: int) -> None:
        answer = await store.get_async(str(n))
        found[n] = np.frombuffer(memoryview(await answer.bytes_async()), found.dtype)

    async def each(work: Any) -> None:
        waiting = iter(range(chunks))

        async def worker() -> None:
            for n in waiting:
                await work(n)

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))

    with _timed(samples, "write"):
        asyncio.run(each(put))
    found = np.empty_like(data)
    for _ in range(READS):
        found[:] = 0
        with _timed(samples, "read, bytes alone"):
            asyncio.run(each(get))
        with _timed(samples, "read"):
            asyncio.run(each(partial(get_into, found)))
    if not np.array_equal(found, data):
        raise AssertionError("what was read is not what was written")
    return samples


@contextlib.contextmanager
def _place(kind: str) -> Iterator[dict[str, str]]:
    if kind == "local":
        with tempfile.TemporaryDirectory(prefix="large-") as folder:
            yield {"folder": folder}
        return
    with wire.minio() as place:
        yield place


def _run(who: str, verb: str, place: Mapping[str, str], chunks: int, codec: str) -> Samples:
    words = [verb, json.dumps(place), "--chunks", str(chunks), "--codec", codec]
    if who == "official":
        for _ in range(2):
            # It sometimes ends with a segmentation fault at the end of a process.
            with contextlib.suppress(oracle.OracleError):
                return _samples(oracle.run(oracle.OFFICIAL_CURRENT, "tools.bench.large", *words, timeout_s=TIMEOUT_S))
        return _samples(oracle.run(oracle.OFFICIAL_CURRENT, "tools.bench.large", *words, timeout_s=TIMEOUT_S))
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.large", *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=oracle.PROJECT,
        check=True,
        timeout=TIMEOUT_S,
    )
    return _samples(json.loads(done.stdout.strip().splitlines()[-1]))


def _samples(found: Any) -> Samples:
    return {str(what): [float(value) for value in values] for what, values in found.items()}


def rows(repeat: int, kinds: tuple[str, ...] = ("minio", "local")) -> list[dict[str, Any]]:
    """Measure everything, ours and theirs in turn, each into a place that is new."""
    samples: dict[tuple[str, str, int, str], Samples] = {}
    for turn in range(repeat):
        for kind in kinds:
            print(f"{CASE} on {kind} {turn + 1}/{repeat}", file=sys.stderr, flush=True)
            for chunks in (CHUNKS, COLD_CHUNKS):
                for codec in ("none", "default"):
                    for who in ("ours", "official", *(["raw"] if kind == "minio" and codec == "none" else [])):
                        with _place(kind) as place:
                            verbs = ("raw",) if who == "raw" else ("write", "read")
                            for verb in verbs:
                                kept = samples.setdefault((kind, who, chunks, codec), {})
                                for what, values in _run(who, verb, place, chunks, codec).items():
                                    kept.setdefault(what, []).extend(values)
    return [
        _row(kind, verb, chunks, codec, samples)
        for kind in kinds
        for chunks in (CHUNKS, COLD_CHUNKS)
        for codec in ("none", "default")
        for verb in ("write", "read")
    ]


def _row(
    kind: str, verb: str, chunks: int, codec: str, samples: Mapping[tuple[str, str, int, str], Samples]
) -> dict[str, Any]:
    ours, official = samples[kind, "ours", chunks, codec], samples[kind, "official", chunks, codec]
    bare = samples.get((kind, "raw", chunks, "none"), {}) if codec == "none" else {}
    ours_s = median(ours[verb])
    row: dict[str, Any] = {
        "case": CASE,
        "what": f"{verb} {chunks} on {kind}, codec {codec}",
        "ours_s": ours_s,
        "official_s": median(official[verb]),
        "times_as_fast": median(official[verb]) / ours_s,
        "times_as_fast_best": min(official[verb]) / min(ours[verb]),
        "cpu_share": median(ours[f"{verb}, CPU"]) / median(official[f"{verb}, CPU"]),
        "ours_cpu_s": median(ours[f"{verb}, CPU"]),
        "times_raw": median(bare[verb]) / ours_s if bare else None,
        "times_raw_best": min(bare[verb]) / min(ours[verb]) if bare else None,
        "times_raw_bytes": median(bare["read, bytes alone"]) / ours_s if bare and verb == "read" else None,
        "floor": FLOORS.get((kind, verb, "official")) if chunks == CHUNKS else None,
        "floor_raw": FLOORS.get((kind, verb, "raw")) if chunks == CHUNKS and bare else None,
    }
    row["ok"] = row["times_as_fast"] >= (row["floor"] or 0.0) and (row["times_raw"] or 1.0) >= (row["floor_raw"] or 0.0)
    return row


def table(found: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [
        f"{'case':8}{'what':38}{'ours':>9}{'official':>10}{'× as fast':>11}{'best':>7}{'floor':>7}{'CPU share':>11}"
        f"{'× raw':>8}{'best':>7}{'floor':>7}{'bytes':>7}"
    ]
    for row in found:
        lines.append(
            f"{row['case']:8}{row['what']:38}{row['ours_s']:>7.2f} s{row['official_s']:>8.2f} s"
            f"{row['times_as_fast']:>11.2f}{row['times_as_fast_best']:>7.2f}{_number(row['floor']):>7}"
            f"{row['cpu_share']:>11.2f}{_number(row['times_raw']):>8}{_number(row['times_raw_best']):>7}"
            f"{_number(row['floor_raw']):>7}{_number(row['times_raw_bytes']):>7}"
            f"{'' if row['ok'] else ' !'}"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    """Measure what the command line asks for."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("verb", choices=["write", "read", "raw"])
    parser.add_argument("place", type=json.loads)
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--codec", choices=["none", "default"], default="none")
    options = parser.parse_args()
    work = {"write": write, "read": read, "raw": raw}[options.verb]
    print(json.dumps(work(options.place, options.chunks, options.codec)), flush=True)
    if options.verb == "raw":
        # obstore's threads may abort a process that ends right after a request.
        os._exit(0)


if __name__ == "__main__":
    main()
