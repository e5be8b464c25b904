"""Arrays of every kind that zarr has, read back before the commit, after it, and from a repository opened anew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
import zarr.api.asynchronous as zarr_async
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec

import icechunk
from icechunk import IcechunkStore, InvalidInputError, Repository, Session
from icechunk.errors import ErrorKind
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.memory import MemoryStorage
from tests.store.store_builders import refused

ZARR = tuple(map(int, zarr.__version__.split(".")[:2]))

pytestmark = pytest.mark.filterwarnings(
    # Structured types and the like work, but zarr has no specification of them yet and says so.
    "ignore::zarr.errors.UnstableSpecificationWarning",
    "ignore:Numcodecs codecs are not in the Zarr version 3 specification",
)


class Life:
    """A repository whose newest state is looked at from every side."""

    def __init__(self, inline_bytes: int = 64) -> None:
        self.storage = MemoryStorage()
        self.config = icechunk.RepositoryConfig(inline_chunk_threshold_bytes=inline_bytes)
        self.repository = Repository.create(self.storage, self.config)
        self.session: Session = self.repository.writable_session("main")

    @property
    def store(self) -> IcechunkStore:
        return self.session.store

    def check(self, look: Callable[[IcechunkStore], None]) -> None:
        """Look at the session, at what it became by a commit, and at the branch in a repository opened anew."""
        look(self.store)
        self.session.commit("checked")
        look(self.store)
        look(Repository.open(self.storage).readonly_session("main").store)
        self.session = self.repository.writable_session("main")
        look(self.store)


@pytest.fixture(params=[1, 65535], ids=["native", "inline"])
def life(request: pytest.FixtureRequest) -> Life:
    """A new repository whose chunks are all objects, or all inline."""
    return Life(request.param)


def holds(name: str, expected: np.ndarray[Any, Any], **properties: Any) -> Callable[[IcechunkStore], None]:
    """A look at an array that finds these values, their type, and these properties of the array."""

    def look(store: IcechunkStore) -> None:
        array = zarr.open_array(store, path=name, mode="r")
        found = array[...]
        # zarr gives values in the machine's byte order, whatever the order they are kept in.
        native = expected.astype(expected.dtype.newbyteorder("="))
        assert np.asarray(found).dtype == native.dtype
        # Bytes, since NaN and NaT are not equal to themselves, and -0.0 is equal to 0.0.
        assert np.asarray(found).tobytes() == native.tobytes()
        assert array.shape == expected.shape
        for property, value in properties.items():
            np.testing.assert_equal(getattr(array, property), value)

    return look


DTYPES: list[Any] = [
    *["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", ">i2", ">u4", ">f8", ">c16"],
    *(f"{kind}8[{unit}]" for kind in "Mm" for unit in ("Y", "D", "h", "s", "ms", "us", "ns", "10s")),
    "U1", "U7", ">U3", "S1", "S9", "V3", "V16",
    [("x", "f4"), ("y", "<i2"), ("name", "U5")],
    [("outer", [("a", "i1"), ("b", "S2")]), ("flag", "?")],
]  # fmt: skip


def values_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Values of any fixed-size type, with its extremes, NaN and NaT among them."""
    n = int(np.prod(shape))
    match dtype.kind:
        case "b":
            flat = np.arange(n) % 3 == 0
        case "i" | "u":
            info = np.iinfo(dtype)
            flat = np.array([info.min, info.max, 0, 1] * n, dtype)[:n]
        case "f" | "c":
            # zarr leaves out chunks that are all fill value, and takes complex -0.0 for 0.0.
            zero = -0.0 if dtype.kind == "f" else 2.5
            flat = np.array([0.0, zero, 1.5, np.nan, np.inf, -np.inf] * n, dtype)[:n]
        case "M" | "m":
            flat = np.array([0, 1, -1, 12345, np.iinfo("i8").min] * n, "i8")[:n].view(dtype)
        case "U":
            flat = np.array(["", "ä€😀", "a", "long enough to be cut"] * n, dtype)[:n]
        case "S":
            flat = np.array([b"", b"\xff\x01", b"a", b"long enough to be cut"] * n, dtype)[:n]
        case _:
            flat = np.frombuffer((bytes(range(1, 127)) * dtype.itemsize * n)[: n * dtype.itemsize], np.uint8).view("V1")
            flat = flat.view(dtype) if dtype.fields is None else _structured(dtype, n)
    values: np.ndarray[Any, Any] = flat.reshape(shape)
    return values


