"""Virtual references both ways: the official library reads ours, and we read theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import icechunk
from icechunk.format.ids import object_id_from_text
from icechunk.runtime.twins import run_sync
from icechunk.session import Session
from icechunk.session.content import SessionContent
from icechunk.session.core import Core
from tests.official import need_official
from tests.virtual_builders import FILE_BYTES
from tools import oracle
from tools.interop.virtual import MANY, access, config, read, write

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _official() -> None:
    need_official()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "data"
    place.mkdir()
    (place / "f").write_bytes(FILE_BYTES)
    one = place / "copies/of/one/file"
    one.mkdir(parents=True)
    for i in range(MANY):
        (one / f"{i:05d}").symlink_to(place)
    return place


def check(found: dict[str, Any]) -> None:
    """Written references are there, and unreadable ones raise an error of the right kind."""
    chunks = FILE_BYTES[:10], bytes(10), FILE_BYTES[40:50], bytes(10)
    for name in ("plain", "encoded", "named", "dots", "recent"):
        assert found[name]["values"] == b"".join(chunks).hex(), name
    for name in ("changed", "etag"):
        assert found[name]["values"] == "StorageError virtual-chunk-modified"
    for name in ("missing", "short"):
        assert found[name]["values"] == "StorageError virtual-chunk-fetch"
    assert found["foreign"]["values"] == "InvalidInputError no-container-for-virtual-chunk"
    mixed = b"\x09" * 10 + FILE_BYTES[30:40] + bytes(10) + FILE_BYTES[40:50]
    assert found["mixed"]["values"] == mixed.hex()
    assert found["many"]["values"] == b"".join(FILE_BYTES[i % 900 : i % 900 + 10] for i in range(MANY)).hex()


def test_official_library_reads_our_virtual_references_as_we_do(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "repo"
    storage = icechunk.local_filesystem_storage(str(path))
    repository = icechunk.Repository.create(storage, config(folder), access(folder))
    write(repository, folder)
    repository.checkpoint()
    ours = read(repository.readonly_session("main"))
    official = oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.virtual", "read", str(path), str(folder))
    check(ours)
    assert official == ours


def test_we_read_the_virtual_references_of_the_official_library_as_it_does(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "repo"
    arguments = (str(path), str(folder))
    snapshot = oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.virtual", "write", *arguments)
    official = oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.virtual", "read", *arguments)
    # Below the repository's log: the files of a snapshot are the same in every layout.
    core = Core(icechunk.local_filesystem_storage(str(path)), config(folder), virtual_access=access(folder))
    ours = read(Session(SessionContent.on(core, run_sync(core.assets.snapshot(object_id_from_text(snapshot))))))
    check(ours)
    assert ours == official
