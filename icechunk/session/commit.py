"""The write side of a commit: a session's changes become files, and the files become history by one swap.

The files of a commit are made one after another, and no more of them are held than are on their way. Manifests come
first, since the snapshot names them and their sizes. Each is made, encoded, and forgotten once it is put, so that a
commit of many references needs little more memory than the session's log of them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import field, replace
from enum import Enum
from functools import partial
from typing import Any, Final, NamedTuple

from icechunk.conflicts import ConflictSolver, RebaseFailedError
from icechunk.errors import (
    ConflictError,
    ErrorKind,
    SessionEndedError,
    SessionStateError,
    branch_deleted,
    branch_moved,
)
from icechunk.format.by_node import num_rows
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.keys import manifest_key, snapshot_key, transaction_key
from icechunk.format.manifest import encode_manifest, max_refs
from icechunk.format.repo.repo_info import SnapshotRecord
from icechunk.format.snapshot.codec import encode_and_keep
from icechunk.format.transaction import encode_transaction_log, in_parts, require_room
from icechunk.format.values import Manifest, Snapshot, TransactionLog
from icechunk.log.repository.events import CommitAdded, CommitAmended, DetachedSnapshotAdded, Event
from icechunk.log.repository.port import Layout, Proposal, RepositoryLog, SwapToken, TurnLock
from icechunk.log.repository.ref_files.layout import needs_format_2
from icechunk.log.repository.state import RepoState, require_snapshot
from icechunk.log.session.log import SessionLog
from icechunk.log.session.merge.diff import combined
from icechunk.log.session.plan.compaction import Placed, Plan, new_manifests, new_snapshot, placed
from icechunk.log.session.plan.manifest_rows import require_fit
from icechunk.log.session.plan.reuse import Earlier, Remembered
from icechunk.runtime.checks import json_metadata, require_text
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_all, run_each, run_stream
from icechunk.session.content import Phase, SessionContent
from icechunk.session.core import Core
from icechunk.session.rebase import Rebase, advance
from icechunk.session.session_checkpoint import landed_error, note_attempt, note_committed, require_not_landed
from icechunk.transfer.assets import off_loop

__all__ = ["APPENDED", "Commit", "CommitFiles", "File", "How", "write_snapshot", "write_unlisted"]

_LOG: Final = logging.getLogger(__name__)
_BYTES_PER_REF: Final = 64
"""Bytes of an encoded reference, about, which decides whether a thread encodes."""
_TOGETHER_FROM: Final = 1 << 17
"""References of a commit from which its manifests are encoded two at a time."""
_TOGETHER_AT_MOST: Final = 1 << 18
"""References of a manifest that is encoded together with another one."""
_BYTES_PER_CHANGE: Final = 16
"""Bytes of a changed chunk in a transaction log, about."""
_BYTES_PER_NODE: Final = 256
"""Bytes of a node of the snapshot, about."""
_IN_A_ROW: Final = 8
"""Commits made one after another before the event loop has its turn: some 10 to 20 ms."""
_REBASED: Final = "__icechunk"
"""Key, the official library's own, under which a commit's metadata say how often it was rebased."""

APPENDED: Final = "aioicechunk_append"
"""Key under which a commit's metadata have the positions of appenders' sources. An amendment keeps them."""


class How(Enum):
    """The use of the new snapshot."""

    COMMIT = "commit"
    """The branch's next tip."""
    AMEND = "amend"
    """The branch's tip, in place of the one that the session is based on."""
    FLUSH = "flush"
    """A child of the session's base that no branch points to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The parameters of a commit."""

    how: How = How.COMMIT
    branch: str
    message: str
    metadata: Mapping[str, Any]
    """JSON values, those of the repository's configuration among them."""
    rewrite: bool = False
    """Whether the manifests of all arrays are written again."""
    earlier: Earlier | None = None
    """Manifests that earlier tries of this commit have put; each try adds its own. None: there is but one try."""

    def once_more_rebased(self) -> Commit:
        """The same commit, whose metadata says how often it was rebased."""
        noted = self.metadata.get(_REBASED)
        noted = noted if isinstance(noted, dict) else {}
        noted = {**noted, "rebase_attempts": noted.get("rebase_attempts", 0) + 1}
        return replace(self, metadata={**self.metadata, _REBASED: noted})


