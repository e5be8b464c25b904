"""The file system of one version, without its entry point."""

from __future__ import annotations

from pathlib import Path

import zarr

import icechunk
from icechunk.adapters.fsspec_files import IcechunkFileSystem


def test_the_newest_version_is_read_once_the_cache_is_invalidated(tmp_path: Path) -> None:
    place = str(tmp_path / "repo")
    repo = icechunk.Repository.create(place)
    for name in ("first", "second"):
        with repo.transaction("main", message=name) as store:
            zarr.create_group(store, path=name)
        fs = IcechunkFileSystem(place)
        assert fs.exists("first/zarr.json")
    assert not fs.exists("second/zarr.json")
    fs.invalidate_cache()
    assert fs.exists("second/zarr.json")
