"""Pruning the log: announce, wait, delete (rule 9).

Entries up to the checkpoint are folded into ``repo``; a client that opens the repository reads none of them. But a
client that opened it before may still need them, or take an empty slot for the end of the log. It relies on what it
knows for half of `PRUNE_WAIT_US`; so a floor is announced by an object, and slots up to it are deleted once that object
is older than the whole of it. The age of the slots proves nothing: a late checkpoint makes old ones unneeded all at
once.

A log that was sealed by a conversion is folded into ``repo`` as a whole, and is deleted in the same way, its seal last.
A log that was taken over may hold entries that are nowhere else: it stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from icechunk.errors import PreconditionFailedError, StorageError
from icechunk.log.repository.entries.reader import list_head
from icechunk.log.repository.entry import (
    LOG_PREFIX,
    epoch_prefix,
    floor_key,
    floor_prefix,
    parse_copy_key,
    parse_floor_key,
    slot_key,
)
from icechunk.log.repository.events import Sealed
from icechunk.log.repository.freshness import PRUNE_WAIT_US
from icechunk.log.repository.objects import read_repo, read_slot
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.log.repository.store_check import require_writable
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.port import Absent, Storage

__all__ = ["prune_log"]

_ANNOUNCE_EVERY_US: Final = 24 * 3600 * 1_000_000
"""So there are never more than a few announcements, however often a pruner runs."""
_BATCH: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Floor:
    floor: int
    key: str
    modified_us: int


async def prune_log(log: RepositoryLog, storage: Storage, sources: Sources) -> int:
    """Delete the slots whose announcement is old enough, and announce those that are folded into ``repo`` by now.

    Returns
    -------
    int
        Slots deleted.

    Raises
    ------
    ReadOnlyError
        The storage can only be read.
    StorageError
        The store gives no answer, or does not delete; call again.
    """
    if log.layout is Layout.REFS:
        return 0
    require_writable(storage, "prune the log")
    # The order matters: all entries announced or deleted below were folded into `repo` when it was read here.
    found = await read_repo(storage, sources)
    if found is None:
        return 0
    marker = found.known.marker if found.known.read_only else None
    deleted = 0
    for epoch in await _epochs(storage):
        if marker is not None and epoch == marker.epoch:
            # The slot of the marker stays: clients that may not list see by it that they may read the log (rule 6).
            folded = min(marker.n - 1, marker.durable_n)
        else:
            folded = await _converted(storage, epoch)
        deleted += await _prune_epoch(storage, sources, epoch, folded)
    return deleted


async def _epochs(storage: Storage) -> list[str]:
    """The epochs that have objects below ``log/``, of any kind."""
    epochs: list[str] = []
    after: str | None = None
    while True:
        first = None
        pages = storage.list_pages(LOG_PREFIX, start_after=after, page_size=1)
        try:
            async for page in pages:
                first = page[0].key
                break
        finally:
            aclose = getattr(pages, "aclose", None)
            if aclose is not None:
                await aclose()
        if first is None:
            return epochs
        epoch = first.removeprefix(LOG_PREFIX).partition("/")[0].removesuffix(".floor")
        if epoch.isalnum():
            epochs.append(epoch)
        # The first key after all of this epoch's: "0" follows "/".
        after = f"{LOG_PREFIX}{epoch}0"


async def _converted(storage: Storage, epoch: str) -> int:
    """The last slot of a log that was sealed to be converted; 0 where it ended otherwise, or has none."""
    last = await list_head(storage, epoch)
    if not last:
        return 0
    slot = await read_slot(storage, epoch, last)
    sealed = slot is not None and any(
        isinstance(event, Sealed) and event.reason == "convert" for event in slot[0].events
    )
    return last if sealed else 0


async def _prune_epoch(storage: Storage, sources: Sources, epoch: str, folded: int) -> int:
    floors = await _floors(storage, epoch)
    deleted = 0
    if floors:
        now_us = await _store_time_us(storage, sources, epoch)
        # Times come in steps, rounded down.
        wait_us = PRUNE_WAIT_US + storage.clock_resolution_us
        ripe = [floor for floor in floors if now_us - floor.modified_us > wait_us]
        if ripe:
            deleted = await _delete_slots(storage, epoch, max(floor.floor for floor in ripe))
            await _delete(storage, [floor.key for floor in ripe])
        if now_us - max(floor.modified_us for floor in floors) < _ANNOUNCE_EVERY_US:
            return deleted
    if folded > max((floor.floor for floor in floors), default=0):
        with suppress(PreconditionFailedError):
            await storage.put(floor_key(epoch, folded), b"", Absent())
    return deleted


async def _floors(storage: Storage, epoch: str) -> list[_Floor]:
    floors: list[_Floor] = []
    async for page in storage.list_pages(floor_prefix(epoch)):
        for item in page:
            floor = parse_floor_key(epoch, item.key)
            if floor is not None:
                floors.append(_Floor(floor=floor, key=item.key, modified_us=item.modified_us))
    return floors


async def _store_time_us(storage: Storage, sources: Sources, epoch: str) -> int:
    """Last-Modified of an object made now."""
    key = f"{floor_prefix(epoch)}now.{sources.random_bytes(8).hex()}"
    await storage.put(key, b"", Absent())
    try:
        return (await storage.head(key)).modified_us
    finally:
        with suppress(StorageError):
            await storage.delete([key])


async def _delete_slots(storage: Storage, epoch: str, floor: int) -> int:
    # A listing begins with the newest.
    found = [
        item.key
        async for page in storage.list_pages(epoch_prefix(epoch), start_after=slot_key(epoch, floor + 1))
        for item in page
    ]
    # A durable copy of the checkpoint up to the floor, or to the slot after it, may be the one that counts.
    copies = {key: copy[1] for key in found if (copy := parse_copy_key(key)) is not None}
    keys = [key for key in reversed(found) if copies.get(key, 0) < floor]
    for start in range(0, len(keys), _BATCH):
        await _delete(storage, keys[start : start + _BATCH])
    return len(keys)


async def _delete(storage: Storage, keys: Sequence[str]) -> None:
    failures = (await storage.delete(keys)).failures
    if failures:
        key, reason = failures[0]
        raise StorageError(
            f"cannot prune the log in {storage.describe()}: {len(failures)} objects could not be deleted, {key!r} the "
            f"first ({reason}); the next collection tries again"
        )
