"""The store's synchronous calls, which zarr's fused codec pipeline makes from threads without a loop."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

import icechunk
from icechunk import IcechunkStore, InvalidInputError, ReadOnlyError, Repository, RepositoryConfig, StorageError
from icechunk.storage.port import Storage
from icechunk.testing.recording import RecordingStorage

CHUNK = 2000
FUSED = "zarr.core.codec_pipeline.FusedCodecPipeline"
RANGES = [None, RangeByteRequest(3, 9), OffsetByteRequest(1990), SuffixByteRequest(7), RangeByteRequest(1998, 3000)]


@pytest.fixture(params=["memory", "local", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return icechunk.local_filesystem_storage(str(tmp_path / "repo"))
    memory = icechunk.in_memory_storage()
    return memory if request.param == "memory" else RecordingStorage(memory, turns=1)


@pytest.fixture
def repo(storage: Storage) -> Repository:
    return Repository.create(storage, config=RepositoryConfig(inline_chunk_threshold_bytes=100))


@pytest.fixture
def fused() -> Iterator[None]:
    if not hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
        pytest.skip("this zarr has no fused pipeline")
    with zarr.config.set({"codec_pipeline.path": FUSED, "threading.max_workers": 4}):
        yield


def buffer(data: bytes) -> Any:
    return default_buffer_prototype().buffer.from_bytes(data)


def get(store: IcechunkStore, key: str, byte_range: Any = None) -> bytes | None:
    found = store.get_sync(key, byte_range=byte_range)
    return None if found is None else found.to_bytes()


def test_values_are_the_same_before_and_after_the_commit(repo: Repository) -> None:
    session = repo.writable_session("main")
    store = session.store
    zarr.create_array(store, name="a", shape=(6 * CHUNK,), chunks=(CHUNK,), dtype="u1", compressors=None)
    values = {"a/c/0": b"inline" * 10, "a/c/1": bytes(range(200)) * 10, "a/c/3": b"\x07" * CHUNK}
    for key, data in values.items():
        store.set_sync(key, buffer(data))
    store.set_sync("a/c/4", buffer(b"gone" * 500))
    store.delete_sync("a/c/4")
    store.delete_sync("a/c/5")
    store.set_sync("g/zarr.json", buffer(b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'))
    snapshot = None
    for _ in range(2):
        for key in ("a/c/0", "a/c/1", "a/c/2", "a/c/3", "a/c/4", "a/c/5"):
            for byte_range in RANGES:
                whole = values.get(key)
                expected = None if whole is None else _part(whole, byte_range)
                assert get(store, key, byte_range) == expected
        assert b'"group"' in (get(store, "g/zarr.json") or b"")
        assert get(store, "none/zarr.json") is None
        snapshot = snapshot or session.commit("values")
        store = Repository.open(repo.storage).readonly_session(snapshot_id=snapshot).store


def _part(data: bytes, byte_range: Any) -> bytes:
    match byte_range:
        case RangeByteRequest(start, end):
            return data[start:end]
        case OffsetByteRequest(offset):
            return data[offset:]
        case SuffixByteRequest(suffix):
            return data[-suffix:]
    return data


def test_errors_are_those_of_the_asynchronous_calls(repo: Repository) -> None:
    session = repo.writable_session("main")
    zarr.create_array(session.store, name="a", shape=(10,), chunks=(5,), dtype="u1")
    session.commit("an array")
    reader = repo.readonly_session("main").store
    with pytest.raises(ReadOnlyError):
        reader.set_sync("a/c/0", buffer(b"x"))
    with pytest.raises(ReadOnlyError):
        reader.delete_sync("a/c/0")
    writer = repo.writable_session("main").store
    with pytest.raises(InvalidInputError) as caught:
        writer.set_sync("a/c/7", buffer(b"x"))
    assert caught.value.kind == icechunk.ErrorKind.INVALID_CHUNK_INDEX
    with pytest.raises(TypeError):
        writer.set_sync("a/c/0", b"x")  # type: ignore[arg-type]


def test_threads_without_a_loop_fill_packs(repo: Repository) -> None:
    session = repo.writable_session("main")
    store = session.store
    count = 1500
    zarr.create_array(store, name="a", shape=(count * 16384,), chunks=(16384,), dtype="u1", compressors=None)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.set_sync(f"a/c/{n}", buffer(n.to_bytes(2, "little") * 8192)), range(count)))
        session.commit("packed")
        reader = repo.readonly_session("main").store
        found = list(pool.map(lambda n: get(reader, f"a/c/{n}"), range(count)))
    assert all(data == n.to_bytes(2, "little") * 8192 for n, data in enumerate(found))


def test_only_stores_that_answer_at_once_say_so(repo: Repository) -> None:
    at_once = not isinstance(repo.storage, RecordingStorage)
    assert repo.readonly_session("main").store._supports_sync_io == at_once  # private: zarr asks for it


@pytest.mark.parametrize("shards", [None, (400,)])
@pytest.mark.usefixtures("fused")
def test_arrays_through_the_fused_pipeline(repo: Repository, shards: tuple[int] | None) -> None:
    data = np.random.default_rng(1).integers(0, 1000, 4010).astype("i4")
    session = repo.writable_session("main")
    array = zarr.create_array(session.store, name="a", shape=data.shape, chunks=(100,), shards=shards, dtype="i4")
    array[:] = data
    data[150:333] = array[150:333] = 7
    data[800:1200] = array[800:1200] = 0  # chunks of fill values are deleted
    np.testing.assert_array_equal(array[:], data)
    session.commit("an array")
    found = zarr.open_array(Repository.open(repo.storage).readonly_session("main").store, path="a", mode="r")
    np.testing.assert_array_equal(found[:], data)
    np.testing.assert_array_equal(found.oindex[np.array([5, 399, 401, 4009])], data[[5, 399, 401, 4009]])


@pytest.mark.parametrize("seed", range(3))
def test_a_read_only_session_answers_repeated_reads_as_the_asynchronous_calls_do(repo: Repository, seed: int) -> None:
    chance = random.Random(seed)
    session = repo.writable_session("main")
    grid, path = (5, 7), "g/a"
    for name in (path, "b"):
        zarr.create_array(session.store, name=name, shape=(50, 70), chunks=(10, 10), dtype="i4", compressors=None)
    for coords in itertools.product(*map(range, grid)):
        # inline, in a pack, or absent
        size = chance.choice([0, 50, 5000])
        if size:
            session.store.set_sync(f"{path}/c/{coords[0]}/{coords[1]}", buffer(chance.randbytes(size)))
    session.store.set_sync("b/c/0/0", buffer(bytes(100)))
    session.commit("two arrays")
    shrunk = repo.writable_session("main")
    zarr.open_array(shrunk.store, path=path, mode="r+").resize((33, 70))
    shrunk.commit("its rows 4 and 5 are outside of the grid")
    sessions = [session, shrunk, *(repo.readonly_session(snapshot_id=s.snapshot_id) for s in (session, shrunk))]
    for which in sessions:
        store = which.store
        for turn in range(120):
            key = "b/c/0/0" if turn % 40 == 39 else f"{path}/c/{chance.randrange(6)}/{chance.randrange(8)}"
            asked = chance.choice(RANGES) if turn % 3 else None
            expected = sync(store.get(key, default_buffer_prototype(), asked))
            assert get(store, key, asked) == (None if expected is None else expected.to_bytes()), key
        assert get(store, f"{path}/c/0") is None
        assert get(store, f"{path}/c/0/0/0") is None
        assert get(store, f"{path}/c") is None


def test_a_chunk_that_is_gone_is_an_error_of_repeated_reads_too() -> None:
    storage = icechunk.in_memory_storage()
    repo = Repository.create(storage)
    session = repo.writable_session("main")
    zarr.create_array(session.store, name="a", shape=(CHUNK,), chunks=(CHUNK,), dtype="u1", compressors=None)
    session.store.set_sync("a/c/0", buffer(b"\x07" * CHUNK))
    session.commit("one chunk")
    store = repo.readonly_session("main").store
    for _ in range(40):
        assert get(store, "a/c/0") == b"\x07" * CHUNK
    sync(storage.delete([item.key for item in sync(_listed(storage, "chunks/"))]))
    with pytest.raises(StorageError) as caught:
        get(store, "a/c/0")
    assert caught.value.kind == icechunk.ErrorKind.OBJECT_NOT_FOUND


async def _listed(storage: Storage, prefix: str) -> list[Any]:
    return [item async for page in storage.list_pages(prefix) for item in page]
