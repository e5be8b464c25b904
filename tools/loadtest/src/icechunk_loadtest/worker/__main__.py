"""``python -m loadtest_worker``: serves one runner over standard input and output."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import warnings
from importlib import metadata
from typing import Any

from .targets import make_target
from .workloads import Run, Spec

__all__ = ["serve"]

PROGRESS_S = 0.2


class Worker:
    """Executes one command at a time."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self._run: Run | None = None

    def say(self, **message: Any) -> None:
        """Send one line to the runner."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    async def answer(self, command: dict[str, Any]) -> None:
        """Carry out one command."""
        match command["op"]:
            case "prepare":
                spec = Spec(**command["spec"])
                await self.close()
                target = make_target(command["system"], command["place"], spec.chunk_bytes, spec.tasks)
                self._run = Run(spec, target)
                async with asyncio.timeout(spec.seconds + 120):
                    await self._run.prepare()
                self.say(event="prepared")
            case "run":
                run = self._current()
                reporting = asyncio.create_task(self._report(run))
                try:
                    await run.run()
                finally:
                    reporting.cancel()
                self.say(event="result", acknowledged=run.acknowledged, **run.meter.result())
            case "check":
                run = self._current()
                problems = await run.check(command["acknowledged"])
                self.say(event="checked", problems=problems, bytes_verified=run.meter.bytes_verified)
            case other:
                raise ValueError(f"no such command: {other}")

    async def close(self) -> None:
        """Close the target of the last run."""
        run, self._run = self._run, None
        if run is not None:
            await run.target.aclose()

    def _current(self) -> Run:
        if self._run is None:
            raise ValueError("nothing was prepared")
        return self._run

    async def _report(self, run: Run) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            meter = run.meter
            self.say(
                event="progress",
                seconds=meter.elapsed_s,
                units=meter.units,
                bytes=meter.bytes_read + meter.bytes_written,
                errors=meter.errors,
            )


async def serve(worker: Worker) -> None:
    """Answer commands until standard input ends.

    Commands are ``{"op": "prepare", "system", "place", "spec"}``, ``{"op": "run"}`` and ``{"op": "check",
    "acknowledged"}``; the answers are the events ``prepared``, ``progress`` (many) and ``result``, ``checked``, or
    ``failed`` with a message.
    """
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader(limit=2**26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    worker.say(event="ready", versions=_versions())
    while line := await commands.readline():
        try:
            await worker.answer(json.loads(line))
        except Exception as error:
            worker.say(event="failed", message=f"{type(error).__name__}: {error}"[:1000])
    await worker.close()


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("aioicechunk", "icechunk", "zarr", "numpy", "obstore", "aiobotocore", "s3fs"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    # libraries may print: their output goes to standard error, not between the lines for the runner
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(serve(Worker(answers)))
    # everything is sent and closed; exit handlers of libraries would only delay the runner
    os._exit(0)
