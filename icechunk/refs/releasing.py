"""Snapshots that leave the graph: what becomes of those that stood on them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from icechunk.format.ids import ObjectId
from icechunk.format.repo_values import SnapshotRecord
from icechunk.refs.events import Reparented

__all__ = ["reparented"]


def reparented(
    snapshots: Mapping[ObjectId, SnapshotRecord], released: Collection[ObjectId], *, onto_first: bool
) -> tuple[Reparented, ...]:
    """Survivors whose parent is released, each with the ancestor that it stands on from now on.

    The transaction logs of the ancestors in between go on a survivor's list, oldest first and before those already
    there, so that diffs and rebases still know what every commit changed.

    Parameters
    ----------
    snapshots
        The whole graph, with those that leave it.
    onto_first
        Whether they stand on the first snapshot from now on, as the official library has it after an expiration; or
        on the nearest ancestor that is left, as after a collection.
    """
    changes: list[Reparented] = []
    for record in snapshots.values():
        if record.id in released or record.parent not in released:
            continue
        pruned, above = list(record.pruned_ancestor_tx_logs[::-1]), record.parent
        while above is not None and (above in released or (onto_first and snapshots[above].parent is not None)):
            passed = snapshots[above]
            pruned += [passed.id, *passed.pruned_ancestor_tx_logs[::-1]]
            above = passed.parent
        changes.append(Reparented(id=record.id, parent=above, pruned_ancestor_tx_logs=tuple(pruned[::-1])))
    return tuple(changes)
