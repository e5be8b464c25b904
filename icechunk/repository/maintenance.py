"""The verbs of maintenance: expiration, garbage collection, pruning of the log, statistics, rewriting of manifests.

Each imports its engine when it is first called: most processes that open a repository never do.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, get_args

from icechunk.config import (
    ManifestConfig,
    ManifestSplitCondition,
    ManifestSplitDimCondition,
    ManifestSplittingConfig,
    RepositoryConfig,
    config_to_dict,
)
from icechunk.config.manifest import DEFAULT_SPLIT_SIZE
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.ids import encode_ids
from icechunk.log.repository.port import Layout
from icechunk.log.repository.ref_files.layout import needs_format_2
from icechunk.maintenance.limits import Limits
from icechunk.ops import ChunkStorageStats, GCSummary
from icechunk.repository.sessions import Sessions
from icechunk.runtime.checks import WrongTypeError, json_metadata, require_type
from icechunk.runtime.clock import us_of
from icechunk.runtime.twins import synchronous, warn_caller
from icechunk.session.commit import How, write_snapshot
from icechunk.types import CommitMethod

__all__ = ["Maintenance"]

_LIMITS: Final = Limits()


def _unsplit() -> ManifestSplittingConfig:
    """The official library's name for the absence of splitting."""
    return ManifestSplittingConfig.from_dict(
        {ManifestSplitCondition.path_matches(".*"): {ManifestSplitDimCondition.Any(): DEFAULT_SPLIT_SIZE}}
    )


