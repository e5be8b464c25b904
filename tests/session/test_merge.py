"""Merging forks: what goes together, what is a conflict and how that is settled, and what may be merged again."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import icechunk
from icechunk import ForkSession, Repository, RepositoryConfig, Session
from icechunk.conflicts import MergeConflict, MergeConflictType, MergeFailedError
from icechunk.distributed import merge_sessions
from icechunk.errors import ErrorKind
from icechunk.testing.recording import RecordingStorage

C = MergeConflictType
N = 10


@pytest.fixture(params=["inline", "native", "inherited in files"])
def repo(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    if request.param == "inherited in files":
        monkeypatch.setattr("icechunk.session.session._EMBEDDED_BYTES", 0)
    config = RepositoryConfig(inline_chunk_threshold_bytes=0 if request.param == "native" else 512)
    repo = Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repo")), config)
    session = repo.writable_session("main")
    for name in ("a", "b", "g/x"):
        array = zarr.create_array(session.store, name=name, shape=(N,), chunks=(1,), dtype="i4", fill_value=-1)
        array[:5] = np.arange(5)
    session.commit("base")
    return repo


def put(session: Session, name: str, where: int | slice, value: int) -> None:
    zarr.open_array(session.store, path=name)[where] = value


def get(session: Session, name: str = "a") -> list[int]:
    return [int(value) for value in np.asarray(zarr.open_array(session.store, path=name, mode="r")[:])]


def resize(session: Session, length: int, name: str = "a") -> None:
    zarr.open_array(session.store, path=name).resize((length,))


def append(session: Session, value: int) -> None:
    zarr.open_array(session.store, path="a").append(np.array([value], "i4"))


def update(session: Session, name: str, value: int) -> None:
    zarr.open_array(session.store, path=name).attrs["k"] = value


def remove(session: Session, name: str) -> None:
    zarr.core.sync.sync(session.store.delete_dir(name))


def travel(fork: ForkSession) -> ForkSession:
    arrived: ForkSession = pickle.loads(pickle.dumps(fork))
    return arrived


def conflicts(session: Session, *forks: Session, on_conflict: str = "error") -> list[MergeConflict]:
    """Conflicts that a merge ends with; the session is as before."""
    before = str(session.status())
    with pytest.raises(MergeFailedError) as refused:
        session.merge(*forks, on_conflict=on_conflict)  # type: ignore[arg-type]
    assert refused.value.kind == ErrorKind.MERGE_FAILED
    assert str(session.status()) == before
    copy = pickle.loads(pickle.dumps(refused.value))
    assert copy.conflicts == refused.value.conflicts
    assert str(copy) == str(refused.value)
    return refused.value.conflicts


def conflict(
    type: MergeConflictType, path: str, *sessions: int | None, chunks: tuple[tuple[int, int], ...] | None = None
) -> MergeConflict:
    return MergeConflict(type=type, path=path, sessions=sessions, chunks=chunks)


# -- chunks ------------------------------------------------------------------------------------------------------------


def test_forks_that_wrote_one_chunk_are_a_conflict_that_names_array_chunks_and_forks(repo: Repository) -> None:
    session = repo.writable_session("main")
    forks = [session.fork() for _ in range(4)]
    put(forks[0], "a", slice(2, 5), 70)
    put(forks[1], "b", 2, 71)
    put(forks[2], "a", slice(3, 8), 72)
    put(forks[3], "a", 9, 73)
    assert conflicts(session, *forks) == [conflict(C.CHUNKS_CHANGED_TWICE, "/a", 0, 2, chunks=((3, 4),))]
    assert conflicts(session, *map(travel, forks)) == [conflict(C.CHUNKS_CHANGED_TWICE, "/a", 0, 2, chunks=((3, 4),))]
    session.merge(forks[0], forks[1], forks[3])
    assert conflicts(session, forks[2]) == [conflict(C.CHUNKS_CHANGED_TWICE, "/a", None, 0, chunks=((3, 4),))]


@pytest.mark.parametrize(("policy", "kept"), [("ours", 0), ("theirs", 2)])
def test_ours_keeps_the_chunks_of_the_fork_given_first_and_theirs_those_of_the_last(
    repo: Repository, policy: str, kept: int
) -> None:
    session = repo.writable_session("main")
    forks = [session.fork() for _ in range(3)]
    for i, fork in enumerate(forks):
        put(fork, "a", slice(4, 6), i)
        put(fork, "a", 7 + i, i)
    session.merge(*forks, on_conflict=policy)  # type: ignore[arg-type]
    assert get(session) == [0, 1, 2, 3, kept, kept, -1, 0, 1, 2]
    session.commit("merged")
    assert get(repo.readonly_session("main")) == [0, 1, 2, 3, kept, kept, -1, 0, 1, 2]


def test_changes_of_the_session_since_the_fork_count_too(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", 5, 50)
    fork = session.fork()
    put(fork, "a", 5, 1)
    merged = repo.writable_session("main")
    del merged
    put(session, "a", 5, 99)
    assert conflicts(session, fork) == [conflict(C.CHUNKS_CHANGED_TWICE, "/a", None, 0, chunks=((5, 5),))]
    session.merge(fork, on_conflict="ours")
    assert get(session)[5] == 99
    session.merge(fork, on_conflict="theirs")
    assert get(session)[5] in (1, 99)


def test_inherited_changes_are_no_changes_of_a_fork(repo: Repository) -> None:
    session = repo.writable_session("main")
    put(session, "a", slice(5, 9), 50)
    one, two = travel(session.fork()), session.fork()
    put(one, "a", 5, 1)
    put(two, "a", 6, 2)
    put(session, "a", 7, 3)
    session.merge(one, travel(two))
    assert get(session)[5:9] == [1, 2, 3, 50]


def test_a_chunk_that_one_deleted_and_another_wrote_is_a_conflict_and_one_that_both_deleted_is_none(
    repo: Repository,
) -> None:
    session = repo.writable_session("main")
    forks = [session.fork() for _ in range(3)]
    for fork in forks[:2]:
        zarr.core.sync.sync(fork.store.delete("a/c/0"))
    put(forks[2], "a", 0, 8)
    assert conflicts(session, *forks) == [conflict(C.CHUNKS_CHANGED_TWICE, "/a", 0, 1, 2, chunks=((0, 0),))]
    session.merge(*forks[:2])
    assert get(session)[0] == -1


def test_chunks_with_equal_bytes_are_no_conflict_and_are_read_only_if_they_must_be(tmp_path: Path) -> None:
    storage = RecordingStorage(icechunk.local_filesystem_storage(str(tmp_path / "repo")), turns=0)
    repo = Repository.create(storage, RepositoryConfig(inline_chunk_threshold_bytes=0))
    session = repo.writable_session("main")
    for name in ("x", "y"):
        zarr.create_array(session.store, name=name, shape=(100,), chunks=(50,), dtype="i8", fill_value=-1)
    forks = [travel(session.fork()) for _ in range(4)]
    for i, fork in enumerate(forks):
        zarr.open_array(fork.store, path="x")[:] = np.arange(100)
        zarr.open_array(fork.store, path="y")[25 * i : 25 * i + 1] = i % 2
    assert conflicts(session, *forks) == [conflict(C.CHUNKS_CHANGED_TWICE, "/y", 0, 1, chunks=((0, 0),))]
    for fork in forks:
        zarr.open_array(fork.store, path="y")[:] = 3
    session.merge(*forks)
    session.commit("coordinates by all")
    reader = repo.readonly_session("main").store
    np.testing.assert_array_equal(zarr.open_array(reader, path="x", mode="r")[:], np.arange(100))


def test_forks_may_each_write_a_variable_and_the_same_coordinates(repo: Repository) -> None:
    session = repo.writable_session("main")
    template = xr.Dataset(
        {name: ("x", np.zeros(1000), {"units": "K"}) for name in ("t", "u", "v")}, {"x": np.arange(1000.0)}
    )
    template.to_zarr(session.store, group="d", consolidated=False, zarr_format=3)
    session.commit("template")
    session = repo.writable_session("main")
    forks = [session.fork() for _ in range(3)]
    for i, (name, fork) in enumerate(zip(("t", "u", "v"), forks, strict=True)):
        part = (template[[name]] + i).assign_coords(x=template.x)
        part[name].attrs["units"] = "K"
        part.to_zarr(fork.store, group="d", mode="a", consolidated=False, zarr_format=3)
    session.merge(*map(travel, forks))
    found = xr.open_zarr(session.store, group="d", consolidated=False, chunks=None)
    for i, name in enumerate(("t", "u", "v")):
        assert float(found[name][7]) == i


# -- metadata ----------------------------------------------------------------------------------------------------------


def test_forks_that_each_append_are_a_conflict(repo: Repository) -> None:
    session = repo.writable_session("main")
    forks = [session.fork() for _ in range(3)]
    for i, fork in enumerate(forks):
        append(fork, 100 + i)
    assert conflicts(session, *forks) == [
        conflict(C.CHUNKS_CHANGED_TWICE, "/a", 0, 1, chunks=((10, 10),)),
        conflict(C.METADATA_CHANGED_TWICE, "/a", 0, 1),
    ]
    session.merge(*forks, on_conflict="theirs")
    assert get(session)[10:] == [102]


@pytest.mark.parametrize(("policy", "shape"), [("ours", 12), ("theirs", 14)])
@pytest.mark.parametrize("alike", [False, True])
def test_forks_that_resized_one_array_are_a_conflict_alike_or_not(
    repo: Repository, policy: str, shape: int, alike: bool
) -> None:
    session = repo.writable_session("main")
    one, two = session.fork(), session.fork()
    resize(one, 12)
    resize(two, 12 if alike else 14)
    assert conflicts(session, one, two) == [conflict(C.METADATA_CHANGED_TWICE, "/a", 0, 1)]
    session.merge(one, two, on_conflict=policy)  # type: ignore[arg-type]
    assert zarr.open_array(session.store, path="a").shape == (12 if alike else shape,)


def test_attributes_of_one_array_changed_twice_are_a_conflict_and_of_a_group_only_if_not_alike(
    repo: Repository,
) -> None:
    session = repo.writable_session("main")
    one, two, three = (session.fork() for _ in range(3))
    for fork in (one, two):
        update(fork, "a", 7)
    assert conflicts(session, one, two) == [conflict(C.METADATA_CHANGED_TWICE, "/a", 0, 1)]
    groups = [session.fork() for _ in range(3)]
    for fork, value in zip(groups, (1, 1, 2), strict=True):
        zarr.open_group(fork.store, path="g").attrs["k"] = value
    session.merge(groups[0], groups[1])
    assert conflicts(session, three, groups[2]) == [conflict(C.METADATA_CHANGED_TWICE, "/g", None, 1)]
    session.merge(groups[2], on_conflict="theirs")
    assert zarr.open_group(session.store, path="g").attrs["k"] == 2


def test_an_array_may_grow_in_one_fork_while_others_write_to_it(repo: Repository) -> None:
    session = repo.writable_session("main")
    one, two = session.fork(), session.fork()
    append(one, 100)
    update(one, "a", 3)
    put(two, "a", 9, 9)
    session.merge(two, one)
    assert get(session)[9:] == [9, 100]
    other = repo.writable_session("main")
    one = other.fork()
    append(other, 100)
    put(one, "a", 9, 9)
    other.merge(one)
    assert get(other)[9:] == [9, 100]


@pytest.mark.parametrize(("policy", "length"), [("ours", 4), ("theirs", N)])
def test_chunks_outside_the_shape_that_the_session_shrank_to_meanwhile_are_a_conflict(
    repo: Repository, policy: str, length: int
) -> None:
    session = repo.writable_session("main")
    one, two = session.fork(), session.fork()
    put(one, "a", slice(3, 7), 8)
    put(two, "a", 2, 9)
    resize(session, 4)
    session.merge(two)
    assert conflicts(session, one) == [conflict(C.CHUNKS_OUTSIDE_SHAPE, "/a", None, 0, chunks=((4, 6),))]
    session.merge(one, on_conflict=policy)  # type: ignore[arg-type]
    found = [0, 1, 9, 8, 8, 8, 8, -1, -1, -1][:length]
    # Chunks of the session outside the shape were invisible, and are visible again.
    assert get(session) == found
    session.commit("merged")
    assert get(repo.readonly_session("main")) == found


@pytest.mark.parametrize(("policy", "length"), [("ours", N), ("theirs", 4)])
def test_chunks_of_another_fork_outside_the_shape_that_a_fork_shrank_to_are_a_conflict(
    repo: Repository, policy: str, length: int
) -> None:
    session = repo.writable_session("main")
    one, two = session.fork(), session.fork()
    put(one, "a", slice(3, 7), 8)
    resize(two, 4)
    assert conflicts(session, one, two) == [conflict(C.CHUNKS_OUTSIDE_SHAPE, "/a", 0, 1, chunks=((4, 6),))]
    session.merge(one, two, on_conflict=policy)  # type: ignore[arg-type]
    assert get(session) == [0, 1, 2, 8, 8, 8, 8, -1, -1, -1][:length]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_chunks_beside_another_encoding_are_a_conflict_that_nothing_settles(
    repo: Repository, order: tuple[int, int]
) -> None:
    session = repo.writable_session("main")
    forks = [session.fork(), session.fork()]
    put(forks[0], "a", 9, 9)
    document = zarr.core.sync.sync(forks[1].store.get("a/zarr.json", zarr.core.buffer.default_buffer_prototype()))
    assert document is not None
    changed = document.to_bytes().replace(b'"int32"', b'"uint32"')
    zarr.core.sync.sync(forks[1].store.set("a/zarr.json", zarr.core.buffer.cpu.Buffer.from_bytes(changed)))
    for policy in ("error", "ours", "theirs"):
        found = conflicts(session, *(forks[i] for i in order), on_conflict=policy)
        assert found == [conflict(C.ENCODING_CHANGED, "/a", 0, 1)]


# -- nodes -------------------------------------------------------------------------------------------------------------


def create(session: Session, name: str) -> None:
    zarr.create_array(session.store, name=name, shape=(4,), chunks=(1,), dtype="i4", fill_value=0)


@pytest.mark.parametrize(
    ("one", "two", "found"),
    [
        (lambda s: create(s, "new"), lambda s: create(s, "new"), (C.CREATED_TWICE, "/new")),
        (lambda s: put(s, "b", 0, 1), lambda s: remove(s, "b"), (C.DELETED_AND_CHANGED, "/b")),
        (lambda s: remove(s, "b"), lambda s: put(s, "b", 0, 1), (C.DELETED_AND_CHANGED, "/b")),
        (lambda s: update(s, "b", 1), lambda s: remove(s, "b"), (C.DELETED_AND_CHANGED, "/b")),
        (lambda s: remove(s, "b"), lambda s: update(s, "b", 1), (C.DELETED_AND_CHANGED, "/b")),
        (lambda s: create(s, "g/new"), lambda s: remove(s, "g"), (C.DELETED_AND_CHANGED, "/g")),
        (lambda s: remove(s, "g"), lambda s: create(s, "g/new"), (C.DELETED_AND_CHANGED, "/g")),
        (lambda s: remove(s, "g"), lambda s: put(s, "g/x", 0, 1), (C.DELETED_AND_CHANGED, "/g/x")),
    ],
)
def test_nodes_that_only_one_can_have_created_or_deleted_are_conflicts_that_nothing_settles(
    repo: Repository,
    one: Callable[[Session], None],
    two: Callable[[Session], None],
    found: tuple[MergeConflictType, str],
) -> None:
    session = repo.writable_session("main")
    forks = [session.fork(), session.fork()]
    one(forks[0])
    two(forks[1])
    for policy in ("error", "ours", "theirs"):
        (only,) = conflicts(session, *map(travel, forks), on_conflict=policy)
        assert (only.type, only.path) == found
        assert only.sessions[-1] == 1


def moved(repo: Repository, *moves: tuple[str, str]) -> list[ForkSession]:
    session = repo.rearrange_session("main")
    forks = []
    for source, target in moves:
        forks.append(session.fork())
        forks[-1].move(source, target)
    return forks


def test_moves_that_do_not_go_together_are_conflicts_that_name_paths(repo: Repository) -> None:
    for moves, found in {
        (("/b", "/g/b"), ("/b", "/g/c")): conflict(C.MOVED_TWICE, "/g/b", 0, 1),
        (("/a", "/g/y"), ("/b", "/g/y")): conflict(C.CREATED_TWICE, "/g/y", 0, 1),
        (("/g", "/h"), ("/b", "/g/b")): conflict(C.DELETED_AND_CHANGED, "/g", 0, 1),
    }.items():
        session = repo.rearrange_session("main")
        forks = moved(repo, *moves)
        assert conflicts(session, *forks) == [found]
        assert conflicts(session, *forks, on_conflict="theirs") == [found]
    session = repo.rearrange_session("main")
    session.merge(*moved(repo, ("/a", "/c"), ("/g/x", "/g/y"), ("/a", "/c")))
    assert session.status().moved_nodes == [("/a", "/c"), ("/g/x", "/g/y")]


# -- again -------------------------------------------------------------------------------------------------------------


def test_merging_a_fork_again_in_any_copy_does_nothing(repo: Repository) -> None:
    session = repo.writable_session("main")
    fork = session.fork()
    append(fork, 100)
    update(fork, "b", 1)
    put(fork, "a", 0, 8)
    copy = travel(fork)
    session.merge(fork)
    put(session, "a", 0, 9)
    update(session, "b", 2)
    session.merge(fork, copy, travel(copy))
    assert get(session)[0] == 9
    assert get(session)[10] == 100
    put(copy, "a", 1, 5)
    session.merge(copy)
    assert get(session)[:2] == [9, 5]


def test_copies_of_one_fork_share_the_changes_from_before_they_were_copied(repo: Repository) -> None:
    session = repo.writable_session("main")
    fork = session.fork()
    resize(fork, 20)
    put(fork, "a", 19, 19)
    copies = [travel(fork) for _ in range(4)]
    for i, copy in enumerate(copies):
        put(copy, "a", 10 + i, i)
    merged = merge_sessions(copies[0], [[copies[1]], [copies[2]]], copies[3])
    session.merge(travel(merged))
    assert get(session)[10:] == [0, 1, 2, 3, -1, -1, -1, -1, -1, 19]


def test_sessions_that_are_no_forks_are_not_merged_by_the_function_for_forks(repo: Repository) -> None:
    session = repo.writable_session("main")
    for wrong in ((session, session.fork()), (session.fork(), session), (3,)):
        with pytest.raises(TypeError):
            merge_sessions(*wrong)
    one, two = session.fork(), session.fork()
    put(one, "a", 0, 1)
    put(two, "a", 0, 2)
    with pytest.raises(MergeFailedError) as refused:
        merge_sessions(one, two)
    assert refused.value.conflicts[0].sessions == (None, 0)
    assert get(merge_sessions(one, two, on_conflict="theirs"))[0] == 2


def test_an_unknown_value_of_on_conflict_is_refused(repo: Repository) -> None:
    with pytest.raises(icechunk.InvalidInputError):
        repo.writable_session("main").merge(on_conflict="mine")  # type: ignore[arg-type]


def test_merges_of_several_threads_at_once_all_arrive(repo: Repository) -> None:
    session = repo.writable_session("main")
    forks = [session.fork() for _ in range(8)]
    for i, fork in enumerate(forks):
        put(fork, "b", slice(0, 2), 5)
        put(fork, "a", i, i + 10)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(session.merge, forks))
    assert get(session)[:8] == [i + 10 for i in range(8)]
    assert get(session, "b")[:2] == [5, 5]


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0, 512]),
    st.booleans(),
)
def test_forks_conflict_exactly_where_two_left_different_bytes_in_one_chunk(
    tmp_path_factory: pytest.TempPathFactory, writes: list[list[tuple[int, int, int]]], inline: int, travels: bool
) -> None:
    storage = icechunk.local_filesystem_storage(str(tmp_path_factory.mktemp("repo")))
    repo = Repository.create(storage, RepositoryConfig(inline_chunk_threshold_bytes=inline))
    session = repo.writable_session("main")
    zarr.create_array(session.store, name="a", shape=(4, 4), chunks=(1, 1), dtype="i4", fill_value=-1)
    forks, model = [session.fork() for _ in writes], np.full((4, 4), -1)
    left: list[dict[tuple[int, int], int]] = []
    for fork, part in zip(forks, writes, strict=True):
        for x, y, value in part:
            zarr.open_array(fork.store, path="a")[x, y] = value
        left.append({(x, y): value for x, y, value in part})
    clash = any(
        one[chunk] != two[chunk] for i, one in enumerate(left) for two in left[:i] for chunk in one.keys() & two.keys()
    )
    if travels:
        forks = [travel(fork) for fork in forks]
    if clash:
        with pytest.raises(MergeFailedError):
            session.merge(*forks)
        session.merge(*forks, on_conflict="theirs")
    else:
        session.merge(*forks)
    for result in left:
        for chunk, value in result.items():
            model[chunk] = value
    np.testing.assert_array_equal(zarr.open_array(session.store, path="a")[:], model)
