"""The living objects: everything that the snapshots of a repository refer to.

The set grows with new snapshots, and never shrinks, so an error of it keeps too much, never too little.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.keys import CHUNKS_PREFIX, MANIFESTS_PREFIX, SNAPSHOTS_PREFIX, TRANSACTIONS_PREFIX
from icechunk.format.values import INLINE, NATIVE, ChunkRefs, ManifestFile
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.log.repository.state import RepoState
from icechunk.maintenance.byte_ranges import CHUNK_ID_BYTES, SPAN_BYTES, native_rows
from icechunk.maintenance.limits import Limits
from icechunk.maintenance.reachability import Files, ManyRefs, RowSet, Use, Walked, read_all_manifests, walk
from icechunk.maintenance.sweep import Listed
from icechunk.runtime.clock import Sources

__all__ = ["Living", "LivingMemory", "Shares"]

_LOOK_EVERY_US: Final = 1_000_000
_ROW_WEIGHT: Final = 24
"""Bytes of a reference in a manifest, about, without the chunk where that is inline."""


class Shares:
    """The living bytes of each object; filled while manifests are read."""

    def __init__(self) -> None:
        self.spans: RowSet = RowSet(CHUNK_ID_BYTES + SPAN_BYTES)
        """Ranges of chunk objects that living references name (`icechunk.maintenance.byte_ranges`)."""
        self.fixed_manifests: frozenset[ObjectId] = frozenset()
        """Manifests that snapshots which cannot be written again use."""
        self.fixed_chunks: RowSet = RowSet(CHUNK_ID_BYTES)
        """Chunk objects that these refer to."""
        self.manifests: dict[ObjectId, float] = {}
        """Estimated living share of the bytes of manifests with dead references, by id; from 0 to 1."""

    def add(self, ids: Sequence[ObjectId], found: Sequence[ManyRefs]) -> None:
        """Note the references of some manifests, of which the living ones count."""
        alive, everything = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
        fixed = np.fromiter((id in self.fixed_manifests for id in ids), np.bool_, len(ids))
        for refs in found:
            weights = _weights(refs.rows)
            everything += np.bincount(refs.manifests, weights, len(ids)).astype(np.int64)
            alive += np.bincount(refs.manifests[refs.lives], weights[refs.lives], len(ids)).astype(np.int64)
            native = (refs.rows.kind == NATIVE) & refs.lives
            if native.any():
                self.spans.add(native_rows(refs.rows, native))
                self.fixed_chunks.add(refs.rows.chunk_id[native & fixed[refs.manifests]])
        for i, id in enumerate(ids):
            if alive[i] < everything[i]:
                self.manifests[id] = float(alive[i] / everything[i])
            else:
                self.manifests.pop(id, None)


def _weights(refs: ChunkRefs) -> npt.NDArray[np.int64]:
    """Bytes of each reference in its manifest, about."""
    inline = np.where(refs.kind == INLINE, refs.length, np.uint64(0))
    return _ROW_WEIGHT + inline.astype(np.int64)


class Living:
    """The objects that the snapshots of a repository refer to.

    Parameters
    ----------
    state
        The repository as it was last seen; nothing is read before `grow`.
    shares
        Filled for the manifests that the first `grow` reads; None: not needed.
    bases
        Snapshots that stay in format 1 although no ref leads to them.
    known
        What it refers to is taken over; all its snapshots are in the graph.
    """

    def __init__(
        self,
        log: RepositoryLog,
        files: Files,
        sources: Sources,
        limits: Limits,
        state: RepoState,
        shares: Shares | None = None,
        bases: Collection[ObjectId] = (),
        known: Living | None = None,
    ) -> None:
        self._log = log
        self._files = files
        self._sources = sources
        self._limits = limits
        self._shares = shares
        self._bases = frozenset(bases)
        self._transactions: set[ObjectId] = {FIRST_SNAPSHOT} if known is None else known._transactions
        self._chunks: RowSet = RowSet(CHUNK_ID_BYTES) if known is None else known._chunks
        self._has_grown = False
        self._looked_us = sources.elapsed_us()
        self._growing = asyncio.Lock()
        self.state: RepoState = state
        """The repository as it was last seen."""
        self.began: RepoState | None = None
        """The repository at the first growth."""
        self.walked: Walked = Walked() if known is None else known.walked
        """Its snapshots, and their manifests."""

    def know(self, snapshots: Mapping[ObjectId, Sequence[ObjectId]]) -> None:
        """Take snapshots, and the manifests of each, as read: they and the manifests stay, and their chunks are no
        concern."""
        for id, manifests in snapshots.items():
            self.walked.snapshots[id] = tuple(manifests)
            for manifest in manifests:
                self.walked.manifests.setdefault(manifest, Use(file=ManifestFile(manifest, 0, 0)))

    async def grow(self, state: RepoState) -> None:
        """Add the objects that a state reaches. Raises if one of its files cannot be read."""
        in_files = self._log.layout is Layout.REFS
        start = state.tips() | self._bases if in_files else set(state.snapshots)
        if self.began is None:
            self.began = state
        elif not start <= self.walked.snapshots.keys():
            self._has_grown = True
        manifests = await walk(self._files, start, self.walked, self._limits, follow_parents=in_files)
        self._transactions |= self.walked.snapshots.keys()
        if not in_files:
            self._transactions.update(*state.snapshots.pruned_transactions().values())
            if self._shares is not None:
                self._shares.fixed_manifests = frozenset(
                    manifest for id in _detached(state) for manifest in self.walked.snapshots[id]
                )
        if self._shares is not None:
            # A manifest that an array found later has its share of dead references counted anew.
            manifests = {id: self.walked.manifests[id] for id in manifests}
        await self._read(manifests, self._shares)
        self._shares = None

    async def _read(self, manifests: Mapping[ObjectId, Use], shares: Shares | None) -> None:
        def visit(ids: Sequence[ObjectId], found: Sequence[ManyRefs]) -> None:
            for refs in found:
                self._chunks.add(refs.rows.chunk_id[(refs.rows.kind == NATIVE) & refs.lives])
            if shares is not None:
                shares.add(ids, found)

        await read_all_manifests(self._files, manifests, self._limits, visit)

    @property
    def is_as_it_began(self) -> bool:
        """Whether no snapshot has come to it since its first growth, so that its shares cover all of it."""
        return self.began is not None and not self._has_grown

    @property
    def num_rows(self) -> int:
        """Number of chunk objects and snapshots in it."""
        return len(self._chunks) + len(self.walked.snapshots)

    async def look_again(self) -> None:
        """Look about once a second for new snapshots, and keep their references."""
        async with self._growing:
            if self._sources.elapsed_us() - self._looked_us < _LOOK_EVERY_US:
                return
            before, self.state = self.state, await self._log.refresh()
            if self.state.snapshots is not before.snapshots or self.state.tips() != before.tips():
                await self.grow(self.state)
            self._looked_us = self._sources.elapsed_us()

    def garbage(self, prefix: str, listed: Sequence[Listed]) -> list[Listed]:
        """The objects below a prefix that nothing refers to."""
        if prefix == CHUNKS_PREFIX:
            absent = self._chunks.missing(one.id for one in listed)
            return [one for one, gone in zip(listed, absent, strict=True) if gone]
        kept: Collection[ObjectId] = {
            SNAPSHOTS_PREFIX: self.walked.snapshots.keys(),
            TRANSACTIONS_PREFIX: self._transactions,
            MANIFESTS_PREFIX: self.walked.manifests.keys(),
        }[prefix]
        first = FIRST_SNAPSHOT if prefix == SNAPSHOTS_PREFIX else None
        return [one for one in listed if one.id not in kept and one.id != first]


_MOST_ROWS: Final = 1_000_000
"""Chunk objects, ranges and snapshots together that are remembered."""


class LivingMemory:
    """The living objects that the last collection of a repository found, for the next one of the same process.

    Files never change, so the references of a snapshot are read once. A collection starts from the remembered objects
    as long as every snapshot of them is still in the graph: then all of them still live, and only new snapshots are
    read. After an expiration, or any other removal, everything is read again.
    """

    def __init__(self) -> None:
        self._kept: tuple[Living, Shares, frozenset[ObjectId]] | None = None
        self._lock = threading.Lock()

    def take(self, state: RepoState) -> tuple[Living, Shares] | None:
        """The remembered objects, if they apply to that state; they are forgotten until they are kept again."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is None:
            return None
        living, shares, detached = kept
        known = living.walked.snapshots.keys()
        if any(id not in state.snapshots for id in known):
            return None
        # Those that no branch reaches any more have chunks that must not move, which the shares do not show.
        now_detached = _detached(state)
        return (living, shares) if all(id in detached or id not in known for id in now_detached) else None

    def keep(self, living: Living, shares: Shares) -> None:
        """Remember the findings of a collection that succeeded and rewrote nothing."""
        began = living.began if living.is_as_it_began else None
        if began is not None and living.num_rows + len(shares.spans) <= _MOST_ROWS:
            with self._lock:
                # Those that have lost their branch since then are not in the shares.
                self._kept = living, shares, frozenset(_detached(began))


def _detached(state: RepoState) -> set[ObjectId]:
    """Snapshots of the graph that no branch or tag reaches."""
    return set(state.snapshots) - state.reachable()
