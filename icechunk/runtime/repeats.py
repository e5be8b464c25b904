"""The number of requests that this process sent again because an answer was late, for load tests and diagnosis.

Totals since the process began, of all storages, loops and threads.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

__all__ = ["Repeats", "note", "totals"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """Requests that were sent again."""

    hedged: int = 0
    """Reads that were sent a second time while the first still ran."""
    abandoned: int = 0
    """Requests, of any kind, that were given up because nothing came for much longer than usual."""


_lock = threading.Lock()
_totals = Repeats()


def note(*, hedged: int = 0, abandoned: int = 0) -> None:
    """Add to the totals. Safe in all threads."""
    global _totals
    with _lock:
        _totals = replace(_totals, hedged=_totals.hedged + hedged, abandoned=_totals.abandoned + abandoned)


def totals() -> Repeats:
    """All that were noted so far."""
    return _totals
