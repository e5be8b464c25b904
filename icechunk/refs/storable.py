"""What the format's ``repo`` object can hold of an event.

The fold refuses the rest: what could be acknowledged but never written to a checkpoint would stop all
checkpoints for good. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias, assert_never

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format import flexbuffers
from icechunk.format.repo_values import OFFLINE, ONLINE, READ_ONLY, SnapshotRecord
from icechunk.refs import events as e

__all__ = ["LAST_TIME_US", "require_storable", "require_time"]

Json: TypeAlias = Any

LAST_TIME_US: Final = 253_402_300_799_999_999
"""The last µs of the year 9999, after which calendars end."""


def require_time(what: str, time_us: int) -> None:
    """Refuse a time (µs since 1970) that no calendar has. Raises `InvalidInputError`."""
    _require_number(what, time_us, 0, LAST_TIME_US)


def require_storable(event: e.Event) -> None:
    """Refuse an event with a value that the ``repo`` object has no room for.

    Raises
    ------
    InvalidInputError
        A number out of range, text that is no UTF-8, or metadata or configuration that FlexBuffers cannot hold.
    """
    match event:
        case e.CommitAdded(branch=name, snapshot=snapshot) | e.CommitAmended(branch=name, snapshot=snapshot):
            _require_texts(name)
            _require_snapshot(snapshot)
        case e.DetachedSnapshotAdded(snapshot=snapshot):
            _require_snapshot(snapshot)
        case e.BranchCreated(name=name) | e.BranchReset(name=name) | e.BranchDeleted(name=name):
            _require_texts(name)
        case e.TagCreated(name=name) | e.TagDeleted(name=name):
            _require_texts(name)
        case e.ConfigReplaced(config=config):
            _require_json("configuration", config)
        case e.MetadataReplaced(metadata=metadata) | e.MetadataUpdated(metadata=metadata):
            _require_metadata(metadata)
        case e.StatusSet(availability=availability, reason=reason):
            if availability not in (ONLINE, READ_ONLY, OFFLINE):
                raise InvalidInputError(f"availability {availability} is not 0 online, 1 read-only or 2 offline")
            if reason is not None:
                _require_texts(reason)
        case e.FeatureFlagSet(flag=flag):
            _require_number("feature flag", flag, 0, (1 << 16) - 1)
        case e.RepositoryMigrated(from_version=old, to_version=new):
            _require_number("format version", old, 0, (1 << 8) - 1)
            _require_number("format version", new, 0, (1 << 8) - 1)
        case e.CollectionRan(cutoff_us=cutoff_us):
            require_time("cutoff of the collection", cutoff_us)
        case e.ExpirationRan(deleted_branches=branches, deleted_tags=tags):
            _require_texts(*branches, *tags)
        case e.Sealed() | e.Void():
            pass
        case _:
            assert_never(event)


def _require_snapshot(snapshot: SnapshotRecord) -> None:
    require_time("time of the snapshot", snapshot.flushed_at_us)
    _require_texts(snapshot.message)
    _require_metadata(snapshot.metadata)


def _require_number(what: str, value: int, first: int, last: int) -> None:
    if not first <= value <= last:
        raise InvalidInputError(f"{what} {value} is out of range: {first} to {last}")


def _require_texts(*texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidInputError(f"text {text!r} cannot be written as UTF-8", ErrorKind.SERIALIZATION) from None


def _require_metadata(metadata: Mapping[str, Json]) -> None:
    for name, value in metadata.items():
        _require_texts(name)
        if "\0" in name:
            # The format could, entries cannot: NUL marks their reserved keys.
            raise InvalidInputError(f"metadata key {name!r} holds a NUL character", ErrorKind.SERIALIZATION)
        _require_json("metadata", value)


def _require_json(what: str, value: Json) -> None:
    try:
        flexbuffers.dumps(value)
    except InvalidInputError as error:
        raise InvalidInputError(f"{what} cannot be stored: {error}", ErrorKind.SERIALIZATION) from error
