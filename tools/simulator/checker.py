"""Checks the outcomes that the clients of a repository saw, independently of layouts and files.

A history is a list of operations, each with the time of the call and the time at which the client got the
outcome. It is right if one order of the operations explains all outcomes: an order in which each
operation takes effect at one moment between the two times (strict serialisability), where

- an acknowledged operation took effect, exactly once;
- a failed or refused one did not, and never will;
- one with an unknown outcome took effect at some moment after the call, or never;
- a refusal is right about the state at its moment;
- a reader saw the state at its moment: all branches and tags together, with their whole history (snapshot isolation).
  Where a layout keeps each ref in an object of its own, readers see each ref at a moment of its own, and a creation
  of a branch that another client deleted at once may take effect once more (`independent`).

The repository is the obvious one: branches and tags that point to commits, commits with one parent. Commits have names
that are never used twice, so every history shows the writer of each commit (as with list-append of Jepsen's Elle). The
order is searched for depth first, remembering visited states (Wing and Gong, Lowe), and giving up each that some
reader contradicts.

This module imports nothing of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final, Literal, TypeAlias

__all__ = ["MAIN", "ROOT", "Operation", "Outcome", "Verdict", "View", "check"]

ROOT: Final = "root"
"""Name of the first commit of every repository."""
MAIN: Final = "main"
_BUDGET: Final = 60_000
"""States that are looked at before a history is given up as undecided."""

Outcome: TypeAlias = Literal["ok", "refused", "failed", "unknown", "open"]
"""The outcome that the client got. ``refused``: the state does not allow it; ``failed``: it did not happen, for
whatever reason; ``open``: nothing yet, which counts as unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A reader's view of the repository."""

    branches: Mapping[str, tuple[str, ...]]
    """Commits of each branch, by name, from the first one to the tip."""
    tags: Mapping[str, str]
    """Commit of each tag, by name."""


@dataclass(slots=True, kw_only=True)
class Operation:
    """One call of one client."""

    client: str
    verb: str
    """``commit``, ``amend``, ``create-branch``, ``reset-branch``, ``delete-branch``, ``create-tag``, ``delete-tag``,
    ``read`` or ``read-content``."""
    ref: str = ""
    """The branch or tag."""
    commit: str = ""
    """Name, which is new, of the commit that a commit or amend makes; the commit that a branch or tag is to point
    to."""
    parent: str | None = None
    """Tip that a commit follows (None: any tip), or that an amend or reset moves."""
    writes: Mapping[str, str] = field(default_factory=dict)
    """Chunks and their new values, of a commit or amend."""
    began: int
    """Time of the call. Times are positions in the order of all calls and outcomes."""
    ended: int | None = None
    """Time of the outcome; None: not yet."""
    outcome: Outcome = "open"
    seen: View | None = None
    """View that a read showed."""
    content: Mapping[str, str] | None = None
    """Chunks of ``commit``, as a ``read-content`` showed them."""
    note: str = ""
    """The error's text, for people."""

    def __str__(self) -> str:
        what = " ".join(part for part in (self.verb, self.ref, self.commit) if part)
        on = f" on {self.parent}" if self.parent is not None else ""
        return f"{self.client}: {what}{on} → {self.outcome}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of a check."""

    problems: tuple[str, ...]
    """Broken promises."""
    undecided: bool = False
    """Whether the search for an order was given up."""


@dataclass(frozen=True, slots=True)
class _State:
    branches: tuple[tuple[str, str], ...] = ((MAIN, ROOT),)
    tags: tuple[tuple[str, str], ...] = ()
    gone: frozenset[str] = frozenset()
    """Names of deleted tags."""
    parents: frozenset[tuple[str, str]] = frozenset()
    """Parents of commits that were made; part of the state, since two orders may give a commit two parents."""


def check(
    history: Sequence[Operation], *, independent: bool = False, shortened: bool = False, start: View | None = None
) -> Verdict:
    """Judge a history.

    Parameters
    ----------
    independent
        Whether each ref is kept by itself, so that a reader may see two of them as they were at different moments, and
        a branch that was created and deleted is absent again for a creation whose answer was lost
        (``spec/layouts.md``, limits of format 1).
    shortened
        Whether old commits may be missing from what readers see (snapshots were expired).
    start
        The repository before the first operation; None: a branch ``main`` at `ROOT`.
    """
    problems = [
        *_phantoms(history, start),
        *(() if shortened else _lost(history)),
        *_contents(history, shortened=shortened),
    ]
    undecided = False
    if not problems:
        groups = _by_ref(history, start) if independent else [(start, list(history))]
        seen = {} if shortened else _parents_in_views(history)
        for first, group in groups:
            parents = _seen_parents(history)
            search = _Search(group, shortened=shortened, start=first, parents=parents, seen=seen, repeats=independent)
            verdict = search.run()
            problems += verdict.problems
            undecided |= verdict.undecided
    return Verdict(problems=tuple(problems), undecided=undecided)


