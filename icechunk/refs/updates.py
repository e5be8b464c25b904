"""The ops log as a persistent value: adding one update costs O(log n), and older states keep theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from immutables import Map

from icechunk.format.repo_values import Update

__all__ = ["UpdateLog"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateLog:
    """Updates in the order in which they happened; iterates newest first."""

    items: Map[int, Update]
    """By running number, ``first`` to ``end``."""
    first: int
    """Number of the oldest update kept."""
    end: int
    """One more than the number of the newest."""

    @staticmethod
    def of(newest_first: Iterable[Update] = ()) -> UpdateLog:
        """A log with these updates, given newest first."""
        oldest_first = list(newest_first)[::-1]
        return UpdateLog(items=Map(enumerate(oldest_first)), first=0, end=len(oldest_first))

    def __len__(self) -> int:
        return self.end - self.first

    def __iter__(self) -> Iterator[Update]:
        return (self.items[i] for i in range(self.end - 1, self.first - 1, -1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UpdateLog) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def pushed(self, update: Update) -> UpdateLog:
        """The same log with one more, the newest."""
        return UpdateLog(items=self.items.set(self.end, update), first=self.first, end=self.end + 1)

    def newer_than(self, time_us: int) -> tuple[Update, ...]:
        """Updates made after that time (exclusive), newest first; costs no more than what it returns."""
        found: list[Update] = []
        for update in self:
            if update.updated_at_us <= time_us:
                break
            found.append(update)
        return tuple(found)
