"""The base of every part of a `Repository`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from icechunk.config import RepositoryConfig
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.ids import ID_CHARACTERS, ObjectId, object_id_from_text
from icechunk.format.values import Snapshot, TransactionLog
from icechunk.log.repository.port import Layout
from icechunk.log.repository.ref_files.layout import needs_format_2
from icechunk.log.repository.state import RepoState, require_snapshot
from icechunk.ops import Attribution, SpecVersion
from icechunk.runtime.pickles import instance_of_state
from icechunk.runtime.representation import fields_html
from icechunk.runtime.twins import run_sync
from icechunk.session.core import Core
from icechunk.storage.port import Storage

__all__ = ["RepositoryBase"]


class RepositoryBase:
    """Holds the core, describes itself, and closes."""

    def __init__(self, core: Core) -> None:
        self._core = core

    @property
    def config(self) -> RepositoryConfig:
        """Persisted options with the caller's merged over them."""
        return self._core.config

    @property
    def storage(self) -> Storage:
        """The storage that holds the repository."""
        return self._core.storage

    @property
    def attribution(self) -> Attribution:
        """The names of the client, workload and principal that work here."""
        return self._core.attribution or Attribution()

    @property
    def authorized_virtual_container_prefixes(self) -> set[str]:
        """URL prefixes of the virtual chunk containers that may be read."""
        return set(self._core.virtual_access)

    @property
    def layout(self) -> Layout:
        """The form in which the repository log is persisted."""
        return run_sync(self._core.log()).layout

    @property
    def spec_version(self) -> SpecVersion:
        """Version of the format that snapshots and manifests are written in."""
        return SpecVersion(run_sync(self._core.log()).spec_version)

    async def _require_format_2(self, what: str) -> None:
        """Refuse a use that format 1 does not have; ``what`` completes "cannot …"."""
        if (await self._core.log()).layout is Layout.REFS:
            raise needs_format_2(what)

    async def _between(self, start: ObjectId, end: ObjectId) -> tuple[list[TransactionLog], Snapshot, Snapshot]:
        """The transaction logs of the commits after one snapshot up to another, oldest first, and both snapshots.

        Raises
        ------
        InvalidInputError
            The first is no ancestor of the second (kind ``bad-snapshot-chain-for-diff``).
        """
        wanted: list[ObjectId] = []
        for record in (await self._core.learn(end, ancestry=True, until={start})).ancestry(end):
            if record.id == start:
                break
            wanted += [record.id, *reversed(record.pruned_ancestor_tx_logs)]
        else:
            raise InvalidInputError(
                "cannot compare: the ancestry of the second snapshot doesn't include the first; swap them, or "
                "compare with a common ancestor",
                ErrorKind.BAD_SNAPSHOT_CHAIN_FOR_DIFF,
            )
        logs = await self._transaction_logs(wanted[::-1])
        return logs, await self._core.assets.snapshot(start), await self._core.assets.snapshot(end)

    async def _transaction_logs(self, ids: Sequence[ObjectId]) -> list[TransactionLog]:
        """Transaction logs in the order asked for, all read at the same time."""
        return await self._core.assets.transaction_logs(ids, limit=self._core.settings.max_requests)

    async def aclose(self) -> None:
        """Write a last checkpoint where one is due, and close all connections of the running loop.

        Not needed at the end of ``asyncio.run`` or of the process, where it happens by itself. The repository
        opens again when it is used again.
        """
        await self._core.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __reduce__(self) -> tuple[Any, ...]:
        return instance_of_state(self, self.__getstate__())

    def __getstate__(self) -> Core:
        return self._core

    def __setstate__(self, state: Core) -> None:
        self._core = state

    def __repr__(self) -> str:
        # Nothing here waits for storage: a debugger may call this at any time.
        core = self._core
        place = "".join(f"\n    {line}" for line in repr(core.storage).splitlines())
        return f"<{self._title()}>\nlayout: {core.layout.value}\nstorage:{place}\nconfig: <RepositoryConfig ...>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        core = self._core
        place = [line.partition(": ") for line in repr(core.storage).splitlines()[1:]]
        rows = [(f"storage {name}", value) for name, _, value in place]
        return fields_html(self._title(), [("layout", core.layout.value), *rows, ("config", core.config)])

    def _title(self) -> str:
        return f"icechunk.Repository (v{1 if self._core.layout is Layout.REFS else 2})"


def require_at_most_one(branch: str | None, tag: str | None, snapshot_id: str | None) -> None:
    """Refuse more than one name of a version. Raises `InvalidInputError`."""
    if sum(name is not None for name in (branch, tag, snapshot_id)) > 1:
        raise InvalidInputError("give at most one of branch, tag and snapshot_id", ErrorKind.INVALID_SETTING)


def select(
    state: RepoState, *, branch: str | None = None, tag: str | None = None, snapshot_id: str | None = None
) -> ObjectId:
    """The snapshot that exactly one of a branch, a tag and an id names.

    Raises
    ------
    InvalidInputError
        None of them is given, or more than one (kind ``invalid-setting``).
    RefNotFoundError, SnapshotNotFoundError
        There is no such thing.
    """
    if sum(name is not None for name in (branch, tag, snapshot_id)) != 1:
        raise InvalidInputError("exactly one of branch, tag and snapshot_id must be given", ErrorKind.INVALID_SETTING)
    if branch is not None:
        return state.branch_tip(branch)
    if tag is not None:
        return state.tag_target(tag)
    return require_snapshot(state, snapshot_id_from_text("snapshot_id", snapshot_id or "")).id


def snapshot_id_from_text(name: str, text: str) -> ObjectId:
    """The id of a snapshot, given as the argument ``name``.

    Raises
    ------
    InvalidInputError
        The text is no id, as the name of a branch is not (kind ``invalid-snapshot-id``).
    """
    try:
        return object_id_from_text(text)
    except InvalidInputError as error:
        if not isinstance(text, str) or len(text) == ID_CHARACTERS:
            raise
        raise InvalidInputError(
            f"{name} must be the id of a snapshot, not {text!r:.60}: look the name of a branch or tag up with "
            "lookup_branch or lookup_tag",
            ErrorKind.INVALID_SNAPSHOT_ID,
        ) from error
