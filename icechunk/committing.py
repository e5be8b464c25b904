"""Writing a commit: the fold becomes files, and the files become history by one swap."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

from icechunk.core import Core
from icechunk.errors import ConflictError, ErrorKind, SessionStateError
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.keys import manifest_key, snapshot_key, transaction_key
from icechunk.format.manifest import encode_manifest
from icechunk.format.repo_values import SnapshotRecord
from icechunk.format.snapshot import encode_snapshot
from icechunk.format.tables import Manifest, Snapshot
from icechunk.format.transaction import encode_transaction_log
from icechunk.log.compaction import Compaction, Plan, compact, finish
from icechunk.log.diff import combined
from icechunk.log.reuse import reuse
from icechunk.refs.base import OnSent, RepositoryLog
from icechunk.refs.events import CommitAdded, CommitAmended, DetachedSnapshotAdded, Event
from icechunk.refs.state import RepoState, require_snapshot
from icechunk.transfer.assets import off_loop
from icechunk.transfer.packs import Packs
from icechunk.transfer.tasks import run_all, run_each

__all__ = ["Commit", "How", "commit"]

_LOG = logging.getLogger(__name__)
_BYTES_PER_REF = 64
"""About what a reference costs to encode; decides whether that happens in a thread."""


class How(Enum):
    """What becomes of the new snapshot."""

    COMMIT = "commit"
    """The branch's next tip."""
    AMEND = "amend"
    """The branch's tip, in place of the one that the session stands on."""
    FLUSH = "flush"
    """A child of the session's base that no branch points to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What a caller wants committed."""

    how: How = How.COMMIT
    branch: str
    message: str
    metadata: Mapping[str, Any]
    since_us: int
    """Store time, µs, not later than the first upload for this commit."""
    on_sent: OnSent
    """Told when the swap is sent, and when it is certainly lost: in between a cancellation leaves the outcome open."""
    written: dict[ObjectId, tuple[Manifest, int]] = field(default_factory=dict)
    """Manifests that earlier tries of this commit have put, and their sizes; each try adds its own."""


async def commit(
    core: Core,
    base: Snapshot,
    make_plan: Callable[[], Plan],
    puts: Packs,
    wanted: Commit,
    *,
    on_queued: Callable[[], None] | None = None,
) -> Snapshot:
    """Write the session's files, all at once, and append the commit to the repository log.

    Where no manifest must be read, and no chunk is on its way, a small commit costs one round trip, since its files
    ride in the entry; others cost two: the files, the swap.

    Parameters
    ----------
    base
        What the session stands on.
    make_plan
        Plans the session's changes; called once nothing more is written to the session.
    on_queued
        Given by who holds the branch's turn: the base is the branch's tip once all that waits has landed. Called as
        soon as this commit waits too.

    Raises
    ------
    SessionStateError
        To amend: the base is the first snapshot (kind ``no-amend-for-initial-commit``).
    ConflictError
        The branch is not at the session's base any more; nothing of this commit is visible.
    CommitOutcomeUnknown
        The swap was sent and its outcome is not certain.
    StorageError
        Something could not be written; nothing of this commit is visible.
    """
    repository_log = await core.log()
    if (
        on_queued is None
        and wanted.how is not How.FLUSH
        and repository_log.state.branches.get(wanted.branch) != base.id
    ):
        # Perhaps this loop's client has only not looked for a while; if the branch did move, nothing need be uploaded.
        _require_tip(await repository_log.refresh(), wanted.branch, base.id)
    parent, pruned = base.id, tuple[ObjectId, ...]()
    if wanted.how is How.AMEND:
        before = require_snapshot(repository_log.state, base.id)
        if before.parent is None:
            raise SessionStateError(
                "cannot amend: the branch is at the repository's first snapshot, which stays; commit instead",
                ErrorKind.NO_AMEND_FOR_INITIAL_COMMIT,
            )
        parent, pruned = before.parent, before.pruned_ancestor_tx_logs
    # Format 1 keeps ancestry in the snapshots.
    parent_id = base.id if repository_log.spec_version == 1 else None
    compaction = await _compact(core, make_plan(), wanted, parent_id)
    if wanted.how is How.AMEND:
        amended = await core.assets.transaction_log(base.id)
        compaction = replace(compaction, transaction=combined(amended, compaction.transaction))
    if wanted.written:
        compaction = reuse(compaction, [manifest for manifest, _ in wanted.written.values()])
    snapshot, riding = await _write(core, repository_log, puts, compaction, wanted.written)
    record = SnapshotRecord(
        id=snapshot.id,
        parent=parent,
        flushed_at_us=snapshot.flushed_at_us,
        message=wanted.message,
        metadata=dict(wanted.metadata),
        pruned_ancestor_tx_logs=pruned,
    )

    def propose(state: RepoState) -> Sequence[Event]:
        if wanted.how is How.FLUSH:
            return [DetachedSnapshotAdded(snapshot=record)]
        _require_tip(state, wanted.branch, base.id)
        if wanted.how is How.AMEND:
            return [CommitAmended(branch=wanted.branch, previous=base.id, snapshot=record)]
        return [CommitAdded(branch=wanted.branch, snapshot=record)]

    # Before it has landed: whoever comes next in the queue builds upon it. If it does not land, nobody asks for it.
    core.assets.keep_snapshot(snapshot)
    for manifest in (*compaction.manifests, *(manifest for manifest, _ in wanted.written.values())):
        core.assets.keep_manifest(manifest)
    for key, data in riding.items():
        core.files.put(key, data, len(data))
    await repository_log.append(
        propose, since_us=wanted.since_us, on_sent=wanted.on_sent, files=riding, on_queued=on_queued
    )
    if _LOG.isEnabledFor(logging.INFO):
        where = core.storage.describe()
        _LOG.info("%s: %s of snapshot %s, branch %r", where, wanted.how.value, encode_id(snapshot.id), wanted.branch)
    return snapshot


