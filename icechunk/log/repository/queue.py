"""The queue of calls that wait for a swap, and the choice of those for the next attempt; the same for every layout.

Pure but for the futures that it names: `build` validates each waiting proposal on the state after the ones before
it, on the events as every reader will decode them, and drops the refused before any bytes are made. A proposal that
applies to the state at the head, and only not after the ones before it, is not refused: they may never land. It waits
until their outcome is known.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Final

from icechunk.config.repository import (
    DEFAULT_UPDATE_INITIAL_BACKOFF_MS,
    DEFAULT_UPDATE_MAX_BACKOFF_MS,
    DEFAULT_UPDATE_TRIES,
)
from icechunk.errors import IcechunkError
from icechunk.format.ids import ObjectId
from icechunk.log.repository import events as e
from icechunk.log.repository.event_json import EncodedEvents, decode_events, encode_events
from icechunk.log.repository.port import Proposal, Propose, SwapToken
from icechunk.log.repository.state import RepoState, apply
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "MAX_EMBEDDED_BYTES",
    "Attempt",
    "Group",
    "Member",
    "UpdateRetries",
    "Waiting",
    "build",
    "new_snapshots",
    "proposal_of",
    "resolve",
    "retries_of",
    "tell_sent",
]

MAX_MEMBERS = 1_000
MAX_ENTRY_BYTES = 1 << 20
"""Bytes of an entry, about; one member alone may have a little more."""
MAX_EMBEDDED_BYTES = 512 * 1024
"""Bytes of the embedded files of one caller, at most."""

_LOG: Final = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """One entry made for one place; landed or lost at the latest when that place is seen taken (rule 2).

    Layouts add the bytes, or the keys, that they send.
    """

    epoch: str
    n: int
    """Number that names, together with ``epoch``, the place that the attempt was made for; as in `SwapToken`."""
    nonce: bytes
    """Bytes by which the attempt is recognised."""
    state: RepoState
    """The state after its events."""
    time_us: int = 0
    """Time of its newest event, µs, where the layout recognises the attempt by it; else 0."""
    known_us: int | None = None
    """Store time at which the place was known to be free; None where answers have no date."""
    members: tuple[Member, ...] = ()
    unsynced: tuple[str, ...] = ()
    """Keys of objects that must be durable before it lands, and may not be (`Storage.put_after`)."""

    @property
    def snapshots(self) -> tuple[ObjectId, ...]:
        """New snapshots of all members."""
        return tuple(snapshot for member in self.members for snapshot in member.snapshots)

    @property
    def place(self) -> tuple[str, object]:
        """The place of the attempt: of all attempts with the same place at most one can land."""
        return self.epoch, self.n

    @property
    def is_told(self) -> bool:
        """Whether the attempt is *told*: a caller has been notified or has left, so it must not be sent again."""
        return any(member.waiting.abandoned for member in self.members)


@dataclass(slots=True, kw_only=True, eq=False)
class Waiting:
    """One caller of ``append``."""

    proposal: Proposal
    since_us: int | None
    outcome: asyncio.Future[RepoState]
    asked: int
    """Number of the call among the client's looks: a refusal counts only by a later look (rule 3)."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files that the events add, by key: they are embedded in the entry (rule 15), or have been written unsynced."""
    abandoned: bool = False
    """The caller has left; an attempt with its events is not sent again."""
    attempts: list[Attempt] = field(default_factory=list)
    """Attempts that hold its events and may land; all for one place."""
    landed: bool = False
    """Whether one of the attempts landed."""
    lost: bool = False
    """Whether the last attempt that ended lost its place to another writer."""

    @property
    def token(self) -> SwapToken | None:
        """Names the attempts that may land; None: there is none."""
        if not self.attempts:
            return None
        first = self.attempts[0]
        snapshots = dict.fromkeys(
            snapshot
            for attempt in self.attempts
            for member in attempt.members
            if member.waiting is self
            for snapshot in member.snapshots
        )
        return SwapToken(
            epoch=first.epoch,
            n=first.n,
            nonces=tuple(attempt.nonce for attempt in self.attempts),
            times_us=tuple(attempt.time_us for attempt in self.attempts if attempt.time_us),
            snapshots=tuple(snapshots),
            known_us=first.known_us,
        )


class _Function(Proposal):
    """Events of a function."""

    def __init__(self, propose: Propose) -> None:
        self._propose = propose

    def events(self, state: RepoState) -> Sequence[e.Event]:
        return self._propose(state)


def proposal_of(proposal: Proposal | Propose) -> Proposal:
    """A proposal, also of a function."""
    return proposal if isinstance(proposal, Proposal) else _Function(proposal)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A caller whose events are in an attempt."""

    waiting: Waiting
    snapshots: tuple[ObjectId, ...]
    """New snapshots of its events."""


@dataclass(slots=True, kw_only=True)
class Group:
    """Waiting calls, divided into the next attempt's members and those that need not wait for it."""

    time_us: int = 0
    """Time that the events were validated with, µs."""
    members: list[Member] = field(default_factory=list)
    """Members in the order of their events."""
    events: EncodedEvents = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    """Files of the members, by key."""
    since_us: int | None = None
    state: RepoState
    """The state after all of the events."""
    refused: list[tuple[Waiting, Exception]] = field(default_factory=list)
    """Calls whose events do not apply to the state at the head, with the reason."""
    nothing: list[Waiting] = field(default_factory=list)
    """Calls that propose no event."""


