"""Rows that are written before their commit: on a local disk, where a commit would wait for them."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr.api.asynchronous as azarr
from zarr.codecs import ZstdCodec

import icechunk
from icechunk.appender import Appender, written_ahead
from icechunk.errors import ErrorKind, SessionStateError, StorageError
from icechunk.session.content import SessionContent
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.outcome import refused
from icechunk.storage.port import Put, PutResult

SIDE = 512
NOISE = np.random.default_rng(1).random((SIDE, SIDE // 2), "f4")
ROW_BYTES = SIDE * SIDE * 4
ENOUGH = 12
"""Rows, of one array, of which some are written ahead."""


async def new_repo(
    path: Path, chunk_rows: Sequence[int] = (1,), spec_version: int | None = None, *, label_rows: int = 64
) -> icechunk.Repository:
    """A repository of arrays v0, v1, … of large rows, and labels."""
    storage = icechunk.local_filesystem_storage(str(path))
    repo = await icechunk.Repository.create_async(storage, spec_version=spec_version)
    await make_arrays(repo, chunk_rows, label_rows=label_rows)
    return repo


async def make_arrays(
    repo: icechunk.Repository, chunk_rows: Sequence[int], *, label_rows: int = 64, **options: Any
) -> None:
    session = await repo.writable_session_async("main")
    for number, rows in enumerate(chunk_rows):
        await azarr.create_array(
            store=session.store,
            name=f"v{number}",
            shape=(0, SIDE, SIDE),
            chunks=(rows, SIDE, SIDE // 2),
            dtype="f4",
            dimension_names=("time", "y", "x"),
            overwrite=True,
            **options,
        )
    await azarr.create_array(
        store=session.store,
        name="time",
        shape=(0,),
        chunks=(label_rows,),
        dtype="i8",
        dimension_names=("time",),
        overwrite=True,
    )
    await session.commit_async("arrays")


def rows(first: int, count: int = 1, arrays: int = 1) -> dict[str, Any]:
    """Rows whose values say which they are; some chunks have fill values only."""
    labels = np.arange(first, first + count)
    values = np.zeros((count, SIDE, SIDE), "f4")
    values[:, :, : SIDE // 2] = labels[:, None, None] + NOISE
    values[:, 0, SIDE // 2 :] = (labels % 3)[:, None]
    return {"time": labels} | {f"v{n}": values + (n if n else 0) for n in range(arrays)}


async def require_rows(repo: icechunk.Repository, labels: Sequence[int], arrays: int = 1) -> None:
    session = await repo.readonly_session_async("main")
    time = await azarr.open_array(store=session.store, path="time")
    assert np.asarray(await time.getitem(slice(None))).tolist() == list(labels)
    for number in range(arrays):
        array = await azarr.open_array(store=session.store, path=f"v{number}")
        found = np.asarray(await array.getitem(slice(None)))
        assert len(found) == len(labels)
        for label, row in zip(labels, found, strict=True):
            np.testing.assert_array_equal(row, rows(label, 1, arrays)[f"v{number}"][0])


async def put(appender: Appender, first: int, count: int) -> None:
    for n in range(first, first + count):
        await appender.put(rows(n), offset=n)


async def wait_until_written(appender: Appender) -> int:
    """Rows that are written ahead, once none is on its way."""
    assert appender._ahead is not None  # private: no caller can see what is written ahead
    await asyncio.gather(*appender._ahead._tasks)  # private: as above
    return sum(batch.rows for batch in appender._buffered if batch.written is not None)  # private: as above


@pytest.mark.parametrize("spec_version", [None, 2])
async def test_rows_are_written_before_their_commit_and_leave_memory(tmp_path: Path, spec_version: int | None) -> None:
    repo = await new_repo(tmp_path, spec_version=spec_version)
    chunks = tmp_path / "chunks"
    async with repo.appender("main", dim="time", source="s", every=3600, max_bytes=2**30) as appender:
        await put(appender, 0, ENOUGH)
        assert await wait_until_written(appender) >= 8
        assert any(chunks.iterdir())
        assert all("v0" not in b.values for b in appender._buffered if b.written)  # private: their memory is free
        assert appender.stats().bytes_buffered == ENOUGH * (ROW_BYTES + 8)
        await put(appender, ENOUGH, 1)
        await appender.flush()
        await put(appender, ENOUGH + 1, ENOUGH)
    await require_rows(repo, range(2 * ENOUGH + 1))


async def test_the_last_rows_before_a_commit_and_labels_whose_chunks_begin_with_them_are_written_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_commit: list[str] = []
    real = SessionContent.set_chunks

    async def set_chunks(self: SessionContent, path: str, chunks: Any) -> None:
        by_commit.extend([path] * len(chunks))
        await real(self, path, chunks)

    monkeypatch.setattr(SessionContent, "set_chunks", set_chunks)
    repo = await new_repo(tmp_path, label_rows=1)
    async with repo.appender("main", dim="time", source="s", every=3600, max_bytes=2**30) as appender:
        await put(appender, 0, ENOUGH + 1)
        await appender.flush()
        assert by_commit == []
        # So few rows are in no hurry.
        await put(appender, ENOUGH + 1, 2)
        await appender.flush()
        assert sorted(set(by_commit)) == ["/time", "/v0"]
    await require_rows(repo, range(ENOUGH + 3))


async def test_rows_beyond_the_first_of_a_commit_are_bulk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bulk: list[bool] = []
    real = LocalStorage.put_unsynced

    async def put_unsynced(self: LocalStorage, puts: Sequence[Put]) -> list[PutResult | None]:
        bulk.extend(put.bulk for put in puts if put.key.startswith("chunks/"))
        return await real(self, puts)

    monkeypatch.setattr(LocalStorage, "put_unsynced", put_unsynced)
    monkeypatch.setattr(written_ahead, "_CACHED_BYTES", 16 * ROW_BYTES)
    repo = await new_repo(tmp_path)
    async with repo.appender("main", dim="time", source="s", every=3600, max_bytes=2**30) as appender:
        for commit in range(2):
            bulk.clear()
            await put(appender, commit * 32, 16)
            assert await wait_until_written(appender) == 16
            assert bulk
            assert not any(bulk)
            await put(appender, commit * 32 + 16, 16)
            assert await wait_until_written(appender) == 32
            assert any(bulk)
            await appender.flush()
    await require_rows(repo, range(64))


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("chunk_rows", [(3,), (2, 4)])
async def test_chunks_of_several_rows_and_batches_of_any_size(
    tmp_path: Path, chunk_rows: tuple[int, ...], batch: int
) -> None:
    repo = await new_repo(tmp_path, chunk_rows)
    arrays = len(chunk_rows)
    async with repo.appender("main", dim="time", source="s", every=3600, max_bytes=2**30) as appender:
        await appender.put(rows(0, 1, arrays), offset=0, durable=True)
        for first in range(1, 41, batch):
            await appender.put(rows(first, batch, arrays), offset=first)
    await require_rows(repo, range(1 + -(-40 // batch) * batch), arrays)


@pytest.mark.parametrize("label_rows", [64, 1])
@pytest.mark.parametrize("chunk_rows", [1, 2])
async def test_written_rows_are_placed_behind_another_writers(tmp_path: Path, chunk_rows: int, label_rows: int) -> None:
    repo = await new_repo(tmp_path, (chunk_rows,), label_rows=label_rows)
    async with (
        repo.appender("main", dim="time", source="a", every=3600, max_bytes=2**30) as first,
        repo.appender("main", dim="time", source="b", every=3600, max_bytes=2**30) as second,
    ):
        await put(first, 0, ENOUGH)
        assert await wait_until_written(first) >= 8
        await second.put(rows(99), offset=0, durable=True)
        await first.flush()
        assert first.stats().rows_committed == ENOUGH
    await require_rows(repo, [99, *range(ENOUGH)])


@pytest.mark.parametrize("label_rows", [64, 1])
async def test_written_rows_are_encoded_again_where_another_writer_has_changed_the_codecs(
    tmp_path: Path, label_rows: int
) -> None:
    repo = await new_repo(tmp_path, label_rows=label_rows)
    async with repo.appender("main", dim="time", source="a", every=3600, max_bytes=2**30) as appender:
        await put(appender, 0, ENOUGH)
        assert await wait_until_written(appender) >= 8
        await make_arrays(repo, (3,), compressors=[ZstdCodec(level=1, checksum=True)])
        await appender.flush()
    await require_rows(repo, range(ENOUGH))


@pytest.mark.parametrize("label_rows", [64, 1])
async def test_labels_of_written_rows_that_another_writer_has_stored_are_skipped(
    tmp_path: Path, label_rows: int
) -> None:
    repo = await new_repo(tmp_path, label_rows=label_rows)
    options: dict[str, Any] = {"dim": "time", "key": "time", "on_duplicate": "skip", "every": 3600, "max_bytes": 2**30}
    async with (
        repo.appender("main", source="a", **options) as first,
        repo.appender("main", source="b", **options) as second,
    ):
        await put(first, 0, ENOUGH)
        assert await wait_until_written(first) >= 8
        await second.put(rows(0, 3), offset=0, durable=True)
        await first.flush()
        assert first.position == ENOUGH - 1
    await require_rows(repo, range(ENOUGH))


@pytest.mark.parametrize("label_rows", [64, 1])
async def test_written_rows_count_in_a_window(tmp_path: Path, label_rows: int) -> None:
    repo = await new_repo(tmp_path, label_rows=label_rows)
    options: dict[str, Any] = {"every": 3600, "max_bytes": 2**30, "keep": 64}
    async with repo.appender("main", dim="time", source="s", **options) as appender:
        await put(appender, 0, 80)
        await appender.flush()
        await put(appender, 80, 64)
    # Whole chunks of all arrays are left out.
    await require_rows(repo, range(80 // label_rows * label_rows, 144))


async def test_rows_that_cannot_be_written_ahead_are_written_by_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = await new_repo(tmp_path)
    failed: list[Any] = []

    async def refuse(_: LocalStorage, puts: Any) -> None:
        failed.append(puts)
        raise StorageError("no space", ErrorKind.IO)

    async with repo.appender("main", dim="time", source="s", every=3600, max_bytes=2**30) as appender:
        with monkeypatch.context() as patched:
            patched.setattr(LocalStorage, "put_unsynced", refuse)
            await put(appender, 0, ENOUGH)
            assert await wait_until_written(appender) == 0
        assert failed
        await appender.flush()
        await put(appender, ENOUGH, ENOUGH)
        assert await wait_until_written(appender) >= 8
    await require_rows(repo, range(2 * ENOUGH))


async def test_a_commit_that_fails_leaves_written_rows_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = await new_repo(tmp_path)

    async def refuse(*_: Any, **__: Any) -> None:
        raise refused(StorageError("no space", ErrorKind.IO))

    async with repo.appender("main", dim="time", source="s", every=3600, max_bytes=2**30) as appender:
        await put(appender, 0, ENOUGH)
        assert await wait_until_written(appender) >= 8
        with monkeypatch.context() as patched:
            for name in ("put", "put_after", "put_unsynced"):
                patched.setattr(LocalStorage, name, refuse)
            with pytest.raises(StorageError):
                await appender.flush()
        await put(appender, ENOUGH, ENOUGH)
    await require_rows(repo, range(2 * ENOUGH))


async def test_a_collection_of_written_rows_ends_the_appender(tmp_path: Path) -> None:
    repo = await new_repo(tmp_path)
    async with repo.appender("main", dim="time", source="s", every=3600, max_bytes=2**30) as appender:
        await appender.put(rows(0), offset=0, durable=True)
        await put(appender, 1, ENOUGH)
        assert await wait_until_written(appender) >= 8
        await repo.garbage_collect_async(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1))
        with pytest.raises(SessionStateError):
            await appender.flush()
    await require_rows(repo, [0])
    async with repo.appender("main", dim="time", source="s") as again:
        assert again.position == 0
        await put(again, 1, ENOUGH)
    await require_rows(repo, range(ENOUGH + 1))


async def test_values_may_change_once_put_has_returned(tmp_path: Path) -> None:
    repo = await new_repo(tmp_path)
    async with repo.appender("main", dim="time", source="s", every=3600, max_bytes=2**30) as appender:
        for n in range(3 * ENOUGH):
            data = rows(n)
            await appender.put(data, offset=n)
            data["v0"][...] = -1
    await require_rows(repo, range(3 * ENOUGH))


async def test_arrays_without_chunks_grow_with_rows_that_are_written(tmp_path: Path) -> None:
    repo = await new_repo(tmp_path)
    session = await repo.writable_session_async("main")
    await azarr.create_array(
        store=session.store,
        name="none",
        shape=(0, SIDE, 0),
        chunks=(1, SIDE, 64),
        dtype="f4",
        dimension_names=("time", "y", "z"),
    )
    await session.commit_async("an array of which a dimension has length 0")
    async with repo.appender("main", dim="time", source="s", every=3600, max_bytes=2**30) as appender:
        for n in range(ENOUGH):
            await appender.put(rows(n) | {"none": np.empty((1, SIDE, 0), "f4")}, offset=n)
        assert await wait_until_written(appender) >= 8
    await require_rows(repo, range(ENOUGH))
    session = await repo.readonly_session_async("main")
    assert (await azarr.open_array(store=session.store, path="none")).shape == (ENOUGH, SIDE, 0)


@pytest.mark.parametrize("spec_version", [1, 2])
@pytest.mark.parametrize("overtaken", [False, True])
async def test_written_rows_that_another_program_has_deleted_end_the_appender(
    tmp_path: Path, spec_version: int, overtaken: bool
) -> None:
    repo = await new_repo(tmp_path, (2,), spec_version)
    async with repo.appender("main", dim="time", source="s", every=3600, max_bytes=2**30) as appender:
        await appender.put(rows(0, 2), offset=1, durable=True)
        committed = set((tmp_path / "chunks").iterdir())
        await put(appender, 2, ENOUGH)
        assert await wait_until_written(appender) >= 8
        for chunk in set((tmp_path / "chunks").iterdir()) - committed:
            chunk.unlink()
        if overtaken:
            async with repo.appender("main", dim="time", source="other") as other:
                await other.put(rows(99), durable=True)
        for _ in range(2):
            with pytest.raises(SessionStateError):
                await appender.flush()
    await require_rows(repo, [0, 1, 99] if overtaken else [0, 1])


async def test_a_collection_by_another_client_ends_the_appender_at_once(tmp_path: Path) -> None:
    repo = await new_repo(tmp_path)
    other = await icechunk.Repository.open_async(icechunk.local_filesystem_storage(str(tmp_path)))
    async with repo.appender("main", dim="time", source="s", every=3600, max_bytes=2**30) as appender:
        await appender.put(rows(0), offset=0, durable=True)
        await put(appender, 1, ENOUGH)
        assert await wait_until_written(appender) >= 8
        await other.garbage_collect_async(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1))
        with pytest.raises(SessionStateError) as caught:
            await appender.flush()
        assert caught.value.kind != ErrorKind.COMMIT_NOT_ALLOWED
    await require_rows(repo, [0])
    await other.aclose()
