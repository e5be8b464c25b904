"""Branches and tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from icechunk.format.ids import encode_id
from icechunk.log.repository.events import (
    BranchCreated,
    BranchDeleted,
    BranchReset,
    Event,
    TagCreated,
    TagDeleted,
    validate_branch_name,
    validate_tag_name,
)
from icechunk.log.repository.state import RepoState
from icechunk.repository.base import RepositoryBase, snapshot_id_from_text
from icechunk.repository.views import require_feature
from icechunk.runtime.twins import synchronous

__all__ = ["BranchesAndTags"]


class BranchesAndTags(RepositoryBase):
    """Names for snapshots: branches move, tags never do."""

    async def create_branch_async(self, branch: str, snapshot_id: str) -> None:
        """Create a branch at a snapshot.

        Raises
        ------
        AlreadyExistsError
            There is a branch with this name.
        SnapshotNotFoundError
            There is no such snapshot.
        InvalidInputError
            The name, or the id, is not one.
        """
        validate_branch_name(branch)
        await self._append(BranchCreated(name=branch, snapshot=snapshot_id_from_text("snapshot_id", snapshot_id)))

    create_branch: Final = synchronous(create_branch_async)

    async def list_branches_async(self) -> set[str]:
        """Names of all branches.

        Raises
        ------
        StorageError
            In format 1, where nothing can be listed: `AccessDeniedError` where the right to list is missing.
        """
        return set((await self._all_refs()).branches)

    list_branches: Final = synchronous(list_branches_async)

    async def lookup_branch_async(self, branch: str) -> str:
        """The id of the snapshot that a branch points to. Raises `RefNotFoundError`."""
        return encode_id((await self._core.state(branch=branch)).branch_tip(branch))

    lookup_branch: Final = synchronous(lookup_branch_async)

    async def reset_branch_async(self, branch: str, snapshot_id: str, *, from_snapshot_id: str | None = None) -> None:
        """Point a branch to another snapshot.

        Parameters
        ----------
        from_snapshot_id
            Do so only if the branch points to this one now.

        Raises
        ------
        ConflictError
            It does not (kind ``branch-update-conflict``).
        RefNotFoundError, SnapshotNotFoundError
            There is no such branch, or snapshot.
        """
        expected = None if from_snapshot_id is None else snapshot_id_from_text("from_snapshot_id", from_snapshot_id)
        snapshot = snapshot_id_from_text("snapshot_id", snapshot_id)
        await self._append(BranchReset(name=branch, snapshot=snapshot, expected=expected))

    reset_branch: Final = synchronous(reset_branch_async)

    async def delete_branch_async(self, branch: str) -> None:
        """Delete a branch; its snapshots stay until they are collected.

        Raises
        ------
        RefNotFoundError
            There is no such branch.
        SessionStateError
            It is ``main``, which always exists.
        """
        await self._append(BranchDeleted(name=branch))

    delete_branch: Final = synchronous(delete_branch_async)

    async def create_tag_async(self, tag: str, snapshot_id: str) -> None:
        """Create a tag at a snapshot, for good.

        Raises
        ------
        SessionStateError
            The repository's owner switched that off (kind ``feature-flag-disabled``).
        AlreadyExistsError
            There is a tag with this name (kind ``tag-already-exists``), or was (``tag-previously-deleted``).
        SnapshotNotFoundError
            There is no such snapshot.
        InvalidInputError
            The name, or the id, is not one.
        """
        validate_tag_name(tag)
        snapshot = snapshot_id_from_text("snapshot_id", snapshot_id)
        await self._append(TagCreated(name=tag, snapshot=snapshot), feature="create_tag")

    create_tag: Final = synchronous(create_tag_async)

    async def list_tags_async(self) -> set[str]:
        """Names of all tags. Raises as `list_branches_async`."""
        return set((await self._all_refs()).tags)

    list_tags: Final = synchronous(list_tags_async)

    async def lookup_tag_async(self, tag: str) -> str:
        """The id of the snapshot that a tag points to. Raises `RefNotFoundError`."""
        return encode_id((await self._core.state(tag=tag)).tag_target(tag))

    lookup_tag: Final = synchronous(lookup_tag_async)

    async def delete_tag_async(self, tag: str) -> None:
        """Delete a tag; its name cannot be used again.

        Raises
        ------
        RefNotFoundError
            There is no such tag.
        SessionStateError
            The repository's owner switched that off (kind ``feature-flag-disabled``).
        """
        await self._append(TagDeleted(name=tag), feature="delete_tag")

    delete_tag: Final = synchronous(delete_tag_async)

    async def _all_refs(self) -> RepoState:
        state = await self._core.state()
        (await self._core.log()).require_all_refs()
        return state

    async def _append(self, event: Event, *, feature: str | None = None) -> None:
        def propose(state: RepoState) -> Sequence[Event]:
            if feature is not None:
                require_feature(state.disabled_feature_flags or (), feature)
            return [event]

        log = await self._core.log()
        await log.append(propose)
