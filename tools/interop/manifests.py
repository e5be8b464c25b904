"""Effects of manifest settings, by ours or by the official library, whichever is installed; prints JSON.

    python -m tools.interop.manifests scenarios VERSION      which manifests each step of many leaves
    python -m tools.interop.manifests write FOLDER VERSION   a repository with every manifest setting
    python -m tools.interop.manifests append FOLDER N        another commit there
    python -m tools.interop.manifests read FOLDER            everything that is in it

VERSION is 2, 1, or ``log`` (ours only).
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import icechunk

__all__ = ["append", "read", "scenarios", "write"]

Step = Callable[[Any, Any], Any]

Condition = icechunk.ManifestSplitCondition
Dim = icechunk.ManifestSplitDimCondition
ANY = Condition.AnyArray()
OURS = hasattr(icechunk.Repository, "checkpoint_async")


def _config(rules: Mapping[Any, Any] | None, **manifest: Any) -> icechunk.RepositoryConfig:
    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 0
    splitting = None if rules is None else icechunk.ManifestSplittingConfig.from_dict(rules)
    config.manifest = icechunk.ManifestConfig(splitting=splitting, **manifest)
    return config


def _version(version: str) -> dict[str, Any]:
    if version == "log" or "spec_version" not in inspect.signature(icechunk.Repository.create).parameters:
        return {}
    return {"spec_version": int(version)}


# --- which manifests ------------------------------------------------------------------------------------------


def _outline(repo: icechunk.Repository) -> list[tuple[str, str, int, list[list[int]]]]:
    """Path, manifest, its references and the array's extents, of every manifest of every array on ``main``."""
    tip = repo.lookup_branch("main")
    if OURS:
        from icechunk.format.ids import object_id_from_text
        from icechunk.runtime.twins import run_sync

        snapshot = run_sync(repo._core.assets.snapshot(object_id_from_text(tip)))
        rows = [
            (node.path, ref.object_id.hex(), snapshot.manifest_files[ref.object_id].num_chunk_refs, list(ref.extents))
            for node in snapshot.nodes.values()
            for ref in node.manifests
        ]
        return sorted([(p, i, n, [list(e) for e in extents]) for p, i, n, extents in rows], key=_place)
    found: Any = repo.inspect_snapshot(tip)
    found = json.loads(found) if isinstance(found, str) else found
    sizes = {m["id"]: m["num_chunk_refs"] for m in found["manifests"]}
    return sorted(
        [
            (node["path"], m["id"], sizes[m["id"]], m["extents"])
            for node in found["nodes"]
            if node["node_type"] == "array"
            for m in node.get("manifest_refs") or []
        ],
        key=_place,
    )


def _place(row: tuple[str, str, int, list[list[int]]]) -> Any:
    return row[0], row[3]


class _Story:
    """A repository in memory, and what each step left in it."""

    def __init__(self, version: str, name: str, out: dict[str, Any]) -> None:
        self._version = version
        self._out = out.setdefault(name, [])
        self._seen: set[str] = set()
        self.storage: Any = None
        self.repo: Any = None

    def create(self, rules: Any, shape: tuple[int, ...] = (10, 10), dims: Any = ("t", "x"), name: str = "a") -> _Story:
        self.storage = icechunk.in_memory_storage()
        self.repo = icechunk.Repository.create(self.storage, config=_config(rules), **_version(self._version))

        def make(session: Any, store: Any) -> None:
            array = zarr.create_array(
                store, name=name, shape=shape, chunks=(1,) * len(shape), dtype="i1", dimension_names=dims, fill_value=0
            )
            array[...] = 1

        return self.step(make)

    def reopen(self, rules: Any) -> _Story:
        self.repo = icechunk.Repository.open(self.storage, config=_config(rules))
        return self

    def step(self, *changes: Step) -> _Story:
        session = self.repo.writable_session("main")
        for change in changes:
            change(session, session.store)
        session.commit("step")
        return self.note()

    def move(self, source: str, target: str) -> _Story:
        session = self.repo.rearrange_session("main")
        session.move(source, target)
        session.commit("move")
        return self.note()

    def rewrite(self, **options: Any) -> _Story:
        self.repo.rewrite_manifests("rewritten", branch="main", **options)
        newest = next(iter(self.repo.ancestry(branch="main")))
        self._out.append(newest.metadata)
        return self.note()

    def note(self) -> _Story:
        rows = _outline(self.repo)
        self._out.append([[p, "kept" if i in self._seen else "new", n, e] for p, i, n, e in rows])
        self._seen |= {i for _, i, _, _ in rows}
        return self


