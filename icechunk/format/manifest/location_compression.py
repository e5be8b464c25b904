"""Compression of the locations of a manifest's virtual references, one by one, with a shared dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from icechunk.format.values import VIRTUAL, ChunkRefs
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.zstd import zstd

__all__ = ["LocationCompression", "LocationDictionary", "trained"]

_LEVELS: Final = (-(2**17), zstd.MAX_COMPRESSION_LEVEL)
_THREADS: Final = 4
_FEWEST_FOR_THREADS: Final = 8192
"""Number of locations from which it takes longer to compress them than to start threads."""
_NO_ROWS: Final = np.empty(0, np.intp)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocationCompression:
    """The rule by which locations are compressed. Format 2 only."""

    min_refs: int = 1000
    """Manifests with fewer virtual references are not compressed."""
    samples: int = 100
    """Largest number of locations that the dictionary is trained on."""
    dictionary_bytes: int = 2048
    """Largest size of the dictionary."""
    level: int = 3
    """Compression level of zstd; a value outside its range is replaced by the nearest level."""


class LocationDictionary:
    """A trained dictionary and its compressor."""

    __slots__ = ("_compressor", "content")

    def __init__(self, dictionary: zstd.ZstdCompressionDict, level: int) -> None:
        self.content: bytes = dictionary.as_bytes()
        self._compressor = zstd.ZstdCompressor(level=level, dict_data=dictionary, write_content_size=True)

    def frames(self, texts: Sequence[bytes]) -> tuple[bytes, npt.NDArray[np.int64]]:
        """One zstd frame for each text, concatenated, and the length of each frame."""
        if not texts:
            return b"", np.empty(0, np.int64)
        if "multi_compress_to_buffer" in zstd.backend_features:
            threads = _THREADS if len(texts) >= _FEWEST_FOR_THREADS else 0
            frames: Any = self._compressor.multi_compress_to_buffer(list(texts), threads=threads)
            parts = [frames[i] for i in range(len(frames))]
        else:
            parts = [self._compressor.compress(text) for text in texts]
        return b"".join(parts), np.fromiter(map(len, parts), np.int64, len(parts))


def trained(arrays: Sequence[ChunkRefs], how: LocationCompression) -> LocationDictionary | None:
    """The dictionary for the locations of all references of a manifest; None if they are not to be compressed.

    The result is also None if zstd makes no dictionary of the samples, because they are too few, too short, or all
    the same.
    """
    rows = [np.flatnonzero(refs.kind == VIRTUAL) if refs.locations else _NO_ROWS for refs in arrays]
    ends = np.cumsum([len(r) for r in rows])
    total = int(ends[-1]) if len(ends) else 0
    if not total or total < how.min_refs:
        return None
    chosen = np.unique(np.linspace(0, total - 1, min(how.samples, total)).astype(np.int64))
    samples = []
    for row in chosen.tolist():
        i = int(np.searchsorted(ends, row, side="right"))
        refs = arrays[i]
        at = rows[i][row - (int(ends[i - 1]) if i else 0)]
        samples.append(refs.locations[int(refs.location[at])].encode("utf-8", "surrogatepass"))
    lowest, highest = _LEVELS
    try:
        dictionary = zstd.train_dictionary(how.dictionary_bytes, [s for s in samples if s])
        return LocationDictionary(dictionary, min(max(how.level, lowest), highest))
    except (zstd.ZstdError, ValueError):
        return None
