"""Segments: the objects that a persisted session consists of.

A session that is persisted writes one segment for each checkpoint. A segment has the events that are new since the
segment before it, and says how many of the earlier events are still valid (fewer than there were after a rollback, or
after a rebase that changed some). So the session's log is the fold of its segments, and each costs in proportion to its
new events.

Everything that happens to a persisted session takes its next segment: a checkpoint, another process that resumes it, a
commit that is about to be sent, and each kind of end. Segments are created, never replaced, so of two processes that
write to one session one loses the slot, and finds the other's segment in it.

Layout: magic, version u16, header length u32 (little-endian), header (JSON), then the new events as
`icechunk.log.session.wire` encodes them; nothing where there are none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, Final

from icechunk.errors import ErrorKind, FormatError, IcechunkError
from icechunk.format.ids import ObjectId, encode_id, object_id_from_text
from icechunk.format.keys import SESSIONS_PREFIX
from icechunk.log.session.events import Event
from icechunk.log.session.wire import decode_events, encode_log
from icechunk.runtime import json_codec
from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "HEAD_BYTES",
    "SegmentHead",
    "SegmentKind",
    "Slot",
    "common_prefix",
    "decode_head",
    "decode_segment",
    "encode_segment",
    "events_of",
    "segment_key",
    "session_prefix",
    "slot_of",
]

_MAGIC: Final = b"ICESEGM\n"
_VERSION: Final = 1
_START: Final = struct.Struct("<8sHI")
HEAD_BYTES: Final = 4096
"""The first bytes of a segment in which its head nearly always is."""


class SegmentKind(StrEnum):
    """Kinds of segments."""

    CHECKPOINT = "checkpoint"
    """New events."""
    RESUMED = "resumed"
    """Another process continues the session; the one before must not write any more."""
    COMMITTING = "committing"
    """New events, and a snapshot that is about to be committed."""
    COMMITTED = "committed"
    """The end: a snapshot has the changes."""
    ABANDONED = "abandoned"
    """The end: the changes are discarded."""
    EXPIRED = "expired"
    """The end: nothing was written for longer than the lease, and a collection may delete the chunks."""

    @property
    def is_end(self) -> bool:
        """Whether nothing may follow."""
        return self in (SegmentKind.COMMITTED, SegmentKind.ABANDONED, SegmentKind.EXPIRED)


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a segment."""

    session: ObjectId
    worker: ObjectId | None
    """A fork that joined the session by its id; None: the session itself."""
    number: int
    """Number of the segment, from 1, without a gap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHead:
    """All of a segment but its events. Each head is complete, so the newest one is enough."""

    kind: SegmentKind
    nonce: bytes
    """16 random bytes: recognises a segment whose PUT had no certain answer."""
    base: ObjectId
    """The snapshot that the events apply to."""
    keep: int = 0
    """Number of earlier events that are still valid."""
    branch: str | None = None
    """The branch of the commit; None for workers."""
    rearrange: bool = False
    """Whether the session takes moves of nodes only."""
    since_us: int = 0
    """Store time, µs, not later than the session's first upload."""
    created_us: int = 0
    """Store time of the first segment, µs."""
    lease_us: int = 0
    """µs for which a collection keeps the session after its newest segment was written."""
    attempts: tuple[ObjectId, ...] = ()
    """Snapshots that the session has tried to commit; at most one of them landed."""
    claims: tuple[int, ...] = ()
    """Numbers of the segments by which processes took the session over. They stay after its end: a process that has
    lost the session finds its next slot taken."""
    snapshot: ObjectId | None = None
    """The snapshot that it became."""
    joined_at: int = 0
    """Number of the session's segment that a worker's own events come after; 0 for a session."""
    earlier_bases: tuple[ObjectId, ...] = ()
    """Other bases that the session's segments had, before rebases: forks may have joined there."""
    lineage: tuple[ObjectId, tuple[bytes, ...]] | None = None
    """The session's base and the ids of the last inherited events, of a worker whose base has these already; else
    None."""


def session_prefix(session: ObjectId) -> str:
    """The beginning of the keys of all segments of a session and of its workers."""
    return f"{SESSIONS_PREFIX}{encode_id(session)}/"


def segment_key(slot: Slot) -> str:
    """Key of a segment."""
    worker = "" if slot.worker is None else f"{encode_id(slot.worker)}/"
    return f"{session_prefix(slot.session)}{worker}{slot.number:08d}"


def slot_of(key: str) -> Slot | None:
    """The reverse of `segment_key`; None for any other key."""
    parts = key.removeprefix(SESSIONS_PREFIX).split("/")
    number = parts[-1]
    if not 2 <= len(parts) <= 3 or len(number) != 8 or not (number.isascii() and number.isdigit()):
        return None
    try:
        ids = [object_id_from_text(part) for part in parts[:-1]]
    except IcechunkError:
        return None
    slot = Slot(ids[0], ids[1] if len(ids) == 2 else None, int(number))
    return slot if segment_key(slot) == key else None


