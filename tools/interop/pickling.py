"""Objects that can be pickled, as JSON: the same script on both libraries.

``python -m tools.interop.pickling PATH`` prints, for each thing by name, ``"travels"`` or the class of the refusal.
Disk at ``PATH`` is used.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

import zarr

import icechunk

__all__ = ["outcomes"]


def things(path: str) -> dict[str, Callable[[], object]]:
    """Makers of what users hand to other processes."""
    storage = icechunk.local_filesystem_storage(path)
    repo = icechunk.Repository.create(storage)
    with repo.transaction("main", message="root") as store:
        zarr.create_group(store)
    changed = repo.writable_session("main")
    zarr.create_group(changed.store, path="changed")
    committed = repo.writable_session("main")
    zarr.create_group(committed.store, path="committed")
    committed.commit("committed")
    fork = repo.writable_session("main").fork()
    in_memory = icechunk.Repository.create(icechunk.in_memory_storage())
    read_only = repo.readonly_session("main")
    return {
        "repository": lambda: repo,
        "repository in memory": lambda: in_memory,
        "read-only session": lambda: read_only,
        "writable session": lambda: repo.writable_session("main"),
        "changed session": lambda: changed,
        "committed session": lambda: committed,
        "rearranging session": lambda: repo.rearrange_session("main"),
        "fork": lambda: fork,
        "read-only store": lambda: read_only.store,
        "writable store": lambda: changed.store,
        "store of a fork": lambda: fork.store,
        "group in a read-only store": lambda: zarr.open_group(read_only.store, mode="r"),
        "group in a writable store": lambda: zarr.open_group(changed.store),
        "group in a fork": lambda: zarr.open_group(fork.store),
        "storage on disk": lambda: storage,
        "storage in memory": icechunk.in_memory_storage,
        "storage on S3": lambda: icechunk.s3_storage(bucket="b", prefix="p", region="r", anonymous=True),
        "credentials": lambda: icechunk.s3_credentials(access_key_id="k", secret_access_key="s"),
        "credentials of containers": lambda: icechunk.containers_credentials(
            {"s3://b/": icechunk.s3_credentials(anonymous=True)}
        ),
        "configuration": icechunk.RepositoryConfig.default,
        "container": lambda: icechunk.VirtualChunkContainer("s3://b/", icechunk.s3_store(region="r")),
        "virtual chunk": lambda: icechunk.VirtualChunkSpec([0], "s3://b/k", 0, 4),
        "solver": icechunk.BasicConflictSolver,
        "snapshot": lambda: next(iter(repo.ancestry(branch="main"))),
        "changes": changed.status,
        "error": lambda: _error(repo),
        "conflict": lambda: icechunk.ConflictError("a", "b"),
        "kind of error": lambda: icechunk.ErrorKind.IO,
    }


def _error(repo: Any) -> Exception:
    try:
        repo.lookup_branch("none")
    except icechunk.IcechunkError as error:
        return error
    raise AssertionError


def outcomes(path: str) -> dict[str, str]:
    """``"travels"``, or the name of the error's class, by name of the thing."""
    return {name: _outcome(make()) for name, make in things(path).items()}


def _outcome(thing: object) -> str:
    try:
        assert type(pickle.loads(pickle.dumps(thing))) is type(thing)
    except Exception as error:
        return type(error).__name__
    return "travels"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(outcomes(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)
