"""One commit of very many references: its memory, its CPU time, and whether others can read it.

    python -m tools.bench.huge virtual|native RANK [--references 100000000] [--interleaved]

Prints one JSON object. References come a million at a time, by `set_virtual_refs_arr` (of 10 000 objects a million, all
distinct) or as native ones by the session's columns, in order, or interleaved, as those of files that are stacked along
another axis than the first. The commit goes to local files; another process opens them and looks some chunks up. A
process of its own: peak memory counts everything that ever was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import icechunk
from icechunk.format.ids import encode_id
from icechunk.format.values import ID12, NATIVE, ChunkRefs
from icechunk.repository import Repository
from tools import oracle

__all__ = ["CASE", "array_document", "measure", "rows", "table"]

CASE = "huge"
CEILING_GIB = 8e9 / 2**30
BLOCK = 1_000_000
OBJECTS = 10_000
"""Distinct locations in a block."""

_VARIANTS = (("virtual", 1, False), ("virtual", 2, False), ("virtual", 3, True), ("native", 3, False))


class Work:
    """References by number: which chunk each is, and where it leads to."""

    def __init__(self, kind: str, rank: int, references: int, interleaved: bool) -> None:
        self.kind = kind
        self.blocks = -(-references // BLOCK)
        # A block is a box: of full extent along one axis, the last if the first tells blocks apart.
        inner = {1: (BLOCK,), 2: (1000, 1000), 3: (100, 100, 100)}[rank]
        self.box = inner
        self.axis = rank - 1 if interleaved else 0
        self.grid = tuple(n * self.blocks if d == self.axis else n for d, n in enumerate(inner))

    def corner(self, block: int) -> tuple[int, ...]:
        return tuple(n * block if d == self.axis else 0 for d, n in enumerate(self.box))

    def location(self, block: int, number: int) -> str:
        return f"s3://bucket/era5/air_temperature_at_2_metres/{block:03d}/{number // (BLOCK // OBJECTS):05d}.nc"

    def locations(self, block: int) -> list[str]:
        each = BLOCK // OBJECTS
        return [text for i in range(OBJECTS) for text in [self.location(block, i * each)] * each]

    def chunk_ids(self, block: int) -> np.ndarray[Any, Any]:
        words = np.zeros((BLOCK, 3), "<u4")
        words[:, 0] = block
        words[:, 1] = np.arange(BLOCK, dtype=np.uint32) * np.uint32(2654435761)
        words[:, 2] = np.arange(BLOCK)
        return words.view(ID12).reshape(BLOCK)

    def samples(self) -> Iterator[tuple[tuple[int, ...], int, int]]:
        """Some chunks: coordinates, block, number in the block."""
        for block in sorted({0, 1 % self.blocks, self.blocks // 2, self.blocks - 1}):
            for number in (0, 1, 99_999, 500_123, BLOCK - 1):
                inside = np.unravel_index(number, self.box)
                yield tuple(int(a) + b for a, b in zip(inside, self.corner(block), strict=True)), block, number


def _config() -> icechunk.RepositoryConfig:
    config = icechunk.RepositoryConfig.default()
    config.set_virtual_chunk_container(
        icechunk.VirtualChunkContainer("s3://bucket/", icechunk.s3_store(region="us-east-1"))
    )
    return config


def array_document(grid: tuple[int, ...]) -> bytes:
    """The ``zarr.json`` of an array of so many chunks of one byte along each dimension."""
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": grid,
        "data_type": "int8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1] * len(grid)}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0,
        "codecs": [{"name": "bytes"}],
        "attributes": {},
    }
    return json.dumps(document).encode()


def _write(session: icechunk.Session, work: Work) -> None:
    lengths = np.full(BLOCK, 1000, np.uint64)
    for block in range(work.blocks):
        offsets = np.arange(BLOCK, dtype=np.uint64) * np.uint64(1000)
        if work.kind == "virtual":
            session.store.set_virtual_refs_arr(
                "a",
                work.box,
                work.locations(block),
                offsets,
                lengths,
                arr_offset=work.corner(block),
                validate_containers=True,
            )
            continue
        axes = [np.arange(c, c + n, dtype=np.uint32) for c, n in zip(work.corner(block), work.box, strict=True)]
        coords = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(BLOCK, len(axes))
        session._content.set_references(
            "/a",
            ChunkRefs(
                coords=coords,
                kind=np.full(BLOCK, NATIVE, np.uint8),
                offset=offsets,
                length=lengths.copy(),
                chunk_id=work.chunk_ids(block),
                location=np.full(BLOCK, -1, np.int32),
            ),
        )


async def _measure(work: Work, folder: str) -> dict[str, float]:
    repository = await Repository.create_async(icechunk.local_filesystem_storage(folder), _config())
    session = await repository.writable_session_async("main")
    session._content.set_metadata("/a", array_document(work.grid))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, began_cpu = time.perf_counter(), time.process_time()
    _write(session, work)
    written, written_cpu = time.perf_counter(), time.process_time()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await session.commit_async("many references")
    done, done_cpu = time.perf_counter(), time.process_time()
    await repository.aclose()
    # Linux counts in KiB.
    return {
        "before, GiB": before / 2**20,
        "set, GiB": held / 2**20,
        "peak, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "set, s": written - began,
        "set, CPU s": written_cpu - began_cpu,
        "commit, s": done - written,
        "commit, CPU s": done_cpu - written_cpu,
    }


async def _check(work: Work, folder: str) -> dict[str, float]:
    began = time.process_time()
    repository = await Repository.open_async(icechunk.local_filesystem_storage(folder))
    session = await repository.readonly_session_async("main")
    count = 0
    for coords, block, number in work.samples():
        ref = await session._content.chunk_reference("/a", coords)
        assert ref is not None, coords
        assert (ref.offset, ref.length) == (number * 1000, 1000), (coords, ref)
        if work.kind == "virtual":
            assert ref.location == work.location(block, number), (coords, ref)
        else:
            assert ref.chunk_id is not None
            assert encode_id(ref.chunk_id) == encode_id(work.chunk_ids(block)[number].tobytes())
        count += 1
    files = repository.list_manifest_files(session.snapshot_id)
    assert sum(file.num_chunk_refs for file in files) == work.blocks * BLOCK
    await repository.aclose()
    return {
        "manifests": len(files),
        "manifests, MB": sum(file.size_bytes for file in files) / 1e6,
        "chunks looked up": count,
        "open and look up, CPU s": time.process_time() - began,
        "reader's peak, GiB": _peak_gib(),
    }


def _peak_gib() -> float:
    """The most that this program took; `resource` counts the one it was started from as well."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def measure(kind: str, rank: int, references: int, interleaved: bool) -> dict[str, float]:
    """Commit that many references, a million at least, and have another process look at them."""
    work = Work(kind, rank, references, interleaved)
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(_measure(work, folder))
        command = [sys.executable, *_arguments(kind, rank, references, interleaved), "--check", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=oracle.PROJECT, check=True, timeout=600)
        looked: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
        return found | looked


