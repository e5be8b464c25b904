"""Moments in time as the formats keep them: whole µs since 1970 in UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = ["moment", "us_of"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def moment(us: int) -> datetime:
    """µs since the epoch as a datetime in UTC."""
    return _EPOCH + timedelta(microseconds=us)


def us_of(value: datetime) -> int:
    """A datetime with a time zone as µs since the epoch."""
    return (value - _EPOCH) // timedelta(microseconds=1)
