"""Workloads, systems, sizes and sweeps, and the list of cases that they make."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from icechunk_loadtest.errors import LoadTestError

__all__ = [
    "MAX_CASES",
    "QUICK_SYSTEMS",
    "SYSTEMS",
    "WORKLOADS",
    "Case",
    "Point",
    "Size",
    "Sweep",
    "System",
    "Workload",
    "cases",
    "parse_size",
    "parse_sweep",
    "pick",
    "points",
]

KIB = 1024
MIB = 1024 * KIB
MAX_CASES = 2_000
"""More cases than this are refused as a mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A library, or a combination of libraries, that stores chunks."""

    title: str
    """Name in tables and plots."""
    family: str
    """``icechunk``: has commits; ``zarr``: arrays without commits; ``objects``: neither."""
    needs: tuple[str, ...] = ()
    """Modules that must be importable."""


SYSTEMS: Mapping[str, System] = {
    "ours": System(title="aioicechunk", family="icechunk"),
    "official": System(title="icechunk 2.3.0 (official)", family="icechunk"),
    "obstore": System(title="obstore, raw objects", family="objects", needs=("obstore",)),
    "aiobotocore": System(title="aiobotocore, raw objects", family="objects", needs=("aiobotocore",)),
    "zarr-obstore": System(title="zarr on obstore", family="zarr", needs=("obstore",)),
    "zarr-fsspec": System(title="zarr on fsspec (s3fs)", family="zarr", needs=("s3fs",)),
}
"""Systems by name, in the order of the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The numbers of a workload."""

    chunks: int
    """Chunks in the array."""
    chunk_bytes: int
    """Bytes of a chunk."""
    ops: int = 1
    """Number of operations; where tasks contend, of each task."""
    tasks: int = 10
    """Tasks at a time; for a call on a whole array, how many chunks zarr works on at a time (zarr's default: 10)."""
    processes: int = 1
    """Worker processes."""
    latency_ms: int = 0
    """Milliseconds that the proxy adds to every response of the store."""
    seconds: float = 300.0
    """No operation begins after this many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Description of a workload; `icechunk_loadtest.worker.workloads` runs it."""

    title: str
    """Name in tables and plots: a few words."""
    about: str
    """One sentence about the operations that are measured."""
    unit: str
    """Unit of throughput, per second: ``chunks``, ``MiB``, ``commits``, ``openings`` or ``ops``."""
    full: Size
    """Sizes of a full run."""
    quick: Size
    """Sizes of ``--quick``."""
    families: frozenset[str] = frozenset({"icechunk", "zarr", "objects"})
    """Families of the systems that can run it."""


_COMMITTERS = frozenset({"icechunk"})

WORKLOADS: Mapping[str, Workload] = {
    "write_small": Workload(
        title="Ingest, small chunks",
        about="Write a whole array of small chunks in one call, and commit it.",
        unit="chunks",
        full=Size(chunks=1_000, chunk_bytes=16 * KIB, latency_ms=20),
        quick=Size(chunks=200, chunk_bytes=16 * KIB, latency_ms=20),
    ),
    "write_large": Workload(
        title="Ingest, large chunks",
        about="Write a whole array of large chunks in one call, and commit it.",
        unit="MiB",
        full=Size(chunks=256, chunk_bytes=4 * MIB),
        quick=Size(chunks=8, chunk_bytes=4 * MIB),
    ),
    "read_small": Workload(
        title="Sequential read, small chunks",
        about="Open anew and read a whole array of small chunks in one call.",
        unit="chunks",
        full=Size(chunks=1_000, chunk_bytes=16 * KIB, latency_ms=20),
        quick=Size(chunks=200, chunk_bytes=16 * KIB, latency_ms=20),
    ),
    "read_large": Workload(
        title="Sequential read, large chunks",
        about="Open anew and read a whole array of large chunks in one call.",
        unit="MiB",
        full=Size(chunks=256, chunk_bytes=4 * MIB),
        quick=Size(chunks=8, chunk_bytes=4 * MIB),
    ),
    "read_random": Workload(
        title="Random reads",
        about="Read single chunks at random, one after the other except in a sweep of concurrency.",
        unit="chunks",
        full=Size(chunks=1_000, chunk_bytes=16 * KIB, ops=200, tasks=1, latency_ms=20),
        quick=Size(chunks=200, chunk_bytes=16 * KIB, ops=30, tasks=1, latency_ms=20),
    ),
    "mixed": Workload(
        title="Readers and a writer",
        about="Readers look up chunks of ever newer versions while a writer rewrites chunks and commits.",
        unit="chunks",
        full=Size(chunks=500, chunk_bytes=64 * KIB, ops=1_000, tasks=8),
        quick=Size(chunks=60, chunk_bytes=64 * KIB, ops=96, tasks=8),
    ),
    "append": Workload(
        title="Appends",
        about="Grow the array by one chunk, write it and commit, again and again.",
        unit="commits",
        full=Size(chunks=100, chunk_bytes=64 * KIB, ops=50, latency_ms=20),
        quick=Size(chunks=20, chunk_bytes=64 * KIB, ops=6, latency_ms=20),
    ),
    "ingest": Workload(
        title="Ingest service",
        about="Append one chunk durably, again and again, by what a library has for it: ours by its appender.",
        unit="commits",
        full=Size(chunks=100, chunk_bytes=64 * KIB, ops=50, latency_ms=20),
        quick=Size(chunks=20, chunk_bytes=64 * KIB, ops=6, latency_ms=20),
    ),
    "commit": Workload(
        title="Tiny commits",
        about="Open a session, change one attribute and commit, again and again.",
        unit="commits",
        full=Size(chunks=1, chunk_bytes=KIB, ops=50, tasks=1, latency_ms=20),
        quick=Size(chunks=1, chunk_bytes=KIB, ops=6, tasks=1, latency_ms=20),
        families=_COMMITTERS,
    ),
    "commit_tasks": Workload(
        title="Contention of tasks",
        about="Tasks of one process commit to one branch; the loser of a race starts again from the newest version.",
        unit="commits",
        full=Size(chunks=1, chunk_bytes=KIB, ops=2, tasks=32, latency_ms=20),
        quick=Size(chunks=1, chunk_bytes=KIB, ops=1, tasks=8, latency_ms=20),
        families=_COMMITTERS,
    ),
    "commit_processes": Workload(
        title="Contention of processes",
        about="Processes commit to one branch; the loser of a race starts again from the newest version.",
        unit="commits",
        full=Size(chunks=1, chunk_bytes=KIB, ops=20, tasks=1, processes=8),
        quick=Size(chunks=1, chunk_bytes=KIB, ops=6, tasks=1, processes=2),
        families=_COMMITTERS,
    ),
    "cold_open": Workload(
        title="Cold open",
        about="Connect, open the newest version and read one chunk, with nothing cached.",
        unit="openings",
        full=Size(chunks=1_000, chunk_bytes=16 * KIB, ops=20, tasks=10, latency_ms=20),
        quick=Size(chunks=200, chunk_bytes=16 * KIB, ops=6, tasks=10, latency_ms=20),
    ),
    "idle": Workload(
        title="Idle",
        about="Keep a repository and a session open and do nothing, for a given time.",
        unit="ops",
        full=Size(chunks=1, chunk_bytes=KIB, tasks=1, seconds=20),
        quick=Size(chunks=1, chunk_bytes=KIB, tasks=1, seconds=2),
        families=_COMMITTERS,
    ),
    "soak": Workload(
        title="Soak",
        about="Readers read at random for a given time while a writer rewrites chunks and commits them.",
        unit="ops",
        full=Size(chunks=500, chunk_bytes=64 * KIB, tasks=8, seconds=30),
        quick=Size(chunks=60, chunk_bytes=64 * KIB, tasks=8, seconds=2),
    ),
}
"""Workloads by name, in the order in which they run."""

QUICK_SYSTEMS = ("ours", "official", "obstore")
"""Systems that ``--quick`` compares, as far as they are installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """One parameter that takes several values."""

    parameter: str
    """A field of `Size`: ``tasks``, ``chunk_bytes`` or ``latency_ms``."""
    values: tuple[int, ...]
    """Ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A workload at one size, whichever the system."""

    workload: str
    """A key of `WORKLOADS`."""
    size: Size
    """Its numbers."""
    swept: str | None = None
    """The parameter of the sweep that the point belongs to; None for the workload's own sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measurement to make."""

    point: Point
    """Workload and size."""
    system: str
    """A key of `SYSTEMS`."""
    repeat: int
    """Number of the repeat, from 0."""


_PARAMETERS = {
    "concurrency": ("tasks", 1, 4_096),
    "chunk-size": ("chunk_bytes", 64, 512 * MIB),
    "latency": ("latency_ms", 0, 10_000),
}
_DEFAULT_SWEEPS = {
    "concurrency": "1,4,16,64",
    "chunk-size": "4KiB,64KiB,1MiB,8MiB",
    "latency": "0,5,20,80",
}
SWEPT_BYTES = 64 * MIB
"""Along a sweep of chunk sizes, arrays keep about this size (but never more chunks than the workload has)."""


def parse_size(text: str) -> int:
    """Bytes of a text like ``16KiB``, ``4 MiB`` or ``500``.

    Raises
    ------
    LoadTestError
        `text` is no size.
    """
    trimmed = text.strip().lower().removesuffix("b").removesuffix("i")
    factor = {"k": KIB, "m": MIB, "g": 1024 * MIB}.get(trimmed[-1:], 1)
    number = trimmed[:-1] if factor > 1 else trimmed
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise LoadTestError(f"{text!r} is no size; write it like 16KiB, 4MiB or 500") from None


def parse_sweep(text: str) -> Sweep:
    """A sweep of a text like ``concurrency=1,4,16`` or just ``latency`` for the usual values.

    Raises
    ------
    LoadTestError
        Unknown parameter, or values that are not numbers in its range.
    """
    name, _, listed = text.partition("=")
    if name not in _PARAMETERS:
        raise LoadTestError(f"--sweep {text}: unknown parameter {name!r}; there are {', '.join(_PARAMETERS)}")
    parameter, low, high = _PARAMETERS[name]
    values = []
    for item in (listed or _DEFAULT_SWEEPS[name]).split(","):
        try:
            value = parse_size(item) if parameter == "chunk_bytes" else int(item.strip().removesuffix("ms"))
        except (ValueError, LoadTestError):
            raise LoadTestError(f"--sweep {text}: {item!r} is no value for {name}") from None
        if not low <= value <= high:
            raise LoadTestError(f"--sweep {text}: {item} is not between {low} and {high}")
        values.append(value)
    return Sweep(parameter=parameter, values=tuple(sorted(set(values))))


def pick(text: str, known: Iterable[str], kind: str) -> tuple[str, ...]:
    """Names of a comma-separated list, in the order of `known`; ``all`` is all of them. `kind` is for messages.

    Raises
    ------
    LoadTestError
        A name that is not known, or no name at all.
    """
    names = list(known)
    wanted = {name.strip() for name in text.split(",") if name.strip()}
    if "all" in wanted:
        return tuple(names)
    for name in sorted(wanted - set(names)):
        raise LoadTestError(f"no {kind} is called {name!r}; there are {', '.join(names)}")
    if not wanted:
        raise LoadTestError(f"no {kind} is named; there are {', '.join(names)}")
    return tuple(name for name in names if name in wanted)


def points(
    workloads: Sequence[str], sweeps: Sequence[Sweep], *, quick: bool, overrides: Mapping[str, float]
) -> Iterator[Point]:
    """The workloads at their own sizes, then along each sweep.

    Parameters
    ----------
    overrides
        Values for fields of `Size` that replace a workload's own.
    """
    sizes = {}
    for name in workloads:
        size = WORKLOADS[name].quick if quick else WORKLOADS[name].full
        own = {field: value for field, value in overrides.items() if field != "soak_s"}
        if name == "soak" and "soak_s" in overrides:
            own["seconds"] = overrides["soak_s"]
        if name == "commit":
            own.pop("tasks", None)
        sizes[name] = dataclasses.replace(size, **own)  # type: ignore[arg-type]
        yield Point(workload=name, size=sizes[name])
    for name, sweep in itertools.product(workloads, sweeps):
        if not _sweepable(name, sweep.parameter):
            continue
        for value in sweep.values:
            size = dataclasses.replace(sizes[name], **{sweep.parameter: value})
            if sweep.parameter == "chunk_bytes":
                wanted = max(min(size.chunks, SWEPT_BYTES // value), 1)
                size = dataclasses.replace(size, chunks=wanted)
            yield Point(workload=name, size=size, swept=sweep.parameter)


def cases(chosen: Iterable[Point], systems: Sequence[str], *, repeats: int, kind: str = "s3") -> list[Case]:
    """Every point on every system that can run it on that kind of storage, systems in turn within a repeat.

    Raises
    ------
    LoadTestError
        More than `MAX_CASES`, or none at all.
    """
    made = [
        Case(point=point, system=system, repeat=repeat)
        for point in chosen
        for repeat in range(repeats)
        for system in systems
        if SYSTEMS[system].family in WORKLOADS[point.workload].families and _possible(point, system, kind)
    ]
    if not made:
        workloads = dict.fromkeys(point.workload for point in chosen)
        raise LoadTestError(
            f"none of the chosen systems ({', '.join(systems)}) can do any of the chosen workloads "
            f"({', '.join(workloads)}) on {kind}; add a system, or choose other workloads"
        )
    if len(made) > MAX_CASES:
        raise LoadTestError(f"that makes {len(made)} measurements; choose fewer (at most {MAX_CASES})")
    return made


def _possible(point: Point, system: str, kind: str) -> bool:
    if kind == "memory" and point.size.processes > 1:
        return False
    return not (kind != "s3" and system in ("aiobotocore", "zarr-fsspec"))


def _sweepable(workload: str, parameter: str) -> bool:
    if workload == "soak":
        return False
    if workload in ("commit", "commit_tasks", "commit_processes"):
        return parameter == "latency_ms" or (parameter == "tasks" and workload == "commit_tasks")
    if parameter == "tasks":
        return workload not in ("append", "ingest", "cold_open")
    return True
