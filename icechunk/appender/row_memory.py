"""Memory for the rows that are buffered, used again as soon as they are written: its first touch costs more than to
copy them."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from icechunk.storage.buffers import Buffers

__all__ = ["RowMemory"]

_SLAB_BYTES: Final = 4 * 1024 * 1024
_SMALL_BYTES: Final = 4 * 1024
"""Bytes of values that are copied to memory of their own."""
_ALIGNED_BYTES: Final = 64


class RowMemory:
    """Copies rows side by side. A slab of them is free again when the last of its rows is dropped."""

    def __init__(self) -> None:
        self._slabs = Buffers()
        # An array, not a view of memory: slices of one are nothing that the garbage collector looks at.
        self._slab = np.empty(0, np.uint8)
        self._used = 0

    def copy(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The same values, in C order."""
        size = values.nbytes
        if not _SMALL_BYTES <= size <= _SLAB_BYTES // 4 or values.dtype.hasobject:
            return values.copy()
        if self._used + size > len(self._slab):
            self._slab, self._used = np.frombuffer(self._slabs.take(_SLAB_BYTES), np.uint8), 0
        found = self._slab[self._used : self._used + size].view(values.dtype).reshape(values.shape)
        self._used += -(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES
        found[...] = values
        return found
