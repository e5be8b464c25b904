"""The log layout: one new object per entry, created where there is none. Creating slot n+1 *is* the commit.

Theory: the rules of ``spec/repository-log.md``, cited beside each check. Who owns what, each for one client, that is
one instance on one event loop:

- `icechunk.refs.log_view.LogView`: the head (the newest folded state), the proof of how old its knowledge of the
  end is, ``repo`` as last seen, and whether the log has ended;
- `icechunk.refs.append_queue.AppendQueue`: who waits, and the task that swaps, as in the other layouts;
- `icechunk.refs.swapping.Swapping`: the entry in flight, at most one of which is unsettled;
- `icechunk.refs.checkpointing.Checkpointing`: the task that writes checkpoints.

This module puts them together and says when they begin and end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Final

from icechunk.errors import ErrorKind, SessionStateError
from icechunk.format.repo_values import Update
from icechunk.refs import events as e
from icechunk.refs.base import FILES_BYTES, MAX_FILES, Layout, OnSent, Propose, RepositoryLog, SwapToken
from icechunk.refs.carried import stand_up
from icechunk.refs.checkpointing import Checkpointing
from icechunk.refs.commit_queue import MAX_CARRIED_BYTES
from icechunk.refs.log_checkpoint import DEFAULT_UPDATES_PER_FILE, finish_conversion
from icechunk.refs.log_reader import Opened, RepoObject, open_head
from icechunk.refs.log_view import LogView
from icechunk.refs.ops_log import updates_of
from icechunk.refs.state import RepoState
from icechunk.refs.store_check import may_write
from icechunk.refs.swapping import Swapping
from icechunk.refs.takeover import Stranded, seal_abandoned
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Storage
from icechunk.tasks import finish_task
from icechunk.transfer.cache import WeightedCache

__all__ = ["LogLayout"]

_LOG: Final = logging.getLogger(__name__)
_CLOSE_GRACE_S: Final = 10.0


class LogLayout(RepositoryLog):
    """A repository log with one object per entry. Made by `LogLayout.open` or `icechunk.refs.create_log.create_log`.

    Parameters
    ----------
    updates_per_file
        Most entries of the ops log that one ``repo`` object holds; None: as the persisted configuration says, else
        1000.
    """

    layout = Layout.LOG

    def __init__(
        self, storage: Storage, sources: Sources, opened: Opened, *, updates_per_file: int | None = None
    ) -> None:
        self._storage = storage
        files: WeightedCache[str, bytes] = WeightedCache(FILES_BYTES, MAX_FILES)
        self._view = LogView(storage, sources, opened, updates_per_file=updates_per_file, files=files)
        self._checkpointing = Checkpointing(self._view)
        self._swapping = Swapping(self._view, self._checkpointing)
        self._turns: dict[str, asyncio.Lock] = {}

    @classmethod
    async def open(
        cls, storage: Storage, sources: Sources = SYSTEM, *, updates_per_file: int | None = None
    ) -> LogLayout:
        """Read the log up to its head: ``repo`` and a listing at the same time, then the tail at once.

        Where the log is found sealed, its conversion is finished first; where somebody took over ``repo``, the
        abandoned log is sealed, and what is only in it is reported with the error. Where nothing can be written, or
        not safely, neither is done.

        Raises
        ------
        RepositoryNotFoundError
            No repository there.
        SessionStateError
            The repository has another layout (kind ``unsupported-operation-for-version``).
        FormatError
            An object that cannot be read.
        """
        opened = await open_head(storage, sources)
        if isinstance(opened, Opened) and opened.head.state.sealed and may_write(storage):
            await finish_conversion(
                storage,
                sources,
                opened.head,
                stand=stand_up(storage, opened.tail),
                updates_per_file=updates_per_file or DEFAULT_UPDATES_PER_FILE,
            )
            opened = await open_head(storage, sources)
        if isinstance(opened, RepoObject):
            stranded = await seal_abandoned(storage, sources, opened) if may_write(storage) else None
            report = f"; {stranded.describe(storage.describe())}" if stranded is not None else ""
            raise SessionStateError(
                f"the repository in {storage.describe()} is kept in its repo object, not in a log: open it with that "
                f"layout, or convert it{report}",
                ErrorKind.UNSUPPORTED_OPERATION_FOR_VERSION,
            )
        return cls(storage, sources, opened, updates_per_file=updates_per_file)

    # ----------------------------------------------------------------- state

    @property
    def state(self) -> RepoState:
        """The newest folded state that this instance knows."""
        return self._view.state

    @property
    def epoch(self) -> str:
        """The present life of the log."""
        return self._view.head.epoch

    @property
    def n(self) -> int:
        """The last slot folded into `state`."""
        return self._view.head.n

    @property
    def store_time_us(self) -> int:
        """The store's clock now, or a little less, µs: files written from now on are not older (rule 10)."""
        return self._view.store_time_us

    @property
    def checkpoint_n(self) -> int:
        """The last slot known to be folded into ``repo``."""
        return self._view.checkpoint_n

    @property
    def ended(self) -> str | None:
        """Why nothing can be appended any more; None while the log goes on."""
        return self._view.left

    @property
    def stranded(self) -> Stranded | None:
        """What somebody who lifted the read-only status left behind; None where nobody did."""
        return self._view.stranded

    @property
    def updates_per_file(self) -> int:
        """Most entries of the ops log that one ``repo`` object holds."""
        return self._view.updates_per_file

    @updates_per_file.setter
    def updates_per_file(self, value: int | None) -> None:
        self._view.updates_per_file = value

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        """The newest task of each kind, done or not; for tests that stop a client dead."""
        tasks = (
            self._swapping.queue.runner,
            self._swapping.preparation,
            self._view.carried.task,
            self._checkpointing.task,
            self._view.sealer,
        )
        return tuple(task for task in tasks if task is not None)

    @property
    def carry_limit_bytes(self) -> int:
        return MAX_CARRIED_BYTES

    @property
    def files(self) -> WeightedCache[str, bytes]:
        return self._view.files

    def share_files(self, files: WeightedCache[str, bytes]) -> None:
        for key, data in self._view.files.items():
            files.put(key, data, len(data))
        self._view.files = files

    def carried_object(self, key: str) -> bytes | None:
        """A file that rides in an entry after the checkpoint and may not stand on its own yet (rule 15)."""
        return self._view.carried.find(key)

    def carried_files(self) -> dict[str, bytes]:
        """All of those, by key."""
        return self._view.carried.all()

    async def find_file(self, key: str) -> bytes | None:
        return await self._view.find_file(key)

    # ----------------------------------------------------------------- verbs

    async def refresh(self) -> RepoState:
        return await self._view.refresh()

    async def append(
        self,
        propose: Propose,
        *,
        since_us: int | None = None,
        deadline_s: float | None = None,
        on_sent: OnSent | None = None,
        files: Mapping[str, bytes] = MappingProxyType({}),
        on_queued: Callable[[], None] | None = None,
    ) -> RepoState:
        if self._view.left is not None:
            raise SessionStateError(self._view.left)
        return await self._swapping.queue.append(
            propose, since_us=since_us, deadline_s=deadline_s, on_sent=on_sent, files=files, on_queued=on_queued
        )

    def turn(self, branch: str) -> asyncio.Lock:
        return self._turns.setdefault(branch, asyncio.Lock())

    def expected(self) -> RepoState:
        return self._swapping.expected()

    def prepare_writes_soon(self) -> None:
        self._swapping.prepare_soon()

    async def prepare_writes(self) -> None:
        """See that the store honours ``If-None-Match`` (rule 1): two round trips, once per process and storage.

        Raises
        ------
        StorageError
            It does not (kind ``storage-config``), or gives no answer.
        """
        await self._swapping.check_store()

    async def settle(self, token: SwapToken) -> bool:
        return await self._swapping.settle(token)

    async def checkpoint(self) -> None:
        """Write the folded state to ``repo``, where it is behind; `StorageError` where the store does not answer."""
        await self._checkpointing.write()

    async def convert_to_repo_object(self) -> None:
        """End the log: seal it, and make ``repo`` the truth for every writer of the format (rule 8).

        Raises
        ------
        SessionStateError
            It has ended already.
        CommitOutcomeUnknown
            As in `append`; opening the repository finishes what was begun.
        """
        await self.append(lambda state: (e.Sealed(reason="convert"),))
        if self._view.left is None:
            await self._view.leave_sealed()

    def updates(self) -> AsyncIterator[Update]:
        """Everything that ever happened, newest first, through the chain of backups."""
        return updates_of(self._storage, self.state)

    async def aclose(self) -> None:
        if self._swapping.queue.closed:
            return
        await self._swapping.finish(_CLOSE_GRACE_S)
        await self._view.carried.finish(_CLOSE_GRACE_S)
        await self._checkpointing.finish(_CLOSE_GRACE_S)
        # A reader leaves `repo` alone, which it may not even be allowed to write.
        if self._view.left is None and self._swapping.wrote and self.n > self.checkpoint_n:
            try:
                async with asyncio.timeout(_CLOSE_GRACE_S):
                    await self._checkpointing.try_write()
            except TimeoutError as error:
                _LOG.warning("last checkpoint of %s failed: %s", self._storage.describe(), error)
        await finish_task(self._view.sealer, _CLOSE_GRACE_S)
