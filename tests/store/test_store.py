"""The store's keys, byte ranges, listings and bad input; see test_store_zarr.py for zarr's own suite."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, cpu

from icechunk import (
    AlreadyExistsError,
    IcechunkStore,
    InvalidInputError,
    NodeNotFoundError,
    ReadOnlyError,
    Repository,
    SessionStateError,
)
from icechunk.errors import ErrorKind, IcechunkError, ObjectNotFoundError, StorageError
from icechunk.format.ids import ObjectId
from icechunk.runtime import json_codec
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import GetResult, PutResult, Storage
from icechunk.store.ranges import join_ranges
from icechunk.store.store import _bytes_of
from icechunk.testing.wrapping import WrappingStorage
from tests.raising import raises
from tests.store.store_builders import (
    PROTOTYPE,
    READ_ONLY,
    array_document,
    buffer,
    collect,
    group_document,
    open_session,
    read,
    refused,
    state_of,
)

INLINE, NATIVE = bytes(range(10)), bytes(range(200)) * 10
NODES = {
    "zarr.json": group_document(),
    "a/zarr.json": array_document((4, 4)),
    "g/zarr.json": group_document(level=1),
    "g/s/zarr.json": array_document(()),
    "g/e/zarr.json": array_document((0, 3)),
    "g/deep/er/zarr.json": group_document(),
}
CHUNKS = {"a/c/0/0": INLINE, "a/c/0/1": NATIVE, "a/c/1/1": b"x", "a/c/3/3": b"y" * 600, "g/s/c": b"scalar"}
EVERYTHING = NODES | CHUNKS


async def fill(store: IcechunkStore, values: dict[str, bytes] = EVERYTHING) -> None:
    for key, value in values.items():
        await store.set(key, buffer(value))


class HeldStorage(MemoryStorage):
    """Uploads of chunks wait until they are let go: for reading what is still on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = asyncio.Event()

    async def put(self, key: str, *args: Any, **kwargs: Any) -> PutResult:
        if key.startswith("chunks/"):
            await self.let_go.wait()
        return await super().put(key, *args, **kwargs)

    async def get(self, key: str, *args: Any, **kwargs: Any) -> GetResult:
        assert self.let_go.is_set() or not key.startswith("chunks/"), "not there yet"
        return await super().get(key, *args, **kwargs)


@pytest.fixture
async def store() -> IcechunkStore:
    """An empty writable store in memory."""
    return (await open_session(MemoryStorage())).store


@pytest.fixture(params=["written", "in flight", "committed", "reopened", "overwritten"])
async def filled(request: pytest.FixtureRequest) -> Any:
    """A store that holds `EVERYTHING`: in its session, on its way, committed, seen anew, or written over."""
    storage = HeldStorage()
    if request.param != "in flight":
        storage.let_go.set()
    session = await open_session(storage)
    if request.param == "overwritten":
        await fill(session.store, NODES | {key: b"before" + value * 2 for key, value in CHUNKS.items()})
        await session.commit_async("first")
        repository = await Repository.open_async(storage)
        session = await repository.writable_session_async("main")
        await fill(session.store, CHUNKS)
    else:
        await fill(session.store)
    store = session.store
    if request.param in ("committed", "reopened"):
        await session.commit_async("all of it")
    if request.param == "reopened":
        repository = await Repository.open_async(storage)
        store = (await repository.readonly_session_async("main")).store
    yield store
    storage.let_go.set()
    if not store.read_only:
        await session.commit_async("end")


# -- reading ---------------------------------------------------------------------------------------------------------


async def test_everything_reads_back_wherever_it_is_stored(filled: IcechunkStore) -> None:
    assert await state_of(filled) == EVERYTHING
    for key, value in EVERYTHING.items():
        assert await filled.exists(key)
        assert await filled.getsize(key) == len(value)


RANGES: list[ByteRequest | None] = [
    None,
    *(RangeByteRequest(*ends) for ends in [(0, 1), (1, 4), (8, 20), (10, 20), (12, 20), (3, 3), (4, 2), (0, 10**12)]),
    *(OffsetByteRequest(n) for n in [0, 8, 10, 12, 1999, 2000, 2001, 10**12]),
    *(SuffixByteRequest(n) for n in [0, 1, 3, 10, 30, 2000, 2001, 10**12]),
]


