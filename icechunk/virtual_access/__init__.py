"""Access to the objects that virtual chunks are parts of."""

from __future__ import annotations

from icechunk.virtual_access.access import VirtualAccess

__all__ = ["VirtualAccess"]
