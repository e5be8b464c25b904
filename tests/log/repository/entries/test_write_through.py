"""Writes of ``repo`` where syncs are deferred: one with every change, whatever its size."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from icechunk.format.ids import encode_id
from icechunk.format.repo.codec import decode_repo
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.events import MetadataReplaced
from icechunk.log.repository.marker import Marker, decode_marker
from icechunk.runtime.clock import SYSTEM
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
