"""Importing the package loads none of the libraries that only some storages need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_importing_the_package_loads_neither_the_engine_nor_its_dependencies() -> None:
    loaded = loaded_by("import icechunk; icechunk.__version__")
    assert not loaded & {"difflib", "inspect", "numpy", "zarr", "icechunk.repository", "icechunk.storage"}


@pytest.mark.thorough
def test_opening_a_repository_loads_only_what_that_needs(tmp_path: Path) -> None:
    place = f"icechunk.local_filesystem_storage({str(tmp_path)!r})"
    loaded_by(f"import icechunk; icechunk.Repository.create({place})")
    loaded = loaded_by(f"import icechunk; icechunk.Repository.open({place}).readonly_session('main')")
    assert not loaded & {
        "anyio",
        "msgpack",
        "statistics",
        "tempfile",
        "urllib.request",
        "yaml",
        "zarr",
        "icechunk.appender",
        "icechunk.maintenance.reachability",
        "icechunk.store",
    }
    assert "zarr" in loaded_by("import icechunk; icechunk.IcechunkStore")


GENERATED = """
import dataclasses
generated = 0
standard = dataclasses.dataclass
def counted(*args, **options):
    global generated
    generated += 1
    return standard(*args, **options)
dataclasses.dataclass = counted
"""


def test_opening_a_repository_generates_the_methods_of_few_classes(tmp_path: Path) -> None:
    """The standard library's decorator is what makes them; a class of the package calls it when it is first used."""
    place = f"icechunk.local_filesystem_storage({str(tmp_path)!r})"
    opened = f"icechunk.Repository.open({place}).readonly_session('main')"
    loaded_by(
        f"import icechunk; icechunk.Repository.create({place}, spec_version=2)\n{GENERATED}"
        f"icechunk.ManifestConfig(); assert generated == 1, generated"
    )
    loaded_by(f"{GENERATED}import icechunk; icechunk.Repository; assert generated < 15, generated")
    loaded_by(f"{GENERATED}import icechunk; {opened}; assert generated < 60, generated")


@pytest.mark.thorough
def test_the_public_names_load_nothing_heavy() -> None:
    loaded = loaded_by("from icechunk import *; Repository")
    assert "icechunk.repository" in loaded
    assert not loaded & HEAVY


def test_names_and_modules_of_the_package_are_there_once_they_are_asked_for() -> None:
    script = """
import icechunk
assert "Repository" in dir(icechunk) and "__version__" in icechunk.__all__
assert icechunk.config.RepositoryConfig is icechunk.RepositoryConfig
assert not hasattr(icechunk, "nothing") and not hasattr(icechunk, "__nothing__")
"""
    assert "icechunk.config" in loaded_by(script)


def test_a_local_repository_needs_nothing_heavy(tmp_path: Path) -> None:
    script = f"""
import icechunk, zarr
repo = icechunk.Repository.create(icechunk.local_filesystem_storage({str(tmp_path)!r}))
with repo.transaction("main", message="m") as store:
    zarr.create_array(store, name="a", shape=(2,), dtype="i1")[:] = 1
zarr.open_array(repo.readonly_session("main").store, path="a")[:]
"""
    assert not loaded_by(script) & HEAVY
