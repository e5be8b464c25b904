"""Contents of chunks: bytes that differ between chunks and between versions, and can be checked in full."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["HEADER_BYTES", "Content", "Corrupt"]

HEADER_BYTES = 16
"""Every chunk begins with its index and its version, eight bytes each; no chunk may be smaller."""
_SHIFTS = 4096


class Corrupt(Exception):
    """Data that were read differ from data that were written."""


class Content:
    """The bytes of every chunk in every version, made on demand from one random block.

    Parameters
    ----------
    chunk_bytes
        Size of a chunk, at least `HEADER_BYTES`.
    seed
        Seed of the random bytes.
    """

    def __init__(self, chunk_bytes: int, seed: int = 0) -> None:
        self.chunk_bytes = chunk_bytes
        self._block = np.frombuffer(np.random.default_rng(seed).bytes(chunk_bytes + _SHIFTS), dtype="u1")

    def chunk(self, index: int, version: int = 0) -> np.ndarray[Any, Any]:
        """The bytes of chunk `index` in `version`: ``u1[chunk_bytes]``."""
        made = self._expected(index, version).copy()
        made[:HEADER_BYTES] = np.array([index, version], dtype="<u8").view("u1")
        return made

    def chunks(self, first: int, count: int, version: int = 0) -> np.ndarray[Any, Any]:
        """The bytes of `count` chunks from `first`, one after the other: ``u1[count * chunk_bytes]``."""
        made = np.empty(count * self.chunk_bytes, dtype="u1")
        for row, index in zip(made.reshape(count, self.chunk_bytes), range(first, first + count), strict=True):
            row[:] = self._expected(index, version)
            row[:HEADER_BYTES] = np.array([index, version], dtype="<u8").view("u1")
        return made

    def check(self, index: int, data: np.ndarray[Any, Any], *, at_least: int = 0) -> int:
        """Compare every byte of `data` with chunk `index` in the version that its header names; returns the version.

        Raises
        ------
        Corrupt
            Wrong size, another chunk, a version below `at_least`, or any byte that differs.
        """
        if data.size != self.chunk_bytes:
            raise Corrupt(f"chunk {index} has {data.size} bytes instead of {self.chunk_bytes}")
        found, version = (int(value) for value in data[:HEADER_BYTES].copy().view("<u8"))
        if found != index:
            raise Corrupt(f"chunk {index} has the header of chunk {found}")
        if version < at_least:
            raise Corrupt(f"chunk {index} is version {version}, but version {at_least} was committed before")
        if not np.array_equal(data[HEADER_BYTES:], self._expected(index, version)[HEADER_BYTES:]):
            raise Corrupt(f"chunk {index}, version {version}, has bytes that were never written")
        return version

    def check_all(self, data: np.ndarray[Any, Any], *, first: int = 0) -> None:
        """Check chunks that follow each other from `first`.

        Raises
        ------
        Corrupt
            As in `check`; or `data` is no whole number of chunks.
        """
        if data.size % self.chunk_bytes:
            raise Corrupt(f"{data.size} bytes are no whole number of chunks of {self.chunk_bytes}")
        for index, row in enumerate(data.reshape(-1, self.chunk_bytes), first):
            self.check(index, row)

    def _expected(self, index: int, version: int) -> np.ndarray[Any, Any]:
        shift = (index * 131 + version * 17) % _SHIFTS
        return self._block[shift : shift + self.chunk_bytes]
