"""Collecting garbage: deleting objects that are unreferenced and old enough.

Theory: in the log layout a collection is an entry with a cutoff (rule 10). Once it is folded, unreachable snapshots
have left the graph, and no commit whose oldest file may be older than the cutoff is valid any more. So a
commit before the entry is in the graph that is read. A commit after it adds younger files only, and otherwise refers to
the files of its parent: with any pauses and clocks of writers, no needed file is deleted.

In the repo-object layout the same event is one replacement of ``repo``, and the cutoff is in its ``extra`` for other
clients of this package; the official library neither observes nor keeps it. In format 1 there is no such event. So in
every layout the collector also looks at the repository again, about once a second, before it deletes, and keeps the
objects that new snapshots refer to. Persisted sessions hold the cutoff back (`icechunk.maintenance.leases`).

Order: the event; a checkpoint, so that other readers of the format no longer see the snapshots that leave; everything
reachable is read, and an unreadable object ends the collection; only then are objects listed and deleted. The sizes in
the listing decide which of the objects that stay are repacked (`icechunk.maintenance.repack`).
"""

from __future__ import annotations

from icechunk.errors import StorageError
from icechunk.format.ids import ObjectId
from icechunk.format.keys import CHUNKS_PREFIX, MANIFESTS_PREFIX, SNAPSHOTS_PREFIX, TRANSACTIONS_PREFIX
from icechunk.log.repository.events import CollectionRan
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.log.repository.state import RepoState, apply
from icechunk.log.repository.store_check import require_writable
from icechunk.maintenance.leases import end_expired, read_leases
from icechunk.maintenance.limits import Limits
from icechunk.maintenance.living import Living, LivingMemory, Shares
from icechunk.maintenance.reachability import Files
from icechunk.maintenance.repack import Repacked, Repacking, Survey, repack
from icechunk.maintenance.sweep import Sweep
from icechunk.ops import GCSummary
from icechunk.runtime.clock import Sources
from icechunk.storage.port import Storage

__all__ = ["collect_garbage"]

_PRESENT_US = 60_000_000
"""If the requested time is at most so long ago, replaced objects are deleted at once: the caller's clock may be behind
the store's."""


