"""Manifest settings in both libraries: the same manifests, compressed locations, and one configuration for both."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tools import oracle
from tools.interop import manifests

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(300)]

TOOL = "tools.interop.manifests"
CASES = [
    pytest.param((oracle.OFFICIAL_CURRENT, "2"), id="format 2, 2.3.0"),
    pytest.param((oracle.OFFICIAL_CURRENT, "1"), id="format 1, 2.3.0"),
    pytest.param((oracle.OFFICIAL_FORMAT_1, "1"), id="format 1, 1.1.21"),
]
UNKNOWN_TO_1 = {"preload", "virtual_chunk_location_compression"}
"""Settings of which 1.1.21 does not know all, or anything."""


def official(version: str, *arguments: str) -> Any:
    if os.environ.get("ICECHUNK_REQUIRE_ORACLE") == "1":
        oracle.ensure(version)
    elif oracle.find(version) is None:
        pytest.skip(f"the official library has no environment here; `python tools/oracle.py {version}` makes one")
    return oracle.run(version, TOOL, *arguments)


def check(one: dict[str, Any], other: dict[str, Any], *, written_by: str = oracle.OFFICIAL_CURRENT) -> None:
    for name in ("values", "locations", "outline"):
        assert one[name] == other[name], name
    for found in (one, other):
        if written_by == oracle.OFFICIAL_FORMAT_1:
            assert set(found["config"]) <= UNKNOWN_TO_1
        else:
            assert found["config"] == {}


@pytest.mark.parametrize("version", ["2", "1"])
def test_a_splitting_configuration_leaves_the_manifests_that_the_official_library_leaves(version: str) -> None:
    theirs = official(oracle.OFFICIAL_CURRENT, "scenarios", version)
    ours = manifests.scenarios(version)
    assert ours.keys() == theirs.keys()
    for name, steps in theirs.items():
        assert ours[name] == steps, name


@pytest.mark.parametrize("case", CASES)
def test_official_writes_with_every_setting_and_both_continue(case: tuple[str, str], tmp_path: Path) -> None:
    version, format = case
    folder = str(tmp_path)
    check(official(version, "write", folder, format), manifests.read(tmp_path), written_by=version)
    check(manifests.append(tmp_path, 1), official(version, "read", folder), written_by=version)
    check(official(version, "append", folder, "2"), manifests.read(tmp_path), written_by=version)


@pytest.mark.parametrize("case", CASES)
def test_we_write_with_every_setting_and_both_continue(case: tuple[str, str], tmp_path: Path) -> None:
    version, format = case
    folder = str(tmp_path)
    ours = manifests.write(tmp_path, format)
    theirs = official(version, "read", folder)
    check(ours, theirs)
    if format == "2":
        assert theirs["compressed"] == [[True, 30], [True, 10]]
    check(official(version, "append", folder, "1"), manifests.read(tmp_path))
    theirs = (manifests.append(tmp_path, 2), official(version, "read", folder))[1]
    check(manifests.read(tmp_path), theirs)
    if format == "2":
        assert theirs["compressed"] == [[True, 30], [True, 30]]


def test_the_official_library_reads_a_log_layout_repository_of_every_setting(tmp_path: Path) -> None:
    ours = manifests.write(tmp_path, "log")
    theirs = official(oracle.OFFICIAL_CURRENT, "read", str(tmp_path))
    check(ours, theirs)
    assert theirs["compressed"] == [[True, 30], [True, 10]]
    assert theirs["outline"] == [
        ["/split", 5, [[0, 3], [0, 2]]],
        ["/split", 6, [[3, 6], [0, 2]]],
        ["/split", 4, [[6, 8], [0, 2]]],
        ["/virtual", 30, [[0, 30]]],
        ["/virtual", 10, [[30, 40]]],
    ]
