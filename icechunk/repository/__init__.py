"""The handle of a repository, one file for each group of its methods.

`repository` (the class itself: create, open, exists), `sessions`, `appending`, `branches_and_tags`, `history`,
`configuration`, `maintenance`, `inspection`, `watch` (the feed), `changes`, `by_url`, and `format_upgrade`. They check
arguments and show results (`views`). Not here: the work itself (`session`, `maintenance`, `appender`,
`log.repository`).
"""

from __future__ import annotations

from icechunk.repository.by_url import open_async, open_sync
from icechunk.repository.changes import ArrayChange, Blame, ChangedRegions
from icechunk.repository.format_upgrade import upgrade_icechunk_repository, upgrade_icechunk_repository_async
from icechunk.repository.repository import Repository
from icechunk.repository.watch import EventKind, RepositoryEvent

__all__ = [
    "ArrayChange",
    "Blame",
    "ChangedRegions",
    "EventKind",
    "Repository",
    "RepositoryEvent",
    "open_async",
    "open_sync",
    "upgrade_icechunk_repository",
    "upgrade_icechunk_repository_async",
]
