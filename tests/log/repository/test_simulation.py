"""A cluster under lost, late and doubled requests, crashes and pauses keeps every promise; see `tools.simulate`."""

from __future__ import annotations

import logging
import random

import orjson
import pytest

from icechunk.log.repository import settle, state
from icechunk.log.repository.entries import client, embedded, layout, reader
from icechunk.log.repository.port import RepositoryLog
from icechunk.maintenance import collect, prune
from tools.simulator.simulation import simulate


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    # Failing checkpoints are what the simulator is made of.
    caplog.set_level(logging.CRITICAL)


@pytest.mark.parametrize("seeds", [range(i, i + 5) for i in range(0, 20, 5)], ids=str)
def test_every_acknowledged_commit_is_in_history_exactly_once_and_no_failed_one(seeds: range) -> None:
    for seed in seeds:
        report = simulate(seed)
        assert not report.problems, f"seed {seed}: {report.problems}"
        assert report.acknowledged


@pytest.mark.parametrize("seeds", [range(i, i + 5) for i in range(1000, 1010, 5)], ids=str)
def test_the_same_holds_while_the_repository_is_converted_there_and_back(seeds: range) -> None:
    for seed in seeds:
        report = simulate(seed, convert=True)
        assert not report.problems, f"seed {seed}: {report.problems}"


@pytest.mark.parametrize("seeds", [range(i, i + 4) for i in range(2000, 2012, 4)], ids=str)
def test_no_file_that_history_needs_is_lost_while_garbage_is_collected(seeds: range) -> None:
    collected = pruned = 0
    for seed in seeds:
        report = simulate(seed, collect=True, convert=seed % 4 == 3)
        assert not report.problems, f"seed {seed}: {report.problems}"
        collected += report.collected
        pruned += report.pruned
    assert collected
    assert pruned


def test_a_seed_is_a_schedule() -> None:
    first, second = simulate(7), simulate(7)
    assert first == second
    assert first.unknown + first.crashes + first.pruned > 0


def test_without_faults_nothing_is_unknown_but_what_ran_into_its_deadline() -> None:
    report = simulate(3, calm=True)
    assert not report.problems
    assert report.acknowledged


def _problems(count: int, *, collect: bool = False) -> list[str]:
    found: list[str] = []
    for seed in range(count):
        found += simulate(seed, collect=collect).problems
        if found:
            break
    return found


def test_the_simulator_notices_when_old_answers_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layout, client, reader):
        monkeypatch.setattr(module, "still_proves", lambda proof, answer: True)
    assert _problems(20)


async def _no_stand(self: object, after: int, end: int) -> None:
    return None


async def _no_file(self: object, key: str) -> None:
    return None


def test_the_simulator_notices_when_a_checkpoint_passes_files_that_do_not_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client.LogView, "stand", _no_stand)
    assert _problems(5)


def test_the_simulator_notices_when_files_are_looked_for_in_objects_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.CarriedFiles, "put_soon", lambda self, n: None)
    assert not _problems(3)
    monkeypatch.setattr(client.LogView, "find_file", _no_file)
    assert _problems(10)


def test_the_simulator_notices_when_anybodys_entry_is_taken_for_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout.LogLayout, "_fate_by", lambda self, attempt, nonce: settle.Fate.LANDED)
    assert _problems(5)


def test_the_simulator_notices_when_an_entry_is_rebuilt_while_its_first_bytes_may_still_arrive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look, rng = layout.LogLayout._look, random.Random(0)

    async def rebuild(self: layout.LogLayout, attempt: layout.SlotAttempt) -> settle.Fate:
        fate = await look(self, attempt)
        if fate is settle.Fate.OPEN:
            attempt.nonce = rng.randbytes(16)
            attempt.data = orjson.dumps(orjson.loads(attempt.data) | {"nonce": attempt.nonce.hex()})
        return fate

    monkeypatch.setattr(layout.LogLayout, "_look", rebuild)
    assert _problems(20)


def test_the_simulator_notices_when_commits_with_old_files_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    require = state._require_new_snapshot
    monkeypatch.setattr(state, "_require_new_snapshot", lambda now, snapshot, since_us: require(now, snapshot, 1 << 62))
    assert _problems(10, collect=True)


def test_the_simulator_notices_when_a_collection_is_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unannounced(log: RepositoryLog, *_: object, dry_run: bool) -> state.RepoState:
        return log.state

    monkeypatch.setattr(collect, "_collected", unannounced)
    assert _problems(10, collect=True)


def test_the_simulator_notices_when_slots_are_deleted_as_soon_as_they_are_announced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prune, "PRUNE_WAIT_US", 0)
    assert _problems(20)
