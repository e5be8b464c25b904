"""Large chunks through zarr's own API: ours and official 2.3.0 in turn, and obstore's bare requests beside them.

    python -m tools.bench.large write|read|raw PLACE [--chunks 256] [--codec none|default]

The case ``large`` of ``python -m tools.bench``: 256 chunks of 4 MiB that do not compress, and the first 8 of a process,
on MinIO without added latency and on local disk. Each run is a process of its own, and the best of the repeats counts;
CPU time is the process's own, all threads together. The bare requests put and get the same bytes, as many at a time as
zarr does. Once they stop there (``read, bytes alone``); the other time what they bring is copied into one array, as
whoever reads an array has to, and that is what ours is held against.

Each process reads the array a few times, the first time into memory that the machine may have to fetch from its host
page by page: for a GiB that takes 0.1 s or 3 s on a virtual machine, whoever reads. So the best time counts here too.
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
"""Of one process."""
TIMEOUT_S = 300.0
FLOORS = {
    ("minio", "write", "official"): 1.1,
    ("minio", "read", "official"): 1.1,
    ("minio", "write", "raw"): 0.85,
    ("minio", "read", "raw"): 0.85,
    ("local", "write", "official"): 1.0,
    ("local", "read", "official"): 2.0,
}
"""How many times as fast as those we must be with all chunks, in wall time."""

Figures = dict[str, float]


def _data(chunks: int) -> Any:
    return np.random.default_rng(0).integers(0, 2**32, (chunks, CHUNK_BYTES // 4), dtype=np.uint32)


def _storage(place: Mapping[str, str]) -> Any:
    if "folder" in place:
        import icechunk

        return icechunk.local_filesystem_storage(place["folder"])
    return wire.storage_at(place, "large")


@contextlib.contextmanager
def _timed(figures: Figures, what: str) -> Iterator[None]:
    # What ran before would be written to the disk meanwhile.
    os.sync()
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    found = {what: time.perf_counter() - wall, f"{what}, CPU": time.process_time() - cpu}
    if found[what] < figures.get(what, float("inf")):
        figures.update(found)


def write(place: Mapping[str, str], chunks: int, codec: str) -> Figures:
    """Seconds to write the array into a new repository, and to commit it."""
    import zarr

    import icechunk

    figures: Figures = {}
    data = _data(chunks)
    session = icechunk.Repository.create(_storage(place)).writable_session("main")
    options: dict[str, Any] = {"compressors": None} if codec == "none" else {}
    array = zarr.create_array(
        store=session.store, name="a", shape=data.shape, chunks=(1, data.shape[1]), dtype=data.dtype, **options
    )
    with _timed(figures, "write"):
        array[:] = data
        session.commit("large chunks")
    return figures


def read(place: Mapping[str, str], chunks: int, codec: str) -> Figures:
    """Seconds to read the whole array once, of a repository that is open already."""
    import zarr

    import icechunk

    figures: Figures = {}
    session = icechunk.Repository.open(_storage(place)).readonly_session("main")
    array = zarr.open_array(session.store, path="a", mode="r")
    found = None
    for _ in range(READS):
        del found
        with _timed(figures, "read"):
            found = array[:]
    if not np.array_equal(found, _data(chunks)):
        raise AssertionError("what was read is not what was written")
    return figures


def raw(place: Mapping[str, str], chunks: int, codec: str) -> Figures:
    """Seconds to put, and to get, the same bytes with obstore alone."""
    from obstore.store import S3Store

    figures: Figures = {}
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
        found[n] = np.frombuffer(await answer.bytes_async(), found.dtype)

    async def each(work: Any) -> None:
        waiting = iter(range(chunks))

        async def worker() -> None:
            for n in waiting:
                await work(n)

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))

    with _timed(figures, "write"):
        asyncio.run(each(put))
    found = None
    for _ in range(READS):
        del found
        with _timed(figures, "read, bytes alone"):
            asyncio.run(each(get))
        with _timed(figures, "read"):
            found = np.empty_like(data)
            asyncio.run(each(partial(get_into, found)))
    if not np.array_equal(found, data):
        raise AssertionError("what was read is not what was written")
    return figures


@contextlib.contextmanager
def _place(kind: str) -> Iterator[dict[str, str]]:
    if kind == "local":
        with tempfile.TemporaryDirectory(prefix="large-") as folder:
            yield {"folder": folder}
        return
    with wire.minio() as place:
        yield place


def _run(who: str, verb: str, place: Mapping[str, str], chunks: int, codec: str) -> Figures:
    words = [verb, json.dumps(place), "--chunks", str(chunks), "--codec", codec]
    if who == "official":
        for _ in range(2):
            # It sometimes dies of a segmentation fault at the end of a process.
            with contextlib.suppress(oracle.OracleError):
                return _figures(oracle.run(oracle.OFFICIAL_CURRENT, "tools.bench.large", *words, timeout_s=TIMEOUT_S))
        return _figures(oracle.run(oracle.OFFICIAL_CURRENT, "tools.bench.large", *words, timeout_s=TIMEOUT_S))
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.large", *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=oracle.PROJECT,
        check=True,
        timeout=TIMEOUT_S,
    )
    return _figures(json.loads(done.stdout.strip().splitlines()[-1]))


def _figures(found: Any) -> Figures:
    return {str(what): float(value) for what, value in found.items()}


def rows(repeat: int, kinds: tuple[str, ...] = ("minio", "local")) -> list[dict[str, Any]]:
    """Measure everything, ours and theirs in turn, each into a place that is new."""
    best: dict[tuple[str, str, int, str], Figures] = {}
    for turn in range(repeat):
        for kind in kinds:
            print(f"{CASE} on {kind} {turn + 1}/{repeat}", file=sys.stderr, flush=True)
            for chunks in (CHUNKS, COLD_CHUNKS):
                for codec in ("none", "default"):
                    for who in ("ours", "official", *(["raw"] if kind == "minio" and codec == "none" else [])):
                        with _place(kind) as place:
                            verbs = ("raw",) if who == "raw" else ("write", "read")
                            for verb in verbs:
                                found = _run(who, verb, place, chunks, codec)
                                kept = best.setdefault((kind, who, chunks, codec), {})
                                for what, value in found.items():
                                    kept[what] = min(kept.get(what, value), value)
    return [
        _row(kind, verb, chunks, codec, best)
        for kind in kinds
        for chunks in (CHUNKS, COLD_CHUNKS)
        for codec in ("none", "default")
        for verb in ("write", "read")
    ]


def _row(
    kind: str, verb: str, chunks: int, codec: str, best: Mapping[tuple[str, str, int, str], Figures]
) -> dict[str, Any]:
    ours, official = best[kind, "ours", chunks, codec], best[kind, "official", chunks, codec]
    bare = best.get((kind, "raw", chunks, "none"), {}) if codec == "none" else {}
    row: dict[str, Any] = {
        "case": CASE,
        "what": f"{verb} {chunks} on {kind}, codec {codec}",
        "ours_s": ours[verb],
        "official_s": official[verb],
        "times_as_fast": official[verb] / ours[verb],
        "cpu_share": ours[f"{verb}, CPU"] / official[f"{verb}, CPU"],
        "ours_cpu_s": ours[f"{verb}, CPU"],
        "times_raw": bare[verb] / ours[verb] if bare else None,
        "times_raw_bytes": bare["read, bytes alone"] / ours[verb] if bare and verb == "read" else None,
        "floor": FLOORS.get((kind, verb, "official")) if chunks == CHUNKS else None,
        "floor_raw": FLOORS.get((kind, verb, "raw")) if chunks == CHUNKS and bare else None,
    }
    row["ok"] = row["times_as_fast"] >= (row["floor"] or 0.0) and (row["times_raw"] or 1.0) >= (row["floor_raw"] or 0.0)
    return row


def table(found: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [
        f"{'case':8}{'what':38}{'ours':>9}{'official':>10}{'× as fast':>11}{'floor':>7}{'CPU share':>11}"
        f"{'× raw':>8}{'floor':>7}{'bytes':>7}"
    ]
    for row in found:
        lines.append(
            f"{row['case']:8}{row['what']:38}{row['ours_s']:>7.2f} s{row['official_s']:>8.2f} s"
            f"{row['times_as_fast']:>11.2f}{_number(row['floor']):>7}{row['cpu_share']:>11.2f}"
            f"{_number(row['times_raw']):>8}{_number(row['floor_raw']):>7}{_number(row['times_raw_bytes']):>7}"
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
