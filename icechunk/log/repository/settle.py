"""Sending one entry to its slot until the outcome is certain (rules 2, 3 and 5).

What to do next is decided by plain functions of what the store answered; `settle_attempt` only carries it
out. The worked example: PUT times out → GET the slot. Our nonce: landed. Another's: lost, for certain. Empty: the
PUT may still arrive, so the same bytes are sent to the same slot again, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias, assert_never

from icechunk.errors import CommitOutcomeUnknown, FormatError, IcechunkError, PreconditionFailedError
from icechunk.log.repository.entries.entry import Entry, slot_key
from icechunk.log.repository.entries.reader import Instant, Opened, RepoObject, instant, read_slot, still_proves
from icechunk.log.repository.queue import Attempt
from icechunk.runtime.clock import Sources
from icechunk.storage.port import Absent, Storage

__all__ = [
    "Landed",
    "Lost",
    "NoAnswer",
    "Reopen",
    "SendAgain",
    "SlotAnswer",
    "Undecidable",
    "Verdict",
    "after_reopen",
    "backoff_s",
    "from_put",
    "from_slot",
    "settle_attempt",
]

_ROUNDS: Final = 8
_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """Our entry stands in the log."""

    proof: Instant | None = None
    """A new proof of the end of the log, where the answer is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Our entry is not in the log and never will be."""

    taken_by: Entry | None
    """Who has the slot, where it is the next one to fold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SendAgain:
    """The slot is empty: send the same bytes again."""

    proof: Instant
    """The empty slot shows where the log ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reopen:
    """The answer came too late to be believed: find the end of the log anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Undecidable:
    """The slot may have been pruned meanwhile, and nothing of ours can be recognised in the state."""


Verdict: TypeAlias = Landed | Lost | SendAgain | Reopen | Undecidable


@dataclass(frozen=True, slots=True, kw_only=True)
class NoAnswer:
    """Neither 200 nor 412."""

    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotAnswer:
    """What GET of the slot showed."""

    entry: Entry | None
    """None: it is empty."""
    asked: Instant
    """Client clocks before the GET, store time of the answer."""
    answered: Instant


def from_put(attempt: Attempt, *, asked: Instant, answered: Instant) -> Landed | Reopen:
    """What a 200 means: it counts only while the knowledge that the slot was next is fresh (rule 5)."""
    if not still_proves(attempt.proof, answered):
        return Reopen()
    return Landed(proof=replace(asked, date_us=answered.date_us))


def from_slot(attempt: Attempt, answer: SlotAnswer) -> Landed | Lost | SendAgain | Reopen:
    """What the slot's contents mean for the attempt (rule 2)."""
    if not still_proves(attempt.proof, answer.answered):
        return Reopen()
    if answer.entry is None:
        return SendAgain(proof=answer.asked)
    if answer.entry.nonce == attempt.nonce:
        return Landed()
    return Lost(taken_by=answer.entry)


def after_reopen(attempt: Attempt, opened: Opened, *, in_history: bool) -> Verdict:
    """What a freshly read log means for the attempt (rule 5).

    Parameters
    ----------
    in_history
        Whether a snapshot of the attempt is in the state or its updates.
    """
    if in_history:
        return Landed()
    if opened.head.epoch != attempt.epoch:
        return Lost(taken_by=None) if attempt.snapshots else Undecidable()
    if attempt.n == opened.head.n + 1:
        return SendAgain(proof=opened.proof)
    for entry in opened.tail:
        if entry.n == attempt.n:
            return Landed() if entry.nonce == attempt.nonce else Lost(taken_by=None)
    # Behind the checkpoint: the slot may have been pruned and made again, so it proves nothing.
    return Lost(taken_by=None) if attempt.snapshots else Undecidable()


def backoff_s(sources: Sources, round_: int) -> float:
    """A pause with full jitter before try ``round_`` (counted from 1)."""
    longest: float = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**round_)
    return longest * sources.fraction()


async def settle_attempt(
    storage: Storage,
    sources: Sources,
    attempt: Attempt,
    *,
    reopen: Callable[[], Awaitable[Opened | RepoObject]],
    in_history: Callable[[Attempt, Opened | RepoObject], Awaitable[bool]],
    saw: Callable[[Instant], None],
    first_look: bool = False,
) -> Landed | Lost:
    """Send the entry, and read back, until its outcome is certain.

    Parameters
    ----------
    reopen
        Finds the end of the log anew.
    in_history
        Whether the newest state, what was opened, or their ops logs know a snapshot of the attempt.
    saw
        Is told of every answer with a store time.
    first_look
        Whether to read the slot before sending, since the bytes were sent before.

    Raises
    ------
    CommitOutcomeUnknown
        The store gave no certain answer in a bounded number of tries. The attempt stays unsettled.
    """
    key = slot_key(attempt.epoch, attempt.n)
    why: Exception | None = None
    for round_ in range(_ROUNDS):
        if round_:
            await sources.sleep(backoff_s(sources, round_))
        verdict: Verdict | None = None
        if round_ or not first_look:
            asked = instant(sources)
            try:
                put = await storage.put(key, attempt.data, Absent())
            except PreconditionFailedError:
                pass
            except (IcechunkError, OSError) as error:
                why = error
            else:
                answered = instant(sources, put.date_us)
                saw(answered)
                verdict = from_put(attempt, asked=asked, answered=answered)
        if verdict is None:
            try:
                verdict = from_slot(attempt, await _look(storage, sources, attempt, saw))
            except FormatError as error:
                raise CommitOutcomeUnknown(f"what stands in slot {attempt.n} cannot be read ({error})", None) from error
            except (IcechunkError, OSError) as error:
                why = error
                continue
        if isinstance(verdict, Reopen):
            try:
                opened = await reopen()
                known = await in_history(attempt, opened)
            except FormatError:
                raise
            except (IcechunkError, OSError) as error:
                why = error
                continue
            if isinstance(opened, RepoObject):
                verdict = Landed() if known else Lost(taken_by=None) if attempt.snapshots else Undecidable()
            else:
                verdict = after_reopen(attempt, opened, in_history=known)
        match verdict:
            case Landed() | Lost():
                return verdict
            case SendAgain(proof=proof):
                attempt.proof = proof
            case Undecidable():
                raise CommitOutcomeUnknown(f"the answer came after slot {attempt.n} may have been pruned", None)
            case Reopen():
                continue
            case _:
                assert_never(verdict)
    raise CommitOutcomeUnknown(f"no certain answer about slot {attempt.n} after {_ROUNDS} tries ({why})", None) from why


async def _look(storage: Storage, sources: Sources, attempt: Attempt, saw: Callable[[Instant], None]) -> SlotAnswer:
    before = instant(sources)
    found = await read_slot(storage, attempt.epoch, attempt.n)
    if found is None:
        return SlotAnswer(entry=None, asked=before, answered=instant(sources))
    entry, answer = found
    answered = instant(sources, answer.date_us)
    saw(answered)
    return SlotAnswer(entry=entry, asked=before, answered=answered)
