"""History: ancestry, the ops log, and differences between two versions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Final

from icechunk.log.repository.state import require_snapshot
from icechunk.log.session.merge.diff import diff as diff_transactions
from icechunk.ops import Update
from icechunk.repository.base import RepositoryBase, select, snapshot_id_from_text
from icechunk.repository.views import lineage_infos, manifest_file, snapshot_info, update
from icechunk.runtime.twins import run_sync, synchronous
from icechunk.snapshots import Diff, ManifestFileInfo, SnapshotInfo

__all__ = ["History"]


class History(RepositoryBase):
    """The snapshots that still exist, and the operations that made them."""

    async def async_ancestry(
        self, *, branch: str | None = None, tag: str | None = None, snapshot_id: str | None = None
    ) -> AsyncIterator[SnapshotInfo]:
        """A snapshot and its ancestors, newest first.

        Exactly one of the three must be given.

        Raises
        ------
        ValueError
            None of them is, or more than one.
        RefNotFoundError, SnapshotNotFoundError
            There is no such thing.
        """
        for info in await self._lineage(branch, tag, snapshot_id):
            yield info

    async def _lineage(self, branch: str | None, tag: str | None, snapshot_id: str | None) -> Iterator[SnapshotInfo]:
        tip = select(
            await self._core.state(snapshot_id, branch=branch, tag=tag), branch=branch, tag=tag, snapshot_id=snapshot_id
        )
        state = await self._core.learn(tip, ancestry=True)
        require_snapshot(state, tip)
        return lineage_infos(state.snapshots, tip)

    def ancestry(
        self, *, branch: str | None = None, tag: str | None = None, snapshot_id: str | None = None
    ) -> Iterator[SnapshotInfo]:
        """Synchronous twin of `async_ancestry`, which raises its errors at the call, before the first item."""
        # No item needs a request once the history is known, so all are made in the caller's thread.
        return run_sync(self._lineage(branch, tag, snapshot_id))

    async def ops_log_async(self) -> AsyncIterator[Update]:
        """Everything that ever happened to the repository, newest first."""
        log = await self._core.log()
        await log.refresh()
        async for entry in log.updates():
            yield update(entry)

    ops_log: Final = synchronous(ops_log_async)

    async def lookup_snapshot_async(self, snapshot_id: str) -> SnapshotInfo:
        """A snapshot's entry in the history. Raises `SnapshotNotFoundError`."""
        id = snapshot_id_from_text("snapshot_id", snapshot_id)
        return snapshot_info(require_snapshot(await self._core.state(snapshot_id), id))

    lookup_snapshot: Final = synchronous(lookup_snapshot_async)

    async def list_manifest_files_async(self, snapshot_id: str) -> list[ManifestFileInfo]:
        """The manifest objects that a snapshot uses, ascending by id. Raises `SnapshotNotFoundError`."""
        snapshot = await self._core.assets.snapshot(snapshot_id_from_text("snapshot_id", snapshot_id))
        return [manifest_file(file) for file in snapshot.manifest_files.values()]

    list_manifest_files: Final = synchronous(list_manifest_files_async)

    async def diff_async(
        self,
        *,
        from_branch: str | None = None,
        from_tag: str | None = None,
        from_snapshot_id: str | None = None,
        to_branch: str | None = None,
        to_tag: str | None = None,
        to_snapshot_id: str | None = None,
    ) -> Diff:
        """The combined changes of the commits after one snapshot, up to and with another.

        Exactly one ``from_*`` and one ``to_*`` must be given, and the first must be an ancestor of the second.

        Raises
        ------
        InvalidInputError
            It is not (kind ``bad-snapshot-chain-for-diff``).
        ValueError, RefNotFoundError, SnapshotNotFoundError
            As in `async_ancestry`.
        """
        await self._core.state(branch=to_branch, tag=to_tag)
        state = await self._core.state(from_snapshot_id, branch=from_branch, tag=from_tag)
        start = select(state, branch=from_branch, tag=from_tag, snapshot_id=from_snapshot_id)
        if to_snapshot_id is not None:
            state = await self._core.learn(snapshot_id_from_text("to_snapshot_id", to_snapshot_id))
        end = select(state, branch=to_branch, tag=to_tag, snapshot_id=to_snapshot_id)
        return Diff.of(diff_transactions(*await self._between(start, end)))

    diff: Final = synchronous(diff_async)
