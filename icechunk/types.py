"""Type aliases of the public API."""

from __future__ import annotations

from typing import Literal

__all__ = ["CommitMethod"]

CommitMethod = Literal["new_commit", "amend"]
"""Add a snapshot to the branch, or replace its newest one."""