def part(value: bytes, byte_range: ByteRequest | None) -> bytes:
    """The bytes that zarr means by a range."""
    match byte_range:
        case RangeByteRequest(start, end):
            return value[start:end]
        case OffsetByteRequest(offset):
            return value[offset:]
        case SuffixByteRequest(suffix):
            return value[max(0, len(value) - suffix) :]
    return value


async def test_byte_ranges_are_clamped_as_zarr_does(filled: IcechunkStore) -> None:
    for key in ("zarr.json", "a/c/0/0", "a/c/0/1", "a/c/3/3", "g/s/c"):
        value = EVERYTHING[key]
        for byte_range in RANGES:
            assert await read(filled, key, byte_range) == part(value, byte_range), (key, byte_range)


@settings(max_examples=60)
@given(
    byte_range=st.one_of(
        st.builds(RangeByteRequest, st.integers(0, 20), st.integers(0, 20)),
        st.builds(OffsetByteRequest, st.integers(0, 20)),
        st.builds(SuffixByteRequest, st.integers(0, 20)),
    ),
    value=st.binary(min_size=1, max_size=12),
)
def test_any_byte_range_of_any_value_is_a_slice(byte_range: ByteRequest, value: bytes) -> None:
    async def check() -> None:
        store = (await open_session(MemoryStorage(), inline_bytes=6)).store
        await store.set("zarr.json", buffer(array_document((1,))))
        await store.set("c/0", buffer(value))
        assert await read(store, "c/0", byte_range) == part(value, byte_range)
        await store.session.commit_async("x")
        assert await read(store, "c/0", byte_range) == part(value, byte_range)

    asyncio.run(check())


@pytest.mark.parametrize(
    "byte_range",
    [(0, 2), "0-2", 5, RangeByteRequest(-1, 3), OffsetByteRequest(-1), SuffixByteRequest(-1), slice(0, 2)],
    ids=repr,
)
@pytest.mark.parametrize("key", ["zarr.json", "a/c/0/0", "a/c/0/1"])
async def test_byte_range_that_is_none_is_refused(filled: IcechunkStore, key: str, byte_range: Any) -> None:
    with refused(filled.session, InvalidInputError, ErrorKind.INVALID_BYTE_RANGE):
        await filled.get(key, PROTOTYPE, byte_range)


async def test_partial_values_come_in_the_order_asked_for(filled: IcechunkStore) -> None:
    wanted = [(key, byte_range) for byte_range in RANGES for key in EVERYTHING] + [("a/c/2/2", None)]
    found = await filled.get_partial_values(PROTOTYPE, iter(wanted))
    assert len(found) == len(wanted)
    assert found[-1] is None
    for (key, byte_range), value in zip(wanted, found, strict=True):
        assert value is not None or key == "a/c/2/2"
        assert (None if value is None else value.to_bytes()) == await read(filled, key, byte_range)
    assert await filled.get_partial_values(PROTOTYPE, []) == []


async def test_many_keys_are_read_at_once(filled: IcechunkStore) -> None:
    wanted = [*EVERYTHING, "a/c/2/2", "none/zarr.json", "none/c/0"]
    found = [pair async for pair in filled._get_many((key, PROTOTYPE, None) for key in wanted)]
    assert {key: None if value is None else value.to_bytes() for key, value in found} == {
        **EVERYTHING,
        "a/c/2/2": None,
        "none/zarr.json": None,
        "none/c/0": None,
    }
    assert [pair async for pair in filled._get_many([])] == []


