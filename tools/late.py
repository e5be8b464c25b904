"""A pytest plugin that makes late what a test must not count on being early; to find tests that do, and faults.

    LATE_BEHIND_S=0.5 python -m pytest -p tools.late      what goes on behind a commit begins half a second late
    LATE_REQUEST_S=0.06 python -m pytest -p tools.late    requests of local disk and S3 wait up to so long, twice each

``LATE_SEED`` chooses the waits of requests. Clients on a clock of their own, which tests move, are left alone.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from icechunk.log.repository.entries.checkpoint_schedule import Checkpointing
from icechunk.log.repository.entries.embedded import EmbeddedFiles
from icechunk.runtime.clock import SYSTEM
from icechunk.storage.http.connections import Connections
from icechunk.storage.local.storage import LocalStorage

__all__ = ["pytest_configure"]


def pytest_configure() -> None:
    """Called by pytest when it starts."""
    behind_s = float(os.environ.get("LATE_BEHIND_S", "0"))
    request_s = float(os.environ.get("LATE_REQUEST_S", "0"))
    random_ = random.Random(int(os.environ.get("LATE_SEED", "1")))

    async def behind(client: Any) -> None:
        sources = client._view.sources if isinstance(client, Checkpointing) else client._sources
        if sources is SYSTEM:
            await asyncio.sleep(behind_s)

    async def request(_: Any) -> None:
        await asyncio.sleep(random_.random() * request_s)

    if behind_s:
        _wait_around(Checkpointing, "_write_while_due", before=behind)
        _wait_around(EmbeddedFiles, "_put_own", before=behind)
    if request_s:
        for name in ("get", "put", "head", "delete"):
            _wait_around(LocalStorage, name, before=request, after=request)
        _wait_around(Connections, "exchange", before=request, after=request)


async def _at_once(_: Any) -> None:
    return


def _wait_around(
    owner: type,
    name: str,
    *,
    before: Callable[[Any], Awaitable[None]],
    after: Callable[[Any], Awaitable[None]] = _at_once,
) -> None:
    method = getattr(owner, name)

    @wraps(method)
    async def late(self: Any, *args: Any, **options: Any) -> Any:
        await before(self)
        result = await method(self, *args, **options)
        await after(self)
        return result

    setattr(owner, name, late)
