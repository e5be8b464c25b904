"""The report is one well-formed page with all measurements, and results survive their file."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from icechunk.storage.retry import note_repeats
from icechunk_loadtest.errors import LoadTestError
from icechunk_loadtest.plan import WORKLOADS, Size
from icechunk_loadtest.report.html import render
from icechunk_loadtest.report.svg import log_ticks, nice_ticks
from icechunk_loadtest.report.text import overview
from icechunk_loadtest.results import Results
from icechunk_loadtest.worker.meter import Meter
from tools.loadtest.tests.builders import measurement, results
from tools.loadtest.tests.raising import raises


def everything() -> Results:
    runs = [
        measurement(name, system, seconds=2.0 if system == "official" else 1.0)
        for name in WORKLOADS
        for system in ("ours", "official")
    ]
    runs += [
        measurement(
            "read_random", system, swept=parameter, size=Size(**{"chunks": 10, "chunk_bytes": 1024, parameter: value})
        )
        for parameter, values in (("tasks", (1, 4)), ("chunk_bytes", (1024, 4096)), ("latency_ms", (0, 20)))
        for value in values
        for system in ("ours", "obstore")
    ]
    return results(*runs)


def test_all_plots_are_well_formed_and_nothing_is_fetched_or_run() -> None:
    page = render(everything())
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) > 2 * len(WORKLOADS)
    for drawing in drawings:
        ET.fromstring(drawing)
        assert "nan" not in drawing
        assert "inf" not in drawing
    assert not re.search(r"<script|<link|src=|url\(|@import|https?://", page)


def test_the_page_names_systems_ratios_and_notes() -> None:
    page = render(everything())
    assert "2.00×" in page
    assert "zarr-fsspec was left out" in page
    assert "prefers-color-scheme:dark" in page
    for workload in WORKLOADS.values():
        assert workload.title in page


def test_failures_are_shown_and_texts_are_escaped() -> None:
    found = results(measurement(errors=1, problems=("chunk <3> & more",)), measurement(system="official"))
    page = render(replace(found, verdicts=({"text": "read_random>=2x", "found": "1.00×", "ok": False},)))
    assert "chunk &lt;3&gt; &amp; more" in page
    assert "&lt;gone &amp; lost&gt;" in page
    assert "1 of 2 measurements failed" in page
    assert "1 of 1 thresholds missed" in page
    assert "2 × &lt;fast&gt;" in page


@pytest.mark.parametrize("samples", [0, 1])
def test_runs_that_did_next_to_nothing_are_reported_all_the_same(samples: int) -> None:
    found = results(measurement(samples=samples, seconds=0.0), measurement("soak", samples=samples, seconds=0.0))
    assert "Random reads" in render(found)
    assert "Random reads" in overview(found)
    assert "<h1>" in render(results())


def test_the_text_tells_ratios_and_verdicts() -> None:
    text = overview(replace(everything(), verdicts=({"text": "soak>=9x", "found": "2.00×", "ok": False},)))
    assert "MISSED  soak>=9x  (found: 2.00×)" in text
    assert "2.00×" in text


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    found = everything()
    found.save(tmp_path / "r.json")
    again = Results.load(tmp_path / "r.json")
    assert render(again) == render(found)
    assert [each.throughput for each in again.measurements] == [each.throughput for each in found.measurements]


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"version": 99}', '{"version": 1, "measurements": [{}]}'])
def test_files_that_are_no_results_are_refused(tmp_path: Path, body: str) -> None:
    (tmp_path / "r.json").write_text(body)
    with raises(LoadTestError, tmp_path / "r.json"):
        Results.load(tmp_path / "r.json")


def test_ticks_are_round_and_cover_the_data() -> None:
    assert nice_ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(0, 0.7)[-1] >= 0.7
    assert log_ticks(0.0009, 0.11) == pytest.approx([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1])
    assert log_ticks(1, 1e6) == pytest.approx([1, 10, 100, 1e3, 1e4, 1e5, 1e6])


def test_repeated_requests_are_shown() -> None:
    run = replace(measurement("read_random", "ours", seconds=1.0), hedged=41, abandoned=7)
    page = render(results(run))
    assert "<th>sent twice</th><th>given up</th>" in page
    assert "<td>41</td><td>7</td>" in page
    assert "41 reads were sent a second time, 7 requests" in overview(results(run))
    assert "sent twice" not in render(results(replace(run, hedged=0, abandoned=0)))


def test_a_meter_counts_the_repeated_requests_of_its_run() -> None:
    note_repeats(hedged=3)
    meter = Meter()
    with meter.measuring():
        note_repeats(hedged=2, abandoned=1)
    assert (meter.result()["hedged"], meter.result()["abandoned"]) == (2, 1)
