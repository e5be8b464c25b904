"""Listing objects by their ids, and deleting those that are garbage, page by page."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import field
from typing import Final, NamedTuple, Protocol

from icechunk.errors import AccessDeniedError, ErrorKind, IcechunkError, InvalidInputError, StorageError
from icechunk.format.ids import ObjectId, object_id_from_text, object_ids_from_texts
from icechunk.maintenance.limits import Limits
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_each
from icechunk.storage.port import ObjectInfo, Storage

__all__ = ["Judge", "Listed", "Notes", "Sweep", "Swept", "with_ids"]

_LOG: Final = logging.getLogger(__name__)
_BATCH: Final = 1000
_LISTINGS: Final = 16
_ERRORS_TOLD: Final = 100
_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class Listed(NamedTuple):
    """An object whose name is an id."""

    id: ObjectId
    info: ObjectInfo


class Judge(Protocol):
    """Says which objects are garbage; may know of more living ones from look to look, never of fewer."""

    async def look_again(self) -> None:
        """See whether more objects live by now; awaited before each request that deletes."""

    def garbage(self, prefix: str, listed: Sequence[Listed]) -> Sequence[Listed]:
        """The objects below a prefix that nothing refers to; asked again just before they are deleted."""


class Notes(Protocol):
    """Learns of the objects that stay."""

    def note(self, prefix: str, kept: Sequence[Listed]) -> None:
        """Some objects below a prefix, a page of a listing, that are not garbage."""


@dataclass(slots=True, kw_only=True)
class Swept:
    """The outcome of a collection."""

    deleted: dict[str, int] = field(default_factory=dict)
    """Objects deleted, by prefix; on a dry run, that would be."""
    bytes_deleted: int = 0
    failed: int = 0
    throttled: int = 0
    """Requests that the store asked to slow down, and that failed for it."""
    errors: list[str] = field(default_factory=list)
    """The first hundred reasons."""

    def add(self, other: Swept) -> None:
        """Add the counts of another sweep."""
        for prefix, count in other.deleted.items():
            self.deleted[prefix] = self.deleted.get(prefix, 0) + count
        self.bytes_deleted += other.bytes_deleted
        self.failed += other.failed
        self.throttled += other.throttled
        self.errors = (self.errors + other.errors)[:_ERRORS_TOLD]


class Sweep:
    """Deletes the objects below some prefixes that are garbage and older than a store time.

    Objects whose names are no ids are left alone. Deleting goes on while others are listed, so memory is bounded by
    the requests in flight.

    Parameters
    ----------
    older_than_us
        Last-Modified must be before it, µs.
    judge
        Says what is garbage.
    notes
        Gets the objects that stay; None: they are not reported.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        older_than_us: int,
        limits: Limits,
        dry_run: bool,
        judge: Judge,
        notes: Notes | None = None,
    ) -> None:
        self._storage = storage
        self._older_than_us = older_than_us
        self._limits = limits
        self._dry_run = dry_run
        self._judge = judge
        self._notes = notes
        self._deletes = asyncio.Semaphore(limits.max_concurrent_deletes)
        self._listings = asyncio.Semaphore(limits.max_concurrent_listings or _LISTINGS)
        self._failures_in_a_row = 0
        self.swept: Swept = Swept()

    async def run(self, prefixes: Sequence[str]) -> None:
        """List the prefixes, each with its slash, and delete the garbage there.

        Raises
        ------
        StorageError
            A listing failed; or kind ``gc-deletes-failing``: too many requests in a row failed. Everything
            deleted until then was garbage.
        """
        # Where no request waits for a network, listings at the same time compete for the interpreter: they take longer.
        await run_each(self._prefix, prefixes, limit=1 if self._storage.batches_reads else len(prefixes))

    async def delete(self, prefix: str, garbage: Sequence[Listed]) -> None:
        """Delete objects that are known already; errors as `run`."""
        for first in range(0, len(garbage), _BATCH):
            await self._dispose(prefix, garbage[first : first + _BATCH])

    async def _prefix(self, prefix: str) -> None:
        """List a prefix; where it is large, its parts at the same time, if the storage lists them in less time."""

        async def walk(part: str, after: str | None) -> None:
            async with aclosing(self._pages(part, after)) as pages:
                async for page in pages:
                    await self._take(prefix, page)

        if not self._storage.lists_any_prefix_fast or self._limits.max_concurrent_listings == 1:
            await walk(prefix, None)
            return
        first: list[list[ObjectInfo]] = []
        async with aclosing(self._pages(prefix, None)) as pages:
            # A store may end a page early, so only a second one, or none, shows whether there is more.
            async for page in pages:
                if page:
                    first.append(page)
                if len(first) == 2:
                    break
        for page in first:
            await self._take(prefix, page)
        if len(first) < 2:
            return
        after = first[-1][-1].key
        begun = after[: len(prefix) + 1]
        parts = [prefix + char for char in _ALPHABET if prefix + char >= begun]
        await run_each(lambda part: walk(part, after), parts, limit=len(parts))

    async def _pages(self, prefix: str, after: str | None) -> AsyncGenerator[list[ObjectInfo], None]:
        """The pages of a listing; each waits until few others are listed."""
        pages = self._storage.list_pages(prefix, start_after=after, page_size=_BATCH)
        try:
            while True:
                async with self._listings:
                    page = await anext(pages, None)
                if page is None:
                    return
                yield page
        finally:
            await _close(pages)

    async def _take(self, prefix: str, page: Sequence[ObjectInfo]) -> None:
        listed = with_ids(prefix, page)
        garbage = self._judge.garbage(prefix, [one for one in listed if one.info.modified_us < self._older_than_us])
        if self._notes is not None:
            gone = {one.id for one in garbage}
            self._notes.note(prefix, [one for one in listed if one.id not in gone] if gone else listed)
        if garbage:
            await self._dispose(prefix, garbage)

    async def _dispose(self, prefix: str, garbage: Sequence[Listed]) -> None:
        if self._dry_run:
            self._count(prefix, garbage)
            return
        async with self._deletes:
            await self._judge.look_again()
            garbage = self._judge.garbage(prefix, garbage)
            if garbage:
                await self._delete(prefix, garbage)

    async def _delete(self, prefix: str, garbage: Sequence[Listed]) -> None:
        if self._failures_in_a_row >= self._limits.max_consecutive_delete_failures:
            raise StorageError(
                f"stopped collecting garbage in {self._storage.describe()}: {self._failures_in_a_row} requests in a "
                f"row failed to delete ({self.swept.errors[-1]}). Everything deleted was garbage; repair the cause and "
                "collect again",
                ErrorKind.GC_DELETES_FAILING,
            )
        try:
            result = await self._storage.delete([one.info.key for one in garbage])
            failures = dict(result.failures)
        except AccessDeniedError as error:
            raise error.with_message(
                f"stopped collecting garbage in {self._storage.describe()}: {error}. Grant it and collect again; what "
                "was deleted was garbage",
                ErrorKind.GC_DELETES_FAILING,
            ) from error
        except (IcechunkError, OSError) as error:
            # All deleted objects were garbage; the next collection sees those that are left.
            failures = {one.info.key: str(error) for one in garbage}
            if isinstance(error, IcechunkError) and error.kind == ErrorKind.THROTTLED:
                self.swept.throttled += 1
            _LOG.warning("deleting %d objects failed: %s", len(garbage), error)
        self._failures_in_a_row = self._failures_in_a_row + 1 if len(failures) == len(garbage) else 0
        self.swept.failed += len(failures)
        room = max(0, _ERRORS_TOLD - len(self.swept.errors))
        self.swept.errors += [f"{key}: {reason}" for key, reason in list(failures.items())[:room]]
        self._count(prefix, [one for one in garbage if one.info.key not in failures])

    def _count(self, prefix: str, deleted: Sequence[Listed]) -> None:
        self.swept.deleted[prefix] = self.swept.deleted.get(prefix, 0) + len(deleted)
        self.swept.bytes_deleted += sum(one.info.size for one in deleted)


def with_ids(prefix: str, page: Sequence[ObjectInfo]) -> list[Listed]:
    """The objects of a page below a prefix whose names are ids, in its order."""
    names = [info.key.removeprefix(prefix) for info in page]
    try:
        return list(map(Listed, object_ids_from_texts(names), page))
    except InvalidInputError:
        found = []
        for name, info in zip(names, page, strict=True):
            with suppress(InvalidInputError):
                found.append(Listed(object_id_from_text(name), info))
        return found


async def _close(pages: object) -> None:
    aclose = getattr(pages, "aclose", None)
    if aclose is not None:
        await aclose()
