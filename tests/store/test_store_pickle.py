"""Stores and sessions in other processes: read-only ones can be pickled, writable ones refuse and name the remedy."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import pickle
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import StorePath

import icechunk
from icechunk import IcechunkStore, Repository, Session
from icechunk.credentials import S3Credentials, S3StaticCredentials
from icechunk.errors import FormatError
from icechunk.runtime import pickles
from icechunk.runtime.about import VERSION
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.port import Storage
from tests.raising import raises
from tests.store.store_builders import read

GROUP = b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'
VALUES = np.arange(1, 1 + 32 * 16, dtype="i4").reshape(32, 16)


def total(store: IcechunkStore) -> int:
    """Read everything, by zarr, in this process."""
    return int(np.asarray(zarr.open_array(store, path="g/a", mode="r")[...]).sum())


def total_of_session(session: Session) -> int:
    return total(session.store)


def total_by_a_loop(store: IcechunkStore) -> tuple[int, int]:
    """The same by the process's own loop; and which process it was."""

    async def work() -> int:
        array = await zarr.api.asynchronous.open_array(store=store, path="g/a", mode="r")
        return int(np.asarray(await array.getitem(...)).sum())

    return asyncio.run(work()), os.getpid()


def total_of_array(array: zarr.Array[Any]) -> int:
    return int(np.asarray(array[...]).sum())


def tip_of(repository: Repository) -> str:
    return repository.lookup_branch("main")


def commit_in(repository: Repository, name: str) -> str:
    with repository.transaction("main", message=f"by process {os.getpid()}") as store:
        zarr.create_array(store, name=name, shape=(4,), dtype="i4")[:] = 1
    return repository.lookup_branch("main")


def filled(storage: Storage) -> Repository:
    """A repository with an array of inline and native chunks."""
    repository = Repository.create(storage, icechunk.RepositoryConfig(inline_chunk_threshold_bytes=100))
    with repository.transaction("main", message="values") as store:
        array = zarr.create_array(store, name="g/a", shape=(32, 16), chunks=(8, 16), dtype="i4", compressors=None)
        array[...] = VALUES
        zarr.create_array(store, name="g/small", shape=(4,), chunks=(1,), dtype="i4", compressors=None)[:] = 3
    return repository


@pytest.fixture
def repository(tmp_path: Any) -> Repository:
    """A repository on disk."""
    return filled(LocalStorage(tmp_path / "repository"))


@pytest.fixture(params=["spawn", "fork"])
def context(request: pytest.FixtureRequest) -> Any:
    """A way to start processes."""
    return multiprocessing.get_context(request.param)


pytestmark = pytest.mark.filterwarnings(
    # Python 3.12 warns of every fork while threads run, as zarr's and ours do: this test shows that it works.
    "ignore:.*multi-threaded, use of fork.*:DeprecationWarning"
)


def test_read_only_stores_can_be_pickled_to_other_processes(repository: Repository, context: Any) -> None:
    session = repository.readonly_session("main")
    store = session.store
    assert total(store) == VALUES.sum()
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = [
            pool.submit(total, store),
            pool.submit(total_of_session, session),
            pool.submit(total_of_array, zarr.open_array(store, path="g/a", mode="r")),
        ]
        by_loop = [pool.submit(total_by_a_loop, store) for _ in range(2)]
        assert [future.result(60) for future in futures] == [VALUES.sum()] * 3
        for future in by_loop:
            result, pid = future.result(60)
            assert result == VALUES.sum()
            assert pid != os.getpid()
    assert total(store) == VALUES.sum()


def test_pickled_repositories_commit_in_another_process(repository: Repository, context: Any) -> None:
    tip = repository.lookup_branch("main")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(tip_of, repository).result(60) == tip
        new = pool.submit(commit_in, repository, "b").result(60)
        assert new != tip
        assert pool.submit(commit_in, repository, "c").result(60) not in (new, tip)
    root = zarr.open_group(repository.readonly_session("main").store, mode="r")
    assert sorted(root.keys()) == ["b", "c", "g"]