def whole(key: str, groups: list[Sequence[tuple[int, Buffer | None]]]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for i, value in (pair for group in groups for pair in group):
        assert value is not None
        assert i not in found
        found[i] = value.to_bytes()
    return found


@pytest.mark.parametrize("key", ["zarr.json", "a/c/0/0", "a/c/0/1"])
async def test_many_ranges_of_one_key_are_read_at_once(filled: IcechunkStore, key: str) -> None:
    wanted = {i: part(EVERYTHING[key], byte_range) for i, byte_range in enumerate(RANGES)}
    assert whole(key, [group async for group in filled.get_ranges(key, RANGES, prototype=PROTOTYPE)]) == wanted
    together = await asyncio.to_thread(filled.get_ranges_sync, key, RANGES, prototype=PROTOTYPE)
    assert whole(key, [together]) == wanted
    assert [group async for group in filled.get_ranges(key, [], prototype=PROTOTYPE)] == []


async def test_ranges_of_an_absent_key_are_an_error(filled: IcechunkStore) -> None:
    for key in ("a/c/2/2", "none/c/0", "none/zarr.json"):
        with pytest.raises(BaseExceptionGroup) as caught:
            async for _ in filled.get_ranges(key, [RangeByteRequest(0, 1)], prototype=PROTOTYPE):
                pass
        assert caught.group_contains(FileNotFoundError)
        with pytest.raises(BaseExceptionGroup) as caught:
            await asyncio.to_thread(filled.get_ranges_sync, key, [RangeByteRequest(0, 1)], prototype=PROTOTYPE)
        assert caught.group_contains(FileNotFoundError)


async def test_ranges_that_no_request_can_be_are_refused_before_anything_is_read(filled: IcechunkStore) -> None:
    with raises(InvalidInputError, ErrorKind.INVALID_BYTE_RANGE):
        async for _ in filled.get_ranges("a/c/0/1", [None, RangeByteRequest(-1, 1)], prototype=PROTOTYPE):
            pass


class Gathering(WrappingStorage):
    """Reads of chunks wait until a number of them is there."""

    def __init__(self, inner: Storage, number: int) -> None:
        super().__init__(inner)
        self.together = asyncio.Barrier(number)
        self.ranges: list[Any] = []

    async def get(self, key: str, byte_range: Any = None) -> GetResult:
        if key.startswith("chunks/"):
            self.ranges.append(byte_range)
            await self.together.wait()
        return await super().get(key, byte_range)


async def test_ranges_far_apart_are_requested_together_and_near_ones_as_one() -> None:
    value = np.random.default_rng(0).bytes(4_000_000)
    inner = MemoryStorage()
    repo = await Repository.create_async(inner)
    session = await repo.writable_session_async("main")
    await fill(session.store, {"a/zarr.json": array_document((1,)), "a/c/0": value})
    await session.commit_async("one large chunk")
    gathering = Gathering(inner, 40)
    store = (await (await Repository.open_async(gathering)).readonly_session_async("main")).store
    wanted = [RangeByteRequest(at + near, at + near + 5) for at in range(0, 4_000_000, 100_000) for near in (0, 8)]
    async with asyncio.timeout(20):
        groups = [
            group async for group in store.get_ranges("a/c/0", wanted[::-1], prototype=PROTOTYPE, max_gap_bytes=100)
        ]
    assert whole("a/c/0", groups) == {i: value[each.start : each.end] for i, each in enumerate(wanted[::-1])}
    assert [each.end - each.start for each in gathering.ranges] == [13] * 40


@given(
    wanted=st.lists(
        st.one_of(
            st.none(),
            st.builds(
                lambda start, size: RangeByteRequest(start, start + size), st.integers(0, 99), st.integers(0, 60)
            ),
            st.builds(OffsetByteRequest, st.integers(0, 120)),
            st.builds(SuffixByteRequest, st.integers(0, 120)),
        ),
        max_size=12,
    ),
    gap=st.integers(0, 20),
    most=st.integers(0, 90),
)
def test_joined_requests_give_what_each_alone_gives(wanted: list[ByteRequest | None], gap: int, most: int) -> None:
    value = bytes(range(100))
    joined = join_ranges(wanted, max_gap_bytes=gap, max_joined_bytes=most)
    found = {i: part(value, request)[place] for request, parts in joined for i, place in parts}
    assert found == {i: part(value, each) for i, each in enumerate(wanted)}
    spans = sorted((each.request.start, each.request.end) for each in joined if type(each.request) is RangeByteRequest)
    assert len(found) == len(wanted) == sum(len(parts) for _, parts in joined)
    for (first, last), (start, end) in pairwise(spans):
        assert start - last > gap or max(last, end) - first > most


ABSENT = [
    "b/zarr.json", "a/b/zarr.json", "b/c/0", "b/c", "a/c/1/0", "a/c/9/9", "a/c/0", "a/c/0/0/0", "a/c",
    "g/s/c/0", "g/e/c/0/0", "a/c/4294967295/0", ".zgroup", "a/.zarray", "a/.zattrs", ".zmetadata", "a/.zgroup",
]  # fmt: skip


@pytest.mark.parametrize("key", ABSENT)
async def test_absent_key_reads_as_nothing(filled: IcechunkStore, key: str) -> None:
    assert await read(filled, key) is None
    assert await read(filled, key, RangeByteRequest(0, 1)) is None
    assert not await filled.exists(key)
    with pytest.raises(FileNotFoundError, match=re.escape(repr(key))):
        await filled.getsize(key)
    if not filled.read_only:
        await filled.delete(key)
    assert await state_of(filled) == EVERYTHING


NO_KEYS = [
    "", "foo", "foo/bar", "a/c/-1/0", "a/c/0.0", "a/c/x", "a/c/0/", "a/zarr.json/", "a/c/4294967296/0", "a/c/ 0/0",
    "a/c/٣/0", "zarr.json.bak", "a/d/0/0",
]  # fmt: skip


@pytest.mark.parametrize("key", NO_KEYS)
async def test_key_that_no_hierarchy_has_is_refused(store: IcechunkStore, key: str) -> None:
    await fill(store)
    with refused(store.session, InvalidInputError, ErrorKind.INVALID_KEY):
        await store.get(key, PROTOTYPE)
    with refused(store.session, InvalidInputError, ErrorKind.INVALID_KEY):
        await store.exists(key)
    with refused(store.session, InvalidInputError, ErrorKind.INVALID_KEY):
        await store.getsize(key)
    with refused(store.session, InvalidInputError, ErrorKind.INVALID_KEY):
        await store.set(key, buffer(b"value"))
    with refused(store.session, InvalidInputError, ErrorKind.INVALID_KEY):
        await store.set_if_not_exists(key, buffer(b"value"))
    with refused(store.session, InvalidInputError, ErrorKind.INVALID_KEY):
        await store.delete(key)
    assert await state_of(store) == EVERYTHING


@pytest.mark.parametrize("key", ["/a/zarr.json", "a//zarr.json", "//a/zarr.json"])
async def test_superfluous_slashes_name_the_same_node(filled: IcechunkStore, key: str) -> None:
    assert await read(filled, key) == NODES["a/zarr.json"]


@pytest.mark.parametrize("key", ["g/c/0", "g/c", "c/0"])
async def test_chunks_of_a_group_are_refused(store: IcechunkStore, key: str) -> None:
    await fill(store)
    for call in (store.get(key, PROTOTYPE), store.exists(key), store.getsize(key), store.set(key, buffer(b"x"))):
        with refused(store.session, InvalidInputError, ErrorKind.NOT_AN_ARRAY):
            await call
    await store.delete(key)
    assert await state_of(store) == EVERYTHING


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "error", "kind"),
    [
        ("a/c/4/0", b"x", InvalidInputError, ErrorKind.INVALID_CHUNK_INDEX),
        ("a/c/0/4", b"x", InvalidInputError, ErrorKind.INVALID_CHUNK_INDEX),
        ("a/c/4294967295/0", b"x", InvalidInputError, ErrorKind.INVALID_CHUNK_INDEX),
        ("a/c/0", b"x", InvalidInputError, ErrorKind.INVALID_CHUNK_INDEX),
        ("a/c/0/0/0", b"x", InvalidInputError, ErrorKind.INVALID_CHUNK_INDEX),
        ("a/c", b"x", InvalidInputError, ErrorKind.INVALID_CHUNK_INDEX),
        ("g/s/c/0", b"x", InvalidInputError, ErrorKind.INVALID_CHUNK_INDEX),
        ("g/e/c/0/0", b"x", InvalidInputError, ErrorKind.INVALID_CHUNK_INDEX),
        ("a/c/4/0", NATIVE, InvalidInputError, ErrorKind.INVALID_CHUNK_INDEX),
        ("a/c/0", NATIVE, InvalidInputError, ErrorKind.INVALID_CHUNK_INDEX),
        ("a/c/0/0", b"", InvalidInputError, ErrorKind.ZERO_LENGTH_CHUNK),
        ("g/c/0", b"x", InvalidInputError, ErrorKind.NOT_AN_ARRAY),
        ("none/c/0", b"x", NodeNotFoundError, ErrorKind.NODE_NOT_FOUND),
        ("none/c/0", NATIVE, NodeNotFoundError, ErrorKind.NODE_NOT_FOUND),
        ("b/zarr.json", b"", InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", b"bar", InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", b"[]", InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", b"{}", InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", b'{"zarr_format": 3}', InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", b'{"node_type": "group"}', InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", b'{"zarr_format": 2, "node_type": "group"}', InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", b'{"zarr_format": 3, "node_type": "tree"}', InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", b'{"zarr_format": 3, "node_type": "group"', InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", b"\xff\xfe", InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", array_document(data_type=None), InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", array_document((2,), chunk_grid=None), InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", array_document((2,), chunk_key_encoding=None), InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", array_document((2,), (0,)), InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", array_document((-1,), (1,)), InvalidInputError, ErrorKind.BAD_METADATA),
        ("b/zarr.json", array_document((2, 2), (2,)), InvalidInputError, ErrorKind.INVALID_ARRAY_METADATA),
        ("b/zarr.json", array_document((2**40,), (1,)), InvalidInputError, ErrorKind.INVALID_ARRAY_METADATA),
        (
            "b/zarr.json",
            array_document((2, 2), dimension_names=["x"]),
            InvalidInputError,
            ErrorKind.INVALID_ARRAY_METADATA,
        ),
        ("g/zarr.json", array_document(), AlreadyExistsError, ErrorKind.NODE_ALREADY_EXISTS),
        ("a/zarr.json", group_document(), AlreadyExistsError, ErrorKind.NODE_ALREADY_EXISTS),
        (".zgroup", b'{"zarr_format": 2}', SessionStateError, ErrorKind.UNIMPLEMENTED),
        ("a/.zarray", b"{}", SessionStateError, ErrorKind.UNIMPLEMENTED),
        ("a/.zattrs", b"{}", SessionStateError, ErrorKind.UNIMPLEMENTED),
        (".zmetadata", b"{}", SessionStateError, ErrorKind.UNIMPLEMENTED),
        ("../zarr.json", group_document(), InvalidInputError, ErrorKind.INVALID_PATH),
        ("a/../../b/zarr.json", group_document(), InvalidInputError, ErrorKind.INVALID_PATH),
        ("./zarr.json", group_document(), InvalidInputError, ErrorKind.INVALID_PATH),
        ("b\ud800/zarr.json", group_document(), InvalidInputError, ErrorKind.INVALID_PATH),
    ],
)
async def test_refused_write_changes_nothing(
    store: IcechunkStore, key: str, value: bytes, error: type[IcechunkError], kind: ErrorKind
) -> None:
    await fill(store)
    with refused(store.session, error, kind):
        await store.set(key, buffer(value))
    assert await state_of(store) == EVERYTHING
    # Nor is there anything left behind that a commit would trip over.
    await store.session.commit_async("all of it")
    assert await state_of(store) == EVERYTHING


