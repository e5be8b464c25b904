"""Diffs are net over several commits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.format.by_node import Coords, coords_by_node, coords_part
from icechunk.format.ids import NodeId
from icechunk.format.values import Snapshot, TransactionLog
from icechunk.log.session.log import SessionLog
from icechunk.log.session.merge import diff as diff_module
from icechunk.log.session.merge.diff import Changes, diff, united
from tests.log.session.builders import GROUP, Repo, array_json, group_json


class History:
    """Commits of one repository, and the diff between any two of them."""

    def __init__(self) -> None:
        self.repo = Repo()
        self.snapshots: list[Snapshot] = [self.repo.snapshot]
        self.logs: list[TransactionLog] = []

    def commit(self, change: Callable[[SessionLog], None]) -> None:
        log = self.repo.log()
        change(log)
        self.logs.append(self.repo.commit(log).transaction)
        self.snapshots.append(self.repo.snapshot)

    def diff(self, a: int, b: int) -> Changes:
        return diff(self.logs[a:b], self.snapshots[a], self.snapshots[b])


def put(log: SessionLog, path: str, *coords: int) -> None:
    node = log.node(path)
    assert node is not None
    for c in coords:
        log.set_inline(node, (c,), b"12345678")


def history() -> History:
    past = History()

    def first(log: SessionLog) -> None:
        for path in ("/", "/g"):
            log.set_metadata(path, GROUP)
        log.set_metadata("/g/a", array_json((10,)))
        put(log, "/g/a", 0, 1, 2)

    def second(log: SessionLog) -> None:
        put(log, "/g/a", 1, 5)
        log.set_metadata("/z", array_json((10,)))
        put(log, "/z", 1)

    def third(log: SessionLog) -> None:
        put(log, "/g/a", 1, 0)
        log.set_metadata("/z", array_json((10,), a=3))
        log.set_metadata("/", group_json(a=3))
        put(log, "/z", 2)

    past.commit(first)
    past.commit(second)
    past.commit(third)
    past.commit(lambda log: log.move_node("/g", "/h"))
    past.commit(lambda log: log.move_node("/h", "/k"))
    past.commit(lambda log: log.delete_node("/z"))
    past.commit(lambda log: log.delete_node("/k"))
    return past


def test_created_then_changed_is_only_new_and_chunks_are_united() -> None:
    found = history().diff(1, 3)
    assert (found.new_arrays, found.updated_arrays, found.updated_groups) == (
        frozenset({"/z"}),
        frozenset(),
        frozenset({"/"}),
    )
    assert {p: c.tolist() for p, c in found.updated_chunks.items()} == {"/g/a": [[0], [1], [5]], "/z": [[1], [2]]}


def test_moves_are_net_and_chunks_are_listed_at_their_current_path() -> None:
    found = history().diff(2, 5)
    assert found.moved_nodes == (("/g", "/k"), ("/g/a", "/k/a"))
    assert list(found.updated_chunks) == ["/k/a", "/z"]


def test_created_and_deleted_in_between_leaves_no_trace() -> None:
    found = history().diff(1, 6)
    assert "/z" not in found.new_arrays | found.deleted_arrays
    assert list(found.updated_chunks) == ["/k/a"]


def test_a_node_that_was_moved_and_deleted_is_listed_at_its_original_path() -> None:
    found = history().diff(2, 7)
    assert (found.deleted_groups, found.deleted_arrays, found.moved_nodes) == (
        frozenset({"/g"}),
        frozenset({"/g/a", "/z"}),
        (),
    )
    assert found.updated_chunks == {}


def test_nothing_in_between_is_no_change() -> None:
    assert history().diff(3, 3).is_empty


def test_nodes_whose_creation_is_in_no_log_any_more_are_not_new() -> None:
    past = history()
    # As after an expiration that kept no logs: that of the first commit is gone.
    found = diff(past.logs[2:3], past.snapshots[0], past.snapshots[3])
    assert (found.new_groups, found.new_arrays) == (frozenset(), frozenset())
    assert (found.updated_groups, found.updated_arrays) == (frozenset({"/"}), frozenset({"/z"}))
    assert {path: coords.tolist() for path, coords in found.updated_chunks.items()} == {"/g/a": [[0], [1]], "/z": [[2]]}
    moved = diff(past.logs[3:5], past.snapshots[0], past.snapshots[5])
    assert moved.moved_nodes == (("/g", "/k"), ("/g/a", "/k/a"))
    assert (moved.new_groups, moved.new_arrays) == (frozenset(), frozenset())


LOGS = st.lists(
    st.dictionaries(
        st.integers(0, 5),
        st.tuples(st.integers(0, 3), st.lists(st.lists(st.sampled_from((0, 1, 2, 2**32 - 1)), min_size=3, max_size=3))),
    ),
    max_size=6,
)


@given(LOGS, st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_coordinates_of_many_logs_are_united_by_array(
    logs: list[dict[int, tuple[int, list[list[int]]]]], number: int
) -> None:
    """Arrays of any rank, also of a changing one; those without coordinates are left out."""
    expected: dict[NodeId, set[tuple[int, ...]]] = {}
    ranks: dict[NodeId, int] = {}
    changes: list[dict[NodeId, Coords]] = []
    for log in logs:
        changes.append({})
        for key, (rank, rows) in log.items():
            node = NodeId((key * 977 + number).to_bytes(8))
            unique = sorted({tuple(row[:rank]) for row in rows})
            changes[-1][node] = np.array(unique, np.uint32).reshape(len(unique), rank)
            if unique:
                ranks[node] = rank
                expected.setdefault(node, set()).update(unique)
    together = united(changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diff_module, "_TOGETHER", -1)
        apart = united(changes)
    for found in (together, apart):
        assert {node: (coords.shape[1], [*map(tuple, coords.tolist())]) for node, coords in found.items()} == {
            node: (rank, sorted(row for row in expected[node] if len(row) == rank)) for node, rank in ranks.items()
        }


def test_of_an_array_with_coordinates_of_two_ranks_in_one_log_those_of_one_rank_count() -> None:
    node = NodeId(bytes(8))
    one, two = np.array([[1]], np.uint32), np.array([[2, 3], [4, 5]], np.uint32)
    both = coords_by_node([coords_part([node], [one]), coords_part([node], [two])])
    plain = {node: np.array([[0, 0]], np.uint32)}
    assert {key: coords.tolist() for key, coords in united([plain, both]).items()} == {node: [[0, 0], [2, 3], [4, 5]]}
