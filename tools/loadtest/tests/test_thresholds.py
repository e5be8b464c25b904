"""Thresholds are read, refused with a reason, and compared with measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from icechunk_loadtest.errors import LoadTestError
from icechunk_loadtest.plan import Size
from icechunk_loadtest.results import summarize
from icechunk_loadtest.thresholds import judge, load_thresholds, parse_threshold
from tools.loadtest.tests.builders import measurement
from tools.loadtest.tests.raising import raises

MEASURED = summarize(
    [
        measurement("write_small", "ours", seconds=1.0),
        measurement("write_small", "official", seconds=4.0),
        measurement("write_small", "obstore", seconds=0.8),
        measurement("write_small", "ours", seconds=100.0, swept="tasks", size=Size(chunks=1, chunk_bytes=64)),
    ]
)


@pytest.mark.parametrize(
    ("text", "ok", "found"),
    [
        ("write_small>=4x", True, "4.00×"),
        ("write_small > 4x", False, "4.00×"),
        ("write_small >= 0.8x obstore", True, "0.80×"),
        ("write_small >= 90", True, "100"),
        ("write_small.p50 <= 30ms", True, None),
        ("write_small.p99 <= 1us", False, None),
        ("official:write_small.max<=2s", True, None),
        ("write_small.rss<=128MiB", True, "128 MiB"),
        ("write_small.requests<=99", False, "100"),
        ("write_small.errors<=0", True, "0"),
        ("write_small.cpu<=1x", True, "1.00×"),
        ("append>=1x", False, "append was not measured on ours"),
        ("write_small>=1x aiobotocore", False, "write_small was not measured on aiobotocore"),
    ],
)
def test_thresholds_hold_or_do_not(text: str, ok: bool, found: str | None) -> None:
    (verdict,) = judge([parse_threshold(text)], MEASURED)
    assert verdict.ok is ok
    assert found is None or verdict.found == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fast", "is no threshold"),
        ("write_smal>=2x", "no workload is called"),
        ("write_small.p42>=2x", "no metric is called"),
        ("mine:write_small>=2x", "no system is called"),
        ("write_small>=2x hdf5", "no system is called"),
        ("write_small.p50<=2ms obstore", "only a ratio"),
        ("write_small>=1.2.3", "is no number"),
        ("write_small>=2MiB", "takes a plain number"),
        ("write_small.p50<=2MiB", "is no unit of time"),
    ],
)
def test_text_that_is_no_threshold_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(LoadTestError, match=why):  # words: nothing else tells the nine apart
        parse_threshold(text)


def test_thresholds_come_from_yaml_and_json(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("require:\n  - write_small >= 2x\n  - append.p50 <= 1s\n")
    (tmp_path / "a.json").write_text('["write_small >= 2x"]')
    assert [each.workload for each in load_thresholds(tmp_path / "a.yaml")] == ["write_small", "append"]
    assert load_thresholds(tmp_path / "a.json")[0].number == 2


@pytest.mark.parametrize("body", ["{", "require: 3", "[]", "[1]", ""])
def test_files_without_thresholds_are_refused(tmp_path: Path, body: str) -> None:
    (tmp_path / "a.json").write_text(body)
    with pytest.raises(LoadTestError):
        load_thresholds(tmp_path / "a.json")
    with raises(LoadTestError, tmp_path / "b.yaml"):
        load_thresholds(tmp_path / "b.yaml")