async def collect_garbage(
    log: RepositoryLog,
    storage: Storage,
    sources: Sources,
    *,
    older_than_us: int,
    limits: Limits,
    dry_run: bool,
    repacking: Repacking | None = None,
    memory: LivingMemory | None = None,
) -> GCSummary:
    """Delete snapshots, transaction logs, manifests and chunk objects that nothing refers to.

    Parameters
    ----------
    older_than_us
        Only objects whose Last-Modified is before this, µs since the epoch. Where that is the present or the future,
        the collection waits for some steps of the store's clock (seconds on S3, 40 ms on a local disk), and then
        collects everything that was garbage at the call.
    dry_run
        Delete nothing; count the objects that a collection would delete.
    repacking
        How objects with dead bytes are written again; None: none are.
    memory
        What earlier collections of this repository found; used, and brought up to date, where something may be written
        again. None: everything is read.

    Raises
    ------
    ReadOnlyError
        The repository's status is read-only (also on a dry run), or the storage can only be read.
    FormatError, StorageError
        Something that is reachable is missing or cannot be read: nothing was deleted. Or, with kind
        ``gc-deletes-failing``, deleting fails again and again.
    AccessDeniedError
        The right to list or to write is missing: nothing was changed; or the right to delete (kind
        ``gc-deletes-failing``).
    """
    if not dry_run:
        require_writable(storage, "collect garbage")
    await log.refresh()
    log.require_all_refs()
    await _require_listing(storage)
    asked_us = log.store_time_us
    up_to_now = older_than_us > asked_us - _steps_us(storage)
    cutoff_us = await _cutoff_us(log, storage, sources, older_than_us, up_to_now=up_to_now, dry_run=dry_run)
    now_us = log.store_time_us
    if dry_run:
        leases = await read_leases(storage, log.state, now_us=now_us)
    else:
        leases = await end_expired(storage, sources, log.state, now_us=now_us)
        if log.layout is Layout.REFS:
            # Sessions that had ended by then have landed by now. In other layouts the event is made from a newer state.
            await log.refresh()
    cutoff_us = leases.collect_before_us(cutoff_us, log.state)
    if leases.may_have_committed:
        # Another process must find the snapshot by the id that the session knows.
        repacking = None
    state = await _collected(log, sources, cutoff_us, dry_run=dry_run)
    files = Files(storage, log)
    shares = Shares() if repacking is not None else None
    bases = await leases.present_bases(storage) if log.layout is Layout.REFS else frozenset[ObjectId]()
    known: Living | None = None
    if shares is not None and memory is not None and log.layout is not Layout.REFS:
        known, shares = memory.take(state) or (None, shares)
    living = Living(log, files, sources, limits, state, shares, bases, known)
    await living.grow(state)
    survey = Survey(shares, cutoff_us) if shares is not None else None
    sweep = Sweep(
        storage,
        older_than_us=cutoff_us,
        limits=limits,
        dry_run=dry_run,
        judge=living,
        notes=survey,
    )
    await sweep.run([SNAPSHOTS_PREFIX, TRANSACTIONS_PREFIX, MANIFESTS_PREFIX, CHUNKS_PREFIX])
    swept, repacked = sweep.swept, Repacked()
    if repacking is not None and shares is not None and survey is not None:
        repacked = await repack(
            log,
            files,
            sources,
            limits,
            living,
            shares,
            survey,
            repacking,
            # Sessions go on reading the snapshot that they are based on.
            delete_now=older_than_us > asked_us - _PRESENT_US and not leases.heads,
            cutoff_us=cutoff_us,
            dry_run=dry_run,
        )
        swept.add(repacked.deleted)
        if memory is not None and not dry_run and repacked == Repacked():
            memory.keep(living, shares)
    return GCSummary(
        bytes_deleted=swept.bytes_deleted,
        chunks_deleted=swept.deleted.get(CHUNKS_PREFIX, 0),
        manifests_deleted=swept.deleted.get(MANIFESTS_PREFIX, 0),
        snapshots_deleted=swept.deleted.get(SNAPSHOTS_PREFIX, 0),
        transaction_logs_deleted=swept.deleted.get(TRANSACTIONS_PREFIX, 0),
        objects_failed_to_delete=swept.failed,
        throttled_batches=swept.throttled,
        delete_errors=swept.errors,
        packs_rewritten=repacked.packs,
        manifests_rewritten=repacked.manifests,
        snapshots_rewritten=repacked.snapshots,
        chunk_bytes_copied=repacked.bytes_copied,
    )


async def _require_listing(storage: Storage) -> None:
    """Find out that nothing can be listed before anything is changed."""
    pages = storage.list_pages(SNAPSHOTS_PREFIX, page_size=1)
    try:
        await anext(pages, None)
    finally:
        aclose = getattr(pages, "aclose", None)
        if aclose is not None:
            await aclose()


def _steps_us(storage: Storage) -> int:
    return 2 * storage.clock_resolution_us


async def _cutoff_us(
    log: RepositoryLog,
    storage: Storage,
    sources: Sources,
    older_than_us: int,
    *,
    up_to_now: bool,
    dry_run: bool,
) -> int:
    """The time before which objects are deleted: the requested one, but none at which a session may be beginning.

    A session that begins later has a `since` that is not before it, even if its clock is a step behind ours. For a
    collection up to the present the store's clock first has to advance by a few steps.
    """
    steps_us = _steps_us(storage)
    if up_to_now:
        if log.layout is Layout.LOG and storage.supports_writes:
            # Files of small commits that are put later would be younger. A dry run goes on without the checkpoint.
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