def _require_tip(state: RepoState, branch: str, base: ObjectId) -> None:
    tip = state.branches.get(branch)
    if tip != base:
        raise ConflictError(encode_id(base), None if tip is None else encode_id(tip))


async def _compact(core: Core, todo: Plan, wanted: Commit, parent_id: ObjectId | None) -> Compaction:
    manifests: dict[ObjectId, Manifest] = {}

    async def read(id: ObjectId) -> None:
        manifests[id] = await core.assets.manifest(id)

    await run_each(read, todo.manifests_to_read, limit=max(1, core.settings.commit_fetches))
    touched = sum(len(array.written) for array in todo.arrays)
    touched += sum(manifest.num_chunk_refs for manifest in manifests.values())
    return await off_loop(
        touched * _BYTES_PER_REF,
        partial(
            compact,
            todo,
            manifests,
            snapshot_id=core.sources.new_object_id(),
            parent_id=parent_id,
            flushed_at_us=max(core.sources.wall_us(), todo.base.flushed_at_us + 1),
            message=wanted.message,
            metadata=wanted.metadata,
            new_object_id=core.sources.new_object_id,
        ),
    )


async def _write(
    core: Core,
    log: RepositoryLog,
    puts: Packs,
    compaction: Compaction,
    written: dict[ObjectId, tuple[Manifest, int]],
) -> tuple[Snapshot, Mapping[str, bytes]]:
    """Write the files; those that are returned instead are for the entry to carry."""
    level, spec_version = core.settings.compression_level, log.spec_version
    files: list[tuple[str, bytes]] = []
    sizes = {id: size for id, (_, size) in written.items()}
    for manifest in compaction.manifests:
        encode = partial(encode_manifest, manifest, spec_version, level, core.settings.locations)
        data = await off_loop(manifest.num_chunk_refs * _BYTES_PER_REF, encode)
        sizes[manifest.id] = len(data)
        files.append((manifest_key(manifest.id), data))
    snapshot = finish(compaction, sizes)
    files.append((snapshot_key(snapshot.id), encode_snapshot(snapshot, spec_version, level)))
    files.append((transaction_key(snapshot.id), encode_transaction_log(compaction.transaction, spec_version, level)))

    small = min(core.settings.small_commit_bytes, log.carry_limit_bytes)
    if sum(len(data) for _, data in files) <= small:
        # Chunks are not carried: what the entry refers to must be there before it.
        await run_all(log.prepare_writes, puts.flush)
        return snapshot, dict(files)

    async def put(file: tuple[str, bytes]) -> None:
        await core.put(*file)

    await run_all(log.prepare_writes, puts.flush, partial(run_each, put, files, limit=core.settings.max_requests))
    written.update({manifest.id: (manifest, sizes[manifest.id]) for manifest in compaction.manifests})
    return snapshot, {}
