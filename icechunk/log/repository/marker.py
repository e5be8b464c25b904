"""Encoding of ``extra`` of a ``repo`` object, in two layouts. Pure.

In the log layout ``repo`` is a checkpoint: other readers of the format see a complete, read-only repository; the
marker in ``extra`` names the slot up to which the log is folded into it, and keeps values that the format has no field
for.

In the repo-object layout ``extra`` holds the nonce of the write and the cutoff of the last collection. The official
library drops ``extra`` whenever it rewrites ``repo``; that is no error, both values are unknown then. While an upgrade
from format 1 is not finished, ``extra`` says so.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from types import MappingProxyType
from typing import Any, Final

from icechunk.errors import ErrorKind, FormatError
from icechunk.format.keys import manifest_key, snapshot_key
from icechunk.format.repo.repo_info import READ_ONLY, RepoInfo, Status, Update
from icechunk.format.snapshot.codec import decode_snapshot
from icechunk.log.repository.state import MAIN, RepoState, from_repo_info, to_repo_info
from icechunk.runtime import json_codec
from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "READ_ONLY_REASON",
    "Kept",
    "Marker",
    "checkpoint_info",
    "cutoff_of",
    "decode_marker",
    "encode_marker",
    "files_to_open_with",
    "is_unfinished",
    "keep_updates",
    "nonce_of",
    "state_of",
    "unmarked_info",
    "upgrade_mark",
    "write_mark",
]

_OBJECT_NAME: Final = "aioicechunk-write"


def write_mark(nonce: bytes, touch: bytes = b"", *, gc_cutoff_us: int = 0) -> bytes:
    """The bytes of ``extra``.

    Parameters
    ----------
    nonce
        Of the write.
    touch
        Random bytes that make the object unique where the same state is written once more; empty: none.
    gc_cutoff_us
        Of the last collection, store time in µs; 0: none is known.
    """
    document: dict[str, Any] = {_OBJECT_NAME: nonce.hex()}
    if touch:
        document["touch"] = touch.hex()
    if gc_cutoff_us:
        document["gc"] = gc_cutoff_us
    return json_codec.dumps(document)


def _document(extra: bytes | None) -> dict[str, Any]:
    if extra is None:
        return {}
    try:
        document = json_codec.loads(extra)
    except json_codec.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) and _OBJECT_NAME in document else {}


def nonce_of(extra: bytes | None) -> bytes | None:
    """The nonce of the write, or None if ``extra`` is absent or has another form."""
    try:
        return bytes.fromhex(_document(extra)[_OBJECT_NAME])
    except (KeyError, TypeError, ValueError):
        return None


def cutoff_of(extra: bytes | None) -> int:
    """The cutoff of the last collection, store time in µs; 0 where none is known."""
    cutoff = _document(extra).get("gc", 0)
    return cutoff if type(cutoff) is int and 0 <= cutoff < 1 << 63 else 0


_UPGRADE_NAME: Final = "aioicechunk-upgrade"


def upgrade_mark(nonce: bytes) -> bytes:
    """The bytes of ``extra`` as long as an upgrade from format 1 is not finished."""
    return json_codec.dumps({_UPGRADE_NAME: nonce.hex()})


def is_unfinished(info: RepoInfo) -> bool:
    """Whether ``repo`` is that of an upgrade from format 1 that is not finished: until then the refs count."""
    if info.extra is None or info.status.availability != READ_ONLY:
        return False
    try:
        document = json_codec.loads(info.extra)
    except json_codec.JSONDecodeError:
        return False
    return isinstance(document, dict) and _UPGRADE_NAME in document


READ_ONLY_REASON: Final = (
    "this repository is kept in aioicechunk's log layout: commits are objects under log/, and this object is a copy "
    "for readers. Setting it online makes this copy the truth and abandons every commit that is only in the log; "
    "convert the repository with aioicechunk instead"
)
"""The reason that a client of another library is shown when it is refused."""

_NAME: Final = "aioicechunk-log"
_VERSION: Final = 1
_FILES_BYTES: Final = 24 * 1024
NO_FILES: Final[Mapping[str, bytes]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """The contents of ``extra``."""

    epoch: str
    """Life of the log that the checkpoint belongs to."""
    n: int
    """Last slot folded into it; 0: none."""
    status: Status
    """The repository's real status, which may differ from the one that ``repo`` shows."""
    gc_cutoff_us: int
    """Cutoff of the last collection, store time in µs; 0: there was none."""
    last_time_us: int
    """Time of the last event folded in, µs."""
    durable: int | None = None
    """Last slot whose embedded files are durable as objects, where ``repo`` is written without waiting for the disk: a
    durable copy of the checkpoint up to it, or a later one, exists. None: it is ``n``, and no copy is known."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Copies of small files that a client needs first after opening, by key; they only save reading."""

    @property
    def durable_n(self) -> int:
        """Last slot whose embedded files exist as durable objects."""
        return self.n if self.durable is None else self.durable


def encode_marker(marker: Marker) -> bytes:
    """The bytes of ``extra``."""
    status = marker.status
    document: dict[str, object] = {
        _NAME: _VERSION,
        "epoch": marker.epoch,
        "n": marker.n,
        "status": [status.availability, status.set_at_us, status.reason],
        "gc": marker.gc_cutoff_us,
        "time": marker.last_time_us,
    }
    if marker.durable is not None:
        document["durable"] = marker.durable
    if marker.files:
        document["files"] = {key: base64.b64encode(data).decode() for key, data in marker.files.items()}
    return json_codec.dumps(document)


