"""Access to the objects outside the repository that virtual chunks are parts of.

Not here: references to them (`store.virtual_refs`), and the values that describe containers (`config.containers`).
"""

from __future__ import annotations

from icechunk.virtual_access.access import VirtualAccess

__all__ = ["VirtualAccess"]
