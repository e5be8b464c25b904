"""Obstore's threads at the end of a process."""

from __future__ import annotations

import asyncio
import pickle
import sys

import pytest

import icechunk
from tests.storage.obstore.fake_gcs import serving_gcs

pytest.importorskip("obstore", reason="the extra obstore")

_PROGRAM = """
import asyncio, pickle, sys

async def main():
    storage = pickle.load(sys.stdin.buffer)
    await storage.put("snapshots/a", b"bytes")
    for n in range(20):
        asyncio.ensure_future(storage.get("snapshots/a"))
    await storage.get("snapshots/a")

asyncio.run(main())
"""


async def test_a_program_that_ends_right_after_a_request_ends_well() -> None:
    with serving_gcs() as gcs:
        storage = icechunk.gcs_storage(bucket="bucket", prefix="p", bearer_token="t", config=gcs.config())
        given = pickle.dumps(storage)

        async def run() -> int | None:
            program = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _PROGRAM, stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
            await program.communicate(given)
            return program.returncode

        # Without that precaution about every fourth of them crashes.
        assert await asyncio.gather(*(run() for _ in range(6))) == [0] * 6
