"""The ops log as a persistent value: adding one update costs O(log n), and older states keep theirs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from immutables import Map

from icechunk.format.repo_values import Update
from icechunk.format.update_list import UpdateList

__all__ = ["UpdateLog"]

_MANY: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UpdateLog:
    """Updates in the order in which they happened; iterates newest first."""

    stored: UpdateList
    """The older ones, most of them as they stand in a file."""
    fresh: Map[int, Update]
    """Those since, by running number from 0."""

    @staticmethod
    def of(newest_first: Iterable[Update] = ()) -> UpdateLog:
        """A log with these updates, given newest first."""
        return UpdateLog(stored=UpdateList.of(newest_first), fresh=Map())

    def __len__(self) -> int:
        return len(self.fresh) + len(self.stored)

    def __iter__(self) -> Iterator[Update]:
        yield from self._fresh()
        yield from self.stored

    def _fresh(self) -> Iterator[Update]:
        return (self.fresh[i] for i in range(len(self.fresh) - 1, -1, -1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UpdateLog) and self.newest() == other.newest()

    def __hash__(self) -> int:
        return hash(tuple(self))

    def pushed(self, update: Update) -> UpdateLog:
        """The same log with one more, the newest."""
        log = replace(self, fresh=self.fresh.set(len(self.fresh), update))
        # An update as an object takes some hundred bytes, in a file's form a few dozen.
        return log if len(log.fresh) < _MANY else UpdateLog.of(log.newest().packed(_MANY))

    def resting_on(self, stored: UpdateList) -> UpdateLog:
        """The log that continues what a newer file holds of it."""
        newer = self.newer_than(stored[0].updated_at_us if stored else -1)
        return UpdateLog(stored=stored, fresh=Map(enumerate(newer[::-1])))

    def newest(self, count: int | None = None) -> UpdateList:
        """The newest updates, so many at most; None: all. Costs what has been pushed since they were stored."""
        everything = self.stored.after(self._fresh()) if self.fresh else self.stored
        return everything if count is None else everything[:count]

    def newer_than(self, time_us: int) -> tuple[Update, ...]:
        """Updates made after that time (exclusive), newest first; costs no more than what it returns."""
        found: list[Update] = []
        for update in self:
            if update.updated_at_us <= time_us:
                break
            found.append(update)
        return tuple(found)
