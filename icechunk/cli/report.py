"""The report of the demo: versions with their sizes, times and the outcome of reading them back."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import field
from datetime import datetime
from typing import Any

from icechunk.cli import dataset
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["Report", "Version", "as_json", "as_text"]


@dataclass(slots=True, kw_only=True)
class Version:
    """One committed version, and its expected contents."""

    snapshot_id: str
    """Id of the snapshot."""
    branch: str
    """Branch that it was committed to."""
    message: str
    """Its commit message."""
    written_at: datetime
    """Time of the commit, by the repository."""
    contents: Mapping[str, Any] = field(repr=False)
    """Datasets by group that the version must hold, made from the files alone."""
    write_s: float
    """Seconds spent writing into the session."""
    commit_s: float
    """Seconds spent committing."""
    read_s: float = 0.0
    """Seconds spent reading everything back and comparing it."""

    @property
    def data_bytes(self) -> int:
        """Size of all values of the version, uncompressed."""
        return sum(int(data.nbytes) for data in self.contents.values())

    def check(self, repo: Any) -> list[str]:
        """Read the whole version back from `repo` and list every difference from its expected contents."""
        import xarray

        started = time.perf_counter()
        store = repo.readonly_session(snapshot_id=self.snapshot_id).store
        problems = []
        for group, expected in self.contents.items():
            found = xarray.open_zarr(store, group=group, consolidated=False, chunks=None, decode_timedelta=False)
            problems += [f"{self.snapshot_id} {group}: {text}" for text in dataset.compare(expected, found.load())]
        self.read_s = time.perf_counter() - started
        return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of one run of the demo."""

    place: str
    """Location of the repository."""
    keep: str
    """A sentence that says whether it is kept after the demo."""
    versions: tuple[Version, ...]
    """Versions in the order in which they were committed."""
    branches: Mapping[str, str]
    """Snapshot ids by branch."""
    tags: Mapping[str, str]
    """Snapshot ids by tag."""
    stored_bytes: int | None
    """Bytes of the whole repository in storage; None where they were not counted."""
    written_s: float
    """Seconds from the creation of the repository to the last reference."""
    problems: tuple[str, ...]
    """Every difference between the data that was read back and the data that was written; empty in a sound run."""

    @property
    def ok(self) -> bool:
        """Everything came back as it went in."""
        return not self.problems


def as_text(report: Report) -> str:
    """The report for a person."""
    names: dict[str, list[str]] = {}
    for kind, refs in (("tag", report.tags), ("branch", report.branches)):
        for name, snapshot_id in refs.items():
            names.setdefault(snapshot_id, []).append(f"{kind} {name}")
    header = ("snapshot", "committed (UTC)", "data", "write", "commit", "read back", "message", "")
    rows = [
        (
            version.snapshot_id,
            f"{version.written_at:%Y-%m-%d %H:%M:%S}",
            _size(version.data_bytes),
            _milliseconds(version.write_s),
            _milliseconds(version.commit_s),
            _milliseconds(version.read_s),
            version.message,
            ", ".join(names.get(version.snapshot_id, ())),
        )
        for version in report.versions
    ]
    lines = [f"Repository: {report.place}", "", *_table(header, rows), ""]
    data = sum(version.data_bytes for version in report.versions)
    stored = "" if report.stored_bytes is None else f" stored in {_size(report.stored_bytes)}"
    lines.append(f"{len(rows)} versions, {_size(data)} of data{stored}, written in {report.written_s:.2f} s.")
    if report.ok:
        lines.append("A writer whose base had gone stale was refused: nothing was lost or overwritten.")
        lines.append("Every version was read back and equals its source files bit for bit.")
    else:
        lines.append("READ BACK DIFFERS:")
        lines += [f"  {problem}" for problem in report.problems]
    lines.append(report.keep)
    return "\n".join(lines)


def as_json(report: Report) -> str:
    """The report for a program: one JSON object."""
    return json.dumps(
        {
            "place": report.place,
            "ok": report.ok,
            "problems": list(report.problems),
            "branches": dict(report.branches),
            "tags": dict(report.tags),
            "stored_bytes": report.stored_bytes,
            "written_s": round(report.written_s, 6),
            "versions": [
                {
                    "snapshot_id": version.snapshot_id,
                    "branch": version.branch,
                    "message": version.message,
                    "written_at": version.written_at.isoformat(),
                    "groups": sorted(version.contents),
                    "data_bytes": version.data_bytes,
                    "write_s": round(version.write_s, 6),
                    "commit_s": round(version.commit_s, 6),
                    "read_s": round(version.read_s, 6),
                }
                for version in report.versions
            ],
        },
        indent=2,
    )


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    numeric = {2, 3, 4, 5}
    return [
        "  ".join(
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, (*("-" * width for width in widths[:-1]), ""), *rows]
    ]


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"
