"""Errors of typical misuses, as JSON: the same script on both libraries.

``python -m tools.interop.misuse`` prints, for each misuse by name, the classes of the error, from its own up to
`Exception`, its ``kind`` (None for errors of Python itself) and its message; or null where nothing was raised.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import icechunk

__all__ = ["MISUSES", "outcomes"]

UNKNOWN = "G" * 20
"""An id of the right form, of no snapshot."""
NOW = datetime.datetime.now(datetime.UTC)

MISUSES: dict[str, Callable[[Any], object]] = {}
"""Misuses of a repository; each gets one of its own."""


def misuse(function: Callable[[Any], object]) -> Callable[[Any], object]:
    MISUSES[function.__name__.replace("_", " ")] = function
    return function


def expression(name: str, function: Callable[[Any], object]) -> None:
    MISUSES[name] = function


def make(spec_version: int | None) -> Any:
    """Two arrays, a group, a second branch, a tag and a deleted tag; a container for virtual chunks."""
    config = icechunk.RepositoryConfig.default()
    store = icechunk.local_filesystem_store("/tmp/misuse")
    config.set_virtual_chunk_container(icechunk.VirtualChunkContainer("file:///tmp/misuse/", store))
    repo = icechunk.Repository.create(icechunk.in_memory_storage(), config, spec_version=spec_version)
    session = repo.writable_session("main")
    root = zarr.create_group(session.store)
    root.create_array("a", shape=(4,), chunks=(1,), dtype="i4", compressors=None)[:] = np.arange(4)
    root.create_array("g/b", shape=(4, 4), chunks=(2, 2), dtype="i4", compressors=None)
    first = session.commit("first")
    repo.create_branch("dev", first)
    repo.create_tag("v1", first)
    repo.create_tag("gone", first)
    repo.delete_tag("gone")
    return repo


def changed(repo: Any, branch: str = "main", value: int = 7) -> Any:
    """A session that wrote a chunk."""
    session = repo.writable_session(branch)
    zarr.open_array(session.store, path="a")[0] = value
    return session


def behind(repo: Any) -> Any:
    """A session with a change whose chunk another commit has changed meanwhile."""
    session = changed(repo)
    changed(repo, value=8).commit("earlier")
    return session


def tip(repo: Any) -> str:
    found: str = repo.lookup_branch("main")
    return found


def put(session: Any, key: str, data: bytes) -> None:
    buffer = zarr.core.buffer.default_buffer_prototype().buffer.from_bytes(data)
    asyncio.run(session.store.set(key, buffer))


def virtual(repo: Any, location: str, key: str = "a/c/0", **options: Any) -> Any:
    session = repo.writable_session("main")
    session.store.set_virtual_ref(key, location, **{"offset": 0, "length": 4, **options})
    return session


# repositories
expression("open a missing one", lambda _: icechunk.Repository.open(icechunk.in_memory_storage()))
expression("open a storage of the wrong type", lambda _: icechunk.Repository.open(42))
expression("open with a dict as configuration", lambda _: icechunk.Repository.open(icechunk.in_memory_storage(), {}))
expression(
    "create with an unknown version", lambda _: icechunk.Repository.create(icechunk.in_memory_storage(), spec_version=9)
)


@misuse
def create_twice(_: Any) -> None:
    storage = icechunk.in_memory_storage()
    icechunk.Repository.create(storage)
    icechunk.Repository.create(storage)


@misuse
def create_among_other_files(_: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "file").write_text("x")
        icechunk.Repository.create(icechunk.local_filesystem_storage(folder))


@misuse
def open_a_folder_of_other_files(_: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "file").write_text("x")
        icechunk.Repository.open(icechunk.local_filesystem_storage(folder))


# branches and tags
expression("create a branch again", lambda repo: repo.create_branch("dev", tip(repo)))
expression("create a branch on an unknown snapshot", lambda repo: repo.create_branch("new", UNKNOWN))
expression("create a branch on no snapshot id", lambda repo: repo.create_branch("new", "nonsense!"))
expression("create a branch without a name", lambda repo: repo.create_branch("", tip(repo)))
expression("create a branch with a slash", lambda repo: repo.create_branch("a/b", tip(repo)))
expression("create a branch with a number for a name", lambda repo: repo.create_branch(5, tip(repo)))
expression("look up an unknown branch", lambda repo: repo.lookup_branch("none"))
expression("delete an unknown branch", lambda repo: repo.delete_branch("none"))
expression("delete main", lambda repo: repo.delete_branch("main"))
expression("reset an unknown branch", lambda repo: repo.reset_branch("none", tip(repo)))
expression("reset to an unknown snapshot", lambda repo: repo.reset_branch("dev", UNKNOWN))
expression("reset from elsewhere", lambda repo: repo.reset_branch("dev", tip(repo), from_snapshot_id=UNKNOWN))
expression("create a tag again", lambda repo: repo.create_tag("v1", tip(repo)))
expression("create a deleted tag", lambda repo: repo.create_tag("gone", tip(repo)))
expression("create a tag on an unknown snapshot", lambda repo: repo.create_tag("new", UNKNOWN))
expression("create a tag without a name", lambda repo: repo.create_tag("", tip(repo)))
expression("create a tag with a slash", lambda repo: repo.create_tag("a/b", tip(repo)))
expression("look up an unknown tag", lambda repo: repo.lookup_tag("none"))
expression("look up a deleted tag", lambda repo: repo.lookup_tag("gone"))
expression("delete an unknown tag", lambda repo: repo.delete_tag("none"))

# sessions
expression("read an unknown branch", lambda repo: repo.readonly_session("none"))
expression("read an unknown tag", lambda repo: repo.readonly_session(tag="none"))
expression("read an unknown snapshot", lambda repo: repo.readonly_session(snapshot_id=UNKNOWN))
expression("read no snapshot id", lambda repo: repo.readonly_session(snapshot_id="nonsense!"))
expression("read nothing", lambda repo: repo.readonly_session())
expression("read a branch and a tag", lambda repo: repo.readonly_session("main", tag="v1"))
expression(
    "read a time before the first", lambda repo: repo.readonly_session("main", as_of=NOW - datetime.timedelta(365))
)
expression("read a time of no branch", lambda repo: repo.readonly_session(as_of=NOW))
expression("read a time of a tag", lambda repo: repo.readonly_session(tag="v1", as_of=NOW))
expression("write an unknown branch", lambda repo: repo.writable_session("none"))
expression("rearrange an unknown branch", lambda repo: repo.rearrange_session("none"))
expression("commit nothing", lambda repo: repo.writable_session("main").commit("m"))
expression("commit a read-only session", lambda repo: repo.readonly_session("main").commit("m"))
expression("amend with nothing", lambda repo: repo.writable_session("main").amend("m"))
expression("flush nothing", lambda repo: repo.writable_session("main").flush("m"))
expression("flush a read-only session", lambda repo: repo.readonly_session("main").flush("m"))
expression("commit behind", lambda repo: behind(repo).commit("m"))
expression("amend behind", lambda repo: behind(repo).amend("m"))
expression("commit with a number for a message", lambda repo: changed(repo).commit(5))
expression("commit metadata that is no JSON", lambda repo: changed(repo).commit("m", {"k": object()}))
expression(
    "commit and rebase a real conflict", lambda repo: behind(repo).commit("m", rebase_with=icechunk.ConflictDetector())
)
expression("rebase a real conflict", lambda repo: behind(repo).rebase(icechunk.ConflictDetector()))
expression("rebase with no solver", lambda repo: behind(repo).rebase(5))
expression("rebase a read-only session", lambda repo: repo.readonly_session("main").rebase(icechunk.ConflictDetector()))
expression("discard of a read-only session", lambda repo: repo.readonly_session("main").discard_changes())
expression("fork a read-only session", lambda repo: repo.readonly_session("main").fork())
expression(
    "merge a session that is no fork", lambda repo: repo.writable_session("main").merge(repo.writable_session("main"))
)
expression("merge something else", lambda repo: repo.writable_session("main").merge("fork"))
expression("commit a fork", lambda repo: repo.writable_session("main").fork().commit("m"))


@misuse
def commit_twice(repo: Any) -> None:
    session = changed(repo)
    session.commit("m")
    session.commit("m")


@misuse
def write_after_the_commit(repo: Any) -> None:
    session = changed(repo)
    session.commit("m")
    put(session, "a/c/0", b"0123")


@misuse
def amend_the_first(_: Any) -> None:
    repo = icechunk.Repository.create(icechunk.in_memory_storage(), spec_version=2)
    session = repo.writable_session("main")
    zarr.create_group(session.store)
    session.amend("m")


@misuse
def commit_to_a_deleted_branch(repo: Any) -> None:
    session = changed(repo, "dev")
    repo.delete_branch("dev")
    session.commit("m")


@misuse
def merge_into_a_read_only_session(repo: Any) -> None:
    fork = repo.writable_session("main").fork()
    repo.readonly_session("main").merge(fork)


@misuse
def merge_a_fork_of_another_snapshot(repo: Any) -> None:
    fork = repo.writable_session("main").fork()
    zarr.open_array(fork.store, path="a")[1] = 5
    changed(repo).commit("later")
    repo.writable_session("main").merge(fork)


@misuse
def write_in_a_read_only_repository(repo: Any) -> None:
    repo.set_status(icechunk.RepoStatus(icechunk.RepoAvailability.read_only))
    repo.writable_session("main")


@misuse
def create_a_tag_in_a_read_only_repository(repo: Any) -> None:
    repo.set_status(icechunk.RepoStatus(icechunk.RepoAvailability.read_only))
    repo.create_tag("new", tip(repo))


# moving nodes and chunks
def rearrange(name: str, source: Any, target: Any) -> None:
    expression(name, lambda repo: repo.rearrange_session("main").move(source, target))


rearrange("move an unknown node", "/none", "/new")
rearrange("move a group into itself", "/g", "/g/sub")
rearrange("move onto another node", "/a", "/g")
rearrange("move below a missing group", "/a", "/none/a")
rearrange("move below an array", "/g", "/a/g")
rearrange("move the root", "/", "/new")
rearrange("move from a relative path", "a", "/new")
expression("move in a writable session", lambda repo: repo.writable_session("main").move("/a", "/new"))
expression("move in a read-only session", lambda repo: repo.readonly_session("main").move("/a", "/new"))
expression("write in a rearranging session", lambda repo: put(repo.rearrange_session("main"), "a/c/0", b"0123"))
expression("shift an unknown array", lambda repo: repo.writable_session("main").shift_array("/none", (1,)))
expression("shift a group", lambda repo: repo.writable_session("main").shift_array("/g", (1,)))
expression("shift by too many dimensions", lambda repo: repo.writable_session("main").shift_array("/a", (1, 1)))
expression("shift in a read-only session", lambda repo: repo.readonly_session("main").shift_array("/a", (1,)))
expression("shift by a word", lambda repo: repo.writable_session("main").shift_array("/a", ("one",)))
expression("reindex an unknown array", lambda repo: repo.writable_session("main").reindex_array("/none", lambda i: i))
expression(
    "reindex to too many dimensions", lambda repo: repo.writable_session("main").reindex_array("/a", lambda i: [1, 1])
)
expression("reindex by no function", lambda repo: repo.writable_session("main").reindex_array("/a", 5))
expression(
    "ask for the chunk type in an unknown array", lambda repo: repo.readonly_session("main").chunk_type("/none", (0,))
)

# the store
expression("put into a read-only store", lambda repo: put(repo.readonly_session("main"), "a/c/0", b"0123"))
expression("put a key that is none of zarr's", lambda repo: put(repo.writable_session("main"), "a/notes.txt", b"x"))
expression("put metadata that is no JSON", lambda repo: put(repo.writable_session("main"), "new/zarr.json", b"{"))
expression("put metadata of format 2", lambda repo: put(repo.writable_session("main"), "new/.zarray", b"{}"))
expression("put a chunk of an unknown array", lambda repo: put(repo.writable_session("main"), "none/c/0", b"0123"))
expression("put a chunk outside of the grid", lambda repo: put(repo.writable_session("main"), "a/c/99", b"0123"))
expression(
    "delete in a read-only store", lambda repo: asyncio.run(repo.readonly_session("main").store.delete("a/zarr.json"))
)
expression(
    "delete a folder in a read-only store",
    lambda repo: asyncio.run(repo.readonly_session("main").store.delete_dir("g")),
)
expression("clear a read-only store", lambda repo: asyncio.run(repo.readonly_session("main").store.clear()))
expression("put a str", lambda repo: asyncio.run(repo.writable_session("main").store.set("a/c/0", "0123")))
expression(
    "open an unknown array", lambda repo: zarr.open_array(repo.readonly_session("main").store, path="none", mode="r")
)

# virtual chunks
expression("a virtual chunk of no container", lambda repo: virtual(repo, "s3://bucket/key"))
expression("a virtual chunk at no URL", lambda repo: virtual(repo, "no url"))
expression("a virtual chunk of an unknown array", lambda repo: virtual(repo, "file:///tmp/misuse/f", "none/c/0"))
expression("a virtual chunk outside of the grid", lambda repo: virtual(repo, "file:///tmp/misuse/f", "a/c/99"))
expression("a virtual chunk of negative length", lambda repo: virtual(repo, "file:///tmp/misuse/f", length=-1))
expression(
    "a virtual chunk with a number for a checksum", lambda repo: virtual(repo, "file:///tmp/misuse/f", checksum=5)
)
expression(
    "a virtual chunk in a read-only store",
    lambda repo: repo.readonly_session("main").store.set_virtual_ref(
        "a/c/0", "file:///tmp/misuse/f", offset=0, length=4
    ),
)
expression(
    "read a virtual chunk unauthorised",
    lambda repo: zarr.open_array(virtual(repo, "file:///tmp/misuse/f").store, path="a")[0],
)
expression(
    "virtual chunks of an unknown array",
    lambda repo: repo.writable_session("main").store.set_virtual_refs(
        "/none", [icechunk.VirtualChunkSpec([0], "file:///tmp/misuse/f", 0, 4)]
    ),
)

# history and maintenance
expression("ancestry of nothing", lambda repo: list(repo.ancestry()))
expression("ancestry of two", lambda repo: list(repo.ancestry(branch="main", tag="v1")))
expression("ancestry of an unknown branch", lambda repo: list(repo.ancestry(branch="none")))
expression("look up an unknown snapshot", lambda repo: repo.lookup_snapshot(UNKNOWN))
expression("diff from an unknown snapshot", lambda repo: repo.diff(from_snapshot_id=UNKNOWN, to_branch="main"))
expression("diff of nothing", lambda repo: repo.diff())
expression(
    "diff backwards",
    lambda repo: repo.diff(from_branch="main", to_snapshot_id=list(repo.ancestry(branch="main"))[-1].id),
)
expression("inspect an unknown manifest", lambda repo: repo.inspect_manifest(UNKNOWN))
expression("inspect an unknown snapshot", lambda repo: repo.inspect_snapshot(UNKNOWN))
expression("expire by a date in words", lambda repo: repo.expire_snapshots("2020-01-01"))
expression("collect by a date in words", lambda repo: repo.garbage_collect("2020-01-01"))
expression("rewrite manifests of an unknown branch", lambda repo: repo.rewrite_manifests("m", branch="none"))
expression("set metadata that is no JSON", lambda repo: repo.set_metadata({"k": object()}))
expression("set metadata that is no dict", lambda repo: repo.set_metadata([1]))
expression("set an unknown feature", lambda repo: repo.set_feature_flag("none", True))
expression("set a status of the wrong type", lambda repo: repo.set_status("read_only"))


@misuse
def move_when_the_feature_is_off(repo: Any) -> None:
    repo.set_feature_flag("move_node", False)
    session = repo.rearrange_session("main")
    session.move("/a", "/new")
    session.commit("m")


# configuration
expression("a threshold below zero", lambda _: icechunk.RepositoryConfig(inline_chunk_threshold_bytes=-1))
expression("a threshold in words", lambda _: icechunk.RepositoryConfig(inline_chunk_threshold_bytes="x"))
expression("an unknown option", lambda _: icechunk.RepositoryConfig(nonsense=1))
expression("a cache in words", lambda _: icechunk.CachingConfig(num_bytes_chunks="x"))
expression("a compression level in words", lambda _: icechunk.CompressionConfig(level="x"))
expression("a container of no URL", lambda _: icechunk.VirtualChunkContainer("nonsense", icechunk.s3_store()))
expression(
    "a container of another scheme", lambda _: icechunk.VirtualChunkContainer("gs://b/", icechunk.s3_store(region="r"))
)
expression(
    "a container without its slash", lambda _: icechunk.VirtualChunkContainer("s3://b/p", icechunk.s3_store(region="r"))
)
expression("s3 without a bucket", lambda _: icechunk.s3_storage(prefix="p"))
expression("s3 with half of a key", lambda _: icechunk.s3_storage(bucket="b", prefix="p", access_key_id="k"))
expression(
    "s3 anonymous with a key",
    lambda _: icechunk.s3_storage(bucket="b", prefix="p", anonymous=True, access_key_id="k", secret_access_key="s"),
)
expression("authorise by no dict", lambda _: icechunk.containers_credentials(5))


def outcomes(spec_version: int | None = None) -> dict[str, list[Any] | None]:
    """For each misuse the error's classes, kind and message; None where there is none."""
    return {name: _outcome(function, spec_version) for name, function in MISUSES.items()}


def _outcome(function: Callable[[Any], object], spec_version: int | None) -> list[Any] | None:
    repo = make(spec_version)
    try:
        function(repo)
    except Exception as error:
        names = [of.__name__ for of in type(error).__mro__ if of not in (BaseException, object)]
        kind = getattr(error, "kind", None)
        return [names, None if kind is None else str(getattr(kind, "value", kind)), str(error).split("\n\ncontext:")[0]]
    return None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(outcomes()))
    sys.stdout.flush()
    os._exit(0)