@pytest.mark.parametrize(
    "encoding",
    [
        {"name": "v2"},
        {"name": "v2", "configuration": {"separator": "."}},
        {"name": "v2", "configuration": {"separator": "/"}},
        {"name": "default", "configuration": {"separator": "."}},
        {"name": "fanout", "configuration": {"max_children": 10}},
        "v2",
    ],
    ids=json_codec.dumps,
)
async def test_other_chunk_key_encodings_are_refused_with_the_metadata(store: IcechunkStore, encoding: Any) -> None:
    with refused(store.session, InvalidInputError, ErrorKind.INVALID_ARRAY_METADATA):
        await store.set("a/zarr.json", buffer(array_document(chunk_key_encoding=encoding)))
    assert not await store.exists("a/zarr.json")


@pytest.mark.parametrize("encoding", [{"name": "default"}, {"name": "default", "configuration": {}}, "default"])
async def test_every_spelling_of_the_default_chunk_key_encoding_is_taken(store: IcechunkStore, encoding: Any) -> None:
    await store.set("a/zarr.json", buffer(array_document(chunk_key_encoding=encoding)))
    await store.set("a/c/0/0", buffer(b"x"))
    assert await read(store, "a/c/0/0") == b"x"


@pytest.mark.parametrize(
    "value", [b"x", "x", bytearray(b"x"), memoryview(b"x"), None, 1], ids=lambda v: type(v).__name__
)
async def test_value_that_is_no_buffer_is_refused(store: IcechunkStore, value: Any) -> None:
    await fill(store)
    with pytest.raises(TypeError, match=re.escape("Buffer")):
        await store.set("a/c/0/0", value)
    assert await state_of(store) == EVERYTHING


