"""The official library reads all changes of a commit whose transaction log is in several objects."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.format.transaction import in_parts
from icechunk.session import commit as commit_files
from tests.official import need_official
from tools import oracle
from tools.interop.parts import known

pytestmark = [pytest.mark.oracle, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _official() -> None:
    need_official()


def write(session: icechunk.Session, path: str, chunks: range) -> None:
    count = len(chunks)
    session.store.set_virtual_refs_arr(
        path,
        (count,),
        ["s3://bucket/x"] * count,
        np.arange(count, dtype=np.uint64),
        np.full(count, 7, np.uint64),
        arr_offset=(chunks.start,),
        validate_containers=False,
    )


def array(session: icechunk.Session, path: str) -> None:
    zarr.create_array(session.store, name=path, shape=(20,), chunks=(1,), dtype="u1", fill_value=0)


def test_parts_of_a_transaction_log_are_read_kept_and_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_files, "in_parts", partial(in_parts, max_chunks=3))
    path = tmp_path / "ours"
    repo = icechunk.Repository.create(icechunk.local_filesystem_storage(str(path)), spec_version=2)
    session = repo.writable_session("main")
    array(session, "a")
    base = session.commit("the array")
    session = repo.writable_session("main")
    array(session, "n")
    write(session, "a", range(8))
    write(session, "n", range(5))
    session.commit("in five parts")
    session = repo.writable_session("main")
    write(session, "a", range(12, 14))
    session.commit("small")
    session = repo.writable_session("main")
    write(session, "a", range(15, 19))
    tip = session.amend("amended, in two parts")
    assert len(list((path / "transactions").iterdir())) == 3 + 4 + 1 + 2

    shutil.copytree(path, tmp_path / "theirs")
    ours = json.loads(json.dumps(known(str(path), base, tip)))
    theirs = oracle.run(oracle.OFFICIAL_CURRENT, "tools.interop.parts", str(tmp_path / "theirs"), base, tip)
    written = [*range(8), 12, 13, *range(15, 19)]
    assert ours["conflicts"] == theirs["conflicts"] == ours["conflicts after a collection"] == written
    assert ours["diff"]["new"] == ["/n"]
    assert ours["diff"]["chunks"] == {"/a": [[c] for c in written], "/n": [[c] for c in range(5)]}
    assert ours["diff after an expiration"]["chunks"] == ours["diff"]["chunks"]
    assert {**ours, "collected": 0} == {**theirs, "collected": 0}
