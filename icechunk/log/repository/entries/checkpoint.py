"""Writing ``repo``: checkpoints of the log, and the last write of a log that was converted (rules 7 and 8).

Each is a change of ``repo`` as `icechunk.log.repository.conditional.replace_repo` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from icechunk.errors import ErrorKind, ObjectNotFoundError, StorageError
from icechunk.format.keys import REPO_KEY, overwritten_repo_key, overwritten_repo_name
from icechunk.format.repo.codec import EncodedRepo
from icechunk.format.repo.repo_info import RepoInfo
from icechunk.log.repository.conditional import RepoChange, replace_repo
from icechunk.log.repository.entries.embedded import Embedded, make_durable
from icechunk.log.repository.entries.reader import Head
from icechunk.log.repository.entry import copy_key, epoch_prefix, parse_copy_key
from icechunk.log.repository.marker import (
    NO_FILES,
    Kept,
    Marker,
    checkpoint_info,
    encode_marker,
    keep_updates,
    unmarked_info,
)
from icechunk.log.repository.objects import Known, RepoObject, encode, known_of, put_once, read_repo
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass, replace
from icechunk.storage.port import Absent, Matches, Put, PutResult, Storage, Version

__all__ = [
    "LostRepo",
    "Written",
    "checkpoint_is_due",
    "finish_conversion",
    "write_checkpoint",
    "write_durable",
    "write_unsynced",
]

_SMALL_BYTES: Final = 64 * 1024
_LONG_TAIL: Final = 64
_HISTORY_SHARE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """``repo`` holds at least the log up to the head."""

    known: Known
    """The object as it is now."""
    info: RepoInfo | None
    """Its contents in the least memory; None where it was written before and not read now."""
    by_us: bool
    """Whether it was this call that wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LostRepo:
    """``repo`` is no checkpoint of this log any more."""

    found: RepoObject | None
    """The object that is there instead; None: there is none."""


def checkpoint_is_due(head: Head, known: Known) -> bool:
    """Whether a checkpoint is due by the policy: always while ``repo`` is small, else when the tail is long."""
    if known.marker is None or known.marker.epoch != head.epoch:
        return False
    tail = head.n - known.marker.n
    if tail <= 0:
        return False
    return known.size_bytes < _SMALL_BYTES or tail > _LONG_TAIL or tail * _HISTORY_SHARE > len(head.state.snapshots)


class _Checkpoint(RepoChange[Written | LostRepo]):
    """A checkpoint that holds the log up to a head, made durable before it is acknowledged.

    Parameters
    ----------
    embedded
        The files of the log; they become objects first of all (rule 15).
    files
        Copies of small files for the marker, which save reading them at the next open.
    updates_per_file
        Most entries of the ops log in the object.
    """

    def __init__(
        self,
        storage: Storage,
        sources: Sources,
        head: Head,
        *,
        embedded: Embedded,
        files: Mapping[str, bytes] = NO_FILES,
        updates_per_file: int,
    ) -> None:
        super().__init__(storage, sources)
        self._head = head
        self._embedded = embedded
        self._files = files
        self._updates_per_file = updates_per_file

    async def result(self, known: Known, info: RepoInfo | None) -> Written | LostRepo | None:
        # Rule 7: our epoch, a smaller n, and If-Match on exactly the version that was compared.
        if known.marker is None or known.marker.epoch != self._head.epoch or not known.read_only:
            return LostRepo(found=await read_repo(self.storage, self.sources))
        return Written(known=known, info=info, by_us=False) if self._is_done(known, known.marker) else None

    def _is_done(self, known: Known, marker: Marker) -> bool:
        """Whether the object holds the log up to the head, or further."""
        return marker.n >= self._head.n and known.copy is None

    async def make(self, known: Known, info: RepoInfo | None) -> EncodedRepo | None:
        assert known.marker is not None
        await self._embedded.materialize(known.marker.n, self._head.n)
        return await self._encode(known, None)

    async def _encode(self, known: Known, durable: int | None) -> EncodedRepo | None:
        head = self._head
        kept = await _divide_updates(self.storage, self.sources, head, known, self._updates_per_file)
        if kept is None:
            return None
        return await encode(
            checkpoint_info(head.state, epoch=head.epoch, n=head.n, durable=durable, kept=kept, files=self._files)
        )

    async def landed(self, known: Known, encoded: EncodedRepo, put: PutResult) -> Written:
        return Written(known=known_of(encoded.info, put.version, len(encoded.data)), info=encoded.info, by_us=True)

    def gone(self) -> LostRepo:
        return LostRepo(found=None)

    def unsure(self) -> StorageError:
        return StorageError(
            f"cannot write the checkpoint of {self.storage.describe()}: no certain answer; the next commit tries "
            "again, and nothing is lost",
            ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
        )


