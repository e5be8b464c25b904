"""How soon after a change of one's own nobody can have heard of a newer one (rule 6, *Looks that are spared*).

Pure. Whoever appends after us has first to learn of our entry, which was nowhere before we sent it, and then to send
his own: two exchanges with the store, one after the other. Until as much time has passed as our own quickest look and
our own quickest swap took together, counted from before we sent our entry, no such change is acknowledged; we stop at
three quarters of it, since somebody may be quicker than we ever were. Who is that because he is much nearer to the
store has to tell us of it, which takes about as long as our own answer took, and he begins two exchanges later: so
we also stop soon after the answer.

An answer that took longer than usual, for whatever reason, leaves no time over, so the next look is made.

Who spares looks is quick enough to leave nobody else a slot. So only who has been alone for some entries spares any,
and of three looks he makes one: others then find the slot empty for as long as they need, once in every four turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

__all__ = ["Recency"]

_SAMPLES: Final = 3
"""So many exchanges of each kind before the quickest counts: the first ones also make connections."""
_ALONE: Final = 3
"""Entries of our own in a row that make us the only writer."""
_IN_A_ROW: Final = 2
"""Looks that are spared one after the other."""
_LIKE_A_LOOK_BYTES: Final = 16 * 1024
"""Swaps of more than that show how broad the line is, not how long."""
_LEAST_US: Final = 4_000
"""For a look and a swap together. Where they are quicker a look is not worth sparing; nor do we believe that somebody
else's are."""


@dataclass(slots=True)
class _Quickest:
    us: int = 0
    samples: int = 0

    def add(self, took_us: int) -> None:
        self.us = took_us if not self.samples else min(self.us, took_us)
        self.samples += 1


@dataclass(slots=True)
class Recency:
    """How quick one client's exchanges with the store are, and when it sent the entry that it saw land last."""

    _looks: _Quickest = field(default_factory=_Quickest)
    _swaps: _Quickest = field(default_factory=_Quickest)
    _sent_us: int = 0
    _answered_us: int | None = None
    _alone: int = 0
    _spared: int = 0

    def looked(self, took_us: int) -> None:
        """A look has shown, in this time, that nothing follows the head."""
        self._looks.add(took_us)
        self._spared = 0

    def landed(self, *, sent_us: int, answered_us: int, size_bytes: int) -> None:
        """The store has answered that an entry of our own landed.

        Parameters
        ----------
        sent_us
            By a clock that never goes back, before the entry was sent.
        answered_us
            By the same clock, after the answer.
        """
        self._sent_us, self._answered_us = sent_us, answered_us
        self._alone += 1
        if size_bytes <= _LIKE_A_LOOK_BYTES:
            self._swaps.add(answered_us - sent_us)

    def met_others(self) -> None:
        """An entry that is not our own was folded."""
        self._alone = 0

    def spare_look(self, now_us: int) -> bool:
        """Whether nobody can have been told of a change that this client has not folded, so that it need not look now.

        Whoever is told so does not look: that counts.
        """
        both_us = self._looks.us + self._swaps.us
        spared = (
            self._answered_us is not None
            and min(self._looks.samples, self._swaps.samples) >= _SAMPLES
            and both_us >= _LEAST_US
            and 0 <= now_us - self._answered_us < _LEAST_US
            and now_us - self._sent_us < both_us * 3 // 4
            and self._alone >= _ALONE
            and self._spared < _IN_A_ROW
        )
        self._spared += spared
        return spared
