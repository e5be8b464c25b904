"""``python -m tools.interop.parts FOLDER BASE TIP``: the changes between two snapshots, by a library.

Runs under either library, on a repository whose transaction logs are in several objects, and leaves its history
without what is between the two. Prints JSON: differences and conflicts before and after collections.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import icechunk

__all__ = ["known"]


def known(path: str, base: str, tip: str) -> dict[str, Any]:
    """Differences from ``base`` to ``tip``, and chunks of ``/a`` that cannot be written on ``base`` any more."""
    repo = icechunk.Repository.open(icechunk.local_filesystem_storage(path))
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    root = [info.id for info in repo.ancestry(branch="main")][-1]
    answers: dict[str, Any] = {"diff": _diff(repo, base, tip), "conflicts": _conflicts(repo, base, tip)}
    collected = repo.garbage_collect(tomorrow)
    answers["collected"] = collected.transaction_logs_deleted
    answers["conflicts after a collection"] = _conflicts(repo, base, tip)
    repo.expire_snapshots(datetime.now(UTC))
    answers["collected after an expiration"] = repo.garbage_collect(tomorrow).transaction_logs_deleted
    answers["diff after an expiration"] = _diff(repo, root, tip)
    return answers


def _diff(repo: icechunk.Repository, first: str, last: str) -> dict[str, Any]:
    diff = repo.diff(from_snapshot_id=first, to_snapshot_id=last)
    return {
        "new": sorted(diff.new_arrays),
        "chunks": {path: sorted(rows) for path, rows in diff.updated_chunks.items()},
    }


def _conflicts(repo: icechunk.Repository, base: str, tip: str) -> list[int]:
    found = []
    for chunk in range(20):
        repo.create_branch("probe", base)
        session = repo.writable_session("probe")
        session.store.set_virtual_ref(f"a/c/{chunk}", "s3://bucket/x", offset=0, length=3, validate_container=False)
        repo.reset_branch("probe", tip)
        try:
            session.rebase(icechunk.ConflictDetector())
        except icechunk.RebaseFailedError:
            found.append(chunk)
        repo.delete_branch("probe")
    return found


if __name__ == "__main__":
    print(json.dumps(known(*sys.argv[1:])))
