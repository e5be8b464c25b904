"""Closing ends, whatever the storage does."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from icechunk import Repository
from icechunk.log.repository import settle
from icechunk.log.repository.entries import layout as log_layout
from icechunk.log.repository.repo_object import layout as repo_layout
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import GetResult, PutResult, Storage
from icechunk.testing.wrapping import WrappingStorage


class Hanging(WrappingStorage):
    """Once it hangs, no request is answered, and none can be cancelled."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.hangs = False
        self.end = asyncio.Event()

    async def answer(self) -> None:
        while self.hangs and not self.end.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.end.wait()

    async def get(self, *args: Any, **kwargs: Any) -> GetResult:
        await self.answer()
        return await self.inner.get(*args, **kwargs)

    async def put(self, *args: Any, **kwargs: Any) -> PutResult:
        await self.answer()
        return await self.inner.put(*args, **kwargs)


@pytest.mark.parametrize("version", [None, 2, 1], ids=["log", "repo", "refs"])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "while committing"])
async def test_a_repository_whose_storage_hangs_is_closed_all_the_same(
    version: int | None, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (settle, log_layout, repo_layout):
        monkeypatch.setattr(module, "CLOSE_GRACE_S", 0.05)
    storage = Hanging(MemoryStorage())
    repo = await Repository.create_async(storage, spec_version=version)
    session = await repo.writable_session_async("main")
    await session.commit_async("first", allow_empty=True)
    session = await repo.writable_session_async("main")
    storage.hangs = True
    committing = None
    if busy:
        committing = asyncio.ensure_future(session.commit_async("second", allow_empty=True))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    closing = asyncio.ensure_future(repo.aclose())
    try:
        await asyncio.wait({closing}, timeout=5)
        assert closing.done()
    finally:
        storage.end.set()
    await closing
    if committing is not None:
        with contextlib.suppress(Exception):
            await committing
