"""Latencies in bounded space: counts in buckets that are 1 % wide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

__all__ = ["GROWTH", "Histogram"]

GROWTH = 1.01
"""Upper bound of a bucket over its lower bound; percentiles are off by at most half of that."""
_LOG_GROWTH = math.log(GROWTH)
_FLOOR_S = 1e-7


class Histogram:
    """A mergeable summary of durations: exact count, sum, minimum and maximum, percentiles within 0.5 %.

    Bucket ``b`` holds durations in ``[1e-7 * GROWTH**b, 1e-7 * GROWTH**(b+1))`` seconds; whatever is shorter is in
    bucket 0. A microsecond to an hour are some 2 200 buckets, of which only those in use take space.
    """

    __slots__ = ("counts", "max_s", "min_s", "n", "sum_s")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.n = 0
        self.sum_s = 0.0
        self.min_s = math.inf
        self.max_s = 0.0

    def record(self, seconds: float) -> None:
        """Count one duration in seconds, not negative."""
        bucket = int(math.log(seconds / _FLOOR_S) / _LOG_GROWTH) if seconds > _FLOOR_S else 0
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.n += 1
        self.sum_s += seconds
        self.min_s = min(self.min_s, seconds)
        self.max_s = max(self.max_s, seconds)

    def merge(self, other: Histogram) -> None:
        """Add the counts of `other`."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.n += other.n
        self.sum_s += other.sum_s
        self.min_s = min(self.min_s, other.min_s)
        self.max_s = max(self.max_s, other.max_s)

    @property
    def mean_s(self) -> float:
        """Mean in seconds; NaN of nothing."""
        return self.sum_s / self.n if self.n else math.nan

    def percentile(self, percent: float) -> float:
        """The duration in seconds that `percent` (0 to 100) of the recorded ones do not exceed; NaN of nothing.

        0 and 100 are the exact minimum and maximum; all others are the middle of a bucket, kept between those two.
        """
        if not self.n:
            return math.nan
        if percent <= 0:
            return self.min_s
        wanted = math.ceil(self.n * percent / 100)
        if wanted >= self.n:
            return self.max_s
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= wanted:
                middle = _FLOOR_S * math.exp(_LOG_GROWTH * (bucket + 0.5))
                return min(max(middle, self.min_s), self.max_s)
        return self.max_s

    def ecdf(self) -> list[tuple[float, float]]:
        """Points ``(seconds, share)`` of the cumulative distribution, ascending, one for each bucket in use."""
        seen = 0
        points = []
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            middle = _FLOOR_S * GROWTH ** (bucket + 0.5)
            points.append((min(max(middle, self.min_s), self.max_s), seen / self.n))
        return points

    def to_json(self) -> dict[str, object]:
        """As an object for JSON."""
        return {
            "n": self.n,
            "sum_s": self.sum_s,
            "min_s": self.min_s if self.n else None,
            "max_s": self.max_s,
            "counts": {str(bucket): count for bucket, count in sorted(self.counts.items())},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> Histogram:
        """The inverse of `to_json`.

        Raises
        ------
        KeyError, TypeError, ValueError
            `value` was not made by `to_json`.
        """
        made = cls()
        counts = value["counts"]
        if not isinstance(counts, Mapping):
            raise TypeError("counts must be an object")
        made.counts = {int(bucket): int(count) for bucket, count in counts.items()}
        made.n = int(value["n"])  # type: ignore[call-overload]
        made.sum_s = float(value["sum_s"])  # type: ignore[arg-type]
        made.min_s = math.inf if value["min_s"] is None else float(value["min_s"])  # type: ignore[arg-type]
        made.max_s = float(value["max_s"])  # type: ignore[arg-type]
        return made

    @classmethod
    def merged(cls, parts: Iterable[Histogram]) -> Histogram:
        """All of `parts` together."""
        made = cls()
        for part in parts:
            made.merge(part)
        return made