def test_forked_child_reads_with_the_parents_very_objects(repository: Repository) -> None:
    store = repository.readonly_session("main").store
    # The parent's loops, clients and threads exist already; of all that the child has but the memory.
    assert total(store) == VALUES.sum()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        sender.send((total(store), total_by_a_loop(store)[0], tip_of(repository), threading.active_count() > 0))

    process = context.Process(target=child)
    process.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert receiver.recv() == (VALUES.sum(), VALUES.sum(), repository.lookup_branch("main"), True)
    finally:
        process.join(20)
        process.kill()
    assert process.exitcode == 0
    assert total(store) == VALUES.sum()


def test_stores_on_s3_can_be_pickled(moto_storage: Storage) -> None:
    repository = filled(moto_storage)
    store = repository.readonly_session("main").store
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(total, store).result(60) == VALUES.sum()
        assert pool.submit(commit_in, repository, "b").result(60) == repository.lookup_branch("main")


@pytest.mark.parametrize("begin", ["branch", "snapshot", "tag", "after its commit"])
def test_a_pickled_store_is_equal_and_reads_the_same_snapshot(repository: Repository, begin: str) -> None:
    match begin:
        case "branch":
            session = repository.readonly_session("main")
        case "snapshot":
            session = repository.readonly_session(snapshot_id=repository.lookup_branch("main"))
        case "tag":
            repository.create_tag("v1", snapshot_id=repository.lookup_branch("main"))
            session = repository.readonly_session(tag="v1")
        case _:
            session = repository.writable_session("main")
            zarr.create_group(session.store, path="new")
            session.commit("new")
    data = pickle.dumps((session, session.store))
    commit_in(repository, "later")
    again, store = pickle.loads(data)
    assert again == session
    assert store == session.store
    assert store.session is again
    assert again.snapshot_id == session.snapshot_id
    assert again.read_only
    assert store.read_only
    assert not again.has_uncommitted_changes
    assert total(store) == VALUES.sum()
    assert "later" not in zarr.open_group(store, mode="r")
    assert repr(store) == repr(session.store)


@pytest.mark.parametrize("spec_version", [1, 2, None])
@pytest.mark.parametrize("groups", [100, 12_000])
def test_a_read_only_session_of_a_wide_hierarchy_can_be_pickled(
    tmp_path: Path, groups: int, spec_version: int | None
) -> None:
    repository = Repository.create(LocalStorage(tmp_path / "repository"), spec_version=spec_version)
    session = repository.writable_session("main")
    for i in range(groups):
        session._content.set_metadata(f"/g{i}", GROUP)
    session.commit("groups")
    written = repository.readonly_session("main")
    read = Repository.open(repository.storage).readonly_session("main")
    for one in (session, written, read):
        data = pickle.dumps((one, one.store))
        assert len(data) < 300_000
        again, store = pickle.loads(data)
        assert again == one
        assert store.session is again
        assert again._content.node(f"/g{groups - 1}") == one._content.node(f"/g{groups - 1}")
        assert [node.path for node in again._content.nodes("/")] == [node.path for node in one._content.nodes("/")]
    history = [info.id for info in Repository.open(repository.storage).ancestry(branch="main")]
    assert [info.id for info in repository.ancestry(branch="main")] == history
    assert len(history) == 2


def test_pickle_is_small_and_keeps_the_configuration(repository: Repository) -> None:
    store = repository.readonly_session("main").store
    total(store)
    data = pickle.dumps(store)
    assert len(data) < 20_000
    assert pickle.loads(data).session.config == store.session.config