async def test_bytes_written_are_those_of_the_moment(store: IcechunkStore) -> None:
    await store.set("zarr.json", buffer(array_document((2,))))
    memory = {key: np.full(size, 1, np.uint8) for key, size in {"c/0": 10, "c/1": 2000}.items()}
    for key, array in memory.items():
        await store.set(key, cpu.Buffer.from_array_like(array))
        array[:] = 2
    for key, array in memory.items():
        assert await read(store, key) == bytes([1]) * len(array)


async def test_set_if_not_exists_keeps_an_existing_value(filled: IcechunkStore) -> None:
    if filled.read_only:
        for key in ("a/c/0/0", "a/c/2/2"):
            with pytest.raises(ReadOnlyError):
                await filled.set_if_not_exists(key, buffer(b"new"))
        return
    for key in EVERYTHING:
        await filled.set_if_not_exists(key, buffer(b"new"))
    assert await state_of(filled) == EVERYTHING
    await filled.set_if_not_exists("a/c/2/2", buffer(b"new"))
    await filled.set_if_not_exists("new/zarr.json", buffer(group_document()))
    assert await state_of(filled) == {**EVERYTHING, "a/c/2/2": b"new", "new/zarr.json": group_document()}


@pytest.mark.parametrize("call", ["set", "set_if_not_exists", "delete", "delete_dir", "clear"])
@pytest.mark.parametrize("how", ["session", "store", "committed"])
async def test_read_only_store_refuses_every_change(store: IcechunkStore, call: str, how: str) -> None:
    await fill(store)
    if how == "store":
        read_only = store.with_read_only(True)
    else:
        await store.session.commit_async("all of it")
        read_only = store if how == "committed" else IcechunkStore(store.session)
    assert read_only.read_only
    arguments = {"clear": (), "delete": ("a/c/0/0",), "delete_dir": ("g",)}.get(call, ("a/c/2/2", buffer(b"x")))
    with raises(ReadOnlyError, "read-only-store", READ_ONLY) as caught:
        await getattr(read_only, call)(*arguments)
    assert isinstance(caught.value, ValueError)
    assert await state_of(read_only) == EVERYTHING


