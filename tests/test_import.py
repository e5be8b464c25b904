"""Importing the package loads none of the libraries that only some storages need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HEAVY = {
    "aiobotocore",
    "aiohttp",
    "botocore",
    "dask",
    "moto",
    "obstore",
    "pytest",
    "urllib3",
    "xarray",
    "yarl",
    "icechunk.cli",
    "icechunk.storage.http.storage",
    "icechunk.storage.obstore",
    "icechunk.storage.s3",
    "icechunk.testing",
}


def loaded_by(script: str) -> set[str]:
    """Names of the modules that a fresh process has loaded at the end of a script."""
    script += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(done.stdout))


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import icechunk") & HEAVY


def test_a_local_repository_needs_nothing_heavy(tmp_path: Path) -> None:
    script = f"""
import icechunk, zarr
repo = icechunk.Repository.create(icechunk.local_filesystem_storage({str(tmp_path)!r}))
with repo.transaction("main", message="m") as store:
    zarr.create_array(store, name="a", shape=(2,), dtype="i1")[:] = 1
zarr.open_array(repo.readonly_session("main").store, path="a")[:]
"""
    assert not loaded_by(script) & HEAVY
