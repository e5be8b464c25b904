"""The first page of a long folder; what a listing holds is in the contract of all storages."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from icechunk.storage.local import listing as local_listing
from icechunk.storage.local.listing import walk


def test_only_files_of_the_pages_that_are_asked_for_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(300):
        (tmp_path / "log" / f"{i:04}").parent.mkdir(exist_ok=True)
        (tmp_path / "log" / f"{i:04}").write_bytes(b"x")
    looked: list[str] = []
    real = local_listing.try_stat

    def look(path: str) -> object:
        looked.append(path)
        return real(path)

    monkeypatch.setattr(local_listing, "try_stat", look)
    keys = [info.key for info in itertools.islice(walk(str(tmp_path), "log/", None), 5)]
    assert keys == [f"log/{i:04}" for i in range(5)]
    assert len(looked) == 5


def test_names_that_are_no_keys_and_the_reserved_folder_are_left_out(tmp_path: Path) -> None:
    for name in ("b", "a-b", "a/b", "a/.aioicechunk", ".aioicechunk/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [info.key for info in walk(str(tmp_path), "", None)] == ["a-b", "a/.aioicechunk", "a/b", "b"]
    assert [info.key for info in walk(str(tmp_path), "a", "a-b")] == ["a/.aioicechunk", "a/b"]
