"""The manifests that sessions fetch before they are needed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import icechunk
from icechunk.config import EngineConfig
from icechunk.config.manifest_rules import manifests_to_preload
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.snapshot.codec import decode_snapshot, encode_snapshot
from icechunk.format.snapshot.nodes import SnapshotNodes, array_paths
from icechunk.format.values import DimensionShape, ManifestFile, ManifestRef, NodeKind, NodeSnapshot, Snapshot
from icechunk.storage.port import Storage
from icechunk.testing.recording import RecordingStorage
from tests.inside import core_of

Condition = icechunk.ManifestPreloadCondition


def snapshot(**arrays: list[int]) -> Snapshot:
    """Arrays by name (``g__a`` is ``g/a``), each with manifests of so many references."""
    nodes, files = {}, {}
    for name in sorted(arrays):
        path = "/" + name.replace("__", "/")
        refs = []
        for i, size in enumerate(arrays[name]):
            id = ObjectId(f"{name}{i}".encode().ljust(12)[:12])
            refs.append(ManifestRef(id, ((i, i + 1),)))
            files[id] = ManifestFile(id, 1, size)
        nodes[path] = NodeSnapshot(
            id=NodeId(name.encode().ljust(8)[:8]),
            path=path,
            kind=NodeKind.ARRAY,
            user_data=b"{}",
            shape=(DimensionShape(9, 9),),
            manifests=tuple(refs),
        )
    return Snapshot(id=ObjectId(bytes(12)), nodes=nodes, flushed_at_us=1, message="", manifest_files=files)


def chosen(snapshot: Snapshot, config: icechunk.ManifestPreloadConfig | None = None) -> list[str]:
    return [id.decode().strip() for id in manifests_to_preload(config, snapshot)]


def preload(condition: Condition, **limits: int) -> icechunk.ManifestPreloadConfig:
    return icechunk.ManifestPreloadConfig(preload_if=condition, **limits)


def test_the_default_is_small_arrays_that_look_like_coordinates_as_official() -> None:
    yes = (
        "altitude day depth gdept gphit height2 hght i isotherm j lat lat1 latlon level_2 lon lv_x1 min5 month nav_lat"
    )
    yes += " nlat olev pressure rlat t time time2 x xlong ylat year2020 z zz9"
    no = "LAT Time a1 date foo hour_1 lat_rho mytime o_lev plev pres1x t1 times theta x1 xc xlat y1 z9z"
    assert chosen(snapshot(**{name: [3] for name in yes.split()})) == [f"{name}0" for name in sorted(yes.split())]
    assert chosen(snapshot(**{name: [3] for name in no.split()})) == []
    assert chosen(snapshot(lat=[999], lon=[1000], time=[1001], x=[2000])) == ["lat0", "lon0"]
    assert chosen(snapshot(g__time=[2])) == ["g__time0"]


def test_conditions_combine() -> None:
    found = snapshot(a=[8], b=[5], c=[2], d=[1])
    assert chosen(found, preload(Condition.true())) == ["a0", "b0", "c0", "d0"]
    assert chosen(found, preload(Condition.false())) == []
    assert chosen(found, preload(Condition.num_refs(2, 5))) == ["c0"]
    assert chosen(found, preload(Condition.num_refs(None, 5))) == ["c0", "d0"]
    assert chosen(found, preload(Condition.num_refs(5, None))) == ["a0", "b0"]
    assert chosen(found, preload(Condition.num_refs(2, None) & Condition.name_matches("[bd]"))) == ["b0"]
    assert chosen(found, preload(Condition.path_matches("^/a") | Condition.name_matches("^d$"))) == ["a0", "d0"]
    assert chosen(found, preload(Condition.or_conditions([]))) == []
    assert chosen(found, preload(Condition.and_conditions([]))) == ["a0", "b0", "c0", "d0"]
    assert chosen(found, preload(Condition.name_matches("("))) == []


def test_limits_of_references_and_arrays_hold() -> None:
    found = snapshot(a=[8], b=[5], c=[2], d=[1])
    everything = Condition.true()
    assert chosen(found, preload(everything, max_total_refs=10)) == ["a0", "c0"]
    assert chosen(found, preload(everything, max_total_refs=7)) == ["b0", "c0"]
    assert chosen(found, preload(everything, max_total_refs=0)) == []
    assert chosen(found, preload(everything, max_arrays_to_scan=2)) == ["a0", "b0"]
    assert chosen(found, preload(everything, max_arrays_to_scan=0)) == []
    assert chosen(snapshot(a=[3, 3, 3, 1]), preload(everything, max_total_refs=6)) == ["a0", "a1"]


async def written(storage: Storage) -> str:
    options = icechunk.RepositoryConfig.default()
    options.inline_chunk_threshold_bytes = 0
    # Files that `repo` or the log brings along are not fetched at all.
    options.engine = EngineConfig(share_manifests_below_refs=0, small_commit_bytes=0)
    repo = await icechunk.Repository.create_async(storage, options)
    session = await repo.writable_session_async("main")
    for name in ("time", "values"):
        array = await zarr.api.asynchronous.create_array(
            session.store, name=name, shape=(4,), chunks=(1,), dtype="i4", dimension_names=("time",)
        )
        await array.setitem(slice(None), np.arange(1, 5))
    tip = await session.commit_async("written")
    await repo.aclose()
    return tip


@pytest.mark.parametrize("kind", ["readonly", "writable", "rearrange"])
async def test_a_session_fetches_in_the_background_and_reads_without_another_request(kind: str) -> None:
    storage = RecordingStorage(icechunk.in_memory_storage())
    await written(storage)
    repo = await icechunk.Repository.open_async(storage)
    storage.clear()
    session = await getattr(repo, f"{kind}_session_async")("main")
    await core_of(repo).preloaded()
    assert storage.count("get", "manifests/") == 1
    await (await zarr.api.asynchronous.open_array(store=session.store, path="time", mode="r")).getitem(0)
    assert storage.count("get", "manifests/") == 1
    await (await zarr.api.asynchronous.open_array(store=session.store, path="values", mode="r")).getitem(0)
    assert storage.count("get", "manifests/") == 2
    await repo.readonly_session_async("main")
    await core_of(repo).preloaded()
    assert storage.count("get", "manifests/") == 2


async def test_settings_decide_and_can_turn_it_off() -> None:
    storage = RecordingStorage(icechunk.in_memory_storage())
    await written(storage)
    for config, expected in [
        (preload(Condition.false()), 0),
        (icechunk.ManifestPreloadConfig(max_total_refs=0), 0),
        (preload(Condition.true()), 2),
    ]:
        options = icechunk.RepositoryConfig(manifest=icechunk.ManifestConfig(preload=config))
        repo = await icechunk.Repository.open_async(storage, options)
        storage.clear()
        await repo.readonly_session_async("main")
        await core_of(repo).preloaded()
        assert storage.count("get", "manifests/") == expected
        await repo.aclose()


NAMES = st.sampled_from(["time", "lat", "x", "data", "sst", "g__time", "g__data", "zz", "aa"])


@given(
    stored=st.dictionaries(NAMES, st.lists(st.sampled_from([1, 900, 2000]), max_size=2)),
    added=st.dictionaries(NAMES, st.lists(st.sampled_from([1, 900, 2000]), max_size=2)),
    deleted=st.sets(NAMES),
    scanned=st.integers(0, 60),
)
def test_nodes_of_a_file_give_what_decoded_nodes_give(
    stored: dict[str, list[int]], added: dict[str, list[int]], deleted: set[str], scanned: int
) -> None:
    # With so many groups and arrays that they stay in the file until they are needed.
    filled = stored | {f"f{i:02d}": [5] for i in range(40)}
    first, more = snapshot(**filled), snapshot(**added)
    groups = {
        path: NodeSnapshot(id=NodeId(path.encode().ljust(8)[:8]), path=path, kind=NodeKind.GROUP, user_data=b"{}")
        for path in ("/", "/g", "/e")
    }
    plain = dict(sorted({**first.nodes, **groups}.items()))
    files = {**first.manifest_files, **more.manifest_files}
    whole = replace(first, nodes=plain, manifest_files=first.manifest_files)
    nodes = decode_snapshot(encode_snapshot(whole)).nodes
    changes: dict[str, NodeSnapshot | None] = {f"/{name.replace('__', '/')}": None for name in deleted}
    changes |= more.nodes
    assert isinstance(nodes, SnapshotNodes)
    changed = nodes.changed({path: node for path, node in changes.items() if node or path in plain})
    simple = dict(sorted((path, node) for path, node in {**plain, **changes}.items() if node is not None))
    assert list(array_paths(changed)) == [p for p, node in simple.items() if node.kind is NodeKind.ARRAY]
    assert list(array_paths(simple)) == list(array_paths(changed))
    for condition in (None, Condition.true(), Condition.name_matches("^(time|sst)$")):
        config = icechunk.ManifestPreloadConfig(preload_if=condition, max_arrays_to_scan=scanned)
        lazy = replace(whole, nodes=changed, manifest_files=files)
        assert chosen(lazy, config) == chosen(replace(whole, nodes=simple, manifest_files=files), config)


async def test_a_manifest_that_cannot_be_fetched_does_not_disturb_the_session() -> None:
    inner = icechunk.in_memory_storage()
    await written(inner)
    keys = [info.key async for page in inner.list_pages("manifests/") for info in page]
    await inner.delete(keys)
    repo = await icechunk.Repository.open_async(inner)
    session = await repo.readonly_session_async("main")
    await core_of(repo).preloaded()
    array = await zarr.api.asynchronous.open_array(store=session.store, path="time", mode="r")
    with pytest.raises(icechunk.IcechunkError):
        await array.getitem(0)


async def test_closing_the_repository_leaves_no_preload_behind() -> None:
    class Stuck(RecordingStorage):
        async def get(self, key, byte_range=None):  # type: ignore[no-untyped-def]
            if key.startswith("manifests/"):
                await asyncio.Event().wait()
            return await super().get(key, byte_range)

    inner = icechunk.in_memory_storage()
    await written(inner)
    before = asyncio.all_tasks()
    repo = await icechunk.Repository.open_async(Stuck(inner))
    await repo.readonly_session_async("main")
    await asyncio.sleep(0)
    assert any(task.get_name() == "icechunk manifest preload" for task in asyncio.all_tasks() - before)
    await repo.aclose()
    assert not [task for task in asyncio.all_tasks() - before if "preload" in task.get_name()]
