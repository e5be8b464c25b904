"""Reading of the immutable files of a repository, through the fetch pool and the caches.

`Assets` has one value of settings (`Reads`) for all pools of a repository. `Preloader` fetches manifests that sessions
will probably need in the background, as soon as a session begins. Its tasks are asyncio tasks that it keeps references
to. A task belongs to the loop that it runs on: it ends by itself, or is cancelled when the repository or its loop is
closed. A preload that fails is only logged; the read that needs the manifest fetches it again and reports the error.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import field
from enum import Enum
from functools import partial
from typing import Final, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from icechunk.config.repository import DEFAULT_MAX_CONCURRENT_DECODES
from icechunk.errors import (
    AccessDeniedError,
    ErrorKind,
    FormatError,
    IcechunkError,
    ObjectNotFoundError,
    SnapshotNotFoundError,
)
from icechunk.format.by_node import num_rows
from icechunk.format.ids import NodeId, ObjectId, encode_id
from icechunk.format.keys import manifest_key, recent_chunk_key, snapshot_key, transaction_key
from icechunk.format.manifest import decode_manifest
from icechunk.format.manifest.decoding import decode_coords
from icechunk.format.manifest.refs_by_node import of_rank
from icechunk.format.snapshot.codec import decode_snapshot
from icechunk.format.transaction import decode_transaction_log, decode_transaction_logs
from icechunk.format.values import ChunkRef, ChunkRefs, Manifest, ManifestRef, NodeSnapshot, Snapshot, TransactionLog
from icechunk.log.session.columns import RefTable, find_row
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.loops import PerLoop
from icechunk.runtime.tasks import in_thread, run_each
from icechunk.storage.port import Octets, Storage
from icechunk.transfer.blocks import BlockReader
from icechunk.transfer.cache import WeightedCache
from icechunk.transfer.disk_cache import ObjectsOnDisk
from icechunk.transfer.fetch import FetchPool, Gettable, Splitting
from icechunk.transfer.limiter import Gate, Gates
from icechunk.transfer.prediction import ROWS, Limits, Walk, Walks

__all__ = ["UNKNOWN", "Assets", "Preloader", "Reads", "Unknown", "off_loop", "references_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Settings of the pools and block readers of one repository."""

    limits: Limits = field(default_factory=Limits)
    """Sizes for merging, reading ahead and keeping bytes."""
    splitting: Splitting | None = None
    """Splitting of long ranges; None: a range is always one request."""
    hedge_percentile: int | None = None
    """Requests that take longer than this percentage of recent ones are sent again; None: only what is probably
    stuck; 100: nothing."""

    def pool(self, storage: Gettable, gate: Gate, disk: ObjectsOnDisk | None = None) -> FetchPool:
        """A pool on the loop that ``gate`` belongs to."""
        return FetchPool(storage, gate, splitting=self.splitting, hedge_percentile=self.hedge_percentile, disk=disk)

    def blocks(self, storage: Gettable, gate: Gate) -> BlockReader:
        """A block reader with a pool of its own."""
        return BlockReader(self.pool(storage, gate), self.limits)


T = TypeVar("T")

SEARCHES_BEFORE_INDEX = 16
"""Look-ups in one array of a manifest that are answered without an index: making one reads all its rows."""
FEW_MANIFESTS = 8
"""Largest number of manifests of an array that are searched one by one."""

_MAX_COMMITS = 1024
_MAX_MANIFESTS = 8192
"""Largest number of cached values: the many tiny manifests of a long history weigh little, but each takes memory."""

_WRITTEN_LOGS = 64
_WRITTEN_CHANGES = 65_536
"""Changed chunks of the transaction logs that this process just wrote, which are kept."""

_LOGS_TOGETHER = 256
"""Transaction logs that are read together: of a million commits, not all bytes are in memory at once."""

_MANIFESTS_TOGETHER = 8
"""Largest number of manifests that are read together."""
_FEW_GROUPS = 8
"""Groups of manifests that are read and decoded at the same time."""

