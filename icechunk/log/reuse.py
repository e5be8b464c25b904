"""Manifests of an earlier attempt at the same commit that serve the next one too.

A commit that lost the race is compacted again, over another base. What the winner did not touch comes out the same, but
for its random id: then the manifest that is on storage already is taken, and not written again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from icechunk.format.ids import NodeId, ObjectId
from icechunk.format.tables import ChunkRefs, Manifest
from icechunk.log.compaction import Compaction

__all__ = ["reuse"]


def reuse(compaction: Compaction, earlier: Iterable[Manifest]) -> Compaction:
    """The same commit, with earlier manifests in place of new ones that hold the same references.

    Parameters
    ----------
    compaction
        Not finished yet: `finish` needs the sizes of reused manifests as well.
    earlier
        On storage already, and no older than this commit's first attempt.
    """
    known: dict[tuple[NodeId, ...], list[Manifest]] = {}
    for manifest in earlier:
        known.setdefault(tuple(manifest.arrays), []).append(manifest)
    renamed: dict[ObjectId, ObjectId] = {}
    for manifest in compaction.manifests:
        for old in known.get(tuple(manifest.arrays), ()):
            if all(_same(old.arrays[i], refs) for i, refs in manifest.arrays.items()):
                renamed[manifest.id] = old.id
                break
    if not renamed:
        return compaction
    nodes = {
        path: replace(
            node,
            manifests=tuple(
                ref._replace(object_id=renamed.get(ref.object_id, ref.object_id)) for ref in node.manifests
            ),
        )
        if any(ref.object_id in renamed for ref in node.manifests)
        else node
        for path, node in compaction.snapshot.nodes.items()
    }
    files = (f._replace(object_id=renamed.get(i, i)) for i, f in compaction.snapshot.manifest_files.items())
    snapshot = replace(
        compaction.snapshot,
        nodes=nodes,
        manifest_files={f.object_id: f for f in sorted(files, key=lambda file: file.object_id)},
    )
    return replace(
        compaction, snapshot=snapshot, manifests=tuple(m for m in compaction.manifests if m.id not in renamed)
    )


def _same(a: ChunkRefs, b: ChunkRefs) -> bool:
    """Whether two lists of references are equal, column by column."""
    if len(a) != len(b) or (a.locations, a.etags, a.inline_data) != (b.locations, b.etags, b.inline_data):
        return False
    if (a.checksum is None) is not (b.checksum is None):
        return False
    pairs: list[tuple[Any, Any]] = [(a.coords, b.coords), (a.kind, b.kind), (a.offset, b.offset), (a.length, b.length)]
    pairs += [(a.chunk_id, b.chunk_id), (a.location, b.location)]
    if a.checksum is not None and b.checksum is not None:
        pairs += [(a.checksum_kind, b.checksum_kind), (a.checksum, b.checksum)]
    return all(np.array_equal(x, y) for x, y in pairs)
