"""Results of ``inspect_*`` and the drawing of history, as JSON: the same script on both libraries.

``python -m tools.interop.inspections PATH`` prints one line about the repository there. ``--make VERSION`` makes
one of that spec version before, with something of everything that the files can say.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import warnings
from typing import Any

import numpy as np
import zarr

import icechunk

__all__ = ["inspections", "make"]

PREFIX = "s3://somewhere/"


def make(path: str, spec_version: int | None) -> Any:
    """A repository with every kind of file contents, and of line in the ops log that can be had without a wait."""
    newer = spec_version != 1
    config = icechunk.RepositoryConfig.default()
    config.inline_chunk_threshold_bytes = 8
    config.manifest = icechunk.ManifestConfig(
        virtual_chunk_location_compression=icechunk.ManifestVirtualChunkLocationCompressionConfig(min_num_chunks=10)
    )
    config.set_virtual_chunk_container(icechunk.VirtualChunkContainer(PREFIX, icechunk.s3_store(region="us-east-1")))
    storage = icechunk.local_filesystem_storage(path)
    repo = icechunk.Repository.create(storage, config, spec_version=spec_version)
    session = repo.writable_session("main")
    root = zarr.group(session.store)
    options: dict[str, Any] = {"dtype": "i4", "compressors": None}
    root.create_array("a", shape=(4, 4), chunks=(2, 2), dimension_names=("x", None), **options)[:] = np.ones((4, 4))
    root.create_array("deep/inline", shape=(3,), chunks=(1,), **options)[:] = 1
    root.create_array("scalar", shape=(), chunks=(), **options)[()] = 5
    root.create_array("empty", shape=(0, 2), chunks=(1, 1), **options)
    root.create_array("virtual", shape=(40,), chunks=(1,), **options)
    specs = [icechunk.VirtualChunkSpec([i], f"{PREFIX}prefix/of/some/length/file-{i}.nc", 10, 4) for i in range(30)]
    session.store.set_virtual_refs("/virtual", specs)
    first = session.commit("first <b>&\n\nmore", {"author": "me", "nested": {"list": [1, 2.5, None, True, "é"]}})
    repo.create_tag("v1", first)
    session = repo.writable_session("main")
    zarr.open_array(session.store, path="a")[0, 0] = 99
    root = zarr.open_group(session.store)
    del root["deep"]
    root.create_group("new")
    root.attrs["k"] = 1
    zarr.open_array(session.store, path="virtual").attrs["k"] = 1
    second = session.commit("x" * 100)
    repo.create_branch("dev", first)
    _add(repo, "dev", "on-dev")
    repo.create_branch("short-lived", second)
    repo.reset_branch("short-lived", first)
    repo.delete_branch("short-lived")
    repo.create_tag("gone", second)
    repo.delete_tag("gone")
    if newer:
        session = repo.rearrange_session("dev")
        session.move("/on-dev", "/moved")
        session.commit("moved")
        session = repo.writable_session("main")
        zarr.open_group(session.store).create_group("amended")
        session.amend("amended")
        session = repo.writable_session("main")
        zarr.open_group(session.store).create_group("flushed")
        session.flush("flushed")
        repo.set_metadata({"q": 1})
        repo.set_feature_flag("move_node", False)
        repo.set_feature_flag("move_node", None)
        repo.save_config()
        repo.set_status(icechunk.RepoStatus(icechunk.RepoAvailability.read_only, limited_availability_reason="a pause"))
        repo.set_status(icechunk.RepoStatus(icechunk.RepoAvailability.online))
    return repo


def _add(repo: Any, branch: str, name: str) -> None:
    session = repo.writable_session(branch)
    zarr.open_group(session.store).create_group(name)
    session.commit(name)


def inspections(repo: Any, path: str) -> dict[str, Any]:
    """Everything that can be inspected, by id, for each snapshot that a branch or tag leads to."""
    refs = [{"branch": name} for name in sorted(repo.list_branches())] + [
        {"tag": name} for name in sorted(repo.list_tags())
    ]
    ids = sorted({info.id for ref in refs for info in repo.ancestry(**ref)})
    manifests: dict[str, list[Any]] = {}
    for id in ids:
        for file in repo.list_manifest_files(id):
            manifests[file.id] = [file.size_bytes, file.num_chunk_refs, repo.inspect_manifest(file.id)]
    storage = icechunk.local_filesystem_storage(path)
    return {
        "snapshots": {id: repo.inspect_snapshot(id) for id in ids},
        "manifests": manifests,
        "transactions": {id: _or_error(repo.inspect_transaction_log, id) for id in ids},
        "repo": _or_error(repo.inspect_repo_info),
        "objects": {
            str(prefix): _listing(storage, prefix) for prefix in (None, "", "snapshots", "snapshots/", "snap", "chunks")
        },
        "times": all(
            isinstance(found.created_at, datetime.datetime) and found.created_at.tzinfo is not None
            for found in storage.list_objects_metadata()
        ),
        "graphs": {json.dumps(ref): str(repo.ancestry_graph(**ref, plain=True)) for ref in refs},
    }


def _listing(storage: Any, prefix: str | None) -> list[list[Any]]:
    # Files that begin with a dot are those of our locks; we do not list them, and neither library reads them.
    return sorted([key, size] for key, size in storage.list_objects(prefix=prefix) if not key.startswith("."))


def _or_error(inspect: Any, *args: str) -> Any:
    try:
        return inspect(*args)
    except icechunk.IcechunkError:
        return "refused"


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    path, *options = arguments
    if options:
        make(path, int(options[1]))
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(path))
    print(json.dumps(inspections(repo, path)))


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
