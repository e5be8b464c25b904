"""Entries of the repository log: bytes and keys.

An entry is JSON: ``v`` version, ``n`` slot, ``nonce`` 128 random bits in hex, ``time`` µs, ``since`` store time in
µs or null, ``events``, each a map with its ``kind``, and, where files of small commits are embedded, ``objects``
from key to base64. Readers are strict: a version, kind or field that they do not know stops them, since what they
cannot fold they cannot skip.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from icechunk.errors import ErrorKind, FormatError, IcechunkError, InvalidInputError
from icechunk.format.ids import ObjectId, decode_id, encode_id, encode_ids, object_id_from_text, object_ids_from_texts
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.log.repository import events as e
from icechunk.log.repository.events import pack, unpack

__all__ = [
    "LOG_PREFIX",
    "EncodedEvents",
    "Entry",
    "copy_key",
    "decode_entry",
    "decode_events",
    "encode_entry",
    "encode_events",
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

EncodedEvents = list[dict[str, Any]]
"""Events as the JSON of an entry."""


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


def _snapshot(record: SnapshotRecord) -> dict[str, Any]:
    return {
        "id": encode_id(record.id),
        "parent": None if record.parent is None else encode_id(record.parent),
        "flushed_at": record.flushed_at_us,
        "message": record.message,
        "metadata": pack(record.metadata),
        "pruned": encode_ids(record.pruned_ancestor_tx_logs),
    }


def _encode_event(event: e.Event) -> dict[str, Any]:
    match event:
        case e.CommitAdded(branch=branch, snapshot=snapshot):
            return {"kind": "commit", "branch": branch, "snapshot": _snapshot(snapshot)}
        case e.CommitAmended(branch=branch, previous=previous, snapshot=snapshot):
            return {
                "kind": "amend",
                "branch": branch,
                "previous": encode_id(previous),
                "snapshot": _snapshot(snapshot),
            }
        case e.DetachedSnapshotAdded(snapshot=snapshot):
            return {"kind": "detached", "snapshot": _snapshot(snapshot)}
        case e.BranchCreated(name=name, snapshot=target):
            return {"kind": "branch-created", "name": name, "snapshot": encode_id(target)}
        case e.BranchReset(name=name, snapshot=target, expected=expected):
            return {
                "kind": "branch-reset",
                "name": name,
                "snapshot": encode_id(target),
                "expected": None if expected is None else encode_id(expected),
            }
        case e.BranchDeleted(name=name):
            return {"kind": "branch-deleted", "name": name}
        case e.TagCreated(name=name, snapshot=target):
            return {"kind": "tag-created", "name": name, "snapshot": encode_id(target)}
        case e.TagDeleted(name=name):
            return {"kind": "tag-deleted", "name": name}
        case e.ConfigReplaced(config=config, expected=expected_config, check=check):
            return {"kind": "config", "config": pack(config), "expected": pack(expected_config), "check": check}
        case e.MetadataReplaced(metadata=metadata):
            return {"kind": "metadata-replaced", "metadata": pack(metadata)}
        case e.MetadataUpdated(metadata=metadata):
            return {"kind": "metadata-updated", "metadata": pack(metadata)}
        case e.StatusSet(availability=availability, reason=reason):
            return {"kind": "status", "availability": availability, "reason": reason}
        case e.FeatureFlagSet(flag=flag, value=value):
            return {"kind": "flag", "flag": flag, "value": value}
        case e.ExpirationRan():
            return {
                "kind": "expiration",
                "released": encode_ids(event.released),
                "reparented": [
                    {
                        "id": encode_id(change.id),
                        "parent": None if change.parent is None else encode_id(change.parent),
                        "pruned": encode_ids(change.pruned_ancestor_tx_logs),
                    }
                    for change in event.reparented
                ],
                "branches": list(event.deleted_branches),
                "tags": list(event.deleted_tags),
            }
        case e.SnapshotsRewritten(replaced=replaced, keep=keep):
            return {"kind": "rewrite", "replaced": [[encode_id(a), encode_id(b)] for a, b in replaced], "keep": keep}
        case e.CollectionRan(cutoff_us=cutoff_us):
            return {"kind": "gc", "cutoff": cutoff_us}
        case e.RepositoryMigrated(from_version=old, to_version=new):
            return {"kind": "migrated", "from": old, "to": new}
        case e.Sealed(reason=reason):
            return {"kind": "seal", "reason": reason}
        case e.Void(nonce=nonce):
            return {"kind": "void", "nonce": nonce.hex()}


class _Fields:
    """A decoded JSON map that every field must be taken from, once, with its type."""

    __slots__ = ("_left",)

    def __init__(self, value: object) -> None:
        if not isinstance(value, dict):
            raise ValueError("a map expected")
        self._left = dict(value)

    def any(self, name: str) -> Any:
        if name not in self._left:
            raise ValueError(f"field {name!r} is missing")
        return self._left.pop(name)

    def text(self, name: str) -> str:
        value = self.any(name)
        if not isinstance(value, str):
            raise ValueError(f"field {name!r} is not text")
        return value

    def text_or_none(self, name: str) -> str | None:
        return None if self._left.get(name, "") is None and self.any(name) is None else self.text(name)

    def natural(self, name: str) -> int:
        value = self.any(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
            raise ValueError(f"field {name!r} is not a natural number of 63 bits")
        return value

    def natural_or_none(self, name: str) -> int | None:
        return None if self._left.get(name, 0) is None and self.any(name) is None else self.natural(name)

    def boolean(self, name: str) -> bool:
        value = self.any(name)
        if not isinstance(value, bool):
            raise ValueError(f"field {name!r} is not a boolean")
        return value

    def boolean_or_none(self, name: str) -> bool | None:
        return None if self._left.get(name, 0) is None and self.any(name) is None else self.boolean(name)

    def id(self, name: str) -> ObjectId:
        return object_id_from_text(self.text(name))

    def id_or_none(self, name: str) -> ObjectId | None:
        text = self.text_or_none(name)
        return None if text is None else object_id_from_text(text)

    def items(self, name: str) -> list[Any]:
        value = self.any(name)
        if not isinstance(value, list):
            raise ValueError(f"field {name!r} is not a list")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.items(name)
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"field {name!r} holds what is not text")
        return tuple(values)

    def ids(self, name: str) -> tuple[ObjectId, ...]:
        return tuple(object_ids_from_texts(self.texts(name)))

    def mapping(self, name: str) -> dict[str, Any]:
        value = unpack(self.any(name))
        if not isinstance(value, dict):
            raise ValueError(f"field {name!r} is not a map")
        return value

    def finish(self) -> None:
        if self._left:
            raise _TooNew(f"unknown field {next(iter(self._left))!r}")


class _TooNew(Exception):
    """The entry was written by a newer version of this library."""


def _read_snapshot(value: object) -> SnapshotRecord:
    fields = _Fields(value)
    record = SnapshotRecord(
        id=fields.id("id"),
        parent=fields.id_or_none("parent"),
        flushed_at_us=fields.natural("flushed_at"),
        message=fields.text("message"),
        metadata=fields.mapping("metadata"),
        pruned_ancestor_tx_logs=fields.ids("pruned"),
    )
    fields.finish()
    return record


def _read_reparented(value: object) -> e.Reparented:
    fields = _Fields(value)
    change = e.Reparented(
        id=fields.id("id"), parent=fields.id_or_none("parent"), pruned_ancestor_tx_logs=fields.ids("pruned")
    )
    fields.finish()
    return change


def _read_pair(value: object) -> tuple[ObjectId, ObjectId]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(text, str) for text in value):
        raise ValueError("two ids expected")
    return object_id_from_text(value[0]), object_id_from_text(value[1])


_READERS: Final[Mapping[str, Callable[[_Fields], e.Event]]] = {
    "commit": lambda f: e.CommitAdded(branch=f.text("branch"), snapshot=_read_snapshot(f.any("snapshot"))),
    "amend": lambda f: e.CommitAmended(
        branch=f.text("branch"), previous=f.id("previous"), snapshot=_read_snapshot(f.any("snapshot"))
    ),
    "detached": lambda f: e.DetachedSnapshotAdded(snapshot=_read_snapshot(f.any("snapshot"))),
    "branch-created": lambda f: e.BranchCreated(name=f.text("name"), snapshot=f.id("snapshot")),
    "branch-reset": lambda f: e.BranchReset(
        name=f.text("name"), snapshot=f.id("snapshot"), expected=f.id_or_none("expected")
    ),
    "branch-deleted": lambda f: e.BranchDeleted(name=f.text("name")),
    "tag-created": lambda f: e.TagCreated(name=f.text("name"), snapshot=f.id("snapshot")),
    "tag-deleted": lambda f: e.TagDeleted(name=f.text("name")),
    "config": lambda f: e.ConfigReplaced(
        config=unpack(f.any("config")), expected=unpack(f.any("expected")), check=f.boolean("check")
    ),
    "metadata-replaced": lambda f: e.MetadataReplaced(metadata=f.mapping("metadata")),
    "metadata-updated": lambda f: e.MetadataUpdated(metadata=f.mapping("metadata")),
    "status": lambda f: e.StatusSet(availability=f.natural("availability"), reason=f.text_or_none("reason")),
    "flag": lambda f: e.FeatureFlagSet(flag=f.natural("flag"), value=f.boolean_or_none("value")),
    "expiration": lambda f: e.ExpirationRan(
        released=f.ids("released"),
        reparented=tuple(_read_reparented(value) for value in f.items("reparented")),
        deleted_branches=f.texts("branches"),
        deleted_tags=f.texts("tags"),
    ),
    "rewrite": lambda f: e.SnapshotsRewritten(
        replaced=tuple(_read_pair(pair) for pair in f.items("replaced")), keep=f.boolean("keep")
    ),
    "gc": lambda f: e.CollectionRan(cutoff_us=f.natural("cutoff")),
    "migrated": lambda f: e.RepositoryMigrated(from_version=f.natural("from"), to_version=f.natural("to")),
    "seal": lambda f: e.Sealed(reason=f.text("reason")),
    "void": lambda f: e.Void(nonce=bytes.fromhex(f.text("nonce"))),
}


def encode_events(events: Sequence[e.Event]) -> EncodedEvents:
    """Events as JSON values.

    Raises
    ------
    InvalidInputError
        If metadata or configuration hold what JSON cannot (see `icechunk.log.repository.events.pack`).
    """
    encoded = [_encode_event(event) for event in events]
    try:
        orjson.dumps(encoded)
    except (TypeError, orjson.JSONEncodeError) as error:
        raise InvalidInputError(f"cannot write the event as JSON: {error}", ErrorKind.SERIALIZATION) from error
    return encoded


def decode_events(encoded: Sequence[object]) -> tuple[e.Event, ...]:
    """Read `encode_events` back: what everybody will fold. Raises ValueError, or a private one for unknown kinds."""
    events: list[e.Event] = []
    for value in encoded:
        fields = _Fields(value)
        kind = fields.text("kind")
        reader = _READERS.get(kind)
        if reader is None:
            raise _TooNew(f"unknown event {kind!r}")
        events.append(reader(fields))
        fields.finish()
    return tuple(events)


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
    return bytes(memoryview(orjson.dumps(document)))


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
        fields = _Fields(orjson.loads(data))
        version = fields.natural("v")
        if version != VERSION:
            raise _TooNew(f"version {version}, known is {VERSION}")
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
    except _TooNew as error:
        raise FormatError(
            f"the log entry {where} was written by a newer version of aioicechunk ({error}); upgrade to read this "
            "repository",
            ErrorKind.UNSUPPORTED_SPEC_VERSION,
        ) from None
    except (ValueError, TypeError, RecursionError, IcechunkError) as error:
        raise FormatError(f"the log entry {where} is corrupt: {error}") from error


def _read_objects(fields: _Fields) -> dict[str, bytes]:
    try:
        objects = fields.any("objects")
    except ValueError:
        return {}
    if not isinstance(objects, dict):
        raise ValueError("field 'objects' is not a map")
    return {key: base64.b64decode(value, validate=True) for key, value in objects.items()}