class Maintenance(Sessions):
    """Removes unneeded data, measures what is stored, and rewrites manifests."""

    async def expire_snapshots_async(
        self, older_than: datetime, *, delete_expired_branches: bool = False, delete_expired_tags: bool = False
    ) -> set[str]:
        """Take snapshots written before a time out of the history. Their data stays until `garbage_collect`.

        The tips of branches and tags stay, and so does the first snapshot. Survivors whose parent leaves become
        children of the first snapshot; in format 2 diffs and rebases over the gap still know the changes of each
        commit.

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
        from icechunk.maintenance.expire import expire

        require_type("delete_expired_branches", delete_expired_branches, bool)
        require_type("delete_expired_tags", delete_expired_tags, bool)
        limit_us = _instant_us("older_than", older_than)
        released = await expire(
            await self._core.log(),
            self._core.storage,
            self._core.sources,
            older_than_us=limit_us,
            delete_expired_branches=delete_expired_branches,
            delete_expired_tags=delete_expired_tags,
            level=self._core.settings.compression_level,
        )
        return set(encode_ids(list(released)))

    expire_snapshots: Final = synchronous(expire_snapshots_async)

    async def garbage_collect_async(
        self,
        delete_object_older_than: datetime,
        *,
        dry_run: bool = False,
        repack: bool = True,
        repack_below_percent: int | None = None,
        max_snapshots_in_memory: int = _LIMITS.max_snapshots_in_memory,
        max_compressed_manifest_mem_bytes: int = _LIMITS.max_compressed_manifest_mem_bytes,
        max_decoded_manifest_mem_bytes: int = _LIMITS.max_decoded_manifest_mem_bytes,
        max_concurrent_manifest_fetches: int = _LIMITS.max_concurrent_manifest_fetches,
        max_concurrent_deletes: int = _LIMITS.max_concurrent_deletes,
        max_consecutive_delete_failures: int = _LIMITS.max_consecutive_delete_failures,
        max_concurrent_listings: int | None = _LIMITS.max_concurrent_listings,
    ) -> GCSummary:
        """Delete the objects of snapshots that no branch or tag reaches, and those of commits that never happened.

        Safe while others write, in the log layout with any clocks and pauses of theirs: a commit of a session that
        began before the cutoff is refused, and the work has to be repeated. In the layouts of the published format
        choose a time before which no session that may still commit has begun.

        Objects that are still needed may hold bytes that are not: a chunk object that many chunks share, a manifest
        that many arrays share. Those with too many of them are written again without them, with the snapshots that
        refer to them: the same content, times and messages, with **new snapshot ids**, to which branches and tags point
        afterwards. At most 1.5 times the needed bytes are stored then. The old snapshots and objects are deleted at
        once where ``delete_object_older_than`` is at most a minute ago; otherwise they can still be read by id, until a
        collection of files older than this one.

        What an earlier call on this repository object found to be needed is not read again, unless a snapshot has left
        the history since.

        Parameters
        ----------
        delete_object_older_than
            With a time zone; exclusive. Only objects that the store says are older. A time in the future counts as
            a little before now.
        dry_run
            Delete nothing, and count the objects that would be deleted and rewritten.
        repack
            Whether objects with too many dead bytes are written again.
        repack_below_percent
            Those of whose bytes less than so many percent are needed, 0 to 100; 100: all with a dead byte, so that
            certainly no byte of deleted data is left. None: as configured (`EngineConfig`, 50).
        max_snapshots_in_memory, max_compressed_manifest_mem_bytes, max_decoded_manifest_mem_bytes
            Bounds of memory while reachable files are read.
        max_concurrent_manifest_fetches, max_concurrent_deletes, max_concurrent_listings
            Requests in flight; a deletion takes up to a thousand objects. Listings None: 16.
        max_consecutive_delete_failures
            So many failed deletions in a row end the collection.

        Raises
        ------
        WrongTypeError
            ``delete_object_older_than`` is no datetime, or has no time zone.
        InvalidInputError
            A bound below 1, or a percentage that is none.
        ReadOnlyError
            The repository's status is read-only (also on a dry run), or its storage.
        FormatError, StorageError
            Something reachable is missing or cannot be read: nothing was deleted. Or deleting fails again and again
            (kind ``gc-deletes-failing``): all deleted objects were garbage.
        """
        from icechunk.maintenance.collect import collect_garbage
        from icechunk.maintenance.living import LivingMemory
        from icechunk.maintenance.prune import prune_log
        from icechunk.maintenance.repack import Repacking

        require_type("dry_run", dry_run, bool)
        require_type("repack", repack, bool)
        require_type("repack_below_percent", repack_below_percent, int, optional=True)
        settings = self._core.settings
        percent = settings.repack_below_percent if repack_below_percent is None else repack_below_percent
        if not 0 <= percent <= 100:
            raise InvalidInputError(
                f"repack_below_percent is a number of percent, 0 to 100, not {percent}", ErrorKind.INVALID_SETTING
            )
        repacking = Repacking(
            below=percent / 100,
            pack_size_bytes=settings.pack_size_bytes,
            level=settings.compression_level,
            locations=settings.locations,
        )
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
        if self._core.living is None:
            self._core.living = LivingMemory()
        summary = await collect_garbage(
            log,
            storage,
            sources,
            older_than_us=cutoff_us,
            limits=limits,
            dry_run=dry_run,
            repacking=repacking if repack else None,
            memory=self._core.living,
        )
        if not dry_run:
            await prune_log(log, storage, sources)
        return summary

    garbage_collect: Final = synchronous(garbage_collect_async)

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
        from icechunk.maintenance.prune import prune_log

        return await prune_log(await self._core.log(), self._core.storage, self._core.sources)

    prune_log: Final = synchronous(prune_log_async)

    async def chunk_storage_stats_async(
        self,
        *,
        max_snapshots_in_memory: int = _LIMITS.max_snapshots_in_memory,
        max_compressed_manifest_mem_bytes: int = _LIMITS.max_compressed_manifest_mem_bytes,
        max_decoded_manifest_mem_bytes: int = _LIMITS.max_decoded_manifest_mem_bytes,
        max_concurrent_manifest_fetches: int = _LIMITS.max_concurrent_manifest_fetches,
        list_objects: bool = True,
    ) -> ChunkStorageStats:
        """Bytes of all chunks that branches and tags reach, each counted once, by where they are.

        Beside these, the bytes of chunk objects that nothing needs: dead ones in objects that are needed, and objects
        that nothing refers to.

        Parameters
        ----------
        max_snapshots_in_memory, max_compressed_manifest_mem_bytes, max_decoded_manifest_mem_bytes
            Bounds of memory.
        max_concurrent_manifest_fetches
            Requests in flight.
        list_objects
            Whether chunk objects are listed, a thousand a request, to find unneeded bytes; if False, and on a
            storage that has no listings, ``dead_bytes`` and ``unreferenced_bytes`` are None.

        Raises
        ------
        InvalidInputError
            A bound below 1.
        FormatError
            A snapshot or manifest is missing, or cannot be read.
        """
        from icechunk.maintenance.stats import chunk_storage_stats

        require_type("list_objects", list_objects, bool)
        limits = Limits(
            max_snapshots_in_memory=max_snapshots_in_memory,
            max_compressed_manifest_mem_bytes=max_compressed_manifest_mem_bytes,
            max_decoded_manifest_mem_bytes=max_decoded_manifest_mem_bytes,
            max_concurrent_manifest_fetches=max_concurrent_manifest_fetches,
        )
        return await chunk_storage_stats(await self._core.log(), self._core.storage, limits, list_objects=list_objects)

    chunk_storage_stats: Final = synchronous(chunk_storage_stats_async)

    async def total_chunks_storage_async(
        self,
        *,
        max_snapshots_in_memory: int = _LIMITS.max_snapshots_in_memory,
        max_compressed_manifest_mem_bytes: int = _LIMITS.max_compressed_manifest_mem_bytes,
        max_decoded_manifest_mem_bytes: int = _LIMITS.max_decoded_manifest_mem_bytes,
        max_concurrent_manifest_fetches: int = _LIMITS.max_concurrent_manifest_fetches,
    ) -> int:
        """Bytes of native chunks: deprecated in favour of ``chunk_storage_stats_async().native_bytes``.

        Parameters and errors as there.
        """
        warn_caller(
            "total_chunks_storage and total_chunks_storage_async are deprecated: chunk_storage_stats() also counts "
            "inline and virtual chunks, and its native_bytes is the number that these return",
            DeprecationWarning,
        )
        stats = await self.chunk_storage_stats_async(
            max_snapshots_in_memory=max_snapshots_in_memory,
            max_compressed_manifest_mem_bytes=max_compressed_manifest_mem_bytes,
            max_decoded_manifest_mem_bytes=max_decoded_manifest_mem_bytes,
            max_concurrent_manifest_fetches=max_concurrent_manifest_fetches,
            list_objects=False,
        )
        return stats.native_bytes

    total_chunks_storage: Final = synchronous(total_chunks_storage_async)

    async def rewrite_manifests_async(
        self,
        message: str,
        *,
        branch: str,
        metadata: dict[str, Any] | None = None,
        commit_method: CommitMethod = "new_commit",
    ) -> str:
        """Write the manifests of all arrays again, by the present configuration, and commit that.

        Values, chunks and nodes stay as they are; no chunk is read or written. A commit otherwise only rewrites
        manifests of arrays that it changes, so this call applies a changed splitting or compression of locations
        to all arrays, or merges the manifests of many small commits.

        Parameters
        ----------
        message
            Of the commit.
        branch
            To commit to.
        metadata
            JSON values kept with the commit. The splitting configuration is added under ``__icechunk``,
            ``splitting_config`` (None where the engine chooses).
        commit_method
            ``new_commit``, or ``amend`` to replace the branch's newest commit.

        Returns
        -------
        str
            The new snapshot's id.

        Raises
        ------
        RefNotFoundError
            There is no such branch.
        ReadOnlyError
            The repository's status is read-only.
        ConflictError
            Another client committed to the branch meanwhile; nothing of this call is visible, and it can be repeated.
        FormatError
            To amend in a repository of format 1.
        ValueError
            Another commit method.
        """
        if commit_method not in get_args(CommitMethod):
            raise ValueError(f"commit_method must be 'new_commit' or 'amend', not {commit_method!r}")
        described = json_metadata("metadata", metadata)
        session = await self.writable_session_async(branch)
        amend = commit_method == "amend"
        if amend and (await self._core.log()).spec_version == 1:
            raise needs_format_2("amend a commit with rewritten manifests")
        described |= {"__icechunk": {"splitting_config": self._splitting()}}
        how = How.AMEND if amend else How.COMMIT
        return await write_snapshot(session._content, how, message, described, allow_empty=True, rewrite=True)

    rewrite_manifests: Final = synchronous(rewrite_manifests_async)

    def _splitting(self) -> Any:
        """The splitting configuration as it is persisted."""
        manifest = self._core.config.manifest
        splitting = manifest.splitting if manifest is not None else None
        if splitting is None and self._core.layout is not Layout.LOG:
            splitting = _unsplit()
        stored = config_to_dict(RepositoryConfig(manifest=ManifestConfig(splitting=splitting)))
        return stored["manifest"]["splitting"]


def _instant_us(name: str, value: datetime) -> int:
    """µs since the epoch."""
    require_type(name, value, datetime)
    if value.tzinfo is None or value.utcoffset() is None:
        raise WrongTypeError(
            f"{name} needs a time zone, for example datetime.now(timezone.utc)", ErrorKind.INVALID_SETTING
        )
    return us_of(value)