def _structured(dtype: np.dtype[Any], n: int) -> np.ndarray[Any, Any]:
    values = np.zeros(n, dtype)
    for name in dtype.names or ():
        inner = dtype[name]
        values[name] = _structured(inner, n) if inner.fields is not None else values_of(inner, (n,))
    return values


@pytest.mark.parametrize("dtype", [np.dtype(d) for d in DTYPES], ids=str)
@pytest.mark.parametrize("chunks", [(2, 3), (5, 7)], ids=["many chunks", "one chunk"])
def test_values_of_every_dtype_come_back(life: Life, dtype: np.dtype[Any], chunks: tuple[int, int]) -> None:
    values = values_of(dtype, (5, 7))
    array = zarr.create_array(life.store, name="a", shape=values.shape, dtype=dtype, chunks=chunks)
    array[...] = values
    life.check(holds("a", values))


@pytest.mark.parametrize("dtype", ["?", "i4", "f8", "c8", "M8[s]", "m8[ns]", "U3", "S3"])
def test_scalar_arrays_and_arrays_without_elements_come_back(life: Life, dtype: str) -> None:
    scalar = values_of(np.dtype(dtype), (2,))[1].reshape(())
    zarr.create_array(life.store, name="scalar", shape=(), dtype=dtype)[...] = scalar
    zarr.create_array(life.store, name="untouched", shape=(), dtype=dtype)
    shapes = {"flat": (0,), "thin": (3, 0), "thick": (0, 2, 5)}
    for name, shape in shapes.items():
        array = zarr.create_array(
            life.store, name=name, shape=shape, dtype=dtype, chunks=tuple(max(n, 1) for n in shape)
        )
        array[...] = np.empty(shape, dtype)

    def look(store: IcechunkStore) -> None:
        holds("scalar", scalar)(store)
        untouched = zarr.open_array(store, path="untouched", mode="r")
        np.testing.assert_equal(untouched[...], np.asarray(untouched.fill_value, dtype))
        for name, shape in shapes.items():
            holds(name, np.empty(shape, dtype))(store)

    life.check(look)


def test_array_whose_chunks_have_no_length_along_a_dimension_without_elements(life: Life) -> None:
    # zarr 3.1.6 writes such a chunk shape by itself where `zarr.array` is given an array without elements.
    zarr.array(np.empty((0, 3)), chunks=(0, 3) if ZARR < (3, 2) else (1, 3), store=life.store, path="a")
    life.check(holds("a", np.empty((0, 3))))


@pytest.mark.parametrize("text", ["", "a", "ä€😀", "\x00inside\x00", "x" * 10_000])
def test_variable_length_strings_come_back(life: Life, text: str) -> None:
    values = np.array([text, "", "other", text], dtype=object)
    array = zarr.create_array(life.store, name="a", shape=(4,), chunks=(2,), dtype="str")
    array[:] = values
    life.check(lambda store: np.testing.assert_array_equal(zarr.open_array(store, path="a", mode="r")[:], values))


@pytest.mark.parametrize("data", [b"", b"a", b"\x00\xff", b"x" * 10_000])
def test_variable_length_bytes_come_back(life: Life, data: bytes) -> None:
    values = np.array([data, b"", b"other", data], dtype=object)
    array = zarr.create_array(life.store, name="a", shape=(4,), chunks=(2,), dtype="variable_length_bytes")
    array[:] = values
    life.check(lambda store: np.testing.assert_array_equal(zarr.open_array(store, path="a", mode="r")[:], values))


