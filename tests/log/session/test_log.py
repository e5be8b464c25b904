"""Semantics of the session log; "as official" means: observed with icechunk 2.3.0."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from icechunk.errors import (
    AlreadyExistsError,
    ErrorKind,
    IcechunkError,
    InvalidInputError,
    NodeNotFoundError,
    SessionStateError,
)
from icechunk.format.values import NATIVE, ChunkRef, ChunkRefs, NodeSnapshot
from icechunk.log.session import array_fold
from icechunk.log.session.events import ChunksWritten
from icechunk.log.session.log import ABSENT, IN_BASE, SessionLog
from icechunk.log.session.wire import encode_log
from tests.log.session.builders import GROUP, Repo, array_json, check_snapshot, group_json, native, object_id
from tests.raising import raises


@pytest.fixture
def repo() -> Repo:
    """Groups / and /g, the array /g/a of five chunks, all written."""
    repo = Repo()
    log = repo.log()
    log.set_metadata("/", GROUP)
    log.set_metadata("/g", GROUP)
    log.set_metadata("/g/a", array_json((10,), (2,)))
    for i in range(5):
        log.set_inline(at(log, "/g/a"), (i,), bytes([i]) * 8)
    repo.commit(log)
    return repo


def at(log: SessionLog, path: str) -> NodeSnapshot:
    node = log.node(path)
    assert node is not None
    return node


def chunks(log: SessionLog) -> dict[str, list[list[int]]]:
    return {p: c.tolist() for p, c in log.changes().updated_chunks.items()}


def test_nodes_created_and_changed_in_one_session_are_only_new(repo: Repo) -> None:
    log = Repo().log()
    log.set_metadata("/a", array_json((10,)))
    log.set_metadata("/a", array_json((10,), x=1))
    log.set_inline(at(log, "/a"), (0,), b"1")
    status = log.changes()
    assert status.new_arrays == {"/a"}
    assert status.updated_arrays == frozenset()
    assert chunks(log) == {"/a": [[0]]}


def test_setting_equal_metadata_is_no_change(repo: Repo) -> None:
    log = repo.log()
    log.set_metadata("/g/a", at(log, "/g/a").user_data)
    assert log.is_empty
    assert log.changes().is_empty
    assert log.events == ()


def test_metadata_set_and_set_back_is_no_change_in_the_fold(repo: Repo) -> None:
    # The official library reports the array as updated here; the fold is equal to the base, so we do not.
    log = repo.log()
    before = at(log, "/g/a").user_data
    log.set_metadata("/g/a", array_json((10,), (2,), q=1))
    assert log.changes().updated_arrays == {"/g/a"}
    log.set_metadata("/g/a", before)
    assert log.is_empty


def test_a_node_created_and_deleted_in_one_session_leaves_no_trace(repo: Repo) -> None:
    log = repo.log()
    log.set_metadata("/n", GROUP)
    log.set_metadata("/n/a", array_json((3,)))
    log.set_inline(at(log, "/n/a"), (0,), b"1")
    log.delete_node("/n")
    assert log.is_empty
    assert log.changes().is_empty


def test_deleting_a_group_deletes_everything_below_and_nothing_beside_it(repo: Repo) -> None:
    log = repo.log()
    log.set_metadata("/g-1", GROUP)
    log.set_metadata("/g0", GROUP)
    log.set_metadata("/g/x/deep", GROUP)
    log.delete_node("/g")
    assert [n.path for n in log.nodes()] == ["/", "/g-1", "/g0"]
    status = log.changes()
    assert status.deleted_groups == {"/g"}
    assert status.deleted_arrays == {"/g/a"}


def test_delete_and_create_at_the_same_path_is_a_new_node_without_the_old_chunks(repo: Repo) -> None:
    log = repo.log()
    old = at(log, "/g/a")
    log.delete_node("/g/a")
    log.set_metadata("/g/a", old.user_data)
    new = at(log, "/g/a")
    assert new.id != old.id
    assert log.chunk(new, (0,)) is ABSENT
    log.set_inline(new, (1,), b"z")
    status = log.changes()
    assert (status.new_arrays, status.deleted_arrays, chunks(log)) == (
        frozenset({"/g/a"}),
        frozenset({"/g/a"}),
        {"/g/a": [[1]]},
    )
    repo.commit(log)
    assert check_snapshot(repo) == 1


def test_writes_to_a_deleted_node_are_refused(repo: Repo) -> None:
    log = repo.log()
    node = at(log, "/g/a")
    log.delete_node("/g/a")
    with pytest.raises(NodeNotFoundError):
        log.set_inline(node, (0,), b"1")
    with pytest.raises(NodeNotFoundError):
        log.set_refs(node, native(np.array([[0]])))
    assert log.changes().updated_chunks == {}


@pytest.mark.parametrize(("path", "document"), [("/g", array_json((4,))), ("/g/a", GROUP)])
def test_metadata_of_another_kind_is_refused_as_official(repo: Repo, path: str, document: bytes) -> None:
    log = repo.log()
    with pytest.raises(AlreadyExistsError) as caught:
        log.set_metadata(path, document)
    assert caught.value.kind == ErrorKind.NODE_ALREADY_EXISTS
    assert log.is_empty


def test_nodes_need_no_parents_and_may_be_below_arrays_as_in_the_official_library(repo: Repo) -> None:
    log = repo.log()
    log.set_metadata("/x/y/z", array_json((4,)))
    log.set_metadata("/g/a/b", GROUP)
    assert log.children("/") == ["g"]
    assert log.children("/x") == []
    assert log.children("/g/a") == ["b"]
    assert log.children("/nothing") == []


@pytest.mark.parametrize("coords", [(5,), (2**32,), (-1,), (0, 0), ()])
def test_chunks_outside_the_grid_are_refused_and_read_as_absent(repo: Repo, coords: tuple[int, ...]) -> None:
    log = repo.log()
    node = at(log, "/g/a")
    writes: list[Callable[[], object]] = [
        lambda: log.set_inline(node, coords, b"1"),
        lambda: log.set_native(node, coords, object_id(1), 0, 1),
    ]
    for write in writes:
        with pytest.raises(InvalidInputError) as caught:
            write()
        assert caught.value.kind == ErrorKind.INVALID_CHUNK_INDEX
    assert log.chunk(node, coords) is ABSENT
    log.delete_chunk(node, coords)
    assert log.is_empty


def test_one_bad_row_refuses_the_whole_bulk(repo: Repo) -> None:
    log = repo.log()
    with raises(InvalidInputError, "invalid-chunk-index", [5], "/g/a"):
        log.set_refs(at(log, "/g/a"), native(np.array([[1], [5]])))
    with pytest.raises(InvalidInputError):
        log.set_refs(at(log, "/g/a"), native(np.array([[1, 1]])))
    assert log.is_empty


def test_empty_chunks_and_chunks_of_groups_are_refused_as_official(repo: Repo) -> None:
    log = repo.log()
    with pytest.raises(InvalidInputError) as caught:
        log.set_inline(at(log, "/g/a"), (1,), b"")
    assert caught.value.kind == ErrorKind.ZERO_LENGTH_CHUNK
    with pytest.raises(InvalidInputError) as caught:
        log.set_inline(at(log, "/g"), (), b"1")
    assert caught.value.kind == ErrorKind.NOT_AN_ARRAY
    assert log.is_empty


def test_deleting_a_chunk_is_a_change_even_where_there_was_none_as_official() -> None:
    repo = Repo()
    log = repo.log()
    log.set_metadata("/a", array_json((10,)))
    repo.commit(log)
    log = repo.log()
    log.delete_chunk(at(log, "/a"), (3,))
    assert not log.is_empty
    assert chunks(log) == {"/a": [[3]]}
    done = repo.commit(log)
    assert done.manifests == ()
    assert done.snapshot.nodes["/a"].manifests == ()


def test_a_shrink_hides_chunks_and_growing_in_the_same_session_shows_them_as_official(repo: Repo) -> None:
    log = repo.log()
    full = at(log, "/g/a").user_data
    log.set_inline(at(log, "/g/a"), (3,), b"new")
    log.set_metadata("/g/a", array_json((4,), (2,)))
    assert log.chunk(at(log, "/g/a"), (4,)) is ABSENT
    assert log.chunk(at(log, "/g/a"), (3,)) is ABSENT
    assert len(log.overlay(at(log, "/g/a"))[0]) == 0
    log.set_metadata("/g/a", full)
    assert log.chunk(at(log, "/g/a"), (4,)) is IN_BASE
    assert log.chunk(at(log, "/g/a"), (3,)) == ChunkRef(1, data=b"new", length=3)
    repo.commit(log)
    assert check_snapshot(repo) == 5


def test_a_committed_shrink_drops_the_chunks_for_good_as_official(repo: Repo) -> None:
    log = repo.log()
    full = at(log, "/g/a").user_data
    log.set_metadata("/g/a", array_json((4,), (2,)))
    done = repo.commit(log)
    assert done.transaction.updated_chunks == {}
    assert check_snapshot(repo) == 2
    log = repo.log()
    log.set_metadata("/g/a", full)
    repo.commit(log)
    assert repo.read == ()
    assert check_snapshot(repo) == 2
    assert repo.committed(at(repo.log(), "/g/a"), (4,)) is None


def test_a_change_of_rank_drops_all_chunks(repo: Repo) -> None:
    log = repo.log()
    log.set_inline(at(log, "/g/a"), (0,), b"1")
    log.set_metadata("/g/a", array_json((4, 4), (2, 2)))
    assert log.chunk(at(log, "/g/a"), (0, 0)) is ABSENT
    log.set_inline(at(log, "/g/a"), (1, 1), b"2")
    repo.commit(log)
    assert check_snapshot(repo) == 1


def test_the_newest_of_single_and_bulk_writes_counts(repo: Repo) -> None:
    log = repo.log()
    node = at(log, "/g/a")
    log.set_inline(node, (1,), b"single")
    log.set_refs(node, native(np.array([[3], [1], [1]]), first=10))
    assert log.chunk(node, (1,)) == ChunkRef(NATIVE, chunk_id=object_id(12), length=7)
    log.set_inline(node, (1,), b"again")
    assert log.chunk(node, (1,)) == ChunkRef(1, data=b"again", length=5)
    log.delete_chunks(node, np.array([[3], [4], [4]], np.uint32))
    assert log.chunk(node, (3,)) is ABSENT
    assert log.chunk(node, (0,)) is IN_BASE
    written, deleted = log.overlay(node)
    assert written.coords.tolist() == [[1]]
    assert deleted.tolist() == [[3], [4]]


def test_many_single_writes_become_columns(monkeypatch: pytest.MonkeyPatch, repo: Repo) -> None:
    monkeypatch.setattr("icechunk.log.session.log.OPEN_ROWS", 64)
    log = repo.log()
    log.set_metadata("/big", array_json((1000,)))
    node = at(log, "/big")
    for i in range(1000):
        log.set_native(node, (i * 7 % 1000,), object_id(i), 0, 1)
    fold = log._arrays[node.id]
    assert isinstance(fold, array_fold.ArrayFold)
    assert len(fold.rows) < 64
    assert len(fold.layers) <= 5
    for i in range(1000):
        found = log.chunk(node, (i * 7 % 1000,))
        assert isinstance(found, ChunkRef)
        assert found.chunk_id == object_id(i)


def test_large_layers_share_their_columns_with_the_events_until_there_are_many(
    monkeypatch: pytest.MonkeyPatch, repo: Repo
) -> None:
    monkeypatch.setattr(array_fold, "LARGE_LAYER", 100)
    monkeypatch.setattr(array_fold, "MANY_LAYERS", 4)
    log = repo.log()
    log.set_metadata("/big", array_json((1000,)))
    node = at(log, "/big")
    for k in range(4):
        log.set_refs(node, native(np.arange(50 * k, 50 * k + 80)[:, None], first=1000 * k + 1))
    fold = log._arrays[node.id]
    assert [len(layer) for layer in fold.layers] == [80] * 4
    written = [event.refs for event in log.events if isinstance(event, ChunksWritten)]
    assert all(layer.refs is refs for layer, refs in zip(fold.layers, written, strict=True))
    for k in range(4, 60):
        log.set_refs(node, native(np.arange(15 * k, 15 * k + 80)[:, None], first=1000 * k + 1))
        assert len(fold.layers) <= 4 + 8
    # Layers that were merged before their columns were requested are in memory once.
    shared = {id(event.refs) for event in log.events if isinstance(event, ChunksWritten)}
    assert len(log.events) < 20
    assert sum(id(layer.refs) in shared for layer in fold.layers) >= len(fold.layers) - 1
    for c in range(60 * 15):
        found = log.chunk(node, (c,))
        assert isinstance(found, ChunkRef)
        last = 50 * (c // 50) if c < 60 else 15 * (c // 15)  # of the last that wrote it
        k = last // 50 if c < 60 else c // 15
        assert found.chunk_id == object_id(1000 * k + 1 + c - last)


def test_a_refused_command_leaves_the_log_as_it_was(repo: Repo) -> None:
    log = repo.log()
    log.set_metadata("/h", GROUP)
    before = encode_log(log.base.id, log.events)
    commands: list[Callable[[], object]] = [
        lambda: log.set_metadata("/g/a", b"{"),
        lambda: log.set_metadata("no/slash", GROUP),
        lambda: log.set_metadata("/a//b", GROUP),
        lambda: log.set_metadata("/a/../b", GROUP),
        lambda: log.set_metadata("/\ud800", GROUP),
        lambda: log.delete_node("/nope"),
        lambda: log.move_node("/nope", "/y"),
        lambda: log.move_node("/g", "/h"),
    ]
    for command in commands:
        with pytest.raises(IcechunkError):
            command()
    assert encode_log(log.base.id, log.events) == before


@pytest.mark.parametrize(
    ("source", "target", "kind"),
    [
        ("/g", "/g/a", ErrorKind.MOVE_INTO_SELF_OR_DESCENDANT),
        ("/g", "/g", ErrorKind.MOVE_INTO_SELF_OR_DESCENDANT),
        ("/", "/y", ErrorKind.MOVE_INTO_SELF_OR_DESCENDANT),
        ("/g", "/x/y", ErrorKind.MOVE_DESTINATION_PARENT_MISSING),
        ("/nope", "/y", ErrorKind.NODE_NOT_FOUND),
        ("/g/a", "/g", ErrorKind.MOVE_WONT_OVERWRITE),
        ("/g/a", "/", ErrorKind.MOVE_WONT_OVERWRITE),
        ("/h", "/g/a/h", ErrorKind.MOVE_DESTINATION_PARENT_NOT_GROUP),
        ("/g", "h", ErrorKind.INVALID_PATH),
    ],
)
def test_moves_are_refused_for_the_official_reasons(repo: Repo, source: str, target: str, kind: ErrorKind) -> None:
    log = repo.log()
    log.set_metadata("/h", GROUP)
    with pytest.raises(IcechunkError) as caught:
        log.move_node(source, target)
    assert caught.value.kind == kind


def test_moves_are_net_list_descendants_and_sort_by_segments(repo: Repo) -> None:
    log = repo.log()
    for path in ("/g-b", "/g/z"):
        log.set_metadata(path, GROUP)
    repo.commit(log)
    log = repo.log()
    log.move_node("/g", "/h")
    log.move_node("/h", "/i")
    log.move_node("/g-b", "/j")
    assert log.changes().moved_nodes == (("/g", "/i"), ("/g/a", "/i/a"), ("/g/z", "/i/z"), ("/g-b", "/j"))
    assert log.chunk(at(log, "/i/a"), (0,)) is IN_BASE
    log.set_inline(at(log, "/i/a"), (0,), b"1")
    assert chunks(log) == {"/i/a": [[0]]}
    log.discard()
    log.move_node("/g", "/h")
    log.move_node("/h", "/g")
    assert log.is_empty


def test_a_rollback_undoes_open_rows_and_events_and_keeps_the_savepoint(repo: Repo) -> None:
    log = repo.log()
    log.set_inline(at(log, "/g/a"), (0,), b"kept")
    first = log.savepoint()
    log.set_inline(at(log, "/g/a"), (0,), b"lost")
    second = log.savepoint()
    log.delete_node("/g")
    log.rollback(first)
    assert log.chunk(at(log, "/g/a"), (0,)) == ChunkRef(1, data=b"kept", length=4)
    with pytest.raises(SessionStateError):
        log.rollback(second)
    log.set_metadata("/g", group_json(x=1))
    log.rollback(first)
    assert log.changes().updated_groups == frozenset()


def test_a_set_undone_by_rollback_is_empty(repo: Repo) -> None:
    log = repo.log()
    start = log.savepoint()
    log.set_inline(at(log, "/g/a"), (0,), b"1")
    log.set_metadata("/q", GROUP)
    log.rollback(start)
    assert log.is_empty


def test_events_apply_to_another_base_by_node_id(repo: Repo) -> None:
    mine = repo.log()
    mine.set_inline(at(mine, "/g/a"), (2,), b"mine")
    mine.set_metadata("/mine", GROUP)
    theirs = repo.log()
    theirs.move_node("/g", "/h")
    repo.commit(theirs)
    moved = mine.rebased(repo.snapshot)
    assert chunks(moved) == {"/h/a": [[2]]}
    assert chunks(mine) == {"/g/a": [[2]]}
    theirs = repo.log()
    theirs.set_metadata("/mine", GROUP)
    repo.commit(theirs)
    with pytest.raises(AlreadyExistsError):
        mine.rebased(repo.snapshot)


def test_clear_deletes_everything_and_is_no_change_where_nothing_is(repo: Repo) -> None:
    log = repo.log()
    log.clear()
    assert list(log.nodes()) == []
    assert log.changes().deleted_groups == {"/", "/g"}
    repo.commit(log)
    assert repo.snapshot.manifest_files == {}
    log = repo.log()
    log.clear()
    assert log.is_empty


def test_an_empty_bulk_is_no_change(repo: Repo) -> None:
    log = repo.log()
    log.set_refs(at(log, "/g/a"), ChunkRefs.empty(1))
    log.delete_chunks(at(log, "/g/a"), np.empty((0, 1), np.uint32))
    assert log.is_empty
