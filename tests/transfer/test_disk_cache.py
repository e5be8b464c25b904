from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk import EngineConfig, Repository, RepositoryConfig
from icechunk.config.repository import DEFAULT_DISK_CACHE_BYTES
from icechunk.config.serialise import config_from_dict, config_to_dict
from icechunk.errors import FormatError, InvalidInputError
from icechunk.format.envelope import FileType, seal
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.keys import chunk_key, manifest_key, snapshot_key
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Range, Suffix
from icechunk.testing.recording import RecordingStorage
from icechunk.transfer.disk_cache import CachedBytes, DiskCache, ObjectsOnDisk
from tests.raising import raises

KEY = chunk_key(ObjectId(b"c" * 12))
DATA = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def disk(tmp_path: Path) -> ObjectsOnDisk:
    return DiskCache.at(str(tmp_path / "cache"), 10_000_000).of("s3://bucket/a")


async def kept(tmp_path: Path, max_bytes: int = 10_000_000) -> None:
    """Wait until what was kept so far is on disk."""
    await asyncio.to_thread(DiskCache.at(str(tmp_path / "cache"), max_bytes).flush)


def files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 999), st.integers(1, 400)), max_size=8),
    st.lists(st.tuples(st.integers(0, 1100), st.integers(1, 600)), min_size=1, max_size=8),
)
async def test_ranges_come_back_if_all_their_bytes_were_kept(
    tmp_path_factory: pytest.TempPathFactory, put: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    data, known = DATA[:1000], np.zeros(1000, np.bool_)
    tmp_path = tmp_path_factory.mktemp("cache")
    disk = DiskCache.at(str(tmp_path / "cache"), 10_000_000).of("here")
    for start, length in put:
        part = data[start : start + length]
        disk.keep(KEY, Range(start, start + length), len(data), part)
        known[start : start + length] = True
    await kept(tmp_path)
    for start, length in asked:
        inside = known[start : start + length]
        wanted = CachedBytes(data[start : start + length], len(data)) if len(inside) and inside.all() else None
        assert await disk.read(KEY, Range(start, start + length)) == wanted
    assert await disk.read(KEY, None) == (CachedBytes(data, len(data)) if known.all() else None)


async def test_blocks_of_a_long_range_are_checked_and_read_alone(disk: ObjectsOnDisk, tmp_path: Path) -> None:
    disk.keep(KEY, None, len(DATA), DATA)
    await kept(tmp_path)
    for start, end in [(0, 1), (65_535, 65_537), (131_072, 262_144), (299_999, 300_000), (70_000, None)]:
        found = await disk.read(KEY, Range(start, end))
        assert found == CachedBytes(DATA[start:end], len(DATA))
    [file] = files(tmp_path)
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    assert await disk.read(KEY, Range(0, 65_536)) is not None
    assert await disk.read(KEY, Range(299_000, 300_000)) is None
    assert not files(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 40, 60, 2000])
async def test_a_file_that_was_cut_off_is_removed_and_counts_as_absent(
    disk: ObjectsOnDisk, tmp_path: Path, size: int
) -> None:
    disk.keep(KEY, Range(10, 5000), len(DATA), DATA[10:5000])
    await kept(tmp_path)
    [file] = files(tmp_path)
    os.truncate(file, size)
    assert await disk.read(KEY, Range(10, 20)) is None
    assert not files(tmp_path)


async def test_only_objects_that_never_change_are_kept(disk: ObjectsOnDisk, tmp_path: Path) -> None:
    id = ObjectId(b"s" * 12)
    old, new = (seal(FileType.SNAPSHOT, version, bytes(100)) for version in (1, 2))
    for key in ("repo", "refs/branch.main/ref.json", "log/x", "config.yaml", snapshot_key(FIRST_SNAPSHOT)):
        assert not disk.takes(key)
        disk.keep(key, None, 5, b"12345")
    disk.keep(snapshot_key(id), None, len(old), old)
    disk.keep(KEY, Suffix(5), 10, b"12345")
    await kept(tmp_path)
    assert not files(tmp_path)
    disk.keep(snapshot_key(id), None, len(new), new)
    disk.keep(manifest_key(id), None, 5, b"12345")
    await kept(tmp_path)
    assert len(files(tmp_path)) == 2
    assert await disk.read(snapshot_key(id), None) == CachedBytes(new, len(new))


