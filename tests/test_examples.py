"""The examples run, and do what they say."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import zarr
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


@pytest.mark.thorough
def test_notebook_shows_three_versions() -> None:
    pytest.importorskip("xarray")
    lines = run("notebook.py").splitlines()
    assert [line.split()[:2] for line in lines if " days, mean " in line] == [
        ["preliminary", "21"],
        ["main", "30"],
        ["correction", "30"],
    ]


@pytest.mark.thorough
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


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
@pytest.mark.timeout(180)
def test_a_service_of_several_workers_survives_that_each_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "climate"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--app-dir", str(EXAMPLES), "climate_service:app", "--workers", "2", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "CLIMATE": str(folder)}
    command = [sys.executable, "-m", "uvicorn", "--log-level", "warning", *arguments]
    service = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def get(path: str) -> Any:
        with (
            contextlib.suppress(OSError, ValueError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as found,
        ):
            return json.load(found)
        return {"values": []}

    def wait_for_days(count: int) -> list[Any]:
        for _ in range(600):
            days: list[Any] = get("/means")["values"]
            if len(days) >= count:
                return days
            time.sleep(0.1)
        raise AssertionError(f"{len(days)} days, not {count}")

    try:
        wait_for_days(2)
        children = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()
        workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(workers) == 2
        for worker in workers:
            before = len(wait_for_days(0))
            os.kill(int(worker), signal.SIGKILL)
            days = wait_for_days(before + 3)
        assert [day[0] for day in days[:before]] == [24 * day + 11.5 for day in range(before)]
        assert get("/").keys() == {"snapshot", "message", "worker"}
    finally:
        service.terminate()
        said, _ = service.communicate(timeout=60)
    assert "Traceback" not in said
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(str(folder)))
    array = zarr.open_array(repo.readonly_session("main").store, path="temperature", mode="r")
    hours = np.asarray(array[:, 0])
    np.testing.assert_array_equal(hours, np.arange(len(hours)))
