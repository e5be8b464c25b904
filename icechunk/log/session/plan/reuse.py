"""Reuse of manifests that an earlier try of the same commit has stored.

A commit that lost a race is compacted again, over another base. A manifest that the winner did not affect has the same
contents, except for its random id. The stored manifest is then used, and not written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np

from icechunk.format.by_node import ByNode
from icechunk.format.ids import NodeId
from icechunk.format.manifest.refs_by_node import grouped_refs
from icechunk.format.values import ChunkRefs, Manifest
from icechunk.log.session.plan.compaction import Placed

__all__ = ["Earlier", "Remembered"]

Remembered: TypeAlias = "tuple[Manifest | bytes, Placed]"
"""A manifest, or the digest of one, and its entry for a snapshot."""


class Earlier:
    """Manifests that earlier tries of one commit have stored; none is older than the first try.

    Parameters
    ----------
    keep_refs
        Number of references that are kept for comparison; of manifests beyond that, only digests are kept.
    """

    def __init__(self, keep_refs: int = 2**20) -> None:
        self._known: dict[tuple[NodeId, ...], list[Remembered]] = {}
        self._left = keep_refs

    def remembered(self, manifest: Manifest, placed: Placed) -> Remembered:
        """The argument for `add`, to be passed once the manifest is certainly stored."""
        self._left -= manifest.num_chunk_refs
        return (manifest if self._left >= 0 else _digest(manifest)), placed

    def add(self, manifests: Iterable[Remembered]) -> None:
        """Add manifests that are stored now."""
        for what, placed in manifests:
            self._known.setdefault(tuple(placed.extents), []).append((what, placed))

    def find(self, manifest: Manifest) -> Placed | None:
        """A stored manifest that holds the same references, or None."""
        own: bytes | None = None
        for what, placed in self._known.get(tuple(manifest.arrays), ()):
            if placed.file.num_chunk_refs != manifest.num_chunk_refs:
                continue
            if isinstance(what, Manifest):
                if _same_arrays(grouped_refs(what.arrays), grouped_refs(manifest.arrays)):
                    return placed
            else:
                own = own or _digest(manifest)
                if own == what:
                    return placed
        return None


def _digest(manifest: Manifest) -> bytes:
    """A digest that differs if any column of any array differs."""
    found = hashlib.blake2b(digest_size=32)
    for part in grouped_refs(manifest.arrays).parts:
        refs = part.rows
        found.update(b"".join(part.nodes))
        found.update(repr((refs.coords.shape, refs.locations, refs.etags, len(refs.inline_data))).encode())
        found.update(refs.inline_data)
        for column in (part.edges, *_columns(refs)):
            found.update(np.ascontiguousarray(column).view(np.uint8).data if column.size else b"")
    return found.digest()


def _same_arrays(ours: ByNode[ChunkRefs], theirs: ByNode[ChunkRefs]) -> bool:
    """Whether two manifests hold the same references. Manifests that differ only in the order of their arrays count as
    different, which only costs one more manifest."""
    return len(ours.parts) == len(theirs.parts) and all(
        a.nodes == b.nodes and np.array_equal(a.edges, b.edges) and _same(a.rows, b.rows)
        for a, b in zip(ours.parts, theirs.parts, strict=True)
    )


def _same(a: ChunkRefs, b: ChunkRefs) -> bool:
    """Whether two lists of references are equal, column by column."""
    if len(a) != len(b) or (a.locations, a.etags, a.inline_data) != (b.locations, b.etags, b.inline_data):
        return False
    ours, theirs = _columns(a), _columns(b)
    return len(ours) == len(theirs) and all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


def _columns(refs: ChunkRefs) -> list[Any]:
    columns: list[Any] = [refs.coords, refs.kind, refs.offset, refs.length, refs.chunk_id, refs.location]
    if refs.checksum is not None:
        columns += [refs.checksum_kind, refs.checksum]
    return columns