def _arguments(kind: str, rank: int, references: int, interleaved: bool) -> list[str]:
    plain = ["-m", "tools.bench.huge", kind, str(rank), "--references", str(references)]
    return [*plain, "--interleaved"] if interleaved else plain


def rows(references: int) -> list[dict[str, Any]]:
    """Measure each kind of reference, in a process of its own."""
    found: list[dict[str, Any]] = []
    for kind, rank, interleaved in _VARIANTS:
        what = f"{kind}, rank {rank}" + (", interleaved" if interleaved else "")
        print(f"{CASE}: {references} references, {what}", file=sys.stderr, flush=True)
        command = [sys.executable, *_arguments(kind, rank, references, interleaved)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=oracle.PROJECT, check=True, timeout=3600)
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        peak = figures["peak, GiB"]
        found.append({"case": CASE, "what": what, **figures, "ceiling, GiB": CEILING_GIB, "ok": peak <= CEILING_GIB})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'case':6}{'what':26}{'set':>12}{'commit':>12}{'peak':>12}{'ceiling':>10}"]
    for row in found:
        lines.append(
            f"{row['case']:6}{row['what']:26}{row['set, CPU s']:>10.1f} s{row['commit, CPU s']:>10.1f} s"
            f"{row['peak, GiB']:>8.2f} GiB{row['ceiling, GiB']:>8.2f}{'' if row['ok'] else ' !'}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("kind", choices=["virtual", "native"])
    parser.add_argument("rank", type=int, choices=[1, 2, 3])
    parser.add_argument("--references", type=int, default=100_000_000)
    parser.add_argument(
        "--interleaved", action="store_true", help="blocks do not follow each other in the order of rows"
    )
    parser.add_argument("--check", metavar="FOLDER", help="only look at what is there")
    options = parser.parse_args()
    if options.check:
        work = Work(options.kind, options.rank, options.references, options.interleaved)
        print(json.dumps(asyncio.run(_check(work, options.check))))
        return
    print(json.dumps(measure(options.kind, options.rank, options.references, options.interleaved)))


if __name__ == "__main__":
    main()
