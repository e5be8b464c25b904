"""Descriptions of a repository's files, and drawings of its history."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from icechunk.errors import ObjectNotFoundError, SnapshotNotFoundError
from icechunk.format.envelope import FileType, read_header
from icechunk.format.ids import ObjectId, object_id_from_text
from icechunk.format.keys import REPO_KEY, manifest_key, snapshot_key, transaction_key
from icechunk.format.values import TransactionLog
from icechunk.inspection.description import (
    describe_collapsed_log,
    describe_manifest,
    describe_repo_info,
    describe_snapshot,
    describe_transaction_log,
)
from icechunk.inspection.drawing import AncestryGraph, lay_out
from icechunk.log.repository.state import MAIN, to_repo_info
from icechunk.repository.base import RepositoryBase, require_at_most_one, select, snapshot_id_from_text
from icechunk.runtime.twins import synchronous
from icechunk.transfer.assets import off_loop

__all__ = ["Inspection"]


class Inspection(RepositoryBase):
    """The methods that show the contents of stored files.

    Each ``inspect_*`` method reads the file itself, past all caches, and returns values that `json.dumps` takes. They
    have a ``header`` with the fields of the file's envelope: ``written_by``, ``app_name``,
    ``app_version``, ``spec_version``, ``file_type`` and ``compression``. All work on every layout, except where said.
    """

    async def inspect_snapshot_async(self, snapshot_id: str) -> dict[str, Any]:
        """The contents of a snapshot: its message and metadata, nodes, and manifests.

        Returns
        -------
        dict
            ``id``, ``header``, ``flushed_at``, ``commit_message``, ``metadata``, ``manifests``, ``nodes``.

        Raises
        ------
        InvalidInputError
            This is no id.
        SnapshotNotFoundError
            There is no such file.
        """
        return await self._inspect("snapshot", snapshot_id, snapshot_key, describe_snapshot, SnapshotNotFoundError)

    inspect_snapshot: Final = synchronous(inspect_snapshot_async)

    async def inspect_manifest_async(self, manifest_id: str) -> dict[str, Any]:
        """The number of chunk references in a manifest by kind, and its compression.

        The ids of a snapshot's manifests are in `inspect_snapshot` and `list_manifest_files`.

        Returns
        -------
        dict
            ``id``, ``header``, ``size_bytes`` (before compression), ``num_arrays``, ``total_chunk_refs``,
            ``total_inline``, ``total_native``, ``total_virtual``, ``arrays``, ``compression``.

        Raises
        ------
        InvalidInputError, ObjectNotFoundError
            As in `inspect_snapshot_async`.
        """
        return await self._inspect("manifest", manifest_id, manifest_key, describe_manifest, ObjectNotFoundError)

    inspect_manifest: Final = synchronous(inspect_manifest_async)

    async def inspect_transaction_log_async(self, snapshot_id: str) -> dict[str, Any]:
        """The changes of a snapshot's commit, by the ids of nodes.

        Returns
        -------
        dict
            ``header``, ``new_groups``, ``new_arrays``, ``deleted_groups``, ``deleted_arrays``, ``updated_groups``,
            ``updated_arrays``, ``updated_chunks``, ``moved_nodes``. Where expiration took ancestors of the snapshot out
            of history, their changes are among these, and ``synthetic_composite`` names them.

        Raises
        ------
        InvalidInputError, ObjectNotFoundError
            As in `inspect_snapshot_async`. The first snapshot of a repository of format 1 has no such file.
        """
        record = (await self._core.state()).snapshots.get(snapshot_id_from_text("snapshot_id", snapshot_id))
        describe = describe_transaction_log
        if record is not None and record.pruned_ancestor_tx_logs:
            ancestors = [(id, await self._transaction_log(id)) for id in record.pruned_ancestor_tx_logs]
            describe = partial(describe_collapsed_log, ancestors=ancestors)
        return await self._inspect("transaction log", snapshot_id, transaction_key, describe, ObjectNotFoundError)

    async def _transaction_log(self, id: ObjectId) -> TransactionLog | None:
        try:
            return await self._core.assets.transaction_log(id)
        except ObjectNotFoundError:
            return None

    inspect_transaction_log: Final = synchronous(inspect_transaction_log_async)

    async def _inspect(
        self,
        what: str,
        text: str,
        key: Callable[[ObjectId], str],
        describe: Callable[[bytes, ObjectId], dict[str, Any]],
        missing: type[SnapshotNotFoundError] | type[ObjectNotFoundError],
    ) -> dict[str, Any]:
        is_manifest = key is manifest_key
        id = object_id_from_text(text) if is_manifest else snapshot_id_from_text("snapshot_id", text)
        try:
            data = await self._core.assets.file(key(id))
        except ObjectNotFoundError as error:
            raise missing(
                f"there is no {what} {text} in {self._core.storage.describe()} (no object {key(id)!r}); it never "
                "existed here, or was collected"
            ) from error
        return await off_loop(len(data), lambda: describe(data, id))

    async def inspect_repo_info_async(self) -> dict[str, Any]:
        """The repository as a whole: branches, tags, every snapshot, and the newest lines of the ops log.

        Where the history is a log, of which the object ``repo`` is a copy that lags behind, the newest state is
        described; ``header`` is the object's.

        Returns
        -------
        dict
            ``header``, ``spec_version``, ``branches``, ``tags``, ``deleted_tags``, ``snapshots``, ``metadata``,
            ``latest_updates``, and ``repo_before_updates`` where older lines of the ops log are in that object.

        Raises
        ------
        FormatError
            The repository is of format 1, which has no such object (kind ``unsupported-spec-version``).
        """
        await self._require_format_2("inspect the repo object")
        state = await self._core.state()
        data = (await self._core.storage.get(REPO_KEY)).data
        header = read_header(data, FileType.REPO_INFO, what=f"object {REPO_KEY!r}")
        return describe_repo_info(header, to_repo_info(state))

    inspect_repo_info: Final = synchronous(inspect_repo_info_async)

    async def ancestry_graph_async(
        self,
        *,
        branch: str | None = None,
        tag: str | None = None,
        snapshot_id: str | None = None,
        plain: bool = False,
    ) -> AncestryGraph:
        """A drawing of history: of everything that branches and tags lead to, or of one line.

        Parameters
        ----------
        branch, tag, snapshot_id
            At most one of them: draw this snapshot and its ancestors only. A snapshot that was flushed, and is on no
            branch, is drawn that way.
        plain
            Without colours: for logs, files and pipes.

        Returns
        -------
        AncestryGraph
            `print` it, or show it in a notebook.

        Raises
        ------
        InvalidInputError
            More than one of the three is given (kind ``invalid-setting``).
        RefNotFoundError, SnapshotNotFoundError
            There is no such thing.
        """
        require_at_most_one(branch, tag, snapshot_id)
        state = await self._core.state(snapshot_id, branch=branch, tag=tag)
        main = None
        if branch is None and tag is None and snapshot_id is None:
            (await self._core.log()).require_all_refs()
            main = state.branches.get(MAIN)
            tips = [*state.branches.values(), *state.tags.values()]
        else:
            tips = [select(state, branch=branch, tag=tag, snapshot_id=snapshot_id)]
        state = await self._core.learn(*tips, ancestry=True)
        drawing = lay_out(state.snapshots, tips, branches=state.branches, tags=state.tags, main=main)
        return AncestryGraph(drawing, plain=plain)

    ancestry_graph: Final = synchronous(ancestry_graph_async)
