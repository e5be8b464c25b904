"""``python -m tools.kills``: processes that are killed lose nothing that was acknowledged, on disk and on MinIO."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import zarr

import icechunk
from tools.kills import JOBS, place, read_notes, run, verify

pytestmark = pytest.mark.thorough


def kept(kind: str) -> None:
    with place(kind) as spec:
        found = run(spec, 10, seed=1)
    assert found.kills == dict.fromkeys(JOBS, 2)
    assert not found.lost
    assert not found.unreadable
    assert found.steps["ingest"] + found.steps["commit"] + found.steps["persist"]
    assert found.read


def test_nothing_acknowledged_is_lost_on_local_disk() -> None:
    kept("local")


@pytest.mark.minio
def test_nothing_acknowledged_is_lost_on_minio() -> None:
    kept("minio")


class Box:
    def __init__(self) -> None:
        self.found: list[object] = []

    def send(self, found: object) -> None:
        self.found.append(found)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    """The checker finds chunks that were not written, and an attribute that is older."""
    spec, notes = str(tmp_path / "repository"), tmp_path / "notes"
    notes.mkdir()
    repo = icechunk.Repository.create(icechunk.local_filesystem_storage(spec))
    with repo.transaction("main", message="arrays") as store:
        array = zarr.create_array(store, name="ingest-0", shape=(8,), chunks=(1,), dtype="i4", fill_value=-1)
        array[0:2] = [0, 1]
        zarr.create_group(store, path="group-1", attributes={"n": 3})
    (notes / "a").write_text("ingest 0 0\ningest 0 2\ncommit 1 4\ncommit 1 ", encoding="utf-8")
    assert read_notes(str(notes)) == [["ingest", "0", "0"], ["ingest", "0", "2"], ["commit", "1", "4"]]
    box = Box()
    verify(spec, str(notes), box)  # type: ignore[arg-type]
    assert box.found[0].lost == [  # type: ignore[attr-defined]
        "group-1: 4 was acknowledged, 3 is there",
        "ingest-0[2] is -1",
        "ingest-0[3] is -1",
    ]
    asyncio.run(repo.aclose())
