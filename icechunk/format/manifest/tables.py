"""Slots of the manifest's FlatBuffers tables, shared by encoder and decoder, and facts about how a manifest is
stored."""

from __future__ import annotations

from typing import Final

import numpy as np

from icechunk.format.envelope import FileType, unseal
from icechunk.format.flat.flatbuffers import Buffer, required
from icechunk.format.flat.vectors import TableColumns, gather
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["ManifestFacts", "manifest_facts"]

ID, ARRAYS, DICTIONARY, COMPRESSION = range(4)
"""Slots of the table Manifest."""
NODE, REFS = range(2)
"""Slots of the table ArrayManifest."""
(INDEX, INLINE, OFFSET, LENGTH, CHUNK_ID, LOCATION, ETAG, LAST_MODIFIED, COMPRESSED) = range(9)
"""Slots of the table ChunkRef."""
PLAIN, WITH_DICTIONARY = 0, 1
"""Values of Manifest.compression_algorithm."""


_NAME: Final = "manifest"


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFacts:
    """The stored form of a manifest."""

    payload_size_bytes: int
    """Size of its FlatBuffers contents before compression."""
    dictionary_size_bytes: int | None
    """Size of the dictionary that locations are compressed with; None if they are not compressed."""
    num_compressed_refs: int
    """Number of virtual references whose location is compressed."""


def manifest_facts(data: bytes) -> ManifestFacts:
    """Read the facts from the whole file. Raises `FormatError` if it is not a manifest."""
    _, payload = unseal(data, FileType.MANIFEST, what=_NAME)
    buffer = Buffer(payload, _NAME)
    root = buffer.root()
    dictionary = root.blob(DICTIONARY)
    algorithm = root.u8(COMPRESSION, WITH_DICTIONARY)
    compressed = 0
    for table in required(root.tables(ARRAYS), root, "arrays"):
        start, count = required(table.vector(REFS, 4), table, "refs")
        if not count:
            continue
        fields = start + 4 * np.arange(count, dtype=np.int64)
        locations = TableColumns(buffer, fields + gather(buffer, fields, "<u4")).vectors(COMPRESSED, 1)
        compressed += 0 if locations is None else len(locations.counts)
    return ManifestFacts(
        payload_size_bytes=len(payload),
        dictionary_size_bytes=len(dictionary) if dictionary and algorithm != PLAIN else None,
        num_compressed_refs=compressed,
    )
