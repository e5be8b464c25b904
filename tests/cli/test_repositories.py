"""The subcommands that the official command has, run on real repositories."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.cli import main
from tests.conftest import BUCKET
from tools import oracle
from tools.services import S3Service

Run = Callable[..., tuple[int, str, str]]
ROOT = "1CECHNKREP0F1RSTCMT0"


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that has the aliases of this test."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "icechunk" / "cli-config.yaml"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: str, answers: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(answers))
        try:
            code = main(arguments)
        except SystemExit as done:
            code = int(done.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    """The folder that the alias ``loc`` names; there is no repository yet."""
    assert run("config", "add", "loc", answers=f"1\n{tmp_path / 'repo'}\n")[0] == 0
    return tmp_path / "repo"


@pytest.fixture
def repo(run: Run, folder: Path) -> icechunk.Repository:
    assert run("repo", "create", "loc") == (0, '✅ Created repository RepositoryAlias("loc")\n', "")
    return icechunk.Repository.open(icechunk.local_filesystem_storage(str(folder)))


def commit(repo: icechunk.Repository, message: str) -> str:
    session = repo.writable_session("main")
    zarr.create_group(session.store, overwrite=True)
    return session.commit(message, allow_empty=True)


def test_branches_tags_and_history_work_on_the_command_line(run: Run, repo: icechunk.Repository) -> None:
    tip = commit(repo, "one\ntwo")
    assert run("branch", "list", "loc") == (0, f"{tip}  main\n", "")
    code, out, _ = run("branch", "create", "loc", "dev", "main")
    assert (code, out) == (0, '✅ Created branch "dev" from "main" in repository RepositoryAlias("loc")\n')
    code, out, _ = run("branch", "create", "loc", "old", ROOT)
    assert code == 0
    assert run("branch", "list", "loc")[1] == f"{tip}  dev\n{tip}  main\n{ROOT}  old\n"
    code, out, _ = run("tag", "create", "loc", "v1", "dev")
    assert (code, out) == (0, f'✅ Created tag "v1" for {tip} in repository RepositoryAlias("loc")\n')
    assert run("tag", "list", "loc")[1] == f"{tip}  v1\n"
    assert run("branch", "delete", "loc", "dev")[1] == (
        '✅ Deleted branch "dev" in repository RepositoryAlias("loc")\n'
    )
    assert run("tag", "delete", "loc", "v1")[1] == '✅ Deleted tag "v1" in repository RepositoryAlias("loc")\n'
    assert repo.list_branches() == {"main", "old"}


def test_ancestry_shows_each_snapshot_with_its_time_and_message(
    run: Run, repo: icechunk.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    tip = commit(repo, "one\n\ntwo\x1b[2J")
    when = next(iter(repo.ancestry(branch="main"))).written_at.astimezone()
    code, out, _ = run("ancestry", "loc", "-n", "1")
    assert code == 0
    assert out == (f"Snapshot: {tip}\nDate: {when:%B} {when.day} {when:%Y  %H:%M:%S}\n\n  one\n  \n  two\ufffd[2J\n\n")
    for reference in (["main"], [tip], []):
        assert run("ancestry", "loc", *reference)[1].count("Snapshot: ") == 2
    assert run("ancestry", "loc", "main", "-n", "0") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["branch", "list", "nope"], 'Repository RepositoryAlias("nope") not found in config'),
        (["repo", "create", "loc"], 'Failed to create repository RepositoryAlias("loc"): '),
        (["branch", "create", "loc", "main", "main"], 'Failed to create branch "main" from "main": '),
        (["branch", "create", "loc", "new", "nope"], "`nope` is not a valid snapshot id, branch, or tag"),
        (["tag", "create", "loc", "a/../b", "0" * 20], f"`{'0' * 20}` is not a valid snapshot id, branch, or tag"),
        (["branch", "delete", "loc", "main"], 'Failed to delete branch "main": '),
        (["branch", "delete", "loc", "nope"], 'Failed to delete branch "nope": '),
        (["tag", "delete", "loc", "nope"], 'Failed to delete tag "nope": '),
        (["ancestry", "loc", "nope"], "`nope` is not a valid snapshot id, branch, or tag"),
        (["config", "add", "loc"], 'Repository RepositoryAlias("loc") already exists'),
        (["config", "init"], "Use --force to overwrite"),
    ],
)
def test_a_failing_command_ends_in_one_line_and_code_1(
    run: Run, repo: icechunk.Repository, arguments: list[str], words: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_url_with_a_version_shows_its_history(run: Run, repo: icechunk.Repository, folder: Path) -> None:
    repo.create_tag("v1", ROOT)
    with repo.transaction("main", message="more") as store:
        zarr.create_group(store, path="g")
    for version, count in (("@tag.v1", 1), ("@branch.main", 2), (f"@{ROOT}", 1)):
        code, out, err = run("ancestry", f"{folder}|icechunk:{version}")
        assert (code, out.count("Snapshot: "), err) == (0, count, "")
    assert run("ancestry", f"{folder}|icechunk:@tag.v1", "main")[:2] == (1, "")
    code, out, _ = run("watch", f"{folder}|icechunk:@branch.main", "--since", "", "--stop-at-end")
    assert (code, "more" in out) == (0, True)
    for arguments in (
        ("watch", f"{folder}|icechunk:@tag.v1"),
        ("watch", f"{folder}|icechunk:@branch.main", "--branch", "dev"),
        ("branch", "list", f"{folder}|icechunk:@branch.main"),
        ("ancestry", f"{folder}|icechunk:@tag.v1/g"),
    ):
        code, out, err = run(*arguments)
        assert (code, out, len(err.splitlines())) == (1, "", 1)


def test_a_path_is_not_called_an_alias_and_an_unknown_alias_has_its_remedies(run: Run, tmp_path: Path) -> None:
    _, _, err = run("branch", "list", str(tmp_path / "none"))
    assert "RepositoryAlias" not in err
    _, _, err = run("branch", "list", "none")
    assert "icechunk config add none" in err
    assert "./none" in err


def test_a_place_without_a_repository_is_reported(run: Run, folder: Path) -> None:
    code, _, err = run("branch", "list", "loc")
    assert code == 1
    assert 'Failed to open repository RepositoryAlias("loc"): ' in err
    assert not folder.exists() or not any(folder.rglob("*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["branch"],
        ["branch", "list"],
        ["nope"],
        ["ancestry", "loc", "-n", "x"],
        ["ancestry", "loc", "-n", "-1"],
        ["help", "no"],
    ],
)
def test_bad_usage_ends_in_code_2(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "usage: icechunk" in err


@pytest.mark.parametrize("arguments", [["help"], ["help", "branch"], ["help", "branch", "create"], ["tag", "--help"]])
def test_every_command_has_help(run: Run, arguments: list[str]) -> None:
    code, out, _ = run(*arguments)
    assert code == 0
    assert "usage: icechunk" in out


# --- the file of aliases --------------------------------------------------------------------------------------


def test_the_file_is_made_for_its_owner_only_and_listed(run: Run, config: Path, tmp_path: Path) -> None:
    assert run("config", "list") == (0, "repos: {}\n\n", "")
    assert run("config", "init", answers=f"loc\nlocal\n{tmp_path}/x\n")[0] == 0
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert run("config", "list")[1] == config.read_text() + "\n"
    assert run("config", "init", "--force", answers="s3\n2\nbucket\n\nus-east-1\n")[0] == 0
    text = config.read_text()
    assert "!S3" in text
    assert "loc:" not in text
    assert [file.name for file in config.parent.iterdir()] == [config.name]


@pytest.mark.parametrize("answers", ["", "1\n", "1\n\n\n\n", "9\n", "2\nb\np\n"])
def test_answers_that_are_missing_or_wrong_leave_the_file_as_it_was(
    run: Run, folder: Path, config: Path, answers: str
) -> None:
    before = config.read_bytes()
    code, _, err = run("config", "add", "new", answers=answers)
    assert code == 1
    assert "icechunk: " in err
    assert config.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    ["repos: [1", "repos: 3", "- a", "repos:\n  a: &x {b: 1}\n  c: *x\n", "\x00", "repos: !!python/name:os.system {}"],
)
def test_a_foreign_file_is_reported_and_kept(run: Run, config: Path, text: str) -> None:
    config.parent.mkdir(parents=True)
    config.write_text(text)
    for arguments in (["config", "list"], ["branch", "list", "a"], ["config", "add", "a"]):
        code, _, err = run(*arguments)
        assert code == 1
        assert len(err.splitlines()) == 1
    assert config.read_text() == text


@pytest.mark.parametrize(
    "entry",
    [
        "3",
        "!Nowhere {}",
        "!LocalFileSystem {}",
        "!LocalFileSystem {path: 3}",
        "!S3 {location: {bucket: b}, credentials: {s3_credential_type: guessed}}",
        "!LocalFileSystem {path: /x, config: {caching: 3}}",
    ],
)
def test_an_unreadable_entry_is_reported(run: Run, config: Path, entry: str) -> None:
    config.parent.mkdir(parents=True)
    config.write_text(f"repos:\n  a: {entry}\n")
    code, _, err = run("branch", "list", "a")
    assert code == 1
    assert 'Repository RepositoryAlias("a") cannot be used' in err


def test_secrets_in_the_file_are_not_listed(run: Run, config: Path) -> None:
    config.parent.mkdir(parents=True)
    config.write_text(
        "repos:\n  a: !S3\n    location: {bucket: b}\n    credentials:\n      s3_credential_type: static\n"
        "      access_key_id: AKIA\n      secret_access_key: hush\n"
    )
    code, out, _ = run("config", "list")
    assert code == 0
    assert "hush" not in out
    assert "static" in out
    # … and adding another alias does not lose them.
    assert run("config", "add", "b", answers="1\n/x\n")[0] == 0
    assert "hush" in config.read_text()


def test_repositories_on_s3_are_reached_with_credentials_from_the_environment(
    run: Run, config: Path, moto_service: S3Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", moto_service.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", moto_service.secret_key)
    prefix = uuid.uuid4().hex
    assert run("config", "add", "s3", answers=f"2\n{BUCKET}\n{prefix}\n{moto_service.region}\n")[0] == 0
    text = config.read_text().replace("endpoint_url: null", f'endpoint_url: "{moto_service.endpoint}"')
    config.write_text(
        text.replace("allow_http: false", "allow_http: true").replace("path_style: false", "path_style: true")
    )
    assert run("repo", "create", "s3")[0] == 0
    assert run("branch", "list", "s3") == (0, f"{ROOT}  main\n", "")


# --- beside the official command ------------------------------------------------------------------------------


@pytest.mark.oracle
def test_both_commands_share_one_file_and_print_the_same(
    run: Run, repo: icechunk.Repository, config: Path, tmp_path: Path
) -> None:
    python = oracle.find(oracle.OFFICIAL_CURRENT)
    if python is None:
        pytest.skip("no environment with the official library: python tools/oracle.py 2.3.0 makes one")

    def official(*arguments: str) -> tuple[int, str]:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"ICECHUNK_LOG": "error"}
        command = [str(python.parent / "icechunk"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout

    tip = commit(repo, "one")
    repo.create_tag("v1", tip)
    repo.create_branch("dev", tip)
    repo.checkpoint()
    for arguments in (
        ["branch", "list", "loc"],
        ["tag", "list", "loc"],
        ["ancestry", "loc"],
        ["ancestry", "loc", "v1", "-n", "1"],
        ["ancestry", "loc", "nope"],
        ["branch", "list", "nope"],
    ):
        assert run(*arguments)[:2] == official(*arguments), arguments
    # As made by the official library: format 2, which both may write.
    shared = config.read_text()
    config.write_text(shared + shared.removeprefix("repos:\n").replace("loc:", "both:").replace("/repo", "/shared"))
    assert official("repo", "create", "both")[0] == 0
    for arguments in (
        ["branch", "create", "both", "dev", "main"],
        ["tag", "create", "both", "v1", "dev"],
        ["branch", "delete", "both", "dev"],
        ["branch", "delete", "both", "dev"],
    ):
        code, out, _ = run(*arguments)
        other = [argument.replace("dev", "dev2").replace("v1", "v2") for argument in arguments]
        assert official(*other) == (code, out.replace("dev", "dev2").replace("v1", "v2"))
    assert run("config", "list")[1].splitlines()[0] == official("config", "list")[1].splitlines()[0] == "repos:"


def persisted(repo: icechunk.Repository, name: str) -> str:
    """The id of a session that has created an array."""
    session = repo.writable_session("main")
    zarr.create_array(session.store, name=name, shape=(2,), chunks=(1,), dtype="i4")[:] = 7
    return session.checkpoint()


def test_persisted_sessions_are_listed_and_committed(run: Run, repo: icechunk.Repository) -> None:
    id = persisted(repo, "a")
    code, out, _ = run("session", "list", "loc")
    assert (code, out.split()[:4]) == (0, [id, "main", "on", ROOT])
    code, out, err = run("session", "commit", "loc", id, "-m", "from the shell")
    tip = repo.lookup_branch("main")
    assert (code, err) == (0, "")
    assert out == f'✅ Committed session {id} to branch "main" as {tip} in repository RepositoryAlias("loc")\n'
    assert next(repo.ancestry(branch="main")).message == "from the shell"
    array = zarr.open_array(repo.readonly_session("main").store, path="a", mode="r")
    assert np.asarray(array[:]).tolist() == [7, 7]
    assert run("session", "list", "loc") == (0, "", "")
    code, out, err = run("session", "commit", "loc", id, "-m", "again")
    assert (code, out) == (1, "")
    assert err.startswith(f"icechunk: Failed to commit session {id}: ")
    assert repo.lookup_branch("main") == tip


def test_a_session_on_a_branch_that_moved_is_committed_with_a_rebase(run: Run, repo: icechunk.Repository) -> None:
    with repo.transaction("main", message="root") as store:
        zarr.create_group(store)
    id = persisted(repo, "a")
    with repo.transaction("main", message="between") as store:
        zarr.create_group(store, path="g")
    assert run("session", "commit", "loc", id, "-m", "m")[0] == 1
    assert run("session", "commit", "loc", id, "-m", "m", "--rebase")[0] == 0
    assert [info.message for info in repo.ancestry(branch="main")][:2] == ["m", "between"]


def test_a_persisted_session_is_abandoned(run: Run, repo: icechunk.Repository) -> None:
    id = persisted(repo, "a")
    code, out, err = run("session", "abandon", "loc", id)
    assert (code, out, err) == (0, f'✅ Abandoned session {id} in repository RepositoryAlias("loc")\n', "")
    assert repo.sessions() == []
    code, _, err = run("session", "abandon", "loc", id)
    assert code == 1
    assert err.startswith(f"icechunk: Failed to abandon session {id}: ")
    assert repo.lookup_branch("main") == ROOT
