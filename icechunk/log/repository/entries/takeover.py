"""Takeovers: a client lifts the read-only status of a log's ``repo``, and entries are stranded (the limit of rule 8).

No rule without a read per commit can prevent it: ``repo`` becomes authoritative as it is, and entries after its
checkpoint are in the log only. They are reported, never deleted.
"""

from __future__ import annotations

from icechunk.errors import FormatError, ObjectNotFoundError, StorageError
from icechunk.format.ids import encode_id
from icechunk.format.keys import overwritten_repo_key
from icechunk.format.repo.codec import decode_repo
from icechunk.log.repository.entries.reader import list_head, newest_epoch, read_tail
from icechunk.log.repository.entry import Entry, encode_entry, epoch_prefix, slot_key
from icechunk.log.repository.event_json import encode_events
from icechunk.log.repository.events import CONVERT, TAKEOVER, Sealed, Void
from icechunk.log.repository.marker import decode_marker
from icechunk.log.repository.objects import RepoObject, read_repo, read_slot
from icechunk.log.repository.queue import new_snapshots
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.outcome import Creation, Fate, certain, follow
from icechunk.storage.port import Storage

__all__ = ["Stranded", "find_seal", "find_stranded", "seal_abandoned", "seal_log"]

_BACKUPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranded:
    """Entries that are in the log only."""

    epoch: str
    after: int
    """Last slot that the object that was taken over holds."""
    entries: tuple[Entry, ...]
    """Entries after that slot, oldest first."""

    def describe(self, where: str) -> str:
        """A report for people: the takeover, the entries that are only in the log, and their location."""
        what = (
            f"the repository in {where} was taken over: its status was set online with another library, so its "
            "'repo' object counts now, and the log was sealed"
        )
        if not self.entries:
            return f"{what}. Nothing was left behind; open it again"
        snapshots = ", ".join(encode_id(snapshot) for entry in self.entries for snapshot in new_snapshots(entry.events))
        return (
            f"{what}. {len(self.entries)} entries after slot {self.after} are in the log only "
            f"({epoch_prefix(self.epoch)}, slots {self.entries[0].n} to {self.entries[-1].n}), with the snapshots "
            f"{snapshots or 'none'}; they were not deleted. Open the repository again, and repeat them from there"
        )


def _seal_in(entry: Entry) -> Sealed | None:
    return next((event for event in entry.events if isinstance(event, Sealed)), None)


async def find_seal(storage: Storage, epoch: str) -> Sealed | None:
    """The seal of a log whose ``repo`` is no checkpoint of it any more, by a listing; None: it has none.

    For clients whose knowledge of the end of the log is too old to rely on an empty slot (rule 8). A log is pruned up
    to its end only after a conversion: if no slot is left, it was converted.

    Raises
    ------
    ListingUnsupportedError, AccessDeniedError
        Nothing can be listed.
    """
    newest = await list_head(storage, epoch)
    last = await read_slot(storage, epoch, newest) if newest else None
    return Sealed(reason=CONVERT) if last is None else _seal_in(last[0])


async def seal_log(storage: Storage, sources: Sources, epoch: str, after: int) -> tuple[int, Sealed]:
    """See to it that an abandoned log ends with a seal.

    Parameters
    ----------
    after
        A slot that is known to be taken; 0: none is.

    Returns
    -------
    int
        The last slot before the seal.
    Sealed
        The seal, which may be another client's.

    Raises
    ------
    StorageError
        The store gave no certain answer; call again.
    """
    n = after
    while True:
        write = _SealWrite(storage, sources, epoch, n + 1)
        if await write.fate(False) is Fate.OPEN:
            unsure = StorageError(
                f"cannot seal the log in {storage.describe()}: no certain answer for slot {n + 1}; call again"
            )
            certain(await follow(write), unsure)
        seal = write.sealed if write.found is None else _seal_in(write.found)
        if seal is not None:
            return n, seal
        n += 1


class _SealWrite(Creation):
    """The seal of a log in one slot, recognised by its nonce."""

    def __init__(self, storage: Storage, sources: Sources, epoch: str, n: int) -> None:
        self.sealed = Sealed(reason=TAKEOVER)
        self._epoch = epoch
        self._n = n
        self._nonce = sources.random_bytes(16)
        self.found: Entry | None = None
        """The entry in the slot; None: there was none when it was last looked at."""
        super().__init__(
            storage,
            sources,
            slot_key(epoch, n),
            encode_entry(
                n=n,
                nonce=self._nonce,
                time_us=max(sources.wall_us(), 0),
                since_us=None,
                events=encode_events((self.sealed,)),
            ),
        )

    async def fate(self, may_land: bool) -> Fate:
        found = await read_slot(self.storage, self._epoch, self._n)
        if found is None:
            return Fate.OPEN
        self.found = found[0]
        return Fate.LANDED if found[0].nonce == self._nonce else Fate.LOST


async def find_stranded(
    storage: Storage, *, epoch: str, last: int, found: RepoObject | None, fallback_n: int
) -> Stranded:
    """Find the entries after the checkpoint that was taken over.

    Parameters
    ----------
    last
        Last slot before the seal.
    found
        ``repo`` as it is now.
    fallback_n
        Last checkpoint known otherwise.
    """
    after = fallback_n
    if found is not None:
        # The official library copies an object before it overwrites it: the newest copy with our marker is the one that
        # was taken over.
        for update in found.info.updates[:_BACKUPS]:
            if update.backup_path is None:
                continue
            try:
                copy = await storage.get(overwritten_repo_key(update.backup_path))
                marker = decode_marker(decode_repo(copy.data).extra)
            except (ObjectNotFoundError, FormatError):
                continue
            if marker is not None and marker.epoch == epoch:
                after = marker.n
                break
    entries = await read_tail(storage, epoch, after, last)
    return Stranded(
        epoch=epoch,
        after=after,
        entries=tuple(entry for entry in entries if not all(isinstance(event, Void) for event in entry.events)),
    )


async def seal_abandoned(storage: Storage, sources: Sources, found: RepoObject) -> Stranded | None:
    """Look for a log beside an authoritative ``repo`` object, and seal it if it is not sealed yet.

    Called where a repository of the repo-object layout is opened.

    Returns
    -------
    Stranded or None
        The entries that are in that log only; None where there is no log, or it was sealed before.
    """
    epoch = await newest_epoch(storage)
    if epoch is None:
        return None
    newest = await list_head(storage, epoch)
    last = await read_slot(storage, epoch, newest) if newest else None
    if last is None or _seal_in(last[0]) is not None:
        return None
    now = await read_repo(storage, sources)
    if now is not None and now.known.marker is not None and now.known.read_only and now.known.marker.epoch == epoch:
        # ``found`` is older than that log.
        return None
    before_seal, seal = await seal_log(storage, sources, epoch, newest)
    if seal.reason == CONVERT:
        return None
    return await find_stranded(storage, epoch=epoch, last=before_seal, found=found, fallback_n=before_seal)
