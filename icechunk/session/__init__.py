"""Sessions: one consistent view of a repository; writable ones collect changes until their commit.

Not here: the computation of commits, merges and conflicts (`log.session`), and Zarr's keys (`store`).
"""

from __future__ import annotations

from icechunk.ops import SessionMode
from icechunk.session.session import ForkSession, Session

__all__ = ["ForkSession", "Session", "SessionMode"]