async def write_snapshot(
    content: SessionContent,
    how: How,
    message: str,
    metadata: Mapping[str, Any] | None,
    *,
    allow_empty: bool,
    rewrite: bool = False,
    solver: ConflictSolver | None = None,
    tries: int = 0,
) -> str:
    """Make a session's changes a snapshot, whose id is returned; the session is read-only then, and based on it.

    Parameters
    ----------
    rewrite
        Write the manifests of all arrays again, by the present configuration.
    solver, tries
        If the branch has moved: rebase with this solver and commit again, at most so many times.

    Raises
    ------
    ConflictError, RebaseFailedError, SessionStateError, InvalidInputError, StorageError, CommitOutcomeUnknown
        As `Session.commit_async` and `Session.amend_async` say.
    """
    require_text("message", message)
    described = content.core.default_metadata | json_metadata("metadata", metadata)
    commit = Commit(
        how=how,
        branch=content.begin_commit(allow_empty=allow_empty),
        message=message,
        metadata=described,
        rewrite=rewrite,
        earlier=Earlier() if solver is not None and tries else None,
    )
    try:
        snapshot = await _commit(content, commit, solver, tries)
    except BaseException as error:
        content.end_commit(error)
        raise
    content.end_commit(snapshot)
    await note_committed(content, snapshot.id)
    return encode_id(snapshot.id)


async def write_unlisted(content: SessionContent, log: SessionLog) -> Snapshot:
    """Write a log's changes as manifests and a snapshot that the repository log does not name.

    Raises `StorageError` if that fails; a collection removes the written files then, as it does later in any case.
    """
    core = content.core
    files = CommitFiles(
        core=core,
        commit=Commit(how=How.FLUSH, branch="", message="inherited by forks", metadata={}),
        plan=content.plan(log, everything=False),
        spec_version=(await core.log()).spec_version,
        snapshot_id=core.sources.new_object_id(),
        amended=None,
    )
    written: list[str] = []
    async with aclosing(files.make()) as coming:
        async for file in coming:
            # The transaction log of this snapshot is never read.
            if not file.key.startswith("transactions/"):
                await core.put_unsynced(file.key, file.data)
                written.append(file.key)
    await core.storage.barrier(written)
    assert files.snapshot is not None
    core.assets.keep_snapshot(files.snapshot)
    return files.snapshot


async def _commit(content: SessionContent, commit: Commit, solver: ConflictSolver | None, tries: int) -> Snapshot:
    for tried in itertools.count():
        try:
            if solver is not None and tries:
                return await _commit_in_turn(content, commit, solver)
            return await _commit_once(content, content.log, commit)
        except ConflictError:
            await require_not_landed(content)
            if solver is None or tried == tries:
                raise
        content.phase = Phase.COMMITTING
        try:
            await advance(content, commit.branch, solver)
        except RebaseFailedError:
            # The tip may be another process's commit of the same session.
            await require_not_landed(content)
            raise
        commit = commit.once_more_rebased()
    raise AssertionError


