"""Repositories: history, refs and sessions, at one place of a storage."""

from __future__ import annotations

from icechunk.repository.repository import Repository
from icechunk.repository.upkeep import upgrade_icechunk_repository, upgrade_icechunk_repository_async

__all__ = ["Repository", "upgrade_icechunk_repository", "upgrade_icechunk_repository_async"]
