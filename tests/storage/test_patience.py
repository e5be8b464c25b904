"""Time limits of the next answer, by the times of recent ones."""

from __future__ import annotations

import pytest

from icechunk.storage.patience import Patience, Recent, Watch


def answer(patience: Patience, waited_s: float, *, body_bytes: int = 0, took_s: float = 0.0) -> None:
    patience.answered(patience.begin(body_bytes), waited_s, took_s)
    patience.end(body_bytes)


def still_s(patience: Patience) -> float:
    found = patience.begin().still_s
    patience.end()
    return found


def test_patience_follows_the_slowest_of_the_recent_answers() -> None:
    patience = Patience()
    assert still_s(patience) == 5.0
    for _ in range(16):
        answer(patience, 0.05)
    assert still_s(patience) == 2.5
    answer(patience, 4.0)
    assert still_s(patience) == 12.0
    for _ in range(128):
        answer(patience, 0.05)
    assert still_s(patience) == 2.5


def test_time_to_connect_counts_as_an_answer() -> None:
    patience = Patience()
    patience.connected(4.0)
    assert still_s(patience) == 12.0


def test_percentile_is_that_of_the_recent_answers() -> None:
    recent = Recent()
    for ms in range(1, 101):
        recent.add(ms / 1000)
    assert recent.percentile_s(90) == pytest.approx(0.091)
    assert recent.stuck_s(0.2) == pytest.approx(0.3)


def test_watch_notes_for_its_caller_too() -> None:
    outer, recent = Watch(), Recent()
    first, second = Watch(outer), Watch(outer)
    first.note(1.0, recent)
    second.note(2.0)
    first.note(3.0)
    assert (outer.at, first.at, second.at) == (3.0, 3.0, 2.0)
    assert outer.recent is first.recent is recent


def test_requests_that_are_given_up_together_double_the_patience_once_until_something_is_answered() -> None:
    patience = Patience()
    for waiting in [patience.begin() for _ in range(100)]:
        patience.missed(waiting)
    assert still_s(patience) == 10.0
    for _ in range(100):
        patience.missed(patience.begin())
    assert still_s(patience) == 5.0 * 32
    answer(patience, 0.1)
    assert still_s(patience) == 5.0


def test_time_for_an_upload_follows_the_slowest_recent_rate_and_the_bytes_of_all_uploads() -> None:
    patience = Patience()
    # 256 KiB/s are assumed at first.
    assert patience.begin(1 << 20).body_s == 4.0
    assert patience.begin(1 << 20).body_s == 8.0
    for _ in range(2):
        patience.end(1 << 20)
    for _ in range(16):
        answer(patience, 0.05, body_bytes=4_000_000, took_s=1.0)
    assert patience.begin(1_000_000).body_s == pytest.approx(0.75)
    assert patience.begin(7_000_000).body_s == pytest.approx(6.0)
    assert patience.begin(0).body_s == 0.0