async def _commit_in_turn(content: SessionContent, commit: Commit, solver: ConflictSolver) -> Snapshot:
    """Commit behind those of this process that wait to commit to the same branch, on top of their commits.

    So they all go into one entry of the repository log, and none of them loses to another. The session itself is not
    rebased: the snapshot that it would be based on may not land.
    """
    log = await content.core.log()
    lock = log.turn(commit.branch)
    if lock is None:
        return await _commit_once(content, content.log, commit)
    # Chunks do not depend on the base: they are flushed before the commit takes its place in the queue.
    await content.puts.flush()
    turn = _Turn(lock)
    await turn.take()
    try:
        await turn.let_loop_run()
        rebasing, expected = Rebase(content), log.expected()
        if commit.branch in expected.branches:
            try:
                await rebasing.onto_tip(commit.branch, solver, expected)
            except SessionEndedError as error:
                # The tip is expected from a commit that may not land either.
                turn.give_up()
                await log.next_outcome()
                raise branch_moved(encode_id(content.log.base.id), None) from error
        if rebasing.log is not content.log:
            commit = commit.once_more_rebased()
        return await _commit_once(content, rebasing.log, commit, turn)
    except RebaseFailedError as error:
        # The conflict may be with commits that never land: the caller looks at those that landed.
        turn.give_up()
        await log.next_outcome()
        raise branch_moved(encode_id(content.log.base.id), None) from error
    finally:
        turn.give_up()


class _Turn:
    """A branch's turn, which is given up as soon as the commit is queued, and at the latest when it has ended."""

    def __init__(self, lock: TurnLock) -> None:
        self._lock = lock
        self._held = False

    async def take(self) -> None:
        await self._lock.acquire()
        self._held = True

    async def let_loop_run(self) -> None:
        """Let the event loop do other work after some commits: one that waits for nothing is made in a single step, and
        all that are ready would follow before anything is sent."""
        self._lock.in_a_row += 1
        if self._lock.in_a_row >= _IN_A_ROW:
            self._lock.in_a_row = 0
            await asyncio.sleep(0)

    def give_up(self) -> None:
        if self._held:
            self._held = False
            self._lock.release()


