"""Writing virtual references: what is taken, what is refused, and that a refusal writes nothing."""

from __future__ import annotations

import asyncio
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import icechunk
from icechunk import ErrorKind, IcechunkError, IcechunkStore, InvalidInputError, ReadOnlyError, VirtualChunkSpec
from tests.store.store_builders import read, refused
from tests.virtual_builders import FILE_BYTES, array, local_repository, prefix_of, session_on

LENGTH = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(FILE_BYTES)
    return tmp_path


@pytest.fixture
async def store(folder: Path) -> IcechunkStore:
    """An array ``a`` of 2 by 3 chunks of four bytes."""
    store = (await session_on(folder)).store
    await asyncio.to_thread(array, store, (4, 6), (2, 2))
    return store


def u64(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


async def types(store: IcechunkStore) -> dict[tuple[int, int], str]:
    return {
        (i, j): (await store.session.chunk_type_async("/a", [i, j])).name
        for i in range(2)
        for j in range(3)
        if (await store.session.chunk_type_async("/a", [i, j])).value
    }


@pytest.mark.parametrize(
    ("key", "more", "kind"),
    [
        ("a/c/2/0", {}, ErrorKind.INVALID_CHUNK_INDEX),
        ("a/c/0", {}, ErrorKind.INVALID_CHUNK_INDEX),
        ("a/c/0/0/0", {}, ErrorKind.INVALID_CHUNK_INDEX),
        ("a/c/0/0/", {}, ErrorKind.INVALID_KEY),
        ("", {}, ErrorKind.INVALID_KEY),
        ("x y", {}, ErrorKind.INVALID_KEY),
        ("c/0", {}, ErrorKind.NOT_AN_ARRAY),
        ("a/c/0/0", {"location": "f"}, ErrorKind.INVALID_VIRTUAL_REF),
        ("a/c/0/0", {"location": ""}, ErrorKind.INVALID_VIRTUAL_REF),
        ("a/c/0/0", {"location": "s3://"}, ErrorKind.INVALID_VIRTUAL_REF),
        ("a/c/0/0", {"location": "s3://no/x"}, ErrorKind.NO_CONTAINER_FOR_VIRTUAL_CHUNK),
        ("a/c/0/0", {"location": "vcc://no/x"}, ErrorKind.NO_CONTAINER_FOR_VIRTUAL_CHUNK),
        ("a/c/0/0", {"location": "vcc:///x"}, ErrorKind.NO_CONTAINER_FOR_VIRTUAL_CHUNK),
        ("a/c/0/0", {"length": 0}, ErrorKind.ZERO_LENGTH_CHUNK),
        ("a/c/0/0", {"offset": 2**64 - 2}, ErrorKind.INVALID_VIRTUAL_REF),
        ("a/c/0/0", {"checksum": "two\nlines"}, ErrorKind.INVALID_VIRTUAL_REF),
        ("a/c/0/0", {"checksum": datetime(1960, 1, 1, tzinfo=UTC)}, ErrorKind.INVALID_VIRTUAL_REF),
        ("a/c/0/0", {"checksum": datetime(2300, 1, 1, tzinfo=UTC)}, ErrorKind.INVALID_VIRTUAL_REF),
    ],
)
async def test_a_bad_reference_is_refused_and_nothing_is_written(
    folder: Path, store: IcechunkStore, key: str, more: dict[str, Any], kind: ErrorKind
) -> None:
    with refused(store.session, InvalidInputError, kind):
        await store.set_virtual_ref_async(
            key, **{"location": prefix_of(folder) + "f", "offset": 0, "length": LENGTH, **more}
        )


async def test_arguments_of_wrong_types_are_type_errors(folder: Path, store: IcechunkStore) -> None:
    location = prefix_of(folder) + "f"
    wrong: list[dict[str, Any]] = [
        {"checksum": datetime(2020, 1, 1)},
        {"checksum": 5},
        {"location": 5},
        {"offset": "1"},
    ]
    for more in wrong:
        with pytest.raises(TypeError):
            await store.set_virtual_ref_async(
                "a/c/0/0", **{"location": location, "offset": 0, "length": LENGTH, **more}
            )
    with pytest.raises(OverflowError):
        await store.set_virtual_ref_async("a/c/0/0", location, offset=-1, length=LENGTH)
    with pytest.raises(TypeError):
        await store.set_virtual_refs_async("a", [("a", 1)])  # type: ignore[list-item]
    assert await types(store) == {}


async def test_metadata_and_missing_arrays_take_no_reference(folder: Path, store: IcechunkStore) -> None:
    location = prefix_of(folder) + "f"
    with pytest.raises(icechunk.SessionStateError) as caught:
        await store.set_virtual_ref_async("a/zarr.json", location, offset=0, length=LENGTH)
    assert caught.value.kind == ErrorKind.NOT_ALLOWED
    for write in (
        store.set_virtual_ref_async("b/c/0", location, offset=0, length=LENGTH),
        store.set_virtual_refs_async("b", []),
        store.set_virtual_refs_arr_async("b", (0,), [], u64(), u64()),
    ):
        with pytest.raises(icechunk.NodeNotFoundError):
            await write


async def test_references_no_container_holds_are_returned_and_the_others_written(
    folder: Path, store: IcechunkStore
) -> None:
    location = prefix_of(folder) + "f"
    specs = [
        VirtualChunkSpec([1, 0], location, 0, LENGTH),
        VirtualChunkSpec([1, 1], "s3://no/f", 4, LENGTH),
        VirtualChunkSpec([0, 1], "vcc://no/x", 0, LENGTH),
        VirtualChunkSpec([0, 2], "vcc://local/f", 8, LENGTH),
    ]
    assert await store.set_virtual_refs_async("a/", specs) == [(1, 1), (0, 1)]
    assert await types(store) == {(1, 0): "virtual", (0, 2): "virtual"}
    assert await store.set_virtual_refs_async("/a", specs, validate_containers=False) is None
    assert len(await types(store)) == 4
    assert await store.set_virtual_refs_async("/a", []) is None


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (VirtualChunkSpec([9, 9], "file:///x", 0, 4), ErrorKind.INVALID_CHUNK_INDEX),
        (VirtualChunkSpec([0], "file:///x", 0, 4), ErrorKind.INVALID_CHUNK_INDEX),
        (VirtualChunkSpec([0, 0], "nourl", 0, 4), ErrorKind.INVALID_VIRTUAL_REF),
        (VirtualChunkSpec([0, 0], "", 0, 4), ErrorKind.INVALID_VIRTUAL_REF),
        (VirtualChunkSpec([0, 0], "file:///x", 0, 0), ErrorKind.ZERO_LENGTH_CHUNK),
        (VirtualChunkSpec([0, 0], "file:///x", 2**64 - 1, 4), ErrorKind.INVALID_VIRTUAL_REF),
    ],
)
async def test_one_bad_reference_of_many_refuses_all(
    folder: Path, store: IcechunkStore, spec: VirtualChunkSpec, kind: ErrorKind
) -> None:
    good = VirtualChunkSpec([0, 1], prefix_of(folder) + "f", 0, LENGTH)
    with refused(store.session, InvalidInputError, kind):
        await store.set_virtual_refs_async("a", [good, spec], validate_containers=False)


