"""Expiration where the repository keeps a graph: old snapshots leave it, in one event. Pure."""

from __future__ import annotations

from icechunk.refs.events import ExpirationRan
from icechunk.refs.releasing import reparented
from icechunk.refs.state import MAIN, RepoState

__all__ = ["expiration"]


def expiration(
    state: RepoState, *, older_than_us: int, delete_expired_branches: bool, delete_expired_tags: bool
) -> ExpirationRan:
    """The event that expires every snapshot written before a time.

    What a branch or tag points to stays, unless the ref goes as well; so does the first snapshot. ``main``, and refs
    to the first snapshot, never go. Survivors whose parent leaves stand on the first snapshot afterwards.

    Parameters
    ----------
    older_than_us
        µs since the epoch, exclusive.
    delete_expired_branches, delete_expired_tags
        Whether refs that point to an old snapshot are deleted.
    """
    old = {
        record.id
        for record in state.snapshots.values()
        if record.flushed_at_us < older_than_us and record.parent is not None
    }
    branches = {name for name, tip in state.branches.items() if tip in old and name != MAIN}
    tags = {name for name, target in state.tags.items() if target in old}
    gone_branches = branches if delete_expired_branches else set[str]()
    gone_tags = tags if delete_expired_tags else set[str]()
    kept = {tip for name, tip in state.branches.items() if name not in gone_branches}
    kept |= {target for name, target in state.tags.items() if name not in gone_tags}
    released = old - kept
    return ExpirationRan(
        released=tuple(sorted(released)),
        reparented=reparented(state.snapshots, released, onto_first=True),
        deleted_branches=tuple(sorted(gone_branches)),
        deleted_tags=tuple(sorted(gone_tags)),
    )