def _write(*at: Any, value: int = 5, name: str = "a") -> Step:
    def change(session: Any, store: Any) -> None:
        zarr.open_array(store, path=name, mode="r+")[at] = value

    return change


def _resize(*shape: int) -> Step:
    return lambda session, store: zarr.open_array(store, path="a", mode="r+").resize(shape)


def _attributes(session: Any, store: Any) -> None:
    zarr.open_array(store, path="a", mode="r+").attrs["k"] = 1


def _delete(keys: Iterable[str]) -> Step:
    async def work(store: Any) -> None:
        for key in keys:
            await store.delete(key)

    return lambda session, store: asyncio.run(work(store))


def _rows(first: int, last: int) -> list[str]:
    return [f"a/c/{i}/{j}" for i in range(first, last) for j in range(10)]


def scenarios(version: str) -> dict[str, Any]:
    """The manifests after each step of many stories: path, kept or new, references, extents."""
    out: dict[str, Any] = {}

    def story(name: str) -> _Story:
        return _Story(version, name, out)

    by = {n: {ANY: {Dim.Axis(0): n}} for n in (2, 3, 4, 5)}
    story("two dimensions").create({ANY: {Dim.Axis(0): 3, Dim.DimensionName("x"): 4}}).step(_write(0, 0)).step(
        _resize(12, 10), _write(slice(10, 12), 3)
    ).step(_resize(5, 5)).step(_write(0, 0)).step(_resize(12, 10)).reopen(by[2]).step(_write(0, 0)).step(_write(9, 9))
    story("metadata after a change of settings").create(by[5]).reopen(by[3]).step(_attributes).step(
        _resize(12, 10)
    ).step(_resize(7, 10)).step(_resize(3, 10))
    story("shrunk after a change of settings").create(by[5]).reopen(by[3]).step(_resize(9, 10)).step(_resize(5, 10))
    story("grown after a change of settings").create(by[5]).reopen(by[3]).step(_resize(15, 10), _write(12, 0))
    story("coarser settings").create(by[2]).reopen(by[5]).step(_write(0, 0)).step(_write(9, 9))
    story("settings begin").create(None).reopen(by[3]).step(_write(4, 0)).step(_write(0, 0))
    story("stored settings").create(by[3]).reopen(None).step(_write(4, 0))
    story("deletions").create(by[3]).step(_delete(_rows(0, 3))).step(_delete(_rows(3, 4))).step(
        _delete(["a/c/0/0"])
    ).step(_delete(_rows(0, 10)))
    story("deletion after a change of settings").create(by[5]).reopen(by[3]).step(_delete(["a/c/0/0"]))
    story("append to one dimension").create({ANY: {Dim.Any(): 4}}, (10,), None).step(_resize(13), _write(slice(10, 13)))
    for i, rules in enumerate(
        [
            {Condition.name_matches("^a$"): {Dim.Axis(0): 6}, ANY: {Dim.Axis(0): 2}},
            {Condition.name_matches("z"): {Dim.Axis(0): 6}, Condition.path_matches("/a"): {Dim.Any(): 4}, ANY: {}},
            {ANY: {Dim.DimensionName("t"): 4, Dim.Axis(0): 3}},
            {ANY: {Dim.Axis(0): 3, Dim.DimensionName("t"): 4}},
            {ANY: {Dim.Any(): 5, Dim.Axis(0): 3}},
            {ANY: {Dim.Axis(0): 3, Dim.Any(): 5}},
            {ANY: {Dim.DimensionName("t|x"): 5}},
            {ANY: {Dim.DimensionName("X"): 5}},
            {ANY: {}},
            {
                Condition.and_conditions([Condition.name_matches("a"), Condition.path_matches("/b")]): {Dim.Any(): 5},
                Condition.or_conditions([Condition.name_matches("a"), Condition.path_matches("/b")]): {Dim.Any(): 9},
            },
            {Condition.or_conditions([]): {Dim.Any(): 5}, Condition.and_conditions([]): {Dim.Any(): 6}},
            {ANY: {Dim.Axis(7): 5}},
            {Condition.path_matches("^a$"): {Dim.Any(): 5}, ANY: {Dim.Axis(1): 7}},
        ]
    ):
        story(f"rules {i}").create(rules)
    story("unnamed dimension").create({ANY: {Dim.DimensionName(""): 5}}, dims=(None, "x"))
    story("below a group").create({Condition.path_matches("^/g/a$"): {Dim.Any(): 5}}, name="g/a")
    story("name of a path").create({Condition.name_matches("g/a"): {Dim.Any(): 5}}, name="g/a")
    rewriting = story("rewritten").create(by[5]).reopen(by[3]).rewrite().rewrite(metadata={"k": 1})
    if version != "1":
        rewriting.rewrite(metadata={"k": 2}, commit_method="amend")
        story("moved").create({Condition.name_matches("^a$"): {Dim.Axis(0): 4}, ANY: {Dim.Axis(0): 3}}).move(
            "/a", "/b"
        ).step(_write(0, 0, name="b"))
    if hasattr(icechunk.Session, "shift_array"):
        story("shifted").create(by[4]).step(lambda session, store: session.shift_array("/a", (2, 0)))
        story("reindexed").create(by[4]).step(
            lambda session, store: session.reindex_array("/a", lambda i: [9 - i[0], i[1]])
        )
    return out


