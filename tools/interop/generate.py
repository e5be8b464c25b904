"""A repository with something of everything, written through the public API of whichever library is installed.

``generate`` returns what each snapshot must hold, computed from the numpy arrays alone: it is the independent model
that both readers are compared with. ``python -m tools.interop.generate PATH [inline threshold]`` prints it as JSON.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import zarr
import zarr.codecs

import icechunk
from tools.interop.dump import digest

__all__ = ["carry_on", "every_dtype", "generate", "has_format_2", "publish"]

RNG_SEED = 20150101


def _texts(n: int) -> list[str]:
    return [["", "a", "bc", "météo", "日本", "x" * 9][i % 6] for i in range(n)]


def every_dtype() -> dict[str, np.ndarray[Any, Any]]:
    """One array of eleven values for every data type that zarr has, by a name that makes a node name."""
    rng = np.random.default_rng(RNG_SEED)
    arrays: dict[str, np.ndarray[Any, Any]] = {"bool": rng.integers(0, 2, 11).astype(bool)}
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        info = np.iinfo(name)
        arrays[name] = np.array([info.min, info.max, 0, *rng.integers(0, 100, 8)], dtype=name)
    for name in ("float16", "float32", "float64"):
        arrays[name] = np.array([np.nan, np.inf, -np.inf, -0.0, *rng.random(7)], dtype=name)
    for name in ("complex64", "complex128"):
        arrays[name] = (rng.random(11) + 1j * rng.random(11)).astype(name)
    arrays["int32_big_endian"] = np.arange(11, dtype=">i4")
    arrays["float64_big_endian"] = np.linspace(0, 1, 11, dtype=">f8")
    moments = rng.integers(-(10**9), 10**9, 11)
    for unit in ("ns", "us", "ms", "s", "D"):
        arrays[f"datetime64_{unit}"] = moments.astype(f"M8[{unit}]")
        arrays[f"timedelta64_{unit}"] = moments.astype(f"m8[{unit}]")
    arrays["datetime64_ns"][3] = np.datetime64("NaT")
    arrays["fixed_text"] = np.array(_texts(11), dtype="<U9")
    arrays["text"] = np.array(_texts(11), dtype=np.dtypes.StringDType())
    arrays["fixed_bytes"] = np.array([text.encode()[:6] for text in _texts(11)], dtype="S6")
    arrays["raw_bytes"] = np.frombuffer(rng.bytes(55), dtype="V5")
    point = np.dtype([("x", "<f4"), ("y", "<i2"), ("name", "S3")])
    arrays["structured"] = np.array([(i / 3, -i, b"p%d" % (i % 10)) for i in range(11)], dtype=point)
    return arrays


class _Writer:
    """Applies every change to a session and to a model of plain numpy arrays."""

    def __init__(self, repo: Any) -> None:
        self.repo = repo
        self.model: dict[str, np.ndarray[Any, Any]] = {}
        self.expected: dict[str, dict[str, Any]] = {}
        self.committed: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        self.session: Any = None

    def begin(self, branch: str = "main") -> None:
        self.session = self.repo.writable_session(branch)

    def commit(self, message: str, metadata: dict[str, Any] | None = None, **options: Any) -> str:
        snapshot: str = self.session.commit(message, metadata, **options)
        self.committed[snapshot] = {path: values.copy() for path, values in self.model.items()}
        self.expected[snapshot] = {f"/{path}": digest(values) for path, values in self.model.items()}
        return snapshot

    def group(self, path: str, **attributes: Any) -> None:
        zarr.create_group(store=self.session.store, path=path, attributes=attributes)

    def array(self, path: str, values: Any, chunks: Any, **options: Any) -> Any:
        values = np.asarray(values)
        dtype = options.pop("dtype", values.dtype)
        array = zarr.create_array(
            store=self.session.store, name=path, shape=values.shape, chunks=chunks, dtype=dtype, **options
        )
        if values.size:
            array[...] = values
        self.model[path] = values.copy()
        return array

    def open(self, path: str) -> Any:
        return zarr.open_array(store=self.session.store, path=path, mode="r+")

    def set(self, path: str, selection: Any, values: Any) -> None:
        self.open(path)[selection] = values
        self.model[path][selection] = values

    def resize(self, path: str, shape: tuple[int, ...], fill: Any = 0) -> None:
        self.open(path).resize(shape)
        old = self.model[path]
        new = np.full(shape, fill, dtype=old.dtype)
        common = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, shape, strict=True))
        new[common] = old[common]
        self.model[path] = new

    def delete_key(self, key: str) -> None:
        asyncio.run(self.session.store.delete(key))

    def delete_node(self, path: str) -> None:
        asyncio.run(self.session.store.delete_dir(path))
        self.model = {
            name: values for name, values in self.model.items() if name != path and not name.startswith(path + "/")
        }


def generate(
    storage: Any, inline_threshold: int | None = None, leave_out: Collection[str] = (), **create: Any
) -> dict[str, Any]:
    """Create a repository at `storage` and fill it; what every snapshot must hold, by snapshot id and node path.

    Parameters
    ----------
    storage
        Where to create it; must be empty.
    inline_threshold
        Bytes up to which chunks are stored in the manifest; the library's default where None, none at all where 0.
    leave_out
        Names of data types not to write: newer versions of zarr write some that older ones cannot read.
    create
        Passed on to ``Repository.create``.
    """
    config = icechunk.RepositoryConfig.default()
    if inline_threshold is not None:
        config.inline_chunk_threshold_bytes = inline_threshold
    repo = icechunk.Repository.create(storage, config=config, **create)
    writer = _Writer(repo)
    first = repo.lookup_branch("main")
    writer.expected[first] = {}
    rng = np.random.default_rng(RNG_SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr warns of data types that its specification does not have yet
        _every_dtype(writer, leave_out)
        early = _every_shape(writer, rng)
        repo.create_tag("v1", early)
        repo.create_branch("dev", early)
        repo.create_branch("beginning", first)
        _appended(writer, rng)
        overwritten = _overwritten(writer, rng)
        repo.create_tag("release-2.0", overwritten)
        main_model = dict(writer.model)
        _on_a_branch(writer, rng, early)
        writer.model = main_model
        _deleted(writer, rng)
    repo.create_tag("gone", early)
    repo.delete_tag("gone")
    repo.create_branch("also-gone", early)
    repo.delete_branch("also-gone")
    if has_format_2(repo):
        repo.set_metadata({"title": "generated", "n": 3, "nested": {"list": [1, 2.5, None, True, "é"]}})
    publish(repo)
    return writer.expected


def has_format_2(repo: Any) -> bool:
    """Whether the repository has what format 1 lacks: metadata, status, an ops log. Library 1.x knows no other."""
    return hasattr(repo, "spec_version") and int(repo.spec_version) >= 2


def publish(repo: Any) -> None:
    """Make everything that is in `repo` visible to readers that know only the published format.

    The official library's repositories always are; ours bring their `repo` object up to date in the background.
    """
    checkpoint = getattr(repo, "checkpoint", None)
    if checkpoint is not None:
        checkpoint()


def _every_dtype(writer: _Writer, leave_out: Collection[str]) -> None:
    writer.begin()
    writer.group("", title="something of everything", number=1, nothing=None, list=[1, "two", {"three": 3.5}])
    writer.group("dtypes", unicode="é日本")
    for name, values in every_dtype().items():
        if name in leave_out:
            continue
        dtype = str if values.dtype.kind == "T" else values.dtype
        writer.array(f"dtypes/{name}", values, (4,), dtype=dtype)
    writer.commit("every data type", {"author": "generator", "n": 1, "nested": {"a": [1, 2.5, None, True]}})


def _every_shape(writer: _Writer, rng: np.random.Generator) -> str:
    writer.begin()
    writer.group("shapes/deep/nested/group")
    writer.array("shapes/scalar", np.float64(3.25), ())
    writer.array("shapes/scalar_text", np.array("one text", dtype=np.dtypes.StringDType()), (), dtype=str)
    writer.array("shapes/empty", np.zeros((0,)), (1,))
    writer.array("shapes/empty_2d", np.zeros((0, 5), "i2"), (2, 5))
    for ndim in (1, 2, 3, 4):
        shape = (7, 5, 4, 3)[:ndim]
        writer.array(f"shapes/deep/rank_{ndim}", rng.integers(0, 1000, shape), (3, 2, 4, 2)[:ndim])
    never = np.full((6, 6), 7, "i4")
    zarr.create_array(
        store=writer.session.store, name="shapes/never_written", shape=(6, 6), chunks=(2, 2), dtype="i4", fill_value=7
    )
    writer.model["shapes/never_written"] = never
    writer.array("shapes/some_missing", np.zeros((12, 12)), (3, 4))
    writer.set("shapes/some_missing", (slice(0, 3), slice(4, 8)), rng.random((3, 4)))
    writer.set("shapes/some_missing", (slice(9, 12), slice(0, 4)), rng.random((3, 4)))
    named = writer.array("named", rng.random((4, 6)), (2, 3), dimension_names=("time", "x"), fill_value=np.nan)
    named.attrs["units"] = "K"
    for name, compressors in {
        "raw": None,
        "gzip": zarr.codecs.GzipCodec(),
        "zstd": zarr.codecs.ZstdCodec(),
        "blosc": zarr.codecs.BloscCodec(),
    }.items():
        writer.array(f"codecs/{name}", rng.integers(0, 50, (40, 40)), (16, 40), compressors=compressors)
    writer.array("codecs/sharded", rng.integers(0, 9, (30, 30)), (4, 5), shards=(16, 15))
    writer.array("codecs/sharded_sparse", np.zeros((30, 30)), (4, 5), shards=(16, 15))
    writer.set("codecs/sharded_sparse", (slice(4, 8), slice(5, 10)), rng.random((4, 5)))
    # beyond the inline threshold of any library: random bytes do not compress
    writer.array("native", rng.random((64, 256)), (16, 64))
    sizes = rng.random((4, 4096))
    sizes[1:3] = 0.5
    writer.array("inline_and_native", sizes, (1, 4096))
    writer.array("many", rng.integers(0, 255, (12, 25), dtype="u1"), (1, 1), compressors=None)
    writer.array("odd names/températures 日本/a b.c", np.arange(5), (2,))
    return writer.commit("every shape", {"n": 2})


def _appended(writer: _Writer, rng: np.random.Generator) -> None:
    for step in range(3):
        writer.begin()
        length = 8 * step + 16
        if step == 0:
            writer.array("series/value", rng.random((8, 50)), (4, 50))
            writer.array("series/time", np.arange(8), (4,))
        writer.resize("series/value", (length, 50))
        writer.resize("series/time", (length,))
        writer.set("series/value", slice(length - 8, length), rng.random((8, 50)))
        writer.set("series/time", slice(length - 8, length), np.arange(length - 8, length))
        writer.commit(f"append {step}")


def _overwritten(writer: _Writer, rng: np.random.Generator) -> str:
    writer.begin()
    writer.set("native", (slice(10, 20), slice(60, 70)), rng.random((10, 10)))
    writer.set("shapes/deep/rank_3", slice(0, 2), rng.integers(0, 9, (2, 5, 4)))
    writer.set("many", (slice(3, 5), slice(None)), 200)
    writer.set("inline_and_native", 1, rng.random(4096))
    writer.set("inline_and_native", 0, 0.5)
    writer.set("shapes/scalar", (), -1.5)
    # a chunk of nothing but fill values is deleted by zarr
    writer.set("shapes/some_missing", (slice(0, 3), slice(4, 8)), 0.0)
    writer.delete_key("codecs/raw/c/1/0")
    writer.model["codecs/raw"][16:32] = 0
    writer.open("named").attrs.update({"units": "°C", "corrected": True})
    zarr.open_group(writer.session.store, path="dtypes", mode="r+").attrs["later"] = [1, 2]
    return writer.commit("overwrite and delete chunks, change attributes")


def _on_a_branch(writer: _Writer, rng: np.random.Generator, base: str) -> None:
    writer.model = {path: values.copy() for path, values in writer.committed[base].items()}
    for step in range(2):
        writer.begin("dev")
        writer.array(f"dev/only_here_{step}", rng.random((5, 5)), (2, 2))
        writer.set("native", (slice(0, 3), slice(0, 3)), float(step))
        writer.commit(f"on dev {step}", {"branch": "dev"})
    if "allow_empty" in inspect.signature(writer.session.commit).parameters:
        writer.begin("dev")
        writer.commit("nothing changed", allow_empty=True)


def _deleted(writer: _Writer, rng: np.random.Generator) -> None:
    writer.begin()
    writer.delete_node("dtypes/bool")
    writer.delete_node("shapes/deep")
    # to the edge of a chunk: zarr keeps what a shrunken array cuts off inside one
    writer.resize("series/value", (8, 50))
    writer.resize("series/time", (8,))
    writer.commit("delete nodes, shrink arrays")
    writer.begin()
    writer.delete_node("native")
    writer.array("native", rng.random((3, 3, 3)), (2, 2, 2))
    writer.delete_node("named")
    writer.group("named", now="a group")
    writer.array("named/inside", np.arange(4), (2,))
    # grown again: what the shrinking dropped must not come back
    writer.resize("series/value", (30, 50))
    writer.commit("other nodes at the same paths")


def carry_on(repo: Any, branch: str, number: int) -> dict[str, Any]:
    """One more commit on a branch of a generated repository, which appends, overwrites, creates and deletes.

    Parameters
    ----------
    number
        Makes its values and names; another one for each commit.

    Returns
    -------
    dict
        ``snapshot``: its id, and ``values``: what these arrays must hold in it, by path.
    """
    session = repo.writable_session(branch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        series = zarr.open_array(store=session.store, path="carried/series", mode="r+") if number else None
        values = np.arange(12, dtype="f8").reshape(3, 4) + number
        if series is None:
            series = zarr.create_array(
                store=session.store, name="carried/series", shape=(0, 4), chunks=(2, 4), dtype="f8", fill_value=0
            )
        kept = series[...]
        series.append(values)
        if number:
            zarr.open_group(store=session.store, mode="r+").__delitem__(f"carried/only_{number - 1}")
        large = np.full((40, 40), number, "i4")
        zarr.create_array(
            store=session.store, name=f"carried/only_{number}", shape=large.shape, chunks=(20, 40), dtype="i4"
        )[...] = large
    snapshot = session.commit(f"carried on {number}", {"number": number})
    expected = {"/carried/series": np.concatenate([kept, values]), f"/carried/only_{number}": large}
    return {"snapshot": snapshot, "values": {path: digest(values) for path, values in expected.items()}}


def main(arguments: list[str]) -> None:
    """``PATH [threshold [version [left out...]]]`` generates; ``PATH --carry-on BRANCH NUMBER...`` adds commits."""
    path, *options = arguments
    storage = icechunk.local_filesystem_storage(path)
    if options and options[0] == "--carry-on":
        repo = icechunk.Repository.open(storage)
        print(json.dumps([carry_on(repo, options[1], int(number)) for number in options[2:]]))
        return
    threshold = int(options[0]) if options and options[0] != "-" else None
    create = {"spec_version": int(options[1])} if len(options) > 1 and options[1] != "-" else {}
    print(json.dumps(generate(storage, threshold, options[2:], **create)))


if __name__ == "__main__":
    main(sys.argv[1:])
    # Not through the interpreter's end, where official 1.1.21 sometimes aborts.
    sys.stdout.flush()
    os._exit(0)
