"""A repository as users hold it."""

from __future__ import annotations

from icechunk.repository.administration import Administration
from icechunk.repository.branches import Branches
from icechunk.repository.history import History
from icechunk.repository.inspection import Inspection
from icechunk.repository.opening import Opening
from icechunk.repository.upkeep import Rewriting, Upkeep

__all__ = ["Repository"]


class Repository(Opening, Rewriting, Branches, History, Inspection, Administration, Upkeep):
    """A transactional Zarr hierarchy with its history.

    Made by `create`, `open` or `open_or_create`. Methods that end in ``_async`` are the engine; their synchronous
    twins run them on one background loop. Safe to share among event loops and threads; pickles with its storage
    and credentials, and opens again where it arrives.
    """
