"""Writing manifests again."""

from __future__ import annotations

from typing import Any, Final, get_args

from icechunk.config import (
    ManifestConfig,
    ManifestSplitCondition,
    ManifestSplitDimCondition,
    ManifestSplittingConfig,
    RepositoryConfig,
    config_to_dict,
)
from icechunk.config.manifest import DEFAULT_SPLIT_SIZE
from icechunk.inputs import json_metadata
from icechunk.refs.base import Layout
from icechunk.refs.ref_files_layout import needs_format_2
from icechunk.repository.sessions import Sessions
from icechunk.sync import run_sync
from icechunk.types import CommitMethod

__all__ = ["Rewriting"]

_UNSPLIT: Final = ManifestSplittingConfig.from_dict(
    {ManifestSplitCondition.path_matches(".*"): {ManifestSplitDimCondition.Any(): DEFAULT_SPLIT_SIZE}}
)
"""What the official library calls the absence of splitting."""


class Rewriting(Sessions):
    """Gives existing references the manifests that new ones would get."""

    async def rewrite_manifests_async(
        self,
        message: str,
        *,
        branch: str,
        metadata: dict[str, Any] | None = None,
        commit_method: CommitMethod = "new_commit",
    ) -> str:
        """Write the manifests of all arrays again, as the present configuration wants them, and commit that.

        Values, chunks and nodes stay as they are; no chunk is read or written. A commit otherwise only rewrites
        manifests of arrays that it changes, so this is what applies a changed splitting or compression of locations
        to everything, or puts together what many small commits have left.

        Parameters
        ----------
        message
            Of the commit.
        branch
            To commit to.
        metadata
            JSON values kept with the commit. The splitting configuration is added under ``__icechunk``,
            ``splitting_config`` (None where the engine chooses).
        commit_method
            ``new_commit``, or ``amend`` to replace the branch's newest commit.

        Returns
        -------
        str
            The new snapshot's id.

        Raises
        ------
        RefNotFoundError
            There is no such branch.
        ReadOnlyError
            The repository's status is read-only.
        ConflictError
            Somebody committed to the branch meanwhile; nothing is visible of this, and it can be called again.
        FormatError
            To amend in a repository of format 1.
        ValueError
            Another commit method.
        """
        if commit_method not in get_args(CommitMethod):
            raise ValueError(f"commit_method must be 'new_commit' or 'amend', not {commit_method!r}")
        described = json_metadata("metadata", metadata)
        session = await self.writable_session_async(branch)
        amend = commit_method == "amend"
        if amend and (await self._core.log()).spec_version == 1:
            raise needs_format_2("amend a commit with rewritten manifests")
        described |= {"__icechunk": {"splitting_config": self._splitting()}}
        return await session.commit_rewritten(message, described, amend=amend)

    def rewrite_manifests(
        self,
        message: str,
        *,
        branch: str,
        metadata: dict[str, Any] | None = None,
        commit_method: CommitMethod = "new_commit",
    ) -> str:
        """Synchronous twin of `rewrite_manifests_async`."""
        return run_sync(
            self.rewrite_manifests_async(message, branch=branch, metadata=metadata, commit_method=commit_method)
        )

    def _splitting(self) -> Any:
        """The splitting configuration as it is persisted."""
        manifest = self._core.config.manifest
        splitting = manifest.splitting if manifest is not None else None
        if splitting is None and self._core.layout is not Layout.LOG:
            splitting = _UNSPLIT
        stored = config_to_dict(RepositoryConfig(manifest=ManifestConfig(splitting=splitting)))
        return stored["manifest"]["splitting"]
