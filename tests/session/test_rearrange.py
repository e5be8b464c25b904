"""Moving nodes, and moving chunks within an array: names and coordinates change, data stays where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import zarr

import icechunk
from icechunk import ConflictDetector, Repository, Session, SessionMode
from icechunk.errors import (
    AlreadyExistsError,
    ErrorKind,
    IcechunkError,
    InvalidInputError,
    NodeNotFoundError,
    ReadOnlyError,
    SessionStateError,
)
from icechunk.storage.memory import MemoryStorage
from icechunk.testing.recording import RecordingStorage


@pytest.fixture
def storage() -> RecordingStorage:
    return RecordingStorage(MemoryStorage(), turns=0)


@pytest.fixture
def repo(storage: RecordingStorage) -> Repository:
    repo = Repository.create(storage, icechunk.RepositoryConfig(inline_chunk_threshold_bytes=0))
    session = repo.writable_session("main")
    for name in ("a", "g/x"):
        array = zarr.create_array(session.store, name=name, shape=(10,), chunks=(1,), dtype="i4", fill_value=-1)
        array[:5] = np.arange(5)
    zarr.create_group(session.store, path="h")
    session.commit("base")
    return repo


def get(session: Session, name: str = "a") -> list[int]:
    return [int(value) for value in np.asarray(zarr.open_array(session.store, path=name, mode="r")[:])]


def put(session: Session, index: int, value: int) -> None:
    zarr.open_array(session.store, path="a")[index] = value


def test_nodes_move_with_all_below_them_and_no_data_is_written(repo: Repository, storage: RecordingStorage) -> None:
    session = repo.rearrange_session("main")
    assert session.mode is SessionMode.rearrange
    assert not session.read_only
    session.move("/g", "/h/g")
    session.move("/a", "/b")
    assert get(session, "h/g/x")[:5] == [0, 1, 2, 3, 4]
    storage.clear()
    session.commit("moved")
    assert storage.count("put", "chunks/") == storage.count("put", "manifests/") == 0
    reader = repo.readonly_session("main")
    assert get(reader, "b")[:5] == get(reader, "h/g/x")[:5] == [0, 1, 2, 3, 4]
    assert reader.mode is SessionMode.readonly
    with pytest.raises(FileNotFoundError):
        zarr.open_array(reader.store, path="a", mode="r")


def test_a_rearranging_session_takes_nothing_else_and_others_move_nothing(repo: Repository) -> None:
    session = repo.rearrange_session("main")
    changes: list[Callable[[], object]] = [
        lambda: put(session, 0, 9),
        lambda: zarr.create_group(session.store, path="new"),
        lambda: zarr.core.sync.sync(session.store.delete_dir("a")),
        lambda: session.shift_array("/a", (1,)),
        lambda: session.reindex_array("/a", lambda i: i),
    ]
    for change in changes:
        with pytest.raises(SessionStateError) as refused:
            change()
        assert refused.value.kind == ErrorKind.REARRANGE_SESSION_ONLY
    assert not session.has_uncommitted_changes
    with pytest.raises(SessionStateError) as refused:
        repo.writable_session("main").move("/a", "/b")
    assert refused.value.kind == ErrorKind.NON_REARRANGE_SESSION
    with pytest.raises(ReadOnlyError):
        repo.readonly_session("main").move("/a", "/b")


@pytest.mark.parametrize(
    ("source", "target", "error", "kind"),
    [
        ("/nope", "/b", NodeNotFoundError, ErrorKind.NODE_NOT_FOUND),
        ("/a", "/h", AlreadyExistsError, ErrorKind.MOVE_WONT_OVERWRITE),
        ("/g", "/g/sub", SessionStateError, ErrorKind.MOVE_INTO_SELF_OR_DESCENDANT),
        ("/a", "/none/a", SessionStateError, ErrorKind.MOVE_DESTINATION_PARENT_MISSING),
        ("/h", "/a/h", SessionStateError, ErrorKind.MOVE_DESTINATION_PARENT_NOT_GROUP),
        ("a", "/b", InvalidInputError, ErrorKind.INVALID_PATH),
        ("/a", "b", InvalidInputError, ErrorKind.INVALID_PATH),
    ],
)
def test_a_move_that_makes_no_sense_is_refused(
    repo: Repository, source: str, target: str, error: type[IcechunkError], kind: ErrorKind
) -> None:
    session = repo.rearrange_session("main")
    with pytest.raises(error) as refused:
        session.move(source, target)
    assert refused.value.kind == kind
    assert not session.has_uncommitted_changes


def test_moves_are_rebased_over_other_changes_but_nothing_over_a_move(repo: Repository) -> None:
    moving, writing = repo.rearrange_session("main"), repo.writable_session("main")
    moving.move("/a", "/b")
    put(writing, 7, 70)
    writing.commit("written")
    late = repo.writable_session("main")
    put(late, 8, 80)
    moving.commit("moved", rebase_with=ConflictDetector())
    assert get(repo.readonly_session("main"), "b")[7] == 70
    with pytest.raises(icechunk.RebaseFailedError):
        late.commit("late", rebase_with=ConflictDetector())


def test_a_fork_of_a_rearranging_session_moves_too(repo: Repository) -> None:
    session = repo.rearrange_session("main")
    fork = session.fork()
    fork.move("/a", "/b")
    session.merge(fork)
    assert session.status().moved_nodes == [("/a", "/b")]


def test_the_owner_may_switch_moves_off(repo: Repository) -> None:
    repo.set_feature_flag("move_node", False)
    with pytest.raises(IcechunkError) as refused:
        repo.rearrange_session("main")
    assert refused.value.kind == ErrorKind.FEATURE_FLAG_DISABLED


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (2, [-1, -1, 0, 1, 2, 3, 4, -1, -1, -1]),
        (-2, [2, 3, 4, -1, -1, -1, -1, -1, -1, -1]),
        (7, [-1, -1, -1, -1, -1, -1, -1, 0, 1, 2]),
        (0, [0, 1, 2, 3, 4, -1, -1, -1, -1, -1]),
        (20, [-1] * 10),
        (-20, [-1] * 10),
    ],
)
def test_a_shifted_array_loses_chunks_that_leave_the_grid(repo: Repository, offset: int, expected: list[int]) -> None:
    session = repo.writable_session("main")
    session.shift_array("/a", (offset,))
    assert get(session) == expected
    session.commit("shifted", allow_empty=True)
    assert get(repo.readonly_session("main")) == expected


def test_uncommitted_chunks_shift_as_well_and_nothing_is_uploaded_twice(
    repo: Repository, storage: RecordingStorage
) -> None:
    session = repo.writable_session("main")
    put(session, 0, 70)
    put(session, 9, 79)
    session.shift_array("/a", [1])
    assert get(session) == [-1, 70, 1, 2, 3, 4, -1, -1, -1, -1]
    session.shift_array("/a", [-1])
    storage.clear()
    session.commit("there and back")
    assert get(repo.readonly_session("main")) == [70, 1, 2, 3, 4, -1, -1, -1, -1, -1]
    assert storage.count("put", "chunks/") <= 1


Move = Callable[[Iterable[int]], list[int] | None]


def add(n: int) -> Move:
    def place(coords: Iterable[int]) -> list[int] | None:
        (i,) = coords
        return [i + n] if 0 <= i + n < 10 else None

    return place


def turn(coords: Iterable[int]) -> list[int]:
    (i,) = coords
    return [9 - i]


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        (add(1), None, [0, 0, 1, 2, 3, 4, -1, -1, -1, -1]),
        (add(2), add(-2), [-1, -1, 0, 1, 2, 3, 4, -1, -1, -1]),
        (turn, turn, [-1, -1, -1, -1, -1, 4, 3, 2, 1, 0]),
        (lambda coords: [0], None, [4, 1, 2, 3, 4, -1, -1, -1, -1, -1]),
        (lambda coords: None, None, [0, 1, 2, 3, 4, -1, -1, -1, -1, -1]),
        (lambda coords: None, lambda coords: None, [-1] * 10),
    ],
)
def test_chunks_go_to_the_coordinates_that_the_functions_return(
    repo: Repository, forward: Move, backward: Move | None, expected: list[int]
) -> None:
    session = repo.writable_session("main")
    session.reindex_array("/a", forward, backward)
    assert get(session) == expected
    session.commit("reindexed", allow_empty=True)
    assert get(repo.readonly_session("main")) == expected


def test_places_outside_the_grid_and_functions_that_raise_change_nothing(repo: Repository) -> None:
    session = repo.writable_session("main")
    for forward in (lambda i: [i[0] + 8], lambda i: [-1], lambda i: [1, 1]):
        with pytest.raises(InvalidInputError) as refused:
            session.reindex_array("/a", forward)
        assert refused.value.kind == ErrorKind.INVALID_CHUNK_INDEX
    with pytest.raises(ZeroDivisionError):
        session.reindex_array("/a", lambda i: [1 // 0])
    with pytest.raises(InvalidInputError) as refused:
        session.shift_array("/a", (1, 1))
    assert refused.value.kind == ErrorKind.INVALID_CHUNK_INDEX
    assert not session.has_uncommitted_changes


def test_only_arrays_that_exist_shift_and_only_in_writable_sessions(repo: Repository) -> None:
    session = repo.writable_session("main")
    with pytest.raises(InvalidInputError) as refused:
        session.shift_array("/g", (1,))
    assert refused.value.kind == ErrorKind.NOT_AN_ARRAY
    with pytest.raises(NodeNotFoundError):
        session.shift_array("/nope", (1,))
    with pytest.raises(InvalidInputError):
        session.shift_array("a", (1,))
    reader = repo.readonly_session("main")
    with pytest.raises(ReadOnlyError):
        reader.shift_array("/a", (1,))
    with pytest.raises(ReadOnlyError):
        reader.reindex_array("/a", lambda i: i)
