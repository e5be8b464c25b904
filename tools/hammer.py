"""Several processes that commit to one repository as fast as they can, and write down what was acknowledged.

Run as ``python -m tools.hammer STORAGE NOTES --workers 8 --commits 50``; `tests/test_hammer.py` compares the notes
with the history. A note is on disk before the next commit begins, so a worker may die at any moment. Workers are
forked from a process that has only imported the package, which is most of what starting one costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping

import zarr.api.asynchronous as zarr

import icechunk
from icechunk.storage import Storage
from icechunk.storage.port import ANY, ObjectKind, Precondition, PutResult
from icechunk.testing.wrapping import WrappingStorage


def storage_from(spec: str) -> Storage:
    """A storage by its description: a path, or a JSON object with the arguments of `icechunk.s3_storage`."""
    if not spec.startswith("{"):
        return icechunk.local_filesystem_storage(spec)
    return icechunk.s3_storage(**json.loads(spec))


class FatalStorage(WrappingStorage):
    """Kills this process, as ``kill -9`` does, somewhere in the course of one of its writes.

    Parameters
    ----------
    at
        Which write, counted from 0.
    delay_s
        How long after its beginning.
    """

    def __init__(self, inner: Storage, at: int, delay_s: float) -> None:
        super().__init__(inner)
        self._left = at
        self._delay_s = delay_s

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        self._left -= 1
        if self._left == -1:
            threading.Thread(target=self._die, daemon=True).start()
        return await self.inner.put(key, data, precondition, kind=kind, metadata=metadata)

    def _die(self) -> None:
        time.sleep(self._delay_s)
        os.kill(os.getpid(), signal.SIGKILL)


async def hammer(storage: Storage, worker: int, commits: int, notes: str) -> None:
    """Commit ``commits`` times to ``main``, each from a fresh session until it succeeds.

    Appends to ``notes`` a line for each acknowledged commit (worker, number, snapshot id), and at the end one with
    the conflicts met and the seconds taken.
    """
    repository = await icechunk.Repository.open_async(storage)
    conflicts = 0
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    began = time.perf_counter()
    try:
        for n in range(commits):
            while True:
                session = await repository.writable_session_async("main")
                group = await zarr.open_group(session.store, mode="a")
                await group.update_attributes({f"worker-{worker}": n})
                try:
                    snapshot_id = await session.commit_async(f"{worker}/{n}")
                except icechunk.ConflictError:
                    conflicts += 1
                    continue
                break
            os.write(descriptor, f"{worker} {n} {snapshot_id}\n".encode())
            os.fsync(descriptor)
        os.write(descriptor, f"# {conflicts} {time.perf_counter() - began:.3f}\n".encode())
    finally:
        os.close(descriptor)


def fork_worker(spec: str, worker: int, commits: int, notes: str, fatal_seed: int | None) -> int:
    """Start a worker; with a seed it ends at a random write. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        storage = storage_from(spec)
        if fatal_seed is not None:
            chance = random.Random(fatal_seed)
            storage = FatalStorage(storage, chance.randrange(5, 5 * commits), chance.random() * 0.01)
        asyncio.run(hammer(storage, worker, commits, notes))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    """Run the workers to their ends; 0 if each finished, or ended as planned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("storage", help="a path, or a JSON object with the arguments of icechunk.s3_storage")
    parser.add_argument("notes", help="folder for the notes of each worker")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--commits", type=int, default=50)
    parser.add_argument("--fatal", type=int, default=0, help="how many of the workers die by SIGKILL")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.makedirs(given.notes, exist_ok=True)
    workers = {
        fork_worker(
            given.storage,
            worker,
            given.commits,
            os.path.join(given.notes, f"worker-{worker}"),
            given.seed * 1000 + worker if worker < given.fatal else None,
        ): worker
        for worker in range(given.workers)
    }
    failed = 0
    for pid, worker in workers.items():
        status = os.waitpid(pid, 0)[1]
        told_to_die = worker < given.fatal and os.WIFSIGNALED(status)
        if status and not told_to_die:
            print(f"worker {worker} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
