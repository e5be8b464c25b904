"""Who waits for a swap, and the task that swaps: the part of a repository log that does not know its layout.

The task belongs to the queue, not to a caller, since a PUT must outlive the caller who gave up on it (rule 3), and an
anyio task group needs a scope that nobody here is in. It is spawned when somebody waits, held strongly, ends when
nobody does, and is awaited or cancelled in `AppendQueue.aclose`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

from icechunk.errors import CommitOutcomeUnknown, ErrorKind, IcechunkError, SessionStateError, StorageError
from icechunk.format.ids import encode_id
from icechunk.refs.base import OnSent, Propose, SwapToken
from icechunk.refs.carried import put_once
from icechunk.refs.commit_queue import Member, Waiting
from icechunk.refs.state import RepoState
from icechunk.refs.store_check import require_writable
from icechunk.storage.base import Storage
from icechunk.tasks import finish_task

__all__ = ["AppendQueue", "resolve", "tell_sent"]

_LOG: Final = logging.getLogger(__name__)

_CLOSE_GRACE_S: Final = 10.0


class AppendQueue:
    """Callers of ``append`` of one log on one event loop.

    Parameters
    ----------
    swap_next
        Carries out one swap for whoever is in `waiting`, and settles it. Whatever it raises ends the appends of
        everybody: of those in `sent` with `CommitOutcomeUnknown`, of the others with this error.
    storage
        Where the log is.
    begin_look
        Numbers a call among the client's looks.
    files_ride
        Whether the files of a call ride in its entry. Else they are put before it waits.
    """

    def __init__(
        self,
        swap_next: Callable[[], Awaitable[None]],
        storage: Storage,
        begin_look: Callable[[], int],
        *,
        files_ride: bool = False,
    ) -> None:
        self._swap_next = swap_next
        self._storage = storage
        self._begin_look = begin_look
        self._files_ride = files_ride
        self.waiting: list[Waiting] = []
        self.sent: tuple[Member, ...] = ()
        """Whose events are in the attempt that is not settled."""
        self.swapping = asyncio.Lock()
        """Held while an attempt is made and settled; at most one is under way."""
        self.closed = False
        self.runner: asyncio.Task[None] | None = None
        """Swaps until nobody waits."""

    async def append(
        self,
        propose: Propose,
        *,
        since_us: int | None,
        deadline_s: float | None,
        on_sent: OnSent | None,
        files: Mapping[str, bytes],
        on_queued: Callable[[], None] | None,
    ) -> RepoState:
        """As `RepositoryLog.append`."""
        require_writable(self._storage, "change the repository")
        if not self._files_ride:
            for key, data in files.items():
                await put_once(self._storage, key, data)
        if self.closed:
            raise SessionStateError("the repository is closed; open it again")
        one = Waiting(
            propose=propose,
            since_us=since_us,
            outcome=asyncio.get_running_loop().create_future(),
            on_sent=on_sent,
            files=files if self._files_ride else {},
            asked=self._begin_look(),
        )
        self.waiting.append(one)
        if on_queued is not None:
            on_queued()
        if self.runner is None or self.runner.done():
            self.runner = asyncio.get_running_loop().create_task(self._run(), name="icechunk swaps")
        try:
            # Not `wait_for`: the future is the runner's, a caller who leaves must not cancel it.
            await asyncio.wait({one.outcome}, timeout=deadline_s)
        finally:
            if not one.outcome.done():
                one.abandoned = True
                if one in self.waiting:
                    self.waiting.remove(one)
        if one.outcome.done():
            return one.outcome.result()
        if one.token is None:
            raise StorageError(
                f"cannot change the repository in {self._storage.describe()}: the deadline of {deadline_s} s passed "
                "before anything was sent; nothing landed",
                ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
            )
        raise self._unknown(one, f"the deadline of {deadline_s} s passed first")

    def _unknown(self, one: Waiting, why: str) -> CommitOutcomeUnknown:
        snapshots = () if one.token is None else one.token.snapshots
        what = ", ".join(encode_id(snapshot) for snapshot in snapshots) or "a change"
        return CommitOutcomeUnknown(
            f"it is not known whether {what} landed in the repository in {self._storage.describe()}: {why}. "
            "Repository.settle_async(error.token) finds out, or makes failure certain",
            one.token,
        )

    async def _run(self) -> None:
        """Swap until nobody waits."""
        try:
            while self.waiting:
                async with self.swapping:
                    await self._swap_next()
        except asyncio.CancelledError:
            self._fail_all(None)
            raise
        except Exception as error:
            self._fail_all(error)

    def lost(self, members: Iterable[Member]) -> None:
        """The attempt is lost for certain: put those back in front who still wait; who has left is not sent again."""
        self.sent = ()
        members = tuple(members)
        for member in members:
            tell_sent(member.waiting, None)
        self.waiting[:0] = [
            member.waiting for member in members if not member.waiting.abandoned and not member.waiting.outcome.done()
        ]

    def _fail_all(self, error: Exception | None) -> None:
        why = str(error) if error is not None else "the repository was closed first"
        for member in self.sent:
            resolve(member.waiting, self._unknown(member.waiting, why))
        self.sent = ()
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            if error is None or isinstance(error, CommitOutcomeUnknown):
                resolve(one, SessionStateError(f"nothing was sent, nothing landed; try again: {why}"))
            else:
                resolve(one, error)

    async def aclose(self) -> None:
        """Stop: who was not sent is told so, who was sent and is not certain after a while as well."""
        if self.closed:
            return
        self.closed = True
        waiting, self.waiting = self.waiting, []
        for one in waiting:
            resolve(one, SessionStateError("the repository was closed before anything was sent; nothing landed"))
        await finish_task(self.runner, _CLOSE_GRACE_S)


def tell_sent(one: Waiting, token: SwapToken | None) -> None:
    """Note which attempt carries a caller's events, None for none, and tell him."""
    one.token = token
    if one.on_sent is None:
        return
    try:
        one.on_sent(token)
    except Exception:
        _LOG.exception("a callback of append failed")


def resolve(one: Waiting, outcome: RepoState | Exception) -> None:
    """Tell a caller what became of his events, once."""
    if one.outcome.done():
        return
    if not isinstance(outcome, Exception):
        one.outcome.set_result(outcome)
    elif not one.abandoned:
        one.outcome.set_exception(_own(outcome))
        one.outcome.exception()  # a caller who is cancelled at this very moment never looks: no complaint then


def _own(error: Exception) -> Exception:
    """An error of one's own for each caller: a raised one collects the traceback of whoever raises it."""
    if not isinstance(error, IcechunkError):
        return error
    copy: Exception = error.__reduce__()[0](*error.__reduce__()[1])
    copy.__cause__ = error.__cause__
    return copy