@pytest.mark.parametrize(
    ("dtype", "fill_value"),
    [
        ("?", True), ("i4", -7), ("u8", 2**64 - 1), ("f4", np.nan), ("f8", np.inf), ("f8", -0.0), ("f2", 1.5),
        ("c8", complex(1, np.nan)), ("M8[s]", np.datetime64("2020-01-01", "s")), ("M8[s]", np.datetime64("NaT", "s")),
        ("m8[ns]", np.timedelta64(5, "ns")), ("U3", "äbc"), ("S3", b"\xffbc"), ("V3", b"\x01\x02\x03"), ("str", "none"),
    ],
    ids=str,
)  # fmt: skip
def test_fill_values_are_read_where_nothing_was_written(life: Life, dtype: str, fill_value: Any) -> None:
    array = zarr.create_array(life.store, name="a", shape=(6,), chunks=(2,), dtype=dtype, fill_value=fill_value)
    expected = np.array(array[...])
    np.testing.assert_equal(expected[0], fill_value if dtype != "V3" else np.void(fill_value))
    array[2:3] = expected[:1]
    life.check(lambda store: np.testing.assert_array_equal(zarr.open_array(store, path="a", mode="r")[...], expected))


def test_chunks_of_fill_values_are_stored_only_where_asked_for(life: Life) -> None:
    for name, write_empty in {"sparse": False, "dense": True}.items():
        config: Any = {"write_empty_chunks": write_empty}
        array = zarr.create_array(life.store, name=name, shape=(4,), chunks=(1,), dtype="i4", config=config)
        array[:] = [0, 1, 0, 2]
        array[3] = 0

    def look(store: IcechunkStore) -> None:
        for name, count in {"sparse": 1, "dense": 4}.items():
            array = zarr.open_array(store, path=name, mode="r")
            assert array.nchunks_initialized == count
            assert np.asarray(array[:]).tolist() == [0, 1, 0, 0]

    life.check(look)


# -- codecs ----------------------------------------------------------------------------------------------------------

CODECS: dict[str, dict[str, Any]] = {
    "none": {"compressors": None},
    "zstd": {"compressors": ZstdCodec(level=5, checksum=True)},
    "gzip": {"compressors": GzipCodec(level=1)},
    **{
        f"blosc-{cname}-{shuffle}": {"compressors": BloscCodec(cname=cname, clevel=3, shuffle=shuffle)}
        for cname in ("lz4", "zstd", "zlib", "blosclz", "lz4hc", "snappy")
        for shuffle in ("noshuffle", "shuffle", "bitshuffle")
        if cname != "snappy" or "snappy" in numcodecs.blosc.list_compressors()
    },
    "crc32c": {"compressors": [Crc32cCodec()]},
    "zstd+crc32c": {"compressors": [ZstdCodec(), Crc32cCodec()]},
    "transpose": {"filters": [TransposeCodec(order=(1, 0))]},
    "big endian": {"serializer": BytesCodec(endian="big")},
    "order F": {"config": {"order": "F"}},
}


@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
def test_every_codec_round_trips(codecs: dict[str, Any]) -> None:
    life = Life()
    values = np.arange(60, dtype="i4").reshape(6, 10)
    zarr.create_array(life.store, name="a", shape=(6, 10), chunks=(4, 4), dtype="i4", **codecs)[...] = values
    life.check(holds("a", values))


@pytest.mark.parametrize("name", ["numcodecs.delta", "numcodecs.fixedscaleoffset", "numcodecs.zlib", "numcodecs.lz4"])
def test_codecs_of_numcodecs_round_trip(name: str) -> None:
    life = Life()
    configurations: dict[str, dict[str, Any]] = {
        "numcodecs.delta": {"dtype": "<i4"},
        "numcodecs.fixedscaleoffset": {"offset": 0, "scale": 1, "dtype": "<i4"},
    }
    configuration = configurations.get(name, {"level": 1} if name == "numcodecs.zlib" else {})
    codec = {"name": name, "configuration": configuration}
    codecs: dict[str, Any] = {"filters" if configuration.get("dtype") else "compressors": [codec]}
    values = np.arange(60, dtype="i4").reshape(6, 10)
    zarr.create_array(life.store, name="a", shape=(6, 10), chunks=(4, 4), dtype="i4", **codecs)[...] = values
    life.check(holds("a", values))