class _UnsyncedCheckpoint(_Checkpoint):
    """A checkpoint written without waiting for the disk, together with the embedded files."""

    _puts: Sequence[Put] = ()

    async def make(self, known: Known, info: RepoInfo | None) -> EncodedRepo | None:
        assert known.marker is not None
        files = await self._embedded.embedded_files(known.marker.n, self._head.n)
        self._puts = [Put(key, data, Absent()) for key, data in files.items()]
        return await self._encode(known, known.marker.durable)

    async def put(self, encoded: EncodedRepo, base: Version) -> PutResult | None:
        answers = await self.storage.put_unsynced([*self._puts, Put(REPO_KEY, encoded.data, Matches(base))])
        return answers[-1]


class _DurableCheckpoint(_Checkpoint):
    """A checkpoint with its durable copy, after the files of all entries that it holds were made durable."""

    _ended: Written | LostRepo | None = None

    async def result(self, known: Known, info: RepoInfo | None) -> Written | LostRepo | None:
        return self._ended or await super().result(known, info)

    def _is_done(self, known: Known, marker: Marker) -> bool:
        return marker.durable is not None and marker.durable >= self._head.n and known.copy is None

    async def make(self, known: Known, info: RepoInfo | None) -> EncodedRepo | None:
        assert known.marker is not None
        head, after = self._head, known.marker.durable_n
        there = await make_durable(self.storage, head.epoch, after, head.n)
        if not there and head.n > after:
            # Such a slot is never pruned: the folder was removed, and must not come back.
            self._ended = LostRepo(found=await read_repo(self.storage, self.sources))
            return None
        encoded = await self._encode(known, head.n)
        if encoded is None:
            return None
        await self._keep_copy(encoded)
        if known.marker.n > head.n:
            self._ended = Written(known=known, info=info, by_us=False)
            return None
        return encoded

    async def _keep_copy(self, encoded: EncodedRepo) -> None:
        await put_once(self.storage, copy_key(self._head.epoch, self._head.n), encoded.data)

    async def landed(self, known: Known, encoded: EncodedRepo, put: PutResult) -> Written:
        marker = known.marker
        if marker is not None and marker.durable is not None:
            # The copy has been replaced. Pruning deletes those that remain.
            await self.storage.delete([copy_key(marker.epoch, marker.durable)])
        return await super().landed(known, encoded, put)


class _LastCheckpoint(_DurableCheckpoint):
    """The checkpoint up to the slot before a seal: durable, and without a copy.

    No client replaces it without waiting for the disk, since none folds more, so no power failure can tear it.
    """

    async def _keep_copy(self, encoded: EncodedRepo) -> None:
        pass


async def write_checkpoint(
    storage: Storage,
    sources: Sources,
    head: Head,
    known: Known,
    *,
    embedded: Embedded,
    files: Mapping[str, bytes] = NO_FILES,
    updates_per_file: int,
) -> Written | LostRepo:
    """Bring ``repo`` forward to ``head``, if it is behind and still a checkpoint of the same log.

    Parameters
    ----------
    known
        The object as it was last seen; it is read again where that is not its version any more.
    embedded
        The files of the log; those of the entries after the checkpoint become objects first of all (rule 15).
    files
        Copies of small files for the marker, which save reading them at the next open.

    Raises
    ------
    StorageError
        The store gives no answer; nothing is lost, the next checkpoint tries again.
    """
    change = _Checkpoint(storage, sources, head, embedded=embedded, files=files, updates_per_file=updates_per_file)
    return await replace_repo(change, known)


async def write_unsynced(
    storage: Storage, sources: Sources, head: Head, known: Known, *, embedded: Embedded, updates_per_file: int
) -> Written | LostRepo:
    """As `write_checkpoint` if syncs are deferred: without waiting for any. Parameters and errors are the same.

    Requires a durable copy of an earlier checkpoint; ``known`` is that checkpoint or a later one of the same log.
    """
    change = _UnsyncedCheckpoint(storage, sources, head, embedded=embedded, updates_per_file=updates_per_file)
    return await replace_repo(change, known)


