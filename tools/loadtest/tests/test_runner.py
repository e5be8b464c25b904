"""A worker that cannot work is an error in the results, not the end of the load test."""

from __future__ import annotations

import io
import shutil
import sys

import pytest

from icechunk_loadtest.place import memory_or_local
from icechunk_loadtest.plan import Case, Point, Size
from icechunk_loadtest.progress import Progress
from icechunk_loadtest.runner import Runner


def case(system: str = "ours", **size: int) -> Case:
    return Case(
        point=Point(workload="append", size=Size(**{"chunks": 2, "chunk_bytes": 64, "ops": 1, **size})),
        system=system,
        repeat=0,
    )


@pytest.mark.parametrize("reuse", [False, True])
async def test_a_worker_that_does_not_start_is_an_error(reuse: bool) -> None:
    false = shutil.which("false")
    assert false is not None
    with memory_or_local("memory") as place:
        async with Runner(place, {"ours": false}, Progress(1, io.StringIO()), reuse=reuse) as runner:
            found = await runner.measure(case())
    assert not found.ok
    assert "the worker of ours has ended" in found.messages[0]


async def test_a_worker_that_refuses_is_replaced_and_the_next_case_runs() -> None:
    said = io.StringIO()
    progress = Progress(2, said)
    with memory_or_local("memory") as place:
        pythons = {"ours": sys.executable, "aiobotocore": sys.executable}
        async with Runner(place, pythons, progress, reuse=True) as runner:
            refused = await runner.measure(case("aiobotocore"))
            refused_again = await runner.measure(case("aiobotocore"))
            sound = await runner.measure(case())
            for each in (refused, sound):
                progress.finished(each)
    assert refused.messages == refused_again.messages == ("ValueError: aiobotocore is measured on S3 only",)
    assert sound.ok
    assert "1 errors" in said.getvalue()
