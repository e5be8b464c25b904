"""Who waits for a swap, and the task that swaps: the part of a repository log that does not know its layout.

The task belongs to the queue, not to a caller, since a PUT must outlive the caller who gave up on it (rule 3), and an
anyio task group needs a scope that nobody here is in. It is spawned when somebody waits, held strongly, ends when
nobody does, and is awaited or cancelled in `AppendQueue.aclose`.

The commit queue: who waits, and what the next entry holds.

Pure but for the futures that it names: `build` validates each waiting proposal on the state after the ones
before it, on the events as every reader will decode them, and drops the refused before any bytes are made.

How often a lost race for an object is tried again, and how soon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from icechunk.errors import CommitOutcomeUnknown, ErrorKind, IcechunkError, SessionStateError, StorageError
from icechunk.format.ids import ObjectId, encode_id
from icechunk.log.repository import events as e
from icechunk.log.repository.entries.embedded import put_once
from icechunk.log.repository.entries.entry import EncodedEvents, decode_events, encode_entry, encode_events
from icechunk.log.repository.entries.reader import Instant
from icechunk.log.repository.port import OnSent, Propose, SwapToken
from icechunk.log.repository.state import RepoState, apply
from icechunk.log.repository.store_check import require_writable
from icechunk.runtime.clock import Sources
from icechunk.runtime.tasks import finish_task
from icechunk.storage.port import Storage

__all__ = [
    "AppendQueue",
    "Attempt",
    "Group",
    "Member",
    "UpdateRetries",
    "Waiting",
    "attempt_of",
    "build",
    "new_snapshots",
    "resolve",
    "retries_of",
    "tell_sent",
]

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


_LOG: Final = logging.getLogger(__name__)

_CLOSE_GRACE_S: Final = 10.0


class AppendQueue:
    """Callers of ``append`` of one log on one event loop.

    Parameters
    ----------
    swap_next
        Carries out one swap for whoever is in `waiting`, and settles it. Whatever it raises ends the appends of
        everybody: of those in `sent` with `CommitOutcomeUnknown`, of the others with this error.
    storage
        Where the log is.
    begin_look
        Numbers a call among the client's looks.
    files_ride
        Whether the files of a call ride in its entry. Else they are put before it waits.
    """

    def __init__(
        self,
        swap_next: Callable[[], Awaitable[None]],
        storage: Storage,
        begin_look: Callable[[], int],
        *,
        files_ride: bool = False,
    ) -> None:
        self._swap_next = swap_next
        self._storage = storage
        self._begin_look = begin_look
        self._files_ride = files_ride
        self.waiting: list[Waiting] = []
        self.sent: tuple[Member, ...] = ()
        """Whose events are in the attempt that is not settled."""
        self.swapping = asyncio.Lock()
        """Held while an attempt is made and settled; at most one is under way."""
        self.closed = False
        self.runner: asyncio.Task[None] | None = None
        """Swaps until nobody waits."""

    async def append(
        self,
        propose: Propose,
        *,
        since_us: int | None,
        deadline_s: float | None,
        on_sent: OnSent | None,
        files: Mapping[str, bytes],
        on_queued: Callable[[], None] | None,
    ) -> RepoState:
        """As `RepositoryLog.append`."""
        require_writable(self._storage, "change the repository")
        if not self._files_ride:
            for key, data in files.items():
                await put_once(self._storage, key, data)
        if self.closed:
            raise SessionStateError("the repository is closed; open it again")
        one = Waiting(
            propose=propose,
            since_us=since_us,
            outcome=asyncio.get_running_loop().create_future(),
            on_sent=on_sent,
            files=files if self._files_ride else {},
            asked=self._begin_look(),
        )
        self.waiting.append(one)
        if on_queued is not None:
            on_queued()
        if self.runner is None or self.runner.done():
            self.runner = asyncio.get_running_loop().create_task(self._run(), name="icechunk swaps")
        try:
            # Not `wait_for`: the future is the runner's, a caller who leaves must not cancel it.
            await asyncio.wait({one.outcome}, timeout=deadline_s)
        finally:
            if not one.outcome.done():
                one.abandoned = True
                if one in self.waiting:
                    self.waiting.remove(one)
        if one.outcome.done():
            return one.outcome.result()
        if one.token is None:
            raise StorageError(
                f"cannot change the repository in {self._storage.describe()}: the deadline of {deadline_s} s passed "
                "before anything was sent; nothing landed",
                ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
            )
        raise self._unknown(one, f"the deadline of {deadline_s} s passed first")

    def _unknown(self, one: Waiting, why: str) -> CommitOutcomeUnknown:
        snapshots = () if one.token is None else one.token.snapshots
        what = ", ".join(encode_id(snapshot) for snapshot in snapshots) or "a change"
        return CommitOutcomeUnknown(
            f"it is not known whether {what} landed in the repository in {self._storage.describe()}: {why}. "
            "Repository.settle_async(error.token) finds out, or makes failure certain",
            one.token,
        )

    async def _run(self) -> None:
        """Swap until nobody waits."""
        try:
            while self.waiting:
                async with self.swapping:
                    await self._swap_next()
        except asyncio.CancelledError:
            self._fail_all(None)
            raise
        except Exception as error:
            self._fail_all(error)

    def lost(self, members: Iterable[Member]) -> None:
        """The attempt is lost for certain: put those back in front who still wait; who has left is not sent again."""
        self.sent = ()
        members = tuple(members)
        for member in members:
            tell_sent(member.waiting, None)
        self.waiting[:0] = [
            member.waiting for member in members if not member.waiting.abandoned and not member.waiting.outcome.done()
        ]

    def _fail_all(self, error: Exception | None) -> None:
        why = str(error) if error is not None else "the repository was closed first"
        for member in self.sent:
            resolve(member.waiting, self._unknown(member.waiting, why))
        self.sent = ()
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            if error is None or isinstance(error, CommitOutcomeUnknown):
                resolve(one, SessionStateError(f"nothing was sent, nothing landed; try again: {why}"))
            else:
                resolve(one, error)

    async def aclose(self) -> None:
        """Stop: who was not sent is told so, who was sent and is not certain after a while as well."""
        if self.closed:
            return
        self.closed = True
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            resolve(one, SessionStateError("the repository was closed before anything was sent; nothing landed"))
        await finish_task(self.runner, _CLOSE_GRACE_S)


def tell_sent(one: Waiting, token: SwapToken | None) -> None:
    """Note which attempt carries a caller's events, None for none, and tell him."""
    one.token = token
    if one.on_sent is None:
        return
    try:
        one.on_sent(token)
    except Exception:
        _LOG.exception("a callback of append failed")