async def test_a_repository_elsewhere_reads_nothing_of_this_one(disk: ObjectsOnDisk, tmp_path: Path) -> None:
    disk.keep(KEY, None, 5, b"12345")
    await kept(tmp_path)
    cache = DiskCache.at(str(tmp_path / "cache"), 10_000_000)
    assert await cache.of("s3://bucket/b").read(KEY, None) is None
    assert await cache.of("s3://bucket/a").read(KEY, None) == CachedBytes(b"12345", 5)


async def test_the_least_recently_used_files_go_when_the_cache_is_full(tmp_path: Path) -> None:
    disk = DiskCache.at(str(tmp_path / "cache"), 1_000_000).of("here")
    keys = [chunk_key(ObjectId(bytes([i]) * 12)) for i in range(40)]
    foreign = tmp_path / "cache" / "v1" / "notes.txt"
    foreign.write_text("not ours")
    for i, key in enumerate(keys):
        disk.keep(key, None, 50_000, DATA[:50_000])
        await kept(tmp_path, 1_000_000)
        for file in files(tmp_path):
            if file.stat().st_mtime > 1e9 and file != foreign:
                os.utime(file, (i, i))
    sizes = sum(file.stat().st_size for file in files(tmp_path))
    assert 400_000 < sizes <= 1_000_000 * (1 + 1 / 32) + 50_000
    assert await disk.read(keys[-1], None) is not None
    assert await disk.read(keys[0], None) is None
    assert foreign.read_text() == "not ours"


async def test_a_range_that_would_take_most_of_the_cache_is_not_kept(tmp_path: Path) -> None:
    disk = DiskCache.at(str(tmp_path / "cache"), 1_000_000).of("here")
    disk.keep(KEY, None, 100_000, DATA[:100_000])
    await kept(tmp_path, 1_000_000)
    assert not files(tmp_path)


HAMMER = """
import asyncio, sys
from icechunk.format.ids import ObjectId
from icechunk.format.keys import chunk_key
from icechunk.storage.port import Range
from icechunk.transfer.disk_cache import DiskCache

async def main(seed):
    disk = DiskCache.at(sys.argv[1], 400_000).of("here")
    found = 0
    for i in range(600):
        n = (i * 7 + seed) % 50
        key, data = chunk_key(ObjectId(bytes([n]) * 12)), bytes([n]) * 20_000
        got = await disk.read(key, Range(100, 9_000))
        if got is None:
            disk.keep(key, None, len(data), data)
        else:
            found += 1
            assert got.body == data[100:9_000] and got.size == len(data)
    print(found)

asyncio.run(main(int(sys.argv[2])))
"""