# ------------------------------------------------------------------ what needs no search


def _phantoms(history: Sequence[Operation], start: View | None) -> Iterator[str]:
    """Commits that were seen and cannot be there."""
    made = {op.commit: op for op in history if op.verb in ("commit", "amend")}
    known = {ROOT, *(name for commits in start.branches.values() for name in commits)} if start else {ROOT}
    told: set[str] = set()
    for op in history:
        if op.seen is None:
            continue
        for commits in op.seen.branches.values():
            if len(set(commits)) < len(commits):
                yield f"{op.client} saw a commit twice in one history: {' '.join(commits)}"
                return
            told.update(commits)
        told.update(op.seen.tags.values())
    for name in sorted(told - known):
        if name not in made:
            yield f"commit {name} is in history, and no client made it"
        elif made[name].outcome in ("failed", "refused"):
            yield f"commit {name} was reported as {made[name].outcome}, and is in history"


def _lost(history: Sequence[Operation]) -> Iterator[str]:
    """Acknowledged commits that the last reader misses, on branches that nothing but commits ever moved."""
    moved = {op.ref for op in history if op.verb in ("amend", "reset-branch", "delete-branch", "create-branch")}
    last = next((op for op in reversed(history) if op.seen is not None), None)
    if last is None or last.seen is None:
        return
    for op in history:
        if op.verb != "commit" or op.outcome != "ok" or op.ref in moved:
            continue
        if op.ended is not None and op.ended < last.began and op.commit not in last.seen.branches.get(op.ref, ()):
            yield f"commit {op.commit} was acknowledged, and is not in history"


def _contents(history: Sequence[Operation], *, shortened: bool) -> Iterator[str]:
    """Readers of a commit see what it wrote over what its parent has, or what it replaced."""
    reads = [op for op in history if op.content is not None]
    if not reads:
        return
    replaced = {op.commit: op.parent for op in history if op.verb == "amend" and op.parent is not None}
    # Readers of a shortened history see commits on older ones than those on which they were made.
    parents = (_asked_parents(history) if shortened else _seen_parents(history)) | replaced
    writes = {op.commit: op.writes for op in history if op.verb in ("commit", "amend")}
    for op in reads:
        expected: dict[str, str] = {}
        name: str | None = op.commit
        complete = True
        while name is not None and name != ROOT:
            for key, value in writes.get(name, {}).items():
                expected.setdefault(key, value)
            if name not in parents:
                complete = False
                break
            name = parents[name]
        for key, value in (op.content or {}).items():
            if (key in expected and value != expected[key]) or (key not in expected and complete and value != ""):
                wanted = expected.get(key, "nothing")
                yield f"{op.client} read {value or 'nothing'} at {key} of commit {op.commit}, which has {wanted} there"


def _asked_parents(history: Sequence[Operation]) -> dict[str, str]:
    return {op.commit: op.parent for op in history if op.verb == "commit" and op.parent is not None}


def _seen_parents(history: Sequence[Operation]) -> dict[str, str]:
    """Parents of commits: as asked for, else as the first reader saw them."""
    return _parents_in_views(history) | _asked_parents(history)


def _parents_in_views(history: Sequence[Operation]) -> dict[str, str]:
    """Parents of commits, as the first reader saw them."""
    parents: dict[str, str] = {}
    for op in history:
        if op.seen is not None:
            for commits in op.seen.branches.values():
                for parent, name in pairwise(commits):
                    parents.setdefault(name, parent)
    return parents


def _by_ref(history: Sequence[Operation], start: View | None) -> list[tuple[View, list[Operation]]]:
    """One history for each ref, with what there was of it in the beginning; a read becomes a read of each of them."""
    first = start if start is not None else View(branches={MAIN: (ROOT,)}, tags={})
    seen = [op.seen for op in history if op.seen is not None]
    branches = {op.ref for op in history if op.ref and not op.verb.endswith("-tag")}
    tags = {op.ref for op in history if op.verb.endswith("-tag")}
    groups = []
    for name in sorted(branches.union(first.branches, *(view.branches for view in seen))):
        group = [op for op in history if op.ref == name and not op.verb.endswith("-tag")]
        groups.append((_only(first, branch=name), group + _reads(history, branch=name)))
    for name in sorted(tags.union(first.tags, *(view.tags for view in seen))):
        group = [op for op in history if op.ref == name and op.verb.endswith("-tag")]
        groups.append((_only(first, tag=name), group + _reads(history, tag=name)))
    return groups