async def test_references_that_end_before_byte_2_64_are_taken_whatever_the_others_are(
    folder: Path, store: IcechunkStore
) -> None:
    locations = [prefix_of(folder) + name for name in "fgh"]
    offsets, lengths = u64(2**64 - 8, 0, 5), u64(7, 2**63, 1)
    assert await store.set_virtual_refs_arr_async("a", (1, 3), locations, offsets, lengths) is None
    assert len(await types(store)) == 3
    with refused(store.session, InvalidInputError, ErrorKind.INVALID_VIRTUAL_REF):
        await store.set_virtual_refs_arr_async("a", (1, 3), locations, offsets, u64(8, 2**63, 1))


async def test_groups_take_no_references(store: IcechunkStore) -> None:
    await asyncio.to_thread(zarr.create_group, store, path="g")
    for write in (store.set_virtual_refs_async("g", []), store.set_virtual_refs_arr_async("g", (0,), [], u64(), u64())):
        with pytest.raises(InvalidInputError) as caught:
            await write
        assert caught.value.kind == ErrorKind.NOT_AN_ARRAY


async def test_a_box_of_references_is_laid_out_in_c_order(folder: Path, store: IcechunkStore) -> None:
    location = prefix_of(folder) + "f"
    offsets = np.arange(6, dtype=np.uint64) * np.uint64(LENGTH)
    assert (
        await store.set_virtual_refs_arr_async("a", (2, 3), [location] * 6, offsets, np.full(6, 4, np.uint64)) is None
    )
    for row in range(6):
        assert await read(store, f"a/c/{row // 3}/{row % 3}") == FILE_BYTES[4 * row : 4 * row + 4]
    assert (
        await store.set_virtual_refs_arr_async(
            "a", (1, 2), [location] * 2, u64(100, 200), u64(4, 4), arr_offset=(1, 1), checksum=datetime.now(UTC)
        )
        is None
    )
    assert await read(store, "a/c/1/1") == FILE_BYTES[100:104]
    assert await read(store, "a/c/1/2") == FILE_BYTES[200:204]
    assert await read(store, "a/c/1/0") == FILE_BYTES[12:16]


