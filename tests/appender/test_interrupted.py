"""Calls of an appender that are cancelled or fail on the way: the rows are stored once, or not at all."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import zarr.api.asynchronous as azarr

import icechunk
from icechunk.appender.target import Target
from icechunk.errors import InvalidInputError, StorageError
from icechunk.session import Session
from tests.appender.test_appender import chunked, new_repo, plain, values

KEYED: dict[str, Any] = {"dim": "time", "source": "s", "key": "time", "on_duplicate": "replace"}


def replacing(time: int, value: float) -> dict[str, Any]:
    return plain(time, 1) | {"v": plain(time, 1)["v"] * 0 + value}


def held_commits(monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold commits of sessions from now on: the first event is set when one begins, the second lets them go on."""
    committing, go_on = asyncio.Event(), asyncio.Event()
    commit = Session.commit_async

    async def held(session: Session, *args: Any, **options: Any) -> str:
        committing.set()
        await go_on.wait()
        return await commit(session, *args, **options)

    monkeypatch.setattr(Session, "commit_async", held)
    return committing, go_on


async def first_values(repo: icechunk.Repository) -> list[float]:
    session = await repo.readonly_session_async("main")
    array = await azarr.open_array(store=session.store, path="v", mode="r")
    return np.asarray(await array.getitem(Ellipsis))[:, 0].tolist()  # type: ignore[no-any-return]


async def cancelled_after(steps: int, call: Any) -> None:
    """Run a call for so many turns of the event loop, then cancel it."""
    task = asyncio.create_task(call)
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_durable_put_that_is_cancelled_can_be_repeated_at_once() -> None:
    repo = await new_repo()
    await chunked(repo)
    async with repo.appender("main", dim="time", source="s") as appender:
        for n in range(60):
            # At some of these turns the commit has ended, and the loop has not run its callbacks yet.
            await cancelled_after(n, appender.put(plain(n, 1), offset=n, durable=True))
            await appender.put(plain(n, 1), offset=n, durable=True)
            assert appender.position == n
    assert await values(repo) == list(range(60))


@pytest.mark.parametrize("call", ["replace", "prepend"])
async def test_a_commit_goes_on_when_its_caller_is_cancelled(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    repo = await new_repo()
    await chunked(repo)
    async with repo.appender("main", **KEYED) as appender:
        await appender.put(plain(4, 4), offset=0, durable=True)
        landed, go_on = asyncio.Event(), asyncio.Event()
        commit = Session.commit_async

        async def slow(session: Session, *args: Any, **options: Any) -> str:
            made = await commit(session, *args, **options)
            landed.set()
            await go_on.wait()
            return made

        monkeypatch.setattr(Session, "commit_async", slow)
        task = asyncio.create_task(
            appender.put(replacing(5, 50), offset=1) if call == "replace" else appender.prepend(plain(0, 4))
        )
        await landed.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go_on.set()
        await appender.put(plain(8, 1), offset=2, durable=True)
        assert appender.position == 2
    assert await first_values(repo) == ([4, 50, 6, 7, 8] if call == "replace" else list(range(9)))


async def test_a_replacement_that_fails_leaves_nothing_behind_for_the_next_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repo = await new_repo()
    await chunked(repo)
    async with repo.appender("main", **KEYED) as appender:
        await appender.put(plain(0, 3), offset=0, durable=True)

        async def failing(*_: Any, **__: Any) -> str:
            raise StorageError("no answer")

        with monkeypatch.context() as patched:
            patched.setattr(Session, "commit_async", failing)
            with pytest.raises(StorageError):
                await appender.put(replacing(1, 99), offset=1)
        await appender.put(plain(3, 2), offset=2, durable=True)
    assert await first_values(repo) == [0, 1, 2, 3, 4]


async def test_labels_that_are_read_while_a_commit_ends_have_those_of_the_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repo = await new_repo()
    await chunked(repo)
    async with (
        repo.appender("main", **KEYED | {"on_duplicate": "skip"}) as appender,
        repo.appender("main", **KEYED | {"source": "other"}) as other,
    ):
        await appender.put(plain(0, 1), durable=True)
        await other.put(plain(4, 1), durable=True)
        await appender.put(plain(8, 1))
        wrote, began_to_read, committed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        write, labels = Target.write, Target.labels
        putting: asyncio.Task[Any] | None = None

        async def slow_write(target: Target, *args: Any) -> Target:
            wrote.set()
            await began_to_read.wait()
            return await write(target, *args)

        async def slow_labels(target: Target, *args: Any, **options: Any) -> Any:
            found = await labels(target, *args, **options)
            if asyncio.current_task() is putting and not committed.is_set():
                began_to_read.set()
                await committed.wait()
            return found

        monkeypatch.setattr(Target, "write", slow_write)
        monkeypatch.setattr(Target, "labels", slow_labels)
        flushing = asyncio.create_task(appender.flush())
        await wrote.wait()
        putting = asyncio.create_task(appender.put(plain(12, 1)))
        await flushing
        committed.set()
        assert await putting == "buffered"
        assert await appender.put(plain(8, 1)) == "skipped"
    assert await values(repo) == [0, 4, 8, 12]


async def test_labels_that_are_read_while_a_commit_leaves_rows_out_are_those_of_the_rows_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repo = await new_repo()
    await chunked(repo)
    # What stands for no value, 0, comes after all labels.
    async with repo.appender("main", keep=4, **KEYED | {"on_duplicate": "skip"}) as appender:
        await appender.put(plain(-20, 7), durable=True)
        await appender.put(plain(-13, 1))
        committing, go_on = held_commits(monkeypatch)
        flushing = asyncio.create_task(appender.flush())
        await committing.wait()
        putting = asyncio.create_task(appender.put(plain(-12, 1)))
        await asyncio.wait([putting])
        go_on.set()
        await flushing
        assert putting.result() == "buffered"
        assert await appender.put(plain(-16, 1)) == "skipped"
        with pytest.raises(InvalidInputError) as caught:
            await appender.put(plain(-20, 1))
        assert "-20" in str(caught.value)
    assert await values(repo) == list(range(-16, -11))


async def test_labels_that_are_read_while_rows_are_put_before_the_first_have_the_last_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repo = await new_repo()
    await chunked(repo)
    async with (
        repo.appender("main", **KEYED | {"on_duplicate": "skip"}) as appender,
        repo.appender("main", **KEYED | {"source": "other"}) as other,
    ):
        await appender.put(plain(4, 4), durable=True)
        await other.put(plain(8, 4), durable=True)
        committing, go_on = held_commits(monkeypatch)
        prepending = asyncio.create_task(appender.prepend(plain(0, 4)))
        await committing.wait()
        prepending.cancel()
        await asyncio.wait([prepending])
        putting = asyncio.create_task(appender.put(plain(8, 1)))
        await asyncio.wait([putting])
        go_on.set()
        assert putting.result() == "skipped"
        await appender.put(plain(12, 1), durable=True)
        assert await appender.put(plain(3, 1)) == "skipped"
    assert await values(repo) == list(range(13))