def resolve(one: Waiting, outcome: RepoState | Exception) -> None:
    """Tell a caller what became of his events, once."""
    if one.outcome.done():
        return
    if not isinstance(outcome, Exception):
        one.outcome.set_result(outcome)
    elif not one.abandoned:
        one.outcome.set_exception(_own(outcome))
        one.outcome.exception()  # a caller who is cancelled at this very moment never looks: no complaint then


def _own(error: Exception) -> Exception:
    """An error of one's own for each caller: a raised one collects the traceback of whoever raises it."""
    if not isinstance(error, IcechunkError):
        return error
    copy: Exception = error.__reduce__()[0](*error.__reduce__()[1])
    copy.__cause__ = error.__cause__
    return copy


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRetries:
    """How often and how soon a lost race for the repository is tried again (``repo_update_retries``)."""

    tries: int = 100
    """The first included."""
    first_pause_s: float = 0.05
    """Upper end of the first pause; it doubles from try to try."""
    longest_pause_s: float = 30.0

    def pause_s(self, sources: Sources, round_: int) -> float:
        """A pause with full jitter before try ``round_`` + 1 (counted from 1)."""
        longest: float = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(round_ - 1, 60))
        return longest * sources.fraction()


def retries_of(config: Any) -> UpdateRetries:
    """What the persisted configuration says about lost races; the official library's defaults where it says nothing."""
    tries, first_ms, longest_ms = 100, 50, 30_000
    found = config.get("repo_update_retries") if isinstance(config, dict) else None
    found = found.get("default") if isinstance(found, dict) else None
    if isinstance(found, dict):
        numbers = [found.get(name) for name in ("max_tries", "initial_backoff_ms", "max_backoff_ms")]
        tries, first_ms, longest_ms = (
            number if isinstance(number, int) else default
            for number, default in zip(numbers, (tries, first_ms, longest_ms), strict=True)
        )
    return UpdateRetries(tries=max(1, tries), first_pause_s=first_ms / 1000, longest_pause_s=longest_ms / 1000)
