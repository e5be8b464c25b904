"""When ``repo`` is written where syncs are deferred: with every change, but for a large one in quick succession."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from icechunk.format.ids import encode_id
from icechunk.format.repo.codec import decode_repo
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries import checkpoint, checkpoint_schedule
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.marker import decode_marker
from icechunk.storage.local.storage import LocalStorage
from icechunk.testing.scripted import ManualClock
from tests.log.repository.strategies import an_id
from tools.simulator.writers import commit_proposal

TAKES_S = 1.0


class Client:
    """One client on a local folder, whose clock moves by a second whenever it writes ``repo``."""

    def __init__(self, root: Path, clock: ManualClock, log: LogLayout) -> None:
        self.root, self.clock, self.log = root, clock, log

    async def commit(self, number: int) -> None:
        id = an_id(number)
        proposal = commit_proposal(id, "main", now_us=self.clock.now_us)
        await self.log.append(proposal, files={f"snapshots/{encode_id(id)}": b"embedded"})

    @property
    def slot(self) -> int:
        """The last slot that ``repo`` holds."""
        marker = decode_marker(decode_repo((self.root / "repo").read_bytes()).extra)
        assert marker is not None
        return marker.n

    def has_file(self, number: int) -> bool:
        return (self.root / "snapshots" / encode_id(an_id(number))).exists()


@pytest.fixture
async def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    clock = ManualClock(time.time_ns() // 1000)
    write = checkpoint.write_unsynced

    async def take_long(*arguments: Any, **options: Any) -> Any:
        clock.move(TAKES_S)
        return await write(*arguments, **options)

    monkeypatch.setattr(checkpoint_schedule, "write_unsynced", take_long)
    log = await create_log(LocalStorage(tmp_path), clock.sources())
    yield Client(tmp_path, clock, log)
    await log.aclose()


async def test_a_small_checkpoint_is_written_with_every_change(client: Client) -> None:
    for number in range(1, 5):
        await client.commit(number)
        assert client.slot == number


async def test_a_large_checkpoint_is_written_again_after_ten_times_its_duration(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_schedule, "_SMALL_BYTES", 0)
    slots = []
    for number in range(1, 6):
        await client.commit(number)
        slots.append(client.slot)
        assert client.has_file(number)
    assert slots == [1] * 5
    client.clock.move(10 * TAKES_S)
    await client.commit(6)
    assert client.slot == 6
    assert client.has_file(6)


async def test_a_large_checkpoint_is_brought_up_to_date_on_request_and_at_a_close(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_schedule, "_SMALL_BYTES", 0)
    await client.commit(1)
    await client.commit(2)
    assert client.slot == 1
    await client.log.checkpoint()
    assert client.slot == 2
    await client.commit(3)
    assert client.slot == 2
    await client.log.aclose()
    assert client.slot == 3
