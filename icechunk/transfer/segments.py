"""Segments of persisted sessions in storage: finding, reading and adding them; see `icechunk.log.session.segment`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field

from icechunk.errors import FormatError, ObjectNotFoundError, StorageError
from icechunk.format.ids import ObjectId
from icechunk.format.keys import SESSIONS_PREFIX
from icechunk.log.session.events import Event
from icechunk.log.session.segment import (
    HEAD_BYTES,
    SegmentHead,
    Slot,
    decode_head,
    decode_segment,
    segment_key,
    session_prefix,
    slot_of,
)
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_jobs
from icechunk.storage.outcome import Creation, Fate, certain, follow
from icechunk.storage.port import ObjectInfo, Range, Storage

__all__ = ["Listed", "add_segment", "list_sessions", "read_head", "read_segments", "remove_segments"]


@dataclass(slots=True)
class Listed:
    """The segments of one session, as a listing shows them."""

    session: ObjectId
    own: dict[int, ObjectInfo] = field(default_factory=dict)
    """Segments of the session itself, by number."""
    workers: dict[ObjectId, dict[int, ObjectInfo]] = field(default_factory=dict)
    """Segments of forks that joined it, by fork and number."""

    @property
    def last(self) -> int:
        """Number of the newest segment of its own; 0: there is none."""
        return max(self.own, default=0)

    @property
    def written_us(self) -> int:
        """Last-Modified of the newest segment, those of workers included, µs."""
        return max(info.modified_us for part in (self.own, *self.workers.values()) for info in part.values())

    def keys_but(self, *numbers: int) -> list[str]:
        """Keys of all segments but those of its own with these numbers."""
        own = [info.key for number, info in self.own.items() if number not in numbers]
        return own + [info.key for part in self.workers.values() for info in part.values()]


async def list_sessions(storage: Storage, session: ObjectId | None = None) -> dict[ObjectId, Listed]:
    """All sessions that have segments, by id; only ``session`` where it is given."""
    found: dict[ObjectId, Listed] = {}
    async for page in storage.list_pages(SESSIONS_PREFIX if session is None else session_prefix(session)):
        for info in page:
            slot = slot_of(info.key)
            if slot is None:
                continue
            listed = found.setdefault(slot.session, Listed(slot.session))
            part = listed.own if slot.worker is None else listed.workers.setdefault(slot.worker, {})
            part[slot.number] = info
    return found


async def read_head(storage: Storage, key: str) -> SegmentHead:
    """The head of a segment. Raises `ObjectNotFoundError`, and `FormatError` naming the key."""
    try:
        head = decode_head((await storage.get(key, Range(0, HEAD_BYTES))).body)
        return decode_segment((await storage.get(key)).data)[0] if head is None else head
    except FormatError as error:
        raise FormatError(f"{key!r} in {storage.describe()}: {error.message}", error.kind) from error


async def read_segments(storage: Storage, keys: Sequence[str]) -> list[tuple[SegmentHead, tuple[Event, ...]]]:
    """Whole segments, in the order asked for. Raises as `read_head`."""

    async def read(key: str) -> tuple[SegmentHead, tuple[Event, ...]]:
        try:
            return decode_segment((await storage.get(key)).data)
        except FormatError as error:
            raise FormatError(f"{key!r} in {storage.describe()}: {error.message}", error.kind) from error

    return await run_jobs([lambda key=key: read(key) for key in keys])  # type: ignore[misc]


class _Addition(Creation):
    """A segment in its slot, recognised by its nonce."""

    def __init__(self, storage: Storage, sources: Sources, slot: Slot, nonce: bytes, data: bytes) -> None:
        super().__init__(storage, sources, segment_key(slot), data)
        self._nonce = nonce
        self._turned_down = False
        self.there: SegmentHead | ObjectNotFoundError | None = None
        """The head of the segment that has the slot; or the error that it has been removed since."""

    async def put(self) -> bool:
        self._turned_down = False
        self._turned_down = not await super().put()
        return not self._turned_down

    async def fate(self, may_land: bool) -> Fate:
        try:
            self.there = await read_head(self.storage, self._key)
        except ObjectNotFoundError as error:
            if not self._turned_down:
                return Fate.OPEN
            # Not sent again: the slot would be taken a second time.
            self.there = error
            return Fate.LOST
        return Fate.LANDED if self.there.nonce == self._nonce else Fate.LOST


async def add_segment(storage: Storage, sources: Sources, slot: Slot, nonce: bytes, data: bytes) -> SegmentHead | None:
    """Create a segment.

    Returns
    -------
    SegmentHead or None
        None: it is there. Else the head of the segment that has this slot; the new one is lost.

    Raises
    ------
    ObjectNotFoundError
        It was not written, since another segment had this slot; that one has been removed since.
    StorageError
        It was not written; or no certain answer came, and it may have been, or may yet be.
    """
    write = _Addition(storage, sources, slot, nonce, data)
    unsure = StorageError(
        f"it is not known whether {segment_key(slot)!r} was written to {storage.describe()}: no certain answer"
    )
    if certain(await follow(write), unsure):
        return None
    if isinstance(write.there, ObjectNotFoundError):
        raise write.there
    return write.there


async def remove_segments(storage: Storage, keys: Sequence[str]) -> None:
    """Delete segments; those that cannot be deleted are left to the next collection."""
    if keys:
        await storage.delete(keys)
