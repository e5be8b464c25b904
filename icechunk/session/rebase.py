"""Rebasing a session's log: reading the commits since its base, and putting the same changes on top of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np

from icechunk.conflicts import ConflictDetector, ConflictSolver, RebaseFailedError
from icechunk.errors import ConflictError, ErrorKind, ObjectNotFoundError, SessionStateError, SnapshotNotFoundError
from icechunk.format.by_node import Coords
from icechunk.format.ids import NodeId, ObjectId, encode_id
from icechunk.format.repo.repo_info import CommitAmended
from icechunk.format.snapshot.nodes import with_ids
from icechunk.format.values import Snapshot, TransactionLog
from icechunk.log.repository.port import Layout
from icechunk.log.repository.state import RepoState
from icechunk.log.session.columns import CoordIndex
from icechunk.log.session.log import SessionLog
from icechunk.log.session.merge.conflict_rules import Winner, find_conflicts, rebase
from icechunk.log.session.merge.diff import changes_since
from icechunk.log.session.merge.landed import LandedSince
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_each
from icechunk.session.content import Phase, SessionContent
from icechunk.session.core import Core
from icechunk.session.landed_commits import Line
from icechunk.session.session_checkpoint import landed_error, require_not_landed
from icechunk.transfer.assets import off_loop

__all__ = [
    "DEFAULT_REBASE_TRIES",
    "Rebase",
    "Step",
    "advance",
    "check_fork",
    "rebase_session",
    "steps_between",
    "winners_between",
]

DEFAULT_REBASE_TRIES: Final = 1000
"""Rebases of one commit, one for each race that it loses, before it gives up."""

_LOG = logging.getLogger(__name__)
_LANDED_TRIES = 3
"""Looks at the line of a branch, to which others add commits at the same time, before it is left to them."""
_BYTES_PER_ROW = 64
"""Bytes of a chunk row, about, which decides whether a thread carries rows over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A commit on the way from one snapshot to another."""

    snapshot: ObjectId
    transactions: tuple[ObjectId, ...]
    """Ids of transaction logs, oldest first: those of expired ancestors, then its own."""
    amends: bool = False
    """Whether it took the place of the snapshot that the way begins at: its transaction log has the changes of both."""


def steps_between(state: RepoState, base: ObjectId, tip: ObjectId) -> list[Step] | None:
    """Commits after ``base`` up to and with ``tip``, oldest first; None where ``base`` is not in the tip's history.

    A base that was expired meanwhile is found among the ancestors that the surviving snapshots name. One that was
    amended is found in the ops log, which names its replacement.
    """
    if tip == base:
        return []
    steps: list[Step] = []
    for record in state.ancestry(tip):
        pruned = record.pruned_ancestor_tx_logs
        if base in pruned:
            steps.append(Step(snapshot=record.id, transactions=(*pruned[pruned.index(base) + 1 :], record.id)))
            return steps[::-1]
        steps.append(Step(snapshot=record.id, transactions=(*pruned, record.id)))
        # The base itself need not be in the graph: format 1 has only requested snapshots.
        if record.parent == base:
            return steps[::-1]
    replacements = _replacements(state, base)
    for i, step in enumerate(steps):
        if step.snapshot in replacements:
            known = state.snapshots.get(base)
            before = () if known is None else known.pruned_ancestor_tx_logs
            transactions = tuple(id for id in step.transactions if id not in before)
            return [Step(snapshot=step.snapshot, transactions=transactions, amends=True), *steps[:i][::-1]]
    return None


def _replacements(state: RepoState, snapshot: ObjectId) -> set[ObjectId]:
    """Snapshots that took the place of one, by one amendment or several in a row."""
    amendments: dict[ObjectId, list[ObjectId]] = {}
    for update in state.updates:
        if isinstance(update.change, CommitAmended):
            amendments.setdefault(update.change.previous_snapshot, []).append(update.change.snapshot)
    found: set[ObjectId] = set()
    waiting = amendments.get(snapshot, [])
    while waiting:
        id = waiting.pop()
        if id not in found:
            found.add(id)
            waiting += amendments.get(id, [])
    return found


async def _with_history(core: Core, state: RepoState, base: ObjectId, tip: ObjectId) -> RepoState:
    """The state with the snapshots between two in its graph: format 1 reads them one by one, from child to parent."""
    if (await core.log()).layout is not Layout.REFS:
        return state
    current: ObjectId | None = tip
    while current is not None and current != base:
        if current not in state.snapshots:
            state = await core.learn(current)
        current = state.snapshots[current].parent if current in state.snapshots else None
    return state


async def winners_between(
    core: Core, steps: Sequence[Step], base: ObjectId, mine: Mapping[NodeId, Coords]
) -> dict[ObjectId, TransactionLog]:
    """The transaction logs of some steps, by id, all read at the same time.

    Parameters
    ----------
    base
        Where the steps begin.
    mine
        uint32[n, ndim] by array: chunks to be compared with them. Of an amendment only changes that the amended
        snapshot did not make itself count, exactly so for these chunks.

    Raises
    ------
    SessionStateError
        Kind ``rebase-tx-log-pruned``: one of them is gone.
    """
    found: dict[ObjectId, TransactionLog] = {}

    async def read(id: ObjectId) -> None:
        try:
            found[id] = await core.assets.transaction_log(id)
        except ObjectNotFoundError as error:
            raise SessionStateError(
                f"cannot rebase: the transaction log of snapshot {encode_id(id)} is gone from "
                f"{core.storage.describe()}, so its changes are not known; open a new session on the branch and "
                "repeat the work there",
                ErrorKind.REBASE_TX_LOG_PRUNED,
            ) from error

    await run_each(read, [id for step in steps for id in step.transactions], limit=core.settings.max_requests)
    for step in steps:
        if step.amends:
            before, after = await core.assets.snapshot(base), await core.assets.snapshot(step.snapshot)
            for id in step.transactions:
                found[id] = await _exactly(core, changes_since(found[id], before, after), before, after, mine)
    return found


async def _exactly(
    core: Core, log: TransactionLog, before: Snapshot, after: Snapshot, mine: Mapping[NodeId, Coords]
) -> TransactionLog:
    """The log without those of my chunks whose references are the same before and after."""
    was = with_ids(before.nodes, mine)
    now = with_ids(after.nodes, mine)
    chunks = dict(log.updated_chunks)
    for node_id in chunks.keys() & was.keys() & now.keys():
        coords, rank = chunks[node_id], mine[node_id].shape[1]
        if {coords.shape[1], len(was[node_id].shape), len(now[node_id].shape)} != {rank}:
            continue
        index = CoordIndex(mine[node_id])
        changed = np.ones(len(coords), np.bool_)
        for row in np.flatnonzero(index.find_rows(coords) >= 0).tolist():
            place = tuple(coords[row].tolist())
            references = [await core.assets.reference(node, place) for node in (was[node_id], now[node_id])]
            changed[row] = references[0] != references[1]
        chunks[node_id] = coords[changed]
    return replace(log, updated_chunks=chunks)


async def _landed(core: Core, state: RepoState, branch: str, base: ObjectId, tip: ObjectId) -> LandedSince | None:
    """The changes of the commits after ``base`` up to and with ``tip``, and perhaps of later ones; None: not known.

    None is returned too where the two are not in one history. Later commits can only add conflicts that are none: a
    caller that finds any looks at the commits one by one.
    """
    for _ in range(_LANDED_TRIES):
        line = core.landed.line(branch, base)
        seen, way = (None, None) if line is None else (line.tip, _steps_onto(line, state, base, tip))
        if way is None:
            # There is no line with this base yet; or the tip is on another branch, was reset, or is before the base.
            line, way = None, (base, steps_between(state, base, tip))
        join, steps = way
        if steps is None or any(step.amends for step in steps):
            # The changes of an amendment depend on the chunks they are compared with.
            return None
        transactions = await winners_between(core, steps, base, {})
        commits = [(step.snapshot, [transactions[id] for id in step.transactions]) for step in steps]
        found = core.landed.since(branch, base, line, seen, join, commits)
        if found is not None:
            return found
    return None


def _steps_onto(
    line: Line, state: RepoState, base: ObjectId, tip: ObjectId
) -> tuple[ObjectId, list[Step] | None] | None:
    """The newest snapshot of a line that is in the tip's history, and the commits after it, oldest first; None where
    there is none at ``base`` or after it."""
    join, steps, number = tip, list[Step](), line.numbers.get(base)
    if tip not in line.numbers:
        for record in state.ancestry(tip):
            steps.append(Step(snapshot=record.id, transactions=(*record.pruned_ancestor_tx_logs, record.id)))
            if record.parent is None:
                return None
            join = record.parent
            if join in line.numbers:
                break
    # Another thread may have taken commits from the line that did not land.
    if number is None or line.numbers.get(join, -1) < number:
        return None
    return join, steps[::-1]


class Rebase:
    """A session's changes on their way onto newer commits.

    Attributes
    ----------
    log
        The changes on the commits gone through so far. After an error this is where the session is.

    Parameters
    ----------
    content
        The session's; it takes no changes meanwhile.
    """

    def __init__(self, content: SessionContent) -> None:
        self._content = content
        self.log: SessionLog = content.log

    async def onto_tip(self, branch: str, solver: ConflictSolver, state: RepoState | None = None) -> None:
        """Put the changes on top of a branch.

        One look at all commits together is enough where nothing conflicts. Otherwise they are gone through one by one,
        oldest first, so that the conflicts are those with the first commit that has any, and a solver decides about
        each commit by itself.

        Parameters
        ----------
        state
            Says where the branch is; None: as the repository is now.

        Raises
        ------
        RebaseFailedError
            There are conflicts that the solver does not settle.
        RefNotFoundError
            The branch is gone.
        ConflictError
            The branch was reset, or its history expired in format 1: the session's base is not in its history any more.
        SessionEndedError
            A commit of the same session is in the branch's history.
        SessionStateError
            Kind ``rebase-tx-log-pruned``.
        """
        core = self._content.core
        if state is None:
            state = await core.state(branch=branch, to_write=True)
        base, tip = self.log.base.id, state.branch_tip(branch)
        state = await _with_history(core, state, base, tip)
        self._require_not_landed(state, tip)
        if tip != base and await self._over_all(state, branch, base, tip):
            return
        steps = steps_between(state, base, tip)
        if steps is None:
            # In format 1 a snapshot does not name the ancestors that an expiration took from it.
            expired = " or its history expired" if (await core.log()).layout is Layout.REFS else ""
            raise ConflictError(
                encode_id(base),
                encode_id(tip),
                f"cannot rebase: branch {branch!r} is at snapshot {encode_id(tip)} now, whose history does not contain "
                f"the session's {encode_id(base)}, because the branch was reset{expired}; open a new "
                "session on the branch and repeat the work there",
            )
        if not steps:
            return
        where = encode_id(base), encode_id(tip)
        _LOG.info("rebasing branch %r over %d commits, from %s to %s", branch, len(steps), *where)
        transactions = await winners_between(core, steps, base, self._changed_chunks() if steps[0].amends else {})
        for step in steps:
            snapshot = await core.assets.snapshot(step.snapshot)
            own = tuple(transactions[id] for id in step.transactions)
            self.log = await self._over(Winner(snapshot=snapshot, transactions=own), solver)

    def _require_not_landed(self, state: RepoState, tip: ObjectId) -> None:
        """Refuse to put a session's changes on top of themselves: another process may have committed them."""
        persisted = self._content.persisted
        if persisted is None or not persisted.attempts:
            return
        for record in state.ancestry(tip):
            if record.id == self.log.base.id:
                return
            if record.id in persisted.attempts:
                raise landed_error(persisted.session, record.id)

    def _changed_chunks(self) -> Mapping[NodeId, Coords]:
        with self._content.lock:
            return self.log.net_changes().chunks

    async def _over_all(self, state: RepoState, branch: str, base: ObjectId, tip: ObjectId) -> bool:
        """Put the changes on top of all commits at once, where nothing conflicts; False: nothing was done."""
        core = self._content.core
        landed = await _landed(core, state, branch, base, tip)
        if landed is None:
            return False
        winner = Winner(snapshot=await core.assets.snapshot(tip), landed=landed)
        try:
            self.log = await self._over(winner, ConflictDetector())
        except RebaseFailedError:
            return False
        _LOG.info("rebased from %s to %s", encode_id(base), encode_id(tip))
        return True

    async def _over(self, winner: Winner, solver: ConflictSolver) -> SessionLog:
        def work() -> SessionLog:
            # Reading the log merges its rows, which other threads must not see halfway.
            with self._content.lock:
                return rebase(self.log, winner, solver)

        return await off_loop(self.log.row_count * _BYTES_PER_ROW, work)


