"""VirtualiZarr, unchanged, writes into this package and reads from it what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import oracle

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(300)]

NEEDS = "import virtualizarr, h5py, h5netcdf, scipy, obstore, iris_sample_data, anyio, immutables, zstandard, orjson"


def interpreter() -> str | None:
    """A python with VirtualiZarr and our dependencies: that of ICECHUNK_VIRTUALIZARR, or this one."""
    for python in filter(None, (os.environ.get("ICECHUNK_VIRTUALIZARR"), sys.executable)):
        if subprocess.run([python, "-c", NEEDS], capture_output=True, check=False).returncode == 0:
            return python
    return None


def test_files_of_every_kind_are_virtualised_written_and_read_back_equal(tmp_path: Path) -> None:
    python = interpreter()
    if python is None:
        if os.environ.get("ICECHUNK_REQUIRE_ORACLE") == "1":
            pytest.fail("ICECHUNK_VIRTUALIZARR names no python with VirtualiZarr")
        pytest.skip("ICECHUNK_VIRTUALIZARR names no python with VirtualiZarr")
    done = subprocess.run(
        [python, "-m", "tools.interop.virtualizarr_trip", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=oracle.PROJECT,
        env={**os.environ, "PYTHONPATH": str(oracle.PROJECT)},
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert len(outcomes) == 20
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.startswith("equal: ")} == {}
    assert "equal: 0 variables" not in outcomes.values()
