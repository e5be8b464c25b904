"""Merging forks into a session: uploads and comparisons of bytes, around `icechunk.log.session.merge.merging`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from icechunk.conflicts import MergeFailedError
from icechunk.format.ids import ObjectId
from icechunk.format.values import ChunkRef
from icechunk.log.session.merge.merging import Fork, Merge, MergePolicy, Pair, event_key
from icechunk.runtime.tasks import run_all, run_each
from icechunk.session.content import SessionContent
from icechunk.session.read import bytes_of
from icechunk.session.rebase import check_fork

__all__ = ["Brought", "changes_of", "merge_forks"]

_COMPARED_AT_ONCE = 32
"""Pairs of chunks whose bytes are read and compared at the same time."""


class Brought(NamedTuple):
    """The changes of a fork, whose chunks are durable."""

    changes: Fork
    origin: ObjectId
    """Base of the session from which it comes."""
    since_us: int
    """As in `SessionContent`."""


async def changes_of(forks: Sequence[tuple[int, SessionContent]]) -> list[Brought]:
    """The changes of forks, each given with its number; writes their chunks first."""
    await run_all(*(fork.puts.flush for _, fork in forks))
    return [Brought(_changes_of(number, fork), fork.origin_base, fork.since_us) for number, fork in forks]


async def merge_forks(content: SessionContent, brought: Sequence[Brought], policy: MergePolicy) -> None:
    """Take over the changes of forks, all or nothing, as `Session.merge_async` says."""
    await _check_bases(content, brought)
    equal: dict[Pair, bool] = {}
    while True:
        with content.lock:
            content.require_changeable()
            before = content.log.savepoint()
            merging = Merge(content.log, policy, equal)
            try:
                for changes, _, _ in brought:
                    merging.add(changes)
                if not merging.undecided:
                    content.since_us = min([content.since_us, *(since_us for _, _, since_us in brought)])
                    return
                content.log.rollback(before)
            except BaseException as error:
                content.log.rollback(before)
                if not (isinstance(error, MergeFailedError) and merging.undecided):
                    raise
        undecided = list(dict.fromkeys(merging.undecided))
        for start in range(0, len(undecided), _COMPARED_AT_ONCE):
            pairs = undecided[start : start + _COMPARED_AT_ONCE]
            await _compare(content, pairs, equal)
            if not all(equal[pair] for pair in pairs):
                # One unequal pair is enough for a conflict, which also names the pairs that were not compared.
                equal |= dict.fromkeys(undecided[start + _COMPARED_AT_ONCE :], False)
                break


def _changes_of(number: int, fork: SessionContent) -> Fork:
    with fork.lock:
        events, position = fork.log.events, 0 if fork.origin is None else fork.origin.position
        return Fork(
            number=number,
            base=fork.log.base,
            inherited=events[:position],
            own=events[position:],
            last_inherited=() if fork.lineage is None else fork.lineage.last_events,
        )


async def _check_bases(content: SessionContent, brought: Sequence[Brought]) -> None:
    """Compare forks with the commits that the session was rebased onto since they began."""
    with content.lock:
        bases = content.log.base.id, content.origin_base
        moved = [one for one in brought if one.changes.base.id != bases[0] and one.origin != bases[1]]
        # Changes that an earlier merge took over were compared when the session was rebased, and are in its nodes now.
        taken = {event_key(event) for event in content.log.events} if moved else set()
    for fork, origin, _ in moved:
        new = [event for event in fork.own if event_key(event) not in taken]
        if not new:
            continue
        with content.lock:
            now = content.log.base.with_nodes(content.log.hierarchy())
            before = fork.log_with([event for event in fork.own if event_key(event) in taken], content.log)
            changes = before.rebased(fork.base.with_nodes(before.hierarchy()), new)
        await check_fork(content.core, changes, origin, now)


async def _compare(content: SessionContent, pairs: Sequence[Pair], equal: dict[Pair, bool]) -> None:
    async def read(ref: ChunkRef) -> bytes:
        return bytes(await bytes_of(content.core, content.puts, ref, None))

    async def compare(pair: Pair) -> None:
        equal[pair] = await read(pair[0]) == await read(pair[1])

    await run_each(compare, pairs, limit=_COMPARED_AT_ONCE)
