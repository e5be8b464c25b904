"""References of snapshots, read from their files in bounded memory.

A reference is living if an array of a living snapshot has the manifest that holds it. Several arrays may have one
manifest, and some of them may keep it after another array no longer has it, so the unit is the pair of array and
manifest: if no living snapshot has an array with the manifest, the rows of that array are dead, even if other arrays
have the manifest.

An unreadable object ends the walk with an error: an object counts as garbage only if that is known.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import field
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from icechunk.errors import ErrorKind, FormatError, ObjectNotFoundError
from icechunk.format.by_node import owners
from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.keys import manifest_key, manifest_keys, snapshot_key, snapshot_keys
from icechunk.format.manifest import decode_manifest
from icechunk.format.manifest.decoding import decode_manifests
from icechunk.format.manifest.refs_by_node import grouped_refs
from icechunk.format.snapshot.codec import decode_snapshot
from icechunk.format.snapshot.uses import SnapshotUses, manifest_uses
from icechunk.format.values import ChunkRefs, Manifest, ManifestFile, Snapshot
from icechunk.log.repository.port import RepositoryLog
from icechunk.maintenance.limits import Limits
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_each
from icechunk.storage.port import Storage
from icechunk.transfer.assets import off_loop

__all__ = [
    "Budget",
    "Files",
    "ManyRefs",
    "RowSet",
    "Unseen",
    "Use",
    "Walked",
    "distinct_rows",
    "living_rows",
    "read_all_manifests",
    "read_manifests",
    "walk",
]


class Budget:
    """An amount that is lent out and given back; a request for more than all of it gets all of it, alone.

    Belongs to one event loop.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total
        self._returned = asyncio.Event()

    @asynccontextmanager
    async def take(self, amount: int) -> AsyncIterator[None]:
        """Hold ``amount`` for as long as the block runs; waits until there is enough."""
        held = min(max(amount, 0), self._total)
        while self._free < held:
            self._returned.clear()
            await self._returned.wait()
        self._free -= held
        try:
            yield
        finally:
            self._free += held
            self._returned.set()


_DECODED_BYTES_PER_REF = 160
"""Bytes of a reference while a manifest is decoded, about."""


T = TypeVar("T")


class Files:
    """The files of one repository, those that are only embedded in its log included."""

    def __init__(self, storage: Storage, log: RepositoryLog) -> None:
        self.storage = storage
        self._log = log

    async def get(self, key: str) -> bytes:
        """The whole file. Raises `ObjectNotFoundError`."""
        embedded = self._log.embedded_file(key)
        if embedded is not None:
            return embedded
        try:
            return (await self.storage.get(key)).data
        except ObjectNotFoundError:
            found = await self._log.find_file(key)
            # It may have been put meanwhile.
            return (await self.storage.get(key)).data if found is None else found

    async def decoded(self, key: str, data: bytes, decode: Callable[[bytes], T]) -> T:
        """Decode a file, or where a power failure has torn it the bytes that its log has. Raises `FormatError`."""
        try:
            return await off_loop(len(data), lambda: decode(data))
        except FormatError as error:
            found = await self._log.find_file(key)
            if found is not None and found != data:
                return await off_loop(len(found), lambda: decode(found))
            raise FormatError(f"cannot read {key!r}: {error.message}", error.kind) from error

    async def decoded_all(
        self, keys: Sequence[str], data: Sequence[bytes], decode: Callable[[slice, Sequence[bytes]], T]
    ) -> list[tuple[slice, T]]:
        """Decode files together, or each as `decoded` does where one of them is refused.

        Parameters
        ----------
        decode
            Called with the numbers of consecutive files, and with their bytes.

        Returns
        -------
        list
            Numbers of consecutive files, and their contents.
        """
        everything = slice(0, len(keys))
        try:
            return [(everything, await off_loop(sum(map(len, data)), lambda: decode(everything, data)))]
        except FormatError:
            found = []
            for i, key in enumerate(keys):
                which = slice(i, i + 1)
                found.append((which, await self.decoded(key, data[i], partial(_one, decode, which))))
            return found

    async def require_all(self, keys: Sequence[str], wanted_by: str) -> list[bytes]:
        """The whole files, in the order of the keys; errors as `require`."""
        known = {key: data for key in keys if (data := self._log.embedded_file(key)) is not None}
        asked = [key for key in keys if key not in known]
        for key, answer in zip(asked, await self.storage.get_all(asked), strict=True):
            known[key] = await self.require(key, wanted_by) if answer is None else answer.data
        return [known[key] for key in keys]

    async def require(self, key: str, wanted_by: str) -> bytes:
        """The whole file, which something promises. Raises `FormatError` where it is missing."""
        try:
            return await self.get(key)
        except ObjectNotFoundError as error:
            raise FormatError(
                f"{key!r} is missing in {self.storage.describe()}, though {wanted_by} needs it: the repository is "
                "damaged. Restore the object, or delete the refs that need it, and try again",
                ErrorKind.OBJECT_NOT_FOUND,
            ) from error