async def rebase_session(content: SessionContent, solver: ConflictSolver) -> None:
    """Put a session's changes on top of its branch, as `Session.rebase_async` says."""
    branch = content.begin_rebase()
    try:
        await require_not_landed(content)
        await advance(content, branch, solver)
    finally:
        content.phase = Phase.WRITABLE


async def advance(content: SessionContent, branch: str, solver: ConflictSolver) -> None:
    """The same, given the branch, for a session that takes no changes now; raises as `Rebase.onto_tip`."""
    rebasing = Rebase(content)
    try:
        await rebasing.onto_tip(branch, solver)
    finally:
        with content.lock:
            content.log = rebasing.log


async def check_fork(core: Core, changes: SessionLog, base: ObjectId, onto: Snapshot) -> None:
    """Refuse a fork whose parent was rebased since, if it conflicts with the commits in between.

    Parameters
    ----------
    changes
        The fork's own, over the nodes that there were before.
    base
        Where its parent was when it forked.
    onto
        Base of the session that shall merge it, with the nodes that it has now: those that the fork inherited
        are not in any snapshot.

    Raises
    ------
    SessionStateError
        Kind ``merge-failed``: the fork's base is not an ancestor of it.
    RebaseFailedError
        They conflict.
    """
    state = await core.state()
    with suppress(SnapshotNotFoundError):
        state = await _with_history(core, state, base, onto.id)
    steps = steps_between(state, base, onto.id) if onto.id in state.snapshots else None
    if steps is None:
        raise SessionStateError(
            f"cannot merge sessions: the fork is based on snapshot {encode_id(base)}, which is not in the "
            f"history of this session's {encode_id(onto.id)}; merge it into the session that it was forked from",
            ErrorKind.MERGE_FAILED,
        )
    transactions = await winners_between(core, steps, base, changes.net_changes().chunks)
    winner = Winner(snapshot=onto, transactions=tuple(transactions[id] for step in steps for id in step.transactions))
    conflicts = find_conflicts(changes, winner)
    if conflicts:
        raise RebaseFailedError(encode_id(onto.id), list(conflicts))
