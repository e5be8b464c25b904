"""Conversion between log and repo object while others write, under lost, late and doubled requests."""

from __future__ import annotations

import pytest

from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.log.repository.convert import convert_log
from icechunk.log.repository.create import create_log
from icechunk.log.repository.entries.reader import read_slot
from icechunk.log.repository.events import TagCreated
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import Layout, SwapToken
from icechunk.runtime.clock import SYSTEM
from icechunk.storage.memory import MemoryStorage


@pytest.mark.parametrize("landed", [True, False])
async def test_a_token_of_the_log_is_settled_after_the_conversion(landed: bool) -> None:
    storage = MemoryStorage()
    log = await create_log(storage)
    event = TagCreated(name="t", snapshot=FIRST_SNAPSHOT)
    await log.append(lambda _: [event])
    slot = await read_slot(storage, log.epoch, log.n)
    assert slot is not None
    token = SwapToken(
        epoch=log.epoch, n=log.n, nonces=(slot[0].nonce if landed else b"x" * 16,), known_us=slot[1].date_us
    )
    await convert_log(log, storage, SYSTEM, Layout.REPO)
    now = await open_repository(storage)
    assert await now.settle(token) is landed
    for each in (log, now):
        await each.aclose()
