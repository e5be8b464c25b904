"""Four workers amend one tip, in turn and at once: every change is in it, as with the official library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

import icechunk
from icechunk.errors import ErrorKind
from icechunk.storage.port import Storage
from tests.conftest import BUCKET
from tests.official import need_official
from tools import oracle, services
from tools.interop.amends import WORKERS, begin, of_tasks, outcome, write
from tools.interop.race import storage_on

layouts = pytest.mark.parametrize("version", [None, 2], ids=["log", "repo"])
turns = pytest.mark.parametrize("at_once", [False, True], ids=["in turn", "at once"])

EXPECTED = {
    "values": list(range(WORKERS)),
    "history": ["amended", "Repository initialized"],
    "diff": [["/a"], {"/a": [[i] for i in range(WORKERS)]}],
    "amendments": WORKERS,
    "chained": [True] * (WORKERS - 1),
    "tip": True,
}


@layouts
@turns
def test_tasks_that_amend_one_tip_lose_no_change(storage: Storage, version: int | None, at_once: bool) -> None:
    # In turn only the first finds the tip that it began on.
    lost = None if at_once else [0] + [1] * (WORKERS - 1)
    assert of_tasks(begin(storage, version), at_once=at_once) == {**EXPECTED, "lost": lost}


@pytest.mark.parametrize("storage", ["memory", "local"], indirect=True)
def test_format_1_refuses_amendments_also_after_the_tip_moved_and_its_history_expired(storage: Storage) -> None:
    repo = begin(storage, 1)
    sessions = [repo.writable_session("main") for _ in range(2)]
    for number, session in enumerate(sessions):
        write(session, number)

    def refuse(session: icechunk.Session) -> None:
        with pytest.raises(icechunk.FormatError) as refused:
            session.amend("refused")
        assert refused.value.kind == ErrorKind.UNSUPPORTED_SPEC_VERSION

    def expire() -> None:
        repo.expire_snapshots(next(iter(repo.ancestry(branch="main"))).written_at)

    refuse(sessions[0])
    expire()
    refuse(sessions[0])
    sessions[1].commit("moved")
    refuse(sessions[0])
    expire()
    refuse(sessions[0])
    # The changes are kept.
    assert sessions[0].has_uncommitted_changes


def run_workers(commands: Sequence[Sequence[str]], *, at_once: bool, folder: Path, env: dict[str, str]) -> list[int]:
    """Processes that begin on one tip; the conflicts that each met."""
    workers = [
        subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        lost: list[str] = []
        for one in workers:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        for one in workers:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
            if not at_once:
                lost.append(one.communicate(timeout=60)[0])
        if at_once:
            lost = [one.communicate(timeout=60)[0] for one in workers]
        assert [one.returncode for one in workers] == [0] * len(workers)
        return [json.loads(text) for text in lost]
    finally:
        for one in workers:
            one.kill()
            one.wait()


# To the official library a log is read-only.
@pytest.mark.parametrize(
    ("library", "version"),
    [
        pytest.param("ours", None, marks=pytest.mark.thorough),
        pytest.param("ours", 2, marks=pytest.mark.thorough),
        pytest.param("official", 2, marks=pytest.mark.oracle),
    ],
    ids=["log", "repo", "official"],
)
@turns
def test_processes_that_amend_one_tip_lose_no_change(
    moto_service: services.S3Service, version: int | None, at_once: bool, library: str
) -> None:
    python, env = Path(sys.executable), dict(os.environ)
    if library == "official":
        need_official()
        python, env = oracle.ensure(oracle.OFFICIAL_CURRENT), oracle.environment()
    place = (moto_service.endpoint, moto_service.access_key, moto_service.secret_key, BUCKET, uuid.uuid4().hex)
    begin(storage_on(*place), version)
    commands = [[str(python), "-m", "tools.interop.amends", *place, str(number)] for number in range(WORKERS)]
    with tempfile.TemporaryDirectory() as name:
        folder = oracle.PROJECT
        if library == "official":
            # A folder with nothing of ours but `tools`.
            folder = Path(name)
            (folder / "tools").symlink_to(oracle.PROJECT / "tools")
        lost = run_workers(commands, at_once=at_once, folder=folder, env=env)
    if not at_once:
        assert lost == [0] + [1] * (WORKERS - 1)
    assert outcome(icechunk.Repository.open(storage_on(*place))) == EXPECTED


@pytest.mark.oracle
def test_the_official_library_has_the_same_outcomes() -> None:
    need_official()
    theirs = oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.amends", "tasks")
    lost = [[0] + [1] * (WORKERS - 1), None]
    assert theirs == [{**EXPECTED, "lost": one} for one in lost]