# --- one repository for both ----------------------------------------------------------------------------------

FILES = 40


def _full_config(folder: Path) -> icechunk.RepositoryConfig:
    preload = icechunk.ManifestPreloadCondition
    compression = getattr(icechunk, "ManifestVirtualChunkLocationCompressionConfig", None)
    scan = {} if compression is None else {"max_arrays_to_scan": 7}
    options = {
        "preload": icechunk.ManifestPreloadConfig(
            max_total_refs=100,
            preload_if=preload.and_conditions(
                [preload.num_refs(1, None), preload.or_conditions([preload.name_matches("split"), preload.true()])]
            ),
            **scan,
        )
    }
    if compression is not None:
        options["virtual_chunk_location_compression"] = compression(
            10, dictionary_max_training_samples=20, dictionary_max_size_bytes=500, compression_level=5
        )
    config = _config(
        {
            Condition.or_conditions([Condition.name_matches("^split$"), Condition.path_matches("^/never$")]): {
                Dim.DimensionName("time"): 3
            },
            Condition.and_conditions([Condition.path_matches("^/virtual$")]): {Dim.Any(): 30},
        },
        **options,
    )
    config.get_partial_values_concurrency = 7
    config.max_concurrent_requests = 77
    config.compression = icechunk.CompressionConfig(level=9)
    config.caching = icechunk.CachingConfig(num_snapshot_nodes=1234, num_chunk_refs=56789)
    source = folder / "source"
    source.mkdir(exist_ok=True)
    config.set_virtual_chunk_container(
        icechunk.VirtualChunkContainer(f"file://{source}/", icechunk.local_filesystem_store(str(source)))
    )
    return config


def _open(folder: Path) -> icechunk.Repository:
    access: dict[str, Any] = {f"file://{folder}/source/": icechunk.credentials.LocalFileSystemAccess if OURS else None}
    return icechunk.Repository.open(
        icechunk.local_filesystem_storage(str(folder / "repo")), authorize_virtual_chunk_access=access
    )


