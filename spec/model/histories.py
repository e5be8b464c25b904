"""Events, entries and their fold. A history is a number, so that states of the model stay small and hash quickly."""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["COMMIT", "DELETE", "GC", "OBJECT", "SEAL", "VOID", "Entry", "Event", "Histories"]

COMMIT: Final = "commit"
DELETE: Final = "delete"
"""A branch is deleted: an event without a snapshot, which is recognised by its nonce only."""
GC: Final = "gc"
SEAL: Final = "seal"
VOID: Final = "void"
OBJECT: Final = "object"
"""The log has become a repo object: a line of the ops log, so that no version of ``repo`` recurs."""


class Event(NamedTuple):
    """A change of the repository."""

    kind: str
    id: int = 0
    """Number of the change that a caller asked for, from 1; 0: no caller did."""
    branch: int = 0
    parent: int = 0
    """Tip that the commit follows; 0: there is no such branch yet."""
    since: int = 0
    """Time of a commit, not later than the Last-Modified of its files; the cutoff of a ``gc``."""
    time: int = 0


class Entry(NamedTuple):
    """One unit of the log."""

    nonce: int
    events: tuple[Event, ...]
    embedded: bool = False
    """Whether the metadata files of its commits are in it (rule 15)."""


class _History(NamedTuple):
    events: tuple[Event, ...]
    ids: int
    """Bits of all changes that happened."""
    twice: bool
    """Whether one of them happened twice."""
    tips: tuple[tuple[int, int, int], ...]
    """Branch, tip, bits of the commits that it reaches; sorted."""
    graph: int
    """Bits of the commits in the graph."""
    cutoff: int
    sealed: bool
    last_time: int


class Histories:
    """All histories and entries of one exploration, numbered as they come up; 0 is the empty history, and no entry."""

    def __init__(self) -> None:
        self._all: list[_History] = [_History((), 0, False, (), 0, 0, False, 0)]
        self._next: dict[tuple[int, Event], int] = {}
        self._folds: dict[tuple[int, int], int] = {}
        self._numbers: dict[Entry, int] = {}
        self._prefixes: dict[tuple[int, int], bool] = {}
        self.entries: list[Entry] = [Entry(0, ())]
        self.entry_ids: list[int] = [0]
        """Bits of the changes in an entry."""

    def entry(self, entry: Entry) -> int:
        """The number of an entry; 0 is no entry."""
        number = self._numbers.get(entry)
        if number is None:
            number = self._numbers[entry] = len(self.entries)
            self.entries.append(entry)
            ids = 0
            for event in entry.events:
                ids |= 1 << event.id
            self.entry_ids.append(ids & ~1)
        return number

    def apply(self, h: int, event: Event) -> int:
        """The history after an event; -1 where it does not apply."""
        key = h, event
        found = self._next.get(key)
        if found is None:
            after = _after(self._all[h], event)
            if after is None:
                found = -1
            else:
                found = len(self._all)
                self._all.append(after)
            self._next[key] = found
        return found

    def fold(self, h: int, entry: int) -> int:
        """The history after an entry; the same history if the entry is void as a whole (rule 4)."""
        found = self._folds.get((h, entry))
        if found is None:
            found = h
            for event in self.entries[entry].events:
                found = self.apply(found, event)
                if found < 0:
                    found = h
                    break
            self._folds[h, entry] = found
        return found

    def is_prefix(self, h: int, of: int) -> bool:
        """Whether one history begins with another."""
        if h == of:
            return True
        key = h, of
        found = self._prefixes.get(key)
        if found is None:
            events = self._all[h].events
            found = self._prefixes[key] = self._all[of].events[: len(events)] == events
        return found

    def tip(self, h: int, branch: int) -> int:
        """Tip of a branch; 0: there is none."""
        return next((tip for name, tip, _ in self._all[h].tips if name == branch), 0)

    def ids(self, h: int) -> int:
        return self._all[h].ids

    def twice(self, h: int) -> bool:
        return self._all[h].twice

    def graph(self, h: int) -> int:
        return self._all[h].graph

    def reached(self, h: int) -> int:
        """Bits of the commits that a branch reaches."""
        out = 0
        for _, _, bits in self._all[h].tips:
            out |= bits
        return out

    def cutoff(self, h: int) -> int:
        return self._all[h].cutoff

    def sealed(self, h: int) -> bool:
        return self._all[h].sealed

    def last_time(self, h: int) -> int:
        return self._all[h].last_time

    def times_increase(self, h: int) -> bool:
        times = [event.time for event in self._all[h].events if event.kind == COMMIT]
        return times == sorted(set(times))


def _after(history: _History, event: Event) -> _History | None:
    events, ids, twice, tips, graph, cutoff, sealed, last = history
    bit = 1 << event.id
    if event.kind == OBJECT:
        sealed = False
    elif sealed:
        return None
    elif event.kind == COMMIT:
        tip, reached = next(((tip, bits) for name, tip, bits in tips if name == event.branch), (0, 0))
        if event.parent != tip or event.since < cutoff:
            return None
        tips = _with(tips, event.branch, (event.branch, event.id, reached | bit))
        graph |= bit
        last = event.time
    elif event.kind == DELETE:
        if not any(name == event.branch for name, _, _ in tips):
            return None
        tips = _with(tips, event.branch, None)
    elif event.kind == GC:
        cutoff = max(cutoff, event.since)
        reached = 0
        for _, _, bits in tips:
            reached |= bits
        for other in events:
            if other.kind == COMMIT and other.since < cutoff and not reached >> other.id & 1:
                graph &= ~(1 << other.id)
    elif event.kind == SEAL:
        sealed = True
    if event.id:
        twice |= bool(ids & bit)
        ids |= bit
    return _History((*events, event), ids, twice, tips, graph, cutoff, sealed, last)


def _with(
    tips: tuple[tuple[int, int, int], ...], branch: int, new: tuple[int, int, int] | None
) -> tuple[tuple[int, int, int], ...]:
    return tuple(sorted([*(one for one in tips if one[0] != branch), *([new] if new else [])]))