def decode_marker(extra: bytes | None) -> Marker | None:
    """The marker of the log layout, or None if ``extra`` is absent or has another form.

    Raises
    ------
    FormatError
        A marker of ours that is corrupt, or, with kind ``unsupported-spec-version``, of a newer version.
    """
    if extra is None:
        return None
    try:
        document = json_codec.loads(extra)
    except json_codec.JSONDecodeError:
        return None
    if not isinstance(document, dict) or _NAME not in document:
        return None
    if document[_NAME] != _VERSION:
        raise FormatError(
            f"the log layout of this repository has version {document[_NAME]}, known is {_VERSION}; "
            "upgrade aioicechunk",
            ErrorKind.UNSUPPORTED_SPEC_VERSION,
        )
    try:
        availability, set_at_us, reason = document["status"]
        durable = document.get("durable")
        numbers = (
            availability,
            set_at_us,
            document["n"],
            document["gc"],
            document["time"],
            0 if durable is None else durable,
        )
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
            raise ValueError("a number is out of range")
        if not (reason is None or isinstance(reason, str)) or not isinstance(document["epoch"], str):
            raise ValueError("a text is missing")
        if not document["epoch"].isalnum():
            raise ValueError("bad epoch")
        return Marker(
            epoch=document["epoch"],
            n=document["n"],
            status=Status(availability=availability, set_at_us=set_at_us, reason=reason),
            gc_cutoff_us=document["gc"],
            last_time_us=document["time"],
            durable=durable,
            files={key: base64.b64decode(data, validate=True) for key, data in document.get("files", {}).items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"the marker of the log layout in 'repo' is corrupt: {error}") from error


def state_of(info: RepoInfo, marker: Marker | None) -> RepoState:
    """The repository's state as the object has it: the real status, the collection's cutoff."""
    if marker is None:
        return from_repo_info(info, gc_cutoff_us=cutoff_of(info.extra))
    return from_repo_info(
        info, status=marker.status, gc_cutoff_us=marker.gc_cutoff_us, last_time_us=marker.last_time_us
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The part of the ops log that the next ``repo`` object holds."""

    updates: Sequence[Update]
    """Updates, newest first."""
    before: str | None
    """Bare name of the backup that holds the updates before those."""
    needs_backup: bool
    """Whether ``before`` is a backup of the present object, to be made first."""


def keep_updates(
    state: RepoState, *, newest_us: int, count: int, before: str | None, limit: int, backup_name: str
) -> Kept:
    """Decide how the ops log is divided between the next ``repo`` object and backups.

    As long as everything fits, the next object continues the present one's list. Otherwise the present one is
    backed up and the next one starts a list of its own, so each update is in exactly one list.

    Parameters
    ----------
    newest_us, count, before
        Of the present object: time of its newest update, how many it holds, its ``repo_before_updates``.
    limit
        Most updates that an object should hold.
    """
    fresh = state.updates.newer_than(newest_us)
    if len(fresh) + count > limit and fresh and count:
        return Kept(updates=fresh, before=backup_name, needs_backup=True)
    return Kept(updates=state.updates.newest(len(fresh) + count), before=before, needs_backup=False)


def checkpoint_info(
    state: RepoState,
    *,
    epoch: str,
    n: int,
    durable: int | None = None,
    kept: Kept | None = None,
    files: Mapping[str, bytes] = NO_FILES,
) -> RepoInfo:
    """The ``repo`` object that holds the log up to slot ``n``, with copies of these files. `durable` as in `Marker`."""
    marker = Marker(
        epoch=epoch,
        n=n,
        status=state.status,
        gc_cutoff_us=state.gc_cutoff_us,
        last_time_us=state.last_time_us,
        durable=durable,
        files=files,
    )
    shown = Status(availability=READ_ONLY, set_at_us=state.status.set_at_us, reason=READ_ONLY_REASON)
    return to_repo_info(
        state,
        status=shown,
        updates=kept.updates if kept else None,
        repo_before_updates=kept.before if kept else None,
        extra=encode_marker(marker),
    )


def files_to_open_with(state: RepoState, known: Callable[[str], bytes | None]) -> dict[str, bytes]:
    """The files of ``main``'s tip, as far as they are known and small: what most clients read first.

    Parameters
    ----------
    known
        The bytes of a file that is in memory; None where it is not.
    """
    tip = state.branches[MAIN]
    data = known(snapshot_key(tip))
    if data is None or len(data) > _FILES_BYTES:
        return {}
    found, size = {snapshot_key(tip): data}, len(data)
    for id, manifest in decode_snapshot(data, expected_id=tip).manifest_files.items():
        key = manifest_key(id)
        data = known(key) if manifest.size_bytes <= _FILES_BYTES - size else None
        if data is not None and len(data) <= _FILES_BYTES - size:
            found[key], size = data, size + len(data)
    return found


def unmarked_info(state: RepoState, *, kept: Kept | None = None) -> RepoInfo:
    """The ``repo`` object that is authoritative from now on: real status, no marker."""
    return to_repo_info(
        state,
        updates=kept.updates if kept else None,
        repo_before_updates=kept.before if kept else None,
        extra=write_mark(b"", gc_cutoff_us=state.gc_cutoff_us) if state.gc_cutoff_us else None,
    )
