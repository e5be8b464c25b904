"""Running the features of the interop matrix, and describing what came of them, in whichever library is installed."""

from __future__ import annotations

import functools
import re
import warnings
from datetime import datetime
from typing import Any

import icechunk
from tools.interop.dump import dump
from tools.interop.features import FEATURES, Feature, World

__all__ = ["begin", "describe", "feature", "go_on", "refused"]

SETTINGS = (
    "inline_chunk_threshold_bytes",
    "get_partial_values_concurrency",
    "compression.level",
    "caching.num_chunk_refs",
    "manifest.preload.max_total_refs",
)


def feature(name: str) -> Feature:
    """The feature of that name."""
    return next(one for one in FEATURES if one.name == name)


def begin(name: str, path: str, spec_version: int | None) -> None:
    """Create the repository, and run step 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world = World(path, feature(name))
        world.create(spec_version)
        feature(name).script(world, 0)
        publish(world.repo)


def go_on(name: str, path: str, step: int) -> None:
    """Run another step on what is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world = World(path, feature(name))
        world.open()
        feature(name).script(world, step)
        publish(world.repo)


def refused(name: str, path: str, step: int) -> str | None:
    """The library's error for a feature that it does not have; None if it has it."""
    try:
        go_on(name, path, step)
    except (icechunk.IcechunkError, AttributeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def publish(repo: Any) -> None:
    """For readers of the published format alone: bring ``repo`` up to date, where it is not by itself."""
    checkpoint = getattr(repo, "checkpoint", None)
    if checkpoint is not None:
        checkpoint()


def describe(name: str, path: str) -> dict[str, Any]:
    """All that a reader sees, as JSON; without what the library has no name for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world = World(path, feature(name))
        world.open()
        return {**dump(world.repo), **_more(world.repo)}


def _more(repo: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"diffs": {}, "chunks": {}}
    snapshots = _histories(repo)
    for id, parent in snapshots.items():
        if parent is not None and parent in snapshots:
            found["diffs"][id] = _diff(repo.diff(from_snapshot_id=parent, to_snapshot_id=id))
    if hasattr(repo, "list_manifest_files"):
        found["manifests"] = {
            id: sorted([file.id, file.size_bytes, file.num_chunk_refs] for file in repo.list_manifest_files(id))
            for id in snapshots
        }
    for id in snapshots:
        session = repo.readonly_session(snapshot_id=id)
        found["chunks"][id] = sorted(session.all_virtual_chunk_locations())
    found["settings"] = {
        path: functools.reduce(lambda value, name: getattr(value, name, None), path.split("."), repo.config)
        for path in SETTINGS
    }
    if hasattr(repo, "spec_version"):
        found["config"] = leaves(icechunk.Repository.fetch_config(repo.storage))
        found["spec_version"] = int(repo.spec_version)
    if found.get("spec_version") == 2:
        found["ops"] = [
            {"kind": plain(update.kind), "at": update.updated_at.isoformat(), "copy": update.backup_path}
            for update in repo.ops_log()
        ]
        found["flags"] = sorted([f.id, f.name, f.setting, f.enabled] for f in repo.feature_flags())
        state = repo.status
        found["status"] = [int(state.availability), state.limited_availability_reason, state.set_at.isoformat()]
    return found


def _histories(repo: Any) -> dict[str, str | None]:
    """Every snapshot that a branch or tag reaches, with its parent."""
    known: dict[str, str | None] = {}
    for kind, names in (("branch", repo.list_branches()), ("tag", repo.list_tags())):
        for name in sorted(names):
            for info in repo.ancestry(**{kind: name}):
                known[info.id] = info.parent_id
    return known


def _diff(diff: Any) -> dict[str, Any]:
    names = (
        "new_groups",
        "new_arrays",
        "deleted_groups",
        "deleted_arrays",
        "updated_groups",
        "updated_arrays",
    )
    return {
        **{name: sorted(getattr(diff, name)) for name in names},
        # 1.1.21 lists arrays that it shrank with no chunks at all, which we leave out.
        "updated_chunks": {
            path: sorted(list(map(int, row)) for row in rows)
            for path, rows in sorted(diff.updated_chunks.items())
            if len(rows)
        },
        "moved": sorted(map(list, getattr(diff, "moved_nodes", []))),
    }


def leaves(config: Any) -> list[str]:
    """The options of a configuration that have plain values; the libraries show them in different orders."""
    lines = [line.strip() for line in repr(config).splitlines()]
    plain_lines = (re.sub(r"[()\[\]{},]", "", line) for line in lines if line[-1:] not in "({")
    return sorted(line for line in plain_lines if line and not line.startswith(("engine=", "path=", "store=")))


def plain(value: Any) -> Any:
    """The fields of a value of either library, as JSON; a value without fields as its text."""
    if isinstance(value, datetime):
        return value.isoformat()
    if hasattr(value, "__int__") and not isinstance(value, bool | float):
        return int(value)
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    names = [name for name in dir(value) if not name.startswith("_") and name != "engine"]
    fields = {name: item for name in names if not callable(item := getattr(value, name)) and not isinstance(item, type)}
    fields = {name: item for name, item in fields.items() if type(item) is not type(value)}
    return {"is": type(value).__name__, **{name: plain(item) for name, item in fields.items()}}
