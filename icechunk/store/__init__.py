"""The Zarr store of a session: Zarr's keys, and virtual references."""

from __future__ import annotations

from icechunk.store.store import IcechunkStore

__all__ = ["IcechunkStore"]
