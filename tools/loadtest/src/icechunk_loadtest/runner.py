"""Runs cases, one after the other, each in one worker process or several, and gathers their measurements."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import icechunk
from icechunk_loadtest import oracle
from icechunk_loadtest.errors import LoadTestError
from icechunk_loadtest.place import Place
from icechunk_loadtest.plan import SYSTEMS, Case
from icechunk_loadtest.progress import Progress
from icechunk_loadtest.results import Bin, Measurement
from icechunk_loadtest.worker.histogram import Histogram

__all__ = ["Runner", "interpreters"]

WORKER = "loadtest_worker"
"""The name under which a worker imports `icechunk_loadtest.worker`: not below ``icechunk``, which may be another's."""
ANSWER_S = 120.0
"""Seconds that a worker may take for a command other than ``run``."""
CLOSE_S = 5.0
"""Seconds that a worker may take to end before it is killed."""
_LINE_BYTES = 2**26


class WorkerFailed(Exception):
    """A command to a worker failed; the message is the worker's."""


def interpreters(systems: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The python for each system that is there, and notes about those that are not.

    Raises
    ------
    LoadTestError
        None of them is.
    """
    import importlib.util

    found: dict[str, str] = {}
    notes = []
    for system in systems:
        missing = [name for name in SYSTEMS[system].needs if importlib.util.find_spec(name) is None]
        if missing:
            notes.append(
                f"{system} was left out: pip install 'icechunk-loadtest[compare]' ({', '.join(missing)} is missing)"
            )
            continue
        if system != "official":
            found[system] = sys.executable
            continue
        # found, never made here: a load test fetches nothing from the network
        python = oracle.find(oracle.OFFICIAL_CURRENT)
        if python is None:
            notes.append(
                "official was left out: `python -m icechunk_loadtest.oracle 2.3.0` makes an environment with it"
            )
        else:
            found[system] = str(python)
    if not found:
        raise LoadTestError("; ".join(notes))
    return found, notes


class Runner:
    """Makes measurements with worker processes; as a context it ends all of them.

    Parameters
    ----------
    place
        Storage for the chunks.
    pythons
        An interpreter for each system.
    progress
        Shows each step.
    reuse
        Keep a worker for the next case of its system: quicker, but memory that a system keeps adds up.
    """

    def __init__(self, place: Place, pythons: Mapping[str, str], progress: Progress, *, reuse: bool = False) -> None:
        self._place = place
        self._pythons = pythons
        self._progress = progress
        self._reuse = reuse
        self._idle: dict[str, list[_Worker]] = {}
        self._stack = contextlib.AsyncExitStack()
        self._folder = ""
        self.versions: dict[str, dict[str, str]] = {}
        """Versions by system, as its worker reported them."""

    async def __aenter__(self) -> Runner:
        # a folder with nothing but the worker: python puts it on sys.path, and ours holds our own icechunk too
        self._folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="icechunk-loadtest-worker-"))
        shutil.copytree(
            Path(__file__).parent / "worker", Path(self._folder) / WORKER, ignore=shutil.ignore_patterns("__pycache__")
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def measure(self, case: Case) -> Measurement:
        """Run one case. A failure inside it becomes an error of the measurement."""
        size = case.point.size
        options = self._place.at(size.latency_ms)
        try:
            async with self._workers(case) as workers:
                try:
                    return await self._measure(case, options, workers)
                except BaseException:
                    for worker in workers:  # in the middle of something: not fit for another case
                        worker.kill()
                    raise
        except (WorkerFailed, TimeoutError, OSError) as error:
            text = str(error) or f"gave no answer in time ({type(error).__name__})"
            return Measurement(
                point=case.point,
                system=case.system,
                repeat=case.repeat,
                seconds=0.0,
                units=0,
                bytes_read=0,
                bytes_written=0,
                bytes_verified=0,
                errors=1,
                conflicts=0,
                messages=(text,),
            )

    async def _measure(self, case: Case, options: Mapping[str, Any], workers: Sequence[_Worker]) -> Measurement:
        size = case.point.size
        for index, worker in enumerate(workers):  # the first one makes the dataset, the others open it
            spec = {
                "workload": case.point.workload,
                "chunks": size.chunks,
                "chunk_bytes": size.chunk_bytes,
                "ops": size.ops,
                "tasks": size.tasks,
                "seconds": size.seconds,
                "index": index,
                "seed": case.repeat,
            }
            await worker.ask(
                "prepared", op="prepare", system=case.system, place=options, spec=spec, within_s=size.seconds + ANSWER_S
            )
        before, server_before = self._place.requests(), self._place.server_cpu_s()
        self._progress.running(case)
        answers = await _all(
            worker.ask("result", op="run", within_s=size.seconds * 2 + ANSWER_S, watch=self._progress.update)
            for worker in workers
        )
        after, server_after = self._place.requests(), self._place.server_cpu_s()
        server_cpu_s = None if server_before is None or server_after is None else server_after - server_before
        acknowledged = [message for answer in answers for message in answer["acknowledged"]]
        checked = await workers[0].ask("checked", op="check", acknowledged=acknowledged)
        counted = after.since(before) if before is not None and after is not None else None
        return _merge(case, answers, checked, counted, server_cpu_s)

    @contextlib.asynccontextmanager
    async def _workers(self, case: Case) -> AsyncIterator[list[_Worker]]:
        idle = self._idle.setdefault(case.system, [])
        workers = [idle.pop() for _ in range(min(len(idle), case.point.size.processes))]
        try:
            while len(workers) < case.point.size.processes:
                worker = await _Worker.start(self._pythons[case.system], self._folder, case.system)
                self._stack.push_async_callback(worker.aclose)
                workers.append(worker)
                self.versions[case.system] = worker.versions
            yield workers
        finally:
            for worker in workers:
                if self._reuse and worker.alive:
                    idle.append(worker)
                else:
                    await worker.aclose()


async def _all(waiting: Any) -> list[dict[str, Any]]:
    tasks = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in waiting]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]


class _Worker:
    """A worker process, and the JSON lines exchanged with it."""

    def __init__(self, process: asyncio.subprocess.Process, log: Any, name: str) -> None:
        self._process = process
        self._log = log
        self._name = name
        self._killed = False
        self.versions: dict[str, str] = {}

    @classmethod
    async def start(cls, python: str, folder: str, system: str) -> _Worker:
        environment = oracle.environment()
        if system != "official":
            # the same `icechunk` as in this process, installed or not
            environment["PYTHONPATH"] = str(Path(icechunk.__file__).parent.parent)
        log = tempfile.TemporaryFile()  # noqa: SIM115
        process = await asyncio.create_subprocess_exec(
            python,
            "-m",
            WORKER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            cwd=folder,
            env=environment,
            limit=_LINE_BYTES,
            start_new_session=True,  # Ctrl-C reaches the runner alone, which then ends its workers
        )
        worker = cls(process, log, system)
        try:
            worker.versions = (await worker._answer("ready", None, ANSWER_S))["versions"]
        except BaseException:
            await worker.aclose()
            raise
        return worker

    @property
    def alive(self) -> bool:
        return not self._killed and self._process.returncode is None

    async def ask(
        self,
        event: str,
        *,
        within_s: float = ANSWER_S,
        watch: Callable[[Mapping[str, Any]], None] | None = None,
        **command: Any,
    ) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises
        ------
        WorkerFailed
            It reported a failure, or ended.
        TimeoutError
            No answer after `within_s` seconds.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            await self._process.stdin.drain()
        except OSError as error:
            raise WorkerFailed(f"the worker of {self._name} has ended: {self._tail()}") from error
        return await self._answer(event, watch, within_s)

    async def _answer(
        self, event: str, watch: Callable[[Mapping[str, Any]], None] | None, within_s: float
    ) -> dict[str, Any]:
        assert self._process.stdout is not None
        async with asyncio.timeout(within_s):
            while line := await self._process.stdout.readline():
                message: dict[str, Any] = json.loads(line)
                if message["event"] == event:
                    return message
                if message["event"] == "failed":
                    raise WorkerFailed(message["message"])
                if watch is not None:
                    watch(message)
        raise WorkerFailed(f"the worker of {self._name} has ended: {self._tail()}")

    def kill(self) -> None:
        if self.alive:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def aclose(self) -> None:
        """End the process: by end of input, and by a signal after `CLOSE_S`."""
        if self.alive and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                async with asyncio.timeout(CLOSE_S):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
        self.kill()
        await self._process.wait()
        self._log.close()

    def _tail(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"


def _merge(
    case: Case,
    answers: Sequence[Mapping[str, Any]],
    checked: Mapping[str, Any],
    counted: Any,
    server_cpu_s: float | None,
) -> Measurement:
    """One measurement of the results of all workers of a case, which ran at the same time."""
    labels = {label for answer in answers for label in answer["latencies"]}
    longest = max(answers, key=lambda answer: float(answer["seconds"]))
    problems = [text for answer in answers for text in answer["problems"]] + list(checked["problems"])
    return Measurement(
        point=case.point,
        system=case.system,
        repeat=case.repeat,
        seconds=longest["seconds"],
        units=sum(answer["units"] for answer in answers),
        bytes_read=sum(answer["bytes_read"] for answer in answers),
        bytes_written=sum(answer["bytes_written"] for answer in answers),
        bytes_verified=sum(answer["bytes_verified"] for answer in answers[1:]) + checked["bytes_verified"],
        errors=sum(answer["errors"] for answer in answers),
        conflicts=sum(answer["conflicts"] for answer in answers),
        hedged=sum(answer["hedged"] for answer in answers),
        abandoned=sum(answer["abandoned"] for answer in answers),
        messages=tuple(text for answer in answers for text in answer["messages"])[:5],
        problems=tuple(dict.fromkeys(problems))[:5],
        cpu_s=sum(answer["cpu_s"] for answer in answers),
        server_cpu_s=server_cpu_s,
        rss_before_bytes=sum(answer["rss_before_bytes"] for answer in answers),
        rss_peak_bytes=sum(answer["rss_peak_bytes"] for answer in answers),
        requests=None if counted is None else dict(counted.by_name),
        server_received_bytes=None if counted is None else counted.received_bytes,
        server_sent_bytes=None if counted is None else counted.sent_bytes,
        latencies={
            label: Histogram.merged(
                Histogram.from_json(answer["latencies"][label]) for answer in answers if label in answer["latencies"]
            )
            for label in sorted(labels)
        },
        bin_s=longest["bin_s"],
        # the timeline is that of the worker that took longest
        bins=tuple(Bin(**each) for each in longest["bins"]),
    )
