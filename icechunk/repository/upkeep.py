"""Looking after a repository: expiration, collection of garbage, pruning of the log, storage statistics."""

from __future__ import annotations

import warnings
from datetime import datetime
from typing import Final

from icechunk.format.ids import encode_id
from icechunk.inputs import WrongTypeError, require_type
from icechunk.maintenance.collect import collect_garbage
from icechunk.maintenance.expire import expire
from icechunk.maintenance.limits import Limits
from icechunk.maintenance.prune import prune_log
from icechunk.maintenance.stats import chunk_storage_stats
from icechunk.moments import us_of
from icechunk.ops import ChunkStorageStats, GCSummary
from icechunk.repository.base import RepositoryBase
from icechunk.sync import run_sync

__all__ = ["Upkeep"]

_MIB: Final = 1024 * 1024
_GIB: Final = 1024 * _MIB


class Upkeep(RepositoryBase):
    """What keeps a repository from growing for ever, and says how large it is."""

    async def expire_snapshots_async(
        self, older_than: datetime, *, delete_expired_branches: bool = False, delete_expired_tags: bool = False
    ) -> set[str]:
        """Take snapshots written before a time out of the history. Their data stays until `garbage_collect`.

        What a branch or tag points to stays, and so does the first snapshot. Survivors whose parent leaves become
        children of the first snapshot; in format 2 diffs and rebases over the gap still know what each commit changed.

        Parameters
        ----------
        older_than
            With a time zone; exclusive.
        delete_expired_branches, delete_expired_tags
            Delete branches (but ``main``) and tags that point to a snapshot that old.

        Returns
        -------
        set
            Ids of the snapshots that left the history.

        Raises
        ------
        WrongTypeError
            ``older_than`` is no datetime, or has no time zone.
        ReadOnlyError
            The repository's status, or its storage, is read-only.
        """
        require_type("delete_expired_branches", delete_expired_branches, bool)
        require_type("delete_expired_tags", delete_expired_tags, bool)
        limit_us = _instant_us("older_than", older_than)
        released = await expire(
            await self._core.log(),
            self._core.storage,
            older_than_us=limit_us,
            delete_expired_branches=delete_expired_branches,
            delete_expired_tags=delete_expired_tags,
            level=self._core.settings.compression_level,
        )
        return {encode_id(id) for id in released}

    def expire_snapshots(
        self, older_than: datetime, *, delete_expired_branches: bool = False, delete_expired_tags: bool = False
    ) -> set[str]:
        """Synchronous twin of `expire_snapshots_async`."""
        return run_sync(
            self.expire_snapshots_async(
                older_than,
                delete_expired_branches=delete_expired_branches,
                delete_expired_tags=delete_expired_tags,
            )
        )

    async def garbage_collect_async(
        self,
        delete_object_older_than: datetime,
        *,
        dry_run: bool = False,
        max_snapshots_in_memory: int = 50,
        max_compressed_manifest_mem_bytes: int = 512 * _MIB,
        max_decoded_manifest_mem_bytes: int = 4 * _GIB,
        max_concurrent_manifest_fetches: int = 500,
        max_concurrent_deletes: int = 10,
        max_consecutive_delete_failures: int = 50,
        max_concurrent_listings: int | None = None,
    ) -> GCSummary:
        """Delete the objects of snapshots that no branch or tag reaches, and those of commits that never happened.

        Safe while others write, in the log layout whatever their clocks and pauses: a session that began before
        the cutoff is told at its commit to repeat the work. In the layouts of the published format choose a time
        before which no session that may still commit has begun.

        Parameters
        ----------
        delete_object_older_than
            With a time zone; exclusive. Only objects that the store says are older. A time in the future counts as
            a little before now.
        dry_run
            Delete nothing, and count what would be deleted.
        max_snapshots_in_memory, max_compressed_manifest_mem_bytes, max_decoded_manifest_mem_bytes
            Bounds of memory while what is reachable is read.
        max_concurrent_manifest_fetches, max_concurrent_deletes, max_concurrent_listings
            Requests in flight; a deletion takes up to a thousand objects. Listings None: 16.
        max_consecutive_delete_failures
            So many failed deletions in a row end the collection.

        Raises
        ------
        WrongTypeError
            ``delete_object_older_than`` is no datetime, or has no time zone.
        InvalidInputError
            A bound below 1.
        ReadOnlyError
            The repository's status is read-only (also on a dry run), or its storage.
        FormatError, StorageError
            Something reachable is missing or cannot be read: nothing was deleted. Or deleting fails again and again
            (kind ``gc-deletes-failing``): what was deleted was garbage.
        """
        require_type("dry_run", dry_run, bool)
        cutoff_us = _instant_us("delete_object_older_than", delete_object_older_than)
        limits = Limits(
            max_snapshots_in_memory=max_snapshots_in_memory,
            max_compressed_manifest_mem_bytes=max_compressed_manifest_mem_bytes,
            max_decoded_manifest_mem_bytes=max_decoded_manifest_mem_bytes,
            max_concurrent_manifest_fetches=max_concurrent_manifest_fetches,
            max_concurrent_deletes=max_concurrent_deletes,
            max_consecutive_delete_failures=max_consecutive_delete_failures,
            max_concurrent_listings=max_concurrent_listings,
        )
        log, storage, sources = await self._core.log(), self._core.storage, self._core.sources
        summary = await collect_garbage(log, storage, sources, older_than_us=cutoff_us, limits=limits, dry_run=dry_run)
        if not dry_run:
            await prune_log(log, storage, sources)
        return summary

    def garbage_collect(
        self,
        delete_object_older_than: datetime,
        *,
        dry_run: bool = False,
        max_snapshots_in_memory: int = 50,
        max_compressed_manifest_mem_bytes: int = 512 * _MIB,
        max_decoded_manifest_mem_bytes: int = 4 * _GIB,
        max_concurrent_manifest_fetches: int = 500,
        max_concurrent_deletes: int = 10,
        max_consecutive_delete_failures: int = 50,
        max_concurrent_listings: int | None = None,
    ) -> GCSummary:
        """Synchronous twin of `garbage_collect_async`."""
        return run_sync(
            self.garbage_collect_async(
                delete_object_older_than,
                dry_run=dry_run,
                max_snapshots_in_memory=max_snapshots_in_memory,
                max_compressed_manifest_mem_bytes=max_compressed_manifest_mem_bytes,
                max_decoded_manifest_mem_bytes=max_decoded_manifest_mem_bytes,
                max_concurrent_manifest_fetches=max_concurrent_manifest_fetches,
                max_concurrent_deletes=max_concurrent_deletes,
                max_consecutive_delete_failures=max_consecutive_delete_failures,
                max_concurrent_listings=max_concurrent_listings,
            )
        )

    async def prune_log_async(self) -> int:
        """Delete entries of the log that every reader can do without. Part of `garbage_collect_async`.

        Entries up to the last checkpoint are announced as old now, and deleted by a call at least seven days later.
        In layouts without a log nothing happens, but for the entries of a log that was converted.

        Returns
        -------
        int
            Entries deleted.

        Raises
        ------
        ReadOnlyError
            The storage can only be read.
        StorageError
            The store gives no answer; call again.
        """
        return await prune_log(await self._core.log(), self._core.storage, self._core.sources)

    def prune_log(self) -> int:
        """Synchronous twin of `prune_log_async`."""
        return run_sync(self.prune_log_async())

    async def chunk_storage_stats_async(
        self,
        *,
        max_snapshots_in_memory: int = 50,
        max_compressed_manifest_mem_bytes: int = 512 * _MIB,
        max_decoded_manifest_mem_bytes: int = 4 * _GIB,
        max_concurrent_manifest_fetches: int = 500,
    ) -> ChunkStorageStats:
        """Bytes of all chunks that branches and tags reach, each counted once, by where they are.

        Parameters
        ----------
        max_snapshots_in_memory, max_compressed_manifest_mem_bytes, max_decoded_manifest_mem_bytes
            Bounds of memory.
        max_concurrent_manifest_fetches
            Requests in flight.

        Raises
        ------
        InvalidInputError
            A bound below 1.
        FormatError
            A snapshot or manifest is missing, or cannot be read.
        """
        limits = Limits(
            max_snapshots_in_memory=max_snapshots_in_memory,
            max_compressed_manifest_mem_bytes=max_compressed_manifest_mem_bytes,
            max_decoded_manifest_mem_bytes=max_decoded_manifest_mem_bytes,
            max_concurrent_manifest_fetches=max_concurrent_manifest_fetches,
        )
        return await chunk_storage_stats(await self._core.log(), self._core.storage, limits)

    def chunk_storage_stats(
        self,
        *,
        max_snapshots_in_memory: int = 50,
        max_compressed_manifest_mem_bytes: int = 512 * _MIB,
        max_decoded_manifest_mem_bytes: int = 4 * _GIB,
        max_concurrent_manifest_fetches: int = 500,
    ) -> ChunkStorageStats:
        """Synchronous twin of `chunk_storage_stats_async`."""
        return run_sync(
            self.chunk_storage_stats_async(
                max_snapshots_in_memory=max_snapshots_in_memory,
                max_compressed_manifest_mem_bytes=max_compressed_manifest_mem_bytes,
                max_decoded_manifest_mem_bytes=max_decoded_manifest_mem_bytes,
                max_concurrent_manifest_fetches=max_concurrent_manifest_fetches,
            )
        )

    async def total_chunks_storage_async(
        self,
        *,
        max_snapshots_in_memory: int = 50,
        max_compressed_manifest_mem_bytes: int = 512 * _MIB,
        max_decoded_manifest_mem_bytes: int = 4 * _GIB,
        max_concurrent_manifest_fetches: int = 500,
    ) -> int:
        """Bytes of native chunks: deprecated in favour of ``chunk_storage_stats_async().native_bytes``.

        Parameters and errors as there.
        """
        _warn_of_total_chunks_storage("total_chunks_storage_async", "chunk_storage_stats_async")
        stats = await self.chunk_storage_stats_async(
            max_snapshots_in_memory=max_snapshots_in_memory,
            max_compressed_manifest_mem_bytes=max_compressed_manifest_mem_bytes,
            max_decoded_manifest_mem_bytes=max_decoded_manifest_mem_bytes,
            max_concurrent_manifest_fetches=max_concurrent_manifest_fetches,
        )
        return stats.native_bytes

    def total_chunks_storage(
        self,
        *,
        max_snapshots_in_memory: int = 50,
        max_compressed_manifest_mem_bytes: int = 512 * _MIB,
        max_decoded_manifest_mem_bytes: int = 4 * _GIB,
        max_concurrent_manifest_fetches: int = 500,
    ) -> int:
        """Synchronous twin of `total_chunks_storage_async`, deprecated as well."""
        _warn_of_total_chunks_storage("total_chunks_storage", "chunk_storage_stats")
        return self.chunk_storage_stats(
            max_snapshots_in_memory=max_snapshots_in_memory,
            max_compressed_manifest_mem_bytes=max_compressed_manifest_mem_bytes,
            max_decoded_manifest_mem_bytes=max_decoded_manifest_mem_bytes,
            max_concurrent_manifest_fetches=max_concurrent_manifest_fetches,
        ).native_bytes


def _warn_of_total_chunks_storage(name: str, better: str) -> None:
    warnings.warn(
        f"{name} is deprecated: {better}() also counts inline and virtual chunks, and its "
        "native_bytes are what this returns",
        DeprecationWarning,
        stacklevel=3,
    )


def _instant_us(name: str, value: datetime) -> int:
    """µs since the epoch."""
    require_type(name, value, datetime)
    if value.tzinfo is None or value.utcoffset() is None:
        raise WrongTypeError(f"{name} needs a time zone, for example datetime.now(timezone.utc)")
    return us_of(value)
