"""The living objects: everything that the snapshots of a repository refer to.

The set grows with new snapshots, and never shrinks, so an error of it keeps too much, never too little.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import anyio

from icechunk.format.ids import FIRST_SNAPSHOT, NodeId, ObjectId
from icechunk.format.manifest.refs_by_node import grouped_refs
from icechunk.format.values import INLINE, NATIVE, ChunkRefs, Manifest, ManifestFile
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.log.repository.state import RepoState
from icechunk.maintenance.reachability import Files, Limits, RowSet, Use, Walked, living_rows, read_manifests, walk
from icechunk.maintenance.spans import CHUNK_ID_BYTES, SPAN_BYTES, native_rows
from icechunk.maintenance.sweep import Listed
from icechunk.runtime.clock import Sources
from icechunk.transfer.assets import off_loop

__all__ = ["Living", "Shares"]

_LOOK_EVERY_US: Final = 1_000_000
_BYTES_PER_REF: Final = 32
_ROW_WEIGHT: Final = 24
"""About what a reference takes in a manifest, bytes, beside the chunk where that is inline."""


class Shares:
    """The living bytes of each object; filled while manifests are read."""

    def __init__(self) -> None:
        self.spans = RowSet(CHUNK_ID_BYTES + SPAN_BYTES)
        """Ranges of chunk objects that living references name (`icechunk.maintenance.spans`)."""
        self.fixed_manifests: frozenset[ObjectId] = frozenset()
        """Manifests that snapshots which cannot be written again use."""
        self.fixed_chunks = RowSet(CHUNK_ID_BYTES)
        """Chunk objects that these refer to."""
        self.manifests: dict[ObjectId, float] = {}
        """Of manifests with dead references, the estimated living share of their bytes; 0 to 1."""

    def add(self, manifest: Manifest, living: Sequence[ChunkRefs]) -> None:
        """Note the living references of a manifest."""
        for refs in living:
            native = refs.kind == NATIVE
            if native.any():
                self.spans.add(native_rows(refs, native))
                if manifest.id in self.fixed_manifests:
                    self.fixed_chunks.add(refs.chunk_id[native])
        alive = sum(map(_weight, living))
        everything = sum(_weight(part.rows) for part in grouped_refs(manifest.arrays).parts)
        if alive < everything:
            self.manifests[manifest.id] = alive / everything
        else:
            self.manifests.pop(manifest.id, None)


def _weight(refs: ChunkRefs) -> int:
    return _ROW_WEIGHT * len(refs) + int(refs.length[refs.kind == INLINE].sum())


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
    ) -> None:
        self._log = log
        self._files = files
        self._sources = sources
        self._limits = limits
        self._shares = shares
        self._bases = frozenset(bases)
        self._transactions: set[ObjectId] = {FIRST_SNAPSHOT}
        self._chunks = RowSet(CHUNK_ID_BYTES)
        self._looked_us = sources.elapsed_us()
        self._growing = anyio.Lock()
        self.state = state
        """The repository as it was last seen."""
        self.walked = Walked()
        """Its snapshots, and their manifests."""

    def know(self, snapshots: Mapping[ObjectId, Sequence[ObjectId]]) -> None:
        """Take snapshots, and the manifests of each, as read: they and the manifests stay, and their chunks are no
        concern."""
        for id, manifests in snapshots.items():
            self.walked.snapshots[id] = tuple(manifests)
            for manifest in manifests:
                self.walked.manifests.setdefault(manifest, Use(file=ManifestFile(manifest, 0, 0)))

    async def grow(self, state: RepoState) -> None:
        """Add what a state reaches. Raises where something of it cannot be read."""
        in_files = self._log.layout is Layout.REFS
        start = state.tips() | self._bases if in_files else set(state.snapshots)
        manifests = await walk(self._files, start, self.walked, self._limits, follow_parents=in_files)
        self._transactions |= self.walked.snapshots.keys()
        if not in_files:
            for record in state.snapshots.values():
                self._transactions.update(record.pruned_ancestor_tx_logs)
            if self._shares is not None:
                detached = set(state.snapshots) - state.reachable()
                self._shares.fixed_manifests = frozenset(
                    manifest for id in detached for manifest in self.walked.snapshots[id]
                )
        await self._read(manifests, self._shares)
        self._shares = None

    async def _read(self, manifests: Mapping[ObjectId, Use], shares: Shares | None) -> None:
        adding = anyio.Lock()

        def add(manifest: Manifest, nodes: Collection[NodeId]) -> None:
            living = list(living_rows(manifest, nodes))
            for refs in living:
                self._chunks.add(refs.chunk_id[refs.kind == NATIVE])
            if shares is not None:
                shares.add(manifest, living)

        async def visit(manifest: Manifest, nodes: Collection[NodeId]) -> None:
            async with adding:
                await off_loop(manifest.num_chunk_refs * _BYTES_PER_REF, lambda: add(manifest, nodes))

        await read_manifests(self._files, manifests, self._limits, visit)

    async def look_again(self) -> None:
        """See, about once a second, whether there are new snapshots, and keep what they refer to."""
        async with self._growing:
            if self._sources.elapsed_us() - self._looked_us < _LOOK_EVERY_US:
                return
            before, self.state = self.state, await self._log.refresh()
            if self.state.snapshots is not before.snapshots or self.state.tips() != before.tips():
                await self.grow(self.state)
            self._looked_us = self._sources.elapsed_us()

    def snapshots_not_in(self, listed: Sequence[Listed]) -> list[Listed]:
        """Those of the objects listed that are no snapshots of the repository."""
        kept = self.walked.snapshots
        return [one for one in listed if one.id not in kept and one.id != FIRST_SNAPSHOT]

    def transactions_not_in(self, listed: Sequence[Listed]) -> list[Listed]:
        """The same for transaction logs."""
        return [one for one in listed if one.id not in self._transactions]

    def manifests_not_in(self, listed: Sequence[Listed]) -> list[Listed]:
        """The same for manifests."""
        return [one for one in listed if one.id not in self.walked.manifests]

    def chunks_not_in(self, listed: Sequence[Listed]) -> list[Listed]:
        """The same for chunk objects."""
        absent = self._chunks.missing(one.id for one in listed)
        return [one for one, gone in zip(listed, absent, strict=True) if gone]
