"""Counters of a running workload: operations, bytes, errors, CPU and memory, in total and over time."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .histogram import Histogram

__all__ = ["Meter"]

MAX_BINS = 240
"""Bins of the timeline; when a run gets longer, pairs of bins are merged."""
MAX_MESSAGES = 5
_FIRST_BIN_S = 0.25


class _Bin:
    __slots__ = ("bytes", "errors", "latency", "units")

    def __init__(self) -> None:
        self.units = 0.0
        self.bytes = 0
        self.errors = 0
        self.latency = Histogram()

    def merge(self, other: _Bin) -> None:
        self.units += other.units
        self.bytes += other.bytes
        self.errors += other.errors
        self.latency.merge(other.latency)


class Meter:
    """One run's figures. Used from one event loop."""

    def __init__(self) -> None:
        self.units = 0.0
        self.bytes_read = 0
        self.bytes_written = 0
        self.bytes_verified = 0
        self.errors = 0
        self.conflicts = 0
        self.hedged = 0
        self.abandoned = 0
        self._messages: list[str] = []
        self._problems: list[str] = []
        self._latencies: dict[str, Histogram] = {}
        self._bins: list[_Bin] = []
        self._bin_s = _FIRST_BIN_S
        self._started = self._ended = 0.0
        self._cpu_s = 0.0
        self._rss_before = self._rss_peak = 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Time, CPU and memory count inside the block."""
        self._rss_before = _rss_bytes()
        _reset_peak()
        before = resource.getrusage(resource.RUSAGE_SELF)
        repeats = _repeats()
        self._started = time.perf_counter()
        try:
            yield
        finally:
            self._ended = time.perf_counter()
            after = resource.getrusage(resource.RUSAGE_SELF)
            self.hedged, self.abandoned = (new - old for new, old in zip(_repeats(), repeats, strict=True))
            self._cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            self._rss_peak = _peak_bytes()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the measured block began."""
        return time.perf_counter() - self._started

    @contextmanager
    def operation(self, label: str, *, units: float = 0, read: int = 0, written: int = 0) -> Iterator[None]:
        """Time the block as one operation; it counts when it ends without an exception.

        Parameters
        ----------
        label
            Operations with one label share percentiles.
        units
            Chunks, commits or openings that it adds to the throughput.
        read, written
            Bytes of array data.
        """
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._latencies.setdefault(label, Histogram()).record(seconds)
        self.units += units
        self.bytes_read += read
        self.bytes_written += written
        now = self._bin()
        now.units += units
        now.bytes += read + written
        now.latency.record(seconds)

    def error(self, error: BaseException) -> None:
        """Count an operation that failed."""
        self.errors += 1
        self._bin().errors += 1
        if len(self._messages) < MAX_MESSAGES:
            self._messages.append(f"{type(error).__name__}: {error}"[:500])

    def problem(self, text: str) -> None:
        """Note a difference between data that were read and data that were written."""
        if len(self._problems) < MAX_MESSAGES:
            self._problems.append(text)

    def result(self) -> dict[str, Any]:
        """The figures as an object for JSON."""
        return {
            "seconds": self._ended - self._started,
            "units": self.units,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "bytes_verified": self.bytes_verified,
            "errors": self.errors,
            "conflicts": self.conflicts,
            "hedged": self.hedged,
            "abandoned": self.abandoned,
            "messages": self._messages,
            "problems": self._problems,
            "cpu_s": self._cpu_s,
            "rss_before_bytes": self._rss_before,
            "rss_peak_bytes": self._rss_peak,
            "latencies": {label: histogram.to_json() for label, histogram in self._latencies.items()},
            "bin_s": self._bin_s,
            "bins": [
                {
                    "units": each.units,
                    "bytes": each.bytes,
                    "errors": each.errors,
                    "p50_s": each.latency.percentile(50) if each.latency.n else None,
                    "p99_s": each.latency.percentile(99) if each.latency.n else None,
                }
                for each in self._bins
            ],
        }

    def _bin(self) -> _Bin:
        index = int(self.elapsed_s / self._bin_s)
        while index >= MAX_BINS:
            for even, odd in zip(self._bins[::2], self._bins[1::2], strict=False):
                even.merge(odd)
            self._bins = self._bins[::2]
            self._bin_s *= 2
            index //= 2
        while len(self._bins) <= index:
            self._bins.append(_Bin())
        return self._bins[index]


def _repeats() -> tuple[int, int]:
    """Reads sent a second time, and requests given up for silence, by this process so far; only our library counts."""
    try:
        from icechunk.storage.retry import repeats_so_far
    except ImportError:
        return 0, 0
    totals = repeats_so_far()
    return totals.hedged, totals.abandoned


def _rss_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak_bytes()


def _reset_peak() -> None:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return  # not Linux: the peak is the one since the process began


def _peak_bytes() -> int:
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
