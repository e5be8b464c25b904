"""Reads of files that are in the page cache, without a thread."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from icechunk.errors import ErrorKind, InvalidInputError, ObjectNotFoundError
from icechunk.storage.local import files, folders, syncs
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.port import ByteRange, Range, Suffix
from tests.raising import raises

pytestmark = pytest.mark.skipif(not files.TELLS_CACHED, reason="the system cannot tell what is in its page cache")

LARGEST = files._CACHED_BYTES


@pytest.fixture
async def storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path)
    await storage.put("chunks/small", b"0123456789")
    await storage.put("chunks/empty", b"")
    await storage.put("chunks/largest", bytes(LARGEST))
    await storage.put("chunks/larger", bytes(LARGEST + 1))
    return storage


@pytest.fixture
def threads(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The work that threads were given, in order."""
    given: list[Any] = []
    in_thread = storage._in_thread

    async def noted(work: Any, *arguments: Any) -> Any:
        given.append(work)
        return await in_thread(work, *arguments)

    monkeypatch.setattr(storage, "_in_thread", noted)
    return given


@pytest.mark.parametrize("byte_range", [None, Range(2, 5), Range(2, 50), Range(3), Suffix(4)])
async def test_an_answer_without_a_thread_is_the_answer_of_a_thread(
    storage: LocalStorage, threads: list[Any], byte_range: ByteRange
) -> None:
    found = await storage.get("chunks/small", byte_range)
    assert not threads
    expected = storage._get("chunks/small", byte_range)
    assert replace(found, date_us=None) == replace(expected, date_us=None)


@pytest.mark.parametrize(("name", "in_thread"), [("empty", 0), ("largest", 0), ("larger", 1)])
async def test_only_small_files_are_read_without_a_thread(
    storage: LocalStorage, threads: list[Any], name: str, in_thread: int
) -> None:
    at_once = storage.get_at_once(f"chunks/{name}")
    found = await storage.get(f"chunks/{name}")
    assert len(threads) == in_thread
    assert (at_once is None) == bool(in_thread)
    assert len(found.body) == found.size == (0 if name == "empty" else LARGEST + in_thread)


async def test_absent_objects_and_wrong_ranges_are_refused_without_a_thread(
    storage: LocalStorage, threads: list[Any]
) -> None:
    for key in ("absent", "chunks", "chunks/small/below"):
        with pytest.raises(ObjectNotFoundError):
            await storage.get(key)
        assert storage.get_at_once(key) is None
    with raises(InvalidInputError, ErrorKind.INVALID_BYTE_RANGE):
        await storage.get("chunks/small", Range(11, 12))
    assert storage.get_at_once("/no key") is None
    assert not threads


@pytest.mark.parametrize("answer", [BlockingIOError(errno.EAGAIN, "not cached"), 3])
async def test_bytes_that_are_not_in_the_cache_are_read_by_a_thread(
    storage: LocalStorage, threads: list[Any], monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    def preadv(descriptor: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        assert flags == os.RWF_NOWAIT
        if isinstance(answer, OSError):
            raise answer
        return int(answer)

    monkeypatch.setattr(os, "preadv", preadv)
    assert storage.get_at_once("chunks/small") is None
    for _ in range(2):
        assert (await storage.get("chunks/small")).body == b"0123456789"
    assert len(threads) == 2


async def test_a_file_system_that_does_not_tell_what_is_cached_is_asked_once(
    storage: LocalStorage, threads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def preadv(*arguments: Any) -> int:
        asked.append(arguments)
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "preadv", preadv)
    for _ in range(3):
        assert (await storage.get("chunks/small")).body == b"0123456789"
    with pytest.raises(ObjectNotFoundError):
        await storage.get("absent")
    assert len(asked) == 1
    assert len(threads) == 3


async def test_an_error_of_the_system_is_reported_as_by_a_thread(
    storage: LocalStorage, threads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def preadv(*arguments: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    assert (await storage.get("chunks/small")).body == b"0123456789"
    monkeypatch.undo()
    assert (await storage.get("chunks/small")).body == b"0123456789"


async def test_a_young_file_of_another_writer_is_settled_by_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await LocalStorage(tmp_path).put("repo", b"new")
    synced: list[str] = []

    def noted(path: str) -> None:
        synced.append(path)
        syncs.fsync_folder(path)

    monkeypatch.setattr(folders, "fsync_folder", noted)
    monkeypatch.setattr(folders, "_settled_ns", {})
    reader = LocalStorage(tmp_path)
    assert reader.get_at_once("repo") is None
    unsynced = reader.get_at_once("repo", unsynced=True)
    assert unsynced is not None
    assert unsynced.body == b"new"
    assert not synced
    assert (await reader.get("repo")).body == b"new"
    assert synced == [str(tmp_path)]
    found = reader.get_at_once("repo")
    assert found is not None
    assert found.body == b"new"
    assert len(synced) == 1


async def test_a_file_whose_name_is_in_doubt_is_not_returned_at_once(storage: LocalStorage) -> None:
    await storage.put("repo", b"new")
    storage._folders._durable_versions.clear()
    storage._folders._doubt(storage._root)
    assert storage.get_at_once("repo") is None
    assert storage.get_at_once("repo", unsynced=True) is None


async def test_a_few_objects_come_together_without_a_thread(storage: LocalStorage, threads: list[Any]) -> None:
    answers = await storage.get_all(["absent", "chunks/small", "chunks/empty"])
    assert [answer and answer.body for answer in answers] == [None, b"0123456789", b""]
    assert not threads
    answers = await storage.get_all(["absent", "chunks/larger", "chunks/small"])
    assert [answer and len(answer.body) for answer in answers] == [None, LARGEST + 1, 10]
    assert len(threads) == 1


async def test_a_folder_in_use_is_not_made_again_after_such_a_read(tmp_path: Path) -> None:
    await LocalStorage(tmp_path / "root").put("chunks/a", b"1")
    reader = LocalStorage(tmp_path / "root")
    assert reader.get_at_once("chunks/a") is not None
    assert reader._folders.in_use
