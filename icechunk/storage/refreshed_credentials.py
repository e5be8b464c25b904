"""Credentials of the user's function, replaced before they expire.

A credential is replaced some time before it expires, by one caller while the others go on with the old one, so that no
request waits or fails at the change; after the store has said that it expired it is replaced at once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import UTC
from typing import Any, Final, Generic, TypeVar

from icechunk.credentials.credential import RefreshableCredential
from icechunk.errors import IcechunkError
from icechunk.runtime.clock import Sources

__all__ = ["Refreshed"]

T = TypeVar("T")

_EARLY_US: Final = 5 * 60 * 1_000_000


class Refreshed(Generic[T]):
    """Credentials of the user's function; one call at a time for each event loop, the result shared by all.

    Parameters
    ----------
    given
        The function, and possibly its last result, which has an ``expires_after``.
    convert
        Makes of the function's result the value that `get` returns.
    sources
        Its wall clock decides when credentials expire.
    """

    def __init__(self, given: RefreshableCredential, convert: Callable[[Any], T], sources: Sources) -> None:
        self._given = given
        self._convert = convert
        self._wall_us = sources.wall_us
        self._current: tuple[T, int | None, int] | None = None
        self._pid = os.getpid()
        self._calls: dict[asyncio.AbstractEventLoop, asyncio.Future[None]] = {}
        if given.current is not None:
            self._keep(given.current)

    async def get(self) -> T:
        """The credentials to use now."""
        while True:
            current = self._current
            now_us = self._wall_us()
            if current is not None:
                keys, expires_us, early_us = current
                if expires_us is None or now_us < expires_us - early_us:
                    return keys
                if now_us < expires_us and self._call_under_way() is not None:
                    return keys
            try:
                await self._refresh()
            except IcechunkError:
                if current is not None and current[1] is not None and self._wall_us() < current[1]:
                    return current[0]
                raise
            if self._current is not None and self._current is not current:
                # Also if it has expired: a function that returns expired keys is not called in a loop.
                return self._current[0]

    def expired(self, keys: T | None) -> bool:
        """Take note that the store refused these; True: `get` may give others."""
        current = self._current
        if current is not None and current[0] is keys:
            self._current = None
        return True

    def _call_under_way(self) -> asyncio.Future[None] | None:
        call = self._calls.get(asyncio.get_running_loop())
        return None if call is None or call.done() or self._pid != os.getpid() else call

    async def _refresh(self) -> None:
        call = self._call_under_way()
        if call is None:
            loop = asyncio.get_running_loop()
            self._pid = os.getpid()
            self._calls = {other: future for other, future in self._calls.items() if not other.is_closed()}
            # A task of its own: the caller that happens to be first may be cancelled.
            call = self._calls[loop] = asyncio.ensure_future(self._fetch())
            call.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(call)

    async def _fetch(self) -> None:
        self._keep(await asyncio.to_thread(self._given.refreshed))

    def _keep(self, given: Any) -> None:
        if given.expires_after is None:
            self._current = (self._convert(given), None, 0)
            return
        expires_us = int(given.expires_after.replace(tzinfo=given.expires_after.tzinfo or UTC).timestamp() * 1e6)
        lifetime_us = max(0, expires_us - self._wall_us())
        self._current = (self._convert(given), expires_us, min(_EARLY_US, lifetime_us // 4))