async def test_empty_locations_leave_their_chunks_as_they_are(folder: Path, store: IcechunkStore) -> None:
    location = prefix_of(folder) + "f"
    locations = [location, "", "s3://no/x", "", location, ""]
    lengths = u64(4, 0, 4, 0, 4, 0)
    assert await store.set_virtual_refs_arr_async("a", (2, 3), locations, u64(*range(6)), lengths) == [(0, 2)]
    assert await types(store) == {(0, 0): "virtual", (1, 1): "virtual"}
    offset = await store.set_virtual_refs_arr_async("a", (1, 1), ["s3://no/x"], u64(0), u64(4), arr_offset=(1, 2))
    assert offset == [(1, 2)]


async def test_boxes_that_do_not_fit_are_refused(folder: Path, store: IcechunkStore) -> None:
    location = prefix_of(folder) + "f"

    async def box(shape: tuple[int, ...], count: int, **more: Any) -> Any:
        arguments = {"offsets": np.zeros(count, np.uint64), "lengths": np.full(count, 4, np.uint64), **more}
        return await store.set_virtual_refs_arr_async("a", shape, [location] * count, **arguments)

    kind = ErrorKind.INVALID_CHUNK_INDEX
    for shape, count, more in [
        ((3, 3), 9, {}),
        ((6,), 6, {}),
        ((2, 3), 6, {"arr_offset": (1, 0)}),
        ((1, 1, 1), 1, {}),
    ]:
        with refused(store.session, InvalidInputError, kind):
            await box(shape, count, **more)
    mismatched: list[tuple[tuple[int, ...], int, dict[str, Any]]] = [
        ((2, 2), 6, {}),
        ((1, 3), 3, {"arr_offset": (1,)}),
        ((2, 3), 6, {"offsets": u64(1)}),
        ((2, 3), 6, {"lengths": u64(1)}),
    ]
    for shape, count, options in mismatched:
        with pytest.raises(ValueError, match=re.escape("length")):
            await box(shape, count, **options)
    for bad in (np.zeros(6, np.int64), [0] * 6, np.zeros((2, 3), np.uint64)):
        with pytest.raises(TypeError):
            await box((2, 3), 6, offsets=bad)
    with pytest.raises(OverflowError):
        await box((1, 3), 3, arr_offset=(-1, 0))
    with refused(store.session, InvalidInputError, ErrorKind.ZERO_LENGTH_CHUNK):
        await box((2, 3), 6, lengths=u64(4, 4, 4, 0, 4, 4))
    assert await box((0, 3), 0) is None


async def test_the_log_does_not_change_when_the_caller_changes_its_columns(folder: Path, store: IcechunkStore) -> None:
    offsets = u64(*range(0, 24, 4))
    await store.set_virtual_refs_arr_async(
        "a", (2, 3), [prefix_of(folder) + "f"] * 6, offsets, np.full(6, 4, np.uint64)
    )
    offsets[:] = 500
    assert await read(store, "a/c/0/1") == FILE_BYTES[4:8]


async def test_scalar_arrays_take_a_reference(folder: Path) -> None:
    store = (await session_on(folder)).store
    scalar = await asyncio.to_thread(array, store, (), ())
    await store.set_virtual_ref_async("a/c", prefix_of(folder) + "f", offset=3, length=1)
    assert await asyncio.to_thread(lambda: int(np.asarray(scalar[()]))) == FILE_BYTES[3]
    await store.set_virtual_refs_arr_async("a", (), [prefix_of(folder) + "f"], u64(4), u64(1))
    assert await asyncio.to_thread(lambda: int(np.asarray(scalar[()]))) == FILE_BYTES[4]


async def test_read_only_stores_refuse_references(folder: Path) -> None:
    repository = await local_repository(folder)
    store = (await repository.readonly_session_async("main")).store
    writable = (await repository.writable_session_async("main")).store.with_read_only(True)
    for place in (store, writable):
        for write in (
            place.set_virtual_ref_async("a/c/0", "file:///x", offset=0, length=1),
            place.set_virtual_refs_async("a", []),
            place.set_virtual_refs_arr_async("a", (0,), [], u64(), u64()),
        ):
            with pytest.raises(ReadOnlyError) as caught:
                await write
            assert caught.value.kind == ErrorKind.READ_ONLY_STORE


