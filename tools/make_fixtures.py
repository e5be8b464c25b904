"""Make tests/format/fixtures: files written by the official library, and what it says is in them.

    python -m tools.make_fixtures [--into tests/format/fixtures] [--chunks]

Runs itself in the official library's environments (`tools/oracle.py`). Ids and times differ in each
run, so the fixtures are made once and committed, not compared with a new run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

KINDS = {"v2": ("2.3.0", 2), "v1": ("2.3.0", 1), "v1-old": ("1.1.21", None)}
"""Folder: official library's version, and the spec version asked of it."""


def make_repository(folder: Path, spec_version: int | None) -> None:
    """Inside the official library: everything that its format can hold, in one repository."""
    import icechunk as ic  # isort: skip
    import numpy as np
    import zarr

    newer = spec_version == 2
    data = folder.parent / "data"
    data.mkdir(exist_ok=True)
    (data / "blob.bin").write_bytes(bytes(range(256)) * 64)
    config = ic.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 40
    config.set_virtual_chunk_container(
        ic.VirtualChunkContainer(f"file://{data}/", ic.local_filesystem_store(str(data)))
    )
    config.set_virtual_chunk_container(
        ic.VirtualChunkContainer("s3://bucket/", ic.s3_store(region="us-east-1", anonymous=True))
    )
    options: dict[str, Any] = {} if spec_version is None else {"spec_version": spec_version}
    repository = ic.Repository.create(
        ic.local_filesystem_storage(str(folder)),
        config=config,
        authorize_virtual_chunk_access={f"file://{data}/": None, "s3://bucket/": None},
        **options,
    )
    repository.save_config()

    session = repository.writable_session("main")
    root = zarr.group(session.store, attributes={"title": "fixtures"})
    root.create_group("nested/deeper/ünïcode")
    dtypes: dict[str, Any] = {
        "i1": "i1",
        "u8": "u8",
        "f4": "f4",
        "c16": "c16",
        "b": "?",
        "str": str,
        "time": "M8[ns]",
    }
    for name, dtype in dtypes.items():
        array = root.create_array(f"types/{name}", shape=(6,), chunks=(4,), dtype=dtype)
        array[:] = np.arange(6).astype(str) if dtype is str else np.arange(6).astype(dtype)
    root.create_array("scalar", shape=(), dtype="f8")[...] = 1.5
    root.create_array("empty", shape=(0, 3), chunks=(2, 2), dtype="i4")
    root.create_array("never-written", shape=(5, 3), chunks=(2, 2), dtype="i4", dimension_names=["x", None])
    native = root.create_array(
        "native", shape=(7, 8, 9), chunks=(2, 3, 4), dtype="f8", compressors=None, dimension_names=["t", "y", "x"]
    )
    native[:] = np.arange(7 * 8 * 9).reshape(7, 8, 9)
    mixed = root.create_array("mixed", shape=(40,), chunks=(10,), dtype="u1", compressors=None)
    mixed[0:10] = 7  # inline
    session.commit(
        "types", metadata={"n": -1, "big": 2**40, "x": 2.5, "list": [1, "two", None, True], "map": {"b": {}, "a": []}}
    )

    session = repository.writable_session("main")
    root = zarr.open_group(session.store)
    mixed = zarr.open_array(session.store, path="mixed")
    wide = root.create_array("wide", shape=(20,), chunks=(10,), dtype="f8", compressors=None)
    wide[0:10] = 1.0
    when = datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)
    where = f"file://{data}/blob.bin"
    session.store.set_virtual_ref("mixed/c/1", where, offset=10, length=10)
    session.store.set_virtual_ref("mixed/c/2", where, offset=0, length=10, checksum='"an-etag"')
    session.store.set_virtual_ref("mixed/c/3", where, offset=256, length=10, checksum=when + timedelta(days=20_000))
    session.commit("virtual and mixed")

    session = repository.writable_session("main")
    root = zarr.open_group(session.store)
    many = root.create_array("many", shape=(1200,), chunks=(1,), dtype="u1", compressors=None)
    session.store.set_virtual_refs(
        "/many",
        [
            ic.VirtualChunkSpec(
                [i], f"s3://bucket/some/long/prefix/{i % 7}/{i:05}.nc", i, 1, f"etag-{i % 3}" if i % 2 else None
            )
            for i in range(1200)
        ],
        **({"validate_containers": False} if newer or spec_version else {}),
    )
    del root["types/b"]
    native = zarr.open_array(session.store, path="native")
    native[0] = -1.0
    native.attrs["changed"] = True
    session.commit("many virtual, deleted, overwritten")
    _ = many

    repository.create_tag("first", snapshot_id=repository.lookup_branch("main"))
    repository.create_tag("gone", snapshot_id=repository.lookup_branch("main"))
    repository.delete_tag("gone")
    repository.create_branch("side", snapshot_id=repository.lookup_branch("main"))
    repository.create_branch("dead", snapshot_id=repository.lookup_branch("main"))
    repository.delete_branch("dead")
    session = repository.writable_session("side")
    zarr.open_array(session.store, path="wide")[10:] = 3.0
    session.commit("on the side")
    repository.reset_branch("side", repository.lookup_branch("main"))
    if not newer:
        return
    session = repository.writable_session("side")
    zarr.open_group(session.store).attrs["a"] = 1
    session.commit("to be amended")
    session = repository.writable_session("side")
    zarr.open_group(session.store).attrs["a"] = 2
    session.amend("amended", metadata={"why": "fixture"})
    session = repository.rearrange_session("main")
    session.move("/types", "/nested/kinds")
    session.commit("moved")
    session = repository.writable_session("main")
    zarr.open_group(session.store).attrs["detached"] = 1
    session.flush("detached")
    repository.set_metadata({"owner": "me", "sizes": [1, 2.5, -3]})
    repository.set_feature_flag("move_node", False)
    repository.set_feature_flag("create_tag", True)
    repository.set_feature_flag("delete_tag", None)
    repository.set_status(ic.RepoStatus(ic.RepoAvailability.read_only, limited_availability_reason="fixtures"))
    repository.set_status(ic.RepoStatus(ic.RepoAvailability.online))
    repository.expire_snapshots(list(repository.ancestry(branch="main"))[-3].written_at + timedelta(microseconds=1))
    repository.garbage_collect(datetime.now(UTC) - timedelta(days=1))


