"""Symbolic links below the root: a repository made by another person leads nowhere out of its folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from icechunk.errors import ErrorKind, StorageError
from icechunk.storage.local.files import temporary_name
from icechunk.storage.local.storage import RESERVED, LocalStorage
from icechunk.storage.port import ANY, Absent, Matches, Precondition
from tests.raising import raises


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of another program, with an old file under a name that a temporary file of ours could have."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in (temporary_name(), "precious"):
        (folder / name).write_bytes(b"precious")
        os.utime(folder / name, (1, 1))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_unfinished_files_are_not_looked_for_behind_a_link(root: Path, outside: Path) -> None:
    before = contents(outside)
    (root / RESERVED).symlink_to(outside)
    with raises(StorageError, "io", repr(str(root / RESERVED))) as caught:
        await LocalStorage(root).put("x", b"1")
    assert (caught.value.kind, caught.value.refused) == (ErrorKind.IO, True)
    assert contents(outside) == before
    assert os.listdir(root) == [RESERVED]


@pytest.mark.parametrize("precondition", [ANY, Absent()], ids=["any", "absent"])
@pytest.mark.parametrize("linked", ["a", "a/b"])
async def test_nothing_is_written_behind_a_link(
    root: Path, outside: Path, linked: str, precondition: Precondition
) -> None:
    before = contents(outside)
    (root / "a").mkdir() if linked != "a" else None
    (root / linked).symlink_to(outside)
    with raises(StorageError, "io", repr(str(root / linked))) as caught:
        await LocalStorage(root).put(f"{linked}/new", b"1", precondition)
    assert caught.value.refused
    assert contents(outside) == before
    assert os.listdir(root / RESERVED) == []


async def test_nothing_is_replaced_behind_a_link(root: Path, outside: Path) -> None:
    before = contents(outside)
    (root / "a").symlink_to(outside)
    storage = LocalStorage(root)
    version = (await storage.get("a/precious")).version
    with raises(StorageError, "io", repr(str(root / "a"))):
        await storage.put("a/precious", b"1", Matches(version))
    assert contents(outside) == before


async def test_nothing_is_deleted_behind_a_link(root: Path, outside: Path) -> None:
    before = contents(outside)
    (root / "a").symlink_to(outside)
    storage = LocalStorage(root)
    await storage.put("x", b"1")
    found = await storage.delete(["a/precious", "x"])
    assert (found.deleted, [key for key, _ in found.failures]) == (1, ["a/precious"])
    assert contents(outside) == before


async def test_a_link_under_an_objects_name_is_replaced_and_deleted_itself(root: Path, outside: Path) -> None:
    before = contents(outside)
    storage = LocalStorage(root)
    for name in ("replaced", "deleted"):
        (root / name).symlink_to(outside / "precious")
    await storage.put("replaced", b"1")
    await storage.delete(["deleted"])
    assert contents(outside) == before
    assert (root / "replaced").read_bytes() == b"1"
    assert "deleted" not in os.listdir(root)


async def test_the_lock_is_no_link(root: Path, outside: Path) -> None:
    storage = LocalStorage(root)
    version = (await storage.put("x", b"1")).version
    (root / RESERVED / "lock").symlink_to(outside / "made")
    with raises(StorageError, "io", os.strerror(errno.ELOOP)) as caught:
        await storage.put("x", b"2", Matches(version))
    assert caught.value.refused
    assert not (outside / "made").exists()


async def test_the_root_itself_may_be_a_link(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "here").symlink_to(outside)
    storage = LocalStorage(tmp_path / "here")
    await storage.put("a/x", b"1")
    assert (outside / "a" / "x").read_bytes() == b"1"