async def write_durable(
    storage: Storage, sources: Sources, head: Head, known: Known, *, embedded: Embedded, updates_per_file: int
) -> Written | LostRepo:
    """If syncs are deferred: make the files of the log up to ``head`` durable, then the checkpoint and its copy.

    Parameters, and errors, as `write_checkpoint`. A ``repo`` that is ahead of ``head`` is not changed.
    """
    change = _DurableCheckpoint(storage, sources, head, embedded=embedded, updates_per_file=updates_per_file)
    return await replace_repo(change, known)


async def _divide_updates(
    storage: Storage, sources: Sources, head: Head, current: Known, updates_per_file: int
) -> Kept | None:
    """Divide the ops log, and make the backup if it takes one; None where ``repo`` has changed meanwhile."""
    kept = keep_updates(
        head.state,
        newest_us=current.newest_us,
        count=current.count,
        before=current.before,
        limit=updates_per_file,
        backup_name=overwritten_repo_name(sources.wall_us() // 1000, sources.random_bytes(12)),
    )
    if not kept.needs_backup or kept.before is None:
        return kept
    marker, backup = current.marker, overwritten_repo_key(kept.before)
    if marker is not None and marker.files:
        found = await read_repo(storage, sources)
        if found is None or found.known.version != current.version:
            return None
        # Backups are kept for their updates, and for ever: what chunks hold does not belong there.
        info = replace(found.info, extra=encode_marker(replace(marker, files={})))
        await storage.put(backup, (await encode(info)).data)
        return kept
    try:
        if (await storage.head(REPO_KEY)).version != current.version:
            return None
        # If another version comes now, the PUT below fails and no object names this copy.
        await storage.copy(REPO_KEY, backup)
    except ObjectNotFoundError:
        return None
    return kept


class _Conversion(RepoChange[bool]):
    """The end of a log: ``repo`` becomes authoritative for every writer of the format."""

    def __init__(
        self, storage: Storage, sources: Sources, head: Head, *, embedded: Embedded, updates_per_file: int
    ) -> None:
        super().__init__(storage, sources)
        self._head = head
        self._embedded = embedded
        self._updates_per_file = updates_per_file

    async def result(self, known: Known, info: RepoInfo | None) -> bool | None:
        is_checkpoint = known.marker is not None and known.marker.epoch == self._head.epoch and known.read_only
        return None if is_checkpoint else True

    async def make(self, known: Known, info: RepoInfo | None) -> EncodedRepo | None:
        head, marker = self._head, known.marker
        assert marker is not None
        await self._embedded.materialize(marker.n, head.n)
        kept = await _divide_updates(self.storage, self.sources, head, known, self._updates_per_file)
        return None if kept is None else await encode(unmarked_info(head.state, kept=kept))

    async def landed(self, known: Known, encoded: EncodedRepo, put: PutResult) -> bool:
        return True

    def gone(self) -> bool:
        return True

    def unsure(self) -> StorageError:
        return StorageError(
            f"cannot finish the conversion of {self.storage.describe()}: no certain answer; opening the repository "
            "tries again",
            ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
        )


async def finish_conversion(
    storage: Storage, sources: Sources, head: Head, *, embedded: Embedded, updates_per_file: int
) -> None:
    """Make ``repo`` authoritative after a seal has been folded, unless another client has done so (rule 8).

    All helpers write the same state, so it does not matter whose write wins. Parameters as for `write_checkpoint`.
    """
    if storage.defers_syncs:
        await _end_copies(storage, sources, head, embedded=embedded, updates_per_file=updates_per_file)
    await replace_repo(_Conversion(storage, sources, head, embedded=embedded, updates_per_file=updates_per_file))


async def _end_copies(
    storage: Storage, sources: Sources, head: Head, *, embedded: Embedded, updates_per_file: int
) -> None:
    """Make ``repo`` durable up to the slot before a seal, then delete the durable copies of the log.

    Until then a power failure may tear ``repo``, and a copy is needed. From then on none is, and none may be left when
    ``repo`` becomes authoritative: if another library's write of it is torn later, a copy would bring back the past.
    """
    before = replace(head, n=head.n - 1, state=replace(head.state, seal=None))
    await replace_repo(_LastCheckpoint(storage, sources, before, embedded=embedded, updates_per_file=updates_per_file))
    copies = [
        item.key
        async for page in storage.list_pages(epoch_prefix(head.epoch))
        for item in page
        if parse_copy_key(item.key) is not None
    ]
    if copies and (failures := (await storage.delete(copies)).failures):
        raise StorageError(
            f"cannot finish the conversion of {storage.describe()}, {failures[0][0]!r} cannot be deleted: "
            f"{failures[0][1]}; opening the repository tries again"
        )
