"""Reading the log: single slots, the tail, and opening at the head (rules 5 and 6).

The fold is always a checkpoint and a contiguous tail after it. A listing is only a hint for the end of the tail; a slot
that is missing on the way means that the checkpoint has moved meanwhile.

Two pure decisions about time are here too: whether an answer about the end of the log is fresh (rule 5), and whether a
client's clock allows it to write (rule 13). A pruner waits `PRUNE_WAIT_US` between announcing and deleting; a client
relies on what it knows for half of that, so it never takes a slot that was pruned and made again for the next one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from icechunk.errors import (
    AccessDeniedError,
    CommitOutcomeUnknown,
    ErrorKind,
    FormatError,
    ObjectNotFoundError,
    RepositoryNotFoundError,
)
from icechunk.format.keys import REFS_PREFIX, REPO_KEY
from icechunk.format.repo.codec import decode_repo
from icechunk.format.repo.repo_info import READ_ONLY, RepoInfo
from icechunk.log.repository.entries.entry import (
    LOG_PREFIX,
    Entry,
    copy_key,
    decode_entry,
    epoch_prefix,
    parse_copy_key,
    parse_slot_key,
    slot_key,
)
from icechunk.log.repository.events import Sealed
from icechunk.log.repository.marker import Marker, decode_marker, state_of
from icechunk.log.repository.port import SwapToken
from icechunk.log.repository.state import RepoState, try_apply_all
from icechunk.runtime.clock import Sources
from icechunk.runtime.tasks import run_jobs, run_pair
from icechunk.storage.port import NO_LISTING, GetResult, ObjectInfo, Storage, Version

__all__ = [
    "MAIN_REF_KEY",
    "MAX_SKEW_US",
    "PRUNE_WAIT_US",
    "TRUST_US",
    "Head",
    "Instant",
    "Known",
    "Opened",
    "RepoObject",
    "clock_error_us",
    "fold_entry",
    "instant",
    "is_fresh",
    "known_of",
    "list_head",
    "newest_epoch",
    "nonce_in_slot",
    "open_head",
    "read_repo",
    "read_slot",
    "read_tail",
    "read_until_absent",
    "ref_files_there",
    "store_time_us",
    "try_list_head",
]

PRUNE_WAIT_US: Final = 7 * 24 * 3600 * 1_000_000
"""G of the rules; a constant of the layout."""
TRUST_US: Final = PRUNE_WAIT_US // 2
MAX_SKEW_US: Final = 600 * 1_000_000
"""A writer further off than this from the store's clock does not write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """A moment on the clocks that can be read of it."""

    date_us: int | None
    """Store time; None where the store does not say."""
    elapsed_us: int
    """The client's clock that never goes back."""
    wall_us: int
    """The client's wall clock."""


def is_fresh(freshness: Instant, answer: Instant) -> bool:
    """Whether an answer about a slot counts: the client last knew the end of the log at ``freshness`` (rule 5).

    Parameters
    ----------
    freshness
        Client clocks of before the request, store time of its answer.
    answer
        Client clocks of after the answer.
    """
    if freshness.date_us is not None and answer.date_us is not None:
        return answer.date_us - freshness.date_us <= TRUST_US
    return max(answer.elapsed_us - freshness.elapsed_us, answer.wall_us - freshness.wall_us) <= TRUST_US


def clock_error_us(seen: Instant, now: Instant) -> int:
    """How far the client's wall clock is ahead of the store's (negative: behind), by the last answer with a date.

    Parameters
    ----------
    seen
        An answer; 0 is returned where it has no date.
    """
    if seen.date_us is None:
        return 0
    return now.wall_us - (seen.date_us + now.elapsed_us - seen.elapsed_us)


