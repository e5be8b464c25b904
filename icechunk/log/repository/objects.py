"""Objects that clients of every layout read: ``repo``, a slot of a log, the refs of format 1.

A repository of any layout may have been, or may become, one of another, so its clients recognise the objects of all.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any, Final

from icechunk.config.repository import DEFAULT_NUM_UPDATES_PER_REPO_INFO_FILE
from icechunk.errors import (
    AccessDeniedError,
    CommitOutcomeUnknown,
    FormatError,
    ObjectNotFoundError,
    PreconditionFailedError,
)
from icechunk.format.keys import REFS_PREFIX, REPO_KEY
from icechunk.format.repo.codec import EncodedRepo, decode_repo, encode_and_keep
from icechunk.format.repo.repo_info import READ_ONLY, RepoInfo
from icechunk.log.repository.entry import (
    LOG_PREFIX,
    Entry,
    copy_key,
    decode_entry,
    parse_copy_key,
    parse_slot_key,
    slot_key,
)
from icechunk.log.repository.events import CONVERT, Sealed
from icechunk.log.repository.freshness import TRUST_US, Instant, instant, is_fresh
from icechunk.log.repository.marker import Marker, decode_marker
from icechunk.log.repository.port import SwapToken
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass, replace
from icechunk.runtime.tasks import in_thread
from icechunk.storage.port import NO_LISTING, Absent, GetResult, Storage, Version

__all__ = [
    "MAIN_REF_KEY",
    "THREAD_FROM_SNAPSHOTS",
    "Known",
    "RepoObject",
    "could_read",
    "encode",
    "entry_of",
    "get_slot",
    "known_of",
    "nonce_in_slot",
    "put_once",
    "read_repo",
    "read_repo_or_checkpoint",
    "read_slot",
    "ref_files_there",
    "updates_per_file_of",
]

THREAD_FROM_SNAPSHOTS: Final = 2000
"""From this number on, encoding ``repo`` takes so long that it is done beside the loop."""

MAIN_REF_KEY: Final = f"{REFS_PREFIX}branch.main/ref.json"
"""The branch that every repository of format 1 has."""


def updates_per_file_of(given: int | None, config: Any) -> int:
    """Most entries of the ops log that one ``repo`` object holds: as given, else as a persisted configuration says."""
    if given is not None:
        return max(1, given)
    persisted = config.get("num_updates_per_repo_info_file") if isinstance(config, dict) else None
    return persisted if isinstance(persisted, int) and persisted > 0 else DEFAULT_NUM_UPDATES_PER_REPO_INFO_FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The part of a folded ``repo`` object that is kept: enough to replace it without reading it again."""

    version: Version
    marker: Marker | None
    read_only: bool
    """Whether it shows the read-only status that protects a log."""
    size_bytes: int
    newest_us: int
    """Time of its newest update; 0: it has none."""
    count: int
    """Updates that it holds."""
    before: str | None
    """The ``repo_before_updates`` of the object."""
    copy: bytes | None = None
    """The durable copy of the object, if the object itself is torn, as a power failure may leave it; all other fields
    but `version` are then those of the copy. The copy must replace the object before that is replaced or copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoObject:
    """A ``repo`` object as read."""

    info: RepoInfo
    known: Known
    asked: Instant
    """Client clocks before the request, store time of the answer."""


def known_of(info: RepoInfo, version: Version, size_bytes: int) -> Known:
    """The part of a ``repo`` object that is remembered."""
    return Known(
        version=version,
        marker=decode_marker(info.extra),
        read_only=info.status.availability == READ_ONLY,
        size_bytes=size_bytes,
        newest_us=info.updates[0].updated_at_us if info.updates else 0,
        count=len(info.updates),
        before=info.repo_before_updates,
    )


async def read_repo(
    storage: Storage, sources: Sources, *, like: tuple[bytes, RepoObject] | None = None
) -> RepoObject | None:
    """GET ``repo``; None where there is none. Raises `FormatError` where it is not one.

    If syncs are deferred and a power failure has torn the object, its durable copy is read instead.

    Parameters
    ----------
    like
        Bytes that it may have, and the object as decoded from them: equal ones are not decoded again.
    """
    before = instant(sources)
    try:
        answer = await storage.get(REPO_KEY)
    except ObjectNotFoundError:
        return None
    if like is not None and answer.data == like[0]:
        known = replace(like[1].known, version=answer.version)
        return replace(like[1], known=known, asked=before._replace(date_us=answer.date_us))
    try:
        return _repo_of(answer, before)
    except FormatError as error:
        copied = await _read_copy(storage) if storage.defers_syncs else None
        if copied is None:
            raise FormatError(
                f"cannot read {REPO_KEY!r} in {storage.describe()}: {error.message}", error.kind
            ) from error
        info, copy = copied
        known = replace(known_of(info, answer.version, len(copy)), copy=copy)
        return RepoObject(info=info, known=known, asked=before._replace(date_us=answer.date_us))


async def read_repo_or_checkpoint(storage: Storage, sources: Sources) -> RepoObject | None:
    """As `read_repo`, but on local disk without waiting for the disk where ``repo`` is a checkpoint of a log that
    was replaced without waiting.

    All that such a checkpoint says is in durable slots, and the one with its ``durable`` was made durable before it
    was replaced (rule 12 of ``spec/repository-log.md``).
    """
    before, like = instant(sources), None
    for unsynced in (False, True):
        answer = storage.get_at_once(REPO_KEY, unsynced=unsynced)
        if answer is None:
            continue
        with suppress(FormatError):
            found = _repo_of(answer, before)
            marker = found.known.marker if found.known.read_only else None
            is_replaced_unsynced = marker is not None and marker.durable is not None and marker.durable < marker.n
            if not unsynced or is_replaced_unsynced:
                return found
            like = answer.data, found
        break
    return await read_repo(storage, sources, like=like)


def _repo_of(answer: GetResult, before: Instant) -> RepoObject:
    info = decode_repo(answer.data)
    known = known_of(info, answer.version, len(answer.data))
    return RepoObject(info=info, known=known, asked=before._replace(date_us=answer.date_us))


async def _read_copy(storage: Storage) -> tuple[RepoInfo, bytes] | None:
    """The durable copy of a torn ``repo``, decoded, and its bytes; None if there is none.

    A ``repo`` is written without waiting only if it holds slots after its copy, so those slots exist. A copy without
    them belongs to a ``repo`` that was never written, and that of a log that was taken over is obsolete. A log that is
    being converted has copies until its ``repo`` is durable.
    """
    newest: dict[str, int] = {}
    slots: set[tuple[str, int]] = set()
    copies: list[tuple[str, int]] = []
    async for page in storage.list_pages(LOG_PREFIX):
        for item in page:
            if (slot := parse_slot_key(item.key)) is not None:
                slots.add(slot)
                newest[slot[0]] = max(slot[1], newest.get(slot[0], 0))
            elif (copy := parse_copy_key(item.key)) is not None:
                copies.append(copy)
    for epoch, n in copies:
        if (epoch, n + 1) not in slots:
            continue
        last = await read_slot(storage, epoch, newest[epoch])
        if last is None or any(isinstance(event, Sealed) and event.reason != CONVERT for event in last[0].events):
            continue
        data = (await storage.get(copy_key(epoch, n))).data
        return decode_repo(data), data
    return None


async def read_slot(storage: Storage, epoch: str, n: int) -> tuple[Entry, GetResult] | None:
    """GET a slot; None where it is empty.

    If a refused read may mean that there is no such object, the slot before it is read: if that succeeds, this slot
    could be read too if it existed, so it is empty (rule 6).

    Raises
    ------
    FormatError
        It holds no entry.
    AccessDeniedError
        It cannot be read, and neither can the one before it, or there is none.
    """
    try:
        return await get_slot(storage, epoch, n)
    except AccessDeniedError as denied:
        if await could_read(storage, denied, epoch, n - 1):
            return None
        raise


async def could_read(storage: Storage, denied: AccessDeniedError, epoch: str, n: int) -> bool:
    """Whether a slot that was taken can be read, so that one that cannot does not exist."""
    if not denied.may_be_absent or n < 1:
        return False
    try:
        await storage.head(slot_key(epoch, n))
    except (AccessDeniedError, ObjectNotFoundError):
        return False
    return True


async def get_slot(storage: Storage, epoch: str, n: int) -> tuple[Entry, GetResult] | None:
    """As `read_slot`; a refused read is `AccessDeniedError` in any case."""
    key = slot_key(epoch, n)
    try:
        answer = await storage.get(key)
    except ObjectNotFoundError:
        return None
    return entry_of(storage, key, n, answer), answer


def entry_of(storage: Storage, key: str, n: int, answer: GetResult) -> Entry:
    """The entry in a slot that was read. Raises `FormatError` if it holds none."""
    return decode_entry(answer.data, n=n, what=f"{key} in {storage.describe()}")


async def nonce_in_slot(storage: Storage, sources: Sources, token: SwapToken, *, repo: RepoObject | None) -> bytes:
    """Nonce of the entry in a token's slot, which is known to be taken.

    Parameters
    ----------
    repo
        As it was read just now, with a marker of the token's epoch: slots after it were not pruned before. None: the
        epoch has ended.

    Raises
    ------
    CommitOutcomeUnknown
        The slot may have been pruned and made again, or is gone.
    """
    found = await read_slot(storage, token.epoch, token.n)
    if found is not None:
        entry, answer = found
        marker = None if repo is None else repo.known.marker
        after_marker = marker is not None and marker.epoch == token.epoch and token.n > marker.n
        if repo is not None and after_marker and is_fresh(repo.asked, instant(sources, answer.date_us)):
            return entry.nonce
        if token.known_us is not None and answer.date_us is not None and answer.date_us - token.known_us <= TRUST_US:
            return entry.nonce
    raise CommitOutcomeUnknown(
        f"slot {token.n} of the log in {storage.describe()} may have been pruned since; look whether the change is "
        "there",
        token,
    )


async def ref_files_there(storage: Storage) -> bool:
    """Whether there are branches or tags of format 1 in this place; without listings, whether ``main`` is there."""
    pages = storage.list_pages(REFS_PREFIX, page_size=1)
    try:
        async for page in pages:
            if page:
                return True
    except NO_LISTING:
        try:
            await storage.get(MAIN_REF_KEY)
        except ObjectNotFoundError:
            return False
        return True
    finally:
        aclose = getattr(pages, "aclose", None)
        if aclose is not None:
            await aclose()
    return False


async def encode(info: RepoInfo) -> EncodedRepo:
    """Encode ``repo``, in a thread where that takes long."""
    if len(info.snapshots) < THREAD_FROM_SNAPSHOTS:
        return encode_and_keep(info)
    return await in_thread(partial(encode_and_keep, info))


async def put_once(storage: Storage, key: str, data: bytes) -> None:
    """Put an immutable file where it is absent; that it is there already is as good."""
    try:
        await storage.put(key, data, Absent())
    except PreconditionFailedError:
        return
