"""An appender that is killed at any moment: what was committed is there once, and the next one goes on behind it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

import icechunk

PROGRAM = """
import asyncio, sys
import numpy as np
import icechunk

async def main():
    repo = await icechunk.Repository.open_async(icechunk.local_filesystem_storage(sys.argv[1]))
    async with repo.appender("main", dim="row", source="s", every=0.02, max_rows=7) as appender:
        begin = -1 if appender.position is None else appender.position
        print(begin, flush=True)
        for offset in range(begin + 1, 1_000_000):
            await appender.put({"v": np.array([offset])}, offset=offset)
            await asyncio.sleep(0.001)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_services_neither_lose_nor_double_a_row(tmp_path: Path) -> None:
    place = str(tmp_path / "repo")
    repo = icechunk.Repository.create(icechunk.local_filesystem_storage(place))
    with repo.transaction("main", message="array") as store:
        zarr.create_array(store, name="v", shape=(0,), chunks=(64,), dtype="i8", dimension_names=("row",))
    environment = {**os.environ, "PYTHONPATH": str(Path(icechunk.__file__).parents[1])}
    positions = []
    for n in range(4):
        service = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, place], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert service.stdout is not None
        positions.append(int(service.stdout.readline()))
        time.sleep(0.25 + 0.07 * n)  # the moment of the kill; nothing is asserted about how far it came
        service.send_signal(signal.SIGKILL)
        service.wait()
        service.stdout.close()
    found = np.asarray(zarr.open_array(repo.readonly_session("main").store, path="v", mode="r")[:])
    np.testing.assert_array_equal(found, np.arange(len(found)))
    assert positions == sorted(positions)
    assert len(found) > positions[-1]


def test_the_page_about_appending_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "appending.md").read_text(encoding="utf-8")
    for source in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(source, "docs/appending.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.startswith("99 ")