_SNAPSHOTS_TOGETHER = 128
_MANIFESTS_TOGETHER = 256
_REFS_TOGETHER = 1 << 17
"""References of the manifests that are read together, unless it is one that has more."""
_BYTES_PER_VISIT = 32


async def read_snapshot(files: Files, id: ObjectId) -> Snapshot:
    """A snapshot that history names. Raises `FormatError` where it is missing or cannot be read."""
    key = snapshot_key(id)
    data = await files.require(key, "the history")
    return await files.decoded(key, data, lambda data: decode_snapshot(data, expected_id=id))


def _one(decode: Callable[[slice, Sequence[bytes]], T], which: slice, content: bytes) -> T:
    return decode(which, [content])


@dataclass(slots=True, kw_only=True)
class Use:
    """A manifest, and the arrays that use it."""

    file: ManifestFile
    nodes: set[NodeId] = field(default_factory=set)
    """Arrays that a snapshot finds in it. Rows of others in the same manifest are dead."""


@dataclass(slots=True, kw_only=True)
class Walked:
    """The findings of a walk so far."""

    snapshots: dict[ObjectId, tuple[ObjectId, ...]] = field(default_factory=dict)
    """Manifests that each snapshot uses."""
    parents: dict[ObjectId, ObjectId | None] = field(default_factory=dict)
    """Parent of each snapshot as its file names it: in format 1 only."""
    manifests: dict[ObjectId, Use] = field(default_factory=dict)
    """Every manifest that one of the snapshots uses, with the arrays of all of them."""


