"""The parts that a repository's sessions share: storage, configuration, caches, and one log client for each loop."""

from __future__ import annotations

import itertools
import os
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from icechunk.config import (
    Attribution,
    CachingConfig,
    EngineConfig,
    RepositoryConfig,
    StorageConcurrencySettings,
    StorageSettings,
    VirtualChunkContainer,
    config_from_dict,
    config_to_dict,
)
from icechunk.config.manifest_rules import manifests_to_preload, tile_shapes
from icechunk.config.repository import (
    DEFAULT_COMPRESSION_LEVEL,
    DEFAULT_DISK_CACHE_BYTES,
    DEFAULT_INLINE_CHUNK_THRESHOLD_BYTES,
    DEFAULT_MAX_BYTES_IN_FLIGHT,
    DEFAULT_MAX_CONCURRENT_DECODES,
    DEFAULT_MAX_CONCURRENT_REQUESTS,
    DEFAULT_NUM_CHUNK_REFS,
    DEFAULT_NUM_SNAPSHOT_NODES,
    DEFAULT_NUM_TRANSACTION_CHANGES,
    DEFAULT_PACK_SIZE_BYTES,
    DEFAULT_PACK_THRESHOLD_BYTES,
    DEFAULT_PUT_MEMORY_BYTES,
    DEFAULT_REPACK_BELOW_PERCENT,
    DEFAULT_SMALL_COMMIT_BYTES,
)
from icechunk.config.storage import DEFAULT_IDEAL_REQUEST_BYTES, DEFAULT_MAX_REQUESTS_PER_OBJECT
from icechunk.format.ids import ObjectId, object_id_from_text
from icechunk.format.manifest.location_compression import LocationCompression
from icechunk.format.values import Snapshot
from icechunk.log.repository.convert import convert_log
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import FILES_BYTES, MAX_FILES, Layout, RepositoryLog
from icechunk.log.repository.queue import UpdateRetries, retries_of
from icechunk.log.repository.state import RepoState
from icechunk.log.session.plan.compaction import Policy
from icechunk.runtime.about import CLIENT_NAME
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.loops import PerLoop
from icechunk.runtime.pickles import call_of
from icechunk.session.landed_commits import LandedCommits
from icechunk.storage.port import Put, Storage
from icechunk.transfer.assets import Assets, Preloader, Reads
from icechunk.transfer.cache import WeightedCache
from icechunk.transfer.disk_cache import DiskCache, ObjectsOnDisk
from icechunk.transfer.fetch import NEVER, Splitting
from icechunk.transfer.limiter import WRITE, Gates
from icechunk.transfer.packs import Packs
from icechunk.transfer.prediction import Limits
from icechunk.transfer.put import PutMemory, PutPool
from icechunk.virtual_access import VirtualAccess

if TYPE_CHECKING:
    from icechunk.maintenance.living import LivingMemory

__all__ = ["Core", "Settings"]

_CACHING: Final = CachingConfig()
_CONCURRENCY: Final = StorageConcurrencySettings()
_ENGINE: Final = EngineConfig()
"""In place of settings that are not given. They are made once, since making one checks each of its values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The configuration as the engine uses it: every option with its value."""

    inline_threshold_bytes: int
    """Chunks up to this size are stored in manifests, bytes."""
    compression_level: int
    """zstd level of metadata files."""
    max_requests: int
    """Requests in flight, of reads and writes together, in each loop."""
    max_bytes_in_flight: int
    """Bytes of the requests in flight, where these are known beforehand."""
    partial_values_at_once: int
    """Values that one call for several fetches at the same time."""
    put_memory_bytes: int
    """Bound on the bytes that all sessions together hold for uploads."""
    pack_threshold_bytes: int
    """Chunks below this size share chunk objects; 0: none do."""
    pack_size_bytes: int
    """Size of such an object."""
    repack_below_percent: int
    """A collection writes objects again of whose bytes less than this percentage is needed."""
    small_commit_bytes: int
    """Commits whose files are together no larger are embedded in the log, bytes."""
    policy: Policy
    """Layout of references in manifests."""
    commit_fetches: int
    """Manifests that a commit reads at a time, at the most."""
    locations: LocationCompression | None
    """Compression of locations of virtual references in them, one by one; None: of the whole manifest only."""
    reads: Reads
    """Limits for joining and splitting reads into requests."""


