"""Kill processes with SIGKILL at random points of their work, and see that nothing acknowledged is lost.

    python -m tools.kills --kills 1000 --on local
    python -m tools.kills --kills 1000 --on minio

Several processes work on one repository: they ingest chunks, commit metadata (and write checkpoints of the log),
persist sessions, expire and collect, and repack. One after the other is killed at a random moment, and another goes on
with its work. A process writes down, on disk, every step that was acknowledged to it, before it goes on.

In the end, and now and then, a fresh process reads everything: each acknowledged chunk and attribute must be there,
each persisted session must be resumable or committed, and every snapshot of the history must be readable. The last line
is a summary; the command ends with 1 where something is lost or cannot be read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr.api.asynchronous as zarr

import icechunk
from icechunk.errors import ErrorKind, SessionEndedError, SessionNotFoundError
from tools import services
from tools.hammer import storage_from

__all__ = ["JOBS", "Found", "main", "run"]

LENGTH: Final = 20_000
"""Rows of each worker's array: more than there are steps."""
LONGEST_LIFE_S: Final = 0.5
_LONGER: Final = {"collect": 4, "repack": 4}
"""Times as long: of what takes a while, so that it is met at its end, too."""
_VERIFY_EVERY: Final = 100
_LONGEST_START_S: Final = 600.0
"""Other programs may leave a process little of the machine."""


