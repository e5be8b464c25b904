"""Leases of persisted sessions: files that collections and expirations must leave, and the end of expired sessions.

A session's lease begins anew with each of its segments, at the Last-Modified that the store gave it, and ends as long
after it as the segment says. Both are compared in store time, which a collection knows a little low: so none is taken
for expired too early, and no clock of a writer's counts.

A collection lists the sessions before it decides which files are old. Those whose lease has not ended limit it: it
deletes nothing that is younger than the oldest first upload among them, so their chunks stay, and their commits stay
valid (their `since` is not before the cutoff). A session whose lease has ended is ended for certain before any of its
files is deleted: the collection takes its next segment, which the session would need for a checkpoint or a commit. If
that segment is taken already, the session goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Final

from icechunk.errors import ObjectNotFoundError
from icechunk.format.ids import ObjectId
from icechunk.format.keys import snapshot_key
from icechunk.log.repository.state import RepoState
from icechunk.log.session.segment import SegmentHead, SegmentKind, Slot, encode_segment
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_jobs
from icechunk.storage.port import Storage
from icechunk.transfer.segments import Listed, add_segment, list_sessions, read_head, remove_segments

__all__ = ["Leases", "end_expired", "read_leases"]

_REMEMBERED_US: Final = 30 * 24 * 3600 * 1_000_000
"""Time for which the end of a session stays, so that it can be reported."""


@dataclass(frozen=True, slots=True)
class Leases:
    """The sessions that collections and expirations must not harm."""

    heads: tuple[SegmentHead, ...] = ()
    """Head of the newest segment of each session."""

    @property
    def bases(self) -> frozenset[ObjectId]:
        """The snapshots that they, or forks that joined them before a rebase, are based on."""
        return frozenset(id for head in self.heads for id in (head.base, *head.earlier_bases))

    @property
    def may_have_committed(self) -> bool:
        """Whether one of them has tried to commit, and it is not known whether that landed."""
        return any(head.attempts for head in self.heads)

    def collect_before_us(self, older_than_us: int, state: RepoState) -> int:
        """The time before which a collection may take unreferenced files: the requested one, or an earlier one."""
        if not self.heads:
            return older_than_us
        reached = state.reachable()
        # A base that no ref reaches any more (amended, or repacked) would leave the graph with its own age.
        left = [state.snapshots[id].flushed_at_us for id in self.bases if id in state.snapshots and id not in reached]
        return min([older_than_us, *(head.since_us for head in self.heads), *left])

    def expire_before_us(self, older_than_us: int, written_us: Iterable[tuple[ObjectId, int]]) -> int:
        """The time before which snapshots may leave the history.

        Parameters
        ----------
        written_us
            Ids and times of snapshots that are no tips of branches: bases among them stay in the history, with all that
            came after them, so that their sessions can be rebased.
        """
        if not self.heads:
            return older_than_us
        bases = self.bases
        # A snapshot that a session may have committed must be found when it is resumed.
        tried = [head.since_us for head in self.heads if head.attempts]
        return min([older_than_us, *tried, *(time_us for id, time_us in written_us if id in bases)])

    async def present_bases(self, storage: Storage) -> frozenset[ObjectId]:
        """The bases whose files are there."""
        found: set[ObjectId] = set()

        async def look(id: ObjectId) -> None:
            try:
                await storage.head(snapshot_key(id))
            except ObjectNotFoundError:
                return
            found.add(id)

        await run_jobs([partial(look, id) for id in self.bases])
        return frozenset(found)


async def read_leases(storage: Storage, state: RepoState, *, now_us: int) -> Leases:
    """The sessions that have not ended, nor have had their time.

    Parameters
    ----------
    now_us
        Store time, µs, rather a little less.
    """
    found = await _newest(storage, await list_sessions(storage))
    return Leases(tuple(head for one, head in found if not _is_over(one, head, state, now_us)))


async def end_expired(storage: Storage, sources: Sources, state: RepoState, *, now_us: int) -> Leases:
    """The same, and end those that have had their time, and remove the segments of all that have ended.

    Raises
    ------
    StorageError
        Something could not be written or deleted. Whatever was ended may be collected.
    """
    living: list[SegmentHead] = []

    async def visit(one: Listed, head: SegmentHead) -> None:
        last = one.last
        if not head.kind.is_end:
            if not _is_over(one, head, state, now_us):
                living.append(head)
                return
            there = await _end(storage, sources, one, head)
            if there is not None and not there.kind.is_end:
                living.append(there)
                return
            last += 1
        forgotten = head.kind.is_end and one.written_us + _REMEMBERED_US < now_us
        await remove_segments(storage, one.keys_but(*(() if forgotten else (last, *head.claims))))

    listed = await list_sessions(storage)
    await run_jobs([partial(visit, one, head) for one, head in await _newest(storage, listed)])
    # Of forks that were late: their session has gone.
    orphans = [one for one in listed.values() if not one.own and one.written_us + _REMEMBERED_US < now_us]
    await remove_segments(storage, [key for one in orphans for key in one.keys_but()])
    return Leases(tuple(living))


async def _newest(storage: Storage, found: Mapping[ObjectId, Listed]) -> list[tuple[Listed, SegmentHead]]:
    """Every session with the head of its newest segment."""
    listed = [one for one in found.values() if one.own]
    heads: dict[ObjectId, SegmentHead] = {}

    async def read(one: Listed) -> None:
        try:
            heads[one.session] = await read_head(storage, one.own[one.last].key)
        except ObjectNotFoundError:
            # It has ended since it was listed, and another collection has removed it.
            return

    await run_jobs([partial(read, one) for one in listed])
    return [(one, heads[one.session]) for one in listed if one.session in heads]


def _is_over(one: Listed, head: SegmentHead, state: RepoState, now_us: int) -> bool:
    """Whether a session has ended, or may be ended."""
    return head.kind.is_end or one.written_us + head.lease_us < now_us or head.since_us < state.gc_cutoff_us


async def _end(storage: Storage, sources: Sources, one: Listed, head: SegmentHead) -> SegmentHead | None:
    """Take a session's next segment. None: it has ended; else the head of the segment that is there."""
    nonce = sources.random_bytes(16)
    end = SegmentHead(
        kind=SegmentKind.EXPIRED,
        nonce=nonce,
        base=head.base,
        branch=head.branch,
        since_us=head.since_us,
        created_us=head.created_us,
        attempts=head.attempts,
        claims=head.claims,
    )
    return await add_segment(storage, sources, Slot(one.session, None, one.last + 1), nonce, encode_segment(end, ()))
