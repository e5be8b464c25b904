"""Entries of the log layout: bytes and keys. Pure.

An entry is JSON: ``v`` version, ``n`` slot, ``nonce`` 128 random bits in hex, ``time`` µs, ``since`` store time in
µs or null, ``events``, each a map with its ``kind``, and, where files of small commits are embedded, ``objects``
from key to base64. Readers are strict: a version or field that they do not know stops them, as in
`icechunk.log.repository.event_json`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Final

from icechunk.errors import ErrorKind, FormatError, IcechunkError, InvalidInputError
from icechunk.format.ids import decode_id, encode_id
from icechunk.log.repository import events as e
from icechunk.log.repository.event_json import EncodedEvents, Fields, TooNewError, decode_events
from icechunk.runtime import json_codec
from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "LOG_PREFIX",
    "Entry",
    "copy_key",
    "decode_entry",
    "encode_entry",
    "epoch_prefix",
    "floor_key",
    "floor_prefix",
    "new_epoch",
    "parse_copy_key",
    "parse_floor_key",
    "parse_slot_key",
    "slot_key",
]

VERSION: Final = 1
LOG_PREFIX: Final = "log/"
_KEY_BITS: Final = 40
_LAST: Final = (1 << _KEY_BITS) - 1
_NONCE_BYTES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One unit of the log: its events happen all, in order, or none."""

    n: int
    """Slot; the first one is 1."""
    nonce: bytes
    """16 random bytes by which a writer recognises its own entry."""
    time_us: int
    """Writer's wall clock, µs; the fold makes it strictly increasing."""
    since_us: int | None
    """Store time, µs, not later than the Last-Modified of anything that the events add; None if they add no files."""
    events: tuple[e.Event, ...]
    objects: Mapping[str, bytes] = field(default_factory=dict)
    """Files of small commits that are embedded, by key (rule 15)."""


_COPY: Final = ".repo"


def slot_key(epoch: str, n: int) -> str:
    """Key of a slot. Later slots sort first, so the first page of a listing holds the newest entries."""
    return f"{LOG_PREFIX}{epoch}/{encode_id((_LAST - n).to_bytes(5))}"


def epoch_prefix(epoch: str) -> str:
    """The common start of the keys of all slots of one life of the log."""
    return f"{LOG_PREFIX}{epoch}/"


def parse_slot_key(key: str) -> tuple[str, int] | None:
    """Epoch and slot of a key, or None where it is not a slot's."""
    parts = key.split("/")
    if len(parts) != 3 or parts[0] != "log" or not parts[1] or "." in parts[1]:
        return None
    try:
        return parts[1], _LAST - int.from_bytes(decode_id(parts[2], 5))
    except InvalidInputError:
        return None


def copy_key(epoch: str, n: int) -> str:
    """Key of the durable copy of the checkpoint that holds the log up to slot ``n`` (0: an empty log).

    Copies exist if ``repo`` is written without waiting for the disk. The key sorts right after that of the slot, and is
    no slot's key.
    """
    return f"{slot_key(epoch, n)}{_COPY}"


def parse_copy_key(key: str) -> tuple[str, int] | None:
    """Epoch and slot of a key that `copy_key` made; None for any other key."""
    return parse_slot_key(key.removesuffix(_COPY)) if key.endswith(_COPY) else None


def floor_prefix(epoch: str) -> str:
    """The prefix of the announcements of slots of an epoch that will be deleted (rule 9); readers ignore it."""
    return f"{LOG_PREFIX}{epoch}.floor/"


def floor_key(epoch: str, floor: int) -> str:
    """Key of the announcement that slots up to ``floor`` (inclusive) will go."""
    return floor_prefix(epoch) + encode_id(floor.to_bytes(5))


def parse_floor_key(epoch: str, key: str) -> int | None:
    """The floor that a key announces, or None where it announces none."""
    try:
        return int.from_bytes(decode_id(key.removeprefix(floor_prefix(epoch)), 5))
    except InvalidInputError:
        return None


def new_epoch(random: bytes, wall_us: int) -> str:
    """A name for a new life of the log: random, and usually sorted before older ones.

    Parameters
    ----------
    random
        12 bytes.
    wall_us
        µs since the epoch; only a hint that saves a listing.
    """
    seconds = min(max(wall_us // 1_000_000, 0), _LAST)
    return encode_id((_LAST - seconds).to_bytes(5)) + encode_id(random)


def encode_entry(
    *,
    n: int,
    nonce: bytes,
    time_us: int,
    since_us: int | None,
    events: EncodedEvents,
    objects: Mapping[str, bytes] | None = None,
) -> bytes:
    """The bytes of a slot. Fields as in `Entry`, with the events as `encode_events` made them."""
    document: dict[str, Any] = {
        "v": VERSION,
        "n": n,
        "nonce": nonce.hex(),
        "time": time_us,
        "since": since_us,
        "events": events,
    }
    if objects:
        document["objects"] = {key: base64.b64encode(data).decode() for key, data in objects.items()}
    # A copy: what orjson returns holds on to several times its length.
    return bytes(memoryview(json_codec.dumps(document)))


def decode_entry(data: bytes, *, n: int, what: str = "") -> Entry:
    """Read a slot.

    Parameters
    ----------
    n
        The slot it was found in.
    what
        Its key, for error messages.

    Raises
    ------
    FormatError
        Not an entry of that slot; with kind ``unsupported-spec-version`` where a newer version of this library
        wrote it: upgrade.
    """
    where = what or f"slot {n}"
    try:
        fields = Fields(json_codec.loads(data))
        version = fields.natural("v")
        if version != VERSION:
            raise TooNewError(f"version {version}, known is {VERSION}")
        entry = Entry(
            n=fields.natural("n"),
            nonce=bytes.fromhex(fields.text("nonce")),
            time_us=fields.natural("time"),
            since_us=fields.natural_or_none("since"),
            events=decode_events(fields.items("events")),
            objects=_read_objects(fields),
        )
        fields.finish()
        if entry.n != n:
            raise ValueError(f"it says that it is slot {entry.n}")
        if len(entry.nonce) != _NONCE_BYTES:
            raise ValueError("the nonce is not 128 bits")
        return entry
    except TooNewError as error:
        raise FormatError(
            f"the log entry {where} was written by a newer version of aioicechunk ({error}); upgrade to read this "
            "repository",
            ErrorKind.UNSUPPORTED_SPEC_VERSION,
        ) from None
    except (ValueError, TypeError, RecursionError, IcechunkError) as error:
        raise FormatError(f"the log entry {where} is corrupt: {error}") from error


def _read_objects(fields: Fields) -> dict[str, bytes]:
    try:
        objects = fields.any("objects")
    except ValueError:
        return {}
    if not isinstance(objects, dict):
        raise ValueError("field 'objects' is not a map")
    return {key: base64.b64decode(value, validate=True) for key, value in objects.items()}
