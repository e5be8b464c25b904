"""Distance of a measurement from the limits of the machine and the line, and the price of its requests on S3.

The share of a limit is a lower bound of the time that the run had to take, over the time that it took. Bounds: the
processor time of client and server together, on all processors; round trips one after another, where the proxy adds
latency and single operations are timed; bytes over loopback; bytes to disk. Nothing is assumed about the client: its
own processor time counts as it is, so a share of 90 % says that this client cannot be much faster here, not that no
client can.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from icechunk_loadtest.results import MIB, Measurement, Summary

__all__ = [
    "MONTH_S",
    "Cost",
    "Machine",
    "Share",
    "cost",
    "idle_line",
    "measure_machine",
    "month_line",
    "share",
    "unit_cost",
]

MONTH_S = 30 * 24 * 3600
_USD_PER_REQUEST = {"PUT": 5e-6, "GET": 4e-7, "LIST": 5e-6}
"""Prices of S3 Standard in us-east-1, November 2026; deletions are free."""
_MOST_ROUNDS = 8
"""An operation of more round trips than this is not timed by them: its requests overlap."""
_LOOPBACK_MIB = 256
_DISK_MIB = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Capacities of the machine, measured by itself."""

    processors: int
    """Processors that the load test may use."""
    loopback_mib_s: float
    """MiB/s that one connection over 127.0.0.1 carries."""
    disk_mib_s: float
    """MiB/s that one file takes, its sync included."""


def measure_machine() -> Machine:
    """Measure for about a second."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(processors=processors, loopback_mib_s=_loopback_mib_s(), disk_mib_s=_disk_mib_s())


def _loopback_mib_s() -> float:
    block = bytes(MIB)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def send() -> None:
            with socket.create_connection(server.getsockname()) as line:
                for _ in range(_LOOPBACK_MIB):
                    line.sendall(block)

        started = time.perf_counter()
        sender = threading.Thread(target=send)
        sender.start()
        line, _ = server.accept()
        with line:
            buffer = bytearray(MIB)
            while line.recv_into(buffer):
                pass
        sender.join()
    return _LOOPBACK_MIB / (time.perf_counter() - started)


def _disk_mib_s() -> float:
    block = os.urandom(MIB)
    with tempfile.NamedTemporaryFile(prefix="icechunk-loadtest-", buffering=0) as file:
        started = time.perf_counter()
        for _ in range(_DISK_MIB):
            file.write(block)
        os.fsync(file.fileno())
    return _DISK_MIB / (time.perf_counter() - started)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Shares of the machine's limits that a run used."""

    parts: Mapping[str, float]
    """Share of each limit, 0 to 1: ``processors``, ``round trips``, ``loopback``, ``disk``."""
    client_cpu_s: float
    """Client processor seconds of one unit of throughput."""
    server_cpu_s: float | None
    """Server processor seconds of one request; None where they are not known."""
    server_cpu_mib_s: float | None
    """Server processor seconds of one MiB; None where they are not known, or less than one MiB went through the
    server."""
    round_trips: float | None
    """Round trips of one operation, one after another; None where they cannot be told."""

    @property
    def limit(self) -> str:
        """The limit that the run was nearest to."""
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def nearest(self) -> float:
        """Its share."""
        return self.parts[self.limit]

    def advice(self) -> str:
        """Advice on the rest of the time, if that is more than a fifth; else an empty text."""
        if self.nearest >= 0.8:
            return ""
        if self.limit == "round trips":
            return "the client computes between its round trips: less work there, or work while it waits"
        return "client and server wait for each other: more requests at a time, or fewer one after another"


def share(run: Measurement, machine: Machine, kind: str) -> Share | None:
    """The shares of a run that completed something.

    Parameters
    ----------
    kind
        Of the storage: ``s3``, ``local`` or ``memory``.
    """
    if not run.units or run.seconds <= 0:
        return None
    server_s = run.server_cpu_s
    parts = {"processors": (run.cpu_s + (server_s or 0.0)) / (run.seconds * machine.processors)}
    moved = (run.server_received_bytes or 0) + (run.server_sent_bytes or 0)
    if moved:
        parts["loopback"] = moved / MIB / machine.loopback_mib_s / run.seconds
    if kind == "local" and run.bytes_written:
        parts["disk"] = run.bytes_written / MIB / machine.disk_mib_s / run.seconds
    round_trips = None
    latency_s = run.point.size.latency_ms / 1000
    if latency_s and run.latency.n:
        found = run.latency.percentile(50) / latency_s
        if 1 <= found < _MOST_ROUNDS + 1:
            round_trips = float(math.floor(found))
            parts["round trips"] = round_trips / found
    requests = sum(run.requests.values()) if run.requests else 0
    return Share(
        parts={name: min(1.0, value) for name, value in parts.items()},
        client_cpu_s=run.cpu_s / run.units,
        server_cpu_s=server_s / requests if server_s is not None and requests else None,
        server_cpu_mib_s=server_s / (moved / MIB) if server_s is not None and moved >= MIB else None,
        round_trips=round_trips,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Requests by the class that S3 bills."""

    by_class: Mapping[str, float]
    """``PUT`` (also COPY and POST), ``GET`` (also HEAD), ``LIST``, ``DELETE``."""

    @property
    def usd(self) -> float:
        """Price of the requests at S3's prices, US dollars."""
        return sum(_USD_PER_REQUEST.get(name, 0.0) * count for name, count in self.by_class.items())

    def times(self, factor: float) -> Cost:
        """The same so many times."""
        return Cost(by_class={name: count * factor for name, count in self.by_class.items()})

    def __str__(self) -> str:
        return ", ".join(f"{count:.3g} {name}" for name, count in self.by_class.items() if count) or "no requests"


def cost(requests: Mapping[str, int]) -> Cost:
    """The classes of requests that a server counted by name."""
    found = dict.fromkeys(("PUT", "GET", "LIST", "DELETE"), 0.0)
    for name, count in requests.items():
        found[_class_of(name)] += count
    return Cost(by_class=found)


def _class_of(name: str) -> str:
    if name.startswith("List"):
        return "LIST"
    if name.startswith(("Delete", "Abort")):
        return "DELETE"
    return "GET" if name.startswith(("Get", "Head")) else "PUT"


def unit_cost(summary: Summary) -> Cost | None:
    """Requests of one unit of throughput, the median of the runs; None where the server gives no counters."""
    runs = [run for run in summary.runs if run.requests is not None and run.units]
    if not runs:
        return None
    each = [cost(run.requests or {}).times(1 / run.units).by_class for run in runs]
    return Cost(by_class={name: statistics.median(one[name] for one in each) for name in each[0]})


def month_line(summaries: Sequence[Summary], system: str) -> str | None:
    """The price of one small commit a minute for a month, as a line; None where that was not measured."""
    for summary in summaries:
        if summary.point.workload == "commit" and summary.system == system and (each := unit_cost(summary)):
            month = each.times(MONTH_S / 60)
            return f"{system}: one small commit a minute costs ${month.usd:.2f} a month in requests ({each} a commit)"
    return None


def idle_line(summaries: Sequence[Summary], system: str) -> str | None:
    """The price of an open repository that is not used, as a line; None where that was not measured."""
    for summary in summaries:
        if summary.point.workload == "idle" and summary.system == system:
            runs = [run for run in summary.runs if run.requests is not None]
            if runs:
                sent = cost(runs[-1].requests or {})
                return f"{system}: an open repository sent {sent} in {runs[-1].seconds:.0f} s without work"
    return None
