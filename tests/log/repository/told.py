"""A caller of `append` that keeps what it is told."""

from __future__ import annotations

from icechunk.log.repository.port import SwapToken

__all__ = ["Told"]


class Told(list[SwapToken | None]):
    """The tokens that a caller received."""

    def queued(self) -> None:
        return None

    def sent(self, token: SwapToken | None) -> None:
        self.append(token)

    @property
    def is_open(self) -> bool:
        """Whether an attempt may still land."""
        return bool(self) and self[-1] is not None
