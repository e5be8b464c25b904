"""The `icechunk` command: it does what it says, and bad input ends in one line and exit code 2."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import icechunk
from icechunk.cli import main
from icechunk.cli.terminal import Progress
from icechunk.runtime.about import VERSION


@pytest.fixture
def _demo_extra() -> None:
    pytest.importorskip("iris_sample_data", reason="the data of the demo extra")
    pytest.importorskip("netCDF4", reason="reads the data of the demo extra")


def test_version_names_the_distribution_and_the_api_that_it_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"aioicechunk {VERSION} (icechunk API {icechunk.__version__})\n"


def test_no_command_prints_the_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


@pytest.mark.usefixtures("_demo_extra")
def test_demo_reads_every_version_back_as_it_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--path", str(tmp_path / "repo"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["problems"] == []
    assert [version["branch"] for version in report["versions"]] == ["main"] * 4 + ["correction"]
    ids = [version["snapshot_id"] for version in report["versions"]]
    assert report["tags"] == {"v1": ids[3], "v2": ids[4]}
    assert report["branches"] == {"correction": ids[4], "main": ids[4]}
    assert report["stored_bytes"] > 1_000_000


@pytest.mark.thorough
@pytest.mark.usefixtures("_demo_extra")
def test_demo_runs_against_the_embedded_s3_server(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("moto", reason="the embedded S3 of the demo extra")
    assert main(["demo", "--s3"]) == 0
    out, err = capsys.readouterr()
    assert "bit for bit" in out
    assert "[11/11]" in err


def test_demo_into_a_folder_that_holds_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    assert main(["demo", "--path", str(tmp_path)]) == 2
    assert "is not empty" in _one_line(capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--storage", "bucket/prefix"], "s3://bucket/prefix"),
        (["--storage", "s3://bucket"], "add a prefix"),
        (["--storage", "s3://bucket/prefix", "--endpoint-url", "127.0.0.1:9000"], "http://"),
        (["--endpoint-url", "http://127.0.0.1:9000"], "--storage"),
        (["--path", __file__], "is a file"),
    ],
)
def test_bad_input_ends_in_one_line_that_names_the_remedy(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == 2
    assert words in _one_line(capsys)


def test_two_locations_at_once_are_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--s3", "--path", "x"])
    assert caught.value.code == 2


def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "iris_sample_data", None)
    assert main(["demo", "--path", str(tmp_path / "repo")]) == 2
    assert "pip install 'aioicechunk[demo]'" in _one_line(capsys)


@pytest.mark.usefixtures("_demo_extra")
def test_an_endpoint_without_a_server_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    # port 9 (discard) is not served on any machine we know; a refused connection answers at once
    environment = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert main(["demo", "--storage", "s3://bucket/demo", "--endpoint-url", "http://127.0.0.1:9"]) == 2
    _one_line(capsys)


def test_the_command_imports_only_the_modules_that_it_needs() -> None:
    code = "import sys, icechunk.cli; icechunk.cli.main(['--version']); print('xarray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"


def test_progress_writes_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    progress = Progress(2, stream)
    for label in ("one", "two"):
        with progress.step(label):
            pass
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(" (")[0] for line in lines] == ["[1/2] one", "[2/2] two"]
    assert "\x1b" not in stream.getvalue()


def test_progress_redraws_one_line_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(4, stream)
    with progress.step("loading"):
        pass
    progress.close()
    assert "\n" not in stream.getvalue()
    assert "1/4 loading" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error that the command printed; it must be its only line except for progress."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1
    assert lines[0].startswith("icechunk: ")
    return lines[0]
