"""Snapshots of many nodes, most of which each library takes over from what the other one wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools import oracle
from tools.interop import wide

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(300)]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("creator", ["official", "ours"])
def test_both_libraries_change_a_wide_hierarchy_in_turn_and_read_the_same(
    creator: str, version: int, tmp_path: Path
) -> None:
    if os.environ.get("CI"):
        oracle.ensure(oracle.OFFICIAL_CURRENT)
    elif oracle.find(oracle.OFFICIAL_CURRENT) is None:
        pytest.skip("the official library has no environment here; `python tools/oracle.py 2.3.0` makes one")

    def official(*args: str) -> object:
        return oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.wide", *args)

    place = str(tmp_path / "repo")
    if creator == "official":
        official("create", place, str(version))
    else:
        wide.run("create", place, version)
        assert official("read", place) == wide.run("read", place)
    for number in (1, 2):
        wide.run("change", place, 2 * number)
        assert official("read", place) == wide.run("read", place)
        official("change", place, str(2 * number + 1))
        assert official("read", place) == wide.run("read", place)
    found = wide.run("read", place)
    assert {f"new{n}/zarr.json" for n in (2, 3, 4, 5)} <= found.keys()
    assert not any(key.startswith(("g05/a102/", "g05/a103/", "g05/a104/")) for key in found)
    assert bytes.fromhex(found["g01/a22/zarr.json"]) == wide.document(5)
