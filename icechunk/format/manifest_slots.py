"""Slots of the manifest's FlatBuffers tables, shared by both directions of the codec."""

from __future__ import annotations

ID, ARRAYS, DICTIONARY, COMPRESSION = range(4)
"""Of Manifest."""
NODE, REFS = range(2)
"""Of ArrayManifest."""
(INDEX, INLINE, OFFSET, LENGTH, CHUNK_ID, LOCATION, ETAG, LAST_MODIFIED, COMPRESSED) = range(9)
"""Of ChunkRef."""
PLAIN, WITH_DICTIONARY = 0, 1
"""Values of Manifest.compression_algorithm."""
