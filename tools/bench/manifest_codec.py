"""Speed and peak memory of the manifest codec.

    python tools/bench/manifest_codec.py [--rows 1000000] [--case native] [--repeat 3]

Times are CPU seconds of the best of the repeats, whole calls (with zstd), on one core; the
peak is the process's resident set above what it was once the references were made. One case per
process, since a peak cannot be reset.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.manifest import decode_manifest, encode_manifest
from icechunk.format.values import ETAG, ID12, INLINE, NATIVE, VIRTUAL, ChunkRefs, Manifest


def grid(rows: int) -> np.ndarray:
    """Coordinates of the first ``rows`` chunks of a three-dimensional grid."""
    side = max(1, round(rows ** (1 / 3)))
    numbers = np.arange(rows)
    return np.stack([numbers // (side * side), numbers // side % side, numbers % side], axis=1).astype(np.uint32)


def columns(rows: int, kind: int, **more: object) -> ChunkRefs:
    """References of one kind."""
    random = np.random.default_rng(1)
    fields: dict[str, object] = {
        "coords": grid(rows),
        "kind": np.full(rows, kind, np.uint8),
        "offset": np.zeros(rows, np.uint64),
        "length": random.integers(100_000, 200_000, rows).astype(np.uint64),
        "chunk_id": np.zeros(rows, ID12),
        "location": np.full(rows, -1, np.int32),
    }
    return ChunkRefs(**(fields | more))  # type: ignore[arg-type]


def native(rows: int) -> ChunkRefs:
    """Every chunk in an object of its own."""
    ids = np.frombuffer(np.random.default_rng(2).bytes(12 * rows), ID12)
    return columns(rows, NATIVE, chunk_id=ids)


def packed(rows: int) -> ChunkRefs:
    """Chunks of 16 KiB, 256 to an object."""
    ids = np.frombuffer(np.random.default_rng(2).bytes(12 * (rows // 256 + 1)), ID12)
    numbers = np.arange(rows)
    offset = (numbers % 256 * 16384).astype(np.uint64)
    return columns(rows, NATIVE, chunk_id=ids[numbers // 256], offset=offset, length=np.full(rows, 16384, np.uint64))


def virtual(rows: int) -> ChunkRefs:
    """1 000 files."""
    names = tuple(f"s3://bucket/data/year/month/file-{i:06}.nc" for i in range(1000))
    numbers = np.arange(rows)
    return columns(
        rows,
        VIRTUAL,
        location=(numbers % 1000).astype(np.int32),
        locations=names,
        offset=(numbers * 4096).astype(np.uint64),
    )


def virtual_distinct(rows: int) -> ChunkRefs:
    """Every chunk in a file of its own, with an etag."""
    names = tuple(f"s3://bucket/data/year/month/file-{i:08}.nc" for i in range(rows))
    numbers = np.arange(rows)
    return columns(
        rows,
        VIRTUAL,
        location=numbers.astype(np.int32),
        locations=names,
        checksum_kind=np.full(rows, ETAG, np.uint8),
        checksum=numbers.astype(np.int64),
        etags=tuple(f'"{i:032x}"' for i in range(rows)),
    )


def inline(rows: int) -> ChunkRefs:
    """1 to 64 bytes each."""
    random = np.random.default_rng(3)
    length = random.integers(1, 65, rows).astype(np.uint64)
    ends = np.cumsum(length)
    data = random.bytes(int(ends[-1]))
    return columns(rows, INLINE, length=length, offset=(ends - length).astype(np.uint64), inline_data=data)


def many_arrays(rows: int) -> dict[NodeId, ChunkRefs]:
    """Arrays of 10 chunks that share the manifest."""
    one = native(rows)
    return {
        NodeId(i.to_bytes(8)): ChunkRefs(
            coords=one.coords[i : i + 10],
            kind=one.kind[i : i + 10],
            offset=one.offset[i : i + 10],
            length=one.length[i : i + 10],
            chunk_id=one.chunk_id[i : i + 10],
            location=one.location[i : i + 10],
        )
        for i in range(0, rows, 10)
    }


CASES = {f.__name__: f for f in (native, packed, virtual, virtual_distinct, inline, many_arrays)}


def peak_mb() -> float:
    """Largest resident set so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def best(function: Callable[[], object], repeat: int) -> float:
    """Seconds of the fastest of ``repeat`` calls."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def measure(case: str, rows: int, repeat: int) -> None:
    """Print one line for one case."""
    made = CASES[case](rows)
    arrays = made if isinstance(made, dict) else {NodeId(bytes(8)): made}
    manifest = Manifest(id=ObjectId(bytes(12)), arrays=arrays)
    before = peak_mb()
    data = encode_manifest(manifest)
    encode_peak = peak_mb() - before
    decode_manifest(data)
    both_peak = peak_mb() - before
    encode = best(lambda: encode_manifest(manifest), repeat)
    decode = best(lambda: decode_manifest(data), repeat)
    print(
        f"{case:17} {rows:9} rows  encode {encode * 1e3:9.2f} ms  decode {decode * 1e3:9.2f} ms  "
        f"{len(data) / 1e6:7.2f} MB  peak +{encode_peak:.0f} MB encode, +{both_peak:.0f} MB with decode",
        flush=True,
    )


def main() -> None:
    """Run the cases asked for, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10, 1_000_000])
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    if options.case and len(options.rows) == 1:
        measure(options.case, options.rows[0], options.repeat)
        return
    for rows in options.rows:
        for case in [options.case] if options.case else CASES:
            repeat = options.repeat if rows > 10_000 else 200
            command = [sys.executable, __file__, "--rows", str(rows), "--case", case, "--repeat", str(repeat)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