def store_time_us(seen: Instant, now: Instant, *, resolution_us: int) -> int:
    """The store's clock now, or a little less, µs: what is written from now on is not older (rule 10).

    Parameters
    ----------
    seen
        The last answer; without a date of the store, the wall clock counts, as far off as it may be.
    resolution_us
        Resolution of the store's times of objects, µs.
    """
    if seen.date_us is None:
        return max(0, now.wall_us - MAX_SKEW_US)
    # Last-Modified is rounded down, and may be that of the request's beginning.
    estimate = seen.date_us + max(0, now.elapsed_us - seen.elapsed_us)
    return max(0, estimate // resolution_us * resolution_us - resolution_us)


MAIN_REF_KEY: Final = f"{REFS_PREFIX}branch.main/ref.json"
"""The branch that every repository of format 1 has."""
_PAGE: Final = 50
_LOOK_BEYOND: Final = 2
"""Slots that have to be absent one after the other where no listing says how far the log goes."""
_OPEN_ATTEMPTS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A place in the log, and what everything up to it folds to."""

    epoch: str
    n: int
    state: RepoState
    voided: frozenset[int] = frozenset()
    """Slots folded since the log was opened whose entry changed nothing, since an event of it did not apply."""


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
    """Its ``repo_before_updates``."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The log, read up to its head."""

    head: Head
    freshness: Instant
    known: Known
    tail: tuple[Entry, ...]
    """Entries after the checkpoint, oldest first."""


def instant(sources: Sources, date_us: int | None = None) -> Instant:
    """Now, by the client's clocks."""
    return Instant(date_us=date_us, elapsed_us=sources.elapsed_us(), wall_us=sources.wall_us())


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


async def read_repo(storage: Storage, sources: Sources) -> RepoObject | None:
    """GET ``repo``; None where there is none. Raises `FormatError` where it is not one.

    If syncs are deferred and a power failure has torn the object, its durable copy is read instead.
    """
    before = instant(sources)
    try:
        answer = await storage.get(REPO_KEY)
    except ObjectNotFoundError:
        return None
    try:
        info = decode_repo(answer.data)
    except FormatError as error:
        copied = await _read_copy(storage) if storage.defers_syncs else None
        if copied is None:
            raise FormatError(
                f"cannot read {REPO_KEY!r} in {storage.describe()}: {error.message}", error.kind
            ) from error
        info, copy = copied
        known = replace(known_of(info, answer.version, len(copy)), copy=copy)
        return RepoObject(info=info, known=known, asked=replace(before, date_us=answer.date_us))
    asked = replace(before, date_us=answer.date_us)
    return RepoObject(info=info, known=known_of(info, answer.version, len(answer.data)), asked=asked)


async def _read_copy(storage: Storage) -> tuple[RepoInfo, bytes] | None:
    """The durable copy of a torn ``repo``, decoded, and its bytes; None if there is none.

    A ``repo`` is written without waiting only if it holds slots after its copy, so those slots exist. A copy without
    them belongs to a ``repo`` that was never written, and a copy of a log that has ended is obsolete.
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
        if last is None or any(isinstance(event, Sealed) for event in last[0].events):
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
        return await _get_slot(storage, epoch, n)
    except AccessDeniedError as denied:
        if await _could_read(storage, denied, epoch, n - 1):
            return None
        raise


async def _could_read(storage: Storage, denied: AccessDeniedError, epoch: str, n: int) -> bool:
    """Whether a slot that was taken can be read, so that one that cannot does not exist."""
    if not denied.may_be_absent or n < 1:
        return False
    try:
        await storage.head(slot_key(epoch, n))
    except (AccessDeniedError, ObjectNotFoundError):
        return False
    return True


async def _get_slot(storage: Storage, epoch: str, n: int) -> tuple[Entry, GetResult] | None:
    key = slot_key(epoch, n)
    try:
        answer = await storage.get(key)
    except ObjectNotFoundError:
        return None
    return decode_entry(answer.data, n=n, what=f"{key} in {storage.describe()}"), answer


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


async def read_tail(storage: Storage, epoch: str, after: int, end: int) -> list[Entry]:
    """GET the slots after ``after`` up to ``end`` (inclusive) at once; ends before the first one that is missing."""
    return list(_unbroken(await _read_slots(storage, epoch, after, end)))


async def read_until_absent(storage: Storage, epoch: str, after: int) -> tuple[list[Entry], int]:
    """GET the slots after ``after``, ever more at once, until some are absent: rule 6 without a listing.

    Where ``after`` is 0, ``repo`` has just said that it has seen no slot, and refused reads mean absent ones.

    Returns
    -------
    list of Entry
        Those before the first absent slot.
    int
        The newest slot seen: beyond the last entry where one is missing in between.
    """
    entries: list[Entry] = []
    ahead = 1 + _LOOK_BEYOND
    while True:
        first = after + len(entries)
        slots = await _read_slots(storage, epoch, first, first + ahead, believe_none=first == 0)
        found = list(_unbroken(slots))
        entries += found
        if len(found) + _LOOK_BEYOND <= ahead:
            return entries, max((entry.n for entry in slots if entry is not None), default=first)
        ahead = min(2 * ahead, _PAGE)


async def _read_slots(
    storage: Storage, epoch: str, after: int, end: int, *, believe_none: bool = False
) -> list[Entry | None]:
    """GET the slots after ``after``, which was taken, up to ``end``; None where one is empty; errors as `read_slot`.

    Parameters
    ----------
    believe_none
        Whether slots count as empty if the store refuses to read any of them, and may do so because they are.
    """
    refusals: list[AccessDeniedError] = []

    async def get(n: int) -> Entry | None:
        try:
            found = await _get_slot(storage, epoch, n)
        except AccessDeniedError as denied:
            refusals.append(denied)
            return None
        return None if found is None else found[0]

    jobs: list[Callable[[], Awaitable[Entry | None]]] = [partial(get, n) for n in range(after + 1, end + 1)]
    slots = await run_jobs(jobs)
    if refusals:
        known = believe_none or any(entry is not None for entry in slots)
        hidden = all(denied.may_be_absent for denied in refusals)
        if not (hidden and known) and not await _could_read(storage, refusals[0], epoch, after):
            raise refusals[0]
    return slots


def _unbroken(slots: Iterable[Entry | None]) -> Iterator[Entry]:
    for entry in slots:
        if entry is None:
            return
        yield entry


def fold_entry(head: Head, entry: Entry) -> Head:
    """The head after the next entry; one with an event that does not apply changes nothing (rule 4)."""
    if entry.n != head.n + 1:
        raise ValueError(f"slot {entry.n} does not follow slot {head.n}")
    state = try_apply_all(head.state, entry.events, time_us=entry.time_us, since_us=entry.since_us)
    if state is None:
        return replace(head, n=entry.n, voided=head.voided | {entry.n})
    return replace(head, n=entry.n, state=state)


async def _first_slot(storage: Storage, prefix: str, epoch: str | None) -> tuple[str, int] | None:
    """The first key below the prefix that is a slot, of that epoch if one is given."""
    pages = storage.list_pages(prefix, page_size=_PAGE)
    try:
        async for page in pages:
            for item in page:
                slot = parse_slot_key(item.key)
                if slot is not None and (epoch is None or slot[0] == epoch):
                    return slot
    finally:
        await _stop(pages)
    return None


async def _stop(pages: object) -> None:
    aclose = getattr(pages, "aclose", None)
    if aclose is not None:
        await aclose()


async def try_list_head(storage: Storage, epoch: str) -> int | None:
    """As `list_head`; None where nothing can be listed, or only at more than the cost of what is taken of it."""
    if not storage.lists_first_keys_fast:
        return None
    try:
        return await list_head(storage, epoch)
    except NO_LISTING:
        return None


async def list_head(storage: Storage, epoch: str) -> int:
    """The newest slot that a listing shows; 0: none."""
    found = await _first_slot(storage, epoch_prefix(epoch), epoch)
    return 0 if found is None else found[1]


async def newest_epoch(storage: Storage) -> str | None:
    """The life of the log that a listing of all of them shows first, usually the latest; None: there is no log."""
    found = await _first_slot(storage, LOG_PREFIX, None)
    return None if found is None else found[0]


async def _list_newest(storage: Storage) -> tuple[list[ObjectInfo], bool] | None:
    """The first keys below ``log/``, and whether those are all; None as `try_list_head`.

    A store may end a page early although more keys follow, so only the end of the listing says that it is the end.
    """
    if not storage.lists_first_keys_fast:
        return None
    items: list[ObjectInfo] = []
    pages = storage.list_pages(LOG_PREFIX, page_size=_PAGE)
    try:
        async for page in pages:
            items += page
            if len(items) >= _PAGE:
                return items, False
    except NO_LISTING:
        return None
    finally:
        await _stop(pages)
    return items, True


def _newest_of(items: list[ObjectInfo], epoch: str, *, all_there_are: bool) -> int | None:
    """The newest slot of an epoch by the first keys of all epochs; 0: it has none; None: the keys do not decide it."""
    slots = (parse_slot_key(item.key) for item in items)
    found = next((slot[1] for slot in slots if slot is not None and slot[0] == epoch), None)
    if found is not None:
        return found
    return 0 if all_there_are else None


async def open_head(storage: Storage, sources: Sources) -> Opened | RepoObject:
    """Read ``repo`` and the newest keys at the same time, then the tail; fold it.

    Returns
    -------
    Opened or RepoObject
        The latter where ``repo`` has no marker of ours: another layout.

    Raises
    ------
    RepositoryNotFoundError
        There is no ``repo``.
    FormatError
        An object that cannot be read, or the same slot missing twice.
    AccessDeniedError
        ``repo``, or what comes after it in the log, may not be read; or, if ``may_be_absent``, there is no ``repo``.
    """
    gap: tuple[str, int] | None = None
    for _ in range(_OPEN_ATTEMPTS):
        asked = instant(sources)
        repo, listing = await run_pair(partial(read_repo, storage, sources), partial(_list_newest, storage))
        if repo is None:
            raise await _not_found(storage)
        marker = repo.known.marker
        if marker is None or not repo.known.read_only:
            return repo
        if listing is None:
            entries, newest = await read_until_absent(storage, marker.epoch, marker.n)
        else:
            listed = _newest_of(listing[0], marker.epoch, all_there_are=listing[1])
            newest = await list_head(storage, marker.epoch) if listed is None else listed
            entries = await read_tail(storage, marker.epoch, marker.n, max(marker.n, newest))
        head = Head(epoch=marker.epoch, n=marker.n, state=state_of(repo.info, marker))
        for entry in entries:
            head = fold_entry(head, entry)
        freshness = replace(asked, date_us=repo.asked.date_us)
        if head.n < newest:
            missing = (head.epoch, head.n + 1)
            if gap == missing:
                raise FormatError(
                    f"slot {missing[1]} of the log is missing in {storage.describe()} "
                    f"({slot_key(*missing)}), although slot {newest} exists: it was deleted from outside. "
                    "Commits from there on cannot be read; restore the object"
                )
            gap = missing
            continue
        if not is_fresh(freshness, instant(sources)):
            continue
        return Opened(head=head, freshness=freshness, known=repo.known, tail=tuple(entries))
    raise FormatError(
        f"the log in {storage.describe()} changed faster than it could be read, {_OPEN_ATTEMPTS} times; open it again",
        ErrorKind.CONCURRENCY,
    )


async def _not_found(storage: Storage) -> RepositoryNotFoundError:
    if await ref_files_there(storage):
        return RepositoryNotFoundError(
            f"the repository doesn't exist in format 2 in {storage.describe()}, but in format 1: open it as such"
        )
    return RepositoryNotFoundError(
        f"the repository doesn't exist: none in {storage.describe()}; check bucket and prefix, or create one there"
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
        await _stop(pages)
    return False
