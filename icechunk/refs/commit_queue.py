"""The commit queue: who waits, and what the next entry holds.

Pure but for the futures that it names: `build` validates each waiting proposal on the state after the ones
before it, on the events as every reader will decode them, and drops the refused before any bytes are made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from icechunk.format.ids import ObjectId
from icechunk.refs import events as e
from icechunk.refs.base import OnSent, Propose, SwapToken
from icechunk.refs.entry import EncodedEvents, decode_events, encode_entry, encode_events
from icechunk.refs.proof import Instant
from icechunk.refs.state import RepoState, apply

__all__ = ["Attempt", "Group", "Member", "Waiting", "attempt_of", "build", "new_snapshots"]

MAX_MEMBERS = 1_000
MAX_ENTRY_BYTES = 1 << 20
"""About; one member alone may have a little more."""
MAX_CARRIED_BYTES = 512 * 1024
"""Of one member."""


@dataclass(slots=True, kw_only=True, eq=False)
class Waiting:
    """One caller of ``append``."""

    propose: Propose
    since_us: int | None
    outcome: asyncio.Future[RepoState]
    asked: int
    """Number of the call among the client's looks: a refusal counts only by a later look (rule 3)."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """That the events add and that ride in the entry, by key (rule 15)."""
    on_sent: OnSent | None = None
    """Told of ``token`` whenever it changes."""
    abandoned: bool = False
    """The caller has left; if its entry loses its slot it is not sent again."""
    token: SwapToken | None = None
    """Of the entry that carries it now; None while nothing has been sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A caller whose events stand in an entry."""

    waiting: Waiting
    snapshots: tuple[ObjectId, ...]
    """New snapshots of its events."""


@dataclass(slots=True, kw_only=True)
class Group:
    """What `build` made of those who wait."""

    members: list[Member] = field(default_factory=list)
    """In the order of their events."""
    events: EncodedEvents = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    """Of the members."""
    since_us: int | None = None
    state: RepoState
    """After all of the events."""
    refused: list[tuple[Waiting, Exception]] = field(default_factory=list)
    """Callers to whom nothing happened, with the reason."""
    nothing: list[Waiting] = field(default_factory=list)
    """Callers who want no event."""
    taken: int = 0
    """How many of those who wait were looked at, from the front."""


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """One entry on its way to one slot; unsettled until seen landed or lost."""

    epoch: str
    n: int
    nonce: bytes
    data: bytes
    """Sent again unchanged until the slot is seen taken."""
    events: tuple[e.Event, ...]
    """As every reader decodes them."""
    files: dict[str, bytes]
    """That ride in the entry."""
    before: RepoState
    """That the events were validated against."""
    state: RepoState
    """The state after it."""
    members: list[Member]
    proof: Instant
    """How old the knowledge is that slot ``n`` was the next."""

    @property
    def snapshots(self) -> tuple[ObjectId, ...]:
        """New snapshots of all members."""
        return tuple(new_snapshots(self.events))


def new_snapshots(events: Sequence[e.Event]) -> list[ObjectId]:
    """Snapshots that the events add to the graph."""
    return [
        event.snapshot.id
        for event in events
        if isinstance(event, e.CommitAdded | e.CommitAmended | e.DetachedSnapshotAdded)
    ]


def _stands_alone(events: Sequence[e.Event]) -> bool:
    # A collection moves the cutoff that an entry's one `since` is compared with; nothing may follow a seal.
    return any(isinstance(event, e.CollectionRan | e.Sealed | e.Void) for event in events)


def build(state: RepoState, waiting: Sequence[Waiting], *, time_us: int) -> Group:
    """Decide what the next entry holds.

    Parameters
    ----------
    state
        At the head.
    waiting
        First come, first served.
    time_us
        To be written in the entry.
    """
    group = Group(state=state)
    size = 0
    for one in waiting:
        riding = sum(map(len, one.files.values())) * 4 // 3
        if len(group.members) >= MAX_MEMBERS or size >= MAX_ENTRY_BYTES:
            break
        if group.members and riding and size + riding > MAX_ENTRY_BYTES:
            break
        try:
            encoded = encode_events(one.propose(group.state))
            events = decode_events(encoded)
            if group.members and _stands_alone(events):
                break
            after = group.state
            for event in events:
                after = apply(after, event, time_us=time_us, since_us=one.since_us)
        except Exception as error:
            group.taken += 1
            group.refused.append((one, error))
            continue
        group.taken += 1
        if not events:
            group.nothing.append(one)
            continue
        group.members.append(Member(waiting=one, snapshots=tuple(new_snapshots(events))))
        group.events += encoded
        group.state = after
        group.files.update(one.files)
        size += riding + sum(len(repr(event)) for event in encoded)
        if one.since_us is not None:
            group.since_us = one.since_us if group.since_us is None else min(group.since_us, one.since_us)
        if _stands_alone(events):
            break
    return group


def attempt_of(
    group: Group, *, epoch: str, n: int, nonce: bytes, time_us: int, before: RepoState, proof: Instant
) -> Attempt:
    """The entry for a group that has members, and the token of each of them."""
    data = encode_entry(
        n=n, nonce=nonce, time_us=time_us, since_us=group.since_us, events=group.events, objects=group.files
    )
    for member in group.members:
        member.waiting.token = SwapToken(epoch=epoch, n=n, nonce=nonce, snapshots=member.snapshots)
    return Attempt(
        epoch=epoch,
        n=n,
        nonce=nonce,
        data=data,
        events=decode_events(group.events),
        files=group.files,
        before=before,
        state=group.state,
        members=group.members,
        proof=proof,
    )
