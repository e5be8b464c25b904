"""Repositories: history, refs and sessions, at one place of a storage."""

from __future__ import annotations

from icechunk.repository.administration import Administration
from icechunk.repository.branches import Branches
from icechunk.repository.history import History
from icechunk.repository.inspection import Inspection
from icechunk.repository.none_credentials import (
    _none_credential_guidance,  # noqa: F401
)
from icechunk.repository.none_credentials import (
    warn_on_none_virtual_chunk_credentials as _warn_on_none_virtual_chunk_credentials,  # noqa: F401
)
from icechunk.repository.opening import Opening
from icechunk.repository.rewriting import Rewriting
from icechunk.repository.upgrading import (
    upgrade_icechunk_repository,
    upgrade_icechunk_repository_async,
)
from icechunk.repository.upkeep import Upkeep

__all__ = ["Repository", "upgrade_icechunk_repository", "upgrade_icechunk_repository_async"]


class Repository(Opening, Rewriting, Branches, History, Inspection, Administration, Upkeep):
    """A transactional Zarr hierarchy with its history.

    Made by `create`, `open` or `open_or_create`. Methods that end in ``_async`` are the engine; their synchronous
    twins run them on one background loop. Safe to share among event loops and threads; pickles with its storage
    and credentials, and opens again where it arrives.
    """
