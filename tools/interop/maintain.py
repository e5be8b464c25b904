"""Expiration, collection, statistics and a diff over all of history, by whichever library is installed.

``python -m tools.interop.maintain PATH [MICROSECONDS [branches] [tags]]`` expires what was written before that time,
collects all garbage, and prints what became of it as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from datetime import UTC, datetime, timedelta
from typing import Any

import icechunk

__all__ = ["maintain"]

_COUNTS = (
    "bytes_deleted",
    "chunks_deleted",
    "manifests_deleted",
    "snapshots_deleted",
    "transaction_logs_deleted",
)

_PATHS = ("new_arrays", "new_groups", "deleted_arrays", "deleted_groups", "updated_arrays", "updated_groups")


def maintain(repo: Any, older_than_us: int | None, *, branches: bool = False, tags: bool = False) -> dict[str, Any]:
    """Expire (unless None) and collect; what each said, and statistics before and after."""
    found: dict[str, Any] = {"before": _stats(repo)}
    if older_than_us is not None:
        expired = repo.expire_snapshots(
            datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=older_than_us),
            delete_expired_branches=branches,
            delete_expired_tags=tags,
        )
        found["expired"] = sorted(expired)
    for name, dry_run in (("dry", True), ("collected", False)):
        summary = repo.garbage_collect(datetime.now(UTC), dry_run=dry_run)
        found[name] = {count: getattr(summary, count) for count in _COUNTS}
    found["after"] = _stats(repo)
    root = list(repo.ancestry(branch="main"))[-1].id
    diff = repo.diff(from_snapshot_id=root, to_branch="main")
    # In the official library nodes that were created and then changed are updated too.
    new = diff.new_arrays | diff.new_groups
    found["diff"] = {
        name: sorted(getattr(diff, name) - new if "updated" in name else getattr(diff, name)) for name in _PATHS
    }
    found["diff"]["chunks"] = {path: sorted(map(list, chunks)) for path, chunks in sorted(diff.updated_chunks.items())}
    return found


def _stats(repo: Any) -> list[int]:
    stats = repo.chunk_storage_stats()
    return [stats.native_bytes, stats.virtual_bytes, stats.inlined_bytes]


def main(arguments: list[str]) -> None:
    """The command line."""
    warnings.simplefilter("ignore")
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(arguments[0]))
    older = int(arguments[1]) if len(arguments) > 1 else None
    print(json.dumps(maintain(repo, older, branches="branches" in arguments, tags="tags" in arguments)))


if __name__ == "__main__":
    main(sys.argv[1:])
