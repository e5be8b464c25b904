"""How often a lost race for an object is tried again, and how soon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from icechunk.sources import Sources

__all__ = ["UpdateRetries", "retries_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRetries:
    """How often and how soon a lost race for the repository is tried again (``repo_update_retries``)."""

    tries: int = 100
    """The first included."""
    first_pause_s: float = 0.05
    """Upper end of the first pause; it doubles from try to try."""
    longest_pause_s: float = 30.0

    def pause_s(self, sources: Sources, round_: int) -> float:
        """A pause with full jitter before try ``round_`` + 1 (counted from 1)."""
        longest: float = min(self.longest_pause_s, self.first_pause_s * 2.0 ** min(round_ - 1, 60))
        return longest * sources.fraction()


def retries_of(config: Any) -> UpdateRetries:
    """What the persisted configuration says about lost races; the official library's defaults where it says nothing."""
    tries, first_ms, longest_ms = 100, 50, 30_000
    found = config.get("repo_update_retries") if isinstance(config, dict) else None
    found = found.get("default") if isinstance(found, dict) else None
    if isinstance(found, dict):
        numbers = [found.get(name) for name in ("max_tries", "initial_backoff_ms", "max_backoff_ms")]
        tries, first_ms, longest_ms = (
            number if isinstance(number, int) else default
            for number, default in zip(numbers, (tries, first_ms, longest_ms), strict=True)
        )
    return UpdateRetries(tries=max(1, tries), first_pause_s=first_ms / 1000, longest_pause_s=longest_ms / 1000)
