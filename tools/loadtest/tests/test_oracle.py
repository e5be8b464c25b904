"""An environment with the official library is found, or the message says what is missing; locks are optional."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from icechunk_loadtest import oracle
from tools.loadtest.tests.raising import raises


def test_an_override_without_the_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICECHUNK_ORACLE_23", "/nowhere/bin/python")
    assert oracle.find("2.3.0") is None
    with raises(oracle.OracleUnavailable, "ICECHUNK_ORACLE_23=/nowhere/bin/python", "2.3.0"):
        oracle.ensure("2.3.0")


def test_the_error_on_a_machine_without_a_fitting_python_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ICECHUNK_ORACLE_23", raising=False)
    monkeypatch.setenv("ICECHUNK_ORACLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(oracle, "_candidates", lambda version: iter([Path("/nowhere/python")]))
    with raises(oracle.OracleUnavailable, "3.12", "3.13", "ICECHUNK_ORACLE_23"):
        oracle.ensure("2.3.0")
    assert not (tmp_path / "cache" / "icechunk-2.3.0").exists()


def test_an_environment_that_was_made_before_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ICECHUNK_ORACLE_23", raising=False)
    monkeypatch.setenv("ICECHUNK_ORACLE_CACHE", str(tmp_path))
    home = tmp_path / "icechunk-2.3.0"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").symlink_to(sys.executable)
    assert oracle.find("2.3.0") is None, "an environment that was left half made does not count"
    (home / "ready").write_text(" ".join(oracle._RECIPES[oracle.OFFICIAL_CURRENT].packages))
    assert oracle.find("2.3.0") == oracle.ensure("2.3.0") == home / "bin" / "python"


def test_nothing_of_ours_reaches_the_official_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/work/main")
    monkeypatch.setenv("VIRTUAL_ENV", "/work/main/.venv")
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & set(oracle.environment())
    assert oracle.environment()["ICECHUNK_LOG"] == "error"


def test_a_system_without_file_locks_has_environments_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows: importing it fails
    spec = importlib.util.spec_from_file_location("oracle_without_locks", oracle.__file__)
    assert spec is not None
    assert spec.loader is not None
    without = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, without)
    spec.loader.exec_module(without)
    assert without.fcntl is None
    monkeypatch.delenv("ICECHUNK_ORACLE_23", raising=False)
    monkeypatch.setenv("ICECHUNK_ORACLE_CACHE", str(tmp_path))
    monkeypatch.setattr(without, "_candidates", lambda version: iter(()))
    with raises(without.OracleUnavailable, "3.12", "ICECHUNK_ORACLE_23"):
        without.ensure("2.3.0")
