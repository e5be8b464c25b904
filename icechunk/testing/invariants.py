"""Invariants of a repository; each check raises `AssertionError` with the violated one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from icechunk.snapshots import SnapshotInfo
from icechunk.store import IcechunkStore
from icechunk.testing.models import ModelStore

__all__ = [
    "assert_ancestry_invariants",
    "assert_list_dir_equal",
    "assert_moves_sorted_by_final_path",
    "compare_list_dir",
]


def assert_ancestry_invariants(
    ancestry: list[SnapshotInfo], known_commits: set[str] | None = None, *, must_contain_initial: bool = True
) -> None:
    """A history is one chain, newest first, that contains no snapshot twice.

    Parameters
    ----------
    ancestry
        The result of `Repository.ancestry`.
    known_commits
        Ids of the snapshots that may be in it.
    must_contain_initial
        Whether it must end with the first snapshot; a history with expired snapshots ends earlier.
    """
    assert ancestry, "the history is empty"
    ids = [snapshot.id for snapshot in ancestry]
    assert len(set(ids)) == len(ids), f"a snapshot is in the history twice: {ids}"
    for newer, older in pairwise(ancestry):
        assert newer.parent_id == older.id, f"{newer.id} follows {older.id}, but its parent is {newer.parent_id}"
        assert newer.written_at > older.written_at, (
            f"{newer.id} was written at {newer.written_at}, not after its parent {older.id} at {older.written_at}"
        )
    assert ancestry[-1].parent_id is None, f"the history ends at {ids[-1]}, which has a parent"
    if must_contain_initial:
        # The first snapshot of every repository of the format has this id.
        assert ids[-1] == "1CECHNKREP0F1RSTCMT0", f"the history ends at {ids[-1]}, not at the first snapshot"
    if known_commits is not None:
        assert set(ids) <= known_commits, f"no client made {set(ids) - known_commits}"


def assert_moves_sorted_by_final_path(moved_nodes: list[tuple[str, str]]) -> None:
    """Moves are sorted by their target path, compared name by name: ``/a`` before ``/a/b`` before ``/a-b``."""
    targets = [target.split("/") for _, target in moved_nodes]
    assert targets == sorted(targets), f"moves are not sorted by their target: {moved_nodes}"


def assert_list_dir_equal(path: str, expected: list[str], actual: list[str]) -> None:
    """Two stores list the same names at a path, except for ``c``, whose listing without chunks differs among stores."""
    wanted, found = ({name for name in names if name != "c"} for names in (expected, actual))
    assert found == wanted, f"at {path!r} the model lists {sorted(wanted)}, the store {sorted(found)}"


async def compare_list_dir(model: ModelStore, store: IcechunkStore, paths: Iterable[str]) -> None:
    """`assert_list_dir_equal` at each of the paths."""
    for path in paths:
        assert_list_dir_equal(
            path, [name async for name in model.list_dir(path)], [name async for name in store.list_dir(path)]
        )
