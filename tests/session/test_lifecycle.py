"""Programs that end, in every way programs end: no task, client or warning is left, and the checkpoint is current."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import icechunk
from icechunk.runtime.twins import run_sync
from icechunk.storage import Storage
from tests.conftest import BUCKET
from tests.log.repository.world import open_log
from tools import hammer, services

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]

PRELUDE = """
import asyncio, os, sys
import zarr
import icechunk
from tools.hammer import storage_from

storage = storage_from(sys.argv[1])

def write(repository, name, branch="main"):
    session = repository.writable_session(branch)
    array = zarr.open_group(session.store, mode="a").require_array(name, shape=(8, 1000), chunks=(1, 1000), dtype="f8")
    array[:] = 1
    return session.commit(name)

async def uncommitted(repository, name):
    session = await repository.writable_session_async("main")
    group = await zarr.api.asynchronous.open_group(session.store, mode="a")
    array = await group.require_array(name, shape=(8, 1000), chunks=(1, 1000), dtype="f8")
    await array.setitem(slice(None), 1)
    return session

async def write_async(repository, name):
    return await (await uncommitted(repository, name)).commit_async(name)
"""

# From here on every warning is an error, but that of Python 3.12 and later about forks in processes with threads.
STRICT = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
"""

SCRIPTS = {
    "sync": """
repository = icechunk.Repository.create(storage)
write(repository, "a")
write(repository, "b")
assert zarr.open_array(repository.readonly_session("main").store, path="b", mode="r")[:].sum() == 8000
""",
    "asyncio": """
async def main():
    repository = await icechunk.Repository.create_async(storage)
    await write_async(repository, "a")
    await write_async(repository, "b")

asyncio.run(main())
""",
    "two loops one after the other": """
async def main(name):
    await write_async(repository, name)

repository = asyncio.run(icechunk.Repository.create_async(storage))
asyncio.run(main("a"))
asyncio.run(main("b"))
""",
    "mixed": """
async def main():
    repository = await icechunk.Repository.create_async(storage)
    await write_async(repository, "a")
    await asyncio.to_thread(write, repository, "b")
    await write_async(repository, "c")
    return repository

write(asyncio.run(main()), "d")
""",
    "closed by hand": """
async def main():
    async with await icechunk.Repository.create_async(storage) as repository:
        await write_async(repository, "a")

asyncio.run(main())
""",
    "error in the middle of a session": """
async def main():
    repository = await icechunk.Repository.create_async(storage)
    await write_async(repository, "a")
    session = await repository.writable_session_async("main")
    group = await zarr.api.asynchronous.open_group(session.store, mode="a")
    array = await group.create_array("half", shape=(64, 1000), chunks=(1, 1000), dtype="f8")
    await array.setitem(slice(None), 1)
    raise LookupError("on purpose")

try:
    asyncio.run(main())
except LookupError:
    pass
""",
    "cancelled in the middle of a commit": """
async def main():
    repository = await icechunk.Repository.create_async(storage)
    await write_async(repository, "a")
    for steps in (0, 1, 3, 10, 30):
        # zarr leaves coroutines behind where it is cancelled itself.
        session = await uncommitted(repository, "b")
        committing = asyncio.ensure_future(session.commit_async("b"))
        for _ in range(steps):
            await asyncio.sleep(0)
        committing.cancel()
        await asyncio.wait({committing})
    # Comes after whatever of those is still on its way.
    await repository.create_branch_async("done", await repository.lookup_branch_async("main"))

asyncio.run(main())
""",
    "left with uploads under way": """
repository = icechunk.Repository.create(storage)
write(repository, "a")
session = repository.writable_session("main")
array = zarr.open_group(session.store, mode="a").create_array("half", shape=(64, 1000), chunks=(1, 1000), dtype="f8")
array[:] = 1
""",
    "reader": """
repository = icechunk.Repository.create(storage)
write(repository, "a")
del repository
repository = icechunk.Repository.open(storage)
list(repository.ancestry(branch="main"))
next(repository.ancestry(branch="main"))
next(repository.ops_log())
""",
    "forked": """
repository = icechunk.Repository.create(storage)
write(repository, "a")
child = os.fork()
if not child:
    write(repository, "b")
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
assert [info.message for info in repository.ancestry(branch="main")][:2] == ["b", "a"]
write(repository, "c")
""",
    "forked, child ends at once": """
repository = icechunk.Repository.create(storage)
write(repository, "a")
child = os.fork()
if not child:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
write(repository, "b")
""",
    "threads": """
import threading
repository = icechunk.Repository.create(storage)
first = repository.lookup_branch("main")
for name in "abcd":
    repository.create_branch(name, first)
threads = [threading.Thread(target=write, args=(repository, name, name)) for name in "abcd"]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
""",
}


def end_of(script: str, spec: str, tmp_path: Path, *flags: str) -> None:
    """Run it with every warning an error, and hold what it leaves behind against what it should."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": ""}
    code = PRELUDE + STRICT + SCRIPTS[script]
    command = [sys.executable, *flags, "-c", code, spec]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    noise = [line for line in done.stderr.splitlines() if not line.startswith("Executing <")]
    assert noise == []


def checkpoint_is_current(storage: Storage) -> bool:
    async def look() -> bool:
        log = await open_log(storage)
        try:
            return log.n > 0 and log.view.checkpoint_n == log.n
        finally:
            await log.aclose()

    return run_sync(look())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_program_on_local_disk_ends_without_output_and_with_a_current_checkpoint(script: str, tmp_path: Path) -> None:
    path = str(tmp_path / "repository")
    end_of(script, path, tmp_path, "-X", "dev")
    assert checkpoint_is_current(icechunk.local_filesystem_storage(path))


ON_S3 = ["sync", "asyncio", "mixed", "error in the middle of a session", "left with uploads under way", "forked"]


@pytest.mark.parametrize("script", ON_S3)
def test_a_program_on_s3_ends_without_output_and_with_a_current_checkpoint(
    script: str, tmp_path: Path, moto_service: services.S3Service
) -> None:
    spec = json.dumps(
        {
            "bucket": BUCKET,
            "prefix": f"lifecycle-{tmp_path.name}",
            "endpoint_url": moto_service.endpoint,
            "region": moto_service.region,
            "allow_http": True,
            "force_path_style": True,
            "access_key_id": moto_service.access_key,
            "secret_access_key": moto_service.secret_key,
        }
    )
    # Not in development mode, where aiohttp refuses moto's answers for their two Server headers.
    end_of(script, spec, tmp_path)
    assert checkpoint_is_current(hammer.storage_from(spec))