class Core:
    """One open repository. Safe to share among loops and threads; picklable, opening again where it arrives.

    Parameters
    ----------
    storage
        Where it is.
    config
        The caller's configuration; `load_config` merges it over the persisted one.
    named_containers
        Virtual chunk containers whose endpoints the caller has named, by prefix; None: those of ``config``.
    """

    def __init__(
        self,
        storage: Storage,
        config: RepositoryConfig,
        *,
        sources: Sources = SYSTEM,
        attribution: Attribution | None = None,
        virtual_access: Mapping[str, Any] | None = None,
        default_metadata: Mapping[str, Any] | None = None,
        layout: Layout = Layout.LOG,
        named_containers: Mapping[str, VirtualChunkContainer] | None = None,
    ) -> None:
        self.sources = sources
        given = config.virtual_chunk_containers if named_containers is None else named_containers
        self.named_containers: dict[str, VirtualChunkContainer] = dict(given or {})
        """Virtual chunk containers of the caller's own configuration, without the persisted ones."""
        self.layout: Layout = layout
        """The layout when the log was last opened; decides about defaults of `settings`."""
        self.attribution = attribution
        self.virtual_access: dict[str, Any] = dict(virtual_access or {})
        self.default_metadata: dict[str, Any] = dict(default_metadata or {})
        self.persisted_config: Any = None
        """The configuration that was persisted when this core was opened, or that it has persisted since."""
        self.files: WeightedCache[str, bytes] = WeightedCache(FILES_BYTES, MAX_FILES)
        """Small metadata files that came with the log, by key; some have no object of their own yet."""
        self.landed: LandedCommits = LandedCommits()
        """Sums of the commits that landed since the bases of sessions that are rebased."""
        self.living: LivingMemory | None = None
        """The living objects that the last collection found; None before the first."""
        self.gates: Gates = Gates(0)
        self._put_memory: tuple[int, PutMemory] | None = None
        if attribution is not None and attribution != Attribution():
            storage = storage.with_user_agent(attribution.user_agent(CLIENT_NAME))
        self._configure(storage, config)
        self._created: RepositoryLog | None = None
        self._order = itertools.count()
        """Numbers calls of `state` and beginnings of openings; no clock is fine enough to order them everywhere."""
        self._opened: WeakKeyDictionary[RepositoryLog, int] = WeakKeyDictionary()
        self._logs = self._new_logs()

    def _new_logs(self) -> PerLoop[RepositoryLog]:
        return PerLoop(self._open_log, lambda log: log.aclose(), rank=1)

    def _configure(self, storage: Storage, config: RepositoryConfig) -> None:
        self.storage: Storage = storage.with_settings(config.storage) if config.storage is not None else storage
        self.config = config
        settings = _resolve(config, self.layout, getattr(self.storage, "settings", config.storage))
        self.settings: Settings = settings
        if (self.gates.max_requests, self.gates.max_bytes) != (settings.max_requests, settings.max_bytes_in_flight):
            self.gates = Gates(settings.max_requests, settings.max_bytes_in_flight)
        caching = config.caching or _CACHING
        self.assets: Assets = Assets(
            self.storage,
            gates=self.gates,
            reads=settings.reads
            if self.storage.gains_from_split_reads
            else replace(settings.reads, splitting=None, hedge_percentile=settings.reads.hedge_percentile or NEVER),
            num_snapshot_nodes=_value(caching.num_snapshot_nodes, DEFAULT_NUM_SNAPSHOT_NODES),
            num_chunk_refs=_value(caching.num_chunk_refs, DEFAULT_NUM_CHUNK_REFS),
            num_transaction_changes=_value(caching.num_transaction_changes, DEFAULT_NUM_TRANSACTION_CHANGES),
            files=self.files,
            find_file=self._find_file,
            max_decodes=_value(config.max_concurrent_decodes, DEFAULT_MAX_CONCURRENT_DECODES),
            disk=_disk(config.engine or _ENGINE, self.storage),
        )
        self._preloaders = PerLoop(lambda: Preloader(self.assets, self.settings.max_requests), Preloader.aclose, rank=1)
        self._preloaded: ObjectId | None = None
        self.virtual: VirtualAccess = VirtualAccess(
            (config.virtual_chunk_containers or {}).values(),
            self.virtual_access,
            settings=config.storage,
            gates=self.gates,
            reads=settings.reads,
            sources=self.sources,
            named=self.named_containers,
            endpoint=self.storage.endpoint_url,
        )

    async def load_config(self) -> None:
        """Merge the caller's configuration over the persisted one; for a core that has not been used yet."""
        log = await self.log()
        if log.state.config is not None or log.layout is not self.layout:
            self._learn_from(log, self.config)

    def _learn_from(self, log: RepositoryLog, config: RepositoryConfig) -> None:
        self.persisted_config, self.layout = log.state.config, log.layout
        if self.persisted_config is not None:
            config = config_from_dict(self.persisted_config).merge(config)
        self._configure(self.storage, config)

    def __reduce__(self) -> tuple[Any, ...]:
        return call_of(
            _restore,
            self.storage,
            self.config,
            self.attribution,
            self.virtual_access,
            self.default_metadata,
            self.layout,
            self.named_containers,
        )

    async def _open_log(self) -> RepositoryLog:
        began = next(self._order)
        log, self._created = self._created, None
        if log is None:
            log = await open_repository(
                self.storage,
                self.sources,
                updates_per_file=self.config.num_updates_per_repo_info_file,
                retries=_retries(self.config),
            )
        log.share_files(self.files)
        self._opened[log] = began
        return log

    async def adopt(self, log: RepositoryLog) -> None:
        """Make the log that was just created on this loop its client, instead of opening it again."""
        self._created = log
        self.persisted_config = log.state.config
        await self._logs.get()
        self.persisted_config, self.layout = log.state.config, log.layout
        self._configure(self.storage, self.config)

    async def convert(self, layout: Layout) -> None:
        """Give the log another layout, and go on with that one; see `icechunk.log.repository.convert`."""
        await convert_log(await self.log(), self.storage, self.sources, layout)
        await self._logs.aclose()
        # Clients of other loops find that their log has ended; new ones take their places.
        self._logs = self._new_logs()
        self._learn_from(await self.log(), self.config)

    async def log(self) -> RepositoryLog:
        """This loop's client of the repository log. Raises `RepositoryNotFoundError` where there is none."""
        return self._logs.peek() or await self._logs.get()

    async def state(
        self,
        snapshot_id: str | None = None,
        *,
        branch: str | None = None,
        tag: str | None = None,
        to_write: bool = False,
    ) -> RepoState:
        """The state of the repository as of now: it includes every change that was acknowledged before the call.

        Parameters
        ----------
        snapshot_id
            A snapshot that its graph should have, if it exists.
        branch, tag
            Refs that it should show, if they exist.
        to_write
            Whether the caller is going to write; see `RepositoryLog.refresh_in_turn`.
        """
        called = next(self._order)
        log = await self.log()
        # An open that began after the call has read all changes that were acknowledged before it.
        if self._opened[log] > called:
            state = log.state
        else:
            state = await (log.refresh_in_turn() if to_write else log.refresh())
        if branch is not None or tag is not None:
            state = await log.name_refs(branches=[] if branch is None else [branch], tags=[] if tag is None else [tag])
        return state if snapshot_id is None else await log.learn([object_id_from_text(snapshot_id)])

    async def _find_file(self, key: str) -> bytes | None:
        return await (await self.log()).find_file(key)

    async def learn(self, *snapshots: ObjectId, ancestry: bool = False, until: Container[ObjectId] = ()) -> RepoState:
        """The state as last read, with these snapshots in its graph, and with ``ancestry`` also their ancestors, up to
        the first one in ``until``."""
        return await (await self.log()).learn(snapshots, ancestry=ancestry, until=until)

    def packs(self) -> Packs:
        """The packs for the chunks of one writable session."""
        settings = self.settings
        pool = PutPool(self.storage, memory=self._memory(), gates=self.gates)
        return Packs(
            pool,
            self.sources.new_object_id,
            threshold_bytes=settings.pack_threshold_bytes,
            size_bytes=settings.pack_size_bytes,
        )

    def _memory(self) -> PutMemory:
        """Memory of this process's puts: uploads that a parent process had begun when it forked are not waited for."""
        kept, most = self._put_memory, self.settings.put_memory_bytes
        if kept is None or kept[0] != os.getpid() or kept[1].max_bytes != most:
            kept = self._put_memory = (os.getpid(), PutMemory(most))
        return kept[1]

    async def put_unsynced(self, key: str, data: bytes) -> None:
        """Write a metadata file, within the bounds of requests in flight; `Storage.sync` makes it durable.

        Raises as `Storage.put_unsynced`.
        """
        gate = self.gates.here()
        await gate.enter(len(data), WRITE)
        try:
            await self.storage.put_unsynced([Put(key, data)])
        finally:
            gate.leave(len(data))

    async def preload(self, snapshot: Snapshot) -> None:
        """Begin to fetch the manifests that the configuration says to preload; does not wait for them."""
        if self._preloaded == snapshot.id:
            return
        self._preloaded = snapshot.id
        config = self.config.manifest.preload if self.config.manifest is not None else None
        wanted = [id for id in manifests_to_preload(config, snapshot) if self.assets.kept_manifest(id) is None]
        if wanted:
            (await self._preloaders.get()).start(wanted)

    async def preloaded(self) -> None:
        """Wait for the reads that `preload` has begun on this loop."""
        preloader = self._preloaders.peek()
        if preloader is not None:
            await preloader.wait()

    async def aclose(self) -> None:
        """Write a last checkpoint where one is due, and close all connections of this loop."""
        await self._preloaders.aclose()
        await self._logs.aclose()
        await self.virtual.aclose()
        await self.storage.aclose()


