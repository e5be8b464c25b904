"""The official library opens what we wrote: it reads all of it as we do, and is refused every change."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import zarr

import icechunk
from icechunk.cli import main
from tests.official import need_official
from tools import oracle
from tools.interop.dump import dump
from tools.interop.generate import generate, publish

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _official() -> None:
    need_official()


def official_dump(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.dump", str(path), timeout_s=300)
    return result


def our_dump(path: Path) -> dict[str, Any]:
    return dump(icechunk.Repository.open(icechunk.local_filesystem_storage(str(path))))


def fingerprints(path: Path) -> dict[str, str]:
    """Every file of a repository, by its bytes."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def values(dumped: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The digests of all arrays, by snapshot and path."""
    return {
        snapshot: {path: node["values"] for path, node in found["nodes"].items() if "values" in node}
        for snapshot, found in dumped["snapshots"].items()
    }


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    generate(icechunk.local_filesystem_storage(str(tmp_path)))
    return tmp_path


@pytest.mark.parametrize("inline_threshold", [None, 0], ids=["default", "native-only"])
def test_official_reader_sees_every_version_of_the_generated_repository_as_we_do(
    tmp_path: Path, inline_threshold: int | None
) -> None:
    expected = generate(icechunk.local_filesystem_storage(str(tmp_path)), inline_threshold)
    ours, official = our_dump(tmp_path), official_dump(tmp_path)
    assert values(official) == expected
    assert official == ours


def test_official_reader_sees_every_version_of_the_demo_as_we_do(tmp_path: Path) -> None:
    pytest.importorskip("iris_sample_data", reason="the data of the demo extra")
    assert main(["demo", "--path", str(tmp_path)]) == 0
    official = official_dump(tmp_path)
    assert official == our_dump(tmp_path)
    assert set(official["tags"]) == {"v1", "v2"}
    assert set(official["branches"]) == {"main", "correction"}


def test_official_library_is_refused_every_mutation_and_leaves_every_byte_as_it_was(generated: Path) -> None:
    before = fingerprints(generated)
    outcomes = oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.dump", str(generated), "--mutate")
    assert len(outcomes) > 15
    assert [name for name, outcome in outcomes.items() if outcome == "accepted"] == []
    # refused for the reason that we gave, and not because something was not found
    other_reasons = {name for name, outcome in outcomes.items() if "read-only" not in outcome.lower()}
    assert other_reasons == {"create"}
    assert fingerprints(generated) == before


def test_we_go_on_committing_after_the_official_library_was_refused(generated: Path) -> None:
    oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.dump", str(generated), "--mutate")
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(str(generated)))
    session = repo.writable_session("main")
    zarr.create_array(store=session.store, name="later", shape=(2,), dtype="i4")[...] = 1
    snapshot = session.commit("later")
    publish(repo)
    official = official_dump(generated)
    assert official["branches"]["main"] == snapshot
    assert official == our_dump(generated)
