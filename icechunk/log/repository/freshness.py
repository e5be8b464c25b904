"""The store's clock, as a client knows it by the answers that it had (rules 5, 10 and 13).

Pure but for reading the clocks. A pruner waits `PRUNE_WAIT_US` between announcing and deleting; a client relies on
what it knows for half of that, so it never takes a slot that was pruned and made again for the next one.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from icechunk.runtime.clock import Sources

__all__ = [
    "MAX_SKEW_US",
    "PRUNE_WAIT_US",
    "TRUST_US",
    "Instant",
    "clock_error_us",
    "instant",
    "is_fresh",
    "store_time_us",
]

PRUNE_WAIT_US: Final = 7 * 24 * 3600 * 1_000_000
"""G of the rules; a constant of the layout."""
TRUST_US: Final = PRUNE_WAIT_US // 2
MAX_SKEW_US: Final = 600 * 1_000_000
"""A writer further off than this from the store's clock does not write."""


class Instant(NamedTuple):
    """A moment on the clocks that can be read of it."""

    date_us: int | None
    """Store time; None where the store does not say."""
    elapsed_us: int
    """The client's clock that never goes back."""
    wall_us: int
    """The client's wall clock, µs."""


def instant(sources: Sources, date_us: int | None = None) -> Instant:
    """Now, by the client's clocks."""
    return Instant(date_us=date_us, elapsed_us=sources.elapsed_us(), wall_us=sources.wall_us())


def is_fresh(freshness: Instant, answer: Instant) -> bool:
    """Whether an answer about a slot counts: the client last knew the end of the log at ``freshness`` (rule 5).

    Parameters
    ----------
    freshness
        Client clocks of before the request, store time of its answer.
    answer
        Client clocks of after the answer.
    """
    if freshness.date_us is not None and answer.date_us is not None:
        return answer.date_us - freshness.date_us <= TRUST_US
    return max(answer.elapsed_us - freshness.elapsed_us, answer.wall_us - freshness.wall_us) <= TRUST_US


def clock_error_us(seen: Instant, now: Instant) -> int:
    """Lead of the client's wall clock over the store's, µs (negative: lag), by the last answer with a date.

    Parameters
    ----------
    seen
        An answer; 0 is returned where it has no date.
    """
    if seen.date_us is None:
        return 0
    return now.wall_us - (seen.date_us + now.elapsed_us - seen.elapsed_us)


def store_time_us(seen: Instant, now: Instant, *, resolution_us: int) -> int:
    """The store's clock now, or a little less, µs: no object written from now on is older (rule 10).

    Parameters
    ----------
    seen
        The last answer; without a date of the store, the wall clock counts, as far off as it may be.
    resolution_us
        Resolution of the store's times of objects, µs.
    """
    if seen.date_us is None:
        return max(0, now.wall_us - MAX_SKEW_US)
    # Last-Modified is rounded down, and may be that of the request's beginning.
    estimate = seen.date_us + max(0, now.elapsed_us - seen.elapsed_us)
    return max(0, estimate // resolution_us * resolution_us - resolution_us)
