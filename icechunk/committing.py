"""Writing a commit: the fold becomes files, and the files become history by one swap."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from icechunk.commit_files import CommitFiles, File
from icechunk.core import Core
from icechunk.errors import ConflictError, ErrorKind, SessionStateError
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.repo_values import SnapshotRecord
from icechunk.format.tables import Snapshot
from icechunk.log.compaction import Plan
from icechunk.log.reuse import Earlier
from icechunk.refs.base import OnSent, RepositoryLog
from icechunk.refs.events import CommitAdded, CommitAmended, DetachedSnapshotAdded, Event
from icechunk.refs.state import RepoState, require_snapshot
from icechunk.tasks import run_all, run_stream
from icechunk.transfer.packs import Packs

__all__ = ["Commit", "How", "commit"]

_LOG = logging.getLogger(__name__)


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
    earlier: Earlier | None = None
    """Manifests that earlier tries of this commit have put; each try adds its own. None: there is but one try."""


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
    files = CommitFiles(
        core=core,
        plan=make_plan(),
        spec_version=repository_log.spec_version,
        message=wanted.message,
        metadata=wanted.metadata,
        amended=await core.assets.transaction_log(base.id) if wanted.how is How.AMEND else None,
        earlier=wanted.earlier,
    )
    snapshot, riding = await _write(core, repository_log, puts, files)
    record = SnapshotRecord(
        id=snapshot.id,
        parent=parent,
        flushed_at_us=snapshot.flushed_at_us,
        message=wanted.message,
        metadata=dict(wanted.metadata),
        pruned_ancestor_tx_logs=(*pruned, *files.further_transactions),
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


async def _write(
    core: Core, log: RepositoryLog, puts: Packs, files: CommitFiles
) -> tuple[Snapshot, Mapping[str, bytes]]:
    """Write the files; those that are returned instead are for the entry to carry."""
    small = min(core.settings.small_commit_bytes, log.carry_limit_bytes)
    made: list[File] = []
    held_bytes = 0
    async with aclosing(files.make()) as coming:
        async for file in coming:
            made.append(file)
            held_bytes += len(file.data)
            if held_bytes > small:
                break
        if held_bytes <= small:
            # Chunks are not carried: what the entry refers to must be there before it.
            await run_all(log.prepare_writes, puts.flush)
            assert files.snapshot is not None
            return files.snapshot, dict(made)

        async def all_files() -> AsyncGenerator[File, None]:
            while made:
                yield made.pop(0)
            async for file in coming:
                yield file

        async def put(file: File) -> None:
            await core.put(file.key, file.data)

        settings = core.settings
        stream = partial(
            run_stream, put, all_files(), _size, limit=settings.max_requests, max_weight=settings.put_memory_bytes
        )
        await run_all(log.prepare_writes, puts.flush, stream)
    if files.earlier is not None:
        files.earlier.add(files.new)
    assert files.snapshot is not None
    return files.snapshot, {}


def _size(file: File) -> int:
    return len(file.data)
