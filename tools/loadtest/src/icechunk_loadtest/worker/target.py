"""The interface of a system under test: a row of chunks that is written, grown, committed and read."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["Target"]


class Target(ABC):
    """One dataset of ``u1`` chunks on one system, seen by one worker."""

    def __init__(self, place: Mapping[str, Any], chunk_bytes: int, tasks: int) -> None:
        self.place = place
        self.chunk_bytes = chunk_bytes
        self.tasks = tasks

    @abstractmethod
    async def create(self, n_chunks: int) -> None:
        """Make an empty dataset of `n_chunks`, visible to others."""

    @abstractmethod
    async def attach(self) -> None:
        """Open the dataset anew with nothing cached, like a program that has just started."""

    @abstractmethod
    async def refresh(self) -> None:
        """See the newest committed state from now on."""

    @abstractmethod
    async def read(self, index: int) -> np.ndarray[Any, Any]:
        """One chunk, ``u1[chunk_bytes]``."""

    @abstractmethod
    async def read_all(self) -> np.ndarray[Any, Any]:
        """All chunks in order, ``u1[n_chunks * chunk_bytes]``."""

    @abstractmethod
    async def write(self, index: int, data: np.ndarray[Any, Any]) -> None:
        """Write one chunk; others see it after `commit` at the latest."""

    @abstractmethod
    async def write_all(self, data: np.ndarray[Any, Any]) -> None:
        """Write all chunks."""

    @abstractmethod
    async def extend(self, data: np.ndarray[Any, Any]) -> None:
        """Append chunks to the end."""

    @contextlib.asynccontextmanager
    async def ingesting(self) -> AsyncIterator[Callable[[np.ndarray[Any, Any], int], Awaitable[None]]]:
        """Give a function that appends values, with the offset behind them, and makes them durable."""

        async def put(data: np.ndarray[Any, Any], offset: int) -> None:
            await self.begin()
            await self.extend(data)
            await self.commit(f"append {offset}")

        yield put

    async def begin(self) -> None:  # noqa: B027
        """Start a transaction, in systems that have them."""

    async def commit(self, message: str) -> None:  # noqa: B027
        """Make the writes visible, in systems with transactions."""

    async def aclose(self) -> None:  # noqa: B027
        """Close connections."""
