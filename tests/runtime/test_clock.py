"""Moments as whole µs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from icechunk.runtime.clock import moment, us_of


@given(st.integers(-(10**15), 10**16))
def test_every_microsecond_comes_back(us: int) -> None:
    assert us_of(moment(us)) == us
    assert moment(us).tzinfo is UTC


def test_the_time_zone_counts() -> None:
    east = timezone(timedelta(hours=2))
    assert us_of(datetime(1970, 1, 1, 2, 0, 0, 1, tzinfo=east)) == 1
