"""New files: their bytes are what was given, whichever way they took."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from icechunk.storage.local import writing
from icechunk.storage.local.writing import write_new

MIB = 1024 * 1024
SIZES = [0, 1, 4096, MIB - 1, MIB, MIB + 1, MIB + 4096, 2 * MIB + 4097, 5 * MIB]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has O_DIRECT")


class Writes:
    """Passes writes on and notes how each went: bytes, and whether past the page cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, refused: int | None = None, most: int | None = None) -> None:
        import fcntl

        self.seen: list[tuple[int, bool]] = []
        real = os.write

        def write(descriptor: int, data: Any) -> int:
            direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
            if direct and refused is not None:
                raise OSError(refused, os.strerror(refused))
            count = real(descriptor, data if most is None or not direct else data[:most])
            self.seen.append((count, direct))
            return count

        monkeypatch.setattr(os, "write", write)

    def count(self, *, direct: bool) -> int:
        return sum(count for count, how in self.seen if how is direct)


def has_direct(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    finally:
        (folder / "probe").unlink(missing_ok=True)
    return True


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_the_file_is_what_was_given(tmp_path: Path, size: int, kind: Any) -> None:
    # Views begin where they like.
    data = kind(os.urandom(size + 3))[3:]
    status = write_new(str(tmp_path / "x"), data)
    assert (tmp_path / "x").read_bytes() == data
    assert (status.st_size, status.st_mtime_ns) == (size, os.stat(tmp_path / "x").st_mtime_ns)


@linux_only
def test_whole_blocks_of_large_files_go_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_direct(tmp_path):
        pytest.skip("the file system of the test's folder has no O_DIRECT")
    writes = Writes(monkeypatch)
    write_new(str(tmp_path / "large"), bytes(2 * MIB + 4096 + 5))
    assert (writes.count(direct=True), writes.count(direct=False)) == (2 * MIB + 4096, 5)
    write_new(str(tmp_path / "small"), bytes(MIB - 1))
    assert writes.count(direct=False) == 5 + MIB - 1


@linux_only
@pytest.mark.parametrize("way", ["flag", "write", "short"])
def test_where_the_file_system_declines_the_usual_way_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    data = os.urandom(3 * MIB + 7)
    if way == "flag":
        import fcntl

        real = fcntl.fcntl

        def refuse(descriptor: int, command: int, flags: int = 0) -> Any:
            if command == fcntl.F_SETFL and flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(descriptor, command, flags)

        monkeypatch.setattr(fcntl, "fcntl", refuse)
    else:
        Writes(monkeypatch, refused=errno.EINVAL if way == "write" else None, most=4096)
    write_new(str(tmp_path / "x"), data)
    assert (tmp_path / "x").read_bytes() == data


@linux_only
def test_other_errors_are_passed_on_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_direct(tmp_path):
        pytest.skip("the file system of the test's folder has no O_DIRECT")
    Writes(monkeypatch, refused=errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        write_new(str(tmp_path / "x"), bytes(2 * MIB))
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


@linux_only
def test_a_forked_child_has_memory_of_its_own() -> None:
    piece = writing._thread_piece()
    piece[:1] = b"a"
    child = os.fork()
    if not child:
        writing._thread_piece()[:1] = b"b"
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(piece[:1]) == b"a"
