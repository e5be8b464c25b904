"""Live progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from typing import Any, TextIO

from icechunk_loadtest.plan import WORKLOADS, Case, Point
from icechunk_loadtest.results import Measurement
from icechunk_loadtest.units import bytes_text, rate_text, seconds_text

__all__ = ["Progress", "point_text"]

_BAR = 16


class Progress:
    """Shows the current case on a stream: a line that is redrawn on a terminal, one line for each result elsewhere.

    Parameters
    ----------
    total
        Measurements to come.
    stream
        Usually standard error.
    quiet
        Print failures only.
    """

    def __init__(self, total: int, stream: TextIO, *, quiet: bool = False) -> None:
        self._total = max(total, 1)
        self._done = 0
        self._stream = stream
        self._live = stream.isatty() and not quiet
        self._quiet = quiet
        self._case: Case | None = None
        self._heading: Point | None = None
        self._began = time.perf_counter()

    def preparing(self, case: Case) -> None:
        """A case begins: its worker makes the data."""
        self._case = case
        self._draw("preparing")

    def running(self, case: Case) -> None:
        """The measured part begins."""
        self._case = case
        self._draw("running")

    def update(self, event: Mapping[str, Any]) -> None:
        """A worker reports its progress: ``seconds``, ``units``, ``bytes``, ``errors``."""
        if not self._live or self._case is None:
            return
        seconds = max(float(event["seconds"]), 1e-9)
        unit = WORKLOADS[self._case.point.workload].unit
        rate = event["bytes"] / 2**20 / seconds if unit == "MiB" else event["units"] / seconds
        errors = f" · {event['errors']} errors" if event["errors"] else ""
        self._draw(f"{rate_text(rate, unit)} · {bytes_text(event['bytes'])} · {seconds:.0f} s{errors}")

    def finished(self, measurement: Measurement) -> None:
        """A case is done."""
        self._done += 1
        self._clear()
        if self._quiet and measurement.ok:
            return
        if measurement.point != self._heading:
            self._heading = measurement.point
            self._print(f"{WORKLOADS[measurement.point.workload].title} ({point_text(measurement.point)})")
        self._print(f"  {_line(measurement)}")
        for text in (*measurement.messages, *measurement.problems):
            self._print(f"    {' '.join(text.split())}")

    def note(self, text: str) -> None:
        """Print a remark."""
        if not self._quiet:
            self._clear()
            self._print(text)

    def close(self) -> None:
        """Remove the live line."""
        self._clear()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()

    def _draw(self, status: str) -> None:
        if not self._live or self._case is None:
            return
        filled = _BAR * self._done // self._total
        elapsed = time.perf_counter() - self._began
        left = f", {elapsed / self._done * (self._total - self._done):.0f} s left" if self._done else ""
        text = (
            f"{'━' * filled}{'╌' * (_BAR - filled)} {self._done}/{self._total}{left}  "
            f"{self._case.point.workload} {self._case.system}: {status}"
        )
        self._stream.write("\r\x1b[2K" + text[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()


def point_text(point: Point) -> str:
    """The numbers of a point that its workload depends on, as text."""
    size = point.size
    parts = []
    if WORKLOADS[point.workload].unit not in ("commits",) or point.workload in ("append", "ingest"):
        parts.append(f"{size.chunks} × {bytes_text(size.chunk_bytes)}")
    if size.processes > 1:
        parts.append(f"{size.processes} processes")
    if size.tasks > 1 or point.swept == "tasks":
        parts.append(f"concurrency {size.tasks}")
    parts.append(f"{size.latency_ms} ms added" if size.latency_ms else "no latency added")
    return ", ".join(parts)


def _line(run: Measurement) -> str:
    latency = run.latency
    spread = (
        f"p50 {seconds_text(latency.percentile(50))}  p99 {seconds_text(latency.percentile(99))}" if latency.n else ""
    )
    requests = "" if run.requests is None else f"  {sum(run.requests.values())} requests"
    bad = "" if run.ok else f"  {run.errors} errors, {len(run.problems)} problems"
    return (
        f"{run.system:13} {rate_text(run.throughput, WORKLOADS[run.point.workload].unit):>18}  {spread:28}  "
        f"cpu {seconds_text(run.cpu_s):>8}{requests}{bad}"
    )
