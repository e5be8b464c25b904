"""The names and versions of the package; its version is written once."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import icechunk
from icechunk.format.envelope import FileType, read_header, seal
from icechunk.runtime import about

ROOT = Path(__file__).parents[2]


def test_the_package_has_the_version_of_the_official_api_under_both_names() -> None:
    assert icechunk.__version__ == icechunk.__api_version__ == about.API_VERSION == "2.3.0"


def test_the_user_agent_and_the_files_name_the_distribution_and_its_version() -> None:
    assert icechunk.user_agent() == f"{about.DISTRIBUTION}-{about.VERSION}"
    assert read_header(seal(FileType.SNAPSHOT, 2, b""), FileType.SNAPSHOT).written_by == icechunk.user_agent()


def test_the_client_name_fits_the_field_of_the_envelope() -> None:
    assert len(about.CLIENT_NAME.encode()) <= 24


def test_the_build_reads_the_version_from_the_line_that_the_program_uses() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["name"] == about.DISTRIBUTION
    assert project["project"]["dynamic"] == ["version"]
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text()
    assert re.findall(r'^VERSION = "([^"]+)"', source, re.MULTILINE) == [about.VERSION]


def test_the_version_is_written_once() -> None:
    files = [ROOT / "pyproject.toml", *(ROOT / "icechunk").rglob("*.py")]
    found = [str(path.relative_to(ROOT)) for path in files if f'"{about.VERSION}"' in path.read_text()]
    assert found == ["icechunk/runtime/about.py"]


def test_debug_info_has_all_facts_that_a_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    icechunk.print_debug_info()
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert {"platform", "python", "aioicechunk", "icechunk", "zarr", "numcodecs", "numpy"} <= set(lines)
    assert lines["aioicechunk"].strip() == about.VERSION
    assert lines["icechunk"].split()[0] == about.API_VERSION
