"""Breadth-first exploration of every interleaving, and the shortest history that breaks a promise.

A visited state is remembered by a 64-bit hash (that any two of 10⁷ states collide has a probability of 10⁻⁵), its
predecessor by its number; labels are made again when a history is printed.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Label", "Result", "Space", "explore", "text"]

Label = tuple[object, ...]
"""Description of a step, in pieces; `text` joins them."""


class Space(Protocol):
    """A model that can be explored."""

    def initial(self) -> Hashable:
        """The state in which everything begins."""

    def successors(self, state: Any) -> Iterator[tuple[bool, Label, Any]]:
        """Every possible step: whether it is a process's own (else a fault, or the network's), label, next state."""

    def broken(self, before: Any, after: Any) -> str:
        """The promise that a step breaks; empty: none."""

    def stuck(self, state: Any) -> str:
        """The fault of a state in which no process has a step of its own; empty: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of an exploration."""

    states: int
    broken: str
    """The first promise that was broken; empty: none."""
    history: tuple[str, ...]
    """The shortest one that breaks it, a line a step."""
    complete: bool
    """Whether every reachable state was visited, or a promise was broken."""


def text(label: Label) -> str:
    """A label as a line."""
    return " ".join(str(piece) for piece in label)


def explore(space: Space, *, limit: int = 10**9) -> Result:
    """Visit every state, breadth first, until a promise is broken or ``limit`` states were seen."""
    first = space.initial()
    seen = {hash(first)}
    order, parents = array("q", [hash(first)]), array("q", [-1])
    frontier: list[tuple[int, Any]] = [(0, first)]
    add, broken, successors = seen.add, space.broken, space.successors

    def history(number: int) -> tuple[str, ...]:
        path = []
        while number > 0:
            path.append(order[number])
            number = parents[number]
        return _labels(space, path[::-1])

    while frontier and len(seen) < limit:
        following: list[tuple[int, Any]] = []
        for number, state in frontier:
            alive = False
            for own, _, after in successors(state):
                key = hash(after)
                alive |= own and key != order[number]
                if key in seen:
                    continue
                add(key)
                order.append(key)
                parents.append(number)
                if what := broken(state, after):
                    return Result(states=len(seen), broken=what, history=history(len(order) - 1), complete=True)
                following.append((len(order) - 1, after))
            if not alive and (what := space.stuck(state)):
                return Result(states=len(seen), broken=what, history=history(number), complete=True)
        frontier = following
    return Result(states=len(seen), broken="", history=(), complete=not frontier)


def _labels(space: Space, path: list[int]) -> tuple[str, ...]:
    state, lines = space.initial(), []
    for key in path:
        label, state = next((label, after) for _, label, after in space.successors(state) if hash(after) == key)
        lines.append(text(label))
    return tuple(lines)
