"""Log filters, what the engine logs, and that importing the package configures nothing."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zarr

import icechunk
from icechunk.runtime import logging as logs
from icechunk.runtime.logging import parse_filter

TRACE, OFF = 5, 60


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """Filters belong to the process: reset them, so that other tests do not see them."""
    yield
    root = logging.getLogger("icechunk")
    if logs._governed.handler is not None:
        root.removeHandler(logs._governed.handler)
    for name in {"icechunk", *logs._governed.loggers}:
        logging.getLogger(name).setLevel(logging.NOTSET)
    logs._governed = logs._Governed()


@pytest.mark.parametrize(
    ("directives", "expected"),
    [
        ("", {"icechunk": logging.ERROR}),
        ("debug", {"icechunk": logging.DEBUG}),
        ("WARN", {"icechunk": logging.WARNING}),
        ("off", {"icechunk": OFF}),
        ("5", {"icechunk": TRACE}),
        ("icechunk=debug,warn", {"icechunk": logging.DEBUG}),
        ("warn, icechunk::log=debug ", {"icechunk": logging.WARNING, "icechunk.log": logging.DEBUG}),
        ("info,icechunk.storage=off", {"icechunk": logging.INFO, "icechunk.storage": OFF}),
        ("icechunk", {"icechunk": TRACE}),
        ("info,botocore=debug,aws_smithy=trace", {"icechunk": logging.INFO}),
    ],
)
def test_directives_become_levels_of_the_loggers_of_this_package_only(
    directives: str, expected: dict[str, int]
) -> None:
    assert parse_filter(directives) == (expected, [])


@pytest.mark.parametrize("bad", ["bad==x", "icechunk=loud", "icechunk=", "=debug", "icechunk[span]=debug", "a b"])
def test_a_bad_directive_is_reported_and_the_others_hold(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    icechunk.set_logs_filter(f"{bad},info")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"icechunk: log directive {bad!r} is ignored: ")
    assert logging.getLogger("icechunk").level == logging.INFO


@pytest.mark.parametrize("directive", ["icechnk=debug", "icechunkk", "warn, icechunks::store=debug", "icehunk:trace"])
def test_a_misspelt_target_is_reported(directive: str, capsys: pytest.CaptureFixture[str]) -> None:
    icechunk.set_logs_filter(directive)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: Did you mean 'icechunk'")


def test_targets_of_other_packages_are_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    icechunk.set_logs_filter("info,botocore=debug,icechunk::store=debug,zarr=warn,tokio::io:warn")
    assert capsys.readouterr().err == ""


def test_creating_a_repository_and_caches_of_no_size_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "icechunk.repository"):
        config = icechunk.RepositoryConfig(caching=icechunk.CachingConfig(num_chunk_refs=0))
        icechunk.Repository.create(icechunk.in_memory_storage(), config)
    levels = {record.levelname for record in caplog.records if record.name == "icechunk.repository.repository"}
    assert levels == {"DEBUG", "WARNING"}


def test_filters_that_are_no_text_are_refused() -> None:
    with pytest.raises(TypeError, match=re.escape("log_filter_directive")):
        icechunk.set_logs_filter(3)  # type: ignore[arg-type]


def test_a_filter_takes_the_place_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICECHUNK_LOG", "info")
    icechunk.set_logs_filter("icechunk.log=debug")
    assert logging.getLogger("icechunk.log").level == logging.DEBUG
    icechunk.set_logs_filter(None)
    assert logging.getLogger("icechunk.log").level == logging.NOTSET
    assert logging.getLogger("icechunk").level == logging.INFO
    icechunk.initialize_logs()
    icechunk.initialize_logs()
    assert len([h for h in logging.getLogger("icechunk").handlers if isinstance(h, logs._LastResort)]) == 1
    icechunk.shutdown_telemetry()


def run(code: str, **environment: str) -> tuple[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ICECHUNK_")}
    kept["PYTHONPATH"] = str(Path(icechunk.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout, done.stderr


COMMIT = """
import icechunk, logging
assert not logging.getLogger().handlers
repo = icechunk.Repository.create(icechunk.in_memory_storage())
repo.writable_session("main").commit("x", allow_empty=True)
logging.getLogger("icechunk.anything").warning("a warning")
"""


def test_importing_configures_nothing_and_warnings_are_seen_nevertheless() -> None:
    code = COMMIT + "\nprint(logging.getLogger('icechunk').handlers, logging.getLogger('icechunk').level)"
    assert run(code) == ("[] 0\n", "a warning\n")


@pytest.mark.thorough
def test_the_environment_turns_records_on() -> None:
    out, err = run(COMMIT, ICECHUNK_LOG="info")
    assert "INFO    icechunk.session.commit: memory: commit of snapshot " in err
    assert out == ""
    out, err = run(COMMIT, ICECHUNK_LOG="info", ICECHUNK_LOG_TO_STDOUT="1")
    assert "INFO    icechunk.session.commit: " in out
    assert err == ""
    assert run(COMMIT, ICECHUNK_LOG="info", ICECHUNK_NO_LOGS="1") == ("", "a warning\n")


def test_an_application_that_configures_logging_gets_each_record_once() -> None:
    out, err = run(
        "import logging\nimport icechunk\nlogging.basicConfig(format='app: %(message)s')\n"
        + COMMIT.replace("assert not logging.getLogger().handlers", ""),
        ICECHUNK_LOG="info",
    )
    assert out == ""
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["app"] * len(lines)
    assert sum("commit of snapshot" in line for line in lines) == 1


def test_commits_and_rebases_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "icechunk")
    repo = icechunk.Repository.create(icechunk.in_memory_storage())
    with repo.transaction("main", message="root") as store:
        zarr.create_group(store)
    late = repo.writable_session("main")
    zarr.create_group(late.store, path="b")
    with repo.transaction("main", message="a") as store:
        zarr.create_group(store, path="a")
    late.commit("b", rebase_with=icechunk.ConflictDetector())
    messages = [record.getMessage() for record in caplog.records]
    assert sum(": commit of snapshot" in line for line in messages) == 3
    assert sum(line.startswith("rebased from ") for line in messages) == 1
