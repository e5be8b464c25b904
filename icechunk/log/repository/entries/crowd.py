"""Turns of the clients that write to one log at the same time, as one of them sees them.

A slot goes to the first PUT, so of clients that commit as often as they can most lose each race, and one that is always
a little late never gets a slot. But every client reads who took the slots before: the nonce of an entry begins with the
tag of its client. So they can take turns without another request. The next slot belongs to the client that has waited
longest since its last entry, and all clients see the same order. A client whose turn is far away pauses; one whose turn
is near asks for the next slot until the clients before it have taken theirs. A client that lets its turn pass is waited
for for a few round trips, and soon not at all. Clients that have no entry yet may take any slot, and are let in first.

An entry whose nonce begins with no tag, of a client that knows of no turns, is in no order. If each such entry counted
as a client, others would wait for turns that no client takes.

Turns are advice: they decide when a client looks, never what it may write or what is folded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final
from zlib import crc32

__all__ = ["TAG_BYTES", "Crowd", "new_tag", "tag_of"]

TAG_BYTES: Final = 5
_CHECKED: Final = 3
"""Random bytes of a tag; the others are computed from them, so that a tag is told from other bytes."""
_MANY: Final = 64
_OBSERVED: Final = 16
"""Entries over which the time between two is averaged."""
_LEAST_TRIP_US: Final = 8_000
"""With shorter round trips clients wait for the machines: turns would cost more than they save."""
_CROWDED_TRIPS: Final = 6
"""Round trips between two entries, above which clients are not in each other's way."""
_FAST_US: Final = 250_000
"""Time between two entries, below which a client reads ahead also where it takes no turns."""
_MOST_AHEAD: Final = 8
"""Slots that it reads ahead then, at most."""
_PATIENCE_TRIPS: Final = 4
"""Round trips after which a turn counts as unused."""
_UNUSED_TURNS: Final = 3
"""Turns in which others may be first before a client is forgotten."""


def new_tag(random_bytes: Callable[[int], bytes]) -> bytes:
    """A tag for the nonces of one client."""
    chosen = random_bytes(_CHECKED)
    return chosen + _check(chosen)


def tag_of(nonce: bytes) -> bytes | None:
    """The tag of the client that wrote an entry; None: its nonce has none."""
    tag = nonce[:TAG_BYTES]
    return tag if tag[_CHECKED:] == _check(tag[:_CHECKED]) else None


def _check(chosen: bytes) -> bytes:
    return crc32(chosen).to_bytes(4, "big")[: TAG_BYTES - _CHECKED]


class Crowd:
    """The clients whose entries one client has read lately, and the pace of those entries.

    Parameters
    ----------
    tag
        This client's.
    """

    def __init__(self, tag: bytes) -> None:
        self.tag = tag
        self._trips_us: deque[float] = deque(maxlen=_OBSERVED)
        """Duration of the latest requests, µs."""
        self._unused: dict[bytes, int] = {}
        """Number of turns that each client let pass since its last entry; the one that waits longest is first."""
        self._newcomers = False
        """Whether the newest entry is the first one of its client, so that others may be about to come."""
        self._turn_us = 0
        """Time at which the turn of the first client in the order began, µs."""
        self._seen: deque[tuple[int, int, bool]] = deque(maxlen=_OBSERVED)
        """Slots, when they were read, µs, and whether their entries are other clients'."""

    def note_trip(self, took_us: float) -> None:
        """A request for a slot has taken so long."""
        self._trips_us.append(took_us)

    @property
    def trip_us(self) -> float:
        """A round trip, µs, without what holds up a request in a crowd; 0: not known."""
        return min(self._trips_us, default=0.0)

    def note(self, n: int, nonce: bytes, now_us: int) -> None:
        """An entry has been folded just now."""
        tag = tag_of(nonce)
        self._seen.append((n, now_us, tag != self.tag))
        if tag is None:
            return
        first = next(iter(self._unused), None)
        self._newcomers = tag not in self._unused
        if tag in self._unused:
            given_up = self._given_up(now_us)
            for i, other in enumerate(list(self._unused)):
                if other == tag:
                    break
                self._unused[other] += 1
                if (i < given_up or self._unused[other] > _UNUSED_TURNS) and other != self.tag:
                    del self._unused[other]
            del self._unused[tag]
        elif len(self._unused) >= _MANY:
            del self._unused[next(iter(self._unused))]
        self._unused[tag] = 0
        if self._newcomers or next(iter(self._unused)) != first:
            self._turn_us = now_us

    def _given_up(self, now_us: int) -> int:
        """Number of turns that have passed unused since the last one that was used.

        Entries out of turn do not count: a client that writes without waiting would hold up all others.
        """
        if not self._seen or not self.trip_us:
            return 0
        return int((now_us - self._turn_us) / (_PATIENCE_TRIPS * self.trip_us))

    @property
    def interval_us(self) -> float:
        """Time between two entries; 0: unknown, or so long that clients are not in each other's way."""
        trip_us, interval_us = self.trip_us, self._pace_us
        return interval_us if trip_us >= _LEAST_TRIP_US and interval_us <= _CROWDED_TRIPS * trip_us else 0.0

    @property
    def _pace_us(self) -> float:
        """Time between two entries; 0: unknown."""
        if len(self._seen) < 2:
            return 0.0
        (first, began_us, _), (last, ended_us, _) = self._seen[0], self._seen[-1]
        return (ended_us - began_us) / max(1, last - first)

    def ahead(self, now_us: int) -> int:
        """Number of clients whose turn comes before this client's, without the turns that have passed unused."""
        if self.tag not in self._unused or not self.interval_us:
            return 0
        before = list(self._unused).index(self.tag) + self._newcomers
        return max(0, before - self._given_up(now_us))

    def is_busy(self, now_us: int) -> bool:
        """Whether other clients write at the same time: their entries come soon one after the other."""
        pace_us = self._pace_us
        return 0 < pace_us <= _FAST_US and now_us - self._seen[-1][1] <= _OBSERVED * pace_us and self._others_write

    @property
    def _others_write(self) -> bool:
        return any(of_others for _, _, of_others in self._seen)

    def expected(self, now_us: int) -> int:
        """Number of entries that other clients may have added since the newest one was read, about.

        0: unknown; so many that a listing is cheaper; or entries come slowly, or from this client alone.
        """
        pace_us = self._pace_us
        if not pace_us or not self._others_write:
            return 0
        expected = 1 + int((now_us - self._seen[-1][1]) / pace_us)
        if self.interval_us:
            return min(_OBSERVED, expected)
        return expected if pace_us <= _FAST_US and expected <= _MOST_AHEAD else 0
