"""``icechunk watch``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import zarr

from icechunk import Repository, local_filesystem_storage
from icechunk.cli import main


@pytest.fixture
def place(tmp_path: Path) -> str:
    repo = Repository.create(local_filesystem_storage(str(tmp_path / "repo")))
    for name in ("one", "two"):
        with repo.transaction("main", message=name, metadata={"n": name}) as store:
            zarr.create_group(store, path=name)
    return str(tmp_path / "repo")


def test_events_are_printed_as_json_lines_and_go_on_behind_a_token(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", place, "--json", "--since", "", "--branch", "main", "--stop-at-end"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    commits = [event for event in events if event["kind"] == "commit"]
    assert [event["message"] for event in commits] == ["one", "two"]
    assert commits[0]["metadata"] == {"n": "one"}
    assert "changes" not in commits[0]
    assert main(["watch", place, "--since", commits[0]["token"], "--branch", "main", "--stop-at-end"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "two" in line


def test_the_boxes_that_a_commit_changed_are_printed_where_that_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = Repository.create(local_filesystem_storage(str(tmp_path / "repo")))
    with repo.transaction("main", message="array") as store:
        zarr.create_array(store, name="a", shape=(6, 4), chunks=(2, 2), dtype="i4")[2:6, :2] = 1
    place = str(tmp_path / "repo")
    assert main(["watch", place, "--json", "--changes", "--since", "", "--branch", "main", "--stop-at-end"]) == 0
    (found,) = [
        event for line in capsys.readouterr().out.splitlines() if (event := json.loads(line))["kind"] == "commit"
    ]
    array = {"is_new": True, "metadata_changed": False, "boxes": [[[1, 3], [0, 1]]]}
    assert found["changes"] == {"arrays": {"/a": array}, "deleted": [], "moved": []}


def test_a_command_gets_each_event_and_a_failing_one_ends_the_watch(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    script = f"{sys.executable} -c \"import sys; open({str(log)!r}, 'a').write(sys.stdin.read())\""
    assert main(["watch", place, "--since", "", "--branch", "main", "--stop-at-end", "--exec", script]) == 0
    kinds = [json.loads(line)["kind"] for line in log.read_text().splitlines()]
    assert kinds.count("commit") == 2
    capsys.readouterr()
    assert main(["watch", place, "--since", "", "--stop-at-end", "--exec", "exit 3"]) == 1
    assert capsys.readouterr().out == ""
    # Without --json no token is printed: the error has the last one that was handled.
    until = f"grep -vq {json.loads(log.read_text().splitlines()[-1])['token']}"
    assert main(["watch", place, "--since", "", "--stop-at-end", "--branch", "main", "--exec", until]) == 1
    assert json.loads(log.read_text().splitlines()[-2])["token"] in capsys.readouterr().err


def test_a_branch_that_does_not_exist_is_noted_beside_the_output(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for branch, lines in (("typo", 1), ("main", 0)):
        assert main(["watch", place, "--branch", branch, "--stop-at-end"]) == 0
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", lines)
