"""The whole life of a repository in each layout, on a real object store."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.storage.s3.storage import S3Storage

pytestmark = [pytest.mark.minio, pytest.mark.timeout(120)]
LAYOUTS = {"log": None, "repo": 2, "refs": 1}


async def edit(session: icechunk.Session, row: int, value: int) -> None:
    array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r+")
    await array.setitem(row, value)


async def rows(repo: icechunk.Repository, **version: Any) -> list[int]:
    session = await repo.readonly_session_async(**(version or {"branch": "main"}))
    array = await zarr.api.asynchronous.open_array(store=session.store, path="a", mode="r")
    values = np.asarray(await array.getitem((slice(None), 0)))
    return [int(value) for value in values]


async def commit_row(repo: icechunk.Repository, row: int) -> str:
    session = await repo.writable_session_async("main")
    await edit(session, row, row)
    return await session.commit_async(f"row {row}", rebase_with=icechunk.ConflictDetector())


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_created_written_by_many_forked_amended_rearranged_converted_and_upgraded(
    layout: str, minio_storage: S3Storage
) -> None:
    repo = await icechunk.Repository.create_async(minio_storage, spec_version=LAYOUTS[layout])
    assert repo.layout == layout
    session = await repo.writable_session_async("main")
    await zarr.api.asynchronous.create_array(
        store=session.store, name="a", shape=(12, 600), chunks=(1, 600), dtype="i8", compressors=None, fill_value=-1
    )
    first = await session.commit_async("array")

    # Many writers of one branch, in three clients.
    clients = [repo, *[await icechunk.Repository.open_async(minio_storage) for _ in range(2)]]
    await asyncio.gather(*(commit_row(clients[row % 3], row) for row in range(8)))
    assert await rows(repo) == [*range(8), -1, -1, -1, -1]
    assert len([info async for info in repo.async_ancestry(branch="main")]) == 10

    # Workers with forks, merged into one commit.
    session = await repo.writable_session_async("main")
    forks = [session.fork() for _ in range(2)]
    for row, fork in enumerate(forks, 8):
        await edit(fork, row, row)
    await session.merge_async(*forks)
    forked = await session.commit_async("forks")

    await repo.create_tag_async("t", forked)
    await repo.create_branch_async("dev", first)
    session = await repo.writable_session_async("dev")
    await edit(session, 0, 77)
    dev = await session.commit_async("on dev")
    await repo.reset_branch_async("dev", first)
    await repo.delete_branch_async("dev")
    await repo.create_tag_async("gone", dev)
    await repo.delete_tag_async("gone")
    with pytest.raises(icechunk.AlreadyExistsError):
        await repo.create_tag_async("gone", dev)

    if layout == "refs":
        upgraded = await icechunk.upgrade_icechunk_repository_async(repo, dry_run=False)
        assert await rows(upgraded) == [*range(10), -1, -1]
        repo = upgraded
    for target in ("log", "repo", "log"):
        await repo.convert_async(target)
        await commit_row(repo, 10)
    session = await repo.writable_session_async("main")
    await edit(session, 11, 11)
    await session.amend_async("amended")
    session = await repo.rearrange_session_async("main")
    await session.move_async("/a", "/b")
    await session.move_async("/b", "/a")
    await session.commit_async("there and back", allow_empty=True)

    for client in clients[1:]:
        await client.aclose()
    await repo.aclose()
    again = await icechunk.Repository.open_async(minio_storage)
    assert await rows(again) == list(range(12))
    assert await rows(again, tag="t") == [*range(10), -1, -1]
    assert await again.list_branches_async() == {"main"}
    assert await again.list_tags_async() == {"t"}
    await again.aclose()
