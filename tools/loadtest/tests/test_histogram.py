"""Percentiles from buckets are close to those of the samples, and histograms add up."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icechunk_loadtest.worker.histogram import GROWTH, Histogram

DURATIONS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=60)


def of(samples: list[float]) -> Histogram:
    made = Histogram()
    for sample in samples:
        made.record(sample)
    return made


@settings(max_examples=60, deadline=None)
@given(DURATIONS, st.floats(0, 100))
def test_percentiles_are_within_one_bucket_of_the_samples(samples: list[float], percent: float) -> None:
    wanted = np.percentile(samples, percent, method="inverted_cdf")
    assert of(samples).percentile(percent) == pytest.approx(wanted, rel=GROWTH - 1)


@settings(max_examples=40, deadline=None)
@given(DURATIONS, DURATIONS)
def test_merging_is_the_same_as_recording_everything_in_one(first: list[float], second: list[float]) -> None:
    merged = Histogram.merged([of(first), of(second)])
    together = of(first + second)
    assert merged.counts == together.counts
    assert (merged.n, merged.min_s, merged.max_s) == (together.n, together.min_s, together.max_s)
    assert merged.mean_s == pytest.approx(together.mean_s)


@settings(max_examples=40, deadline=None)
@given(DURATIONS)
def test_a_histogram_comes_back_from_json(samples: list[float]) -> None:
    made = of(samples)
    assert Histogram.from_json(json.loads(json.dumps(made.to_json()))).to_json() == made.to_json()


@settings(max_examples=40, deadline=None)
@given(DURATIONS)
def test_the_distribution_ascends_to_one(samples: list[float]) -> None:
    points = of(samples).ecdf()
    assert points == sorted(points)
    assert points[-1][1] == 1.0


def test_ends_are_exact_and_nothing_has_no_percentile() -> None:
    made = of([0.1, 0.2, 0.3])
    assert (made.percentile(0), made.percentile(100)) == (0.1, 0.3)
    assert math.isnan(Histogram().percentile(50))
    assert math.isnan(Histogram().mean_s)
    assert Histogram.from_json(Histogram().to_json()).n == 0


def test_a_duration_of_zero_is_counted() -> None:
    assert of([0.0]).percentile(50) == 0.0
