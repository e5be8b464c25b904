"""What commits in a row changed after one of them, against the transaction logs themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.values import Move, NodeKind, TransactionLog
from icechunk.log.session.merge import landed as rows
from icechunk.log.session.merge.landed import Landed

NODES = [NodeId(bytes([i]) * 8) for i in range(3)]
Commit = Sequence[TransactionLog]


def coords(chunks: Sequence[int], rank: int = 1) -> np.ndarray[tuple[int, int], np.dtype[np.uint32]]:
    return np.array(sorted(set(chunks)), np.uint32).reshape(-1, 1).repeat(rank, axis=1)


@st.composite
def logs(draw: st.DrawFn) -> TransactionLog:
    nodes = st.frozensets(st.sampled_from(NODES), max_size=2)
    chunks = draw(st.dictionaries(st.sampled_from(NODES), st.lists(st.integers(0, 9), max_size=6), max_size=2))
    moved = draw(st.lists(st.sampled_from(["/a", "/b"]), max_size=1))
    return TransactionLog(
        id=ObjectId(bytes(12)),
        updated_arrays=draw(nodes),
        updated_groups=draw(nodes),
        updated_chunks={node: coords(found, draw(st.integers(1, 2))) for node, found in chunks.items()},
        moved_nodes=tuple(Move(source=path, target="/c", node_id=NODES[0], kind=NodeKind.ARRAY) for path in moved),
    )


def commits() -> st.SearchStrategy[list[list[TransactionLog]]]:
    return st.lists(st.lists(logs(), max_size=2), max_size=5)


def require_equal(landed: Landed, done: Sequence[Commit]) -> None:
    """The answers since each commit are those of the transaction logs of the later ones."""
    for after in range(len(done) + 1):
        since, later = landed.since(after), [log for commit in done[after:] for log in commit]
        assert sorted(since.moved) == sorted({move.source for log in later for move in log.moved_nodes})
        for node in NODES:
            assert since.has_updated(node) == any(node in log.updated_arrays | log.updated_groups for log in later)
            changed = [log.updated_chunks[node] for log in later if node in log.updated_chunks]
            assert since.has_touched(node) == any(len(found) for found in changed)
            for rank in (1, 2):
                asked = coords(range(10), rank)
                known = {tuple(row) for found in changed if found.shape[1] == rank for row in found.tolist()}
                assert since.written(node, asked).tolist() == [row for row in asked.tolist() if tuple(row) in known]


@pytest.mark.parametrize("few", [0, 3, 1024], ids=["columns", "both", "keys"])
@given(first=commits(), gone=commits(), then=commits())
def test_each_base_gets_the_changes_after_it_also_when_commits_are_taken_back(
    few: int, first: list[list[TransactionLog]], gone: list[list[TransactionLog]], then: list[list[TransactionLog]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_FEW_ROWS", few)
        landed = Landed()
        for commit in (*first, *gone):
            landed.add(commit)
        require_equal(landed, [*first, *gone])
        for _ in gone:
            assert landed.take_back()
        require_equal(landed, first)
        for commit in then:
            landed.add(commit)
        require_equal(landed, [*first, *then])
        assert landed.count == len(first) + len(then)


def test_only_the_last_commits_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    landed = Landed()
    for _ in range(rows._UNDONE + 3):
        landed.add(())
    for _ in range(rows._UNDONE):
        assert landed.take_back()
    assert not landed.take_back()
    assert landed.count == 3