def test_synchronous_twins_write_the_same(folder: Path) -> None:
    repository = asyncio.run(local_repository(folder))
    store = repository.writable_session("main").store
    found = array(store, (4, 6), (2, 2))
    location = prefix_of(folder) + "f"
    store.set_virtual_ref("a/c/0/0", location, offset=0, length=4)
    assert store.set_virtual_refs("a", [VirtualChunkSpec([0, 1], "s3://no/x", 4, 4)]) == [(0, 1)]
    store.set_virtual_refs_arr("a", (1, 1), [location], u64(8), u64(4), arr_offset=(1, 2))
    assert np.asarray(found[:2, :2]).tobytes() == FILE_BYTES[:4]
    assert np.asarray(found[2:, 4:]).tobytes() == FILE_BYTES[8:12]
    assert (np.asarray(found[:2, 2:]) == 7).all()


# -- looking at references --------------------------------------------------------------------------------------------


async def test_all_references_of_an_array_come_in_batches(folder: Path) -> None:
    repository = await local_repository(folder)
    store = (await repository.writable_session_async("main")).store
    location = prefix_of(folder) + "f"
    await asyncio.to_thread(array, store, (4, 6), (2, 2))
    values = np.full(6, 4, np.uint64)
    await store.set_virtual_refs_arr_async("a", (2, 3), [location] * 6, u64(*range(0, 24, 4)), values)
    await store.session.commit_async("six")
    session = await repository.writable_session_async("main")
    store = session.store
    await store.set_virtual_ref_async("a/c/0/1", "vcc://local/f", offset=77, length=4)
    await store.delete("a/c/1/2")
    stored = zarr.open_array(store, path="a")
    await asyncio.to_thread(stored.__setitem__, (slice(2, 4), slice(0, 2)), np.arange(4).reshape(2, 2))
    expected = {
        (0, 0): (2, location, 0, 4),
        (0, 1): (2, location, 77, 4),
        (0, 2): (2, location, 8, 4),
        (1, 0): (3, "", 0, 4),
        (1, 1): (2, location, 16, 4),
    }
    for size in (1, 2, 3, 5, 100):
        found: dict[tuple[int, ...], tuple[Any, ...]] = {}
        sizes = []
        async for coords, kinds, locations, offsets, lengths, inline in store.array_chunk_iterator("a", size):
            assert [c.dtype for c in (coords, kinds, offsets, lengths)] == [np.uint32, np.uint8, np.uint64, np.uint64]
            sizes.append(len(coords))
            for i, row in enumerate(coords.tolist()):
                found[tuple(row)] = (int(kinds[i]), locations[i], int(offsets[i]), int(lengths[i]))
                assert inline.get(i) == (bytes(range(4)) if row == [1, 0] else None)
        assert found == expected
        assert all(n == size for n in sizes[:-1])
        assert sum(sizes) == 5
    assert sorted(await session.all_virtual_chunk_locations_async()) == [location] * 4
    assert {c async for c in session.chunk_coordinates("/a")} == set(expected)
    assert [batch async for batch in store.array_chunk_iterator("/nothing")] == []
    with pytest.raises(ValueError, match=re.escape("batch_size")):
        [batch async for batch in store.array_chunk_iterator("/a", 0)]


async def test_native_chunks_are_listed_by_their_id(folder: Path) -> None:
    store = (await session_on(folder)).store
    big = await asyncio.to_thread(array, store, (4000,), (2000,))
    await asyncio.to_thread(big.__setitem__, slice(None), 1)
    batches = [batch async for batch in store.array_chunk_iterator("a")]
    assert batches[0][1].tolist() == [1, 1]
    assert all(len(name) == 20 for name in batches[0][2])
    assert batches[0][4].tolist() == [2000, 2000]


async def test_locations_of_unknown_containers_are_an_error_when_listed(store: IcechunkStore) -> None:
    await store.set_virtual_ref_async("a/c/0/0", "vcc://no/f", offset=0, length=4, validate_container=False)
    for listing in (store.session.all_virtual_chunk_locations_async(), anext(store.array_chunk_iterator("a"))):
        with pytest.raises(IcechunkError) as caught:
            await listing
        assert caught.value.kind == ErrorKind.NO_CONTAINER_FOR_VIRTUAL_CHUNK
    await store.delete("a/c/0/0")
    assert await store.session.all_virtual_chunk_locations_async() == []