def new_snapshots(events: Sequence[e.Event]) -> list[ObjectId]:
    """Snapshots that the events add to the graph."""
    added: list[ObjectId] = []
    for event in events:
        match event:
            case e.CommitAdded(snapshot=snapshot) | e.CommitAmended(snapshot=snapshot):
                added.append(snapshot.id)
            case e.DetachedSnapshotAdded(snapshot=snapshot):
                added.append(snapshot.id)
            case e.SnapshotsRewritten(replaced=replaced):
                added += [new for _, new in replaced]
    return added


def _needs_own_entry(events: Sequence[e.Event]) -> bool:
    # A collection moves the cutoff that an entry's one `since` is compared with; nothing may follow a seal.
    return any(isinstance(event, e.CollectionRan | e.Sealed | e.Void) for event in events)


def build(state: RepoState, waiting: Sequence[Waiting], *, time_us: int) -> Group:
    """Choose the calls of the next attempt.

    Parameters
    ----------
    state
        At the head.
    waiting
        First come, first served.
    time_us
        To be written in the entry.

    Returns
    -------
    Group
        Without the calls that go on waiting: those for which there is no room, and those whose events only do not apply
        after the members'.
    """
    group = Group(state=state, time_us=time_us)
    size = 0
    for one in waiting:
        embedded = sum(map(len, one.files.values())) * 4 // 3
        if len(group.members) >= MAX_MEMBERS or size >= MAX_ENTRY_BYTES:
            break
        if group.members and embedded and size + embedded > MAX_ENTRY_BYTES:
            break
        try:
            encoded, events, after = _validated(one, group.state, time_us)
        except Exception as error:
            refusal = _refusal(one, state, time_us) if group.members else error
            if refusal is not None:
                group.refused.append((one, refusal))
            continue
        if group.members and _needs_own_entry(events):
            break
        if not events:
            if not group.members or not one.proposal.events(state):
                group.nothing.append(one)
            continue
        group.members.append(Member(waiting=one, snapshots=tuple(new_snapshots(events))))
        group.events += encoded
        group.state = after
        group.files.update(one.files)
        if one is not waiting[-1]:
            size += embedded + sum(len(repr(event)) for event in encoded)
        if one.since_us is not None:
            group.since_us = one.since_us if group.since_us is None else min(group.since_us, one.since_us)
        if _needs_own_entry(events):
            break
    return group


def _validated(one: Waiting, state: RepoState, time_us: int) -> tuple[EncodedEvents, Sequence[e.Event], RepoState]:
    """A call's events, encoded and as decoded again, and the state after them; raises why they do not apply."""
    encoded = encode_events(one.proposal.events(state))
    events = decode_events(encoded)
    for event in events:
        state = apply(state, event, time_us=time_us, since_us=one.since_us)
    return encoded, events, state


def _refusal(one: Waiting, state: RepoState, time_us: int) -> Exception | None:
    """The reason why the events of a call do not apply to the state at the head; None: they do."""
    try:
        _validated(one, state, time_us)
    except Exception as error:
        return error
    return None


def tell_sent(one: Waiting) -> None:
    """Tell a caller which attempts may land, if there are any."""
    try:
        one.proposal.sent(one.token)
    except Exception:
        _LOG.exception("a callback of append failed")


def resolve(one: Waiting, outcome: RepoState | Exception) -> None:
    """Give a caller the outcome of its events, once."""
    if one.outcome.done():
        return
    if not isinstance(outcome, Exception):
        one.outcome.set_result(outcome)
    elif not one.abandoned:
        one.outcome.set_exception(_own(outcome))
        one.outcome.exception()  # a caller that is cancelled right now never looks: no warning then


def _own(error: Exception) -> Exception:
    """A copy for each caller: an error collects the traceback of every place that raises it."""
    if not isinstance(error, IcechunkError):
        return error
    own = copy.copy(error)
    own.__cause__ = error.__cause__
    # Its frames hold the calls, and with them their errors: memory that would not be free until garbage is collected.
    error.__traceback__ = None
    return own


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRetries:
    """Number and pauses of the tries after a lost race for the repository (``repo_update_retries``)."""

    tries: int = DEFAULT_UPDATE_TRIES
    """Number of tries, the first included."""
    first_pause_s: float = DEFAULT_UPDATE_INITIAL_BACKOFF_MS / 1000
    """Upper end of the first pause; it doubles from try to try."""
    longest_pause_s: float = DEFAULT_UPDATE_MAX_BACKOFF_MS / 1000

    def pause_s(self, sources: Sources, round_: int) -> float:
        """A pause with full jitter before try ``round_`` + 1 (counted from 1)."""
        longest: float = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(round_ - 1, 60))
        return longest * sources.fraction()


def retries_of(config: Any) -> UpdateRetries:
    """The persisted settings for lost races; the official library's defaults where there are none."""
    tries: int = DEFAULT_UPDATE_TRIES
    first_ms: int = DEFAULT_UPDATE_INITIAL_BACKOFF_MS
    longest_ms: int = DEFAULT_UPDATE_MAX_BACKOFF_MS
    found = config.get("repo_update_retries") if isinstance(config, dict) else None
    found = found.get("default") if isinstance(found, dict) else None
    if isinstance(found, dict):
        numbers = [found.get(name) for name in ("max_tries", "initial_backoff_ms", "max_backoff_ms")]
        tries, first_ms, longest_ms = (
            number if isinstance(number, int) else default
            for number, default in zip(numbers, (tries, first_ms, longest_ms), strict=True)
        )
    return UpdateRetries(tries=max(1, tries), first_pause_s=first_ms / 1000, longest_pause_s=longest_ms / 1000)