async def _commit_once(content: SessionContent, log: SessionLog, commit: Commit, turn: _Turn | None = None) -> Snapshot:
    """Write the files, all at once, and append the commit to the repository log.

    Where no manifest must be read, and no chunk is on its way, a small commit costs one round trip, since its files are
    embedded in the entry; others cost two: the files, the swap.

    Parameters
    ----------
    log
        The session's changes on the snapshot that shall be the parent.
    turn
        The branch's turn, held: that snapshot is the branch's tip once everything that waits has landed.

    Raises
    ------
    SessionEndedError
        It is persisted, and another process has taken it over, or it was committed.
    SessionStateError
        To amend: the base is the first snapshot (kind ``no-amend-for-initial-commit``).
    FormatError
        To amend: the repository is of format 1 (kind ``unsupported-spec-version``).
    ConflictError
        The branch is not at the base any more; nothing of this commit is visible.
    CommitOutcomeUnknown
        The swap was sent and its outcome is not certain.
    StorageError
        Something could not be written; nothing of this commit is visible.
    """
    core, base = content.core, log.base
    repository_log = await core.log()
    if commit.how is How.AMEND and repository_log.layout is Layout.REFS:
        # Before anything else: a format without amendments has no fitting answer to the checks below either.
        raise needs_format_2("amend a commit")
    await repository_log.name_refs(branches=[commit.branch])
    if turn is None and commit.how is not How.FLUSH and repository_log.state.branches.get(commit.branch) != base.id:
        # This loop's client may not have looked for a while; if the branch has moved, nothing needs to be uploaded.
        _require_tip(await repository_log.refresh(), commit.branch, base.id)
    parent, pruned, amended = base.id, tuple[ObjectId, ...](), None
    if commit.how is How.AMEND:
        before = require_snapshot(repository_log.state, base.id)
        if before.parent is None:
            raise SessionStateError(
                "cannot amend: the branch is at the repository's first snapshot, which is permanent; commit instead",
                ErrorKind.NO_AMEND_FOR_INITIAL_COMMIT,
            )
        parent, pruned = before.parent, before.pruned_ancestor_tx_logs
        amended = await core.assets.transaction_log(base.id)
        if APPENDED in before.metadata:
            commit = replace(commit, metadata={APPENDED: before.metadata[APPENDED], **commit.metadata})
    files = CommitFiles(
        core=core,
        commit=commit,
        plan=content.plan(log, everything=commit.rewrite),
        spec_version=repository_log.spec_version,
        snapshot_id=core.sources.new_object_id(),
        amended=amended,
    )
    snapshot, embedded, unsynced = await _write(content, repository_log, files)
    record = SnapshotRecord(
        id=snapshot.id,
        parent=parent,
        flushed_at_us=snapshot.flushed_at_us,
        message=commit.message,
        metadata=dict(commit.metadata),
        pruned_ancestor_tx_logs=(*pruned, *files.further_transactions),
    )
    # Before it has landed: the next commit in the queue builds upon it. If it does not land, it is never read.
    core.assets.keep_snapshot(snapshot)
    for key, data in embedded.items():
        core.files.put(key, data, len(data))
    proposal = _Proposal(
        content=content,
        turn=turn,
        commit=commit,
        base=base.id,
        record=record,
        further_transactions=tuple(files.further_transactions),
        unsynced=unsynced,
    )
    await repository_log.append(proposal, since_us=content.since_us, files=embedded)
    content.puts.synced(unsynced)
    if _LOG.isEnabledFor(logging.INFO):
        where = core.storage.describe()
        _LOG.info("%s: %s of snapshot %s, branch %r", where, commit.how.value, encode_id(snapshot.id), commit.branch)
    return snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proposal(Proposal):
    """The events that a commit adds to the repository log; it learns their outcome."""

    content: SessionContent
    turn: _Turn | None
    commit: Commit
    base: ObjectId
    """The snapshot that the branch must point to."""
    record: SnapshotRecord
    further_transactions: tuple[ObjectId, ...]
    """Transaction logs of this commit beside the one with its id."""
    unsynced: Sequence[str] = ()
    """As `Proposal.unsynced`: chunk objects."""

    def lost(self) -> None:
        """Also the session's next commit fails."""
        self.content.puts.synced(self.unsynced, lost=True)

    def queued(self) -> None:
        """The next commit to the branch may build upon this one."""
        if self.turn is not None:
            self.turn.give_up()

    def sent(self, token: SwapToken | None) -> None:
        """The session is not committed again while the outcome is open."""
        self.content.note_sent(token)

    def events(self, state: RepoState) -> Sequence[Event]:
        """Pure: the newest state to the events.

        Raises
        ------
        ConflictError
            The branch has moved.
        SessionEndedError
            An earlier commit of the same changes has landed.
        StorageError
            A chunk object may be lost.
        """
        branch = self.commit.branch
        self.content.puts.require_kept(self.unsynced)
        if self.content.persisted is not None:
            for earlier in self.content.persisted.attempts:
                if earlier != self.record.id and earlier in state.snapshots:
                    raise landed_error(self.content.persisted.session, earlier)
        if self.commit.how is How.FLUSH:
            return [DetachedSnapshotAdded(snapshot=self.record)]
        _require_tip(state, branch, self.base)
        if self.commit.how is How.AMEND:
            # An expiration since may have given the tip another parent.
            replaced = require_snapshot(state, self.base)
            pruned = (*replaced.pruned_ancestor_tx_logs, *self.further_transactions)
            record = replace(self.record, parent=replaced.parent, pruned_ancestor_tx_logs=pruned)
            return [CommitAmended(branch=branch, previous=self.base, snapshot=record)]
        return [CommitAdded(branch=branch, snapshot=self.record)]


def _require_tip(state: RepoState, branch: str, base: ObjectId) -> None:
    tip = state.branches.get(branch)
    if tip is None:
        raise branch_deleted(encode_id(base))
    if tip != base:
        raise branch_moved(encode_id(base), encode_id(tip))