async def test_the_one_chunk_of_an_array_without_dimensions_may_be_called_a_box_of_ones(folder: Path) -> None:
    session = await session_on(folder)
    await asyncio.to_thread(array, session.store, (), ())
    for shape in ((), (1,), (1, 1)):
        assert (
            await session.store.set_virtual_refs_arr_async(
                "a", shape, [prefix_of(folder) + "f"], u64(len(shape)), u64(LENGTH)
            )
            is None
        )
        assert await read(session.store, "a/c") == FILE_BYTES[len(shape) : len(shape) + LENGTH]
    for shape, corner, count in (((1,), (1,), 1), ((2,), None, 2)):
        with refused(session, InvalidInputError, ErrorKind.INVALID_CHUNK_INDEX):
            await session.store.set_virtual_refs_arr_async(
                "a", shape, [prefix_of(folder) + "f"] * count, u64(*range(count)), u64(*[LENGTH] * count),
                arr_offset=corner,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("modified", "checksum", "unchanged"),
    [(0, 0, True), (0.3, 0.3, True), (0.3, 0, False), (0.3, 1, True), (0.9, 0.5, True), (1.2, 0.5, False)],
)
async def test_times_as_checksums_count_in_fractions_where_the_store_has_them(
    folder: Path, store: IcechunkStore, modified: float, checksum: float, unchanged: bool
) -> None:
    os.utime(folder / "f", (1_700_000_000 + modified,) * 2)
    await store.set_virtual_ref_async(
        "a/c/0/0",
        prefix_of(folder) + "f",
        offset=0,
        length=LENGTH,
        checksum=datetime.fromtimestamp(1_700_000_000 + checksum, UTC),
    )
    if unchanged:
        assert await read(store, "a/c/0/0") == FILE_BYTES[:LENGTH]
    else:
        with pytest.raises(IcechunkError) as changed:
            await read(store, "a/c/0/0")
        assert changed.value.kind == ErrorKind.VIRTUAL_CHUNK_MODIFIED


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from(["a", "b", "c", "d/e", "", "./f"]), min_size=6, max_size=6), ascending=st.booleans()
)
async def test_each_location_stays_with_its_chunk_in_any_order(
    folder: Path, store: IcechunkStore, names: list[str], ascending: bool
) -> None:
    await store.delete_dir("a/c")
    names = sorted(names) if ascending else names
    locations = [name and prefix_of(folder) + name for name in names]
    await store.set_virtual_refs_arr_async("a", (2, 3), locations, u64(*range(6)), np.full(6, 4, np.uint64))
    found: dict[Any, str] = {}
    async for coords, _, places, *_rest in store.array_chunk_iterator("a"):
        found.update(zip(map(tuple, coords.tolist()), places, strict=True))
    expected = {(i // 3, i % 3): place.replace("/./", "/") for i, place in enumerate(locations) if place}
    assert found == expected


@pytest.mark.parametrize(
    ("spec_version", "configured", "compressed"), [(None, False, 0), (None, True, 1000), (2, False, 1000)]
)
async def test_locations_of_a_log_are_compressed_one_by_one_only_where_that_is_configured(
    spec_version: int | None, configured: bool, compressed: int
) -> None:
    config = icechunk.RepositoryConfig.default()
    if configured:
        how = icechunk.ManifestVirtualChunkLocationCompressionConfig()
        config.manifest = icechunk.ManifestConfig(virtual_chunk_location_compression=how)
    storage = icechunk.in_memory_storage()
    repo = await icechunk.Repository.create_async(storage, config, spec_version=spec_version)
    session = await repo.writable_session_async("main")
    await asyncio.to_thread(array, session.store, (1000,), (1,))
    urls = [f"s3://bucket/a/folder/{number:05d}/measured-ü-{number * number}.nc" for number in range(1000)]
    session.store.set_virtual_refs_arr(
        "a", (1000,), urls, np.zeros(1000, np.uint64), np.ones(1000, np.uint64), validate_containers=False
    )
    snapshot = await session.commit_async("references")
    (manifest,) = await repo.list_manifest_files_async(snapshot)
    found = (await repo.inspect_manifest_async(manifest.id))["compression"]
    assert found["uses_location_compression"] == bool(compressed)
    assert found.get("num_compressed_refs", 0) == compressed
    reopened = await icechunk.Repository.open_async(storage)
    reader = await reopened.readonly_session_async("main")
    assert sorted(await reader.all_virtual_chunk_locations_async()) == sorted(urls)
