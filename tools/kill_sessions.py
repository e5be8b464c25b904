"""Kills processes that hold persisted sessions, at random moments, and resumes the sessions in others.

Every run is one session that writes an array of its own, checkpoints, and commits to ``main``. Its process is killed
with SIGKILL again and again, and so are forks that join it. At the end every run must have been committed exactly once,
with everything that a checkpoint had promised; several runs commit to the same branch at the same time.

    python tools/kill_sessions.py --kills 1000 --at-once 2
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import icechunk
from icechunk.errors import ErrorKind, SessionEndedError, SessionNotFoundError
from icechunk.runtime.twins import run_sync

__all__ = ["Runs", "main"]

_CHUNKS = 24
_LONGEST_S = 0.5
"""Processes are killed after a random time up to this."""
_MOST_KILLS = 12
"""Kills in one run, at most: afterwards it is left alone, so that it ends."""


def hold(location: str, name: str, id: str | None, pipe: Connection) -> None:
    """Begin a session, or resume it; write what is missing, and commit. Reports each step that was acknowledged."""
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(location))
    try:
        if id is None:
            session = repo.writable_session("main")
            zarr.create_array(session.store, name=name, shape=(_CHUNKS,), chunks=(1,), dtype="i4", fill_value=-1)
            pipe.send(("id", session.checkpoint()))
        else:
            session = repo.resume_session(id)
            session.collect_forks(on_conflict="theirs")
        array = zarr.open_array(session.store, path=name, mode="r+")
        found = np.asarray(array[:])
        pipe.send(("found", [int(i) for i in np.flatnonzero(found == np.arange(_CHUNKS))]))
        for i in range(_CHUNKS):
            if found[i] != i:
                array[i] = i
            if i % 3 == 2:
                session.checkpoint()
                pipe.send(("promised", list(range(i + 1))))
        pipe.send(("committed", session.commit(name, rebase_with=icechunk.ConflictDetector())))
    except SessionEndedError as error:
        pipe.send(("ended", error.kind, error.snapshot_id))


def help_with(location: str, name: str, id: str, pipe: Connection) -> None:
    """Join a session, and hand over one chunk."""
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(location))
    try:
        fork = repo.join_session(id)
        last = _CHUNKS - 1
        zarr.open_array(fork.store, path=name, mode="r+")[last] = last
        fork.checkpoint()
        pipe.send(("promised", [last]))
    except (SessionEndedError, SessionNotFoundError):
        pipe.send(("late",))


class Runs:
    """Runs on one repository, in threads of this process.

    Parameters
    ----------
    location
        Folder of the repository, which is created.
    kills
        Number of processes to kill.
    spec_version
        As of `icechunk.Repository.create`: None for the log layout.
    """

    def __init__(self, location: str, *, kills: int, seed: int, spec_version: int | None = None) -> None:
        self.location = location
        self.repo = icechunk.Repository.create(
            icechunk.local_filesystem_storage(location),
            icechunk.RepositoryConfig(inline_chunk_threshold_bytes=0),
            spec_version=spec_version,
        )
        self.repo.save_config()
        with self.repo.transaction("main", message="root") as store:
            zarr.create_group(store)
        self.kills_left = kills
        self.names: list[str] = []
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._seed = seed
        self._lock = threading.Lock()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["icechunk", "icechunk.repository", "zarr", "numpy", __name__])

    def run(self, at_once: int) -> None:
        """Start runs until all kills have happened."""
        threads = [threading.Thread(target=self._work, args=(i,)) for i in range(at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def check(self) -> None:
        """Every run is in the history once, whole; what was begun and never acknowledged can be abandoned."""
        messages = Counter(info.message for info in self.repo.ancestry(branch="main"))
        store = self.repo.readonly_session("main").store
        for name in self.names:
            if messages[name] != 1:
                self.failures.append(f"{name} was committed {messages[name]} times")
            elif not np.array_equal(np.asarray(zarr.open_array(store, path=name, mode="r")[:]), np.arange(_CHUNKS)):
                self.failures.append(f"{name} is incomplete")
        for left in self.repo.sessions():
            self.counts["begun, never acknowledged"] += 1
            self.repo.resume_session(left.id).abandon()
        if self.repo.sessions():
            self.failures.append("sessions are left")
        run_sync(self.repo.aclose())

    def _work(self, thread: int) -> None:
        chance = random.Random(f"{self._seed}.{thread}")
        n = 0
        while not self.failures:
            with self._lock:
                if self.kills_left <= 0:
                    return
                name = f"run-{thread}-{n}"
                self.names.append(name)
            n += 1
            self._one(name, chance)

    def _one(self, name: str, chance: random.Random) -> None:
        id: str | None = None
        promised: set[int] = set()
        for tried in range(1000):
            kill = tried < _MOST_KILLS and self._may_kill()
            for step in self._process(hold, (name, id), chance if kill else None):
                match step:
                    case ("id", str(text)):
                        id = text
                    case ("found", list(found)):
                        lost = promised - set(found)
                        if lost:
                            self.failures.append(f"{name} lost {sorted(lost)}")
                            return
                    case ("promised", list(more)):
                        promised.update(more)
                    case ("committed", _):
                        self.counts["committed"] += 1
                        return
                    case ("ended", kind, _):
                        self.counts[str(kind)] += 1
                        if kind != ErrorKind.SESSION_COMMITTED:
                            self.failures.append(f"{name} ended as {kind}")
                        return
            if self.failures:
                return
            if id is not None and chance.random() < 0.3:
                for step in self._process(help_with, (name, id), chance if self._may_kill() else None):
                    self.counts[f"fork {step[0]}"] += 1
                    if step[0] == "promised":
                        promised.update(step[1])
        self.failures.append(f"{name} never ended")

    def _may_kill(self) -> bool:
        with self._lock:
            if self.kills_left <= 0:
                return False
            self.kills_left -= 1
            return True

    def _process(self, work: Any, arguments: tuple[Any, ...], chance: random.Random | None) -> list[tuple[Any, ...]]:
        """The steps that a process reported; it is killed at a random moment where there is ``chance``."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=work, args=(self.location, *arguments, sender), daemon=True)
        process.start()
        sender.close()
        if chance is not None:
            process.join(chance.random() * _LONGEST_S)
            # One that has ended by itself has no process number any more that would be its own.
            if process.exitcode is None:
                process.kill()
                self.counts["kills"] += 1
            else:
                with self._lock:
                    self.kills_left += 1
        steps: list[tuple[Any, ...]] = []
        try:
            while True:
                steps.append(receiver.recv())
        except EOFError:
            pass
        process.join()
        receiver.close()
        if process.exitcode == 1:
            self.failures.append(f"{arguments} ended with an error")
        return steps


def main() -> int:
    """Run with the arguments of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spec-version", type=int, choices=[1, 2], help="1: ref files, 2: repo object; else the log")
    parser.add_argument("--folder", type=Path, help="an empty folder for the repository; it stays")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = str(arguments.folder or temporary)
        runs = Runs(place, kills=arguments.kills, seed=arguments.seed, spec_version=arguments.spec_version)
        began = time.monotonic()
        runs.run(arguments.at_once)
        runs.check()
        counts = ", ".join(f"{count} {step}" for step, count in runs.counts.most_common())
        took = time.monotonic() - began
        print(
            f"{len(runs.names)} sessions in {took:.0f} s, seed {arguments.seed}: {counts}; {len(runs.failures)} failed"
        )
    for failure in runs.failures:
        print(failure, file=sys.stderr)
    return 1 if runs.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
