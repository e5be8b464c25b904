"""The files and the checkpoint that follow an entry, if syncs are deferred: made while the disk is waited for.

Before a caller is notified of an entry on a local disk, its files and ``repo`` are written (rule 12). Making ``repo``
takes about as long as the disk takes for the entry. So it is made meanwhile, of the state that the entry leads to, and
written in the same thread, once the entry is durable: like every checkpoint only in place of the version that it was
made from (rule 7). Whatever is out of the ordinary is left to `icechunk.log.repository.entries.checkpoint_schedule`,
which finds ``repo`` behind the head then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from icechunk.errors import IcechunkError
from icechunk.format.keys import REPO_KEY
from icechunk.format.repo.codec import EncodedRepo, encode_and_keep
from icechunk.log.repository.entries.checkpoint import Written
from icechunk.log.repository.entries.client import LogView
from icechunk.log.repository.marker import checkpoint_info, keep_updates
from icechunk.log.repository.objects import THREAD_FROM_SNAPSHOTS, known_of
from icechunk.log.repository.state import RepoState
from icechunk.runtime.late_dataclass import replace
from icechunk.storage.port import Absent, Following, Matches, Put, PutResult

__all__ = ["FollowingCheckpoint"]


class FollowingCheckpoint(Following):
    """Files and ``repo`` to be written behind one entry of this client's own.

    Parameters
    ----------
    n
        The entry's slot, the next after the head.
    state
        The state after it.
    files
        That are embedded in it.
    busy
        Whether another checkpoint of this client is being written.
    """

    def __init__(
        self, view: LogView, *, n: int, state: RepoState, files: Mapping[str, bytes], busy: Callable[[], bool]
    ) -> None:
        self._view = view
        self._head = replace(view.head, n=n, state=state)
        self._files = files
        self._busy = busy
        self._known = view.known
        self._encoded: EncodedRepo | None = None
        self._puts: Sequence[Put] = ()

    @property
    def puts(self) -> Sequence[Put]:
        return self._puts

    def make(self) -> None:
        encoded = None if self._busy() else self._try_encode()
        if encoded is not None:
            self._encoded = encoded
            files = [Put(key, data, Absent()) for key, data in self._files.items()]
            self._puts = [*files, Put(REPO_KEY, encoded.data, Matches(self._known.version))]

    def _try_encode(self) -> EncodedRepo | None:
        """The next ``repo``, if it follows the present one and takes no other file, nor a thread."""
        head, known = self._head, self._known
        marker = known.marker
        if (
            marker is None
            or (marker.epoch, marker.n) != (head.epoch, head.n - 1)
            or marker.durable is None
            or known.copy is not None
            or not known.read_only
            or head.state.sealed
            or len(head.state.snapshots) >= THREAD_FROM_SNAPSHOTS
        ):
            return None
        try:
            kept = keep_updates(
                head.state,
                newest_us=known.newest_us,
                count=known.count,
                before=known.before,
                limit=self._view.updates_per_file,
                backup_name="",
            )
            if kept.needs_backup:
                return None
            return encode_and_keep(
                checkpoint_info(head.state, epoch=head.epoch, n=head.n, durable=marker.durable, kept=kept)
            )
        except IcechunkError:
            return None

    def written(self, answers: Sequence[PutResult | None]) -> None:
        """The entry has landed and is folded; these are the answers of `Storage.put_before`."""
        put = answers[-1] if answers else None
        if put is None or self._encoded is None or self._view.checkpoint_n >= self._head.n:
            return
        info = self._encoded.info
        known = known_of(info, put.version, len(self._encoded.data))
        self._view.checkpointed(self._head, Written(known=known, info=info, by_us=True))
