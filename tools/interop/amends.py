"""Workers that amend the tip of one branch, in turn or at once: the same on our library and on the official one.

``python -m tools.interop.amends tasks`` prints the outcomes of tasks of one process on repositories in memory, and
``python -m tools.interop.amends ENDPOINT ACCESS SECRET BUCKET PREFIX NUMBER`` is one worker on a bucket, which begins a
session, prints ``ready``, and amends once it is given a line.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import warnings
from typing import Any

import numpy as np
import zarr

import icechunk
from tools.interop.race import storage_on

__all__ = ["WORKERS", "amend", "begin", "of_tasks", "outcome", "write"]

WORKERS = 4
_TRIES = 200


def begin(storage: Any, spec_version: int | None) -> Any:
    """A repository whose ``main`` has one commit, of an array with a chunk for each worker."""
    repo = icechunk.Repository.create(storage, spec_version=spec_version)
    session = repo.writable_session("main")
    array = zarr.create_array(session.store, name="a", shape=(WORKERS,), chunks=(1,), dtype="i4", fill_value=-1)
    array.attrs["made"] = True
    session.commit("to be amended")
    return repo


def write(session: Any, number: int) -> None:
    """The change of a worker."""
    zarr.open_array(session.store, path="a")[number] = number


async def amend(session: Any, number: int) -> int:
    """Amend with the session, rebased after each conflict; returns the number of conflicts."""
    for lost in range(_TRIES):
        try:
            await session.amend_async(f"amended by {number}", metadata={"worker": number})
        except icechunk.ConflictError:
            await session.rebase_async(icechunk.ConflictDetector())
        else:
            return lost
    raise RuntimeError(f"worker {number} lost {_TRIES} times")


def of_tasks(repo: Any, *, at_once: bool) -> dict[str, Any]:
    """The outcome of workers that all begin on the same tip, as tasks of one process."""
    sessions = [repo.writable_session("main") for _ in range(WORKERS)]
    for number, session in enumerate(sessions):
        write(session, number)

    async def run() -> list[int]:
        if at_once:
            return list(await asyncio.gather(*(amend(one, number) for number, one in enumerate(sessions))))
        return [await amend(one, number) for number, one in enumerate(sessions)]

    lost = asyncio.run(run())
    return {**outcome(repo), "lost": None if at_once else lost}


def outcome(repo: Any) -> dict[str, Any]:
    """The result of the amendments, without ids."""
    infos = list(repo.ancestry(branch="main"))
    array = zarr.open_array(repo.readonly_session("main").store, path="a", mode="r")
    changes = [update.kind for update in repo.ops_log() if isinstance(update.kind, icechunk.UpdateType.CommitAmended)]
    diff = repo.diff(from_snapshot_id=infos[-1].id, to_branch="main")
    return {
        "values": np.asarray(array[:]).tolist(),
        "history": [info.message if "by" not in info.message else "amended" for info in infos],
        "diff": [sorted(diff.new_arrays), {path: sorted(chunks) for path, chunks in diff.updated_chunks.items()}],
        "amendments": len(changes),
        # Newest first: each took the place of the one before.
        "chained": [newer.previous_snap_id == older.new_snap_id for newer, older in itertools.pairwise(changes)],
        "tip": changes[0].new_snap_id == infos[0].id,
    }


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    if arguments == ["tasks"]:
        print(
            json.dumps([of_tasks(begin(icechunk.in_memory_storage(), 2), at_once=at_once) for at_once in (False, True)])
        )
        return
    *place, number = arguments
    repo = icechunk.Repository.open(storage_on(*place))
    session = repo.writable_session("main")
    write(session, int(number))
    print("ready", flush=True)
    # Comes when the others have begun too.
    sys.stdin.readline()
    print(json.dumps(asyncio.run(amend(session, int(number)))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    # Not through the interpreter's end, where the official library sometimes aborts.
    sys.stdout.flush()
    os._exit(0)
