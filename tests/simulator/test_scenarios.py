"""Scenarios of their own: clients of other versions on one log, and leases of sessions while garbage is collected."""

from __future__ import annotations

from collections import Counter

import pytest

from icechunk.log.repository.event_json import Fields
from icechunk.log.repository.port import Layout
from icechunk.maintenance import leases
from tools.simulator.simulation import Plan, simulate

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("collect", [False, True])
@pytest.mark.parametrize("convert", [False, True])
def test_an_earlier_version_commits_and_writes_checkpoints_beside_this_one(collect: bool, convert: bool) -> None:
    outcomes: Counter[str] = Counter()
    checkpoints = 0
    for seed in range(15):
        report = simulate(seed, Plan(layout=Layout.LOG, older=True, collect=collect, convert=convert))
        assert not report.problems, f"seed {seed}: {report.problems}"
        outcomes.update(op.outcome for op in report.history if op.client.startswith("e"))
        checkpoints += sum("without newer fields" in one.key for one in report.trace.requests)
    assert outcomes["ok"]
    assert checkpoints


@pytest.mark.parametrize("older", [False, True])
def test_what_a_later_version_has_written_is_refused_and_nothing_follows_it(older: bool) -> None:
    refused = 0
    for seed in range(20):
        report = simulate(seed, Plan(layout=Layout.LOG, newer=True, older=older))
        assert not report.problems, f"seed {seed}: {report.problems}"
        refused += sum("newer version" in op.note for op in report.history if op.outcome == "failed")
    assert refused


def test_a_client_that_passes_over_unknown_fields_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fields, "finish", lambda self: None)
    assert any(simulate(seed, Plan(layout=Layout.LOG, newer=True)).problems for seed in range(20))


@pytest.mark.parametrize("layout", Layout)
def test_a_session_is_committed_with_its_chunks_before_its_lease_is_over(layout: Layout) -> None:
    resumed = ended = 0
    for seed in range(10):
        report = simulate(seed, Plan(layout=layout, leases=True))
        assert not report.problems, f"seed {seed}: {report.problems}"
        resumed += sum("goes on with a leased" in one.key for one in report.trace.requests)
        ended += sum(b'"kind":"expired"' in one.data for one in report.trace.requests)
    assert resumed
    assert ended


@pytest.mark.parametrize("layout", Layout)
def test_a_lease_that_is_ended_early_is_noticed(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    # private: the fault is made there
    monkeypatch.setattr(leases, "_is_over", lambda *_: True)
    assert any(simulate(seed, Plan(layout=layout, leases=True)).problems for seed in range(20))
