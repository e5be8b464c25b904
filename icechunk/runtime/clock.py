"""The only sources of time and randomness of the engine.

Everything that needs a clock, a pause or a random id is handed a `Sources`; a simulator hands in
virtual ones, and any schedule it finds is reproduced by its seed.

It also converts times as the formats keep them: whole µs since 1970 in UTC.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from icechunk.format.ids import NodeId, ObjectId
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["SYSTEM", "Sources", "moment", "us_of"]


def _wall_us() -> int:
    return time.time_ns() // 1_000


def _elapsed_us() -> int:
    # CLOCK_BOOTTIME goes on while the machine sleeps; where it is missing the caller also compares wall clocks.
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000
    return time.monotonic_ns() // 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Clock, randomness and pauses, as one injected value."""

    wall_us: Callable[[], int] = _wall_us
    """Wall clock, µs since the Unix epoch."""
    elapsed_us: Callable[[], int] = _elapsed_us
    """Clock that never goes back, µs since some fixed point."""
    random_bytes: Callable[[int], bytes] = os.urandom
    """Source of that many unpredictable bytes; safe after a fork."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    """Pause for that many seconds."""

    def fraction(self) -> float:
        """A number from 0 up to 1, every one as likely: the jitter of a pause."""
        return int.from_bytes(self.random_bytes(8)) / 2.0**64

    def new_object_id(self) -> ObjectId:
        """A fresh id for a snapshot, manifest or chunk."""
        return ObjectId(self.random_bytes(12))

    def new_node_id(self) -> NodeId:
        """A fresh id for a group or array."""
        return NodeId(self.random_bytes(8))


SYSTEM = Sources()
"""The machine's own clock and randomness."""


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def moment(us: int) -> datetime:
    """µs since the epoch as a datetime in UTC."""
    return _EPOCH + timedelta(microseconds=us)


def us_of(value: datetime) -> int:
    """A datetime with a time zone as µs since the epoch."""
    return (value - _EPOCH) // timedelta(microseconds=1)