def write(folder: Path, version: str) -> dict[str, Any]:
    """A repository in ``folder/repo``, with references to files in ``folder/source``."""
    config = _full_config(folder)
    for i in range(FILES):
        (folder / "source" / f"measurement-of-{1990 + i:04d}-in-place.bin").write_bytes(bytes([i] * 8))
    repo = icechunk.Repository.create(
        icechunk.local_filesystem_storage(str(folder / "repo")), config=config, **_version(version)
    )
    repo.save_config()
    repo = _open(folder)
    session = repo.writable_session("main")
    array = zarr.create_array(
        session.store, name="split", shape=(8, 2), chunks=(1, 1), dtype="i4", dimension_names=("time", "x")
    )
    array[:] = np.arange(16).reshape(8, 2)
    zarr.create_array(
        session.store, name="virtual", shape=(2 * FILES,), chunks=(1,), dtype="i4", compressors=None, filters=None
    )
    _refer(folder, session, 0, FILES)
    session.commit("written")
    return read(folder)


def _refer(folder: Path, session: Any, first: int, count: int) -> None:
    session.store.set_virtual_refs(
        "virtual",
        [
            icechunk.VirtualChunkSpec(
                [first + i], f"file://{folder}/source/measurement-of-{1990 + i:04d}-in-place.bin", i % 2 * 4, 4
            )
            for i in range(count)
        ],
        validate_containers=True,
    )


def append(folder: Path, number: int) -> dict[str, Any]:
    """One more row, and references to the last files again."""
    session = _open(folder).writable_session("main")
    array = zarr.open_array(session.store, path="split", mode="r+")
    rows = array.shape[0]
    array.resize((rows + 1, 2))
    array[rows] = 100 * number
    _refer(folder, session, FILES + 10 * (number - 1), 10)
    session.commit(f"appended {number}")
    return read(folder)


def read(folder: Path) -> dict[str, Any]:
    """Values, locations, manifests and configuration on ``main``."""
    repo = _open(folder)
    session = repo.readonly_session("main")
    result: dict[str, Any] = {
        "values": {
            name: np.asarray(zarr.open_array(session.store, path=name, mode="r")[...]).tolist()
            for name in ("split", "virtual")
        },
        "locations": sorted(session.all_virtual_chunk_locations()),
        "outline": [[p, n, e] for p, _, n, e in _outline(repo)],
        "config": _differences(folder),
    }
    if not OURS and hasattr(repo, "inspect_manifest"):
        found = [repo.inspect_manifest(i)["compression"] for p, i, _, _ in _outline(repo) if p == "/virtual"]
        result["compressed"] = [(c["uses_location_compression"], c["num_compressed_refs"]) for c in found]
    return result


def _differences(folder: Path) -> dict[str, str]:
    """Settings of the persisted configuration, by name, that are not what `write` has set."""
    stored: Any = icechunk.Repository.fetch_config(icechunk.local_filesystem_storage(str(folder / "repo")))
    wanted = _full_config(folder)
    names = [
        "inline_chunk_threshold_bytes",
        "get_partial_values_concurrency",
        "max_concurrent_requests",
        "compression",
        "caching",
        "virtual_chunk_containers",
    ]
    different = {name: repr(getattr(stored, name)) for name in names if getattr(stored, name) != getattr(wanted, name)}
    for name in ("preload", "splitting", "virtual_chunk_location_compression"):
        # The official library's conditions do not compare; what they show does, but for 1.x's preload settings.
        one, other = (repr(getattr(config.manifest, name, None)) for config in (stored, wanted))
        if one != other and " object at " not in one:
            different[name] = one
    return different


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    match arguments:
        case ["scenarios", version]:
            result = scenarios(version)
        case ["write", folder, version]:
            result = write(Path(folder), version)
        case ["append", folder, number]:
            result = append(Path(folder), int(number))
        case ["read", folder]:
            result = read(Path(folder))
        case _:
            raise SystemExit(__doc__)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