def encode_segment(head: SegmentHead, events: Sequence[Event]) -> bytes:
    """Encode a segment with its new events."""
    fields: dict[str, Any] = {
        "kind": head.kind.value,
        "nonce": head.nonce.hex(),
        "base": encode_id(head.base),
        "keep": head.keep,
        "branch": head.branch,
        "rearrange": head.rearrange,
        "since": head.since_us,
        "created": head.created_us,
        "lease": head.lease_us,
        "attempts": [encode_id(id) for id in head.attempts],
        "claims": list(head.claims),
        "snapshot": None if head.snapshot is None else encode_id(head.snapshot),
        "joined_at": head.joined_at,
        "lineage": None
        if head.lineage is None
        else {"base": encode_id(head.lineage[0]), "last_events": [id.hex() for id in head.lineage[1]]},
    }
    if head.earlier_bases:
        fields["earlier_bases"] = [encode_id(id) for id in head.earlier_bases]
    header = json_codec.dumps(fields)
    header += b" " * (-(len(header) + _START.size) % 8)
    payload = encode_log(head.base, events) if events else b""
    return b"".join([_START.pack(_MAGIC, _VERSION, len(header)), header, payload])


def decode_head(data: bytes | memoryview) -> SegmentHead | None:
    """The head of a segment, from its first bytes; None where these are too few.

    Raises
    ------
    FormatError
        They are not those of a segment.
    """
    found = _decode_head(data)
    return None if found is None else found[0]


def decode_segment(data: bytes) -> tuple[SegmentHead, tuple[Event, ...]]:
    """A whole segment. Raises `FormatError` where the bytes are not those of one."""
    found = _decode_head(data)
    if found is None:
        raise FormatError("cannot read the segment: it is truncated", ErrorKind.DESERIALIZATION)
    head, end = found
    if end == len(data):
        return head, ()
    base, events = decode_events(memoryview(data)[end:])
    if base != head.base:
        raise FormatError("cannot read the segment: its events have another base", ErrorKind.DESERIALIZATION)
    return head, tuple(events)


def _decode_head(data: bytes | memoryview) -> tuple[SegmentHead, int] | None:
    try:
        if len(data) < _START.size:
            if not _MAGIC.startswith(bytes(data[: len(_MAGIC)])):
                raise ValueError("it does not begin with the magic bytes of a segment")
            return None
        magic, version, size = _START.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("it does not begin with the magic bytes of a segment")
        if version != _VERSION:
            raise ValueError(f"it has version {version}, this library reads {_VERSION}")
        end = _START.size + size
        if len(data) < end:
            return None
        return _head_of(json_codec.loads(data[_START.size : end])), end
    except (ValueError, KeyError, TypeError, AttributeError, IcechunkError) as error:
        raise FormatError(f"cannot read the segment: {error}", ErrorKind.DESERIALIZATION) from error


def _head_of(fields: dict[str, Any]) -> SegmentHead:
    nonce, branch, snapshot, lineage = bytes.fromhex(fields["nonce"]), fields["branch"], fields["snapshot"], None
    if len(nonce) != 16 or not isinstance(branch, str | None) or type(fields["rearrange"]) is not bool:
        raise ValueError("a field has the wrong type")
    if fields["lineage"] is not None:
        last_events = tuple(map(bytes.fromhex, fields["lineage"]["last_events"]))
        lineage = object_id_from_text(fields["lineage"]["base"]), last_events
    return SegmentHead(
        kind=SegmentKind(fields["kind"]),
        nonce=nonce,
        base=object_id_from_text(fields["base"]),
        keep=_natural(fields["keep"]),
        branch=branch,
        rearrange=fields["rearrange"],
        since_us=_natural(fields["since"]),
        created_us=_natural(fields["created"]),
        lease_us=_natural(fields["lease"]),
        attempts=tuple(map(object_id_from_text, fields["attempts"])),
        claims=tuple(map(_natural, fields["claims"])),
        snapshot=None if snapshot is None else object_id_from_text(snapshot),
        joined_at=_natural(fields["joined_at"]),
        earlier_bases=tuple(map(object_id_from_text, fields.get("earlier_bases", ()))),
        lineage=lineage,
    )


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no natural number")
    return value


def events_of(segments: Iterable[tuple[int, Sequence[Event]]]) -> tuple[Event, ...]:
    """The events that segments make together.

    Parameters
    ----------
    segments
        Of each, oldest first, how many earlier events it keeps, and its new ones.

    Raises
    ------
    FormatError
        One keeps more events than there are.
    """
    events: list[Event] = []
    for keep, new in segments:
        if keep > len(events):
            raise FormatError(
                f"cannot read the session: a segment keeps {keep} events, and there are {len(events)}",
                ErrorKind.DESERIALIZATION,
            )
        del events[keep:]
        events += new
    return tuple(events)


def common_prefix(before: Sequence[Event], now: Sequence[Event]) -> int:
    """Number of events at the beginning of both that are the same objects, as they stay after appending and
    rebasing."""
    count = 0
    for old, new in zip(before, now, strict=False):
        if old is not new:
            break
        count += 1
    return count