@pytest.mark.parametrize("what", ["store", "session", "fork", "repository"])
def test_a_pickle_of_another_version_is_refused_by_name_and_one_of_another_patch_is_loaded(
    repository: Repository, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = repository.readonly_session("main")
    fork = repository.writable_session("main").fork()
    value = {"store": session.store, "session": session, "fork": fork, "repository": repository}[what]
    major, minor, patch = VERSION.split(".")
    with monkeypatch.context() as other:
        other.setattr(pickles, "VERSION", f"{major}.{minor}.{int(patch) + 1}")
        near = pickle.dumps(value)
        other.setattr(pickles, "VERSION", f"{major}.{int(minor) + 1}.0")
        far = pickle.dumps(value)
    assert type(pickle.loads(near)) is type(value)
    with raises(FormatError, "pickle", f"{major}.{int(minor) + 1}.0", VERSION):
        pickle.loads(far)


def test_store_paths_and_arrays_of_zarr_can_be_pickled_with_the_store(repository: Repository) -> None:
    store = repository.readonly_session("main").store
    path = pickle.loads(pickle.dumps(StorePath(store, "g/a")))
    assert path == StorePath(store, "g/a")
    array = pickle.loads(pickle.dumps(zarr.open_array(store, path="g/a", mode="r")))
    np.testing.assert_array_equal(array[...], VALUES)
    group = pickle.loads(pickle.dumps(zarr.open_group(store, mode="r")))
    np.testing.assert_array_equal(group["g/a"][...], VALUES)


@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.parametrize("what", ["session", "store", "read-only store", "path", "array", "deep copy"])
def test_writable_sessions_refuse_and_point_to_fork(repository: Repository, what: str, dirty: bool) -> None:
    session = repository.writable_session("main")
    store = session.store
    if dirty:
        zarr.open_array(store, path="g/a", mode="r+")[0] = 7
    thing: Any = {
        "session": session,
        "store": store,
        "read-only store": store.with_read_only(True),
        "path": StorePath(store, "g"),
        "array": zarr.open_array(store, path="g/a", mode="r"),
        "deep copy": store,
    }[what]
    with pytest.raises(ValueError, match=re.escape("Session.fork()")):
        copy.deepcopy(thing) if what == "deep copy" else pickle.dumps(thing)
    # It is as good as before.
    assert session.has_uncommitted_changes == dirty
    zarr.open_array(store, path="g/a", mode="r+")[0] = 7
    session.commit("still works")


def test_refusal_reaches_the_user_of_a_process_pool(repository: Repository) -> None:
    store = repository.writable_session("main").store
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        pytest.raises(ValueError, match=re.escape("Session.fork()")),
    ):
        pool.submit(total, store).result(60)


def test_secrets_are_only_inside_the_pickle(moto_storage: Storage) -> None:
    credentials = S3Credentials.Static(S3StaticCredentials("key", "a-very-secret-word"))
    storage = icechunk.s3_storage(
        bucket="b", prefix="p", region="us-east-1", access_key_id="key", secret_access_key="a-very-secret-word"
    )
    for thing in (credentials, storage):
        assert "a-very-secret-word" not in repr(thing)
        assert "a-very-secret-word" not in str(thing)
    assert pickle.loads(pickle.dumps(storage)) == storage


def test_store_in_memory_refuses_to_be_pickled() -> None:
    repository = filled(icechunk.in_memory_storage())
    store = repository.readonly_session("main").store
    with raises(icechunk.InvalidInputError, "pickle", "local_filesystem_storage"):
        pickle.dumps(store)
    assert asyncio.run(read(store, "g/small/c/0")) is not None


def test_stores_arrays_and_groups_of_a_read_only_session_are_open_and_equal_their_copies(tmp_path: Path) -> None:
    repository = Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repo")))
    session = repository.writable_session("main")
    zarr.create_array(session.store, name="g/a", shape=(4,), chunks=(1,), dtype="i4")
    assert session.store._is_open
    session.commit("made")
    store = repository.readonly_session("main").store
    for shown in (store, zarr.open_array(store, path="g/a", mode="r"), zarr.open_group(store, path="g", mode="r")):
        copy = pickle.loads(pickle.dumps(shown))
        assert copy == shown
        assert (copy if shown is store else copy.store)._is_open
