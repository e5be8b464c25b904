"""The faults, and how often each occurs in one schedule."""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from itertools import pairwise
from typing import Final

from icechunk.errors import ErrorKind, StorageError

__all__ = ["CALM", "ON_DISK", "Fault", "Mix", "described", "no_answer", "refusal", "unsent"]


class Fault(StrEnum):
    """One kind of trouble."""

    LOST = "lost answer"
    """The request is executed, and its answer does not arrive."""
    LATE = "late request"
    """No answer; the request is executed some time later."""
    DOUBLED = "doubled request"
    """The request is executed, and executed again later."""
    DROPPED = "dropped request"
    """Neither executed nor answered."""
    REFUSED = "refused request"
    """Answered with 400, 401, 403, 404 of the bucket, 405, 411 or 501: certainly not executed."""
    THROTTLED = "503"
    """Answered with 500, 503 or 429: not executed, but a client cannot be certain of that."""
    CONFLICT = "409"
    """Answered with 409, as S3 answers while another request for the key is under way: not executed."""
    SPURIOUS = "412 without reason"
    """Answered with 412, although the condition holds: not executed."""
    TRUNCATED = "truncated answer"
    """The answer to a read breaks off."""
    REORDERED = "reordered request"
    """A request is under way for so long that later requests overtake it."""
    PAUSED = "paused client"
    """The client sees an answer, or sends a request, hours or days late."""
    STALE = "stale listing"
    """A listing that shows none of what was written, or deleted, since it was asked for and a while before."""
    PARTIAL = "partial deletion"
    """Some of the objects of one request are deleted, the others are reported as failures."""
    CRASHED = "crash"
    """The client is gone, with all that it was about to do."""
    CLOCK = "clock jump"
    """The client's wall clock jumps, by seconds to days."""
    OUTAGE = "outage"
    """For a while the client gets no connection: no request of it is sent."""
    DENIED = "rights withdrawn"
    """For a while every write of the client is answered with 403."""
    CANCELLED = "cancelled caller"
    """The caller gives up while its change is under way."""
    CUT = "cancelled request"
    """A request is cancelled on its way, and executed nevertheless."""
    DEADLINE = "deadline"
    """The caller's deadline passes first."""
    POWER_DROPPED = "power loss, unsynced writes dropped"
    """On a local disk: no name and no byte is there that was not synced."""
    POWER_EMPTIED = "power loss, unsynced files empty"
    """On a local disk: all names are there, and files that were not synced have nothing in them."""
    POWER_TORN = "power loss, unsynced writes torn and reordered"
    """On a local disk: of what was not synced, names up to some point, and files cut short, garbage, or whole."""


ON_DISK: Final = frozenset({Fault.POWER_DROPPED, Fault.POWER_EMPTIED, Fault.POWER_TORN})
"""Faults of the machine that has the disk, not of requests; schedules of `tools.simulator.disk` have them."""


_BY_VERB: Final[Mapping[str, tuple[Fault, ...]]] = {
    "put": (
        Fault.LOST,
        Fault.LATE,
        Fault.DOUBLED,
        Fault.DROPPED,
        Fault.REFUSED,
        Fault.THROTTLED,
        Fault.CONFLICT,
        Fault.SPURIOUS,
        Fault.REORDERED,
        Fault.PAUSED,
        Fault.CRASHED,
        Fault.CLOCK,
        Fault.OUTAGE,
        Fault.DENIED,
    ),
    "get": (
        Fault.DROPPED,
        Fault.REFUSED,
        Fault.THROTTLED,
        Fault.TRUNCATED,
        Fault.REORDERED,
        Fault.PAUSED,
        Fault.CRASHED,
        Fault.CLOCK,
        Fault.OUTAGE,
        Fault.DENIED,
    ),
    "list": (
        Fault.DROPPED,
        Fault.REFUSED,
        Fault.THROTTLED,
        Fault.TRUNCATED,
        Fault.REORDERED,
        Fault.PAUSED,
        Fault.STALE,
        Fault.CRASHED,
    ),
    "delete": (
        Fault.LOST,
        Fault.LATE,
        Fault.DOUBLED,
        Fault.DROPPED,
        Fault.REFUSED,
        Fault.THROTTLED,
        Fault.PARTIAL,
        Fault.REORDERED,
        Fault.CRASHED,
    ),
    "copy": (Fault.LOST, Fault.DROPPED, Fault.REFUSED, Fault.THROTTLED, Fault.REORDERED, Fault.CRASHED),
}
_RARE: Final[Mapping[Fault, float]] = {
    Fault.PAUSED: 0.25,
    Fault.CRASHED: 0.2,
    Fault.CLOCK: 0.25,
    Fault.OUTAGE: 0.2,
    Fault.DENIED: 0.2,
    Fault.PARTIAL: 4.0,
}
"""Some kinds end most of what a client does, so they strike less often, and some find little to befall: a factor."""