async def test_read_only_store_of_a_read_only_session_stays_so(store: IcechunkStore) -> None:
    await fill(store)
    await store.session.commit_async("all of it")
    with raises(ReadOnlyError, "read-only-session"):
        store.with_read_only(False)


# -- deleting --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["written", "committed"])
async def writable(request: pytest.FixtureRequest) -> IcechunkStore:
    """A writable store that holds `EVERYTHING`, in its session or in its base."""
    storage = MemoryStorage()
    session = await open_session(storage)
    await fill(session.store)
    if request.param == "committed":
        await session.commit_async("all of it")
        session = await (await Repository.open_async(storage)).writable_session_async("main")
    return session.store


def without(*prefixes: str) -> dict[str, bytes]:
    return {key: value for key, value in EVERYTHING.items() if not key.startswith(prefixes)}


@pytest.mark.parametrize(
    ("directory", "prefixes"),
    [
        ("a", ("a/",)),
        ("a/", ("a/",)),
        ("/a", ("a/",)),
        ("a/c", ("a/c/",)),
        ("a/c/", ("a/c/",)),
        ("a/c/0", ("a/c/0/",)),
        ("a/c/3/", ("a/c/3/",)),
        ("a/c/2", ()),
        ("a/c/99999999999", ()),
        ("a/c/0/0", ()),
        ("a/c/0/0/0", ()),
        ("a/c/x", ()),
        ("g/s/c", ()),
        ("g", ("g/",)),
        ("g/deep", ("g/deep/",)),
        ("g/dee", ()),
        ("none", ()),
        ("zarr.json", ()),
        ("", ("",)),
        ("/", ("",)),
    ],
)
async def test_delete_dir_deletes_everything_below(
    writable: IcechunkStore, directory: str, prefixes: tuple[str, ...]
) -> None:
    await writable.delete_dir(directory)
    expected = without(*prefixes) if prefixes else EVERYTHING
    assert await state_of(writable) == expected
    if writable.session.has_uncommitted_changes:
        await writable.session.commit_async("deleted")
    assert await state_of(writable) == expected


@pytest.mark.parametrize("key", ["a/zarr.json", "g/zarr.json", "g/s/zarr.json", "zarr.json"])
async def test_deleting_metadata_takes_all_below_along(writable: IcechunkStore, key: str) -> None:
    await writable.delete(key)
    assert await state_of(writable) == without(key.removesuffix("zarr.json"))


@pytest.mark.parametrize("key", CHUNKS)
async def test_deleted_chunk_is_absent_until_it_is_written_again(writable: IcechunkStore, key: str) -> None:
    await writable.delete(key)
    assert await state_of(writable) == without(key)
    assert not await writable.exists(key)
    await writable.delete(key)
    await writable.set(key, buffer(b"again"))
    assert await state_of(writable) == {**EVERYTHING, key: b"again"}
    await writable.session.commit_async("again")
    assert await state_of(writable) == {**EVERYTHING, key: b"again"}


