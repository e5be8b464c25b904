"""Clusters of clients keep every promise under faults, in all layouts; see `tools.simulate`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from icechunk.log.repository.port import Layout
from icechunk.log.repository.queue import Attempt
from icechunk.log.repository.settle import SwappedLog
from icechunk.storage.port import ANY
from tools import simulate as command
from tools.simulator.cluster import Report
from tools.simulator.faults import CALM, ON_DISK, Fault, Mix
from tools.simulator.loop import StuckError, VirtualLoop
from tools.simulator.power_loss import Recorder
from tools.simulator.simulation import Plan, plan_of, simulate
from tools.simulator.storage import SimulatedStore

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]


def kept(first: int, count: int, layout: Layout) -> Counter[Fault]:
    injected: Counter[Fault] = Counter()
    for seed in range(first, first + count):
        report = simulate(seed, plan_of(seed, layout))
        assert not report.problems, f"{report.problems}; {command.replay_command(seed, layout)}"
        assert not report.undecided
        injected += report.injected
    return injected


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("first", range(0, 160, 40))
def test_every_promise_is_kept(first: int, layout: Layout) -> None:
    assert kept(first, 40, layout)


def test_every_kind_of_fault_is_met_within_some_hundred_schedules() -> None:
    injected: Counter[Fault] = Counter()
    for seed in range(1000, 1300):
        injected += simulate(seed).injected
        if ON_DISK.union(injected) == set(Fault):
            break
    assert ON_DISK.union(injected) == set(Fault)


@pytest.mark.parametrize("layout", Layout)
def test_garbage_is_collected_and_the_log_pruned_meanwhile(layout: Layout) -> None:
    collected = pruned = 0
    for seed in range(30):
        report = simulate(seed, Plan(layout=layout, collect=True, rounds=5))
        assert not report.problems, f"seed {seed}: {report.problems}"
        collected += report.collected
        pruned += report.pruned
    assert collected
    assert pruned or layout is not Layout.LOG


@pytest.mark.parametrize("collect", [False, True])
@pytest.mark.parametrize("layout", Layout)
def test_sessions_keep_their_promises_too(layout: Layout, collect: bool) -> None:
    read = 0
    for seed in range(12):
        report = simulate(seed, Plan(layout=layout, sessions=True, collect=collect))
        assert not report.problems, f"seed {seed}: {report.problems}"
        read += sum(operation.content is not None for operation in report.history)
    assert read


def test_clients_that_take_turns_wait_for_none_that_is_gone_or_knows_of_no_turns() -> None:
    injected: Counter[Fault] = Counter()
    for seed in range(20):
        report = simulate(seed, Plan(layout=Layout.LOG, crowd=True, writers=1 + seed % 6))
        assert not report.problems, f"seed {seed}: {report.problems}"
        assert not report.undecided
        injected += report.injected
    assert injected


@pytest.mark.parametrize("layout", Layout)
def test_a_seed_is_a_schedule(layout: Layout) -> None:
    plan = Plan(layout=layout, writers=3, rounds=4)
    first, second = simulate(7, plan), simulate(7, plan)
    assert first.trace.digest == second.trace.digest
    assert first.history == second.history
    assert simulate(8, plan).trace.digest != first.trace.digest


@pytest.mark.parametrize("layout", [Layout.LOG, Layout.REPO])
@pytest.mark.parametrize("convert", [False, True])
def test_clients_of_the_official_library_take_part(layout: Layout, convert: bool) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(40):
        report = simulate(seed, Plan(layout=layout, official=True, convert=convert))
        assert not report.problems, f"seed {seed}: {report.problems}"
        outcomes.update(op.outcome for op in report.history if op.client.startswith("o"))
    # In a log they only read, unless it was converted.
    assert bool(outcomes["ok"]) is (layout is Layout.REPO or convert)


@pytest.mark.parametrize("convert", [False, True])
def test_a_log_that_the_official_library_takes_over_is_sealed_and_followed(convert: bool) -> None:
    sealed = 0
    for seed in range(20):
        report = simulate(seed, Plan(layout=Layout.LOG, takeover=True, convert=convert))
        assert not report.problems, f"seed {seed}: {report.problems}"
        sealed += any(b'"takeover"' in one.data for one in report.trace.requests)
    assert sealed


def test_persisted_sessions_are_resumed_after_the_death_of_their_process_and_by_others() -> None:
    events: Counter[str] = Counter()
    for seed in range(30):
        report = simulate(seed, Plan(layout=Layout.LOG, sessions=True, rounds=3))
        assert not report.problems, f"seed {seed}: {report.problems}"
        events.update(one.key.rpartition(" ")[0] for one in report.trace.requests if one.verb == "note")
    assert events["has persisted its"]
    assert events["goes on with the session of"]


def test_a_schedule_does_not_depend_on_earlier_work_of_the_process() -> None:
    seeds = [3111, 3286, 3395, *range(3000, 3060)]  # the first ones depended on addresses of objects in sets
    first = {seed: simulate(seed).trace.digest for seed in seeds}
    moved = [object() for _ in range(1000)]
    assert {seed: simulate(seed).trace.digest for seed in reversed(seeds)} == first
    assert len(moved) == 1000


@pytest.mark.parametrize("layout", Layout)
def test_acknowledged_changes_outlive_power_failures_of_a_local_disk(layout: Layout) -> None:
    injected: Counter[Fault] = Counter()
    outcomes: Counter[str] = Counter()
    conversions = 0
    for seed in range(15):
        report = simulate(seed, Plan(layout=layout, disk=True))
        conversions += report.conversions
        assert not report.problems, f"seed {seed}: {report.problems}"
        injected += report.injected
        outcomes += report.outcomes
    assert Fault.POWER_TORN in injected
    assert ON_DISK.issuperset(injected)
    assert outcomes["ok"]
    assert outcomes["open"]
    assert bool(conversions) is (layout is not Layout.REFS)


def test_a_schedule_of_a_disk_is_the_same_again() -> None:
    for layout in Layout:
        plan = Plan(layout=layout, disk=True)
        first, second = simulate(109, plan), simulate(109, plan)
        assert first.trace.digest == second.trace.digest
        assert [op.outcome for op in first.history] == [op.outcome for op in second.history]


@pytest.mark.parametrize("layout", Layout)
def test_a_sync_that_is_left_out_is_noticed(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            real(descriptor)

    # private: the recorder stands for the system, of which a sync is asked
    monkeypatch.setattr(Recorder, "_fsync", lambda self, descriptor: fsync(descriptor))
    assert any(simulate(seed, Plan(layout=layout, disk=True)).problems for seed in range(40))


@pytest.mark.parametrize("layout", Layout)
def test_without_faults_everything_is_certain(layout: Layout) -> None:
    for seed in range(5):
        report = simulate(seed, Plan(layout=layout, calm=True, writers=3))
        assert not report.problems
        assert not report.unknown
        assert not report.counts
        assert report.outcomes["ok"]


def test_a_stale_listing_shows_an_object_that_was_replaced_since() -> None:
    loop = VirtualLoop()
    store = SimulatedStore(loop, CALM, random.Random(0))
    store.write("refs/branch.main/ref.json", b"1", ANY)
    loop.run_until_complete(asyncio.sleep(1))
    store.write("refs/branch.main/ref.json", b"2", ANY)
    store.write("refs/branch.b/ref.json", b"1", ANY)
    assert [one.key for one in store.listed("refs/", "", 0.5)] == ["refs/branch.main/ref.json"]
    loop.close()


def test_a_mix_has_some_kinds_only_and_draws_those_that_fit_the_request() -> None:
    rng = random.Random(1)
    mixes = [Mix.drawn(rng) for _ in range(200)]
    assert {fault for mix in mixes for fault in mix.kinds} == set(Fault) - ON_DISK
    assert all(len(mix.kinds) < len(Fault) - len(ON_DISK) for mix in mixes)
    only = Mix({Fault.PARTIAL: 1.0})
    assert only.draw("delete", rng) is Fault.PARTIAL
    assert only.draw("put", rng) is None
    assert CALM.draw("put", rng) is None


@pytest.mark.parametrize("options", [["--runs", "6", "--seed", "3"], ["--runs", "1", "--seed", "4", "--trace"]])
def test_the_command_prints_the_same_in_every_process(options: list[str]) -> None:
    run = [sys.executable, "-m", "tools.simulate", *options]
    seen = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        seen.add("\n".join(line for line in done.stdout.splitlines() if " a second" not in line))
    assert len(seen) == 1


async def _steps_for_ever() -> None:
    for _ in itertools.count():
        await asyncio.sleep(0)


async def _stays_for_ever() -> None:
    while True:
        pass


async def _catches_for_ever() -> None:
    while True:
        with contextlib.suppress(Exception):
            await _stays_for_ever()


async def _waits_for_ever() -> None:
    await asyncio.get_running_loop().create_future()


def _patience_s(work: object) -> float:
    # Steps are counted.
    return 60.0 if work is _steps_for_ever else 0.2


_ENDLESS = [_steps_for_ever, _stays_for_ever, _catches_for_ever, _waits_for_ever]


@pytest.mark.parametrize("work", _ENDLESS)
def test_a_loop_that_would_not_end_raises(work: Callable[[], Coroutine[None, None, None]]) -> None:
    loop = VirtualLoop()
    loop.patience_s = _patience_s(work)
    task = loop.create_task(work())
    try:
        with pytest.raises(StuckError):
            loop.run_until_complete(task)
        # It can be used again: what is left is ended on it.
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
    finally:
        loop.take_apart()
        loop.close()


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("work", _ENDLESS)
def test_a_schedule_that_does_not_end_is_reported_with_its_seed_command_and_trace(
    work: Callable[[], Coroutine[None, None, None]],
    disk: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def append(log: SwappedLog[Attempt], *args: object, **options: object) -> None:
        await work()

    monkeypatch.setattr(SwappedLog, "append", append)
    monkeypatch.setattr(VirtualLoop, "patience_s", _patience_s(work))
    monkeypatch.setattr(command, "plan_of", lambda seed, layout: Plan(layout=Layout.LOG, disk=disk, calm=seed == 8))
    totals = command.run(seed=7, runs=2, seconds=60, workers=1)
    assert [report.seed for report in totals.broken] == [7, 8]
    printed = capsys.readouterr().out
    for report in totals.broken:
        assert any(StuckError.__name__ in problem for problem in report.problems)
        assert command.replay_command(report.seed, None) in printed
        assert report.last_lines or disk
        assert set(report.last_lines) <= {line.removeprefix("    ") for line in printed.splitlines()}


def test_a_fault_of_the_simulator_itself_names_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int, plan: Plan) -> Report:
        raise ZeroDivisionError

    monkeypatch.setattr(command, "simulate", fail)
    assert [report.seed for report in command.run_seeds(range(4, 6), None).broken] == [4, 5]


def test_sums_of_several_batches_are_those_of_all_seeds() -> None:
    parts = [command.run_seeds(range(first, first + 4), None) for first in (40, 44)]
    both = command.Totals()
    for part in parts:
        both.include(part)
    assert both == command.run_seeds(range(40, 48), None)


def test_the_command_counts_schedules_with_faults_only() -> None:
    totals = command.run(seed=50, runs=20, seconds=60, workers=1)
    assert totals.schedules + totals.calm == 20
    assert totals.schedules
    assert not totals.broken
    assert any("a second" in line for line in totals.lines())