# -- shards and grids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_location", ["start", "end"])
@pytest.mark.parametrize("compressors", [None, "auto"])
def test_sharded_arrays_are_written_and_read_in_part(life: Life, index_location: str, compressors: Any) -> None:
    values = np.arange(24 * 18, dtype="f4").reshape(24, 18)
    shards: Any = {"shape": (12, 9), "index_location": index_location}
    array = zarr.create_array(
        life.store,
        name="a",
        shape=values.shape,
        dtype="f4",
        chunks=(4, 3),
        shards=shards,
        compressors=compressors,
    )
    array[...] = values

    def look(store: IcechunkStore) -> None:
        holds("a", values, shards=(12, 9), chunks=(4, 3))(store)
        found = zarr.open_array(store, path="a", mode="r")
        np.testing.assert_array_equal(found[5, 7], values[5, 7])
        np.testing.assert_array_equal(found[3:14:3, ::5], values[3:14:3, ::5])
        np.testing.assert_array_equal(
            found.oindex[np.array([1, 13, 23]), np.array([0, 17])], values[np.ix_([1, 13, 23], [0, 17])]
        )
        np.testing.assert_array_equal(found.blocks[1, 1], values[12:, 9:])

    life.check(look)
    # Part of a shard is written over: read, changed, written whole.
    array = zarr.open_array(life.store, path="a", mode="r+")
    array[5:15, 4:6] = values[5:15, 4:6] = -1
    life.check(look)


def test_shards_within_shards_round_trip() -> None:
    life = Life()
    values = np.arange(64 * 64, dtype="u2").reshape(64, 64)
    inner = ShardingCodec(chunk_shape=(4, 4), codecs=[BytesCodec(), ZstdCodec()])
    array = zarr.create_array(
        life.store,
        name="a",
        shape=(64, 64),
        chunks=(32, 32),
        dtype="u2",
        serializer=ShardingCodec(chunk_shape=(8, 8), codecs=[inner]),
        compressors=None,
    )
    array[...] = values
    life.check(holds("a", values))


def test_missing_inner_chunks_of_a_shard_are_fill_values() -> None:
    life = Life()
    array = zarr.create_array(life.store, name="a", shape=(8,), chunks=(1,), shards=(4,), dtype="i4", fill_value=-1)
    array[1] = 5
    life.check(holds("a", np.array([-1, 5, -1, -1, -1, -1, -1, -1], "i4"), nchunks_initialized=4))


@pytest.mark.skipif(ZARR < (3, 2), reason="this zarr has no rectilinear chunk grids")
def test_rectilinear_grids_hold_chunks_of_any_lengths(life: Life) -> None:
    values = np.arange(10 * 9).reshape(10, 9)
    chunks: Any = [[1, 2, 3, 4], [4, 5]]
    with zarr.config.set({"array.rectilinear_chunks": True}):
        array = zarr.create_array(life.store, name="a", shape=(10, 9), chunks=chunks, dtype="i8")
        array[...] = values
        assert life.session.status().updated_chunks["/a"] == [[i, j] for i in range(4) for j in range(2)]
        life.check(holds("a", values))
        array = zarr.open_array(life.store, path="a", mode="r+")
        array[2:8, 3:6] = values[2:8, 3:6] = -1
        life.check(holds("a", values))
        array = zarr.open_array(life.store, path="a", mode="r+")
        array.resize((3, 9))
        life.check(holds("a", values[:3]))