async def _write(
    content: SessionContent, log: RepositoryLog, files: CommitFiles
) -> tuple[Snapshot, Mapping[str, bytes], Sequence[str]]:
    """Write the files; those that are returned instead are to be embedded in the entry.

    The keys are of chunk objects that are written, and that are to be durable before the entry is.
    """
    core = content.core

    unsynced: Sequence[str] = ()

    async def land() -> None:
        nonlocal unsynced
        if embedded and core.storage.defers_syncs and content.persisted is None:
            unsynced = await content.puts.finish_writes()
            return
        await content.puts.flush()
        await note_attempt(content, files.snapshot_id)

    small = min(core.settings.small_commit_bytes, log.embed_limit_bytes)
    embedded: dict[str, bytes] = {}
    # A task for each of three things costs as much as encoding a small file.
    durable = content.puts.is_idle and content.persisted is None
    alone = log.writes_prepared and (core.storage.defers_syncs or durable)

    async def make() -> None:
        made: list[File] = []
        held_bytes = 0
        if not alone:
            # Small files are made without a wait: the uploads begin before.
            await asyncio.sleep(0)
        async with aclosing(files.make()) as coming:
            async for file in coming:
                made.append(file)
                held_bytes += len(file.data)
                if held_bytes > small:
                    break
            if held_bytes <= small:
                embedded.update(made)
                return

            async def all_files() -> AsyncGenerator[File, None]:
                while made:
                    yield made.pop(0)
                async for file in coming:
                    yield file

            async def put(file: File) -> None:
                await core.put_unsynced(file.key, file.data)
                content.puts.wrote(file.key)

            settings = core.settings
            await run_stream(put, all_files(), _size, limit=settings.max_requests, max_weight=settings.put_memory_bytes)

    # Chunks are not embedded: those that the entry refers to must exist before it. They are uploaded while the files
    # are made.
    if alone:
        await make()
        await land()
    elif core.storage.defers_syncs:
        # They are written already; the medium is waited for once, for them and for files that are not embedded.
        await run_all(log.prepare_writes, make)
        await land()
    else:
        await run_all(log.prepare_writes, land, make)
    if not embedded and files.commit.earlier is not None:
        files.commit.earlier.add(files.new)
    assert files.snapshot is not None
    return files.snapshot, embedded, unsynced


def _size(file: File) -> int:
    return len(file.data)


class File(NamedTuple):
    """A metadata file."""

    key: str
    data: bytes