def describe(folder: Path) -> dict[str, Any]:
    """Inside the official library: what it says is in each file."""
    import icechunk as ic  # isort: skip

    repository = ic.Repository.open(ic.local_filesystem_storage(str(folder)))
    views: dict[str, Any] = {}
    for prefix, inspect in {
        "snapshots": "inspect_snapshot",
        "manifests": "inspect_manifest",
        "transactions": "inspect_transaction_log",
    }.items():
        if hasattr(repository, inspect):
            for path in sorted((folder / prefix).iterdir()):
                views[f"{prefix}/{path.name}"] = getattr(repository, inspect)(path.name)
    if hasattr(repository, "inspect_repo_info") and (folder / "repo").exists():
        views["repo"] = repository.inspect_repo_info()
    return views


def read_everything(folder: Path) -> dict[str, Any]:
    """Inside the official library: `describe`, and every value and attribute at every snapshot it can reach."""
    import hashlib

    import icechunk as ic  # isort: skip
    import numpy as np
    import zarr

    repository = ic.Repository.open(ic.local_filesystem_storage(str(folder)))
    seen: dict[str, Any] = {}
    for branch in sorted(repository.list_branches()):
        for info in repository.ancestry(branch=branch):
            line = [info.id, info.parent_id, info.message, info.written_at, info.metadata]
            nodes: dict[str, Any] = {}
            if info.parent_id is not None:
                root = zarr.open_group(repository.readonly_session(snapshot_id=info.id).store, mode="r")
                nodes["/"] = dict(root.attrs)
                for path, node in sorted(root.members(max_depth=None)):
                    nodes[path] = [dict(node.attrs)]
                    if isinstance(node, zarr.Array):
                        # the virtual chunks are nowhere by now
                        part = slice(10) if path == "mixed" else ...
                        values = None if path == "many" else np.asarray(node[part]).tolist()
                        nodes[path].append(hashlib.sha256(repr(values).encode()).hexdigest())
            seen[f"{branch} {info.id}"] = [line, nodes]
    return {
        "views": describe(folder),
        "tags": {tag: repository.lookup_tag(tag) for tag in sorted(repository.list_tags())},
        "history": seen,
    }


def main() -> None:
    """Drive the official environments, or be driven in one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=Path(__file__).parent.parent / "tests/format/fixtures")
    parser.add_argument("--chunks", action="store_true", help="keep the chunk objects too")
    parser.add_argument(
        "--inside", nargs=2, metavar=("KIND", "FOLDER"), help="internal: we are the official environment"
    )
    parser.add_argument("--read", metavar="FOLDER", help="internal: print all that the official library reads there")
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read_everything(Path(options.read)), default=str))
        return
    if options.inside:
        kind, folder = options.inside
        make_repository(Path(folder), KINDS[kind][1])
        (Path(folder) / "inspect.json").write_text(
            json.dumps(describe(Path(folder)), default=str, separators=(",", ":"))
        )
        return
    from tools import oracle

    for kind, (version, _) in KINDS.items():
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / kind
            subprocess.run(
                [str(oracle.ensure(version)), __file__, "--inside", kind, str(made)], check=True, cwd=scratch
            )
            if not options.chunks:
                shutil.rmtree(made / "chunks", ignore_errors=True)
                for copy in sorted((made / "overwritten").glob("*"))[2:]:
                    copy.unlink()
            target = options.into / kind
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(made, target)


if __name__ == "__main__":
    main()