# -- resizing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("committed", [False, True])
def test_arrays_grow_and_shrink_and_cut_off_chunks_are_deleted(life: Life, committed: bool) -> None:
    values = np.arange(1, 51).reshape(10, 5)
    array = zarr.create_array(life.store, name="a", shape=(10, 5), chunks=(3, 2), dtype="i8")
    array[...] = values

    def step() -> zarr.Array[Any]:
        if committed:
            life.session.commit("step")
            life.session = life.repository.writable_session("main")
        return zarr.open_array(life.store, path="a", mode="r+")

    step().resize((4, 3))
    step().resize((10, 5))
    expected = np.zeros((10, 5), "i8")
    expected[:4, :3] = values[:4, :3]
    found = step()
    # zarr cuts off whole chunks only: those that lie across the new edge keep their elements.
    expected[4:6, :4] = values[4:6, :4]
    expected[:4, 3] = values[:4, 3]
    np.testing.assert_array_equal(found[...], expected)
    life.check(holds("a", expected)) if life.session.has_uncommitted_changes else holds("a", expected)(life.store)


def test_appending_writes_only_the_new_chunks(life: Life) -> None:
    array = zarr.create_array(life.store, name="a", shape=(0, 3), chunks=(2, 3), dtype="i4")
    rows = np.arange(1, 31, dtype="i4").reshape(10, 3)
    for start in range(0, 10, 2):
        array.append(rows[start : start + 2])
        assert life.session.status().updated_chunks["/a"] == [[start // 2, 0]]
        life.check(holds("a", rows[: start + 2]))
        array = zarr.open_array(life.store, path="a", mode="r+")


def test_growing_to_nothing_and_back(life: Life) -> None:
    array = zarr.create_array(life.store, name="a", shape=(4,), chunks=(2,), dtype="i4")
    array[:] = [1, 2, 3, 4]
    life.session.commit("full")
    life.session = life.repository.writable_session("main")
    zarr.open_array(life.store, path="a", mode="r+").resize((0,))
    life.check(holds("a", np.zeros(0, "i4"), nchunks_initialized=0))
    zarr.open_array(life.store, path="a", mode="r+").resize((4,))
    life.check(holds("a", np.zeros(4, "i4"), nchunks_initialized=0))


# -- overwriting and deleting ----------------------------------------------------------------------------------------


def test_overwritten_chunks_hold_the_last_value(life: Life) -> None:
    array = zarr.create_array(life.store, name="a", shape=(4,), chunks=(1,), dtype="i4")
    for n in range(1, 4):
        array[:] = n
        array[n] = 10 * n
    life.check(holds("a", np.array([3, 3, 3, 30], "i4")))
    zarr.open_array(life.store, path="a", mode="r+")[1:3] = [7, 8]
    life.check(holds("a", np.array([3, 7, 8, 30], "i4")))


def test_array_replaced_by_another_has_nothing_of_the_old_one(life: Life) -> None:
    zarr.create_array(life.store, name="a", shape=(4, 4), chunks=(1, 1), dtype="i4")[...] = 1
    life.session.commit("old")
    life.session = life.repository.writable_session("main")
    old = life.session.get_node_id("/a")
    new = zarr.create_array(life.store, name="a", shape=(3,), chunks=(2,), dtype="f8", overwrite=True, fill_value=-1.0)
    new[:1] = 5.0
    assert life.session.get_node_id("/a") != old
    life.check(holds("a", np.array([5.0, -1.0, -1.0])))


def test_group_replaced_by_an_array_takes_its_members_along(life: Life) -> None:
    group = zarr.create_group(life.store, path="x")
    group.create_array("a", shape=(2,), dtype="i4")[:] = 1
    life.session.commit("group")
    life.session = life.repository.writable_session("main")
    zarr.create_array(life.store, name="x", shape=(2,), dtype="i4", overwrite=True)[:] = 2

    def look(store: IcechunkStore) -> None:
        holds("x", np.array([2, 2], "i4"))(store)
        assert "x/a" not in zarr.open_group(store, mode="r")

    life.check(look)


def test_deleted_members_are_absent(life: Life) -> None:
    root = zarr.open_group(life.store)
    for name in ("keep", "drop", "deep/drop", "deep/keep"):
        root.create_array(name, shape=(2,), chunks=(1,), dtype="i4")[:] = 1
    life.session.commit("all")
    life.session = life.repository.writable_session("main")
    root = zarr.open_group(life.store, mode="r+")
    del root["drop"], root["deep/drop"]

    def look(store: IcechunkStore) -> None:
        members = {name for name, _ in zarr.open_group(store, mode="r").members(max_depth=None)}
        assert members == {"keep", "deep", "deep/keep"}

    life.check(look)


# -- groups and metadata ---------------------------------------------------------------------------------------------

ATTRIBUTES: dict[str, Any] = {
    "text": "ä€😀", "number": 1.5, "big": 2**53, "none": None, "yes": True, "list": [1, [2, {}]],
    "nested": {"a": {"b": []}}, "": "empty name", "zarr_format": 2,
}  # fmt: skip


def test_nested_groups_keep_their_attributes_and_members(life: Life) -> None:
    root = zarr.create_group(life.store, attributes={"level": 0})
    deep = root.create_group("a/b/c", attributes=ATTRIBUTES)
    deep.create_array("x", shape=(2,), dtype="i4", attributes=ATTRIBUTES, dimension_names=["time"])[:] = 5

    def look(store: IcechunkStore) -> None:
        found = zarr.open_group(store, mode="r")
        assert dict(found.attrs) == {"level": 0}
        assert dict(found["a/b/c"].attrs) == ATTRIBUTES
        assert dict(found["a/b/c/x"].attrs) == ATTRIBUTES
        assert [name for name, _ in found.members(max_depth=None)] == ["a", "a/b", "a/b/c", "a/b/c/x"]
        group = found["a"]
        assert isinstance(group, zarr.Group)
        assert sorted(group.group_keys()) == ["b"]

    life.check(look)
    zarr.open_group(life.store, path="a/b/c", mode="r+").attrs.put({"new": 1})
    assert life.session.status().updated_groups == {"/a/b/c"}

    def look_again(store: IcechunkStore) -> None:
        assert dict(zarr.open_group(store, path="a/b/c", mode="r").attrs) == {"new": 1}

    life.check(look_again)


@pytest.mark.parametrize("names", [None, ["x", "y"], ["x", None], [None, None], ["x", "x"], ["", "€"]], ids=str)
def test_dimension_names_come_back(names: list[str | None] | None) -> None:
    life = Life()
    zarr.create_array(life.store, name="a", shape=(2, 2), dtype="i4", dimension_names=names)[...] = 1

    def look(store: IcechunkStore) -> None:
        metadata: Any = zarr.open_array(store, path="a", mode="r").metadata
        assert metadata.dimension_names == (None if names is None else tuple(names))

    life.check(look)


@pytest.mark.parametrize(
    "name", ["0", "c", "c/0", "zarr", "with space", "ünï", "a.b", "-", "x" * 200, "__hidden", "%2F"]
)
def test_unusual_names_are_accepted(name: str) -> None:
    life = Life()
    root = zarr.create_group(life.store)
    root.create_array(f"{name}/{name}", shape=(2,), chunks=(1,), dtype="i4")[:] = [1, 2]

    def look(store: IcechunkStore) -> None:
        group = zarr.open_group(store, mode="r")
        array = group[f"{name}/{name}"]
        assert isinstance(array, zarr.Array)
        assert np.asarray(array[:]).tolist() == [1, 2]
        parts = f"{name}/{name}".split("/")
        assert {found for found, _ in group.members(max_depth=None)} == {
            "/".join(parts[: i + 1]) for i in range(len(parts))
        }

    life.check(look)


def test_consolidated_metadata_is_neither_needed_nor_made() -> None:
    life = Life()
    root = zarr.create_group(life.store)
    root.create_array("a", shape=(2,), dtype="i4")[:] = 1
    assert not life.store.supports_consolidated_metadata
    with pytest.raises(TypeError, match="consolidated metadata"):  # words: zarr's own
        zarr.consolidate_metadata(life.store)

    def look(store: IcechunkStore) -> None:
        for use in (None, False):
            group = zarr.open_group(store, mode="r", use_consolidated=use)
            assert group.metadata.consolidated_metadata is None
            array = group["a"]
            assert isinstance(array, zarr.Array)
            assert np.asarray(array[:]).tolist() == [1, 1]
        with pytest.raises(ValueError, match="consolidated metadata"):  # words: zarr's own
            zarr.open_group(store, mode="r", use_consolidated=True)

    life.check(look)


def test_zarr_2_hierarchies_are_refused() -> None:
    life = Life()
    zarr.create_group(life.store)
    with refused(life.session, icechunk.SessionStateError, ErrorKind.UNIMPLEMENTED):
        zarr.create_array(life.store, name="a", shape=(2,), dtype="i4", zarr_format=2)
    with refused(life.session, icechunk.SessionStateError, ErrorKind.UNIMPLEMENTED):
        zarr.create_group(life.store, path="g", zarr_format=2)


@pytest.mark.parametrize("encoding", [{"name": "v2", "separator": "."}, {"name": "default", "separator": "."}], ids=str)
def test_zarr_cannot_create_arrays_with_other_chunk_keys(encoding: Any) -> None:
    life = Life()
    zarr.create_group(life.store)
    with refused(life.session, InvalidInputError, ErrorKind.INVALID_ARRAY_METADATA):
        zarr.create_array(life.store, name="a", shape=(2,), dtype="i4", chunk_key_encoding=encoding)
    assert sorted(zarr.open_group(life.store).keys()) == []


# -- thresholds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, 1, 7, 8, 9, 1000])
def test_chunks_up_to_the_threshold_are_inline_in_the_manifest(threshold: int) -> None:
    life = Life(threshold)
    array = zarr.create_array(life.store, name="a", shape=(3, 8), chunks=(1, 8), dtype="u1", compressors=None)
    array[:2] = 1
    kinds = [icechunk.ChunkType.inline if threshold >= 8 else icechunk.ChunkType.native] * 2
    kinds.append(icechunk.ChunkType.uninitialized)

    def look(store: IcechunkStore) -> None:
        assert [store.session.chunk_type("/a", (i, 0)) for i in range(3)] == kinds

    life.check(look)
    objects = [key for key, _ in life.storage.list_objects() if key.startswith("chunks/")]
    assert bool(objects) == (icechunk.ChunkType.native in kinds)


# -- zarr's asynchronous interface -----------------------------------------------------------------------------------


def test_zarrs_asynchronous_interface_works_in_the_users_own_loop(tmp_path: Any) -> None:
    values = np.arange(1, 101, dtype="f4").reshape(10, 10)
    storage = LocalStorage(tmp_path / "repository")

    async def write() -> None:
        repository = await Repository.create_async(storage)
        session = await repository.writable_session_async("main")
        root = await zarr_async.open_group(session.store, mode="a", attributes={"by": "async"})
        array = await root.create_array("deep/a", shape=(10, 10), chunks=(5, 5), shards=None, dtype="f4")
        await array.setitem((slice(None), slice(None)), values)
        np.testing.assert_array_equal(await array.getitem((slice(0, 3), 4)), values[:3, 4])
        assert [name async for name, _ in root.members(max_depth=None)] == ["deep", "deep/a"]
        await array.update_attributes({"units": "K"})
        await session.commit_async("async")
        array = await zarr_async.open_array(store=session.store, path="deep/a", mode="r")
        np.testing.assert_array_equal(await array.getitem(...), values)

    async def extend() -> None:
        repository = await Repository.open_async(storage)
        session = await repository.writable_session_async("main")
        array = await zarr_async.open_array(store=session.store, path="deep/a", mode="r+")
        assert array.attrs == {"units": "K"}
        await array.append(values[:5])
        await session.commit_async("appended")

    asyncio.run(write())
    asyncio.run(extend())
    found = zarr.open_group(Repository.open(storage).readonly_session("main").store, mode="r")
    array = found["deep/a"]
    assert isinstance(array, zarr.Array)
    np.testing.assert_array_equal(array[...], np.concatenate([values, values[:5]]))
    assert dict(found.attrs) == {"by": "async"}