@dataclass(slots=True)
class Mix:
    """The kinds of faults of one schedule, each with its probability for one request that it can befall.

    Not every schedule has every kind: what two kinds do together is often hidden by a third one.
    """

    kinds: Mapping[Fault, float]
    _tables: dict[str, tuple[float, tuple[tuple[float, Fault], ...]]] = field(init=False)

    def __post_init__(self) -> None:
        self._tables = {}
        for verb, faults in _BY_VERB.items():
            total, table = 0.0, []
            for fault in faults:
                share = self.kinds.get(fault, 0.0) * _RARE.get(fault, 1.0)
                if share:
                    total += share
                    table.append((total, fault))
            self._tables[verb] = total, tuple(table)

    @staticmethod
    def drawn(rng: random.Random, without: Iterable[Fault] = ()) -> Mix:
        """Some kinds, at random, of which most requests of a schedule are spared."""
        possible = [fault for fault in Fault if fault not in ON_DISK.union(without)]
        share = rng.choice((0.2, 0.4, 0.7))
        strength = rng.choice((0.03, 0.06, 0.12))
        kinds = [fault for fault in possible if rng.random() < share] or [rng.choice(possible)]
        return Mix({fault: strength * rng.uniform(0.3, 1.0) for fault in kinds})

    def draw(self, verb: str, rng: random.Random) -> Fault | None:
        """The fault of a request; None: none."""
        total, table = self._tables[verb]
        chance = rng.random()
        if chance >= total:
            return None
        for below, fault in table:
            if chance < below:
                return fault
        return None

    def any_for(self, verb: str, rng: random.Random) -> Fault | None:
        """One of the kinds that can befall a request, for certain; None: there is none."""
        _, table = self._tables[verb]
        return rng.choice(table)[1] if table else None

    def chance(self, fault: Fault, rng: random.Random) -> bool:
        """Whether a fault that no request decides about strikes now."""
        share = self.kinds.get(fault, 0.0)
        return bool(share) and rng.random() < share * 2

    def __contains__(self, fault: Fault) -> bool:
        return fault in self.kinds


CALM: Final = Mix({})
"""No faults at all; only interleavings."""


@cache
def described() -> Mapping[Fault, str]:
    """Each kind of fault with a sentence about it: the text that stands below it above."""
    kinds = next(node for node in ast.parse(inspect.getsource(Fault)).body if isinstance(node, ast.ClassDef))
    found: dict[Fault, str] = {}
    for named, text in pairwise(kinds.body):
        if isinstance(named, ast.Assign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            target = named.targets[0]
            assert isinstance(target, ast.Name)
            found[Fault[target.id]] = " ".join(str(text.value.value).split())
    return found


def no_answer(verb: str, key: str, why: str) -> StorageError:
    """The error of a request without a certain answer."""
    return StorageError(f"cannot {verb} {key!r}: {why}", ErrorKind.OBJECT_STORE)


def refusal(verb: str, key: str, status: int) -> StorageError:
    """The error of a request that certainly was not executed."""
    error = StorageError(f"cannot {verb} {key!r}: the store answers {status}", ErrorKind.OBJECT_STORE)
    error.refused = verb not in ("get", "list")
    return error


def unsent(verb: str, key: str) -> StorageError:
    """The error of a request for which no connection could be made."""
    error = StorageError(f"cannot {verb} {key!r}: no connection", ErrorKind.OBJECT_STORE)
    error.unsent = verb not in ("get", "list")
    return error
