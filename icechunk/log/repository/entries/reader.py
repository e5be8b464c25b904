"""Reading the log: the tail, and opening at the head (rules 5 and 6).

The fold is always a checkpoint and a contiguous tail after it. A listing is only a hint for the end of the tail; a slot
that is missing on the way means that the checkpoint has moved meanwhile.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

from icechunk.errors import AccessDeniedError, ErrorKind, FormatError, RepositoryNotFoundError
from icechunk.log.repository.entry import LOG_PREFIX, Entry, epoch_prefix, parse_slot_key, slot_key
from icechunk.log.repository.freshness import Instant, instant, is_fresh
from icechunk.log.repository.marker import state_of
from icechunk.log.repository.objects import (
    Known,
    RepoObject,
    could_read,
    entry_of,
    get_slot,
    read_repo,
    read_repo_or_checkpoint,
    ref_files_there,
)
from icechunk.log.repository.state import RepoState, try_apply_all
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_jobs, run_pair
from icechunk.storage.port import NO_LISTING, ObjectInfo, Storage

__all__ = [
    "Head",
    "Opened",
    "fold_entry",
    "list_head",
    "newest_epoch",
    "open_head",
    "read_some",
    "read_tail",
    "read_until_absent",
    "try_list_head",
]

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
class Opened:
    """The log, read up to its head."""

    head: Head
    freshness: Instant
    known: Known
    tail: tuple[Entry, ...]
    """Entries after the checkpoint, oldest first."""


async def read_tail(storage: Storage, epoch: str, after: int, end: int) -> list[Entry]:
    """GET the slots after ``after`` up to ``end`` (inclusive) at once; ends before the first one that is missing."""
    return list(_unbroken(await _read_slots(storage, epoch, after, end)))


async def read_some(storage: Storage, epoch: str, after: int, count: int) -> tuple[list[Entry], bool]:
    """GET so many slots after ``after``, which was taken, at once.

    Returns
    -------
    list of Entry
        Those before the first absent slot.
    bool
        Whether there are more: none was absent, or there is one after the first that was.
    """
    slots = await _read_slots(storage, epoch, after, after + count)
    found = list(_unbroken(slots))
    return found, len(found) == count or any(entry is not None for entry in slots[len(found) :])


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
    if storage.batches_reads:
        # Where reads are refused, each slot by itself tells which.
        with suppress(AccessDeniedError):
            return await _read_together(storage, epoch, range(after + 1, end + 1))
    refusals: list[AccessDeniedError] = []

    async def get(n: int) -> Entry | None:
        try:
            found = await get_slot(storage, epoch, n)
        except AccessDeniedError as denied:
            refusals.append(denied)
            return None
        return None if found is None else found[0]

    jobs: list[Callable[[], Awaitable[Entry | None]]] = [partial(get, n) for n in range(after + 1, end + 1)]
    slots = await run_jobs(jobs)
    if refusals:
        known = believe_none or any(entry is not None for entry in slots)
        hidden = all(denied.may_be_absent for denied in refusals)
        if not (hidden and known) and not await could_read(storage, refusals[0], epoch, after):
            raise refusals[0]
    return slots


async def _read_together(storage: Storage, epoch: str, numbers: range) -> list[Entry | None]:
    keys = [slot_key(epoch, n) for n in numbers]
    answers = await storage.get_all(keys)
    return [
        None if answer is None else entry_of(storage, key, n, answer)
        for n, key, answer in zip(numbers, keys, answers, strict=True)
    ]


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
    """As `list_head`; None where nothing can be listed, or where the first keys cost as much as all of them."""
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
    """The first keys below ``log/``, and whether those are all; None where nothing can be listed.

    A store may end a page early although more keys follow, so only the end of the listing says that it is the end.
    """
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
        if storage.lists_first_keys_fast:
            repo, listing = await run_pair(partial(read_repo, storage, sources), partial(_list_newest, storage))
        else:
            repo, listing = await read_repo_or_checkpoint(storage, sources), None
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
        freshness = asked._replace(date_us=repo.asked.date_us)
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
        f"the repository doesn't exist: none in {storage.describe()}; check the {_parts_of(storage)}, or create one "
        "there"
    )


def _parts_of(storage: Storage) -> str:
    """The parts of a location that a user may have written wrong."""
    match storage.describe().partition(":")[0]:
        case "file":
            return "path"
        case "memory":
            return "storage"
        case "http" | "https":
            return "address"
        case _:
            return "bucket and prefix"
