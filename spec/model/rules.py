"""The rules that can be left out, by name, and decisions that several steps share."""

from __future__ import annotations

from enum import Enum
from typing import Final

__all__ = ["ALL", "RULES", "Verdict", "judge", "may_replace_checkpoint"]

RULES: Final[dict[str, tuple[int, str]]] = {
    "conditions": (1, "a store that ignores If-None-Match is not written to"),
    "order": (1, "no other slot before the slot is seen taken"),
    "settle": (2, "nothing is called failed before the slot is seen taken"),
    "told": (2, "an attempt whose caller was told anything is never sent again"),
    "nonce": (2, "a nonce per entry, not per process"),
    "look": (2, "a 412 is not believed: the slot is read"),
    "shared": (2, "events of an attempt that landed are never proposed again"),
    "refusal": (3, "refused for certain only if every request of the attempt was refused"),
    "void": (3, "settle fills an empty slot before it says that the change is lost"),
    "looked": (3, "events are refused only on a state learned after the caller asked"),
    "chain": (4, "each event is validated after the events before it in the entry"),
    "proof": (5, "a writer believes an answer only while its proof is fresh"),
    "reader-proof": (5, "a reader believes an empty slot only while its proof is fresh"),
    "after": (5, "freshness is checked after the answer, not before the request"),
    "trust": (5, "a proof is trusted for G/2, not for G"),
    "token-proof": (5, "a slot counts for a token only while the token's proof is fresh"),
    "contiguous": (6, "a gap in the tail means: open again"),
    "epoch": (7, "a checkpoint replaces only one of its own epoch"),
    "forward": (7, "a checkpoint replaces only an older one"),
    "match": (7, "a checkpoint replaces only the version that was compared"),
    "seal": (8, "a conversion appends a seal first"),
    "help": (8, "a client that folds a seal finishes the conversion"),
    "announce": (9, "slots are pruned after an announcement, not by their own age"),
    "wait": (9, "slots are deleted only when the announcement is older than G"),
    "floor": (9, "a floor never passes the marker"),
    "fence": (10, "a collection is an entry, and refuses what is older than its cutoff"),
    "ahead": (10, "a collector writes a checkpoint past its entry before it deletes"),
    "first": (11, "the first snapshot is created if absent, and the one that is there is used"),
    "mine": (11, "a marker with our epoch means that it was us"),
    "sync": (12, "a slot's name is durable before a caller is told, and before a reader shows it"),
    "lock": (12, "a torn slot is removed only under the lock that its writer holds"),
    "inode": (12, "a creator checks, under the lock, that the name is still its file"),
    "time": (13, "an event's time is later than the last one's"),
    "resume": (14, "a resumed session settles the attempt that it had in flight"),
    "materialize": (15, "embedded files are put before a checkpoint names them"),
    "materialize-last": (15, "and before the log is converted to a repo object"),
    "look-again": (15, "a file that is nowhere is asked for once more, after the tail was read"),
}
"""Name to the rule of ``repository-log.md`` that it is part of, and its text."""

ALL: Final = frozenset(RULES)


class Verdict(Enum):
    """The meaning of an answer about a slot for an attempt that was sent to it."""

    LANDED = "landed"
    """The attempt is the slot's entry."""
    LOST = "lost"
    """Another entry is."""
    EMPTY = "empty"
    """Undecided: in flight it may be sent again, told it is left alone."""
    REOPEN = "reopen"
    """The answer is too late to be believed."""


def judge(nonce: object, found: object | None, *, fresh: bool) -> Verdict:
    """Rule 2, step 3.

    Parameters
    ----------
    nonce
        Of the attempt.
    found
        Nonce of the entry in the slot; None: the slot is empty.
    fresh
        Whether the answer may be believed (rule 5).
    """
    if not fresh:
        return Verdict.REOPEN
    if found is None:
        return Verdict.EMPTY
    return Verdict.LANDED if found == nonce else Verdict.LOST


def may_replace_checkpoint(*, epoch: object, n: int, found_epoch: object, found_n: int) -> bool:
    """Rule 7: whether ``repo`` with the found marker may be replaced by a checkpoint at slot ``n`` of ``epoch``."""
    return found_epoch == epoch and found_n < n