async def test_clear_deletes_everything(writable: IcechunkStore) -> None:
    await writable.clear()
    assert await collect(writable.list()) == []
    assert await writable.is_empty("")
    assert await writable.getsize_prefix("") == 0
    await fill(writable)
    assert await state_of(writable) == EVERYTHING
    await writable.clear()
    await writable.clear()
    if writable.session.has_uncommitted_changes:
        await writable.session.commit_async("cleared")
    assert await collect(writable.list()) == []


async def test_array_made_again_at_the_same_place_has_no_old_chunks(writable: IcechunkStore) -> None:
    await writable.delete("a/zarr.json")
    await writable.set("a/zarr.json", buffer(NODES["a/zarr.json"]))
    assert await state_of(writable) == without("a/c/")
    await writable.session.commit_async("made again")
    assert await state_of(writable) == without("a/c/")


# -- listing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directory", [
    "", "/", "a", "a/", "a/c", "a/c/", "a/c/0", "a/c/0/", "a/c/0/0", "a/c/0/0/", "a/c/2", "a/c/0/0/0", "a/c/x",
    "a/c/99999999999", "g", "g/s", "g/s/c", "g/s/c/", "g/e", "g/e/c", "g/deep", "g/deep/er", "g/dee", "none", "none/c",
    "zarr.json", "a/zarr.json", "c", "c/0",
])  # fmt: skip
async def test_listings_are_those_of_the_keys(filled: IcechunkStore, directory: str) -> None:
    below = f"{directory.strip('/')}/".lstrip("/")
    names = {key.removeprefix(below).split("/")[0] for key in EVERYTHING if key.startswith(below)}
    # An array has a folder of chunks even where none was written, as with the official library.
    names |= {"c"} if directory == "g/e" else set()
    assert await collect(filled.list_dir(directory)) == sorted(names)
    assert await filled.is_empty(directory) == (not names)
    expected = sorted(key for key in EVERYTHING if key.startswith(below))
    assert await collect(filled.list_prefix(below)) == expected
    assert await filled.getsize_prefix(directory) == sum(len(EVERYTHING[key]) for key in expected)


@pytest.mark.parametrize("prefix", ["a", "g", "g/de", "g/s", "z", "a/c/0/0", "a/z", "a/c/3/", "nothing", "a/c"])
async def test_prefix_need_not_be_a_directory(filled: IcechunkStore, prefix: str) -> None:
    assert await collect(filled.list_prefix(prefix)) == sorted(key for key in EVERYTHING if key.startswith(prefix))


# -- objects deleted or changed outside the session ---------------------------------------------------------------


@pytest.mark.parametrize("byte_range", [None, RangeByteRequest(1, 4)])
async def test_missing_chunk_object_is_an_error_and_never_fill_values(byte_range: ByteRequest | None) -> None:
    storage = MemoryStorage()
    store = (await open_session(storage)).store
    await fill(store)
    await store.session.commit_async("all of it")
    chunks = [info.key async for page in storage.list_pages("chunks/") for info in page]
    await storage.delete(chunks)
    with raises(StorageError, "object-not-found", storage.describe()) as caught:
        await read(store, "a/c/0/1", byte_range)
    assert isinstance(caught.value.__cause__, ObjectNotFoundError)
    assert await read(store, "a/c/0/0", byte_range) is not None


@pytest.mark.parametrize("size", [10, 1_000, 100_000, 2_000_000])
async def test_a_stored_value_does_not_change_with_the_array_it_came_from(size: int) -> None:
    repo = await Repository.create_async(MemoryStorage())
    session = await repo.writable_session_async("main")
    await session.store.set("a/zarr.json", buffer(array_document((1,))))
    array = np.random.default_rng(0).integers(1, 256, size, dtype=np.uint8)
    kept = array.tobytes()
    await session.store.set("a/c/0", cpu.Buffer.from_array_like(array.view("B")))
    array[:] = 0
    assert await read(session.store, "a/c/0") == kept
    await session.commit_async("changed afterwards")
    array[:] = 1
    reopened = (await repo.readonly_session_async("main")).store
    assert await read(reopened, "a/c/0") == kept


def test_immutable_bytes_are_stored_without_a_copy_and_no_others() -> None:
    data = bytes(range(256)) * 4
    assert _bytes_of(cpu.Buffer.from_bytes(data)) is data
    whole = np.frombuffer(data, "B")
    for other in (whole[1:], np.frombuffer(bytearray(data), "B"), whole.copy(), np.frombuffer(data * 2, "B")[:1024]):
        found = _bytes_of(cpu.Buffer.from_array_like(other))
        assert found is not data
        assert bytes(found) == other.tobytes()


