"""Conflicts as a matrix: what they did, what I did, and what comes of it under every solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk.conflicts import (
    BasicConflictSolver,
    ConflictDetector,
    ConflictSolver,
    RebaseFailedError,
    VersionSelection,
)
from icechunk.format.ids import encode_id
from icechunk.log.session.log import SessionLog
from icechunk.log.session.merge.conflict_rules import Winner, find_conflicts, rebase
from icechunk.log.session.wire import encode_log
from tests.log.session.builders import Repo, array_json, check_snapshot, group_json, native

Change = Callable[[SessionLog], None]

DETECT = ConflictDetector()
OURS = BasicConflictSolver()
THEIRS = BasicConflictSolver(on_chunk_conflict=VersionSelection.UseTheirs)
FAIL = BasicConflictSolver(on_chunk_conflict=VersionSelection.Fail)
KEEP = BasicConflictSolver(fail_on_delete_of_updated_array=True, fail_on_delete_of_updated_group=True)


def nothing(log: SessionLog) -> None:
    pass


def write(path: str, *chunks: int, first: int = 1) -> Change:
    def change(log: SessionLog) -> None:
        node = log.node(path)
        assert node is not None
        log.set_refs(node, native(np.array([[c] for c in chunks]), first))

    return change


def drop(path: str, *chunks: int) -> Change:
    def change(log: SessionLog) -> None:
        node = log.node(path)
        assert node is not None
        for chunk in chunks:
            log.delete_chunk(node, (chunk,))

    return change


def array(path: str, length: int = 10, **attributes: Any) -> Change:
    return lambda log: log.set_metadata(path, array_json([length], **attributes))


def group(path: str, **attributes: object) -> Change:
    return lambda log: log.set_metadata(path, group_json(**attributes))


def delete(path: str) -> Change:
    return lambda log: log.delete_node(path)


def move(source: str, target: str) -> Change:
    return lambda log: log.move_node(source, target)


def clear(log: SessionLog) -> None:
    log.clear()


def both(*changes: Change) -> Change:
    def change(log: SessionLog) -> None:
        for one in changes:
            one(log)

    return change


def base() -> Repo:
    """/ (group), /a, /b, /g (group), /g/sub (group), /g/x, /h (empty group); arrays of ten chunks, five written."""
    repo = Repo()
    log = repo.log()
    for path in ("/", "/g", "/g/sub", "/h"):
        group(path)(log)
    for path in ("/a", "/b", "/g/x"):
        both(array(path), write(path, 0, 1, 2, 3, 4, first=500))(log)
    repo.commit(log)
    return repo


@dataclass(frozen=True)
class Case:
    name: str
    theirs: Change
    ours: Change
    found: tuple[tuple[str, str, list[list[int]] | None], ...] = ()
    solved: str = ""
    """Solvers that get past it: o(urs), t(heirs), f(ail on chunks), k(eep what is updated). Empty where nothing is
    found: all do."""


NEW, GROUP, DOUBLE = "NewNodeConflictsWithExistingNode", "NewNodeInInvalidGroup", "ZarrMetadataDoubleUpdate"
NO_ARRAY, NO_GROUP = "ZarrMetadataUpdateOfDeletedArray", "ZarrMetadataUpdateOfDeletedGroup"
CHUNK, NO_CHUNK, UPDATED = "ChunkDoubleUpdate", "ChunksUpdatedInDeletedArray", "ChunksUpdatedInUpdatedArray"
ARRAY_GONE, GROUP_GONE, MOVED = "DeleteOfUpdatedArray", "DeleteOfUpdatedGroup", "MoveOperationCannotBeRebased"

again = both(delete("/a"), array("/a", 4))

CASES = [
    Case("new group, new group", group("/n"), group("/n"), ((NEW, "/n", None),)),
    Case("new array, new array", array("/n"), array("/n"), ((NEW, "/n", None),)),
    Case("new group, new array", group("/n"), array("/n"), ((NEW, "/n", None),)),
    Case("new array, new group", array("/n"), group("/n"), ((NEW, "/n", None),)),
    Case("new nodes at different paths", group("/n"), array("/m")),
    Case("new node below their new group", both(group("/n"), array("/n/y")), array("/n/z")),
    Case("new node below their new array", both(delete("/h"), array("/h")), array("/h/y"), ((GROUP, "/h", None),)),
    Case(
        "new group with a node, new array",
        array("/n"),
        both(group("/n"), array("/n/y")),
        ((NEW, "/n", None), (GROUP, "/n", None)),
    ),
    Case(
        "new node far below their new array", both(delete("/h"), array("/h")), array("/h/i/y"), ((GROUP, "/h", None),)
    ),
    Case("new array above their new node", array("/n/y"), array("/n"), ((GROUP, "/n", None),)),
    Case("new node in a group that they deleted", delete("/h"), array("/h/y"), ((GROUP, "/h", None),)),
    Case(
        "new node in a group below one that they deleted", delete("/g"), array("/g/sub/y"), ((GROUP, "/g/sub", None),)
    ),
    Case("new node in a group that they made anew", both(delete("/h"), group("/h")), array("/h/y")),
    Case("created and deleted again, new node", group("/n"), both(group("/n"), delete("/n"))),
    Case("metadata, metadata of an array", array("/a", x=1), array("/a", x=2), ((DOUBLE, "/a", None),)),
    Case("equal metadata of an array", array("/a", x=1), array("/a", x=1), ((DOUBLE, "/a", None),)),
    Case("metadata, metadata of a group", group("/g", x=1), group("/g", x=2), ((DOUBLE, "/g", None),)),
    Case("metadata of different nodes", array("/a", x=1), array("/b", x=1)),
    Case("metadata of a group, of an array in it", group("/g", x=1), array("/g/x", x=1)),
    Case("metadata of an array that they deleted", delete("/a"), array("/a", x=1), ((NO_ARRAY, "/a", None),)),
    Case("metadata of a group that they deleted", delete("/h"), group("/h", x=1), ((NO_GROUP, "/h", None),)),
    Case("metadata of an array that they made anew", again, array("/a", x=1), ((NO_ARRAY, "/a", None),)),
    Case("chunk, same chunk", write("/a", 0), write("/a", 0, first=9), ((CHUNK, "/a", [[0]]),), "otk"),
    Case("chunks, some the same", write("/a", 0, 1, 7), write("/a", 1, 2, 7), ((CHUNK, "/a", [[1], [7]]),), "otk"),
    Case("chunk, other chunk", write("/a", 0), write("/a", 1)),
    Case("same chunk of another array", write("/a", 0), write("/b", 0)),
    Case("deleted chunk, written chunk", drop("/a", 0), write("/a", 0), ((CHUNK, "/a", [[0]]),), "otk"),
    Case("written chunk, deleted chunk", write("/a", 0), drop("/a", 0), ((CHUNK, "/a", [[0]]),), "otk"),
    Case("deleted chunk, deleted chunk", drop("/a", 0), drop("/a", 0), ((CHUNK, "/a", [[0]]),), "otk"),
    Case("deleted chunk, other chunk deleted", drop("/a", 0), drop("/a", 1)),
    Case("metadata, chunk", array("/a", x=1), write("/a", 0), ((UPDATED, "/a", None),)),
    Case("shrunk, chunk that is outside then", array("/a", 3), write("/a", 8), ((UPDATED, "/a", None),)),
    Case(
        "shrunk and cleaned, chunk that is outside then",
        both(drop("/a", 8), array("/a", 3)),
        write("/a", 8),
        ((UPDATED, "/a", None), (CHUNK, "/a", [[8]])),
    ),
    Case("chunk, metadata", write("/a", 0), array("/a", x=1)),
    Case(
        "chunk, shrunk and cleaned", write("/a", 8), both(drop("/a", 8), array("/a", 3)), ((CHUNK, "/a", [[8]]),), "otk"
    ),
    Case("chunk of an array that they deleted", delete("/a"), write("/a", 0), ((NO_CHUNK, "/a", None),)),
    Case("chunk of an array in a group that they deleted", delete("/g"), write("/g/x", 0), ((NO_CHUNK, "/g/x", None),)),
    Case("chunk of an array that they made anew", again, write("/a", 0), ((NO_CHUNK, "/a", None),)),
    Case(
        "metadata and chunk of an array that they deleted",
        delete("/a"),
        both(write("/a", 0), array("/a", x=1)),
        ((NO_ARRAY, "/a", None), (NO_CHUNK, "/a", None)),
    ),
    Case("deleted array, with their chunk", write("/a", 0), delete("/a"), ((ARRAY_GONE, "/a", None),), "otf"),
    Case("deleted array, with their metadata", array("/a", x=1), delete("/a"), ((ARRAY_GONE, "/a", None),), "otf"),
    Case("made anew, with their chunk", write("/a", 0), again, ((ARRAY_GONE, "/a", None),), "otf"),
    Case("deleted group, with their metadata", group("/h", x=1), delete("/h"), ((GROUP_GONE, "/h", None),), "otf"),
    Case("deleted group, their chunk in it", write("/g/x", 0), delete("/g"), ((ARRAY_GONE, "/g/x", None),), "otf"),
    Case("deleted group, their metadata in it", array("/g/x", x=1), delete("/g"), ((ARRAY_GONE, "/g/x", None),), "otf"),
    Case("deleted group, their new node in it", array("/h/n"), delete("/h"), ((GROUP_GONE, "/h", None),), "otf"),
    Case("deleted group, their new node deep in it", array("/g/n/m"), delete("/g"), ((GROUP_GONE, "/g", None),), "otf"),
    Case("cleared, their new node", array("/n"), clear, ((GROUP_GONE, "/", None),), "otf"),
    Case("cleared, nothing of theirs", nothing, clear),
    Case("deleted group, their change elsewhere", write("/a", 0), delete("/g")),
    Case("deleted array, deleted array", delete("/a"), delete("/a")),
    Case("written and deleted, deleted array", delete("/a"), both(write("/a", 0), array("/a", x=1), delete("/a"))),
    Case("deleted group, deleted group", delete("/g"), delete("/g")),
    Case("deleted group, deleted array in it", delete("/g"), delete("/g/x")),
    Case("deleted array, deleted group around it", delete("/g/x"), delete("/g")),
    Case("deleted array, made anew", again, delete("/a")),
    Case("made anew, deleted array", delete("/a"), again),
    Case("made anew, made anew", again, again, ((NEW, "/a", None),)),
    Case("move, anything", move("/a", "/c"), write("/b", 0), ((MOVED, "/a", None),)),
    Case("move, nothing", move("/a", "/c"), nothing, ((MOVED, "/a", None),)),
    Case(
        "group moved, anything",
        move("/g", "/k"),
        write("/b", 0),
        ((MOVED, "/g", None),),
    ),
    Case("move, move", move("/a", "/c"), move("/b", "/d"), ((MOVED, "/a", None),)),
    Case("chunk, move", write("/a", 7), move("/a", "/c")),
    Case("metadata, move", array("/a", x=1), move("/a", "/c")),
    Case("new node in a group, group moved", array("/g/y"), move("/g", "/k")),
    Case("deleted, moved", delete("/a"), move("/a", "/c"), ((MOVED, "/a", None),)),
    Case("new node, moved to its place", group("/c"), move("/a", "/c"), ((NEW, "/c", None),)),
    Case("deleted group, moved into it", delete("/h"), move("/a", "/h/a"), ((GROUP, "/h", None),)),
    Case("new node, moved elsewhere", group("/n"), move("/a", "/c")),
    Case(
        "several at once",
        both(array("/a", x=1), write("/b", 0)),
        both(array("/a", x=2), write("/a", 0), write("/b", 0)),
        ((DOUBLE, "/a", None), (UPDATED, "/a", None), (CHUNK, "/b", [[0]])),
    ),
]


def landed(repo: Repo, *changes: Change) -> Winner:
    transactions = []
    for change in changes:
        log = repo.log()
        change(log)
        transactions.append(repo.commit(log).transaction)
    return Winner(snapshot=repo.snapshot, transactions=tuple(transactions))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_pair_conflicts_as_it_should_and_only_the_right_solvers_settle_it(case: Case) -> None:
    repo = base()
    log = repo.log()
    case.ours(log)
    before = encode_log(log.base.id, log.events)
    winner = landed(repo, case.theirs)
    found = find_conflicts(log, winner)
    assert [(c.conflict_type.name, c.path, c.conflicted_chunks) for c in found] == list(case.found)
    solvers: dict[str, ConflictSolver] = {"o": OURS, "t": THEIRS, "f": FAIL, "k": KEEP}
    for name, solver in {"d": DETECT, **solvers}.items():
        if not found or name in case.solved:
            rebased = rebase(log, winner, solver)
            assert rebased.base is winner.snapshot
            own = Repo()
            own.manifests, own.snapshot = dict(repo.manifests), repo.snapshot
            own.new_object_id = repo.new_object_id
            own.commit(rebased)
            check_snapshot(own)
        else:
            with pytest.raises(RebaseFailedError) as failed:
                rebase(log, winner, solver)
            assert failed.value.conflicts == list(found)
            assert failed.value.snapshot == encode_id(winner.snapshot.id)
    assert encode_log(log.base.id, log.events) == before


def after(theirs: Change, ours: Change, solver: ConflictSolver) -> Repo:
    repo = base()
    log = repo.log()
    ours(log)
    repo.commit(rebase(log, landed(repo, theirs), solver))
    check_snapshot(repo)
    return repo


def chunk_number(repo: Repo, path: str, chunk: int) -> int | None:
    ref = repo.committed(repo.snapshot.nodes[path], (chunk,))
    return None if ref is None or ref.chunk_id is None else int.from_bytes(ref.chunk_id)


def test_use_ours_keeps_our_chunk_and_use_theirs_keeps_theirs_and_all_others_stay() -> None:
    theirs, ours = write("/a", 0, 1, first=10), both(write("/a", 1, 2, first=20), drop("/a", 3))
    repo = after(theirs, ours, OURS)
    assert [chunk_number(repo, "/a", i) for i in range(5)] == [10, 20, 21, None, 504]
    repo = after(theirs, ours, THEIRS)
    assert [chunk_number(repo, "/a", i) for i in range(5)] == [10, 11, 21, None, 504]


def test_use_theirs_drops_our_deletion_of_a_chunk_and_use_ours_keeps_it() -> None:
    assert chunk_number(after(write("/a", 0, first=10), drop("/a", 0), THEIRS), "/a", 0) == 10
    assert chunk_number(after(write("/a", 0, first=10), drop("/a", 0), OURS), "/a", 0) is None
    assert chunk_number(after(drop("/a", 0), write("/a", 0, first=10), THEIRS), "/a", 0) is None


def test_use_theirs_of_everything_leaves_an_empty_log() -> None:
    repo = base()
    log = repo.log()
    write("/a", 0)(log)
    assert rebase(log, landed(repo, write("/a", 0)), THEIRS).is_empty


def test_our_deletion_wins_over_their_update_unless_the_solver_refuses() -> None:
    assert "/a" not in after(write("/a", 0), delete("/a"), OURS).snapshot.nodes
    assert not [p for p in after(array("/h/n"), delete("/h"), OURS).snapshot.nodes if p.startswith("/h")]


def test_a_node_that_they_created_again_is_not_deleted_by_our_deletion_of_the_old_one() -> None:
    repo = after(again, delete("/a"), DETECT)
    assert repo.snapshot.nodes["/a"].shape[0].array_length == 4


def test_their_new_node_moves_along_with_the_group_that_we_move() -> None:
    assert "/k/y" in after(array("/g/y"), move("/g", "/k"), DETECT).snapshot.nodes


def test_several_winners_count_as_one_if_nothing_conflicts() -> None:
    repo = base()
    log = repo.log()
    both(write("/a", 5, first=30), array("/n"))(log)
    winner = landed(
        repo, write("/a", 0), both(write("/b", 0), array("/m")), both(array("/n"), array("/o")), delete("/n")
    )
    assert find_conflicts(log, winner) == ()
    repo.commit(rebase(log, winner, DETECT))
    assert {"/m", "/n", "/o"} <= repo.snapshot.nodes.keys()
    assert chunk_number(repo, "/a", 5) == 30


def test_chunks_of_an_array_whose_rank_they_changed_conflict_with_the_update_only() -> None:
    repo = base()
    log = repo.log()
    write("/a", 0)(log)

    def flat_to_square(log: SessionLog) -> None:
        log.set_metadata("/a", array_json([3, 3]))
        node = log.node("/a")
        assert node is not None
        log.set_refs(node, native(np.array([[0, 0]])))

    found = find_conflicts(log, landed(repo, flat_to_square))
    assert [c.conflict_type.name for c in found] == [UPDATED]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), max_size=8), st.lists(st.integers(0, 9), max_size=8), st.booleans())
def test_chunks_of_both_sides_are_all_there_with_either_solver_choice(
    first: list[int], second: list[int], ours_win: bool
) -> None:
    theirs = {c: 100 + c for c in first}
    ours = {c: 200 + c for c in second}

    def writing(numbers: dict[int, int]) -> Change:
        return both(*(write("/a", c, first=n) for c, n in numbers.items()))

    repo = base()
    log = repo.log()
    writing(ours)(log)
    winner = landed(repo, writing(theirs))
    found = find_conflicts(log, winner)
    shared = [[c] for c in sorted(theirs.keys() & ours)]
    assert [c.conflicted_chunks for c in found] == ([shared] if shared else [])
    repo.commit(rebase(log, winner, OURS if ours_win else THEIRS))
    expected = {c: 500 + c for c in range(5)} | ({**theirs, **ours} if ours_win else {**ours, **theirs})
    assert {c: chunk_number(repo, "/a", c) for c in range(10)} == {c: expected.get(c) for c in range(10)}
