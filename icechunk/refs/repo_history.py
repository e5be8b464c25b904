"""The ops log of the repo-object layout: what stands in ``repo``, and the chain of copies with what came before.

An update that is not the newest names the copy of ``repo`` in which it was. ``repo_before_updates`` is that of
the newest update that no longer fits: read from there, every update is found in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from icechunk.format.repo_values import Update
from icechunk.format.update_list import UpdateList

__all__ = ["Window", "next_window"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The part of the ops log that one ``repo`` holds."""

    updates: UpdateList
    """Newest first; those of the last swap have no copy yet."""
    before: str | None
    """Bare name of the copy with the updates before them; None: there are none."""


def next_window(
    fresh: Sequence[Update], stored: Sequence[Update], *, before: str | None, backup: str, limit: int
) -> Window:
    """The part that the next ``repo`` holds.

    Parameters
    ----------
    fresh
        Updates of this swap, newest first.
    stored, before
        Of the object that is replaced.
    backup
        Bare name of its copy.
    limit
        Most updates to hold; those of one swap stay together, even if they are more.
    """
    # Several updates of one swap share the copy that they stand in; only the first of them was ever "the newest".
    settled = UpdateList.of(stored).settled(backup)
    room = max(0, limit - len(fresh))
    if len(settled) <= room:
        return Window(updates=settled.after(fresh), before=before)
    # What is left out begins where a copy begins, so nothing is told twice.
    while room and settled[room].backup_path == settled[room - 1].backup_path:
        room -= 1
    return Window(updates=settled[:room].after(fresh), before=settled[room].backup_path)
