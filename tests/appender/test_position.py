"""Positions of sources whose record may have expired: asked for, never guessed."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import zarr.api.asynchronous as azarr

import icechunk
from icechunk.errors import SessionStateError
from tests.appender.test_appender import new_repo, rows, stored


async def with_expired_records(spec_version: int | None) -> icechunk.Repository:
    """A repository with three rows, in which another writer's commits came last, and older ones have expired."""
    repo = await new_repo(spec_version)
    for source in "ab":
        async with repo.appender("main", dim="time", source=source, group=source) as appender:
            await appender.put(rows(0, 3), offset=7)
    for name in ("g", "h"):
        session = await repo.writable_session_async("main")
        await azarr.create_group(store=session.store, path=name)
        await session.commit_async(name)
    await repo.expire_snapshots_async(datetime.now(UTC))
    return repo


@pytest.mark.parametrize("spec_version", [None, 2])
async def test_a_position_that_has_expired_is_asked_for(spec_version: int | None) -> None:
    repo = await with_expired_records(spec_version)
    with pytest.raises(SessionStateError):
        async with repo.appender("main", dim="time", source="a", group="a"):
            pass
    async with repo.appender("main", dim="time", source="a", group="a", begin_at=7) as appender:
        assert appender.position == 7
        assert await appender.put(rows(0, 3), offset=7) == "skipped"
        await appender.put(rows(3), offset=8)
    assert await stored(repo, "a") == [0, 1, 2, 3]
    async with repo.appender("main", dim="time", source="a", group="a") as appender:
        assert appender.position == 8
    # The new record has one source; whether there were others is still not known.
    with pytest.raises(SessionStateError):
        async with repo.appender("main", dim="time", source="b", group="b"):
            pass
    async with repo.appender("main", dim="time", source="c", group="c", begin_at=-1, gaps="error") as appender:
        await appender.put(rows(0), offset=0)
    with pytest.raises(SessionStateError):
        async with repo.appender("main", dim="time", source="b", group="b"):
            pass


async def test_an_expiration_that_leaves_the_record_changes_nothing() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="a") as appender:
        await appender.put(rows(0), offset=0, durable=True)
        await appender.put(rows(1), offset=1)
    await repo.expire_snapshots_async(datetime.now(UTC))
    async with repo.appender("main", dim="time", source="a") as appender:
        assert appender.position == 1
    async with repo.appender("main", dim="time", source="b", group="b") as appender:
        assert appender.position is None


async def test_an_appender_whose_record_expires_ends() -> None:
    repo = await new_repo()
    async with repo.appender("main", dim="time", source="a", group="a") as appender:
        await appender.put(rows(0), offset=0, durable=True)
        session = await repo.writable_session_async("main")
        await azarr.create_group(store=session.store, path="g")
        await session.commit_async("g")
        await repo.expire_snapshots_async(datetime.now(UTC))
        await appender.put(rows(1), offset=1)
        with pytest.raises(SessionStateError):
            await appender.flush()


@pytest.mark.parametrize("spec_version", [None, 2, 1])
async def test_a_repository_with_history_and_without_records_is_begun_at_the_start(spec_version: int | None) -> None:
    repo = await new_repo(spec_version)
    for name in ("g", "h"):
        session = await repo.writable_session_async("main")
        await azarr.create_group(store=session.store, path=name)
        await session.commit_async(name)
    for source, position in (("a", None), ("a", 7), ("b", None)):
        async with repo.appender("main", dim="time", source=source, group=source) as appender:
            assert appender.position == position
            if position is None:
                await appender.put(rows(0, 3), offset=7)
    assert await stored(repo, "a") == await stored(repo, "b") == [0, 1, 2]
