"""Rule 11 as a space of its own: any number of creators of one repository, of which exactly one wins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from spec.model.explore import Label

__all__ = ["Creation", "CreationModel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """The creators, and the faults that may happen."""

    name: str
    creators: int = 2
    lost: int = 0
    doubled: int = 0
    given: frozenset[str] = frozenset()


class _State(NamedTuple):
    pcs: tuple[str, ...]
    lost: int
    doubled: int
    first: int = 0
    """The creator whose first snapshot exists; 0: none does. Its key is the same for all."""
    using: tuple[int, ...] = ()
    """For each creator, the creator of the first snapshot that it describes in ``repo``."""
    repo: tuple[int, int] = (0, 0)
    """The creator of the epoch that it names, and the creator of the first snapshot that it describes."""
    late: tuple[tuple[int, int], ...] = ()
    won: int = 0
    """Bits of the creators that were told that they created the repository."""
    exists: int = 0
    """Bits of the creators that were told that it exists already."""


class CreationModel:
    """Rule 11 under some of the rules."""

    def __init__(self, scenario: Creation, rules: frozenset[str]) -> None:
        self._scenario, self._rules = scenario, rules

    def initial(self) -> _State:
        count = self._scenario.creators
        return _State(("first",) * count, self._scenario.lost, self._scenario.doubled, using=(0,) * count)

    def successors(self, state: _State) -> Iterator[tuple[bool, Label, Any]]:
        for i, pc in enumerate(state.pcs):
            for label, after, following in self._step(state, i, pc):
                pcs = (*after.pcs[:i], following, *after.pcs[i + 1 :])
                yield True, (f"creator {i + 1}:", *label), after._replace(pcs=pcs)
        for wanted in state.late:
            after = self._put_repo(state, wanted)[0]
            late = tuple(one for one in state.late if one != wanted)
            yield False, ("LATE PUT of repo",), after._replace(late=late)

    def _step(self, s: _State, i: int, pc: str) -> Iterator[tuple[Label, _State, str]]:
        me = i + 1
        if pc == "first":
            first = s.first if s.first and "first" in self._rules else me
            using = (*s.using[:i], first, *s.using[me:])
            yield ("PUTs the first snapshot",), s._replace(first=first, using=using), "repo"
        elif pc == "repo":
            wanted = me, s.using[i]
            after, done = self._put_repo(s, wanted)
            if done:
                yield ("PUTs repo → 200",), after._replace(won=after.won | 1 << me), "done"
            else:
                yield ("PUTs repo → 412",), s, "look"
            if s.lost:
                if done:
                    yield ("PUTs repo → done, ANSWER LOST",), after._replace(lost=s.lost - 1), "repo"
                late = tuple(sorted({*s.late, wanted}))
                yield ("PUTs repo → TIMED OUT, still travelling",), s._replace(lost=s.lost - 1, late=late), "repo"
            if s.doubled and done:
                yield ("PUTs repo → done twice, 412",), after._replace(doubled=s.doubled - 1), "look"
        elif pc == "look":
            if s.repo[0] == me and "mine" in self._rules:
                yield ("GETs repo: our epoch",), s._replace(won=s.won | 1 << me), "done"
            else:
                yield ("GETs repo: it exists already",), s._replace(exists=s.exists | 1 << me), "done"

    def _put_repo(self, s: _State, wanted: tuple[int, int]) -> tuple[_State, bool]:
        return (s, False) if s.repo[0] else (s._replace(repo=wanted), True)

    def broken(self, before: _State, s: _State) -> str:
        owner, described = s.repo
        if owner and s.exists >> owner & 1:
            return "FAILED: a creator was told that the repository exists already, and it is its own"
        if owner and s.won & ~(1 << owner):
            return "ACKNOWLEDGED: two creators were told that they created the repository"
        if owner and described != s.first:
            return "FILES: the first snapshot is not the one that repo describes"
        return ""

    def stuck(self, s: _State) -> str:
        return "" if s.late or set(s.pcs) == {"done"} else "STUCK: a creator waits for ever"