@dataclass(slots=True, kw_only=True, eq=False)
class CommitFiles:
    """Makes the files of one try of a commit."""

    core: Core
    commit: Commit
    plan: Plan
    spec_version: int
    snapshot_id: ObjectId
    amended: TransactionLog | None
    """Transaction log of the snapshot that this one takes the place of."""
    snapshot: Snapshot | None = None
    """The new snapshot; None until its file was made."""
    further_transactions: tuple[ObjectId, ...] = ()
    """Transaction logs with the rest of the changes, which the snapshot's record will name; oldest first."""
    new: list[Remembered] = field(default_factory=list)
    """Manifests whose files were made, where there may be another try."""

    async def make(self) -> AsyncGenerator[File, None]:
        """Make all files, and put their contents into the caches.

        Raises as `new_manifests` and the encoders do; values that are too large for a file are found before the first.
        """
        core, plan = self.core, self.plan
        snapshot_id = self.snapshot_id
        transactions = self._transactions(snapshot_id)
        for array in plan.arrays:
            require_fit(array, max_refs(len(array.node.shape)))
        found: dict[ObjectId, Manifest] = {}

        async def read(id: ObjectId) -> None:
            found[id] = await core.assets.manifest(id)

        for id in plan.manifests_to_read:
            if (kept := core.assets.kept_manifest(id)) is not None:
                found[id] = kept
        missing = [id for id in plan.manifests_to_read if id not in found]
        await run_each(read, missing, limit=max(1, core.settings.commit_fetches))
        touched = plan.num_rows + sum(manifest.num_chunk_refs for manifest in found.values())
        manifests = new_manifests(plan, found, core.sources.new_object_id)
        keep = core.assets.has_room_for(touched)
        places: list[Placed] = []
        async with aclosing(self._encoded(manifests, touched)) as steps:
            async for manifest, place, data in steps:
                places.append(place)
                if data is None:
                    continue
                if keep:
                    # Before the commit has landed: the next one in the queue builds upon it. If it does not land,
                    # the manifest is never read.
                    core.assets.keep_manifest(manifest)
                del manifest
                yield File(manifest_key(place.file.object_id), data)
                del data
        make = partial(
            self._encode_snapshot,
            places,
            snapshot_id=snapshot_id,
            flushed_at_us=max(core.sources.wall_us(), plan.base.flushed_at_us + 1),
        )
        self.snapshot, encoded = await off_loop(len(plan.nodes) * _BYTES_PER_NODE, make)
        yield File(snapshot_key(snapshot_id), encoded)
        level = core.settings.compression_level
        for transaction in transactions:
            rows = num_rows(transaction.updated_chunks)
            encode = partial(encode_transaction_log, transaction, self.spec_version, level)
            data = await off_loop(rows * _BYTES_PER_CHANGE, encode)
            if self.amended is None:
                # As manifests above: the next one in the queue compares its changes with these.
                core.assets.keep_transaction_log(transaction)
            yield File(transaction_key(transaction.id), data)
            del data

    def _transactions(self, snapshot_id: ObjectId) -> list[TransactionLog]:
        log = self.plan.changes.transaction(snapshot_id)
        if self.amended is not None:
            log = combined(self.amended, log)
        others: list[TransactionLog] = []
        # Snapshots of format 1 can name no further logs.
        if self.spec_version != 1:
            log, others = in_parts(log, self.core.sources.new_object_id)
        require_room(log)
        self.further_transactions = tuple(other.id for other in others)
        return [*others, log]

    def _encode_snapshot(
        self, places: Sequence[Placed], *, snapshot_id: ObjectId, flushed_at_us: int
    ) -> tuple[Snapshot, bytes]:
        snapshot = new_snapshot(
            self.plan,
            places,
            snapshot_id=snapshot_id,
            # Format 1 keeps ancestry in the snapshots.
            parent_id=self.plan.base.id if self.spec_version == 1 else None,
            flushed_at_us=flushed_at_us,
            message=self.commit.message,
            metadata=self.commit.metadata,
        )
        encoded = encode_and_keep(snapshot, self.spec_version, self.core.settings.compression_level)
        return encoded.snapshot, encoded.data

    async def _encoded(
        self, manifests: Iterator[Manifest], touched: int
    ) -> AsyncGenerator[tuple[Manifest, Placed, bytes | None], None]:
        """Each manifest, where it is, and its file, if there is none yet that holds the same.

        Of a commit of many references two manifests are encoded at once, unless they are large.
        """
        size_bytes = touched * _BYTES_PER_REF
        if touched < _TOGETHER_FROM:
            while (step := await off_loop(size_bytes, partial(self._encode_next, manifests))) is not None:
                yield step
            return
        under_way: deque[asyncio.Task[tuple[Manifest, Placed, bytes | None]]] = deque()
        try:
            while True:
                manifest = await off_loop(size_bytes, partial(next, manifests, None))
                alone = manifest is None or manifest.num_chunk_refs > _TOGETHER_AT_MOST
                while len(under_way) > (0 if alone else 1):
                    yield await under_way.popleft()
                if manifest is None:
                    return
                encode = off_loop(size_bytes, partial(self._encode, manifest))
                under_way.append(asyncio.create_task(encode, name="icechunk manifest encoding"))
                del manifest, encode
                if alone:
                    yield await under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    def _encode_next(self, manifests: Iterator[Manifest]) -> tuple[Manifest, Placed, bytes | None] | None:
        manifest = next(manifests, None)
        return None if manifest is None else self._encode(manifest)

    def _encode(self, manifest: Manifest) -> tuple[Manifest, Placed, bytes | None]:
        settings = self.core.settings
        known = None if self.commit.earlier is None else self.commit.earlier.find(manifest)
        if known is not None:
            return manifest, known, None
        data = encode_manifest(manifest, self.spec_version, settings.compression_level, settings.locations)
        place = placed(manifest, len(data))
        if self.commit.earlier is not None:
            self.new.append(self.commit.earlier.remembered(manifest, place))
        return manifest, place, data
