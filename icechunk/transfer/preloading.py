"""Manifests that sessions will probably need, fetched in the background as soon as a session begins.

A task is one of asyncio, held here, and belongs to the loop it runs on: it ends by itself, or is cancelled when the
repository or its loop is closed. What fails is fetched again, and then reported, by whoever needs it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from icechunk.errors import IcechunkError
from icechunk.format.ids import ObjectId, encode_id
from icechunk.tasks import run_each
from icechunk.transfer.assets import Assets

__all__ = ["Preloader"]

_LOG: Final = logging.getLogger(__name__)


class Preloader:
    """Preloads of one event loop.

    Parameters
    ----------
    assets
        Whose cache takes the manifests.
    max_requests
        Of one preload at a time.
    """

    def __init__(self, assets: Assets, max_requests: int) -> None:
        self._assets = assets
        self._max_requests = max_requests
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, manifests: Sequence[ObjectId]) -> None:
        """Begin to fetch these, and return."""
        task = asyncio.get_running_loop().create_task(self._fetch(manifests), name="icechunk manifest preload")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait(self) -> None:
        """Wait for everything that was started."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def aclose(self) -> None:
        """Cancel what is under way, and wait until it has ended."""
        for task in self._tasks:
            task.cancel()
        await self.wait()

    async def _fetch(self, manifests: Sequence[ObjectId]) -> None:
        await run_each(self._fetch_one, manifests, limit=self._max_requests)

    async def _fetch_one(self, id: ObjectId) -> None:
        try:
            await self._assets.manifest(id)
        except (IcechunkError, OSError) as error:
            _LOG.info("manifest %s could not be preloaded, whoever needs it tries again: %s", encode_id(id), error)