@pytest.mark.parametrize("size", [1, 1000], ids=["inline", "native"])
@pytest.mark.parametrize("committed", [False, True], ids=["new array", "committed array"])
async def test_of_several_calls_at_once_that_write_a_key_unless_it_exists_exactly_one_writes(
    size: int, committed: bool
) -> None:
    repository = await Repository.create_async(MemoryStorage())
    session = await repository.writable_session_async("main")
    await session.store.set("a/zarr.json", buffer(array_document()))
    await session.store.set("a/c/0/0", buffer(b"\0" * size))
    if committed:
        await session.commit_async("array")
        session = await repository.writable_session_async("main")
    store = session.store
    values = [bytes([i]) * size for i in range(1, 4)]
    for key in ("a/c/0/0", "a/c/1/1"):
        await asyncio.gather(*(store.set_if_not_exists(key, buffer(value)) for value in values))
    assert await read(store, "a/c/0/0") == b"\0" * size
    assert await read(store, "a/c/1/1") == values[0]
    await store.delete("a/c/0/0")
    await asyncio.gather(*(store.set_if_not_exists("a/c/0/0", buffer(value)) for value in values))
    assert await read(store, "a/c/0/0") == values[0]
    await store.set_if_not_exists("a/zarr.json", buffer(group_document()))
    assert await read(store, "a/zarr.json") == array_document()


async def test_a_key_written_unless_it_exists_is_decided_when_it_is_written_not_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository = await Repository.create_async(MemoryStorage())
    session = await repository.writable_session_async("main")
    store = session.store
    await store.set("a/zarr.json", buffer(array_document()))
    put = session._content.puts.put

    async def overtaken(data: bytes | memoryview) -> tuple[ObjectId, int]:
        await store.set("a/c/0/0", buffer(b"other"))
        return await put(data)

    # As if the pool were full: another writer comes first while this one waits for room.
    monkeypatch.setattr(session._content.puts, "put_nowait", lambda data: None)
    monkeypatch.setattr(session._content.puts, "put", overtaken)
    await store.set_if_not_exists("a/c/0/0", buffer(bytes(1000)))
    assert await read(store, "a/c/0/0") == b"other"


@pytest.mark.parametrize("version", [1, 2, None])
@pytest.mark.parametrize("attributes", [rb'{"a":"caf\udce9"}', rb'{"\ud800":1}', b'{"a":1E400}'])
async def test_json_that_others_parse_is_kept_byte_for_byte(version: int | None, attributes: bytes) -> None:
    repository = await Repository.create_async(MemoryStorage(), spec_version=version)
    session = await repository.writable_session_async("main")
    documents = {
        "zarr.json": group_document().replace(b'"attributes":{}', b'"attributes":' + attributes),
        "a/zarr.json": array_document((4,)).replace(b'"attributes":{}', b'"attributes":' + attributes),
    }
    for key, document in documents.items():
        assert attributes in document
        await session.store.set(key, buffer(document))
    await session.store.set("a/c/0", buffer(b"1"))
    await session.commit_async("kept")
    reader = await repository.readonly_session_async("main")
    assert {key: await read(reader.store, key) for key in documents} == documents


async def test_a_number_that_json_does_not_have_is_refused_with_the_attribute_that_has_it() -> None:
    session = await open_session(MemoryStorage())
    document = group_document(a=1).replace(b"1}", b"NaN}")
    with refused(session, InvalidInputError, ErrorKind.BAD_METADATA):
        await session.store.set("zarr.json", buffer(document))


async def test_arrays_with_other_grids_are_refused_at_their_creation_in_format_1_only() -> None:
    grid = {"name": "rectilinear", "configuration": {"kind": "inline", "chunk_shapes": [[1, 3]]}}
    document = array_document((4,), chunk_grid=grid)
    for version in (1, 2):
        repository = await Repository.create_async(MemoryStorage(), spec_version=version)
        session = await repository.writable_session_async("main")
        if version == 1:
            with refused(session, InvalidInputError, ErrorKind.INVALID_ARRAY_METADATA):
                await session.store.set("a/zarr.json", buffer(document))
        else:
            await session.store.set("a/zarr.json", buffer(document))
            await session.commit_async("made")
