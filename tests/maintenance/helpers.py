"""Repositories with a history, and storages in which time has passed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.config import EngineConfig
from icechunk.storage.port import ObjectInfo, Storage
from icechunk.testing.wrapping import WrappingStorage

LAYOUTS = [(None, "log"), (2, "repo"), (1, "refs")]
by_layout = pytest.mark.parametrize("version", [case[0] for case in LAYOUTS], ids=[case[1] for case in LAYOUTS])
FOLDERS = ("snapshots", "transactions", "manifests", "chunks")


def ago(**units: float) -> datetime:
    return datetime.now(UTC) - timedelta(**units)


class AgedStorage(WrappingStorage):
    """Everything in it was written two days before it was."""

    async def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        async for page in self.inner.list_pages(prefix, start_after=start_after, page_size=page_size):
            yield [replace(info, modified_us=info.modified_us - 2 * 86_400_000_000) for info in page]


class History:
    """A repository with one array of ten chunks, each commit of which changes some of them."""

    def __init__(self, repo: icechunk.Repository) -> None:
        self.repo = repo
        self.values: dict[str, np.ndarray] = {}
        self.ids: dict[str, str] = {}

    @classmethod
    async def create(cls, storage: Storage, version: int | None, **engine: Any) -> History:
        config = icechunk.RepositoryConfig.default()
        config.inline_chunk_threshold_bytes = 0
        config.engine = EngineConfig(**({"pack_threshold_bytes": 0, "max_refs_per_manifest": 1 << 20} | engine))
        repo = await icechunk.Repository.create_async(storage, config, spec_version=version)
        history = cls(repo)
        session = await repo.writable_session_async("main")
        array = await zarr.api.asynchronous.create_array(
            store=session.store, name="a", shape=(20,), chunks=(2,), dtype="i4", compressors=None, fill_value=-1
        )
        values = np.arange(20, dtype="i4")
        await array.setitem(slice(None), values)
        history.ids["first"] = first = await session.commit_async("first")
        history.values[first] = values
        return history

    async def commit(self, name: str, chunk: int, *, branch: str = "main", how: str = "commit") -> str:
        """Change one chunk, and remember what is in the array now."""
        session = await self.repo.writable_session_async(branch)
        array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r+")
        value = 1000 + len(self.values)
        values = self.values[session.snapshot_id].copy()
        values[2 * chunk : 2 * chunk + 2] = value
        await array.setitem(slice(2 * chunk, 2 * chunk + 2), value)
        snapshot: str = await getattr(session, f"{how}_async")(name)
        self.ids[name] = snapshot
        self.values[snapshot] = values
        return snapshot

    async def names(self, **ref: str) -> list[str]:
        """Ancestry, newest first, by the names given here; ``root`` is the first snapshot."""
        known = {id: name for name, id in self.ids.items()}
        return [known.get(info.id, "root") async for info in self.repo.async_ancestry(**(ref or {"branch": "main"}))]

    async def check(self, snapshots: set[str] | None = None) -> None:
        """Everything that branches and tags reach reads back, through a repository that knows nothing yet."""
        repo = await icechunk.Repository.open_async(self.repo.storage)
        refs = [{"branch": name} for name in await repo.list_branches_async()]
        refs += [{"tag": name} for name in await repo.list_tags_async()]
        reached = {info.id async for info in _ancestries(repo, refs)} & set(self.values)
        for id in reached:
            np.testing.assert_array_equal(await read(repo, snapshot_id=id), self.values[id])
        if snapshots is not None:
            assert {name for name, id in self.ids.items() if id in reached} == snapshots
        await repo.aclose()


async def _ancestries(repo: icechunk.Repository, refs: list[dict[str, str]]) -> AsyncIterator[icechunk.SnapshotInfo]:
    for ref in refs:
        async for info in repo.async_ancestry(**ref):
            yield info


async def read(repo: icechunk.Repository, **version: Any) -> np.ndarray:
    session = await repo.readonly_session_async(**(version or {"branch": "main"}))
    array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r")
    return np.asarray(await array.getitem(slice(None)))


async def sizes(storage: Storage) -> dict[str, int]:
    """Bytes of every object that a collection may look at, by key."""
    return {
        info.key: info.size for folder in FOLDERS async for page in storage.list_pages(f"{folder}/") for info in page
    }


def folders(keys: object) -> dict[str, int]:
    """Number of the keys in each folder."""
    return {folder: sum(key.startswith(f"{folder}/") for key in keys) for folder in FOLDERS}  # type: ignore[attr-defined]
