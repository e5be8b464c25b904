"""Kerchunk references in and out."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.kerchunk import from_kerchunk, read_kerchunk_parquet, to_kerchunk
from tests.raising import raises
from tests.virtual_builders import local_container, prefix_of

VALUES = np.arange(24, dtype=">i4").reshape(4, 6)

pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    """A file with four compressed chunks of a big-endian array and a plain one, and its kerchunk references."""
    data = b"header"
    refs: dict[str, Any] = {".zgroup": '{"zarr_format": 2}', ".zattrs": '{"title": "old"}'}
    for i in range(2):
        for j in range(2):
            chunk = zlib.compress(VALUES[2 * i : 2 * i + 2, 3 * j : 3 * j + 3].tobytes(), 4)
            refs[f"deep/z/{i}.{j}"] = [str(tmp_path / "f"), len(data), len(chunk)]
            data += chunk
    refs["p/0"] = [prefix_of(tmp_path) + "f", 0, 6]
    refs["p/1"] = "base64:" + base64.b64encode(b"inline").decode()
    refs["p/3"] = ["s3://nobody/x", 0, 6]
    refs["deep/.zgroup"] = '{"zarr_format": 2}'
    zarray = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None, "dimension_separator": "."}
    refs["deep/z/.zarray"] = json.dumps(
        {**zarray, "shape": [4, 6], "chunks": [2, 3], "dtype": ">i4", "fill_value": None}
        | {"filters": [{"id": "zlib", "level": 4}]}
    )
    refs["deep/z/.zattrs"] = '{"_ARRAY_DIMENSIONS": ["y", "x"], "units": "K"}'
    refs["p/.zarray"] = json.dumps({**zarray, "shape": [24], "chunks": [6], "dtype": "|u1", "fill_value": 7})
    refs["s/.zarray"] = json.dumps({**zarray, "shape": [], "chunks": [], "dtype": "<f8", "fill_value": "NaN"})
    refs["s/0"] = "base64:" + base64.b64encode(np.float64(4.5).tobytes()).decode()
    (tmp_path / "f").write_bytes(data)
    return {"version": 1, "refs": refs}


def repository(folder: Path) -> icechunk.Repository:
    config = icechunk.RepositoryConfig()
    config.set_virtual_chunk_container(local_container(folder))
    access: Any = {prefix_of(folder): icechunk.credentials.LocalFileSystemAccess}
    return icechunk.Repository.create(icechunk.in_memory_storage(), config, access)


@pytest.mark.parametrize("group", ["", "below/here"])
def test_a_kerchunk_document_becomes_arrays_with_the_same_values(
    tmp_path: Path, document: dict[str, Any], group: str
) -> None:
    session = repository(tmp_path).writable_session("main")
    assert from_kerchunk(session.store, document, group=group) == ["p/3"]
    root = zarr.open_group(session.store, path=group, mode="r")
    assert root.attrs["title"] == "old"
    deep: Any = root["deep/z"]
    assert (deep[...] == VALUES).all()
    assert deep.metadata.dimension_names == ("y", "x")
    assert dict(deep.attrs) == {"units": "K"}
    plain: Any = root["p"]
    assert plain[...].tobytes() == b"headerinline" + b"\x07" * 12
    scalar: Any = root["s"]
    assert scalar[()] == 4.5


def test_an_export_is_read_by_zarr_key_for_key(tmp_path: Path, document: dict[str, Any]) -> None:
    session = repository(tmp_path).writable_session("main")
    from_kerchunk(session.store, document)
    exported = json.loads(json.dumps(to_kerchunk(session)))
    assert exported["version"] == 1
    original = {key: value for key, value in document["refs"].items() if key.startswith("deep/z/0")}
    for key, (_, offset, length) in original.items():
        array, _, index = key.rpartition("/")
        place = f"{array}/c/{index.replace('.', '/')}"
        assert exported["refs"][place] == [prefix_of(tmp_path) + "f", offset, length]
    contents: dict[str, Any] = {}
    for key, value in exported["refs"].items():
        if isinstance(value, list):
            url, offset, length = value
            data = Path(url.removeprefix("file://")).read_bytes()[offset : offset + length]
        else:
            data = base64.b64decode(value[7:]) if value.startswith("base64:") else value.encode()
        contents[key] = zarr.core.buffer.cpu.Buffer.from_bytes(data)
    served: Any = zarr.open_group(zarr.storage.MemoryStore(contents), mode="r")
    assert (served["deep/z"][...] == VALUES).all()
    assert set(to_kerchunk(session, group="deep")["refs"]) == {
        key.removeprefix("deep/") for key in exported["refs"] if key.startswith("deep/")
    }


def test_the_repositorys_own_chunks_need_a_url(tmp_path: Path) -> None:
    session = repository(tmp_path).writable_session("main")
    zarr.create_array(session.store, name="n", shape=(2000,), chunks=(1000,), dtype="u1", compressors=None)[:] = 1
    with raises(icechunk.InvalidInputError, "invalid-virtual-ref", "'/n'", "chunks_url"):
        to_kerchunk(session)
    refs = to_kerchunk(session, chunks_url="s3://bucket/repo/chunks/")["refs"]
    assert refs["n/c/0"][0].startswith("s3://bucket/repo/chunks/")
    assert refs["n/c/1"][2] == 1000


@pytest.mark.parametrize(
    "change",
    [
        {"p/0": ["file:///x"]},
        {"p/0": 5},
        {"p/.zarray": "no json"},
        {"p/.zarray": '{"shape": [1]}'},
        {"p/.zarray": '{"shape": [24], "chunks": [6], "dtype": "|u1", "filters": [{"id": "nobody"}]}'},
    ],
)
def test_references_of_unknown_form_are_refused(
    tmp_path: Path, document: dict[str, Any], change: dict[str, Any]
) -> None:
    session = repository(tmp_path).writable_session("main")
    with raises(icechunk.InvalidInputError, "invalid-virtual-ref"):
        from_kerchunk(session.store, {"version": 1, "refs": {**document["refs"], **change}})


def test_templates_are_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    session = repository(tmp_path).writable_session("main")
    with raises(icechunk.InvalidInputError, "invalid-virtual-ref", "templates"):
        from_kerchunk(session.store, {**document, "templates": {"u": "s3://x"}})
    assert not session.has_uncommitted_changes


def test_parquet_references_are_read_as_the_same_document(tmp_path: Path, document: dict[str, Any]) -> None:
    pandas = pytest.importorskip("pandas", reason="reads Parquet")
    refs = document["refs"]
    folder = tmp_path / "refs.parq"
    metadata = {key: json.loads(value) for key, value in refs.items() if key.rpartition("/")[2].startswith(".z")}
    for array, keys in (("deep/z", ["0.0", "0.1", "1.0", "1.1"]), ("p", ["0", "1", "2", "3"]), ("s", ["0"])):
        (folder / array).mkdir(parents=True)
        for start in range(0, len(keys), 3):
            rows = []
            for key in keys[start : start + 3]:
                value = refs.get(f"{array}/{key}")
                if isinstance(value, list):
                    rows.append((*value, None))
                else:
                    rows.append((None, 0, 0, None if value is None else base64.b64decode(value[7:])))
            frame = pandas.DataFrame(rows, columns=["path", "offset", "size", "raw"])
            try:
                frame.to_parquet(folder / array / f"refs.{start // 3}.parq")
            except ImportError as error:
                pytest.skip(str(error).splitlines()[0])
    (folder / ".zmetadata").write_text(json.dumps({"metadata": metadata, "record_size": 3}))
    session = repository(tmp_path).writable_session("main")
    assert from_kerchunk(session.store, read_kerchunk_parquet(folder)) == ["p/3"]
    root = zarr.open_group(session.store, mode="r")
    deep: Any = root["deep/z"]
    plain: Any = root["p"]
    scalar: Any = root["s"]
    assert (deep[...] == VALUES).all()
    assert plain[...].tobytes() == b"headerinline" + b"\x07" * 12
    assert scalar[()] == 4.5


def test_a_folder_without_parquet_references_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="reads Parquet")
    with raises(icechunk.InvalidInputError, "invalid-virtual-ref", tmp_path / ".zmetadata"):
        read_kerchunk_parquet(tmp_path)


def test_a_root_array_keeps_its_attributes_and_its_chunks(tmp_path: Path) -> None:
    array = {"shape": [2], "chunks": [2], "dtype": "<i4", "fill_value": 0, "compressor": None}
    values = base64.b64encode(np.array([1, 2], "<i4").tobytes()).decode()
    session = repository(tmp_path).writable_session("main")
    refs = {".zarray": json.dumps(array), ".zattrs": '{"units": "K"}', "0": f"base64:{values}"}
    assert from_kerchunk(session.store, {"version": 1, "refs": refs}) == []
    read = zarr.open_array(session.store, mode="r")
    assert dict(read.attrs) == {"units": "K"}
    assert np.asarray(read[:]).tolist() == [1, 2]


@pytest.mark.parametrize(
    "part",
    [
        *({"dtype": dtype} for dtype in ("02", ",", "f4,i4", "(2,2)f8", "m8[s/0]", None, [["a", "02"]], 4)),
        {"dtype": {"names": ["a"], "formats": ["m8[s/0]"]}},
        {"chunks": [0]},
        {"chunks": None},
        {"shape": [2**70]},
        {"shape": "22"},
        {"shape": [[2]]},
        {"shape": {"2": 2}},
        {"compressor": {"id": "blosc", "shuffle": []}},
        {"compressor": {"id": "blosc", "cname": 7}},
        {"compressor": [1]},
        {"filters": 3},
        {"fill_value": "1e999999"},
        {"fill_value": {"a": 1}},
    ],
    ids=str,
)
def test_metadata_of_an_array_that_zarr_2_does_not_write_is_refused(tmp_path: Path, part: dict[str, Any]) -> None:
    array = {"shape": [2], "chunks": [1], "dtype": "<i4", "fill_value": 0, "compressor": None}
    session = repository(tmp_path).writable_session("main")
    with pytest.raises(icechunk.InvalidInputError):
        from_kerchunk(session.store, {".zgroup": '{"zarr_format": 2}', "a/.zarray": json.dumps(array | part)})


@pytest.mark.parametrize(
    "refs",
    [
        {".zgroup": "{}", ".zattrs": 7},
        {"a/.zarray": 7},
        {"a/.zarray": "base64:%%%A"},
        {".zgroup": "{}", "/.zarray": '{"shape": [], "chunks": [], "dtype": "<i4"}'},
        {"a/.zgroup": "{}"},
        {"a/0": ["s3://bucket/x", "0", 4]},
        {"a/0": ["s3://bucket/x", -1, 4]},
        {"a/0": "base64:AAA"},
    ],
    ids=str,
)
def test_values_that_no_document_has_are_refused_as_bad_references(tmp_path: Path, refs: dict[str, Any]) -> None:
    array = {"a/.zarray": {"shape": [2], "chunks": [1], "dtype": "<i4", "fill_value": 0, "compressor": None}}
    session = repository(tmp_path).writable_session("main")
    with raises(icechunk.InvalidInputError, icechunk.ErrorKind.INVALID_VIRTUAL_REF):
        from_kerchunk(session.store, array | refs)
