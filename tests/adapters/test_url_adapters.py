"""Other tools open repositories by URL: xarray's engine, fsspec, the accessor, and the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.core.buffer import default_buffer_prototype

import icechunk
from icechunk.cli import main
from icechunk.errors import ErrorKind, InvalidInputError, ReadOnlyError
from icechunk.xarray import to_icechunk

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def place(tmp_path: Path) -> str:
    """A local repository with a dataset on ``main`` and its first half under the tag ``v1``."""
    repo = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repo")))
    first = xr.Dataset({"sst": (("time", "x"), np.ones((2, 3)))}, coords={"time": [0, 1]})
    second = xr.Dataset({"sst": (("time", "x"), np.full((2, 3), 2.0))}, coords={"time": [2, 3]})
    with repo.transaction("main", message="first") as store:
        to_icechunk(first, store.session, group="ocean")
    repo.create_tag("v1", repo.lookup_branch("main"))
    with repo.transaction("main", message="second") as store:
        to_icechunk(second, store.session, group="ocean", append_dim="time")
    return str(tmp_path / "repo")


def test_xarray_opens_a_version_lazily(place: str) -> None:
    old = xr.open_dataset(f"{place}|icechunk:@tag.v1/ocean", engine="icechunk", chunks={})
    new = xr.open_dataset(f"file://{place}|icechunk:", engine="icechunk", group="ocean")
    assert old.sizes["time"] == 2
    assert old.sst.chunks is not None
    assert new.sizes["time"] == 4
    assert float(new.sst.sum()) == 18


def test_xarray_guesses_the_engine_from_the_pipeline(place: str) -> None:
    assert xr.open_dataset(f"{place}|icechunk:@branch.main/ocean|zarr3:").sizes["time"] == 4


def test_xarray_opens_a_tree(place: str) -> None:
    tree = xr.open_datatree(f"{place}|icechunk:@tag.v1", engine="icechunk")
    assert tree["ocean"].to_dataset().sizes["time"] == 2


def test_a_dataset_is_written_to_a_url_and_committed(tmp_path: Path) -> None:
    url = f"{tmp_path / 'new'}|icechunk:@branch.main"
    ds = xr.Dataset({"a": ("x", np.arange(4))})
    snapshot = ds.icechunk.to(url, message="load")
    assert xr.open_dataset(f"{tmp_path / 'new'}|icechunk:@{snapshot}", engine="icechunk").equals(ds)
    with pytest.raises(InvalidInputError):
        ds.icechunk.to(f"{tmp_path / 'new'}|icechunk:@tag.v1", message="load")


def test_fsspec_reads_the_keys_of_a_version(place: str) -> None:
    fs = fsspec.filesystem("icechunk", fo=f"{place}|icechunk:@tag.v1")
    assert fs.ls("", detail=False) == ["ocean", "zarr.json"]
    assert fs.isdir("ocean")
    assert fs.isfile("ocean/zarr.json")
    assert not fs.exists("ocean/nothing")
    session = icechunk.open(f"{place}|icechunk:@tag.v1")
    whole = fs.cat_file("ocean/zarr.json")
    found = zarr.core.sync.sync(session.store.get("ocean/zarr.json", default_buffer_prototype()))
    assert found is not None
    assert whole == found.to_bytes()
    assert fs.cat_file("ocean/zarr.json", 2, -3) == whole[2:-3]
    assert fs.cat_file("ocean/zarr.json", 5, 5) == b""
    with fs.open("ocean/zarr.json") as file:
        assert file.read() == whole
    with pytest.raises(FileNotFoundError):
        fs.cat_file("nothing")
    with pytest.raises(ReadOnlyError):
        fs.pipe_file("a", b"")
    with pytest.raises(ReadOnlyError):
        fs.open("a", "wb")


def test_fsspec_finds_and_copies_every_key(tmp_path: Path) -> None:
    repo = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repo")))
    with repo.transaction("main", message="arrays of 0 to 3 dimensions, and names like those of chunks") as store:
        for ndim in range(4):
            zarr.create_array(store, name=f"g/a{ndim}", shape=(4,) * ndim, chunks=(2,) * ndim, dtype="i4")[...] = (
                ndim + 1
            )
        zarr.create_array(store, name="c/0", shape=(2, 2), chunks=(1, 1), dtype="i4")[...] = 9
        keys = zarr.core.sync.sync(zarr.core.sync._collect_aiterator(store.list()))  # private: collects an iterator
    fs = fsspec.filesystem("icechunk", fo=str(tmp_path / "repo"))
    assert sorted(fs.find("")) == sorted(keys)
    assert fs.ls("g/a2/c", detail=False) == ["g/a2/c/0", "g/a2/c/1"]
    with pytest.raises(FileNotFoundError):
        fs.ls("g/a2/c/7")
    fs.get("", str(tmp_path / "copy"), recursive=True)
    for ndim in range(4):
        assert np.all(zarr.open_array(tmp_path / "copy" / "g" / f"a{ndim}", mode="r")[...] == ndim + 1)
    assert np.all(zarr.open_array(tmp_path / "copy" / "c" / "0", mode="r")[...] == 9)


def test_fsspec_opens_a_chained_url(place: str) -> None:
    with fsspec.open(f"icechunk://ocean/zarr.json::file://{place}") as file:
        assert json.loads(file.read())["node_type"] == "group"


@pytest.mark.parametrize("mode", ["r", "r+", "a"])
def test_open_gives_sessions(place: str, mode: str) -> None:
    session = icechunk.open(f"{place}|icechunk:@branch.main", mode)  # type: ignore[arg-type]
    assert session.read_only == (mode == "r")
    assert zarr.open_array(session.store, path="ocean/sst", mode="r").shape == (4, 3)


async def test_open_async_creates_where_it_is_asked_to(tmp_path: Path) -> None:
    with pytest.raises(icechunk.RepositoryNotFoundError):
        await icechunk.open_async(tmp_path / "none")
    session = await icechunk.open_async(tmp_path / "none", "a")
    assert session.branch == "main"


def test_a_repository_opens_by_its_url(place: str) -> None:
    assert icechunk.Repository.open(f"file://{place}").list_tags() == {"v1"}
    assert icechunk.Repository.exists(place)
    with pytest.raises(InvalidInputError) as caught:
        icechunk.Repository.open(f"{place}|icechunk:@tag.v1")
    assert caught.value.kind == ErrorKind.CANNOT_PARSE_URL


def test_memory_is_shared_by_name() -> None:
    icechunk.Repository.create("memory://test-memory-is-shared")
    assert icechunk.Repository.exists("memory://test-memory-is-shared")
    assert not icechunk.Repository.exists("memory://test-memory-is-not")


def test_the_command_line_takes_a_url_for_an_alias(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["branch", "list", place]) == 0
    assert "main" in capsys.readouterr().out
    assert main(["branch", "list", f"{place}|icechunk:@tag.v1"]) != 0


def test_the_page_about_urls_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "urls.md").read_text(encoding="utf-8")
    [source] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(compile(source, "docs/urls.md", "exec"), {"__name__": "__main__"})
    sizes, groups, is_the_commit = capsys.readouterr().out.splitlines()
    assert "'time': 2, 'x': 3" in sizes
    assert "'/ocean'" in groups
    assert is_the_commit == "True"


@pytest.mark.parametrize("opened", [xr.open_dataset, xr.open_datatree, xr.open_groups])
def test_the_path_of_an_array_is_refused_as_a_dataset(place: str, opened: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        opened(f"{place}|icechunk:@tag.v1/ocean|zarr3:sst", engine="icechunk")
    assert error.value.kind == ErrorKind.NOT_A_GROUP