def _value(setting: int | None, default: int) -> int:
    return default if setting is None else setting


def _retries(config: RepositoryConfig) -> UpdateRetries | None:
    given = config.repo_update_retries
    return None if given is None or given.default is None else retries_of(config_to_dict(config))


def _resolve(config: RepositoryConfig, layout: Layout, storage: StorageSettings | None) -> Settings:
    engine = config.engine or _ENGINE
    compression = config.compression
    # A repository that is shared with the official library is laid out as by that one, unless configured.
    alone = layout is Layout.LOG
    shapes = tile_shapes(config.manifest.splitting if config.manifest is not None else None)
    if alone or not (engine.max_refs_per_manifest is None and engine.share_manifests_below_refs is None):
        policy = Policy(
            max_refs_per_manifest=_value(engine.max_refs_per_manifest, Policy().max_refs_per_manifest),
            share_below_refs=_value(engine.share_manifests_below_refs, Policy().share_below_refs if alone else 0),
            tile_shape=shapes,
        )
    else:
        policy = Policy.explicit(shapes)
    max_requests = _value(config.max_concurrent_requests, DEFAULT_MAX_CONCURRENT_REQUESTS)
    return Settings(
        inline_threshold_bytes=_value(config.inline_chunk_threshold_bytes, DEFAULT_INLINE_CHUNK_THRESHOLD_BYTES),
        compression_level=_value(compression.level if compression is not None else None, DEFAULT_COMPRESSION_LEVEL),
        max_requests=max_requests,
        max_bytes_in_flight=_value(engine.max_bytes_in_flight, DEFAULT_MAX_BYTES_IN_FLIGHT),
        partial_values_at_once=_value(config.get_partial_values_concurrency, DEFAULT_MAX_CONCURRENT_REQUESTS),
        put_memory_bytes=_value(engine.put_memory_bytes, DEFAULT_PUT_MEMORY_BYTES),
        pack_threshold_bytes=_value(engine.pack_threshold_bytes, DEFAULT_PACK_THRESHOLD_BYTES if alone else 0),
        pack_size_bytes=_value(engine.pack_size_bytes, DEFAULT_PACK_SIZE_BYTES),
        repack_below_percent=_value(engine.repack_below_percent, DEFAULT_REPACK_BELOW_PERCENT),
        small_commit_bytes=_value(engine.small_commit_bytes, DEFAULT_SMALL_COMMIT_BYTES),
        policy=policy,
        reads=_reads(config.caching or _CACHING, engine, storage),
        commit_fetches=_value(
            config.manifest.max_concurrent_manifest_fetches_during_commit if config.manifest is not None else None,
            max_requests,
        ),
        locations=_locations(config, alone=alone),
    )


