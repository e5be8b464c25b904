"""How requests are made of reads: one value of settings for all pools of a repository."""

from __future__ import annotations

from dataclasses import dataclass, field

from icechunk.transfer.blocks import BlockReader, Limits
from icechunk.transfer.fetch import FetchPool, Gettable, Splitting
from icechunk.transfer.gate import Gate

__all__ = ["Reads"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Settings of the pools and block readers of one repository."""

    limits: Limits = field(default_factory=Limits)
    """Merging, reading ahead, and what is kept."""
    splitting: Splitting | None = None
    """Of long ranges; None: they are one request."""
    hedge_percentile: int | None = None
    """Requests slower than so many percent of recent ones are sent again; None: none are."""

    def pool(self, storage: Gettable, gate: Gate) -> FetchPool:
        """A pool on the loop that ``gate`` belongs to."""
        return FetchPool(storage, gate, splitting=self.splitting, hedge_percentile=self.hedge_percentile)

    def blocks(self, storage: Gettable, gate: Gate) -> BlockReader:
        """A block reader with a pool of its own."""
        return BlockReader(self.pool(storage, gate), self.limits)
