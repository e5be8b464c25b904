"""Cells that a Jupyter kernel runs: it has a running loop, in which cells may await and may also call synchronously."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xarray")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent

AWAITED = [
    "import icechunk, zarr, asyncio\nstorage = icechunk.in_memory_storage()",
    # Synchronously, although the kernel's loop runs; then the same repository in that loop.
    "repo = icechunk.Repository.create(storage)\nasyncio.get_running_loop().is_running()",
    "session = await repo.writable_session_async('main')\n"
    "made = {'name': 'a', 'shape': (4,), 'chunks': (2,), 'dtype': 'i4'}\n"
    "array = await zarr.api.asynchronous.create_array(store=session.store, **made)\n"
    "await array.setitem(slice(None), 7)\n"
    "snapshot = await session.commit_async('awaited')",
    "zarr.open_array(repo.readonly_session('main').store, path='a', mode='r')[:].tolist()",
    "async with repo.appender('main', dim='row', source='cells', group='g') as appender:\n"
    "    import xarray as xr\n"
    "    await appender.put(xr.Dataset({'v': ('row', [1, 2, 3])}), offset=1, durable=True)\n"
    "appender.position",
    "[info.message for info in repo.ancestry(branch='main')]",
    "reopened = icechunk.Repository.open(storage)\n"
    "tips = await asyncio.gather(*(reopened.lookup_branch_async('main') for _ in range(3)))\n"
    "tips == [repo.lookup_branch('main')] * 3",
]


def executed(cells: list[str]) -> list[Any]:
    """The outputs of each cell, by a real kernel of this Python."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    return [cell.outputs for cell in notebook.cells]


def values(outputs: list[Any]) -> list[str]:
    return [output.data["text/plain"] for output in outputs if output.output_type == "execute_result"]


@pytest.fixture(autouse=True)
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of this Python, installed for this test only."""
    from ipykernel.kernelspec import install

    install(prefix=str(tmp_path))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.skipif(sys.platform == "win32", reason="zmq needs another event loop there")
def test_cells_call_synchronously_and_await_in_one_kernel() -> None:
    found = executed(AWAITED)
    assert [values(outputs) for outputs in found] == [
        [],
        ["True"],
        [],
        ["[7, 7, 7, 7]"],
        ["1"],
        ["['append', 'awaited', 'Repository initialized']"],
        ["True"],
    ]


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform == "win32", reason="zmq needs another event loop there")
def test_the_notebook_of_the_examples_runs_cell_by_cell() -> None:
    source = (ROOT / "examples" / "notebook.py").read_text(encoding="utf-8")
    cells = [cell.partition("\n")[2] for cell in re.split(r"^# %%", source, flags=re.MULTILINE)[1:]]
    outputs = [output.text for one in executed(cells) for output in one if output.output_type == "stream"]
    lines = "".join(outputs).splitlines()
    assert [line.split()[:2] for line in lines if " days, mean " in line] == [
        ["preliminary", "21"],
        ["main", "30"],
        ["correction", "30"],
    ]
