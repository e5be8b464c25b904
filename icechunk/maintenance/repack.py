"""Repacking: removing the dead bytes of objects that are still needed.

Packs and manifests with many dead bytes are written again without them, and so is every snapshot that refers to one of
them: the same content, with other ids. One event then puts the new snapshots in the place of the old ones, in the
graph, in branches and tags (`icechunk.log.repository.events.SnapshotsRewritten`); in format 1, where there is no such
event, refs are moved one by one. No writer waits: the objects that commits made meanwhile refer to are kept. A session
that began before finds that its snapshot was replaced, as by an amendment.

The same collection deletes the old files if it was asked for everything up to now; otherwise they stay, with their
snapshots, for open readers, until a collection whose cutoff is after the repacking.

Snapshots that no ref reaches are not rewritten, since they can be opened by their ids only; nor are the objects that
they refer to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import field, replace
from typing import Final

import numpy as np

from icechunk.errors import ErrorKind, FormatError, InvalidInputError, ObjectNotFoundError, SessionStateError
from icechunk.format.ids import NodeId, ObjectId, encode_id
from icechunk.format.keys import (
    CHUNKS_PREFIX,
    MANIFESTS_PREFIX,
    SNAPSHOTS_PREFIX,
    TRANSACTIONS_PREFIX,
    chunk_key,
    manifest_key,
    snapshot_key,
    transaction_key,
)
from icechunk.format.manifest import encode_manifest
from icechunk.format.manifest.location_compression import LocationCompression
from icechunk.format.snapshot.codec import encode_snapshot
from icechunk.format.transaction import decode_transaction_log, encode_transaction_log
from icechunk.format.values import Manifest, ManifestFile, NodeSnapshot, Snapshot
from icechunk.log.repository.events import Event, SnapshotsRewritten
from icechunk.log.repository.port import RepositoryLog
from icechunk.log.repository.ref_files.layout import RefFilesLayout
from icechunk.log.repository.state import RepoState
from icechunk.maintenance.byte_ranges import CHUNK_ID_BYTES, covered_by_object, names_of
from icechunk.maintenance.limits import Limits
from icechunk.maintenance.living import Living, Shares
from icechunk.maintenance.reachability import Budget, Files, living_rows, read_manifests, read_snapshot
from icechunk.maintenance.ref_history import replace_in_refs
from icechunk.maintenance.repack_plan import Candidate, Moves, Piece, choose, rewritten
from icechunk.maintenance.sweep import Listed, Sweep, Swept
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_each
from icechunk.storage.port import Range, Storage
from icechunk.transfer.assets import off_loop

__all__ = ["Repacked", "Repacking", "Survey", "repack"]

_LOG: Final = logging.getLogger(__name__)
_BYTES_PER_REF: Final = 64
_BYTES_PER_NODE: Final = 256
_GAP: Final = 64 * 1024
"""Dead bytes between two pieces of an object that are read along, since a request costs more."""
_COPY_BYTES: Final = 64 * 1024 * 1024
"""Bytes of packs that are copied at a time."""
_RUN_BYTES: Final = 1024 * 1024
"""Pieces of one object are read together up to these bytes, or up to the size of the new pack."""
_COPIES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Repacking:
    """Parameters of a repacking."""

    below: float
    """Objects whose living share is less are written again; from 0 to 1."""
    pack_size_bytes: int
    """Bytes of each new pack, about."""
    level: int
    """Level of zstd for metadata files."""
    locations: LocationCompression | None
    """Compression of locations of virtual references, one by one; None: of the whole manifest only."""


class Survey:
    """The sizes of the objects that stay, by a listing.

    Parameters
    ----------
    older_than_us
        Store time, µs: younger objects are not written again.
    """

    def __init__(self, shares: Shares, older_than_us: int) -> None:
        self._shares = shares
        self._older_than_us = older_than_us
        self._names, self._living = covered_by_object(shares.spans.rows)
        self._packs: list[tuple[Candidate, Listed]] = []
        self._stored = self._alive = 0
        self.files: dict[str, dict[ObjectId, Listed]] = {
            prefix: {} for prefix in (SNAPSHOTS_PREFIX, TRANSACTIONS_PREFIX, MANIFESTS_PREFIX)
        }
        """Files by prefix and id; without the chunk objects."""

    def note(self, prefix: str, kept: Sequence[Listed]) -> None:
        """Note a page of objects that are not garbage."""
        if prefix != CHUNKS_PREFIX:
            self.files[prefix].update((one.id, one) for one in kept)
            return
        if not kept or not len(self._names):
            return
        ids = np.array([one.id for one in kept], f"S{CHUNK_ID_BYTES}")
        sizes = np.array([one.info.size for one in kept], np.uint64)
        at = np.minimum(np.searchsorted(self._names, ids), len(self._names) - 1)
        known = self._names[at] == ids
        living = np.where(known, self._living[at], np.uint64(0))
        self._stored += int(sizes[known].sum())
        self._alive += int(living.sum())
        for i in np.flatnonzero(known & (living < sizes)).tolist():
            if kept[i].info.modified_us < self._older_than_us:
                size, alive = int(sizes[i]), int(living[i])
                self._packs.append((Candidate(id=kept[i].id, size_bytes=size, living_bytes=alive), kept[i]))

    def packs(self, below: float) -> dict[ObjectId, Listed]:
        """The chunk objects that are written again."""
        fixed = self._shares.fixed_chunks.missing(one.id for one, _ in self._packs)
        free = {one.id: listed for (one, listed), absent in zip(self._packs, fixed, strict=True) if absent}
        chosen = choose(
            (one for one, _ in self._packs if one.id in free),
            stored_bytes=self._stored,
            living_bytes=self._alive,
            below=below,
        )
        return {one.id: free[one.id] for one in chosen}

    def manifests(self, below: float) -> set[ObjectId]:
        """The manifests that are written again for the dead references in them."""
        listed = self.files[MANIFESTS_PREFIX]
        shares = self._shares.manifests
        stored = sum(one.info.size for one in listed.values())
        dead = sum(one.info.size * (1 - shares[id]) for id, one in listed.items() if id in shares)
        candidates = [
            Candidate(id=id, size_bytes=one.info.size, living_bytes=one.info.size * shares[id])
            for id, one in listed.items()
            if id in shares and id not in self._shares.fixed_manifests and self._is_old(one)
        ]
        return {one.id for one in choose(candidates, stored_bytes=stored, living_bytes=stored - dead, below=below)}

    def _is_old(self, one: Listed) -> bool:
        return one.info.modified_us < self._older_than_us


@dataclass(slots=True, kw_only=True)
class Repacked:
    """The result of a repacking, or of a dry run."""

    packs: int = 0
    """Chunk objects that were written again without their dead bytes."""
    manifests: int = 0
    """Manifests that were written again, because of dead references or of moved chunks."""
    snapshots: int = 0
    bytes_copied: int = 0
    """Bytes of chunks that were copied."""
    deleted: Swept = field(default_factory=Swept)
    """Old files that were deleted already."""


@dataclass(slots=True, kw_only=True)
class _Work:
    """The objects to be written again."""

    packs: dict[ObjectId, Listed]
    dead_rows: set[ObjectId]
    """Manifests, for the dead references in them."""
    moves: Moves
    manifests: dict[ObjectId, ManifestFile] = field(default_factory=dict)
    """Old id to new file."""
    snapshots: dict[ObjectId, ObjectId] = field(default_factory=dict)
    """Old id to new id."""


async def repack(
    log: RepositoryLog,
    files: Files,
    sources: Sources,
    limits: Limits,
    living: Living,
    shares: Shares,
    survey: Survey,
    how: Repacking,
    *,
    delete_now: bool,
    cutoff_us: int,
    dry_run: bool,
) -> Repacked:
    """Write objects with too many dead bytes again, and delete the old files where that may happen now.

    Parameters
    ----------
    living, shares
        Of the repository after the event of the collection.
    survey
        Of its objects.
    delete_now
        Whether the collection was asked to take everything up to now.
    cutoff_us
        Its cutoff.

    Raises
    ------
    FormatError, StorageError
        A living object cannot be read, or an object not written: nothing changed, or the old files stay.
    """
    job = _Job(log, files, sources, limits, living, shares, survey, how)
    work = await job.plan()
    done = Repacked()
    if work is None:
        return done
    since_us = log.store_time_us
    if not dry_run:
        await job.copy(work.moves)
    await job.rewrite_manifests(work, dry_run=dry_run)
    await job.rewrite_snapshots(work, dry_run=dry_run)
    if not dry_run and not await job.happen(work, since_us=since_us, keep=not delete_now):
        return done
    deleted = await job.delete(work, cutoff_us, dry_run=dry_run) if delete_now else Swept()
    return Repacked(
        packs=len(work.packs),
        manifests=len(work.manifests),
        snapshots=len(work.snapshots),
        bytes_copied=work.moves.num_bytes,
        deleted=deleted,
    )


class _Job:
    def __init__(
        self,
        log: RepositoryLog,
        files: Files,
        sources: Sources,
        limits: Limits,
        living: Living,
        shares: Shares,
        survey: Survey,
        how: Repacking,
    ) -> None:
        self._log = log
        self._files = files
        self._storage: Storage = files.storage
        self._sources = sources
        self._limits = limits
        self._walked = living.walked
        self._shares = shares
        self._survey = survey
        self._how = how
        in_files = isinstance(log, RefFilesLayout)
        reached = self._walked.snapshots.keys() if in_files else living.state.reachable()
        self._snapshots = [id for id in reached if self._walked.snapshots.get(id)]

    async def plan(self) -> _Work | None:
        """The objects to be written again; None: there are none."""
        packs = self._survey.packs(self._how.below)
        dead_rows = self._survey.manifests(self._how.below)
        if not packs and not dead_rows:
            return None
        rows = self._shares.spans.rows
        wanted = np.sort(np.array(list(packs), f"S{CHUNK_ID_BYTES}"))
        if len(wanted):
            names = names_of(rows)
            at = np.minimum(np.searchsorted(wanted, names), len(wanted) - 1)
            rows = rows[wanted[at] == names]
        else:
            rows = rows[:0]
        moves = Moves(rows, pack_size_bytes=self._how.pack_size_bytes, new_object_id=self._sources.new_object_id)
        return _Work(packs=packs, dead_rows=dead_rows, moves=moves)

    # ----------------------------------------------------------------- files

    async def copy(self, moves: Moves) -> None:
        """Write the new packs, some at a time."""
        budget = Budget(_COPY_BYTES)

        async def one(i: int) -> None:
            pack = moves.pack(i)
            longest = max(pack.size_bytes, _RUN_BYTES)
            async with budget.take(pack.size_bytes + longest):
                await self._storage.put(chunk_key(pack.id), await self._joined(pack.pieces, longest), kind="chunk")

        await run_each(one, range(len(moves)), limit=_COPIES)

    async def _joined(self, pieces: Sequence[Piece], longest: int) -> bytearray:
        """The bytes of pieces, of which no more than ``longest`` are read at a time."""
        joined = bytearray()
        first = 0
        while first < len(pieces):
            # Pieces of one object that lie near one another are one request.
            begin, last, end = pieces[first].start, first + 1, pieces[first].start + pieces[first].length
            while (
                last < len(pieces)
                and pieces[last].source == pieces[first].source
                and pieces[last].start - end <= _GAP
                and pieces[last].start + pieces[last].length - begin <= longest
            ):
                end = pieces[last].start + pieces[last].length
                last += 1
            body = memoryview(await self._read(pieces[first].source, begin, end))
            for piece in pieces[first:last]:
                joined += body[piece.start - begin : piece.start - begin + piece.length]
            first = last
        return joined

    async def _read(self, id: ObjectId, start: int, end: int) -> bytes | memoryview:
        if start == end:
            return b""
        try:
            body = (await self._storage.get(chunk_key(id), Range(start, end))).body
        except (ObjectNotFoundError, InvalidInputError) as error:
            raise _damaged(id, self._storage) from error
        if len(body) != end - start:
            raise _damaged(id, self._storage)
        return body

    async def rewrite_manifests(self, work: _Work, *, dry_run: bool) -> None:
        """Write those manifests again that have dead references, or references to objects that are rewritten."""
        one_at_a_time = asyncio.Lock()
        version, how = self._log.spec_version, self._how

        def made(manifest: Manifest, nodes: Collection[NodeId]) -> tuple[ManifestFile, bytes] | None:
            living = list(living_rows(manifest, nodes))
            if not any(map(len, living)):
                return None
            if manifest.id not in work.dead_rows and not any(work.moves.moved(refs).any() for refs in living):
                return None
            new = rewritten(manifest, nodes, work.moves, self._sources.new_object_id())
            data = b"" if dry_run else encode_manifest(new, version, how.level, how.locations)
            return ManifestFile(new.id, len(data), new.num_chunk_refs), data

        async def visit(manifest: Manifest, nodes: Collection[NodeId]) -> None:
            async with one_at_a_time:
                found = await off_loop(manifest.num_chunk_refs * _BYTES_PER_REF, lambda: made(manifest, nodes))
            if found is not None:
                if not dry_run:
                    await self._storage.put(manifest_key(found[0].object_id), found[1])
                work.manifests[manifest.id] = found[0]

        free = {
            id: use
            for id, use in self._walked.manifests.items()
            if id not in self._shares.fixed_manifests and use.nodes
        }
        await read_manifests(self._files, free, self._limits, visit)

    async def rewrite_snapshots(self, work: _Work, *, dry_run: bool) -> None:
        """Write those snapshots again that refer to manifests that were written again."""
        replaced = work.manifests
        affected = [
            id for id in self._snapshots if any(manifest in replaced for manifest in self._walked.snapshots[id])
        ]
        work.snapshots = {id: self._sources.new_object_id() for id in affected}
        if dry_run:
            return

        async def one(id: ObjectId) -> None:
            snapshot = await read_snapshot(self._files, id)
            new_id = work.snapshots[id]
            parent = snapshot.parent_id
            new = replace(
                _repointed(snapshot, replaced),
                id=new_id,
                parent_id=None if parent is None else work.snapshots.get(parent, parent),
            )
            version, level = self._log.spec_version, self._how.level
            size = len(snapshot.nodes) * _BYTES_PER_NODE
            data = await off_loop(size, lambda: encode_snapshot(new, version, level))
            await self._storage.put(snapshot_key(new_id), data)
            try:
                raw = await self._files.get(transaction_key(id))
            except ObjectNotFoundError:
                # It is not needed yet, and was not found under the old name either.
                return

            def renamed() -> bytes:
                log = decode_transaction_log(raw, expected_id=id)
                return encode_transaction_log(replace(log, id=new_id), version, level)

            await self._storage.put(transaction_key(new_id), await off_loop(len(raw), renamed))

        await run_each(one, affected, limit=self._limits.max_snapshots_in_memory)

    # ----------------------------------------------------------------- the event

    async def happen(self, work: _Work, *, since_us: int, keep: bool) -> bool:
        """Put the new snapshots in the place of the old ones; False: another collection was quicker."""
        if isinstance(self._log, RefFilesLayout):
            await replace_in_refs(self._log, self._storage, self._sources, work.snapshots, self._how.level)
            return True

        def propose(state: RepoState) -> Sequence[Event]:
            # Snapshots that left the graph meanwhile need no replacement.
            pairs = tuple((old, new) for old, new in work.snapshots.items() if old in state.snapshots)
            return [SnapshotsRewritten(replaced=pairs, keep=keep)] if pairs else []

        try:
            await self._log.append(propose, since_us=since_us)
        except SessionStateError as error:
            if error.kind != ErrorKind.COMMIT_NOT_ALLOWED:
                raise
            _LOG.warning("nothing was repacked in %s: %s", self._storage.describe(), error)
            return False
        await self._log.checkpoint()
        return True

    # ----------------------------------------------------------------- the old files

    async def delete(self, work: _Work, cutoff_us: int, *, dry_run: bool) -> Swept:
        """Delete the files that were replaced, except those that new snapshots of other clients refer to."""
        kept = Living(self._log, self._files, self._sources, self._limits, self._log.state)
        if not dry_run:
            # Snapshots that are known not to refer to any of them need not be read again.
            kept.know(
                {
                    id: uses
                    for id, uses in self._walked.snapshots.items()
                    if not any(manifest in work.manifests for manifest in uses)
                }
            )
            new = {old: file.object_id for old, file in work.manifests.items()}
            kept.know(
                {
                    id: tuple(new.get(manifest, manifest) for manifest in self._walked.snapshots[old])
                    for old, id in work.snapshots.items()
                }
            )
            await kept.grow(await self._log.refresh())
        sweep = Sweep(self._storage, older_than_us=cutoff_us, limits=self._limits, dry_run=dry_run, judge=kept)
        files = self._survey.files
        old: list[tuple[str, Iterable[ObjectId]]] = [
            (SNAPSHOTS_PREFIX, work.snapshots),
            (TRANSACTIONS_PREFIX, work.snapshots),
            (MANIFESTS_PREFIX, work.manifests),
        ]
        for prefix, ids in old:
            listed = [files[prefix][id] for id in ids if id in files[prefix]]
            await sweep.delete(prefix, [one for one in listed if one.info.modified_us < cutoff_us])
        await sweep.delete(CHUNKS_PREFIX, list(work.packs.values()))
        return sweep.swept


def _repointed(snapshot: Snapshot, replaced: Mapping[ObjectId, ManifestFile]) -> Snapshot:
    """The snapshot with other manifests in the place of some."""

    def repointed(node: NodeSnapshot) -> NodeSnapshot:
        if not any(ref.object_id in replaced for ref in node.manifests):
            return node
        return node.with_manifests(
            tuple(
                ref._replace(object_id=replaced[ref.object_id].object_id) if ref.object_id in replaced else ref
                for ref in node.manifests
            )
        )

    files = [replaced.get(id, file) for id, file in snapshot.manifest_files.items()]
    return replace(
        snapshot,
        nodes={path: repointed(node) for path, node in snapshot.nodes.items()},
        manifest_files={file.object_id: file for file in sorted(files)},
    )


def _damaged(id: ObjectId, storage: Storage) -> FormatError:
    return FormatError(
        f"cannot repack: chunk object {encode_id(id)} in {storage.describe()} is shorter than a manifest says, or "
        "gone; restore it, or collect with repack=False",
        ErrorKind.OBJECT_NOT_FOUND,
    )