def _reads(history: Sequence[Operation], *, branch: str = "", tag: str = "") -> list[Operation]:
    return [replace(op, seen=_only(op.seen, branch=branch, tag=tag)) for op in history if op.seen is not None]


def _only(view: View, *, branch: str = "", tag: str = "") -> View:
    return View(
        branches={name: commits for name, commits in view.branches.items() if name == branch},
        tags={name: commit for name, commit in view.tags.items() if name == tag},
    )


# ------------------------------------------------------------------ the search


class _Search:
    """Looks for an order of one history that explains it.

    Parameters
    ----------
    seen
        The parent of each commit in every view of a reader. A commit that follows another one contradicts these
        readers, whatever comes later: without this, many commits at one time are tried in every order.
    repeats
        Whether a creation of a branch may take effect once more than it is acknowledged.
    """

    def __init__(
        self,
        history: Iterable[Operation],
        *,
        shortened: bool,
        start: View | None,
        parents: Mapping[str, str],
        seen: Mapping[str, str],
        repeats: bool,
    ) -> None:
        self.ops = sorted(
            (op for op in history if op.outcome != "failed" and op.verb != "read-content"), key=lambda op: op.began
        )
        self.first_time_of = _first_times(self.ops) if repeats else {}
        self.ops += [replace(self.ops[i], outcome="unknown") for i in self.first_time_of.values()]
        self.shortened = shortened
        self.ends = [math.inf if op.ended is None or op.outcome in ("unknown", "open") else op.ended for op in self.ops]
        self.optional = [op.outcome in ("unknown", "open") for op in self.ops]
        self.start = _State() if start is None else _start(start)
        # Of commits that were made before the history began, or on another branch than that of this history.
        self.parents = parents
        self.seen = seen
        self.visited: set[tuple[int, _State]] = set()
        self.deepest = 0
        self.stuck_at: int = -1
        self.looked = 0

    def run(self) -> Verdict:
        everything = (1 << len(self.ops)) - 1
        required = sum(1 << i for i, optional in enumerate(self.optional) if not optional)
        stack: list[tuple[int, _State]] = [(everything, self.start)]
        while stack:
            left, state = stack.pop()
            left = self._pass_readers(left, state)
            if not left & required:
                return Verdict(problems=())
            if (left, state) in self.visited:
                continue
            self.visited.add((left, state))
            self.looked += 1
            if self.looked > _BUDGET:
                return Verdict(problems=(), undecided=True)
            self._remember(left)
            for i in self._next(left):
                op = self.ops[i]
                if op.verb == "read" or op.outcome == "refused":
                    continue
                after = self._after(state, op)
                if after is not None:
                    stack.append((left & ~(1 << i), after))
        culprit = self.ops[self.stuck_at] if self.stuck_at >= 0 else None
        return Verdict(problems=(f"no order of the operations explains the outcomes; not even up to: {culprit}",))

    def _next(self, left: int) -> list[int]:
        """Operations that may come next: those that began before anything that is left had ended."""
        indices = [i for i in range(len(self.ops)) if left >> i & 1]
        first_end = min((self.ends[i] for i in indices), default=math.inf)
        # The first time of a creation comes before its last one.
        indices = [i for i in indices if i not in self.first_time_of or left >> self.first_time_of[i] & 1]
        # The last is tried first: what is certain before what is unknown.
        return sorted((i for i in indices if self.ops[i].began < first_end), key=lambda i: (not self.optional[i], -i))

    def _pass_readers(self, left: int, state: _State) -> int:
        """Readers who may come next and saw just this state: taking them now never does harm."""
        while True:
            before = left
            for i in self._next(left):
                op = self.ops[i]
                if op.verb == "read":
                    if self._saw(state, op):
                        left &= ~(1 << i)
                elif op.outcome == "refused" and self._after(state, op) is None:
                    left &= ~(1 << i)
            if left == before:
                return left

    def _remember(self, left: int) -> None:
        done = len(self.ops) - left.bit_count()
        if done >= self.deepest:
            self.deepest = done
            waiting = [i for i in range(len(self.ops)) if left >> i & 1 and not self.optional[i]]
            self.stuck_at = min(waiting, key=lambda i: self.ends[i], default=-1)

    def _saw(self, state: _State, op: Operation) -> bool:
        seen = op.seen
        if seen is None:
            return True
        branches, tags = dict(state.branches), dict(state.tags)
        if seen.tags != tags or seen.branches.keys() != branches.keys():
            return False
        parents = dict(state.parents)
        return all(self._is_history(commits, branches[name], parents) for name, commits in seen.branches.items())

    def _is_history(self, commits: tuple[str, ...], tip: str, parents: dict[str, str]) -> bool:
        if not commits or commits[-1] != tip:
            return False
        chain = [tip]
        name: str | None = tip
        while name is not None and name != ROOT:
            name = parents.get(name) or self.parents.get(name)
            if name in chain:
                # In this order a commit would be its own ancestor.
                return False
            if name is not None:
                chain.append(name)
        chain.reverse()
        if name is None:
            # Its origin is not known: the rest is not checked.
            commits = tuple(one for one in commits if one in chain)
        if not self.shortened:
            return list(commits) == chain
        rest = iter(chain)
        return all(one in rest for one in commits)

    def _after(self, state: _State, op: Operation) -> _State | None:
        """The state after an operation; None where it does not apply."""
        branches, tags = dict(state.branches), dict(state.tags)
        match op.verb:
            case "commit":
                tip = branches.get(op.ref)
                if tip is None or op.parent not in (None, tip) or self.seen.get(op.commit, tip) != tip:
                    return None
                branches[op.ref] = op.commit
                return _with(state, branches=branches, parents=state.parents | {(op.commit, tip)})
            case "amend":
                tip = branches.get(op.ref)
                if tip is None or tip == ROOT or op.parent not in (None, tip):
                    return None
                parent = dict(state.parents).get(tip) or self.parents.get(tip)
                if parent is None or self.seen.get(op.commit, parent) != parent:
                    return None
                branches[op.ref] = op.commit
                return _with(state, branches=branches, parents=state.parents | {(op.commit, parent)})
            case "create-branch":
                if op.ref in branches:
                    return None
                branches[op.ref] = op.commit
                return _with(state, branches=branches)
            case "reset-branch":
                if op.ref not in branches or op.parent not in (None, branches[op.ref]):
                    return None
                branches[op.ref] = op.commit
                return _with(state, branches=branches)
            case "delete-branch":
                if op.ref not in branches or op.ref == MAIN:
                    return None
                del branches[op.ref]
                return _with(state, branches=branches)
            case "create-tag":
                if op.ref in tags or op.ref in state.gone:
                    return None
                tags[op.ref] = op.commit
                return _with(state, tags=tags)
            case "delete-tag":
                if op.ref not in tags:
                    return None
                del tags[op.ref]
                return _with(state, tags=tags, gone=state.gone | {op.ref})
            case _:
                raise ValueError(f"no verb {op.verb!r}")


