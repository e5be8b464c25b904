"""``icechunk demo``: a small data set's life, from the first load to a published correction, checked at every step.

The story: January of an ocean model is loaded; two climate scenarios and a satellite analysis join it; February and
March are appended, and a writer that started too early is refused; the result is tagged ``v1``. A bias in February is
corrected on a branch, tagged ``v2``, and ``main`` moves there. Then every version is read back and compared with the
files it came from, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from typing import Any

import icechunk
from icechunk.cli import dataset
from icechunk.cli.report import Report, Version, as_json, as_text
from icechunk.cli.targets import Target, open_target
from icechunk.cli.terminal import Progress

__all__ = ["run", "tell"]

STEPS = 11
NEMO = "ocean/nemo"
OSTIA = "ocean/ostia"


def run(args: argparse.Namespace) -> int:
    """Run the demo as the command line asks and print its report; 0 when every version came back as it went in."""
    progress = Progress(STEPS, sys.stderr)
    try:
        with open_target(args) as target:
            report = tell(target, progress)
    finally:
        progress.close()
    print(as_json(report) if args.json else as_text(report))
    return 0 if report.ok else 1


def tell(target: Target, progress: Progress) -> Report:
    """Make the repository, write every version, read every version back.

    Raises
    ------
    IcechunkError
        The repository cannot be made at the target, or written.
    CommandError
        The data is not installed.
    """
    # imported late: xarray is an extra, and its absence deserves the one line that `load` gives
    with progress.step("reading NetCDF files"):
        months = [dataset.load(name) for name in dataset.MONTHS]
        scenarios = {name: dataset.load(file) for name, file in dataset.SCENARIOS.items()}
        ostia = dataset.load(dataset.SEA_SURFACE)
    started = time.perf_counter()
    with progress.step(f"creating {target.place}"):
        repo = icechunk.Repository.create(target.storage)
    writer = _Writer(repo, progress)

    contents: dict[str, Any] = {NEMO: months[0]}
    writer.commit("main", "Load NEMO sea surface, January 2015", contents, {NEMO: months[0]})

    load = {f"scenarios/{name}": data for name, data in scenarios.items()} | {OSTIA: ostia}
    contents = {**contents, **load}
    writer.commit("main", "Load scenarios A1B and E1, and OSTIA sea surface", contents, load)

    early = repo.writable_session("main")
    for month, title in zip(months[1:], ("February", "March"), strict=True):
        contents = {**contents, NEMO: dataset.joined(contents[NEMO], month)}
        writer.commit("main", f"Append NEMO {title} 2015", contents, {NEMO: month}, append_dim=dataset.TIME)
    with progress.step("a writer with a stale base is refused"):
        refused = _is_refused(early, ostia)

    with progress.step("tag v1, branch correction"):
        repo.create_tag("v1", writer.last)
        repo.create_branch("correction", writer.last)
    patch, after, region = dataset.corrected(contents[NEMO])
    contents = {**contents, NEMO: after}
    writer.commit("correction", "Correct a bias of 0.05 °C in February", contents, {NEMO: patch}, region=region)
    with progress.step("tag v2, main moves to the correction"):
        repo.create_tag("v2", writer.last)
        repo.reset_branch("main", writer.last)
        repo.checkpoint()
    written_s = time.perf_counter() - started

    with progress.step("reading every version back"):
        problems = [] if refused else ["a commit from a stale base was accepted"]
        problems += _check_refs(repo, writer.versions)
        for version in writer.versions:
            problems += version.check(repo)
    return Report(
        place=target.place,
        keep=target.keep,
        versions=tuple(writer.versions),
        branches={name: repo.lookup_branch(name) for name in sorted(repo.list_branches())},
        tags={name: repo.lookup_tag(name) for name in sorted(repo.list_tags())},
        stored_bytes=target.stored_bytes() if target.stored_bytes else None,
        written_s=written_s,
        problems=tuple(problems),
    )


class _Writer:
    """Writes one version after the other and remembers the expected contents of each."""

    def __init__(self, repo: Any, progress: Progress) -> None:
        self._repo = repo
        self._progress = progress
        self.versions: list[Version] = []

    @property
    def last(self) -> str:
        return self.versions[-1].snapshot_id

    def commit(
        self, branch: str, message: str, contents: Mapping[str, Any], changes: Mapping[str, Any], **options: Any
    ) -> None:
        """Write `changes` (datasets by group) to `branch`; afterwards the version must hold exactly `contents`."""
        from icechunk.xarray import to_icechunk

        with self._progress.step(message):
            session = self._repo.writable_session(branch)
            started = time.perf_counter()
            for group, data in changes.items():
                to_icechunk(data, session, group=group, **options)
            write_s = time.perf_counter() - started
            session.commit(message)
            commit_s = time.perf_counter() - started - write_s
        info = self._repo.lookup_snapshot(session.snapshot_id)
        self.versions.append(
            Version(
                snapshot_id=session.snapshot_id,
                branch=branch,
                message=info.message,
                written_at=info.written_at,
                contents=dict(contents),
                write_s=write_s,
                commit_s=commit_s,
            )
        )


def _is_refused(session: Any, data: Any) -> bool:
    """True when a session whose base is no longer the tip of its branch cannot commit."""
    from icechunk.xarray import to_icechunk

    to_icechunk(data, session, group="late")
    try:
        session.commit("too late")
    except icechunk.ConflictError:
        return True
    return False


def _check_refs(repo: Any, versions: list[Version]) -> list[str]:
    """Differences between the history that the repository shows and the one that was written."""
    problems = []
    written = [version.snapshot_id for version in reversed(versions)]
    found = [info.id for info in repo.ancestry(branch="main")]
    # the oldest snapshot is the empty one that every repository begins with
    if found[:-1] != written:
        problems.append(f"main's history is {found}, not {written}")
    for name, expected in {"v1": written[1], "v2": written[0]}.items():
        if repo.lookup_tag(name) != expected:
            problems.append(f"tag {name} points to {repo.lookup_tag(name)}, not {expected}")
    return problems
