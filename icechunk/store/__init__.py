"""The Zarr store of a session: Zarr's keys, and virtual references.

Not here: the state that it reads and changes (`session`), which it knows only by a protocol.
"""

from __future__ import annotations

from icechunk.store.store import IcechunkStore

__all__ = ["IcechunkStore"]
