"""Everything that a reader can see of a repository, as JSON: the same script on our library and on the official one.

``python -m tools.interop.dump PATH`` prints one line: branches, tags, history, and for every snapshot its nodes with
their Zarr metadata, the keys of their chunks and a digest of their values. Two libraries agree on a repository when the
lines are equal. With ``--mutate`` it tries every mutation instead, and reports what became of each.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import zarr

import icechunk

__all__ = ["digest", "dump", "refusals"]


def digest(values: Any) -> dict[str, Any]:
    """An identification of an array's values, the same for all versions of numpy and zarr.

    Parameters
    ----------
    values
        A numpy array or scalar. Texts are compared as texts, all else as bytes in native order.
    """
    array = np.asarray(values)
    if array.dtype.kind in "OTU":
        flat = [item.hex() if isinstance(item, bytes) else str(item) for item in array.ravel().tolist()]
        data, kind = json.dumps(flat).encode(), "text"
    else:
        native = array.astype(array.dtype.newbyteorder("="))
        data, kind = np.ascontiguousarray(native).tobytes(), str(native.dtype)
    return {"kind": kind, "shape": list(array.shape), "sha256": hashlib.sha256(data).hexdigest()}


def dump(repo: Any) -> dict[str, Any]:
    """All that is committed in `repo`, in values that JSON can carry; parts of arrays at the tips of refs only."""
    branches = {name: repo.lookup_branch(name) for name in sorted(repo.list_branches())}
    tags = {name: repo.lookup_tag(name) for name in sorted(repo.list_tags())}
    tips = {*branches.values(), *tags.values()}
    history: dict[str, list[str]] = {}
    snapshots: dict[str, Any] = {}
    for kind, refs in (("branch", branches), ("tag", tags)):
        for name, tip in refs.items():
            infos = list(repo.ancestry(**{kind: name}))
            history[f"{kind} {name}"] = [info.id for info in infos]
            session = repo.readonly_session(**{kind: name})
            if not session.snapshot_id == tip == infos[0].id:
                raise AssertionError(f"{kind} {name}: {session.snapshot_id}, {tip} and {infos[0].id} are not one")
            for info in infos:
                if info.id not in snapshots:
                    snapshots[info.id] = _snapshot(repo, info, parts=info.id in tips)
    return {
        "branches": branches,
        "tags": tags,
        "history": history,
        "snapshots": snapshots,
        "metadata": dict(repo.get_metadata()) if int(getattr(repo, "spec_version", 1)) >= 2 else None,
    }


def _snapshot(repo: Any, info: Any, *, parts: bool) -> dict[str, Any]:
    store = repo.readonly_session(snapshot_id=info.id).store
    return {
        "parent": info.parent_id,
        "message": info.message,
        "metadata": dict(info.metadata),
        "written_at": info.written_at.astimezone(UTC).isoformat(),
        "nodes": asyncio.run(_nodes(store, parts=parts)),
    }


class _Here(ThreadPoolExecutor):
    """Runs work at once: zarr gives each chunk to a thread, which takes longer than decoding a small one."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


async def _nodes(store: Any, *, parts: bool) -> dict[str, Any]:
    from zarr.core.buffer import default_buffer_prototype

    asyncio.get_running_loop().set_default_executor(_Here())
    keys = sorted([key async for key in store.list()])
    nodes: dict[str, Any] = {}
    for key in keys:
        if key.rpartition("/")[2] != "zarr.json":
            continue
        path = key.removesuffix("zarr.json").rstrip("/")
        stored = await store.get(key, default_buffer_prototype())
        metadata = json.loads(stored.to_bytes())
        node = {"metadata": metadata}
        if metadata["node_type"] == "array":
            prefix = f"{path}/c" if path else "c"
            chunks = [name for name in keys if name == prefix or name.startswith(prefix + "/")]
            node["chunks"] = hashlib.sha256("\n".join(chunks).encode()).hexdigest()
            node["n_chunks"] = len(chunks)
            array = await zarr.api.asynchronous.open_array(store=store, path=path, mode="r", zarr_format=3)
            node["values"] = digest(await array.getitem(...))
            if parts and array.ndim and array.shape[0] > 2:
                # a part of the array: byte ranges inside shards, and chunks cut at their edges
                node["part"] = digest(await array.getitem((slice(1, -1),)))
        nodes["/" + path] = node
    return nodes


def refusals(repo: Any, storage: Any) -> dict[str, str]:
    """Try every mutation on `repo`; what became of each, by name: the class and text of its error, or ``accepted``."""
    main = repo.lookup_branch("main")
    branch = next(name for name in sorted(repo.list_branches()) if name != "main")
    tag = min(repo.list_tags())

    def write_and_commit(finish: str) -> None:
        session = repo.writable_session("main")
        zarr.create_array(store=session.store, name=f"written_by_{finish}", shape=(1,), dtype="i4")[...] = 1
        getattr(session, finish)("by the official library")

    def transaction() -> None:
        with repo.transaction("main", message="by the official library") as store:
            zarr.create_array(store=store, name="written_by_transaction", shape=(1,), dtype="i4")

    def rearrange() -> None:
        session = repo.rearrange_session("main")
        node = next(name for name, _ in zarr.open_group(session.store, mode="r").members())
        session.move(f"/{node}", "/moved_by_official")
        session.commit("moved")

    def save_config() -> None:
        config = repo.config
        config.inline_chunk_threshold_bytes = 77
        repo.reopen(config=config).save_config()

    mutations: dict[str, Callable[[], Any]] = {
        "commit": lambda: write_and_commit("commit"),
        "amend": lambda: write_and_commit("amend"),
        "flush": lambda: write_and_commit("flush"),
        "transaction": transaction,
        "rearrange": rearrange,
        "create_branch": lambda: repo.create_branch("made-by-official", main),
        "reset_branch": lambda: repo.reset_branch("main", repo.lookup_branch(branch)),
        "delete_branch": lambda: repo.delete_branch(branch),
        "create_tag": lambda: repo.create_tag("made-by-official", main),
        "delete_tag": lambda: repo.delete_tag(tag),
        "set_metadata": lambda: repo.set_metadata({"by": "official"}),
        "update_metadata": lambda: repo.update_metadata({"by": "official"}),
        "save_config": save_config,
        "set_feature_flag": lambda: repo.set_feature_flag("move_node", False),
        "rewrite_manifests": lambda: repo.rewrite_manifests("rewritten", branch="main"),
        "expire_snapshots": lambda: repo.expire_snapshots(datetime.now(UTC) + timedelta(days=1)),
        "garbage_collect": lambda: repo.garbage_collect(datetime.now(UTC) + timedelta(days=1)),
        "create": lambda: icechunk.Repository.create(storage),
    }
    outcome = {}
    for name, mutate in mutations.items():
        try:
            mutate()
        except Exception as error:
            outcome[name] = f"{type(error).__name__}: {error}"
        else:
            outcome[name] = "accepted"
    return outcome


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    path, *options = arguments
    storage = icechunk.local_filesystem_storage(path)
    repo = icechunk.Repository.open(storage)
    print(json.dumps(refusals(repo, storage) if "--mutate" in options else dump(repo), sort_keys=True))


if __name__ == "__main__":
    main(sys.argv[1:])
    # Not through the interpreter's end, where official 1.1.21 sometimes aborts.
    sys.stdout.flush()
    os._exit(0)
