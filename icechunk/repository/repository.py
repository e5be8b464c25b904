"""The handle of a repository."""

from __future__ import annotations

from icechunk.repository.appending import Appending
from icechunk.repository.branches_and_tags import BranchesAndTags
from icechunk.repository.changes import Changes
from icechunk.repository.configuration import Configuration
from icechunk.repository.history import History
from icechunk.repository.inspection import Inspection
from icechunk.repository.maintenance import Maintenance
from icechunk.repository.opening import Opening
from icechunk.repository.watch import Watching

__all__ = ["Repository"]


class Repository(
    Opening, Maintenance, BranchesAndTags, History, Inspection, Changes, Watching, Appending, Configuration
):
    """A transactional Zarr hierarchy with its history.

    Made by `create`, `open` or `open_or_create`. Methods that end in ``_async`` are the engine; their synchronous
    twins run them on one background loop. Safe to share among event loops and threads; pickles with its storage
    and credentials, and opens again where it arrives.
    """