class Notes:
    """Acknowledged steps of one worker, on disk before the next step begins."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, *words: object) -> None:
        os.write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())
        os.fsync(self._descriptor)


def read_notes(folder: str) -> list[list[str]]:
    """All acknowledged steps; a line that a killed process did not finish is none."""
    lines = [line for path in sorted(Path(folder).iterdir()) for line in path.read_text().split("\n")[:-1]]
    return [line.split() for line in lines]


# ----------------------------------------------------------------------------------------------------------- the work


async def ingest(repo: icechunk.Repository, worker: int, begin: int, notes: Notes) -> None:
    """Commit two chunks at a time, beside the other workers."""
    for n in itertools.count(begin, 2):
        session = await repo.writable_session_async("main")
        array = await zarr.open_array(store=session.store, path=f"ingest-{worker}")
        await array.setitem(slice(n, n + 2), np.array([n, n + 1]))
        with contextlib.suppress(icechunk.ConflictError):
            await session.commit_async(f"ingest {worker} {n}", rebase_with=icechunk.ConflictDetector())
            notes.write("ingest", worker, n)


async def commit(repo: icechunk.Repository, worker: int, begin: int, notes: Notes) -> None:
    """Commit an attribute, and now and then write a checkpoint of the log."""
    for n in itertools.count(begin):
        session = await repo.writable_session_async("main")
        group = await zarr.open_group(session.store, path=f"group-{worker}", mode="r+")
        await group.update_attributes({"n": n})
        with contextlib.suppress(icechunk.ConflictError):
            await session.commit_async(f"commit {worker} {n}", rebase_with=icechunk.ConflictDetector())
            notes.write("commit", worker, n)
        if n % 4 == 0:
            await repo.checkpoint_async()


async def persist(repo: icechunk.Repository, worker: int, begin: int, notes: Notes) -> None:
    """Go on with persisted sessions, then begin new ones; each is one chunk, checkpointed and committed."""
    for n in itertools.count(begin):
        session = await repo.writable_session_async("main")
        array = await zarr.open_array(store=session.store, path=f"persist-{worker}")
        await array.setitem(slice(n, n + 1), np.array([n]))
        id = await session.checkpoint_async()
        notes.write("persisted", worker, n, id)
        await _commit_persisted(session, worker, n, notes)


async def _commit_persisted(session: icechunk.Session, worker: int, n: int, notes: Notes) -> None:
    with contextlib.suppress(icechunk.ConflictError):
        await session.commit_async(f"persist {worker} {n}", rebase_with=icechunk.ConflictDetector())
        notes.write("persist", worker, n)


async def collect(repo: icechunk.Repository, worker: int, begin: int, notes: Notes) -> None:
    """Expire, and delete what is not needed."""
    while True:
        now = datetime.now(UTC)
        await repo.expire_snapshots_async(now - timedelta(seconds=3))
        found = await repo.garbage_collect_async(now - timedelta(seconds=1), repack=False)
        notes.write("collect", worker, found.snapshots_deleted + found.chunks_deleted)


async def repack(repo: icechunk.Repository, worker: int, begin: int, notes: Notes) -> None:
    """Delete, and write anew what holds a dead byte."""
    while True:
        now = datetime.now(UTC)
        await repo.expire_snapshots_async(now - timedelta(seconds=3))
        found = await repo.garbage_collect_async(now - timedelta(seconds=1), repack_below_percent=100)
        notes.write("repack", worker, found.snapshots_deleted + found.chunks_deleted)


JOBS: Final[dict[str, Callable[[icechunk.Repository, int, int, Notes], Awaitable[None]]]] = {
    "ingest": ingest,
    "commit": commit,
    "persist": persist,
    "collect": collect,
    "repack": repack,
}


def child(spec: str, job: str, worker: int, begin: int, notes: str, told: Connection) -> None:
    """A process that works until it is killed. Errors that say why nothing happened are followed by another try."""

    async def serve() -> None:
        book = Notes(f"{notes}/{job}-{worker}-{os.getpid()}")
        repo = await icechunk.Repository.open_async(storage_from(spec))
        told.send("begun")
        at = begin
        while True:
            try:
                await JOBS[job](repo, worker, at, book)
            except icechunk.IcechunkError as error:
                book.write("error", job, getattr(error, "kind", type(error).__name__))
                # A step that was under way may have happened: its place is left alone.
                at += 2 + 50 * (error.kind == ErrorKind.COMMIT_OUTCOME_UNKNOWN)
                at = max(at, _next(read_notes(notes), job, worker))

    asyncio.run(serve())


# ------------------------------------------------------------------------------------------------------------ checking


@dataclass(slots=True)
class Found:
    """Findings after all kills."""

    kills: Counter[str] = field(default_factory=Counter)
    """Kills by job."""
    steps: Counter[str] = field(default_factory=Counter)
    """Acknowledged."""
    errors: Counter[str] = field(default_factory=Counter)
    """Met by processes, by kind: refusals, mostly of sessions from before a collection."""
    resumed: int = 0
    read: int = 0
    """Chunks and snapshots that were read."""
    lost: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def _next(noted: list[list[str]], job: str, worker: int) -> int:
    """The first place that no acknowledged step has; a little later, since the last step may have happened unheard."""
    last = [int(words[2]) for words in noted if words[0] in (job, f"{job}ed") and words[1] == str(worker)]
    return max(last, default=-2) + 2


def verify(spec: str, notes: str, told: Connection) -> None:
    """In a fresh process: read all that was acknowledged, and all of the history."""

    async def look() -> Found:
        found, noted = Found(), read_notes(notes)
        found.steps.update(words[0] for words in noted if words[0] != "error")
        found.errors.update(words[2] for words in noted if words[0] == "error")
        repo = await icechunk.Repository.open_async(storage_from(spec))
        await _resume(repo, noted, found)
        store = (await repo.readonly_session_async("main")).store
        wanted: dict[str, set[int]] = defaultdict(set)
        for words in noted:
            if words[0] == "ingest":
                wanted[f"ingest-{words[1]}"] |= {int(words[2]), int(words[2]) + 1}
            elif words[0] == "persist":
                wanted[f"persist-{words[1]}"].add(int(words[2]))
            elif words[0] == "commit":
                wanted[f"group-{words[1]}"].add(int(words[2]))
        for path, numbers in sorted(wanted.items()):
            if path.startswith("group-"):
                group = await zarr.open_group(store, path=path, mode="r")
                if int(group.attrs["n"]) < max(numbers):
                    found.lost.append(f"{path}: {max(numbers)} was acknowledged, {group.attrs['n']} is there")
                continue
            array = await zarr.open_array(store=store, path=path, mode="r")
            values = np.asarray(await array.getitem(slice(0, max(numbers) + 1)))
            found.read += len(values)
            found.lost += [f"{path}[{n}] is {values[n]}" for n in sorted(numbers) if values[n] != n]
            wrong = [n for n, value in enumerate(values.tolist()) if value not in (-1, n)]
            found.unreadable += [f"{path}[{n}] is {values[n]}" for n in wrong]
        async for info in repo.async_ancestry(branch="main"):
            try:
                old = (await repo.readonly_session_async(snapshot_id=info.id)).store
                found.read += 1
                for path in wanted:
                    if path.startswith("group-") or not await old.exists(f"{path}/zarr.json"):
                        continue
                    array = await zarr.open_array(store=old, path=path, mode="r")
                    await array.getitem(slice(0, 4))
            except (icechunk.IcechunkError, OSError, ValueError) as error:
                found.unreadable.append(f"snapshot {info.id}: {error}")
        return found

    try:
        told.send(asyncio.run(look()))
    except Exception as error:
        told.send(Found(unreadable=[f"{type(error).__name__}: {error}"]))


async def _resume(repo: icechunk.Repository, noted: list[list[str]], found: Found) -> None:
    """Commit the sessions that were persisted and not committed; what they promised must be in them."""
    done = {(words[1], words[2]) for words in noted if words[0] == "persist"}
    book = [words for words in noted if words[0] == "persisted" and (words[1], words[2]) not in done]
    for _, worker, n, id in book:
        try:
            session = await repo.resume_session_async(id)
            array = await zarr.open_array(store=session.store, path=f"persist-{worker}")
            value = np.asarray(await array.getitem(slice(int(n), int(n) + 1)))[0]
            if value != int(n):
                found.lost.append(f"session {id}: chunk {n} was acknowledged, {value} is there")
            await session.commit_async(f"persist {worker} {n}", rebase_with=icechunk.ConflictDetector())
            found.resumed += 1
        except SessionEndedError as error:
            if error.kind != ErrorKind.SESSION_COMMITTED:
                found.lost.append(f"session {id}: {error}")
        except SessionNotFoundError:
            # It was committed, and what is left of it was collected: then its chunk is there.
            store = (await repo.readonly_session_async("main")).store
            array = await zarr.open_array(store=store, path=f"persist-{worker}", mode="r")
            if np.asarray(await array.getitem(slice(int(n), int(n) + 1)))[0] != int(n):
                found.lost.append(f"session {id} is not there, and chunk {n} neither")


# ----------------------------------------------------------------------------------------------------------- the killer


async def _create(spec: str, workers: dict[str, int]) -> None:
    config = icechunk.RepositoryConfig(inline_chunk_threshold_bytes=0)
    repo = await icechunk.Repository.create_async(storage_from(spec), config)
    await repo.save_config_async()
    session = await repo.writable_session_async("main")
    await zarr.create_group(store=session.store)
    for job, worker in workers.items():
        if job == "commit":
            await zarr.create_group(store=session.store, path=f"group-{worker}", attributes={"n": -1})
        elif job in ("ingest", "persist"):
            await zarr.create_array(
                session.store, name=f"{job}-{worker}", shape=(LENGTH,), chunks=(1,), dtype="i4", fill_value=-1
            )
    await session.commit_async("arrays")
    await repo.aclose()


def run(spec: str, kills: int, *, seed: int = 0, loud: bool = False) -> Found:
    """Kill so often, and check.

    Parameters
    ----------
    spec
        Where the repository is created, as `tools.hammer.storage_from` reads it.
    """
    chance = random.Random(seed)
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["icechunk", "icechunk.repository", "zarr.api.asynchronous", "numpy", "tools.hammer"]
    )
    workers = {job: number for number, job in enumerate(JOBS)}
    asyncio.run(_create(spec, workers))
    killed: Counter[str] = Counter()
    resumed = 0
    found = Found()
    with tempfile.TemporaryDirectory(prefix="kill-notes-") as notes:

        def start(job: str) -> tuple[Any, Connection]:
            mine, theirs = context.Pipe(duplex=False)
            begin = _next(read_notes(notes), job, workers[job])
            process = context.Process(target=child, args=(spec, job, workers[job], begin, notes, theirs), daemon=True)
            process.start()
            theirs.close()
            return process, mine

        def stop(job: str) -> None:
            process, told = running.pop(job)
            process.kill()
            process.join()
            told.close()

        def check() -> Found:
            for job in list(running):
                stop(job)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=verify, args=(spec, notes, theirs), daemon=True)
            process.start()
            theirs.close()
            one: Found = mine.recv()
            process.join()
            return one

        running: dict[str, tuple[Any, Connection]] = {}
        done = 0
        while done < kills and not found.lost and not found.unreadable:
            for job in JOBS:
                if done >= kills:
                    break
                for each in ("ingest", "commit", "persist", job):
                    # Three write; a collection or a repacking joins them when it is its turn to be killed.
                    if each not in running:
                        running[each] = start(each)
                process, told = running[job]
                if not told.poll(_LONGEST_START_S):
                    found.unreadable.append(f"a process that shall {job} does not begin")
                    break
                time.sleep(chance.random() * LONGEST_LIFE_S * _LONGER.get(job, 1))
                if not process.is_alive():
                    found.unreadable.append(f"a process that shall {job} ended by itself, with {process.exitcode}")
                stop(job)
                killed[job] += 1
                done += 1
                if done % _VERIFY_EVERY == 0 and done < kills:
                    found = check()
                    resumed += found.resumed
                    if loud:
                        print(f"    {done} kills: {found.steps.total()} steps acknowledged", flush=True)
        if not found.lost and not found.unreadable:
            found = check()
        for job in list(running):
            stop(job)
    found.kills, found.resumed = killed, found.resumed + resumed
    return found


@contextlib.contextmanager
def place(kind: str) -> Iterator[str]:
    """An empty place for a repository, ``local`` or ``minio``, as `tools.hammer.storage_from` reads it."""
    if kind == "local":
        folder = tempfile.mkdtemp(prefix="kills-")
        try:
            yield f"{folder}/repository"
        finally:
            shutil.rmtree(folder)
        return
    with services.minio(buckets=["kills"]) as minio:
        yield json.dumps(
            {
                "bucket": "kills",
                "prefix": "repository",
                "endpoint_url": minio.endpoint,
                "region": minio.region,
                "allow_http": True,
                "force_path_style": True,
                "access_key_id": minio.access_key,
                "secret_access_key": minio.secret_key,
            }
        )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="on each (default 100)")
    parser.add_argument("--on", default="local", help="local, minio, or both: local,minio")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    wrong = False
    for kind in args.on.split(","):
        began = time.monotonic()
        with place(kind) as spec:
            found = run(spec, args.kills, seed=args.seed, loud=True)
        wrong |= bool(found.lost or found.unreadable)
        print("\n".join((found.lost + found.unreadable)[:20]))
        print("kills: " + ", ".join(f"{count} of {job}" for job, count in found.kills.items()))
        print("acknowledged: " + ", ".join(f"{count} {step}" for step, count in found.steps.most_common()))
        print("told: " + (", ".join(f"{count} {kind}" for kind, count in found.errors.most_common()) or "no errors"))
        print(
            f"{found.kills.total()} kills on {kind} in {time.monotonic() - began:.0f} s, seed {args.seed}: "
            f"{found.steps.total()} steps acknowledged, {len(found.lost)} lost, {len(found.unreadable)} unreadable; "
            f"{found.resumed} sessions resumed"
        )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
