"""Misuses raise the same here and in the official library: the class and kind that handlers catch, and their words."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from tools import oracle
from tools.interop.misuse import MISUSES, outcomes

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(300)]

VERSION = oracle.OFFICIAL_CURRENT

DIFFERENT = {
    "delete in a read-only store": "the session refuses there; here the store does, as it refuses every other write",
    "clear a read-only store": "as for delete",
    "flush a read-only session": "nothing happens there; here it is told, as by a commit",
    "merge something else": "an attribute that is missing there; a TypeError here",
    "commit to a deleted branch": "a missing branch there; here a conflict like any other, whose actual_parent is None",
    "shift by too many dimensions": "the excess is ignored there",
    "reindex to too many dimensions": "writes chunks there that no array has",
    "inspect an unknown snapshot": "a missing object there; here the snapshot, as everywhere else",
}
"""Cases in which class or kind differ, and why."""

WORDS = {
    "open a missing one": "repository doesn't exist",
    "create a branch again": "branch already exists",
    "create a branch on an unknown snapshot": "snapshot id not found.*G{20}",
    "create a tag again": "tag already exists.*v1",
    "create a deleted tag": "tag.*deleted|deleted.*tag",
    "look up an unknown branch": "ref not found.*none",
    "look up an unknown tag": "ref not found.*none",
    "delete main": "main.*cannot be deleted",
    "reset from elsewhere": "branch update conflict",
    "read a time before the first": "main.* (have|has) .*snapshot",
    "read an unknown snapshot": "snapshot id not found",
    "commit nothing": "cannot commit.*no changes made to the session.*allow_empty",
    "commit and rebase a real conflict": "(?i)rebase failed on snapshot .* 1 conflicts found",
    "fork a read-only session": "cannot fork a read-only session",
    "commit a fork": "commits are not allowed.*fork",
    "write in a read only repository": "repository status is read-only",
    "move a group into itself": "cannot move.*/g.* into itself or its own descendant",
    "move an unknown node": "node not found",
    "move onto another node": "overwrite existing node.*/g",
    "move below a missing group": "destination's parent group.*/none.* does not exist",
    "move below an array": "is an array, not a group",
    "move in a writable session": "rearrange.session",
    "write in a rearranging session": "rearrange the hierarchy",
    "shift an unknown array": "node not found at .*/none",
    "put a chunk of an unknown array": "node not found at .*/none",
    "put a key that is none of zarr's": "invalid zarr key.*a/notes.txt",
    "put metadata of format 2": "Zarr",
    "a virtual chunk of no container": "virtual chunk container.*s3://bucket/key",
    "read a virtual chunk unauthorised": "authorize",
    "set an unknown feature": "feature flag.*none",
    "create a tag in a read only repository": "repository status is read-only",
    "s3 with half of a key": "(?i)conflicting arguments to s3_credentials",
}
"""Words of both messages; handlers match such words."""


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    if os.environ.get("ICECHUNK_REQUIRE_ORACLE") == "1":
        oracle.ensure(VERSION)
    elif oracle.find(VERSION) is None:
        pytest.skip(f"the official library has no environment here; `python tools/oracle.py {VERSION}` makes one")
    found: dict[str, Any] = oracle.run(VERSION, "tools.interop.misuse")
    return found


def alike(mine: list[Any] | None, theirs: list[Any] | None) -> bool:
    """Whether a handler for their error catches ours: by its class, and by its kind if it has one."""
    if mine is None or theirs is None:
        return mine is theirs
    return theirs[0][0] in mine[0] and theirs[1] in (None, mine[1])


@pytest.mark.parametrize("spec_version", [None, 2])
def test_misuses_raise_errors_that_handlers_for_the_official_library_catch(
    official: dict[str, Any], spec_version: int | None
) -> None:
    mine = outcomes(spec_version)
    assert set(mine) == set(official) == set(MISUSES)
    differences = {name for name in mine if not alike(mine[name], official[name])}
    assert {name: (mine[name], official[name]) for name in differences - set(DIFFERENT)} == {}
    assert set(DIFFERENT) - differences == set(), "explained, but no difference any more"
    silent = {
        (name, who): found[name]
        for name, words in WORDS.items()
        for who, found in (("ours", mine), ("theirs", official))
        if (raised := found[name]) is None or not re.search(words, raised[2], re.DOTALL)
    }
    assert silent == {}