def _locations(config: RepositoryConfig, *, alone: bool) -> LocationCompression | None:
    given = config.manifest.virtual_chunk_location_compression if config.manifest is not None else None
    default = LocationCompression()
    if given is None:
        return None if alone else default
    return LocationCompression(
        min_refs=_value(given.min_num_chunks, default.min_refs),
        samples=_value(given.dictionary_max_training_samples, default.samples),
        dictionary_bytes=_value(given.dictionary_max_size_bytes, default.dictionary_bytes),
        level=_value(given.compression_level, default.level),
    )


def _reads(caching: CachingConfig, engine: EngineConfig, storage: StorageSettings | None) -> Reads:
    limits = Limits()
    if caching.num_bytes_chunks is not None:
        limits = replace(limits, cache_bytes=caching.num_bytes_chunks, keep_wanted=True)
    concurrency = (storage.concurrency if storage is not None else None) or _CONCURRENCY
    splitting = Splitting(
        part_bytes=_value(concurrency.ideal_concurrent_request_size, DEFAULT_IDEAL_REQUEST_BYTES),
        max_requests=_value(concurrency.max_concurrent_requests_for_object, DEFAULT_MAX_REQUESTS_PER_OBJECT),
    )
    return Reads(limits=limits, splitting=splitting, hedge_percentile=engine.hedge_percentile)


def _disk(engine: EngineConfig, storage: Storage) -> ObjectsOnDisk | None:
    # Where reads cost no request, a copy on disk saves none.
    if engine.disk_cache_path is None or storage.batches_reads:
        return None
    cache = DiskCache.at(engine.disk_cache_path, _value(engine.disk_cache_bytes, DEFAULT_DISK_CACHE_BYTES))
    return cache.of(f"{storage.describe()}\0{storage.endpoint_url}")


def _restore(
    storage: Storage,
    config: RepositoryConfig,
    attribution: Attribution | None,
    virtual_access: Mapping[str, Any],
    default_metadata: Mapping[str, Any],
    layout: Layout,
    named_containers: Mapping[str, VirtualChunkContainer] | None = None,
) -> Core:
    return Core(
        storage,
        config,
        attribution=attribution,
        virtual_access=virtual_access,
        default_metadata=default_metadata,
        layout=layout,
        named_containers=named_containers,
    )
