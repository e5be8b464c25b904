"""A folder that was removed from outside stays removed."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from icechunk.errors import ErrorKind, ObjectNotFoundError, StorageError
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.port import ANY, Absent, Matches, Precondition
from tests.raising import raises


@pytest.mark.parametrize("used_by", ["put", "get", "head"])
@pytest.mark.parametrize("precondition", [ANY, Absent()], ids=["any", "absent"])
async def test_a_root_that_was_in_use_is_not_made_again(
    tmp_path: Path, used_by: str, precondition: Precondition
) -> None:
    root = tmp_path / "root"
    storage = LocalStorage(root)
    await storage.put("a/x", b"1")
    if used_by != "put":
        storage = LocalStorage(root)
        await getattr(storage, used_by)("a/x")
    shutil.rmtree(root)
    for key in ("a/y", "b/y", "y"):
        with raises(StorageError, "io", storage.describe(), "removed") as caught:  # words: the reason
            await storage.put(key, b"1", precondition)
        assert (caught.value.kind, caught.value.refused) == (ErrorKind.IO, True)
    assert not root.exists()
    with pytest.raises(ObjectNotFoundError):
        await storage.get("a/x")
    assert (await storage.delete(["a/x"])).deleted == 1
    assert not root.exists()


async def test_replacing_does_not_bring_a_root_back(tmp_path: Path) -> None:
    root = tmp_path / "root"
    storage = LocalStorage(root)
    version = (await storage.put("x", b"1")).version
    shutil.rmtree(root)
    with pytest.raises(StorageError):
        await storage.put("x", b"2", Matches(version))
    assert not root.exists()


async def test_a_copy_of_the_storage_in_another_process_is_not_written_to_either(tmp_path: Path) -> None:
    root = tmp_path / "root"
    storage = LocalStorage(root)
    await storage.put("x", b"1")
    copy = pickle.loads(pickle.dumps(storage))
    shutil.rmtree(root)
    with raises(StorageError, "io", storage.describe(), "removed"):  # words: the reason
        await copy.put("y", b"1")
    assert not root.exists()


async def test_a_folder_in_use_is_not_made_again_below_another_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    storage = LocalStorage(root)
    await storage.put("log/epoch/1", b"1")
    shutil.rmtree(root)
    await LocalStorage(root).put("log/another/1", b"1")
    with raises(StorageError, "io", storage.describe(), "removed") as caught:  # words: the reason
        await storage.put("log/epoch/2", b"2", Absent())
    assert caught.value.refused
    assert not (root / "log" / "epoch").exists()


async def test_an_empty_folder_that_was_never_used_may_come_and_go(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "root")
    await storage.put("x", b"1")
    with pytest.raises(ObjectNotFoundError):
        await storage.get("a/x")
    await storage.put("a/x", b"1")
    assert (tmp_path / "root" / "a" / "x").read_bytes() == b"1"


async def test_a_new_repository_may_be_made_there(tmp_path: Path) -> None:
    root = tmp_path / "root"
    storage = LocalStorage(root)
    await storage.put("x", b"1")
    shutil.rmtree(root)
    await storage.prepare(["a", "b/c"])
    assert (root / "b" / "c").is_dir()
    await storage.put("x", b"2")
    assert (root / "x").read_bytes() == b"2"