def _first_times(ops: Sequence[Operation]) -> dict[int, int]:
    """Acknowledged creations of a branch that a deletion overlaps, by the indices that their first times get."""
    deletions = [op for op in ops if op.verb == "delete-branch" and op.outcome != "refused"]
    repeated = [
        i
        for i, op in enumerate(ops)
        if op.verb == "create-branch"
        and op.outcome == "ok"
        and any(
            one.ref == op.ref
            and (one.ended is None or op.began < one.ended)
            and (op.ended is None or one.began < op.ended)
            for one in deletions
        )
    ]
    return {len(ops) + i: original for i, original in enumerate(repeated)}


def _start(view: View) -> _State:
    parents: dict[str, str] = {}
    for commits in view.branches.values():
        for parent, name in pairwise(commits):
            parents[name] = parent
    return _State(
        branches=tuple(sorted((name, commits[-1]) for name, commits in view.branches.items())),
        tags=tuple(sorted(view.tags.items())),
        parents=frozenset(parents.items()),
    )


def _with(
    state: _State,
    *,
    branches: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
    gone: frozenset[str] | None = None,
    parents: frozenset[tuple[str, str]] | None = None,
) -> _State:
    return _State(
        branches=state.branches if branches is None else tuple(sorted(branches.items())),
        tags=state.tags if tags is None else tuple(sorted(tags.items())),
        gone=state.gone if gone is None else gone,
        parents=state.parents if parents is None else parents,
    )
