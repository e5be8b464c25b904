"""The schedule of checkpoints: one at a time, in the background, as long as one is due.

A checkpoint costs time in proportion to the history. So after each there is a pause of ten times as long as it took,
at most half a minute: however long the history, writing it down takes a small share of the time, and ``repo`` is never
far behind for long. Nor does it begin while callers wait for a swap, which it would delay, for up to a second; nor,
while other clients write too, before it is this client's time (`LogLayout._charge`).

If syncs are deferred, as on a local disk, nothing is written in the background. Each change is written through before
its caller is notified, ``repo`` included, however long the history: readers of the format find the change when its
caller is told of it. That takes as long as any writer of the format needs for a change. A close or a request makes it
durable.

The task is one of asyncio, not of a caller: it outlives the swap that made it due, is held strongly, ends when
nothing is due any more, and is awaited or cancelled by `Checkpointing.finish`. The checkpoint itself and
its condition are in `icechunk.log.repository.entries.checkpoint`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from icechunk.errors import IcechunkError
from icechunk.log.repository.entries.checkpoint import (
    LostRepo,
    Written,
    checkpoint_is_due,
    write_checkpoint,
    write_durable,
    write_unsynced,
)
from icechunk.log.repository.entries.client import LogView
from icechunk.log.repository.entries.following import FollowingCheckpoint
from icechunk.log.repository.entries.reader import Head
from icechunk.log.repository.objects import RepoObject
from icechunk.log.repository.state import RepoState
from icechunk.log.repository.store_check import require_atomic
from icechunk.runtime.tasks import finish_task

__all__ = ["Checkpointing"]

_LOG: Final = logging.getLogger(__name__)
_PAUSE_SHARE: Final = 10
_LONGEST_PAUSE_S: Final = 30.0


class Checkpointing:
    """The checkpoints of one client. Owns the task that writes them in the background.

    Parameters
    ----------
    time
        Returns when it is time for a checkpoint in the background: it delays no caller, or has waited long enough.
    """

    def __init__(self, view: LogView, time: Callable[[], Awaitable[None]]) -> None:
        self._view = view
        self._time = time
        self._one_at_a_time = asyncio.Lock()
        self._stopped = False
        self._pausing = False
        self.task: asyncio.Task[None] | None = None
        """Writes checkpoints while any is due."""

    def following(self, n: int, state: RepoState, files: Mapping[str, bytes]) -> FollowingCheckpoint:
        """Files and ``repo`` to be written behind the entry for slot ``n``, if syncs are deferred."""
        return FollowingCheckpoint(self._view, n=n, state=state, files=files, busy=self._one_at_a_time.locked)

    async def write(self) -> None:
        """Bring ``repo`` up to the head now, durably. `StorageError` where the store does not answer."""
        await self._write(self._write_durable if self._view.storage.defers_syncs else self._write_checkpoint)

    async def write_through(self) -> None:
        """If syncs are deferred: write all embedded files as objects, and ``repo`` up to the head.

        Does not wait for the disk, except the first time in a repository that has no durable copy of ``repo``.
        """
        view = self._view
        if view.checkpoint_n < view.head.n:
            await self._write(self._write_unsynced)

    async def _write(self, write: Callable[[Head], Awaitable[Written | LostRepo]]) -> None:
        view = self._view
        async with self._one_at_a_time:
            if view.ended_reason is not None:
                return
            require_atomic(view.storage)
            head = view.head
            if head.state.sealed:
                await view.leave_sealed()
                return
            written = await view.look_at_repo() or await write(head)
            if isinstance(written, LostRepo):
                await self._lost(written.found, head.epoch)
                return
            view.checkpointed(head, written)
            _LOG.debug("checkpoint of %s written, up to slot %d", view.storage.describe(), head.n)

    async def _write_checkpoint(self, head: Head) -> Written | LostRepo:
        view = self._view
        return await write_checkpoint(
            view.storage,
            view.sources,
            head,
            view.known,
            embedded=view,
            files=view.files_to_open_with(head.state),
            updates_per_file=view.updates_per_file,
        )

    async def _write_unsynced(self, head: Head) -> Written | LostRepo:
        view = self._view
        if view.known.marker is not None and view.known.marker.durable is None:
            return await self._write_durable(head)
        return await write_unsynced(
            view.storage,
            view.sources,
            head,
            view.known,
            embedded=view,
            updates_per_file=view.updates_per_file,
        )

    async def _write_durable(self, head: Head) -> Written | LostRepo:
        view = self._view
        return await write_durable(
            view.storage, view.sources, head, view.known, embedded=view, updates_per_file=view.updates_per_file
        )

    async def _lost(self, found: RepoObject | None, epoch: str) -> None:
        await self._view.lost_repo(found, epoch)
        if self._view.sealer is not None:
            await asyncio.wait({self._view.sealer})

    def spawn_if_due(self) -> None:
        """Write a checkpoint in the background if one is due by the policy."""
        if self._stopped or self._view.storage.defers_syncs or (self.task is not None and not self.task.done()):
            return
        if checkpoint_is_due(self._view.head, self._view.known):
            self.task = asyncio.get_running_loop().create_task(self._write_while_due(), name="icechunk log checkpoint")

    async def _write_while_due(self) -> None:
        view = self._view
        while not self._stopped and view.ended_reason is None and checkpoint_is_due(view.head, view.known):
            await self._pause(self._time())
            began_us = view.sources.elapsed_us()
            if not await self.try_write():
                return
            took_s = max(0, view.sources.elapsed_us() - began_us) / 1e6
            await self._pause(view.sources.sleep(min(_LONGEST_PAUSE_S, _PAUSE_SHARE * took_s)))

    async def _pause(self, pause: Awaitable[None]) -> None:
        """Wait where `finish` may cancel it."""
        self._pausing = True
        try:
            await pause
        finally:
            self._pausing = False

    async def try_write(self, *, through: bool = False) -> bool:
        """Write one, with ``through`` as `write_through`. A failure is logged; the next checkpoint does its work."""
        where = self._view.storage.describe()
        try:
            await (self.write_through() if through else self.write())
        except (IcechunkError, OSError) as error:
            level = logging.DEBUG if await self._view.is_gone() else logging.WARNING
            _LOG.log(level, "checkpoint of %s failed, the next checkpoint includes it: %s", where, error)
        except Exception:
            # Nothing is lost, but the log gets longer, so the failure must not go unnoticed.
            _LOG.exception("checkpoint of %s failed unexpectedly; please report this as a bug of icechunk", where)
        else:
            return True
        return False

    async def finish(self, grace_s: float) -> None:
        """Start none any more; wait for the one under way."""
        self._stopped = True
        if self._pausing and self.task is not None:
            self.task.cancel()
        await finish_task(self.task, grace_s)