FindFile: TypeAlias = Callable[[str], Awaitable[bytes | None]]
"""Looks up a file by its key in another place than the storage; returns None if it is not there."""

OFF_LOOP_BYTES = 128 * 1024
"""Work on more bytes than this would block the event loop for milliseconds, and is done in a thread."""


async def off_loop(size_bytes: int, work: Callable[[], T], limiter: asyncio.Semaphore | None = None) -> T:
    """Run CPU-bound work: directly if it is small, else in a thread, within the limit."""
    if size_bytes < OFF_LOOP_BYTES:
        return work()
    return await in_thread(work, limiter=limiter)


class Unknown(Enum):
    """The type of `UNKNOWN`."""

    UNKNOWN = "unknown"
    """The manifest has to be read first."""


UNKNOWN: Final = Unknown.UNKNOWN


class _Columns:
    """References of one array in a cached manifest, with an index that is made when look-ups are frequent."""

    __slots__ = ("refs", "searches", "table", "walks")

    def __init__(self, refs: ChunkRefs) -> None:
        self.refs: ChunkRefs = refs
        self.searches: int = 0
        self.table: RefTable | None = None
        self.walks: Walks = Walks()

    def find(self, coords: tuple[int, ...]) -> int:
        """The row, or −1."""
        if self.table is None:
            self.searches += 1
            if self.searches <= SEARCHES_BEFORE_INDEX:
                return find_row(self.refs, coords)
            self.table = RefTable(self.refs)
        return self.table.index.find(coords)

    def row(self, row: int) -> ChunkRef:
        return self.refs.row(row) if self.table is None else self.table.row(row)


class _Held:
    """A cached manifest."""

    __slots__ = ("columns", "manifest")

    def __init__(self, manifest: Manifest) -> None:
        self.manifest: Manifest = manifest
        self.columns: dict[NodeId, _Columns] = {}


class _Boxes:
    """Extents of an array's manifests as columns."""

    __slots__ = ("first", "last", "manifests")

    def __init__(self, manifests: tuple[ManifestRef, ...]) -> None:
        self.manifests = manifests
        extents = np.array([manifest.extents for manifest in manifests], np.int64)
        self.first, self.last = extents[:, :, 0], extents[:, :, 1]

    def find(self, coords: tuple[int, ...]) -> ManifestRef | None:
        inside = np.all((self.first <= coords) & (self.last > coords), axis=1)
        row = int(inside.argmax())
        return self.manifests[row] if inside[row] else None


