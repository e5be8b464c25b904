"""Writes of ``repo`` where syncs are deferred: one with every change, whatever its size."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from icechunk.format.ids import encode_id
from icechunk.format.repo.codec import decode_repo, encode_repo
from icechunk.format.repo.repo_info import Status
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.events import MetadataReplaced
from icechunk.log.repository.marker import Marker, decode_marker
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import RepositoryLog
from icechunk.runtime.clock import SYSTEM
from icechunk.storage.local import folders, storage
from icechunk.storage.local.storage import LocalStorage
from tests.log.repository.strategies import an_id
from tools.simulator.writers import commit_proposal


class Client:
    """One client on a local folder."""

    def __init__(self, root: Path, log: LogLayout) -> None:
        self.root, self.log = root, log

    async def commit(self, number: int) -> None:
        id = an_id(number)
        proposal = commit_proposal(id, "main", now_us=SYSTEM.wall_us())
        await self.log.append(proposal, files={f"snapshots/{encode_id(id)}": b"embedded"})

    @property
    def marker(self) -> Marker:
        """Marker of ``repo``."""
        marker = decode_marker(decode_repo((self.root / "repo").read_bytes()).extra)
        assert marker is not None
        return marker

    @property
    def slot(self) -> int:
        """The last slot that ``repo`` holds."""
        return self.marker.n

    def has_file(self, number: int) -> bool:
        return (self.root / "snapshots" / encode_id(an_id(number))).exists()


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    log = await create_log(LocalStorage(tmp_path), SYSTEM)
    yield Client(tmp_path, log)
    await log.aclose()


@pytest.mark.parametrize("size", [0, 1 << 20], ids=["small", "large"])
async def test_repo_and_files_are_written_with_every_change(client: Client, size: int) -> None:
    metadata = {"random": random.Random(1).randbytes(size).hex()}
    await client.log.append(lambda state: (MetadataReplaced(metadata=metadata),))
    for number in range(1, 6):
        await client.commit(number)
        assert client.slot == number + 1
        assert client.has_file(number)
    assert (client.root / "repo").stat().st_size > size


async def test_a_close_makes_it_durable(client: Client) -> None:
    await client.commit(1)
    assert client.marker.durable_n == 0
    await client.log.aclose()
    assert client.marker.durable_n == 1


async def test_nothing_is_prepared_behind_a_call_that_has_returned(client: Client) -> None:
    client.log.prepare_writes_soon()
    assert client.log.tasks == ()


async def test_repo_is_written_behind_the_entry_in_the_same_call(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("put", "put_before", "put_unsynced", "put_after"):
        real = getattr(LocalStorage, name)

        async def call(storage: LocalStorage, *args: Any, name: str = name, real: Any = real) -> Any:
            calls.append(name)
            return await real(storage, *args)

        monkeypatch.setattr(LocalStorage, name, call)
    await client.commit(1)
    calls.clear()
    await client.commit(2)
    assert calls == ["put_before"]
    assert client.slot == 2
    assert client.has_file(2)


async def test_clients_that_take_turns_write_repo_with_every_change(client: Client) -> None:
    opened = await open_repository(LocalStorage(client.root), SYSTEM)
    assert isinstance(opened, LogLayout)
    other = Client(client.root, opened)
    try:
        for number in range(1, 9):
            await (other if number % 2 else client).commit(number)
            assert client.slot == number
            assert client.has_file(number)
        assert client.log.view.known.marker == client.marker
    finally:
        await opened.aclose()


async def test_repo_is_written_behind_a_checkpoint_of_the_same_client(client: Client) -> None:
    for number in range(1, 6):
        commit = asyncio.create_task(client.commit(number))
        await asyncio.gather(commit, client.log.checkpoint())
        assert client.slot == number
        assert client.has_file(number)
    await client.log.checkpoint()
    assert client.marker.durable_n == 5
    assert client.log.view.known.marker == client.marker


async def test_a_full_list_of_updates_is_divided_with_a_change(tmp_path: Path) -> None:
    log = await create_log(LocalStorage(tmp_path), SYSTEM)
    log.view.updates_per_file = 3
    client = Client(tmp_path, log)
    for number in range(1, 9):
        await client.commit(number)
        assert client.slot == number
    assert [type(update.change).__name__ async for update in log.updates()] == ["NewCommit"] * 8 + ["RepoInitialized"]
    await log.aclose()


async def test_a_durable_checkpoint_of_another_client_is_not_replaced_by_one_of_before(client: Client) -> None:
    await client.commit(1)
    other = await open_repository(LocalStorage(client.root), SYSTEM)
    await other.checkpoint()
    assert client.marker.durable_n == 1
    await client.commit(2)
    assert client.slot == 2
    assert client.marker.durable_n == 1
    await other.aclose()


async def opened_elsewhere(root: Path) -> tuple[RepositoryLog, list[str]]:
    """The log as another process opens it, and the folders that this syncs."""
    synced: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "fsync_folder", synced.append)
        # On a busy machine, or where Python has no `RWF_NOWAIT`, a file is not always read at once.
        patch.setattr(storage, "TELLS_CACHED", True)
        patch.setattr(storage, "read_cached", lambda descriptor, start, count: os.pread(descriptor, count, start))
        # private: what this process has synced is not known to another one
        patch.setattr(folders, "_settled_ns", {})
        return await open_repository(LocalStorage(root), SYSTEM), synced


async def test_an_opening_waits_for_no_disk_where_repo_was_replaced_without_waiting(client: Client) -> None:
    for number in (1, 2):
        before = (client.root / "repo").read_bytes()
        await client.commit(number)
        opened, synced = await opened_elsewhere(client.root)
        assert synced == []
        # As a power failure may leave it.
        (client.root / "repo").write_bytes(before)
        again, _ = await opened_elsewhere(client.root)
        assert again.state == opened.state == client.log.state
        await opened.aclose()
        await again.aclose()


@pytest.mark.parametrize("change", ["created", "durable", "online"])
async def test_an_opening_syncs_the_folder_of_a_young_repo_that_says_what_no_slot_does(
    client: Client, change: str
) -> None:
    if change != "created":
        await client.commit(1)
    if change == "durable":
        await client.log.checkpoint()
    if change == "online":
        # The official library lifts the status that protects the log.
        info = decode_repo((client.root / "repo").read_bytes())
        online = Status(set_at_us=info.status.set_at_us)
        (client.root / "repo").write_bytes(encode_repo(replace(info, status=online)))
    opened, synced = await opened_elsewhere(client.root)
    assert str(client.root) in synced
    await opened.aclose()
