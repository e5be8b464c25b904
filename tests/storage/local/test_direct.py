"""Writes past the page cache: the same bytes, and the usual way wherever there is no such way, or a slow one."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from icechunk.storage.buffers import Buffers
from icechunk.storage.local import direct as direct_module
from icechunk.storage.local import folders
from icechunk.storage.local.direct import BLOCK_BYTES, DirectWrites
from icechunk.storage.local.files import write_new
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.local.syncs import Promises
from icechunk.storage.port import ANY, Absent, Precondition, Put
from tests.promises import EXT4, EXT4_WITHOUT_JOURNAL, UNKNOWN
from tools.simulator.power_loss import Recorder

MIB = 1024 * 1024
BUFFERS = Buffers()

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no other system has such writes")


def contents(size: int, seed: int = 0) -> memoryview:
    """Bytes that differ from place to place, in memory that begins at a page."""
    memory = BUFFERS.take(size)
    pattern = bytes(range(seed % 251, 251)) + bytes(range(seed % 251))
    memory[:] = (pattern * (size // len(pattern) + 1))[:size]
    return memory


@pytest.fixture
def new_file(tmp_path: Path) -> Callable[[], int]:
    """Makes a file and opens it; skips where the file system knows no such writes."""
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("no such writes on this file system")
    return lambda: os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)


@pytest.mark.parametrize("size", [MIB, MIB + 1, 3 * MIB - 1, 9 * MIB + BLOCK_BYTES, 17 * MIB + 5])
def test_whole_blocks_are_written_from_the_start(new_file: Callable[[], int], size: int) -> None:
    data, file = contents(size), new_file()
    try:
        assert DirectWrites().write(file, data) == size - size % BLOCK_BYTES
        written = os.pread(file, size - size % BLOCK_BYTES, 0)
        assert written == data[: size - size % BLOCK_BYTES]
        # What follows is written the usual way, behind it.
        assert os.write(file, b"rest") == 4
        assert os.pread(file, 4, size - size % BLOCK_BYTES) == b"rest"
    finally:
        os.close(file)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(0, 3 * MIB), seed=st.integers(0, 250), offset=st.sampled_from([0, 1, 512, BLOCK_BYTES]))
def test_a_file_has_exactly_the_bytes(tmp_path: Path, size: int, seed: int, offset: int) -> None:
    data = contents(size + offset, seed)[offset:]
    path = tmp_path / "x"
    status = write_new(str(path), data, direct=DirectWrites())
    try:
        assert path.read_bytes() == data
        assert status.st_size == size
    finally:
        path.unlink()


@pytest.mark.parametrize(
    "data", [contents(MIB - 1), contents(2 * MIB)[1:], b"x" * 100], ids=["small", "not aligned", "tiny"]
)
def test_what_cannot_go_past_the_cache_is_left_to_the_caller(new_file: Callable[[], int], data: Any) -> None:
    file = new_file()
    try:
        assert DirectWrites().write(file, memoryview(data)) == 0
        assert os.fstat(file).st_size == 0
    finally:
        os.close(file)


@pytest.mark.parametrize("call", ["fcntl", "write"])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_where_the_system_declines_the_usual_way_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    module: Any = importlib.import_module("fcntl") if call == "fcntl" else os
    real = getattr(module, call)

    def declining(*arguments: Any) -> Any:
        if call == "write" or (len(arguments) > 2 and arguments[2] & os.O_DIRECT):
            monkeypatch.setattr(module, call, real)
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(module, call, declining)
    data = contents(2 * MIB + 7)
    status = write_new(str(tmp_path / "x"), data, direct=DirectWrites())
    assert (tmp_path / "x").read_bytes() == data
    assert status.st_size == len(data)


@pytest.mark.parametrize("count", [BLOCK_BYTES, 3 * BLOCK_BYTES + 5])
def test_a_write_that_is_cut_short_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    real = os.write

    def short(descriptor: int, data: Any) -> int:
        monkeypatch.setattr(os, "write", real)
        # Without the flag the system writes any number of bytes.
        direct_module._set(descriptor, on=False)
        return real(descriptor, data[:count])

    monkeypatch.setattr(os, "write", short)
    data = contents(2 * MIB + 7)
    write_new(str(tmp_path / "x"), data, direct=DirectWrites())
    assert (tmp_path / "x").read_bytes() == data


@pytest.mark.parametrize("call", ["write", "posix_fallocate"])
def test_a_failure_is_raised_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError) as raised:  # noqa: PT011
        write_new(str(tmp_path / "x"), contents(2 * MIB), direct=DirectWrites())
    assert raised.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_slow_medium_is_written_through_the_cache_for_a_while(
    new_file: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr(direct_module, "time", SimpleNamespace(perf_counter=lambda: now_s))
    real = os.write

    def slow(descriptor: int, data: Any) -> int:
        nonlocal now_s
        now_s += seconds
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", slow)
    writes, data = DirectWrites(), contents(2 * MIB)

    def written() -> int:
        file = new_file()
        try:
            return writes.write(file, data)
        finally:
            os.close(file)

    seconds = 0.001
    assert written() == len(data)
    seconds = 0.1
    assert written() == len(data)
    seconds = 0.001
    assert written() == 0
    now_s += 11
    assert written() == len(data)
    assert written() == len(data)


@pytest.mark.parametrize("precondition", [ANY, Absent()])
@pytest.mark.parametrize("promises", [EXT4, EXT4_WITHOUT_JOURNAL, UNKNOWN])
@pytest.mark.parametrize("bulk", [True, False])
async def test_only_bulk_goes_past_the_cache_of_file_systems_that_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precondition: Precondition, promises: Promises, bulk: bool
) -> None:
    asked: list[int] = []
    real = DirectWrites.write

    def write(self: DirectWrites, descriptor: int, data: memoryview) -> int:
        asked.append(len(data))
        return real(self, descriptor, data)

    monkeypatch.setattr(DirectWrites, "write", write)
    storage, data = LocalStorage(tmp_path / "r"), contents(2 * MIB + 1)
    monkeypatch.setattr(folders, "promises_of", lambda device: promises)
    await storage.put_unsynced([Put("chunks/a", data, precondition, bulk)])
    await storage.sync(["chunks/a"])
    assert bytes((await storage.get("chunks/a")).body) == data
    assert asked == ([len(data)] if bulk and promises is not UNKNOWN else [])


async def test_bytes_that_went_past_the_cache_are_handed_over_before_a_later_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "promises_of", lambda device: EXT4)
    storage, data = LocalStorage(tmp_path / "r"), contents(3 * MIB + 5)
    recorder = Recorder(tmp_path / "r")
    with recorder.recording():
        await storage.put_unsynced([Put("chunks/a", data, bulk=True)])
        await storage.barrier(["chunks/a"])
        await storage.put("repo", b"refers to it")
    events = recorder.events
    (file,) = {event.file for event in events if event.path == "chunks/a"}
    (named,) = [number for number, event in enumerate(events) if event.path == "repo" and event.verb == "name"]
    written = [n for n, event in enumerate(events) if event.verb == "write" and event.file == file]
    handed = [n for n, event in enumerate(events) if event.verb == "hand-over" and event.file == file]
    assert b"".join(events[n].data for n in written) == data
    assert len(written) > 1
    assert max(written) < handed[-1] < named
