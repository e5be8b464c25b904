"""Promises of the file systems that the local storage knows."""

from __future__ import annotations

from typing import Final

from icechunk.storage.local.syncs import Promises

__all__ = ["BTRFS", "EXT4", "EXT4_WITHOUT_JOURNAL", "KINDS", "UNKNOWN"]

UNKNOWN: Final = Promises()
"""Of a file system that is not known."""
BTRFS: Final = Promises(names_follow_files=True, syncs_all=True, flushes_all=True)
EXT4: Final = Promises(orders=True, names_follow_files=True, syncs_all=True, flushes_all=True)
"""Of ext4 with a journal, and of XFS."""
EXT4_WITHOUT_JOURNAL: Final = Promises(names_follow_files=True, syncs_all=True)
KINDS: Final = {"unknown": UNKNOWN, "btrfs": BTRFS, "ext4": EXT4, "ext4 without a journal": EXT4_WITHOUT_JOURNAL}
