"""New files have the bytes that were given, and the medium begins on them early; pages of a listing look at few files.

The contents of a listing are in the contract of all storages.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from icechunk.storage.local import files, syncs
from icechunk.storage.local.files import walk, write_new

MIB = 1024 * 1024
SIZES = [0, 1, 4096, MIB - 1, MIB, MIB + 1, MIB + 4096, 2 * MIB + 4097, 5 * MIB]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has sync_file_range")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [bytes, memoryview])
@pytest.mark.parametrize("finish", [None, syncs.fsync_file, syncs.hand_over])
def test_the_file_has_the_given_bytes(tmp_path: Path, size: int, kind: Any, finish: Any) -> None:
    # Views begin where they like.
    data = kind(os.urandom(size + 3))[3:]
    status = write_new(str(tmp_path / "x"), data, finish=finish)
    assert (tmp_path / "x").read_bytes() == data
    assert (status.st_size, status.st_mtime_ns) == (size, os.stat(tmp_path / "x").st_mtime_ns)


@pytest.mark.parametrize("most", [MIB, 1000])
def test_a_large_file_is_sent_to_the_medium_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    started: list[tuple[int, int]] = []
    real = os.write

    def start(descriptor: int, begin: int, count: int, flags: int) -> int:
        assert os.fstat(descriptor).st_size == begin + count
        started.append((begin, begin + count))
        return -1

    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:most]))
    monkeypatch.setattr(syncs, "_sync_file_range", lambda: start)
    data = os.urandom(2 * MIB + 5)
    write_new(str(tmp_path / "x"), data)
    assert (tmp_path / "x").read_bytes() == data
    assert (started[0][0], started[-1][1]) == (0, len(data))
    assert [begin for begin, _ in started[1:]] == [end for _, end in started[:-1]]
    assert len(started) == 3


@linux_only
def test_the_system_has_the_call() -> None:
    assert syncs._sync_file_range() is not None


def test_a_file_is_finished_when_it_has_all_bytes(tmp_path: Path) -> None:
    sizes: list[int] = []
    write_new(str(tmp_path / "x"), b"12", finish=lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    assert sizes == [2]


@pytest.mark.parametrize("size", [10, 2 * MIB])
def test_a_file_that_cannot_be_written_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def fail(descriptor: int, data: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))):
        write_new(str(tmp_path / "x"), bytes(size))
    assert os.listdir(tmp_path) == []


def test_a_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    write_new(str(tmp_path / "x"), b"old")
    with pytest.raises(FileExistsError):
        write_new(str(tmp_path / "x"), b"new")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_threads_at_once_do_not_mix_their_bytes(tmp_path: Path) -> None:
    contents = [bytes([n]) * (3 * MIB + n) for n in range(8)]
    threads = [
        threading.Thread(target=write_new, args=(str(tmp_path / str(n)), content)) for n, content in enumerate(contents)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(tmp_path / str(n)).read_bytes() for n in range(8)] == contents


def test_only_files_of_the_pages_that_are_asked_for_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(300):
        (tmp_path / "log" / f"{i:04}").parent.mkdir(exist_ok=True)
        (tmp_path / "log" / f"{i:04}").write_bytes(b"x")
    looked: list[str] = []
    real = files.try_stat

    def look(path: str) -> object:
        looked.append(path)
        return real(path)

    monkeypatch.setattr(files, "try_stat", look)
    keys = [info.key for info in itertools.islice(walk(str(tmp_path), "log/", None), 5)]
    assert keys == [f"log/{i:04}" for i in range(5)]
    assert len(looked) == 5


def test_names_that_are_no_keys_and_the_reserved_folder_are_left_out(tmp_path: Path) -> None:
    for name in ("b", "a-b", "a/b", "a/.aioicechunk", ".aioicechunk/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [info.key for info in walk(str(tmp_path), "", None)] == ["a-b", "a/.aioicechunk", "a/b", "b"]
    assert [info.key for info in walk(str(tmp_path), "a", "a-b")] == ["a/.aioicechunk", "a/b"]


def _fail_with(code: int) -> Any:
    def fail(one: str, other: str) -> bool:
        raise OSError(code, os.strerror(code), other)

    return fail


@pytest.mark.parametrize(
    "exchange", [files._exchange, lambda one, other: False, _fail_with(errno.EIO)], ids=["here", "absent", "failing"]
)
def test_a_file_replaces_another_wherever_names_can_be_exchanged_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: Any
) -> None:
    monkeypatch.setattr(files, "_exchange", exchange)
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_bytes(b"new")
    old.write_bytes(b"old")
    with open(old, "rb") as reader:
        files.replace_lazily(str(new), str(old))
        assert reader.read() == b"old"
    assert old.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["old"]


@linux_only
def test_a_file_that_replaces_another_takes_its_place_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_bytes(b"old")
    old.write_bytes(b"new")
    if not files._exchange(str(new), str(old)):
        pytest.skip("names cannot be exchanged on this file system")
    real = os.unlink

    def unlink(path: str) -> None:
        assert (new.read_bytes(), old.read_bytes()) == (b"old", b"new")
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.delattr(os, "replace")
    files.replace_lazily(str(new), str(old))
    assert os.listdir(tmp_path) == ["old"]