async def walk(
    files: Files,
    start: Iterable[ObjectId],
    found: Walked,
    limits: Limits,
    *,
    follow_parents: bool,
    of_each_snapshot: bool = True,
) -> dict[ObjectId, Use]:
    """Read snapshots, and add them and their manifests to those that were found before.

    Parameters
    ----------
    start
        Those that were found before are not read again.
    follow_parents
        Whether to go on to the parents that the files name (format 1).
    of_each_snapshot
        Whether to note which snapshot uses which manifests.

    Returns
    -------
    dict
        The manifests that are new, and those that new arrays use, each with its new arrays only.
    """
    fresh: dict[ObjectId, Use] = {}
    pairs = Unseen(_PAIR.itemsize)
    next_ones = sorted(set(start) - found.snapshots.keys())

    async def read(ids: Sequence[ObjectId]) -> None:
        keys = snapshot_keys(ids)
        data = await files.require_all(keys, "the history")
        decode = partial(_uses, ids)
        for which, uses in await files.decoded_all(keys, data, decode):
            if follow_parents:
                found.parents.update(zip(ids[which], uses.parents, strict=True))
            _note(found, fresh, uses, pairs)
            if of_each_snapshot:
                _note_of_each(found, ids[which], uses)

    while next_ones:
        found.snapshots.update(dict.fromkeys(next_ones, ()))
        size = min(_SNAPSHOTS_TOGETHER, limits.max_snapshots_in_memory)
        batches = [next_ones[i : i + size] for i in range(0, len(next_ones), size)]
        await run_each(read, batches, limit=max(1, limits.max_snapshots_in_memory // size))
        parents = {found.parents[id] for id in next_ones} if follow_parents else set()
        next_ones = sorted(id for id in parents if id is not None and id not in found.snapshots)
    return fresh


def _uses(ids: Sequence[ObjectId], which: slice, data: Sequence[bytes]) -> SnapshotUses:
    return manifest_uses(list(zip(ids[which], data, strict=True)))


# Of whole words of 8 bytes; the last one is padding.
_PAIR: Final = np.dtype([("manifest", "V12"), ("node", "V8"), ("padding", "u4")])


def _note(found: Walked, fresh: dict[ObjectId, Use], uses: SnapshotUses, seen: Unseen) -> None:
    """Add the manifests and chunks that some snapshots use; ``seen`` has the pairs of manifest and array so far."""
    for id, size, count in distinct_rows(uses.files, "<12sQI"):
        if id not in found.manifests:
            found.manifests[id] = Use(file=ManifestFile(id, size, count))
            fresh[id] = Use(file=found.manifests[id].file)
    pairs = np.zeros(len(uses.ref_manifests), _PAIR)
    pairs["manifest"], pairs["node"] = uses.ref_manifests.view("V12"), uses.ref_nodes.view("V8")
    pairs = seen.add(_plain(pairs)).view(_PAIR)
    by_manifest: dict[bytes, set[NodeId]] = {}
    for manifest, node in zip(pairs["manifest"].tolist(), pairs["node"].tolist(), strict=True):
        by_manifest.setdefault(manifest, set()).add(node)
    for manifest, nodes in sorted(by_manifest.items(), key=itemgetter(0)):
        id = ObjectId(manifest)
        known = found.manifests.get(id)
        if known is None:
            known = found.manifests[id] = Use(file=ManifestFile(id, 0, 0))
            fresh[id] = Use(file=known.file)
        new = nodes - known.nodes
        if new:
            known.nodes |= new
            fresh.setdefault(id, Use(file=known.file)).nodes.update(new)


def _note_of_each(found: Walked, ids: Sequence[ObjectId], uses: SnapshotUses) -> None:
    """Add the manifests that each of these snapshots uses."""
    owned = np.empty(len(uses.ref_snapshots) + len(uses.file_snapshots), [("snapshot", ">u4"), ("manifest", "S12")])
    owned["snapshot"] = np.concatenate([uses.ref_snapshots, uses.file_snapshots])
    owned["manifest"] = np.concatenate([uses.ref_manifests, uses.files["id"]])
    known = found.manifests
    for number, pairs_of in groupby(distinct_rows(owned, ">I12s"), itemgetter(0)):
        # Ids that are equal are one object: thousands of snapshots may use the same manifests.
        found.snapshots[ids[number]] = tuple([known[manifest].file.object_id for _, manifest in pairs_of])


def distinct_rows(rows: npt.NDArray[np.void], layout: str) -> Iterator[tuple[Any, ...]]:
    """The distinct rows of a structured array, ascending by their bytes, each unpacked by that `struct` format.

    Rows have a multiple of 8 bytes.
    """
    if not len(rows):
        return
    plain = _plain(rows)
    # Snapshots in a row often share most of their references, one array after another in the manifest.
    plain = Unseen(plain.itemsize).add(plain[np.append(True, plain[1:] != plain[:-1])])
    yield from struct.iter_unpack(layout, b"".join(sorted(set(plain.tolist()))))


def _plain(rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    return np.ascontiguousarray(rows).view(f"V{rows.dtype.itemsize}")


_BUCKETS_BITS: Final = 17
_MULTIPLIERS: Final = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
_THIN_FROM: Final = 4096
_WORD: Final = 8


class Unseen:
    """Rows among which each row that was added is at least once; most that are equal to an earlier one are left out.

    Costs a fifth of the time of an object for each row. Once many rows have come, it has memory for 131 072 of them.

    Parameters
    ----------
    width
        Bytes of a row, a multiple of 8.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._seen: npt.NDArray[np.uint64] | None = None
        """The words of one of the rows that were added, by bucket."""

    def add(self, rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """Add rows, ``V{width}[n]``, and return those that may be new, each at least once."""
        if self._seen is None:
            if len(rows) < _THIN_FROM:
                return rows
            self._seen = np.zeros((1 << _BUCKETS_BITS, self._width // _WORD), np.uint64)
            # A row of zeros belongs to the first bucket; this one does not.
            self._seen[0] = 2**64 - 1
        words = rows.view("<u8").reshape(len(rows), -1)
        buckets = self._buckets(words)
        new = np.flatnonzero(_differ(words, self._seen.take(buckets, axis=0)))
        words, buckets = words.take(new, axis=0), buckets[new]
        # Any row of each bucket stands for the bucket. Rows that differ from it are all kept.
        one_of = np.empty(1 << _BUCKETS_BITS, np.int64)
        one_of[buckets] = np.arange(len(new))
        chosen = one_of[buckets]
        kept = _differ(words, words.take(chosen, axis=0))
        kept[chosen] = True
        self._seen[buckets] = words
        left: npt.NDArray[np.void] = rows[new[kept]]
        return left

    def _buckets(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        hashes = np.zeros(len(words), np.uint64)
        for i, column in enumerate(words.T):
            hashes ^= column
            hashes *= _MULTIPLIERS[i % len(_MULTIPLIERS)]
        hashes >>= np.uint64(64 - _BUCKETS_BITS)
        return hashes.view(np.int64)


def _differ(words: npt.NDArray[np.uint64], others: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Whether each row differs from the other one."""
    found = np.zeros(len(words), np.bool_)
    for column, other in zip(words.T, others.T, strict=True):
        found |= column != other
    return found


def living_rows(manifest: Manifest, nodes: Collection[NodeId]) -> Iterator[ChunkRefs]:
    """The references of some arrays in a manifest, those of arrays of one rank together."""
    for part in grouped_refs(manifest.arrays).parts:
        living = np.fromiter((node in nodes for node in part.nodes), np.bool_, len(part.nodes))
        if living.all():
            yield part.rows
        elif living.any():
            yield part.rows.take(np.flatnonzero(living[owners(part.edges)]))


async def read_manifests(
    files: Files,
    manifests: Mapping[ObjectId, Use],
    limits: Limits,
    visit: Callable[[Manifest, Collection[NodeId]], Awaitable[None]],
) -> None:
    """Read manifests, largest first, and hand each to ``visit`` with the arrays that use it."""
    compressed = Budget(limits.max_compressed_manifest_mem_bytes)
    decoded = Budget(limits.max_decoded_manifest_mem_bytes)

    async def read(use: Use) -> None:
        file = use.file
        key = manifest_key(file.object_id)
        async with (
            decoded.take(file.num_chunk_refs * _DECODED_BYTES_PER_REF),
            compressed.take(file.size_bytes),
        ):
            data = await files.require(key, "a snapshot")
            manifest = await files.decoded(key, data, lambda data: decode_manifest(data, expected_id=file.object_id))
            await visit(manifest, use.nodes)

    # Sorted also so that the order of requests does not depend on chance.
    ordered = sorted(manifests.values(), key=lambda use: (-use.file.num_chunk_refs, use.file.object_id))
    await run_each(read, ordered, limit=limits.max_concurrent_manifest_fetches)


class ManyRefs(NamedTuple):
    """References of several manifests that arrays of one rank use."""

    rows: ChunkRefs
    manifests: npt.NDArray[np.int64]
    """int64[n]: for each reference the number of its manifest."""
    lives: npt.NDArray[np.bool_]
    """bool[n]: whether its array uses the manifest."""

    @property
    def living(self) -> ChunkRefs:
        """The references that live."""
        return self.rows if self.lives.all() else self.rows.take(np.flatnonzero(self.lives))


async def read_all_manifests(
    files: Files,
    manifests: Mapping[ObjectId, Use],
    limits: Limits,
    visit: Callable[[Sequence[ObjectId], Sequence[ManyRefs]], None],
) -> None:
    """Read manifests, largest first, many small ones together, and hand the references of each batch to ``visit``.

    ``visit`` runs in a thread, one at a time.
    """
    compressed = Budget(limits.max_compressed_manifest_mem_bytes)
    decoded = Budget(limits.max_decoded_manifest_mem_bytes)
    visiting = asyncio.Lock()

    async def read(uses: Sequence[Use]) -> None:
        ids = [use.file.object_id for use in uses]
        async with (
            decoded.take(sum(use.file.num_chunk_refs for use in uses) * _DECODED_BYTES_PER_REF),
            compressed.take(sum(use.file.size_bytes for use in uses)),
        ):
            keys = manifest_keys(ids)
            data = await files.require_all(keys, "a snapshot")
            for which, found in await files.decoded_all(keys, data, partial(_many_refs, uses)):
                rows = sum(len(part.rows) for part in found)
                async with visiting:
                    await off_loop(rows * _BYTES_PER_VISIT, partial(visit, ids[which], found))

    # Sorted also so that the order of requests does not depend on chance.
    ordered = sorted(manifests.values(), key=lambda use: (-use.file.num_chunk_refs, use.file.object_id))
    most = max(1, min(_MANIFESTS_TOGETHER, limits.max_concurrent_manifest_fetches))
    batches: list[list[Use]] = []
    rows = _REFS_TOGETHER
    for use in ordered:
        rows += use.file.num_chunk_refs
        if rows > _REFS_TOGETHER or len(batches[-1]) == most:
            batches.append([])
            rows = use.file.num_chunk_refs
        batches[-1].append(use)
    await run_each(read, batches, limit=max(1, limits.max_concurrent_manifest_fetches // most))


def _many_refs(all_uses: Sequence[Use], which: slice, data: Sequence[bytes]) -> list[ManyRefs]:
    uses = all_uses[which]
    decoded = decode_manifests([(use.file.object_id, content) for use, content in zip(uses, data, strict=True)])
    found = []
    for some in decoded:
        numbers = some.manifests.tolist()
        lives = np.fromiter(
            (node in uses[number].nodes for node, number in zip(some.nodes, numbers, strict=True)),
            np.bool_,
            len(numbers),
        )
        for part in some.parts:
            arrays = part.arrays[owners(part.edges)]
            found.append(ManyRefs(part.rows, some.manifests[arrays], lives[arrays]))
    return found


_MERGE_FROM = 1 << 16


class RowSet:
    """Grows by whole columns, keeps each row once, and answers for many rows at a time. Threads may share it.

    Parameters
    ----------
    width
        Bytes of a row.
    """

    def __init__(self, width: int) -> None:
        # Of one width all rows, so that it does not matter that numpy compares without zeros at the end.
        self._type = np.dtype(f"S{width}")
        self._rows = np.empty(0, self._type)
        self._fresh: list[npt.NDArray[Any]] = []
        self._fresh_count = 0
        self._lock = threading.Lock()

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Add rows, an array of any type of ``width`` bytes."""
        if not len(rows):
            return
        # A copy: a view would keep the array alive that the rows were taken from.
        fresh = np.array(rows).view(self._type)
        with self._lock:
            self._fresh.append(fresh)
            self._fresh_count += len(fresh)
            if self._fresh_count > max(_MERGE_FROM, len(self._rows)):
                self._merge()

    def _merge(self) -> None:
        if self._fresh:
            # Sorting takes a sixth of the time of `np.unique`, which hashes. Rows come in ascending runs, one array or
            # object after another, of which a stable sort makes use: it takes half the time of another.
            ordered = np.sort(np.concatenate([self._rows, *self._fresh]), kind="stable")
            self._rows = ordered[np.append(True, ordered[1:] != ordered[:-1])]
            self._fresh.clear()
            self._fresh_count = 0

    @property
    def rows(self) -> npt.NDArray[Any]:
        """``S{width}[n]``: all rows, ascending."""
        with self._lock:
            self._merge()
            return self._rows

    def __len__(self) -> int:
        return len(self.rows)

    def missing(self, wanted: Iterable[bytes]) -> list[bool]:
        """Whether each row, in order, is absent from the set."""
        asked = np.array(list(wanted), self._type)
        if not len(asked):
            return []
        rows = self.rows
        if not len(rows):
            return [True] * len(asked)
        found = np.minimum(np.searchsorted(rows, asked), len(rows) - 1)
        absent: list[bool] = (rows[found] != asked).tolist()
        return absent
