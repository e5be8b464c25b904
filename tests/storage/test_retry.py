"""Tries of one operation."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field, replace

import pytest

from icechunk.config import StorageRetriesSettings, StorageSettings, StorageTimeoutSettings
from icechunk.runtime.clock import Sources
from icechunk.storage.retry import Limits, Tries, limits_of


@dataclass
class Clock:
    now_us: int = 0
    pauses: list[float] = field(default_factory=list)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now_us += round(seconds * 1e6)


def tries_of(
    clock: Clock, *, max_tries: int = 10, operation_ms: int | None = None, attempt_ms: int | None = None
) -> Tries:
    settings = StorageSettings(
        retries=StorageRetriesSettings(max_tries=max_tries, initial_backoff_ms=100, max_backoff_ms=400),
        timeouts=StorageTimeoutSettings(operation_timeout_ms=operation_ms, operation_attempt_timeout_ms=attempt_ms),
    )
    half = Sources(elapsed_us=lambda: clock.now_us, sleep=clock.sleep, random_bytes=lambda n: b"\x80" + bytes(n - 1))
    return Tries(limits_of(settings), half)


async def test_pauses_double_up_to_the_longest_and_tries_are_counted() -> None:
    clock = Clock()
    tries = tries_of(clock, max_tries=5)
    assert str(tries) == ""
    while await tries.again():
        pass
    assert clock.pauses == pytest.approx([0.05, 0.1, 0.2, 0.2])
    assert str(tries) == " (5 tries)"


async def test_a_service_that_never_answered_is_given_up_sooner() -> None:
    tries = tries_of(Clock())
    while await tries.again(contacted=False):
        pass
    assert tries.count == 4


def test_the_pause_that_the_service_asks_for_is_added_up_to_the_longest_pause() -> None:
    tries = tries_of(Clock())
    assert tries.pause_s(asked_s=0.3) == pytest.approx(0.35)
    assert tries.pause_s(asked_s=100) == pytest.approx(0.45)


async def test_the_time_of_an_operation_bounds_its_pauses_and_each_try() -> None:
    clock = Clock()
    tries = tries_of(clock, operation_ms=1000, attempt_ms=700)
    assert tries.limits.attempt_s == 0.7
    clock.now_us = 500_000
    assert tries.limits.attempt_s == 0.5
    assert await tries.again()
    clock.now_us = 930_000
    assert await tries.again() is False
    clock.now_us = 2_000_000
    assert tries.limits.attempt_s == 0.001
    assert await tries.again() is False


def test_without_settings_the_official_defaults_hold() -> None:
    assert limits_of(None) == Limits(
        max_tries=10,
        initial_backoff_s=0.1,
        max_backoff_s=180.0,
        connect_s=10.0,
        read_s=60.0,
        attempt_s=None,
        operation_s=None,
    )


class Told:
    """A sender that is told after some looks."""

    def __init__(self, after: int) -> None:
        self.looks = after

    @property
    def is_told(self) -> bool:
        self.looks -= 1
        return self.looks < 0


async def test_nothing_is_tried_again_once_the_sender_is_told() -> None:
    def tries(after: int) -> Tries:
        return Tries(replace(limits_of(None), sender=Told(after)), Sources(sleep=Clock().sleep))

    assert not await tries(0).again()
    assert not await tries(1).again(), "it was told during the pause"
    assert await tries(2).again()


def test_each_try_is_more_patient_and_the_last_one_waits_to_the_end() -> None:
    limits = limits_of(StorageSettings(retries=StorageRetriesSettings(max_tries=4, initial_backoff_ms=0)))
    tries = Tries(limits, Sources(sleep=lambda seconds: asyncio.sleep(0)))
    found = [tries.limits.patience]
    while asyncio.run(tries.again()):
        found.append(tries.limits.patience)
    assert found == [1.0, 2.0, 4.0, math.inf]
    alone = Tries(limits_of(StorageSettings(retries=StorageRetriesSettings(max_tries=1))), Sources())
    assert alone.limits.patience == math.inf