@pytest.mark.thorough
def test_processes_share_a_cache_that_is_always_full(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen([sys.executable, "-c", HAMMER, str(tmp_path), str(seed)], stdout=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    found = [int(run.communicate(timeout=120)[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert sum(found) > 0


FORKED = """
import asyncio, os, sys
from icechunk.format.ids import ObjectId
from icechunk.format.keys import chunk_key
from icechunk.transfer.disk_cache import DiskCache

cache = DiskCache.at(sys.argv[1], 10_000_000)
disk, key = cache.of("here"), chunk_key(ObjectId(bytes(12)))
disk.keep(key, None, 5, b"12345")
cache.flush()
assert asyncio.run(disk.read(key, None)).body == b"12345"
child = os.fork()
assert asyncio.run(disk.read(key, None)).body == b"12345"
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes of this system do not fork")
def test_the_child_of_a_fork_reads_too(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], timeout=60)
    assert done.returncode == 0


def config(tmp_path: Path) -> RepositoryConfig:
    return RepositoryConfig(engine=EngineConfig(disk_cache_path=str(tmp_path / "cache")))


@pytest.mark.parametrize("layout", ["log", "repo", "refs"])
async def test_a_second_process_reads_a_warm_array_without_requests_for_its_files(tmp_path: Path, layout: str) -> None:
    storage = MemoryStorage()
    data = np.random.default_rng(1).integers(0, 255, (40, 40), np.uint8)
    made = RepositoryConfig(inline_chunk_threshold_bytes=0, engine=EngineConfig(layout=layout))  # type: ignore[arg-type]
    async with await Repository.create_async(storage, made) as repo:
        session = await repo.writable_session_async("main")
        array = await zarr.api.asynchronous.create_array(
            session.store, name="a", shape=(40, 40), chunks=(7, 7), dtype="u1"
        )
        await array.setitem(slice(None), data)
        await session.commit_async("data")
    requests = []
    for _ in range(2):
        recording = RecordingStorage(storage)
        async with await Repository.open_async(recording, config(tmp_path)) as repo:
            session = await repo.readonly_session_async("main")
            read = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r")
            assert np.array_equal(await read.getitem(slice(None)), data)
            await kept(tmp_path, DEFAULT_DISK_CACHE_BYTES)
        requests.append([call.key for call in recording.requests if call.verb == "get"])
    chunks, manifests = ([key for key in requests[1] if key.startswith(part)] for part in ("chunks/", "manifests/"))
    assert [key for key in requests[0] if key.startswith("chunks/")]
    assert not chunks
    assert not manifests
    if layout != "refs":
        assert not [key for key in requests[1] if key.startswith("snapshots/")]


async def test_a_file_that_was_damaged_on_the_store_and_mended_is_read_again(tmp_path: Path) -> None:
    storage = MemoryStorage()
    async with await Repository.create_async(storage, RepositoryConfig(engine=EngineConfig(layout="repo"))) as repo:
        session = await repo.writable_session_async("main")
        await zarr.api.asynchronous.create_group(store=session.store, attributes={"a": 1})
        id = await session.commit_async("group")
    good = (await storage.get(f"snapshots/{id}")).data
    await storage.put(f"snapshots/{id}", good[:-9])
    with raises(FormatError, "invalid-file-format", id):
        async with await Repository.open_async(RecordingStorage(storage), config(tmp_path)) as repo:
            session = await repo.readonly_session_async("main")
            await zarr.api.asynchronous.open_group(store=session.store, mode="r")
    await storage.put(f"snapshots/{id}", good)
    async with await Repository.open_async(RecordingStorage(storage), config(tmp_path)) as repo:
        session = await repo.readonly_session_async("main")
        group = await zarr.api.asynchronous.open_group(store=session.store, mode="r")
        assert dict(group.attrs) == {"a": 1}


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1").chmod(0o777)
    with raises(InvalidInputError, "invalid-setting", str(tmp_path)):
        DiskCache.at(str(tmp_path), 1_000_000)


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_cache_that_others_may_change_is_refused(tmp_path: Path, mode: int) -> None:
    DiskCache.at(str(tmp_path), 1_000_000)
    (tmp_path / "v1").chmod(mode)
    with raises(InvalidInputError, "invalid-setting", str(tmp_path)):
        DiskCache.at(str(tmp_path), 1_000_000)


def test_a_folder_in_which_others_may_put_another_cache_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with raises(InvalidInputError, "invalid-setting", str(tmp_path)):
        DiskCache.at(str(tmp_path), 1_000_000)
    tmp_path.chmod(0o1777)
    DiskCache.at(str(tmp_path), 1_000_000)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with raises(InvalidInputError, "invalid-setting", str(tmp_path / "file")):
        DiskCache.at(str(tmp_path / "file"), 1_000_000)


def test_the_folder_is_the_readers_alone_to_name(tmp_path: Path) -> None:
    mine = config(tmp_path)
    assert config_to_dict(mine) == config_to_dict(RepositoryConfig())
    theirs = config_to_dict(RepositoryConfig()) | {"aioicechunk": {"disk_cache_path": "/etc", "put_memory_bytes": 5}}
    assert config_from_dict(theirs).engine == EngineConfig(put_memory_bytes=5)
    merged = config_from_dict(theirs).merge(mine).engine
    assert merged is not None
    assert merged.disk_cache_path == str(tmp_path / "cache")
