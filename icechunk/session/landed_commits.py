"""The commits of each branch that this process has looked at, for all sessions of a repository.

A session that is rebased looks at all commits since its base at once. Many sessions of one process may commit to a
branch, each from a base of its own. So the commits of a branch are read and added up once, in a line, and each session
asks what happened after its base. The cost of a rebase does not depend on the number of other sessions.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from icechunk.format.ids import ObjectId
from icechunk.format.values import TransactionLog
from icechunk.log.session.merge.landed import Landed, LandedSince

__all__ = ["LandedCommits", "Line"]

_MOST_LINES: Final = 4
_MOST_COMMITS: Final = 1 << 14
_MOST_ROWS: Final = 1 << 20
"""Bounds of a line. A longer one is forgotten, and the next session begins another."""


class Line:
    """Commits in a row, each the parent of the next one.

    Parameters
    ----------
    base
        The snapshot before the first of them.
    """

    __slots__ = ("_numbers", "_snapshots", "landed")

    def __init__(self, base: ObjectId) -> None:
        self.landed: Landed = Landed()
        self._snapshots = [base]
        self._numbers = {base: 0}

    @property
    def tip(self) -> ObjectId:
        """The last snapshot."""
        return self._snapshots[-1]

    @property
    def numbers(self) -> Mapping[ObjectId, int]:
        """Snapshots, and the number that each has in ``landed``, ascending in their order."""
        return self._numbers

    def follow(self, snapshot: ObjectId, commits: Iterable[tuple[ObjectId, Iterable[TransactionLog]]]) -> bool:
        """Add commits behind a snapshot of the line. Those that came behind it leave: they were expected, or the branch
        was reset.

        Returns
        -------
        bool
            False: that snapshot is too long ago; the line cannot be used any more.
        """
        commits = list(commits)
        while commits and self.tip != snapshot:
            if not self.landed.take_back():
                return False
            del self._numbers[self._snapshots.pop()]
        for id, transactions in commits:
            self.landed.add(transactions)
            self._snapshots.append(id)
            self._numbers[id] = self.landed.count
        return True


class LandedCommits:
    """The lines of the branches that are committed to. Safe among threads."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, Line] = OrderedDict()
        self._lock = threading.Lock()

    def line(self, branch: str, base: ObjectId) -> Line | None:
        """The line of a branch, if it has that snapshot."""
        line = self._lines.get(branch)
        return line if line is not None and base in line.numbers else None

    def since(
        self,
        branch: str,
        base: ObjectId,
        line: Line | None,
        tip: ObjectId | None,
        join: ObjectId,
        commits: Sequence[tuple[ObjectId, Sequence[TransactionLog]]],
    ) -> LandedSince | None:
        """The changes after ``base``, with more commits added.

        Parameters
        ----------
        line, tip
            As the caller found the line, and its tip then; None: begin another one at ``base``.
        join, commits
            Snapshots and their transaction logs, oldest first, and the snapshot before the first of them: one of the
            line, or ``base``.

        Returns
        -------
        LandedSince or None
            None: another caller has added commits meanwhile, perhaps others, or this line is of no use: look again.
        """
        with self._lock:
            if line is None:
                line = self._lines[branch] = Line(base)
            elif self._lines.get(branch) is not line or line.tip != tip:
                return None
            if not line.follow(join, commits):
                del self._lines[branch]
                return None
            self._lines.move_to_end(branch)
            if line.landed.count > _MOST_COMMITS or line.landed.num_rows > _MOST_ROWS:
                del self._lines[branch]
            while len(self._lines) > _MOST_LINES:
                self._lines.popitem(last=False)
            return line.landed.since(line.numbers[base])