class Assets:
    """Snapshots, manifests, transaction logs and chunks of one repository, for all its loops and threads.

    Parameters
    ----------
    storage
        Where the repository is.
    gates
        Bounds on requests in flight, in each loop.
    reads
        How requests are made of reads.
    num_snapshot_nodes, num_chunk_refs, num_transaction_changes
        Bounds of the caches: nodes of snapshots, references of manifests, ids and coordinates of transaction logs.
    max_decodes
        Files that are decoded in threads at the same time, for each loop.
    files
        Bytes of metadata files in memory, by key; some may not be on storage yet.
    find_file
        Called for a metadata file that has no object, before the file counts as missing.
    disk
        The cache on local disk; None: there is none.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        gates: Gates,
        reads: Reads | None = None,
        num_snapshot_nodes: int,
        num_chunk_refs: int,
        num_transaction_changes: int,
        max_decodes: int = DEFAULT_MAX_CONCURRENT_DECODES,
        files: WeightedCache[str, bytes] | None = None,
        find_file: FindFile | None = None,
        disk: ObjectsOnDisk | None = None,
    ) -> None:
        self._storage = storage
        self._files = WeightedCache[str, bytes](0) if files is None else files
        self._find_file = find_file
        self._disk = disk
        self._decoders: PerLoop[asyncio.Semaphore] = PerLoop(lambda: asyncio.Semaphore(max_decodes))
        self._reads = reads = reads or Reads()
        self._pools: PerLoop[FetchPool] = PerLoop(lambda: reads.pool(storage, gates.here(), disk))
        self._readers: PerLoop[BlockReader] = PerLoop(self._new_reader)
        self._snapshots: WeightedCache[ObjectId, Snapshot] = WeightedCache(num_snapshot_nodes, _MAX_COMMITS)
        self._manifests: WeightedCache[ObjectId, _Held] = WeightedCache(num_chunk_refs, _MAX_MANIFESTS)
        self._boxes: WeightedCache[int, _Boxes] = WeightedCache(num_chunk_refs, _MAX_COMMITS)
        self._transactions: WeightedCache[ObjectId, TransactionLog] = WeightedCache(
            num_transaction_changes, _MAX_COMMITS
        )
        self._written: WeightedCache[ObjectId, TransactionLog] = WeightedCache(_WRITTEN_CHANGES, _WRITTEN_LOGS)
        """Small transaction logs that this process just wrote: the next commits in its queue compare with them."""

    async def _new_reader(self) -> BlockReader:
        return BlockReader(await self._pools.get(), self._reads.limits)

    async def snapshot(self, id: ObjectId) -> Snapshot:
        """A snapshot by its id. Raises `SnapshotNotFoundError`, or `FormatError` where the file is not one."""
        found = self._snapshots.get(id)
        if found is None:
            try:
                found = await self._load(snapshot_key(id), lambda data: decode_snapshot(data, expected_id=id))
            except ObjectNotFoundError as error:
                raise SnapshotNotFoundError(
                    f"object not found: snapshot {encode_id(id)} has no file in this repository; it was collected, or "
                    "never existed here"
                ) from error
            self.keep_snapshot(found)
        return found

    def known_snapshot(self, id: ObjectId) -> Snapshot | None:
        """A snapshot from the cache; None if it is not there."""
        return self._snapshots.get(id)

    def kept_manifest(self, id: ObjectId) -> Manifest | None:
        """A manifest that is in the cache; None where it has to be read."""
        found = self._manifests.get(id)
        return None if found is None else found.manifest

    def has_room_for(self, num_chunk_refs: int) -> bool:
        """Whether manifests with that many references would fit into an empty cache."""
        return num_chunk_refs <= self._manifests.max_weight

    async def manifest(self, id: ObjectId) -> Manifest:
        """A manifest by its id. A missing manifest is an error, because a snapshot refers to it."""
        return (await self._manifest(id)).manifest

    async def _manifest(self, id: ObjectId) -> _Held:
        found = self._manifests.get(id)
        if found is None:
            loaded = await self._load(manifest_key(id), lambda data: decode_manifest(data, expected_id=id))
            # Other callers waited for it too: all of them share one index of its rows.
            found = self._manifests.get(id) or self.keep_manifest(loaded)
        return found

    async def each_coords(
        self, ids: Sequence[ObjectId], node: NodeSnapshot, use: Callable[[npt.NDArray[np.uint32]], None], *, limit: int
    ) -> None:
        """Read which chunks these manifests have references of, in any order.

        A manifest that is not in the cache is not decoded further, and does not come into it.

        Parameters
        ----------
        ids
            Of the manifests.
        node
            The array.
        use
            Called once for each manifest, in several threads at once, with chunk coordinates, uint32[n, ndim], in any
            order.
        limit
            Largest number of manifests whose bytes are in memory.
        """
        together = 1
        if self._storage.batches_reads:
            # All decoders have something to do while the next files are read.
            together = max(1, min(_MANIFESTS_TOGETHER, len(ids) // _FEW_GROUPS))
            limit = min(limit, _FEW_GROUPS)
        groups = [ids[first : first + together] for first in range(0, len(ids), together)]
        await run_each(lambda group: self._coords_of(group, node, use), groups, limit=limit)

    async def _coords_of(
        self, ids: Sequence[ObjectId], node: NodeSnapshot, use: Callable[[npt.NDArray[np.uint32]], None]
    ) -> None:
        asked = [id for id in ids if self.kept_manifest(id) is None]
        if self._storage.batches_reads:
            answers = await self._storage.get_all([manifest_key(id) for id in asked])
            files = {id: bytes(answer.body) for id, answer in zip(asked, answers, strict=True) if answer is not None}
        else:
            files = {id: await self.file(manifest_key(id)) for id in asked}
        used: set[ObjectId] = set()

        def decode() -> None:
            while files:
                id, data = files.popitem()
                with suppress(FormatError):
                    coords = decode_coords(data, node.id, len(node.shape), expected_id=id)
                    if coords is not None:
                        use(coords)
                        used.add(id)

        await off_loop(sum(map(len, files.values())), decode, await self._decoders.get())
        for id in ids:
            if id not in used:
                # It is in the cache, has to be read otherwise, or what is wrong with it is to be said.
                coords = references_of(await self.manifest(id), node).coords
                await off_loop(coords.nbytes, partial(use, coords))

    async def reference(self, node: NodeSnapshot, coords: tuple[int, ...], *, reading: bool = False) -> ChunkRef | None:
        """The reference of a chunk in the manifests of a committed node; None if there is none.

        With ``reading``, the caller is about to read the chunk; if it has read the chunks before it too, the next ones
        are fetched ahead. Raises `FormatError` if the manifest that should have the chunk has no rows of the array.
        """
        manifest_ref = self._locate(node.manifests, coords)
        if manifest_ref is None:
            return None
        held = await self._manifest(manifest_ref.object_id)
        if reading and self._readers.peek() is None:
            await self._readers.get()
        return self._reference_in(held, node, coords, reading)

    def reference_nowait(
        self, node: NodeSnapshot, coords: tuple[int, ...], *, reading: bool = True
    ) -> ChunkRef | Unknown | None:
        """As `reference`, if the manifest is in the cache; else `UNKNOWN`. Reading ahead needs a running loop."""
        manifest_ref = self._locate(node.manifests, coords)
        if manifest_ref is None:
            return None
        held = self._manifests.get(manifest_ref.object_id)
        return UNKNOWN if held is None else self._reference_in(held, node, coords, reading)

    def table_nowait(self, node: NodeSnapshot) -> RefTable | None:
        """The references of a committed array that has one manifest, if that is in the cache and has been searched
        often enough; else None."""
        if len(node.manifests) != 1:
            return None
        held = self._manifests.get(node.manifests[0].object_id)
        columns = None if held is None else held.columns.get(node.id)
        return None if columns is None else columns.table

    def _reference_in(self, held: _Held, node: NodeSnapshot, coords: tuple[int, ...], reading: bool) -> ChunkRef | None:
        columns = held.columns.get(node.id)
        if columns is None:
            columns = held.columns[node.id] = _Columns(references_of(held.manifest, node))
        row = columns.find(coords)
        if row < 0:
            return None
        if reading and (walk := columns.walks.step(row)) is not None and (reader := self._readers.peek()) is not None:
            _fetch_ahead(reader, columns.refs, walk)
        return columns.row(row)

    def _locate(self, manifests: tuple[ManifestRef, ...], coords: tuple[int, ...]) -> ManifestRef | None:
        if len(manifests) <= FEW_MANIFESTS:
            for manifest in manifests:
                for coord, (first, last) in zip(coords, manifest.extents, strict=True):
                    if not first <= coord < last:
                        break
                else:
                    return manifest
            return None
        boxes = self._boxes.get(id(manifests))
        if boxes is None or boxes.manifests is not manifests:
            boxes = _Boxes(manifests)
            self._boxes.put(id(manifests), boxes, len(manifests))
        return boxes.find(coords)

    async def transaction_log(self, id: ObjectId) -> TransactionLog:
        """The changes of the commit of snapshot ``id``."""
        found = self._written.get(id) or self._transactions.get(id)
        if found is None:
            found = await self._load(transaction_key(id), lambda data: decode_transaction_log(data, expected_id=id))
            self._keep_transaction_log(found)
        return found

    async def transaction_logs(self, ids: Sequence[ObjectId], *, limit: int) -> list[TransactionLog]:
        """As `transaction_log`, many in the order asked for, with at most ``limit`` requests at once."""
        found: dict[ObjectId, TransactionLog] = {}
        for first in range(0, len(ids), _LOGS_TOGETHER):
            found |= await self._read_together(ids[first : first + _LOGS_TOGETHER])

        async def read(id: ObjectId) -> None:
            found[id] = await self.transaction_log(id)

        await run_each(read, [id for id in dict.fromkeys(ids) if id not in found], limit=limit)
        return [found[id] for id in ids]

    async def _read_together(self, ids: Sequence[ObjectId]) -> dict[ObjectId, TransactionLog]:
        """Logs, if the storage reads several files in less time than one after another; without those that need more
        than a read: `transaction_log` finds them, or raises the error."""
        if not self._storage.batches_reads:
            return {}
        found = {id: log for id in ids if (log := self._transactions.get(id)) is not None}
        asked = [id for id in dict.fromkeys(ids) if id not in found and self._files.get(transaction_key(id)) is None]
        answers = await self._storage.get_all([transaction_key(id) for id in asked])
        files = [(id, bytes(answer.body)) for id, answer in zip(asked, answers, strict=True) if answer is not None]
        with suppress(FormatError):
            decoders = await self._decoders.get()
            for log in await off_loop(
                sum(len(data) for _, data in files), partial(decode_transaction_logs, files), decoders
            ):
                found[log.id] = log
                self._keep_transaction_log(log)
        return found

    async def file(self, key: str) -> bytes:
        """The bytes of a metadata file on storage, or of one that is so far only embedded in the log.

        Raises
        ------
        ObjectNotFoundError
            If the file is in neither place.
        """
        pool = self._pools.peek() or await self._pools.get()
        return await self._read(pool, key)

    async def chunk(self, id: ObjectId, start: int, end: int, *, exact: bool = False) -> Octets:
        """Bytes ``start`` to ``end`` (exclusive) of a chunk object; fewer where it is shorter. ``exact`` as of
        `BlockReader.read`."""
        reader = self._readers.peek() or await self._readers.get()
        return await reader.read(recent_chunk_key(id), start, end, exact=exact)

    def chunk_nowait(self, id: ObjectId, start: int, end: int) -> bytes | None:
        """The same, if all of it has been fetched already; else None."""
        reader = self._readers.peek()
        return None if reader is None else reader.read_nowait(recent_chunk_key(id), start, end)

    def keep_snapshot(self, snapshot: Snapshot) -> None:
        """Cache a snapshot that this process just wrote or read."""
        self._snapshots.put(snapshot.id, snapshot, len(snapshot.nodes) + 1)

    def keep_manifest(self, manifest: Manifest) -> _Held:
        """Cache a manifest that this process just wrote or read."""
        held = _Held(manifest)
        self._manifests.put(manifest.id, held, manifest.num_chunk_refs + 1)
        return held

    def keep_transaction_log(self, log: TransactionLog) -> None:
        """Keep a transaction log that this process just wrote for a while, if it is small, also without a cache."""
        changes = num_rows(log.updated_chunks)
        # The columns of larger ones may be parts of much larger ones.
        if changes <= _WRITTEN_CHANGES // _WRITTEN_LOGS:
            self._written.put(log.id, log, changes + 1)

    def _keep_transaction_log(self, log: TransactionLog) -> None:
        self._transactions.put(log.id, log, num_rows(log.updated_chunks) + 1)

    async def _load(self, key: str, decode: Callable[[bytes], T]) -> T:
        at_once = self._files.get(key) or self._read_at_once(key)
        if at_once is not None and len(at_once) < OFF_LOOP_BYTES:
            # A damaged file may have another copy, which is looked for below.
            with suppress(FormatError):
                return decode(at_once)
        pool = self._pools.peek() or await self._pools.get()

        # A request that is stuck is not joined for long; a file that is being decoded always is, so its bytes are not
        # needed again unless that ended meanwhile.
        known: bytes | None = None
        if not pool.flights.of(("decoded", key)):
            known = self._files.get(key) or await self._read(pool, key)

        async def decoded(data: bytes) -> T:
            return await off_loop(len(data), lambda: decode(data), await self._decoders.get())

        async def load() -> T:
            data = self._files.get(key) or await self._read(pool, key) if known is None else known
            try:
                return await decoded(data)
            except FormatError as error:
                if self._disk is not None and self._disk.drop(key):
                    # It may have been damaged when it was kept, and mended since.
                    with suppress(FormatError):
                        return await decoded(await self._read(pool, key))
                # A power failure may have torn a file that a log has whole.
                found = None if self._find_file is None else await self._find_file(key)
                if found is not None and found != data:
                    return await decoded(found)
                raise FormatError(f"cannot read {key!r}: {error.message}", error.kind) from error

        return await pool.flights.share(("decoded", key), load)

    def _read_at_once(self, key: str) -> bytes | None:
        found = self._storage.get_at_once(key)
        return None if found is None else bytes(found.body)

    async def _read(self, pool: FetchPool, key: str) -> bytes:
        try:
            return await pool.get(key)
        except (ObjectNotFoundError, AccessDeniedError) as error:
            absent = not isinstance(error, AccessDeniedError) or error.may_be_absent
            if self._find_file is None or not absent:
                raise
            found = await self._find_file(key)
            # It may have been put meanwhile.
            return await pool.get(key) if found is None else found


def _fetch_ahead(reader: BlockReader, refs: ChunkRefs, walk: Walk) -> None:
    if walk.wants_more(ROWS):
        row, max_bytes = walk.next_window(ROWS)
        ranges, end = reader.upcoming(refs, row, max_bytes)
        walk.fetch_to(end, max_bytes)
        for chunk_id, first, last in ranges:
            reader.prefetch(recent_chunk_key(chunk_id), first, last)


def references_of(manifest: Manifest, node: NodeSnapshot) -> ChunkRefs:
    """The references of an array in one of its manifests. Raises `FormatError` where there are none."""
    refs = of_rank(manifest.arrays, node.id, len(node.shape))
    if refs is None:
        raise FormatError(
            f"manifest {encode_id(manifest.id)} has no references of array {node.path!r}, though its snapshot says so",
            ErrorKind.INCONSISTENT_MANIFESTS,
        )
    return refs


_LOG: Final = logging.getLogger(__name__)


_CLOSE_S: Final = 10.0
"""Seconds that closing waits for preloads that were cancelled."""


class Preloader:
    """Preloads of one event loop.

    Parameters
    ----------
    assets
        Whose cache takes the manifests.
    max_requests
        Of one preload at a time.
    """

    def __init__(self, assets: Assets, max_requests: int) -> None:
        self._assets = assets
        self._max_requests = max_requests
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, manifests: Sequence[ObjectId]) -> None:
        """Start to fetch these manifests, and return."""
        task = asyncio.get_running_loop().create_task(self._fetch(manifests), name="icechunk manifest preload")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait(self) -> None:
        """Wait for everything that was started."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def aclose(self) -> None:
        """Cancel the running preloads, and wait for a while until they have ended."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=_CLOSE_S)

    async def _fetch(self, manifests: Sequence[ObjectId]) -> None:
        await run_each(self._fetch_one, manifests, limit=self._max_requests)

    async def _fetch_one(self, id: ObjectId) -> None:
        try:
            await self._assets.manifest(id)
        except (IcechunkError, OSError) as error:
            _LOG.info("manifest %s could not be preloaded; a read that needs it retries: %s", encode_id(id), error)
