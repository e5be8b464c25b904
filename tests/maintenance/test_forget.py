"""Deleted data is in no object any more, whatever the history: a few of the histories of `tools.forget`."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.forget import LAYOUTS, run


@pytest.mark.parametrize("version", LAYOUTS, ids=["log", "repo", "refs"])
@given(st.integers(0, 2**32))
@settings(max_examples=12)
def test_no_object_holds_deleted_bytes_and_all_remaining_data_reads_back(version: int | None, seed: int) -> None:
    assert run(seed, version).problems == []


@pytest.mark.thorough
def test_the_generated_histories_have_data_to_delete_and_to_rewrite() -> None:
    outcomes = [run(seed, version) for seed in range(8) for version in LAYOUTS]
    assert sum(outcome.secrets - outcome.living for outcome in outcomes) > 100
    assert any(outcome.rewritten for outcome in outcomes)
