"""Looking references up in manifests."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from icechunk.errors import FormatError, ObjectNotFoundError
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.keys import manifest_key, transaction_key
from icechunk.format.manifest import encode_manifest
from icechunk.format.transaction import encode_transaction_log
from icechunk.format.values import (
    ID12,
    NATIVE,
    ChunkRefs,
    DimensionShape,
    Manifest,
    ManifestRef,
    NodeKind,
    NodeSnapshot,
    TransactionLog,
)
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import ByteRange, GetResult, Storage, Version
from icechunk.transfer import assets as assets_module
from icechunk.transfer.assets import Assets
from icechunk.transfer.cache import WeightedCache
from icechunk.transfer.limiter import Gates
from tests.raising import raises

NODE = NodeId(b"nodenode")


def refs_at(coords: list[tuple[int, int]]) -> ChunkRefs:
    n = len(coords)
    return ChunkRefs(
        coords=np.array(coords, np.uint32).reshape(n, 2),
        kind=np.full(n, NATIVE, np.uint8),
        offset=np.array([100 * i + j for i, j in coords], np.uint64),
        length=np.ones(n, np.uint64),
        chunk_id=np.zeros(n, ID12),
        location=np.full(n, -1, np.int32),
    )


def with_embedded(storage: Storage, embedded: Mapping[str, bytes], **options: Any) -> Assets:
    """Assets that also look for files among these, as among those that the log has whole."""

    async def find_file(key: str) -> bytes | None:
        return embedded.get(key)

    return Assets(storage, gates=Gates(4), num_snapshot_nodes=10, num_chunk_refs=10, find_file=find_file, **options)


def tiled(tiles: int, node_id: NodeId = NODE) -> tuple[Assets, NodeSnapshot]:
    """An array of 4 tiles x 4 tiles of 3 x 3 chunks at the most, the diagonal of each tile written."""
    assets = Assets(
        MemoryStorage(), gates=Gates(4), num_snapshot_nodes=10, num_chunk_refs=10_000, num_transaction_changes=0
    )
    manifest_refs = []
    for n, (i, j) in enumerate(itertools.islice(itertools.product(range(4), repeat=2), tiles)):
        id = ObjectId(n.to_bytes(12))
        coords = [(3 * i + k, 3 * j + k) for k in range(3)]
        assets.keep_manifest(Manifest(id=id, arrays={node_id: refs_at(coords)}))
        manifest_refs.append(ManifestRef(id, ((3 * i, 3 * i + 3), (3 * j, 3 * j + 3))))
    node = NodeSnapshot(
        id=NODE,
        path="/a",
        kind=NodeKind.ARRAY,
        user_data=b"{}",
        shape=(DimensionShape(12, 12), DimensionShape(12, 12)),
        manifests=tuple(manifest_refs),
    )
    return assets, node


@pytest.mark.parametrize("tiles", [1, 3, 16])
async def test_reference_is_found_in_the_manifest_that_covers_it_however_often_one_asks(tiles: int) -> None:
    assets, node = tiled(tiles)
    written = {
        (3 * i + k, 3 * j + k)
        for i, j in itertools.islice(itertools.product(range(4), repeat=2), tiles)
        for k in range(3)
    }
    for _ in range(8):
        for coords in itertools.product(range(12), repeat=2):
            ref = await assets.reference(node, coords)
            assert (ref is not None) == (coords in written)
            assert ref is None or (ref.kind, ref.offset, ref.length) == (NATIVE, 100 * coords[0] + coords[1], 1)


async def test_manifest_without_its_array_is_a_damaged_file() -> None:
    assets, node = tiled(1, NodeId(b"another!"))
    with raises(FormatError, "inconsistent-manifests", "'/a'"):
        await assets.reference(node, (0, 0))


@pytest.mark.parametrize("batches", [True, False])
async def test_transaction_logs_come_in_the_order_asked_for_also_torn_ones(
    batches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryStorage, "batches_reads", batches)
    storage = MemoryStorage()
    logs = [TransactionLog(id=ObjectId(bytes([i]) * 12), new_groups=frozenset([NODE])) for i in range(6)]
    files = {transaction_key(log.id): encode_transaction_log(log) for log in logs}
    embedded = dict(list(files.items())[1:4])
    for i, (key, data) in enumerate(files.items()):
        # The second is torn, and the third has no file yet; the fourth is in memory as well.
        if i != 2:
            await storage.put(key, data[:-9] if i == 1 else data)
    in_memory: WeightedCache[str, bytes] = WeightedCache(10_000)
    in_memory.put(transaction_key(logs[3].id), embedded[transaction_key(logs[3].id)], 1)

    assets = with_embedded(storage, embedded, num_transaction_changes=2, files=in_memory)
    ids = [logs[i].id for i in (5, 1, 0, 3, 2, 4, 0)]
    assert [log.id for log in await assets.transaction_logs(ids, limit=2)] == ids
    assert [log.new_groups for log in await assets.transaction_logs(ids, limit=2)] == [{NODE}] * len(ids)
    with raises(ObjectNotFoundError, "object-not-found", transaction_key(ObjectId(bytes(12)[:-1] + b"x"))):
        await assets.transaction_logs([*ids, ObjectId(bytes(12)[:-1] + b"x")], limit=2)


@pytest.mark.parametrize(("changes", "kept"), [(3, True), (5_000, False)])
async def test_only_a_small_transaction_log_is_kept_by_its_writer(changes: int, kept: bool) -> None:
    assets, _ = tiled(1)
    coords = np.arange(changes, dtype=np.uint32).reshape(changes, 1)
    log = TransactionLog(id=ObjectId(bytes(12)), updated_chunks={NODE: coords})
    assets.keep_transaction_log(log)
    if kept:
        assert await assets.transaction_log(log.id) is log
    else:
        with pytest.raises(ObjectNotFoundError):
            await assets.transaction_log(log.id)


@pytest.mark.parametrize("batches", [True, False])
async def test_each_manifest_tells_its_chunks_once_also_a_torn_one(
    batches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryStorage, "batches_reads", batches)
    storage, node = MemoryStorage(), tiled(0)[1]
    rows = {ObjectId(bytes([i]) * 12): [(i, 0), (i, 1 + i % 5)] for i in range(30)}
    made = [Manifest(id=id, arrays={NODE: refs_at(cells)}) for id, cells in rows.items()]
    files = {manifest_key(one.id): encode_manifest(one) for one in made}
    embedded = dict(list(files.items())[1:3])
    for i, (key, data) in enumerate(files.items()):
        # The second is torn, the third has no file yet, and the fourth is in the cache.
        if i not in (2, 3):
            await storage.put(key, data[:-9] if i == 1 else data)

    assets = with_embedded(storage, embedded, num_transaction_changes=0)
    assets.keep_manifest(made[3])
    found: list[list[int]] = []
    await assets.each_coords(list(rows), node, lambda coords: found.extend(coords.tolist()), limit=3)
    assert sorted(map(tuple, found)) == sorted(cell for cells in rows.values() for cell in cells)
    await storage.put(manifest_key(made[5].id), files[manifest_key(made[6].id)])
    with raises(FormatError, "invalid-file-format", manifest_key(made[5].id)):
        await assets.each_coords(list(rows), node, lambda coords: None, limit=3)
    other = replace(node, id=NodeId(b"another!"))
    with raises(FormatError, "inconsistent-manifests", "'/a'"):
        await assets.each_coords([made[0].id], other, lambda coords: None, limit=3)


async def test_a_file_that_is_being_decoded_is_joined_after_another_reader_was_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    id, storage = ObjectId(b"m" * 12), MemoryStorage()
    await storage.put(manifest_key(id), encode_manifest(Manifest(id=id, arrays={NODE: refs_at([(0, 0)])})))
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow(size_bytes: int, work: Callable[[], Manifest], limiter: object = None) -> Manifest:
        begun.set()
        await may_end.wait()
        return work()

    monkeypatch.setattr(assets_module, "off_loop", slow)
    assets = Assets(storage, gates=Gates(4), num_snapshot_nodes=1, num_chunk_refs=0, num_transaction_changes=0)
    first, second = (asyncio.ensure_future(assets.manifest(id)) for _ in range(2))
    await begun.wait()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    third = asyncio.ensure_future(assets.manifest(id))
    await asyncio.sleep(0)
    may_end.set()
    assert [one.id for one in await asyncio.gather(second, third)] == [id, id]


class _AtOnce(MemoryStorage):
    """Returns small objects without a wait; counts the requests for others."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = 0

    def get_at_once(self, key: str, *, unsynced: bool = False) -> GetResult | None:
        found = self._objects.get(key)
        if found is None:
            return None
        return GetResult(body=found[1], size=len(found[1]), version=Version("1"), modified_us=0, date_us=None)

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        self.requests += 1
        return await super().get(key, byte_range)


async def test_a_file_that_can_be_had_at_once_is_not_requested() -> None:
    storage = _AtOnce()
    log = TransactionLog(id=ObjectId(bytes(12)), new_groups=frozenset([NODE]))
    key = transaction_key(log.id)
    await storage.put(key, encode_transaction_log(log))
    assets = with_embedded(storage, {}, num_transaction_changes=0)
    assert (await assets.transaction_log(log.id)).new_groups == {NODE}
    assert storage.requests == 0


async def test_a_torn_file_that_can_be_had_at_once_is_replaced_as_any_other() -> None:
    storage = _AtOnce()
    log = TransactionLog(id=ObjectId(bytes(12)), new_groups=frozenset([NODE]))
    key, data = transaction_key(log.id), encode_transaction_log(log)
    await storage.put(key, data[:-9])
    whole = with_embedded(storage, {key: data}, num_transaction_changes=0)
    assert (await whole.transaction_log(log.id)).new_groups == {NODE}
    torn = with_embedded(storage, {}, num_transaction_changes=0)
    with raises(FormatError, FormatError.default_kind, key):
        await torn.transaction_log(log.id)
