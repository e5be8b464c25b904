"""The command: small runs from end to end, exit codes, and one line for bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import icechunk
import icechunk_loadtest
from icechunk_loadtest.cli import main
from icechunk_loadtest.results import Results
from tools.loadtest.tests.builders import measurement, results

PROGRAM = [sys.executable, "-m", "icechunk_loadtest", "--on", "memory", "--systems", "ours"]
# a fresh interpreter finds both packages where this one found them
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(Path(package.__path__[0]).parent) for package in (icechunk_loadtest, icechunk)),
}
SMALL = [
    "--quick",
    "--chunks",
    "6",
    "--chunk-size",
    "1KiB",
    "--ops",
    "3",
    "--concurrency",
    "2",
    "--soak",
    "0.2",
    "--quiet",
]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--workloads", "juggle"], "no workload is called 'juggle'"),
        (["--systems", "hdf5"], "no system is called 'hdf5'"),
        (["--sweep", "colour"], "unknown parameter"),
        (["--chunk-size", "big"], "is no size"),
        (["--chunk-size", "3"], "not between 64 bytes"),
        (["--chunks", "0"], "--chunks 0 is not between"),
        (["--soak", "nan"], "--soak nan is not between"),
        (["--repeat", "0"], "--repeat 0 is not between"),
        (["--time-limit", "0"], "--time-limit 0"),
        (["--on", "memory", "--latency-ms", "5"], "latency can be added to S3 only"),
        (["--require", "everything"], "is no threshold"),
        (["--check", "/nowhere/thresholds.yaml"], "cannot read"),
        (["--load", "/nowhere/results.json"], "cannot read"),
        (["--html", "/nowhere/report.html"], "there is no folder /nowhere"),
        (["--endpoint", "minio"], "is no URL"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments]) == 2
    said = capsys.readouterr()
    assert why in said.err
    assert said.err.startswith("icechunk-loadtest: ")
    assert said.err.count("\n") == 1
    assert not said.out


def test_catalogue_and_plan_are_printed_without_running_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert "cold_open" in capsys.readouterr().out
    assert main(["--dry-run", "--workloads", "commit", "--systems", "ours", "--repeat", "2"]) == 0
    assert capsys.readouterr().out.count("commit ours") == 2


def test_results_of_a_file_are_judged_and_rendered_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = tmp_path / "r.json", tmp_path / "r.html"
    results(measurement(), measurement(system="official", seconds=3.0)).save(path)
    assert main(["--load", str(path), "--require", "read_random>=2x", "--html", str(page)]) == 0
    assert "all 1 thresholds hold" in page.read_text()
    assert main(["--load", str(path), "--require", "read_random>=4x"]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_wrong_bytes_end_in_failure(tmp_path: Path) -> None:
    results(measurement(problems=("chunk 3 has the header of chunk 4",))).save(tmp_path / "r.json")
    assert main(["--load", str(tmp_path / "r.json")]) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["memory", "local"])
def test_every_workload_runs_from_end_to_end_without_a_server(kind: str, tmp_path: Path) -> None:
    path, page = tmp_path / "r.json", tmp_path / "r.html"
    arguments = ["--on", kind, "--systems", "ours", *SMALL, "--json", str(path), "--html", str(page)]
    assert main([*arguments, "--require", "soak.errors<=0"]) == 0
    found = Results.load(path)
    assert len(found.measurements) == (13 if kind == "memory" else 14)
    for each in found.measurements:
        assert each.ok, each
        assert each.throughput > 0
        assert each.latency.n
        if "commit" not in each.point.workload and each.point.workload != "idle":
            assert each.bytes_verified >= max(each.bytes_read, 1), each.point
    assert found.versions["ours"]["zarr"]
    assert "<svg" in page.read_text()


def test_on_something_that_is_no_terminal_progress_is_plain_lines(tmp_path: Path) -> None:
    command = [*PROGRAM, "--workloads", "append"]
    done = subprocess.run(
        [*command, *SMALL[:-1], "--json", str(tmp_path / "r.json")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    assert re.search(r"^Appends \(6 × 1 KiB", done.stderr, re.MULTILINE)
    assert json.loads((tmp_path / "r.json").read_text())["version"] == 1


@pytest.mark.minio
def test_minio_is_started_counts_requests_and_adds_latency(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    arguments = ["--systems", "ours", "--workloads", "cold_open,commit_processes", "--sweep", "latency=0,30", *SMALL]
    assert main([*arguments, "--json", str(path)]) == 0
    found = Results.load(path)
    by_latency = {
        each.point.size.latency_ms: each
        for each in found.measurements
        if each.point.swept and each.point.workload == "cold_open"
    }
    assert all(sum((each.requests or {}).values()) for each in found.measurements)
    if any(each.point.size.latency_ms for each in found.measurements):
        assert by_latency[30].latency.min_s > 0.03


@pytest.mark.thorough
@pytest.mark.parametrize("background", [False, True], ids=["in front", "as a background command"])
def test_sigterm_ends_the_workers_and_reports_the_measurements_so_far(tmp_path: Path, background: bool) -> None:
    path = tmp_path / "r.json"
    # A shell starts background commands with SIGINT ignored.
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"] if background else []
    with subprocess.Popen(
        [*command, *PROGRAM, "--workloads", "append,soak", *SMALL[:-3], "--soak", "100", "--json", str(path)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("  ours"):  # appends are done, the soak is under way
                process.terminate()
                break
        rest = process.stderr.read()
        assert process.wait(60) == 130
    assert "interrupted" in rest
    (only,) = Results.load(path).measurements
    assert only.point.workload == "append"
