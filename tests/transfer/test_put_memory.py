"""The memory of a writer that is faster than its storage."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from icechunk.transfer.put import PutMemory

PROGRAM = """
import asyncio, resource, sys
from icechunk.runtime.clock import SYSTEM
from icechunk.storage.local.storage import LocalStorage
from icechunk.transfer.limiter import Gates
from icechunk.transfer.packs import Packs
from icechunk.transfer.put import PutMemory, PutPool

MIB = 1024 * 1024
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT

async def main():
    chunk_bytes = int(sys.argv[2])
    pool = PutPool(LocalStorage(sys.argv[1]), memory=PutMemory(16 * MIB), gates=Gates(256))
    packs = Packs(pool, SYSTEM.new_object_id, threshold_bytes=512 * 1024, size_bytes=4 * MIB)
    before = peak()
    todo = iter(range(256 * MIB // chunk_bytes))

    async def writer():
        for _ in todo:
            await packs.put(bytes(chunk_bytes))

    await asyncio.gather(*[writer() for _ in range(10)])
    await packs.flush()
    print(peak() - before)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
@pytest.mark.parametrize("chunk_bytes", [64 * 1024, 2 * 1024 * 1024])
def test_writing_much_more_than_the_bound_takes_no_more_memory_than_the_bound_and_a_little(
    tmp_path: Path, chunk_bytes: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "storage"), str(chunk_bytes)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert int(done.stdout) < (16 + 100) * 1024 * 1024


def test_sessions_that_never_ask_for_room_leave_nothing_behind() -> None:
    class Session:
        has_pending_errors, is_still = False, True

    memory = PutMemory(1000)
    for _ in range(1000):
        memory.join(Session())
    gc.collect()
    assert not memory.holders()
    assert len(memory._dropped) <= 1
