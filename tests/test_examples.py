"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from aiohttp.test_utils import TestClient, TestServer

import icechunk

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_notebook_shows_three_versions() -> None:
    pytest.importorskip("xarray")
    lines = run("notebook.py").splitlines()
    assert [line.split()[:2] for line in lines if " days, mean " in line] == [
        ["preliminary", "21"],
        ["main", "30"],
        ["correction", "30"],
    ]


async def test_ingest_goes_on_where_it_stopped_and_slices_of_it_are_served(tmp_path: Path) -> None:
    folder = str(tmp_path / "measurements")
    first = run("ingest_service.py", folder, "--seconds", "3", "--every", "0.4").split()
    assert first[:3] == ["committed", "rows", "0"]
    rows = int(first[4]) + 1
    second = run("ingest_service.py", folder, "--seconds", "2", "--every", "0.4").split()
    assert second[:3] == ["committed", "rows", str(rows)]

    async with TestClient(TestServer(await load("slice_server").application(folder))) as client:
        answer = await (await client.get("/values", params={"start": rows - 1, "stop": rows + 1})).json()
        assert [row[0] for row in answer["values"]] == [rows - 1, rows]
        repo = await icechunk.Repository.open_async(icechunk.local_filesystem_storage(folder))
        assert answer["snapshot"] == await repo.lookup_branch_async("main")
        *_, oldest, _root = [info async for info in repo.async_ancestry(branch="main")]
        old = await (await client.get("/values", params={"snapshot": oldest.id})).json()
        assert len(old["values"]) == oldest.metadata["aioicechunk_append"]["sources"]["stations"]["rows"]
        assert (await client.get("/nothing")).status == 404
        assert (await client.get("/values", params={"tag": "nope"})).status == 404
        assert (await client.get("/values", params={"start": "x"})).status == 400
