"""Configurations in both libraries: how they merge, what is persisted, and that each reads what the other persisted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tools import oracle
from tools.interop import configurations

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(300)]

TOOL = "tools.interop.configurations"


def official(*arguments: str) -> Any:
    version = oracle.OFFICIAL_CURRENT
    if os.environ.get("ICECHUNK_REQUIRE_ORACLE") == "1":
        oracle.ensure(version)
    elif oracle.find(version) is None:
        pytest.skip(f"the official library has no environment here; `python tools/oracle.py {version}` makes one")
    return oracle.run(version, TOOL, *arguments)


def plain(found: Any) -> Any:
    return json.loads(json.dumps(found))


def with_defaults(look: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """As the official library shows it: what the storage uses by itself is in the configuration too, and persisted.

    Ours leaves it out, so that a repository that is copied to another kind of storage gets the settings of that one.
    """
    under = {f"storage.{name}": value for name, value in defaults.items()}
    return {
        name: {**under, **found} if name in ("effective", "persisted") and found is not None else found
        for name, found in look.items()
    }


@pytest.mark.parametrize("version", ["2", "1"])
def test_configurations_merge_and_persist_as_in_the_official_library(version: str) -> None:
    theirs = official("scenarios", version)
    ours = plain(configurations.scenarios(version))
    defaults = plain(configurations.defaults())["memory"]
    assert ours.keys() == theirs.keys()
    for name, steps in theirs.items():
        assert [with_defaults(step, defaults) for step in ours[name]] == steps, name


def test_the_log_layout_merges_and_persists_as_the_repo_object_does() -> None:
    assert configurations.scenarios("log") == configurations.scenarios("2")


def test_default_settings_of_storages_equal_the_official_ones() -> None:
    assert plain(configurations.defaults()) == official("defaults")


@pytest.mark.parametrize("version", ["2", "1"])
def test_official_persists_every_setting_and_we_change_some(version: str, tmp_path: Path) -> None:
    theirs = official("write", str(tmp_path), version)
    assert plain(configurations.read(tmp_path)) == theirs
    ours = plain(configurations.save(tmp_path))
    assert ours == official("read", str(tmp_path))
    assert ours["snapshots"] == 9


@pytest.mark.parametrize("version", ["2", "1"])
def test_we_persist_every_setting_and_the_official_library_changes_some(version: str, tmp_path: Path) -> None:
    ours = plain(configurations.write(tmp_path, version))
    assert official("read", str(tmp_path)) == ours
    theirs = official("save", str(tmp_path))
    assert plain(configurations.read(tmp_path)) == theirs
    assert theirs["snapshots"] == 9


def test_the_official_library_reads_the_configuration_of_a_log(tmp_path: Path) -> None:
    ours = plain(configurations.write(tmp_path, "log"))
    assert official("read", str(tmp_path)) == ours
