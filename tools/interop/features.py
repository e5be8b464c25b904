"""The features of the interop matrix: one small script each, for our library and the official ones alike.

A script is a function of a `World` and a step. One library begins with step 0, then each in turn runs the next
step on what the other has left: so one script says how a feature is written, read and continued by both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
import zarr.codecs

import icechunk
from tools.interop.generate import every_dtype

__all__ = ["FEATURES", "OLD", "Feature", "World"]

OLD: Final = "1.1.21"
"""The official library that knows format 1 alone."""
_CHUNKED: Final = np.arange(24, dtype="i4").reshape(6, 4)


class World:
    """A repository in a folder, as the feature wants it opened."""

    def __init__(self, path: str, feature: Feature) -> None:
        self.path = path
        self.data = Path(path).resolve().parent / "data"
        self._feature = feature
        self.repo: Any = None

    @property
    def _options(self) -> dict[str, Any]:
        config = icechunk.RepositoryConfig.default()
        self._feature.configure(self, config)
        options: dict[str, Any] = {"config": config}
        if self._feature.containers:
            self.data.mkdir(exist_ok=True)
            (self.data / "f").write_bytes(bytes(range(256)) * 4)
            config.set_virtual_chunk_container(
                icechunk.VirtualChunkContainer(self.prefix, icechunk.local_filesystem_store(str(self.data)))
            )
            access = getattr(icechunk.credentials, "LocalFileSystemAccess", None)
            options["authorize_virtual_chunk_access"] = {self.prefix: access}
        return options

    @property
    def prefix(self) -> str:
        """URL of a folder of files that virtual references may point into."""
        return f"file://{self.data}/"

    def create(self, spec_version: int | None) -> None:
        """Begin it, in a version of the format; None: as the library does it by itself."""
        storage = icechunk.local_filesystem_storage(self.path)
        version: dict[str, Any] = {} if spec_version is None else {"spec_version": spec_version}
        self.repo = icechunk.Repository.create(storage, **self._options, **version)

    def open(self) -> None:
        """Open what is there."""
        self.repo = icechunk.Repository.open(icechunk.local_filesystem_storage(self.path), **self._options)

    def session(self, branch: str = "main") -> Any:
        return self.repo.writable_session(branch)

    def array(self, session: Any, path: str, values: Any = _CHUNKED, chunks: Any = (2, 2), **options: Any) -> Any:
        """An array with these values."""
        values = np.asarray(values)
        dtype = str if values.dtype.kind == "T" else values.dtype
        options = {"shape": values.shape, "chunks": chunks, "dtype": dtype, "fill_value": None, **options}
        if options["fill_value"] is None:
            del options["fill_value"]
        made = zarr.create_array(store=session.store, name=path, **options)
        if values.size:
            made[...] = values
        return made

    def edit(self, session: Any, path: str) -> Any:
        return zarr.open_array(store=session.store, path=path, mode="r+")

    def group(self, session: Any, path: str, **attributes: Any) -> Any:
        return zarr.create_group(store=session.store, path=path, attributes=attributes)

    def marked(self, step: int, branch: str = "main") -> str:
        """A small commit."""
        session = self.session(branch)
        self.group(session, f"step_{step}")
        snapshot: str = session.commit(f"step {step}")
        return snapshot


def _nothing(world: World, config: Any) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """A row of the matrix."""

    name: str
    script: Callable[[World, int], object]
    format: int = 1
    """The first version of the format that has it; in format 1 every library refuses what is of format 2."""
    unable: Mapping[str, str] = field(default_factory=dict)
    """Reasons why a version of the official library cannot run it, in any version of the format: it is refused."""
    reads_only: Mapping[str, str] = field(default_factory=dict)
    """Reasons why nothing is written with a version of the official library, which reads it."""
    configure: Callable[[World, Any], object] = _nothing
    """Changes the configuration that the repository is created and opened with."""
    containers: bool = False
    """Whether it has virtual chunks."""
    left_out: frozenset[str] = frozenset()
    """Parts of the common description that cannot be compared."""


# ------------------------------------------------------------------ hierarchy


def groups(world: World, step: int) -> None:
    session = world.session()
    world.group(session, f"g{step}/deep/er", number=step, list=[1, "two", {"é": None}])
    root = zarr.open_group(store=session.store, mode="a", zarr_format=3)
    root.attrs[f"root {step}"] = step
    if step:
        root[f"g{step - 1}"].attrs["later"] = 1.5
    session.commit("groups")


def dtypes(world: World, step: int) -> None:
    session = world.session()
    for name, values in every_dtype().items():
        if name == "structured":
            continue
        if step:
            array = world.edit(session, name)
            array[step] = array[step - 1]
        else:
            world.array(session, name, values, (4,))
    session.commit("every data type")


def structured(world: World, step: int) -> None:
    session = world.session()
    world.array(session, f"s{step}", every_dtype()["structured"], (4,))
    session.commit("structured")


def codecs(world: World, step: int) -> None:
    session = world.session()
    values = np.arange(400).reshape(20, 20) % (7 + step)
    for name, compressors in (
        ("raw", None),
        ("gzip", zarr.codecs.GzipCodec()),
        ("zstd", zarr.codecs.ZstdCodec()),
        ("blosc", zarr.codecs.BloscCodec()),
    ):
        world.array(session, f"{name}_{step}", values, (8, 8), compressors=compressors)
    world.array(session, f"sharded_{step}", values, (4, 5), shards=(12, 10))
    if step:
        world.edit(session, f"sharded_{step - 1}")[3:9, 2:17] = step
    session.commit("codecs")


def shapes(world: World, step: int) -> None:
    session = world.session()
    world.array(session, f"scalar_{step}", np.float64(3.25 + step), ())
    world.array(session, f"empty_{step}", np.zeros((0, 5), "i2"), (2, 5))
    world.array(session, f"four_{step}", np.arange(120).reshape(2, 3, 4, 5), (1, 2, 4, 3))
    named = world.array(session, f"named_{step}", _CHUNKED, (4, 3), dimension_names=("time", None))
    named.attrs["units"] = "°C"
    zarr.create_array(store=session.store, name=f"unwritten_{step}", shape=(9,), chunks=(2,), dtype="i2", fill_value=7)
    session.commit("shapes")


def names(world: World, step: int) -> None:
    session = world.session()
    for path in ("a", "a-b", "a/b", "ab", "odd names/température 日本/x y.z"):
        world.array(session, f"{step}/{path}/array")
    session.commit("names that sort badly", {"é\n": ["\u0000", {"deep": [1, -(2**63), 2**63 - 1, 0.5, None, True]}]})


def resized(world: World, step: int) -> None:
    session = world.session()
    if step == 0:
        world.array(session, "r", np.arange(10), (3,))
    array = world.edit(session, "r")
    if step % 2:
        array.resize((4,))
    else:
        array.append(np.arange(9) + step)
    session.commit("resized")


def deleted_chunks(world: World, step: int) -> None:
    session = world.session()
    if step == 0:
        world.array(session, "d", np.arange(20) + 1, (2,))
        session.commit("all chunks")
        session = world.session()
    asyncio.run(session.store.delete(f"d/c/{step}"))
    world.edit(session, "d")[10 + 2 * step : 12 + 2 * step] = 0
    session.commit("deleted chunks")


def deleted_nodes(world: World, step: int) -> None:
    session = world.session()
    world.array(session, f"g{step}/a")
    world.array(session, f"g{step}/b/c")
    if step:
        asyncio.run(session.store.delete_dir(f"g{step - 1}/b"))
        zarr.open_group(store=session.store, mode="r+")["g0"].attrs["step"] = step
    session.commit("nodes")
    session = world.session()
    asyncio.run(session.store.delete_dir(f"g{step}/a"))
    if step % 2:
        world.group(session, f"g{step}/a", now="a group")
    session.commit("an array less")


def moved(world: World, step: int) -> None:
    if step == 0:
        session = world.session()
        world.array(session, "g/a")
        world.array(session, "g/h/b")
        session.commit("before")
    source = "g" if step == 0 else f"moved {step - 1}"
    session = world.repo.rearrange_session("main")
    session.move(f"/{source}", f"/moved {step}")
    if step % 2:
        session.move(f"/moved {step}/h/b", f"/moved {step}/b{step}")
        session.move(f"/moved {step}/b{step}", f"/moved {step}/h/b")
    session.commit("moved")
    session = world.session()
    world.edit(session, f"moved {step}/a")[step] = 100
    session.commit("written where it is now")


def shifted(world: World, step: int) -> None:
    session = world.session()
    if step == 0:
        world.array(session, "s", np.arange(12), (2,))
    session.shift_array("/s", [1 if step % 2 else -2])
    session.commit("shifted")
    session = world.session()
    world.edit(session, "s")[0] = -step
    session.commit("written")


def reindexed(world: World, step: int) -> None:
    session = world.session()
    if step == 0:
        world.array(session, "s", np.arange(12), (2,))
        session.commit("before")
        session = world.session()

    def swapped(index: Any) -> list[int]:
        [i] = index
        return [i ^ 1]

    session.reindex_array("/s", swapped, swapped)
    session.commit("reindexed")


# --------------------------------------------------------------------- chunks


def inline(world: World, step: int) -> None:
    session = world.session()
    world.array(session, f"small_{step}", np.arange(40) + step, (10,), compressors=None)
    if step:
        world.edit(session, f"small_{step - 1}")[5:15] = 0
    session.commit("inline")


def mixed(world: World, step: int) -> None:
    session = world.session()
    values = np.zeros((4, 4096))
    values[1:3] = np.random.default_rng(step).random((2, 4096))
    world.array(session, f"m{step}", values, (1, 4096), fill_value=1.0)
    if step:
        world.edit(session, f"m{step - 1}")[1] = 0
    session.commit("inline and native")


def virtual(world: World, step: int) -> None:
    session = world.session()
    made = zarr.create_array(
        store=session.store, name=f"v{step}", shape=(60,), chunks=(10,), dtype="u1", filters=None, compressors=None
    )
    for i in range(5):
        checksum = datetime.now(UTC) + timedelta(days=1) if i == 2 else None
        session.store.set_virtual_ref(f"v{step}/c/{i}", f"{world.prefix}f", offset=10 * i, length=10, checksum=checksum)
    made[45:55] = step
    if step:
        world.edit(session, f"v{step - 1}")[12] = 255
        session.store.set_virtual_ref(f"v{step - 1}/c/5", f"{world.prefix}f", offset=7 * step, length=10)
    session.commit("virtual")


def compressed_locations(world: World, step: int) -> None:
    session = world.session()
    zarr.create_array(
        store=session.store, name=f"v{step}", shape=(120,), chunks=(1,), dtype="u1", filters=None, compressors=None
    )
    for i in range(120):
        folder = world.data / f"many/{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "one-file-of-a-long-name").exists():
            (folder / "one-file-of-a-long-name").write_bytes(bytes(range(200)) * 2)
        session.store.set_virtual_ref(
            f"v{step}/c/{i}", f"{world.prefix}many/{i % 4}/one-file-of-a-long-name", offset=i, length=1
        )
    if step:
        session.store.set_virtual_ref(f"v{step - 1}/c/3", f"{world.prefix}f", offset=1, length=1)
    session.commit("many locations")


def split(world: World, step: int) -> None:
    session = world.session()
    if step == 0:
        world.array(session, "split", np.arange(60).reshape(10, 6), (1, 1))
        world.array(session, "whole", np.arange(10), (1,))
    array = world.edit(session, "split")
    array[step, :] = -step
    array.append(np.full((2, 6), step))
    world.edit(session, "whole")[step] = 99
    session.commit("split manifests")


def rewritten(world: World, step: int) -> None:
    session = world.session()
    world.array(session, f"a{step}", np.arange(30), (1,))
    session.commit("many chunks")
    world.repo.rewrite_manifests(f"rewritten {step}", branch="main")


# -------------------------------------------------------------------- history


def tags(world: World, step: int) -> None:
    tip = world.marked(step)
    world.repo.create_tag(f"t{step}", tip)
    world.repo.create_tag(f"gone{step}", world.repo.lookup_tag("t0"))
    world.repo.delete_tag(f"gone{step}")
    if step:
        try:
            world.repo.create_tag(f"gone{step - 1}", tip)
        except icechunk.IcechunkError:
            return
        raise AssertionError("the name of a deleted tag was used again")


def branches(world: World, step: int) -> None:
    tip = world.marked(step)
    repo = world.repo
    repo.create_branch(f"b{step}", tip)
    repo.create_branch(f"gone{step}", tip)
    repo.delete_branch(f"gone{step}")
    world.marked(step + 100, f"b{step}")
    if step:
        # Also a name that was deleted, and one that the other library created.
        repo.create_branch(f"gone{step - 1}", tip)
        repo.reset_branch(f"b{step - 1}", tip)
        world.marked(step + 200, f"b{step - 1}")


def slashes(world: World, step: int) -> None:
    tip = world.marked(step)
    world.repo.create_branch(f"feature/{step}", tip)
    world.repo.create_tag(f"release/{step}", tip)
    world.marked(step + 100, f"feature/{step}")


def empty(world: World, step: int) -> None:
    world.session().commit(f"nothing {step}", {"step": step}, allow_empty=True)


def amended(world: World, step: int) -> None:
    world.marked(step)
    session = world.session()
    world.array(session, f"a{step}")
    session.amend(f"amended {step}", metadata={"step": step})


def flushed(world: World, step: int) -> None:
    world.marked(step)
    session = world.session()
    world.array(session, f"a{step}")
    detached = session.flush(f"flushed {step}", metadata={"step": step})
    world.repo.create_tag(f"flushed{step}", detached)


def rebased(world: World, step: int) -> None:
    if step == 0:
        session = world.session()
        world.group(session, "")
        session.commit("root")
    first, second = world.session(), world.session()
    world.array(first, f"a{step}")
    world.array(second, f"b{step}")
    first.commit("first")
    second.commit("second", rebase_with=icechunk.ConflictDetector())


def expired(world: World, step: int) -> None:
    for i in range(3):
        world.marked(10 * step + i)
    session = world.session()
    world.array(session, f"a{step}")
    tip = session.commit("young")
    [info] = [info for info in world.repo.ancestry(branch="main") if info.id == tip]
    world.repo.expire_snapshots(info.written_at)
    world.marked(10 * step + 9)


def collected(world: World, step: int) -> None:
    tip = world.repo.lookup_branch("main")
    world.repo.create_branch("waste", tip)
    session = world.session("waste")
    world.array(session, "waste", np.random.default_rng(step).random((4, 400)), (1, 400))
    session.commit("waste")
    world.repo.delete_branch("waste")
    world.marked(step)
    summary = world.repo.garbage_collect(datetime.now(UTC) + timedelta(seconds=5))
    if not summary.snapshots_deleted == 1:
        raise AssertionError(f"not the waste: {summary}")
    world.marked(step + 100)


# ------------------------------------------------------------- administration


def flags(world: World, step: int) -> None:
    world.repo.set_feature_flag(
        ("move_node", "create_tag", "delete_tag", "move_node")[step], (False, True, None, None)[step]
    )
    world.marked(step)


def status(world: World, step: int) -> None:
    reason = f"reason {step}"
    world.repo.set_status(icechunk.RepoStatus(icechunk.RepoAvailability.read_only, limited_availability_reason=reason))
    try:
        world.marked(step)
    except icechunk.IcechunkError:
        world.repo.set_status(icechunk.RepoStatus(icechunk.RepoAvailability.online))
        world.marked(step)
        if step == 3:
            world.repo.set_status(
                icechunk.RepoStatus(icechunk.RepoAvailability.read_only, limited_availability_reason=reason)
            )
        return
    raise AssertionError("a read-only repository took a commit")


def metadata(world: World, step: int) -> None:
    world.repo.set_metadata({"step": step, "nested": {"list": [1, 2.5, None, True, "é"]}, "": []})
    world.repo.update_metadata({f"more {step}": {"a": -(2**40)}})
    world.marked(step)


def configuration(world: World, step: int) -> None:
    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 100 + step
    config.get_partial_values_concurrency = 4 + step
    config.compression = icechunk.CompressionConfig(level=1 + step)
    config.caching = icechunk.CachingConfig(num_chunk_refs=1000 * (step + 1), num_bytes_chunks=5)
    config.storage = icechunk.StorageSettings(concurrency=icechunk.StorageConcurrencySettings(3 + step, 1024))
    condition = icechunk.ManifestSplitCondition
    config.manifest = icechunk.ManifestConfig(
        preload=icechunk.ManifestPreloadConfig(
            max_total_refs=10 + step, preload_if=icechunk.ManifestPreloadCondition.name_matches("^t.*$")
        ),
        splitting=icechunk.ManifestSplittingConfig.from_dict(
            {condition.name_matches("^s$"): {icechunk.ManifestSplitDimCondition.Axis(0): 3 + step}}
        ),
    )
    config.set_virtual_chunk_container(
        icechunk.VirtualChunkContainer("s3://some-bucket/", icechunk.s3_store(region="us-east-1"))
    )
    world.repo.reopen(config=config).save_config()
    world.marked(step)


# ------------------------------------------------------------------ the table


def _native(world: World, config: Any) -> None:
    config.inline_chunk_threshold_bytes = 0


def _splitting(world: World, config: Any) -> None:
    condition = icechunk.ManifestSplitCondition.name_matches("^split$")
    config.manifest = icechunk.ManifestConfig(
        splitting=icechunk.ManifestSplittingConfig.from_dict(
            {condition: {icechunk.ManifestSplitDimCondition.Axis(0): 4, icechunk.ManifestSplitDimCondition.Any(): 3}}
        )
    )


def _compressing(world: World, config: Any) -> None:
    config.manifest = icechunk.ManifestConfig(
        virtual_chunk_location_compression=icechunk.ManifestVirtualChunkLocationCompressionConfig(min_num_chunks=50)
    )


_LATER: Final = {OLD: "came with library 2"}

FEATURES: Final = (
    Feature(name="groups", script=groups),
    Feature(name="dtypes", script=dtypes),
    Feature(
        name="structured",
        script=structured,
        reads_only={"2.3.0": "zarr 3.4 writes structured types in a way that zarr 3.1 cannot read"},
    ),
    Feature(name="codecs", script=codecs),
    Feature(name="shapes", script=shapes),
    Feature(name="names", script=names),
    Feature(name="resized", script=resized),
    Feature(name="deleted chunks", script=deleted_chunks),
    Feature(name="deleted nodes", script=deleted_nodes),
    Feature(name="moved", script=moved, format=2, unable=_LATER),
    Feature(name="shifted", script=shifted, unable=_LATER),
    Feature(name="reindexed", script=reindexed, unable=_LATER),
    Feature(name="inline", script=inline),
    Feature(name="native", script=inline, configure=_native),
    Feature(name="mixed", script=mixed),
    Feature(name="virtual", script=virtual, containers=True),
    Feature(
        name="compressed locations",
        script=compressed_locations,
        containers=True,
        configure=_compressing,
        unable=_LATER,
    ),
    Feature(name="split", script=split, configure=_splitting),
    Feature(name="rewritten", script=rewritten, configure=_splitting),
    Feature(name="tags", script=tags),
    Feature(name="branches", script=branches),
    Feature(name="slashes", script=slashes, format=2, unable=_LATER),
    Feature(name="empty", script=empty, unable=_LATER),
    Feature(name="amended", script=amended, format=2, unable=_LATER),
    Feature(name="flushed", script=flushed),
    Feature(name="rebased", script=rebased),
    Feature(name="expired", script=expired),
    Feature(name="collected", script=collected),
    Feature(name="flags", script=flags, format=2, unable=_LATER),
    Feature(name="status", script=status, format=2, unable=_LATER),
    Feature(name="metadata", script=metadata, format=2, unable=_LATER),
    Feature(name="configuration", script=configuration),
)
