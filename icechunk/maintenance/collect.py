"""Collecting garbage: what nothing refers to, and is old enough, goes.

Theory: in the log layout a collection is an entry with a cutoff (rule 10). Once it is folded, snapshots that nothing
reaches have left the graph, and no commit whose oldest file may be older than the cutoff is valid any more. So a
commit before the entry is in the graph that is read, and one after it adds younger files only, and refers besides to
what its parent refers to: no pause and no clock of a writer's makes a file go that is needed.

In the repo-object layout the same event is one replacement of ``repo``, and the cutoff stands in its ``extra`` for
other clients of ours; the official library neither minds it nor keeps it. In format 1 there is no such event. So in
every layout the collector also looks at the repository again, about once a second, before it deletes, and keeps what
new snapshots refer to.

Order: the event; a checkpoint, so that other readers of the format forget what is about to go; everything that is
reachable is read, and anything unreadable ends the collection; only then are objects listed and deleted.

Listing objects by their ids, and deleting those that are garbage, page by page.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import anyio

from icechunk.errors import ErrorKind, IcechunkError, InvalidInputError, StorageError
from icechunk.format.ids import FIRST_SNAPSHOT, NodeId, ObjectId, object_id_from_text
from icechunk.format.keys import CHUNKS_PREFIX, MANIFESTS_PREFIX, SNAPSHOTS_PREFIX, TRANSACTIONS_PREFIX
from icechunk.format.values import NATIVE, Manifest
from icechunk.log.repository.events import CollectionRan
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.log.repository.state import RepoState, apply
from icechunk.log.repository.store_check import require_writable
from icechunk.maintenance.reachability import Files, Limits, RowSet, Use, Walked, living_rows, read_manifests, walk
from icechunk.ops import GCSummary
from icechunk.runtime.clock import Sources
from icechunk.runtime.tasks import run_each
from icechunk.storage.port import ObjectInfo, Storage
from icechunk.transfer.assets import off_loop

__all__ = ["IsGarbage", "Listed", "Swept", "collect_garbage", "sweep"]

_LOG: Final = logging.getLogger(__name__)
_BATCH: Final = 1000
_LISTINGS: Final = 16
_ERRORS_TOLD: Final = 100
_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """An object whose name is an id."""

    id: ObjectId
    info: ObjectInfo


IsGarbage: TypeAlias = Callable[[Sequence[Listed]], Sequence[Listed]]
"""Picks those that nothing refers to; asked again for each request, just before it deletes."""


@dataclass(slots=True, kw_only=True)
class Swept:
    """What became of the garbage."""

    deleted: dict[str, int] = field(default_factory=dict)
    """Objects deleted, by prefix; on a dry run, that would be."""
    bytes_deleted: int = 0
    failed: int = 0
    throttled: int = 0
    """Requests that the store asked to slow down, and that failed for it."""
    errors: list[str] = field(default_factory=list)
    """The first hundred reasons."""


async def sweep(
    storage: Storage,
    kinds: Sequence[tuple[str, IsGarbage]],
    *,
    older_than_us: int,
    limits: Limits,
    dry_run: bool,
    guard: Callable[[], Awaitable[None]],
) -> Swept:
    """Delete the objects below some prefixes that are garbage and older than a store time.

    Objects whose names are no ids are left alone. Deleting goes on while others are listed, so memory is bounded by
    the requests in flight.

    Parameters
    ----------
    kinds
        Prefix (with its slash), and what decides about the objects there.
    older_than_us
        Last-Modified must be before it, µs.
    guard
        Awaited before each request that deletes; may change what ``IsGarbage`` answers.

    Raises
    ------
    StorageError
        A listing failed; or kind ``gc-deletes-failing``: too many requests in a row failed. What was deleted until
        then was garbage.
    """
    sweeping = _Sweep(storage, older_than_us, limits, dry_run, guard)

    async def one(kind: tuple[str, IsGarbage]) -> None:
        await sweeping.kind(*kind)

    await run_each(one, kinds, limit=len(kinds))
    return sweeping.swept


class _Sweep:
    def __init__(
        self,
        storage: Storage,
        older_than_us: int,
        limits: Limits,
        dry_run: bool,
        guard: Callable[[], Awaitable[None]],
    ) -> None:
        self._storage = storage
        self._older_than_us = older_than_us
        self._limits = limits
        self._dry_run = dry_run
        self._guard = guard
        self._deletes = anyio.CapacityLimiter(limits.max_concurrent_deletes)
        self._listings = anyio.CapacityLimiter(limits.max_concurrent_listings or _LISTINGS)
        self._failures_in_a_row = 0
        self.swept = Swept()

    async def kind(self, prefix: str, is_garbage: IsGarbage) -> None:
        """List a prefix; where it is large, its parts at the same time."""
        pages = self._storage.list_pages(prefix, page_size=_BATCH)
        first: list[list[ObjectInfo]] = []
        try:
            # A store may end a page early, so only a second one, or none, tells whether there is more.
            while len(first) < 2:
                async with self._listings:
                    page = await anext(pages, None)
                if page is None:
                    break
                if page:
                    first.append(page)
        finally:
            await _close(pages)
        for page in first:
            await self._take(prefix, is_garbage, page)
        if len(first) < 2:
            return
        after = first[-1][-1].key
        parts = [(prefix, after)]
        if self._storage.lists_any_prefix_fast and self._limits.max_concurrent_listings != 1:
            begun = after[: len(prefix) + 1]
            parts = [(prefix + char, after) for char in _ALPHABET if prefix + char >= begun]

        async def walk(part: tuple[str, str]) -> None:
            pages = self._storage.list_pages(part[0], start_after=part[1], page_size=_BATCH)
            try:
                while True:
                    async with self._listings:
                        page = await anext(pages, None)
                    if page is None:
                        return
                    await self._take(prefix, is_garbage, page)
            finally:
                await _close(pages)

        await run_each(walk, parts, limit=len(parts))

    async def _take(self, prefix: str, is_garbage: IsGarbage, page: Sequence[ObjectInfo]) -> None:
        old = [found for info in page if info.modified_us < self._older_than_us and (found := _listed(prefix, info))]
        garbage = is_garbage(old)
        if not garbage:
            return
        if self._dry_run:
            self._count(prefix, garbage)
            return
        async with self._deletes:
            await self._guard()
            garbage = is_garbage(garbage)
            if garbage:
                await self._delete(prefix, garbage)

    async def _delete(self, prefix: str, garbage: Sequence[Listed]) -> None:
        if self._failures_in_a_row >= self._limits.max_consecutive_delete_failures:
            raise StorageError(
                f"stopped collecting garbage in {self._storage.describe()}: {self._failures_in_a_row} requests in a "
                f"row failed to delete ({self.swept.errors[-1]}). What was deleted was garbage; mend this and collect "
                "again",
                ErrorKind.GC_DELETES_FAILING,
            )
        try:
            result = await self._storage.delete([one.info.key for one in garbage])
            failures = dict(result.failures)
        except (IcechunkError, OSError) as error:
            # Whatever of it was deleted was garbage; the next collection sees what is left.
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


def _listed(prefix: str, info: ObjectInfo) -> Listed | None:
    try:
        return Listed(id=object_id_from_text(info.key.removeprefix(prefix)), info=info)
    except InvalidInputError:
        return None


async def _close(pages: object) -> None:
    aclose = getattr(pages, "aclose", None)
    if aclose is not None:
        await aclose()


_LOOK_EVERY_US: Final = 1_000_000
_ID_BYTES: Final = 12
_BYTES_PER_REF: Final = 32


async def collect_garbage(
    log: RepositoryLog, storage: Storage, sources: Sources, *, older_than_us: int, limits: Limits, dry_run: bool
) -> GCSummary:
    """Delete snapshots, transaction logs, manifests and chunk objects that nothing refers to.

    Parameters
    ----------
    older_than_us
        Only objects whose Last-Modified is before this, µs since the epoch. Where that is the present or the future,
        the collection waits for some steps of the store's clock (seconds on S3, 40 ms on a local disk), and then takes
        what stood when it was asked for.
    dry_run
        Delete nothing; count what a collection would delete.

    Raises
    ------
    ReadOnlyError
        The repository's status is read-only (also on a dry run), or the storage can only be read.
    FormatError, StorageError
        Something that is reachable is missing or cannot be read: nothing was deleted. Or, with kind
        ``gc-deletes-failing``, deleting fails again and again.
    """
    if not dry_run:
        require_writable(storage, "collect garbage")
    await log.refresh()
    cutoff_us = await _cutoff_us(log, storage, sources, older_than_us, dry_run=dry_run)
    state = await _collected(log, sources, cutoff_us, dry_run=dry_run)
    reachable = _Reachable(log, Files(storage, log), sources, limits, state)
    await reachable.grow(state)
    swept = await sweep(
        storage,
        [
            (SNAPSHOTS_PREFIX, reachable.snapshots_not_in),
            (TRANSACTIONS_PREFIX, reachable.transactions_not_in),
            (MANIFESTS_PREFIX, reachable.manifests_not_in),
            (CHUNKS_PREFIX, reachable.chunks_not_in),
        ],
        older_than_us=cutoff_us,
        limits=limits,
        dry_run=dry_run,
        guard=reachable.look_again,
    )
    return GCSummary(
        bytes_deleted=swept.bytes_deleted,
        chunks_deleted=swept.deleted.get(CHUNKS_PREFIX, 0),
        manifests_deleted=swept.deleted.get(MANIFESTS_PREFIX, 0),
        snapshots_deleted=swept.deleted.get(SNAPSHOTS_PREFIX, 0),
        transaction_logs_deleted=swept.deleted.get(TRANSACTIONS_PREFIX, 0),
        objects_failed_to_delete=swept.failed,
        throttled_batches=swept.throttled,
        delete_errors=swept.errors,
    )


async def _cutoff_us(
    log: RepositoryLog, storage: Storage, sources: Sources, older_than_us: int, *, dry_run: bool
) -> int:
    """The time before which objects go: the one asked for, but none at which somebody may be beginning a session.

    Whoever begins later has a `since` that is not before it, also where his clock is a step behind ours. Who asks for
    the present shall have what stands now collected: for that the store's clock has to move on by a few steps.
    """
    steps_us = 2 * storage.clock_resolution_us
    if older_than_us > log.store_time_us - steps_us:
        if log.layout is Layout.LOG and storage.supports_writes:
            # Files of small commits that are still on their way would be younger. Who may only look looks without.
            try:
                await log.checkpoint()
            except StorageError:
                if not dry_run:
                    raise
        await sources.sleep(2 * steps_us / 1e6)
        await log.refresh()
    return max(0, min(older_than_us, log.store_time_us - steps_us))


async def _collected(log: RepositoryLog, sources: Sources, cutoff_us: int, *, dry_run: bool) -> RepoState:
    """The state after the event of this collection, or on a dry run after one that did not happen."""
    if log.layout is Layout.REFS:
        return log.state
    event = CollectionRan(cutoff_us=cutoff_us)
    if dry_run:
        return apply(log.state, event, time_us=max(sources.wall_us(), 0), since_us=None)
    state = await log.append(lambda _: [event])
    await log.checkpoint()
    return state


class _Reachable:
    """What must stay: grows when there are new snapshots, never shrinks."""

    def __init__(self, log: RepositoryLog, files: Files, sources: Sources, limits: Limits, state: RepoState) -> None:
        self._log = log
        self._files = files
        self._sources = sources
        self._limits = limits
        self._walked = Walked()
        self._transactions: set[ObjectId] = {FIRST_SNAPSHOT}
        self._chunks = RowSet(_ID_BYTES)
        self._looked_us = sources.elapsed_us()
        self._state = state
        self._growing = anyio.Lock()

    async def grow(self, state: RepoState) -> None:
        """Add what a state reaches. Raises where something of it cannot be read."""
        in_files = self._log.layout is Layout.REFS
        start = state.tips() if in_files else set(state.snapshots)
        manifests = await walk(self._files, start, self._walked, self._limits, follow_parents=in_files)
        self._transactions |= self._walked.snapshots
        if not in_files:
            for record in state.snapshots.values():
                self._transactions.update(record.pruned_ancestor_tx_logs)
        await self._read(manifests)

    async def _read(self, manifests: Mapping[ObjectId, Use]) -> None:
        adding = anyio.Lock()

        def add(manifest: Manifest, nodes: Collection[NodeId]) -> None:
            for refs in living_rows(manifest, nodes):
                self._chunks.add(refs.chunk_id[refs.kind == NATIVE])

        async def visit(manifest: Manifest, nodes: Collection[NodeId]) -> None:
            async with adding:
                await off_loop(manifest.num_chunk_refs * _BYTES_PER_REF, lambda: add(manifest, nodes))

        await read_manifests(self._files, manifests, self._limits, visit)

    async def look_again(self) -> None:
        """See, about once a second, whether there are new snapshots, and keep what they refer to."""
        async with self._growing:
            if self._sources.elapsed_us() - self._looked_us < _LOOK_EVERY_US:
                return
            before, self._state = self._state, await self._log.refresh()
            if self._state.snapshots is not before.snapshots or self._state.tips() != before.tips():
                await self.grow(self._state)
            self._looked_us = self._sources.elapsed_us()

    def snapshots_not_in(self, listed: Sequence[Listed]) -> list[Listed]:
        kept = self._walked.snapshots
        return [one for one in listed if one.id not in kept and one.id != FIRST_SNAPSHOT]

    def transactions_not_in(self, listed: Sequence[Listed]) -> list[Listed]:
        return [one for one in listed if one.id not in self._transactions]

    def manifests_not_in(self, listed: Sequence[Listed]) -> list[Listed]:
        return [one for one in listed if one.id not in self._walked.manifests]

    def chunks_not_in(self, listed: Sequence[Listed]) -> list[Listed]:
        absent = self._chunks.missing(one.id for one in listed)
        return [one for one, gone in zip(listed, absent, strict=True) if gone]
