"""How many requests at once a service takes: learned from its refusals, on one event loop.

Unbounded until the service asks to slow down (503, 429, ``SlowDown``). Then at most half of what was in flight may be,
and again half for each refusal of a request that was sent under the new bound: refusals of those that were on their way
already say nothing new. Answers raise the bound by one for each round of it, and once many rounds went well by one for
each answer, until nothing is left of it. Who waits for a turn is not counted as a try, so a storm of refusals costs
time, and not requests.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

__all__ = ["Pace"]

_UNBOUNDED: Final = 512
_CALM_ROUNDS: Final = 8


class Pace:
    """Requests in flight to one service."""

    def __init__(self) -> None:
        self._limit: float | None = None
        self._in_flight = 0
        self._epoch = 0
        self._calm = 0.0
        """Rounds of good answers since the last refusal that counted."""
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int | None:
        """Requests that may be in flight; None: as many as there are."""
        return None if self._limit is None else int(self._limit)

    @property
    def in_flight(self) -> int:
        """Requests sent and not answered yet."""
        return self._in_flight

    async def enter(self) -> int:
        """Wait for a turn. Returns what `leave` wants to have; after cancellation nothing is to be left."""
        if self._limit is not None and (self._waiting or self._in_flight >= int(self._limit)):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except BaseException:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                elif not turn.cancelled():
                    self._in_flight -= 1
                    self._call()
                raise
        else:
            self._in_flight += 1
        return self._epoch

    def leave(self, epoch: int, refused: bool | None) -> None:
        """The request has ended.

        Parameters
        ----------
        refused
            True: the service asked to slow down. False: it answered. None: neither.
        """
        if refused:
            if epoch == self._epoch:
                self._limit = max(1.0, self._in_flight / 2)
                self._epoch += 1
                self._calm = 0.0
        elif self._limit is not None and refused is False:
            self._calm += 1 / self._limit
            self._limit += 1 if self._calm > _CALM_ROUNDS else 1 / self._limit
            if self._limit >= _UNBOUNDED:
                self._limit = None
        self._in_flight -= 1
        if self._waiting:
            self._call()

    def _call(self) -> None:
        while self._waiting and (self._limit is None or self._in_flight < int(self._limit)):
            turn = self._waiting.popleft()
            if not turn.done():
                self._in_flight += 1
                turn.set_result(None)
