"""Events of the repository log as JSON. Pure.

Readers are strict: a kind or a field that they do not know stops them, since an event that cannot be folded must not be
skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.ids import ObjectId, encode_id, encode_ids, object_id_from_text, object_ids_from_texts
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.log.repository import events as e
from icechunk.log.repository.events import pack, unpack
from icechunk.runtime import json_codec

__all__ = ["EncodedEvents", "Fields", "TooNewError", "decode_events", "encode_events"]

EncodedEvents = list[dict[str, Any]]
"""Events as JSON values, each a map with its ``kind``."""


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


class Fields:
    """A decoded JSON map. Every field must be taken from it, once, by the method of its type; else `ValueError`."""

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
        if not set(map(type, values)) <= {str}:
            raise ValueError(f"field {name!r} holds something that is not text")
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
            raise TooNewError(f"unknown field {next(iter(self._left))!r}")


class TooNewError(Exception):
    """A newer version of this library wrote it."""


def _read_snapshot(value: object) -> SnapshotRecord:
    fields = Fields(value)
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
    fields = Fields(value)
    change = e.Reparented(
        id=fields.id("id"), parent=fields.id_or_none("parent"), pruned_ancestor_tx_logs=fields.ids("pruned")
    )
    fields.finish()
    return change


def _read_pair(value: object) -> tuple[ObjectId, ObjectId]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(text, str) for text in value):
        raise ValueError("two ids expected")
    return object_id_from_text(value[0]), object_id_from_text(value[1])


_READERS: Final[Mapping[str, Callable[[Fields], e.Event]]] = {
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
        json_codec.dumps(encoded)
    except json_codec.JSONEncodeError as error:
        raise InvalidInputError(f"cannot write the event as JSON: {error}", ErrorKind.SERIALIZATION) from error
    return encoded


def decode_events(encoded: Sequence[object]) -> tuple[e.Event, ...]:
    """The events that every reader will fold. Raises `ValueError`; `TooNewError` for an unknown kind or field."""
    events: list[e.Event] = []
    for value in encoded:
        fields = Fields(value)
        kind = fields.text("kind")
        reader = _READERS.get(kind)
        if reader is None:
            raise TooNewError(f"unknown event {kind!r}")
        events.append(reader(fields))
        fields.finish()
    return tuple(events)
