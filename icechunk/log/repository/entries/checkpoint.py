"""Writing ``repo``: checkpoints of the log, and moving between log and repo object (rules 7 and 8).

Every write of ``repo`` compares first: it goes on only from an object whose contents are folded into what is
written, and replaces exactly that version.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from icechunk.errors import ErrorKind, ObjectNotFoundError, PreconditionFailedError, StorageError
from icechunk.format.keys import REPO_KEY, overwritten_repo_key, overwritten_repo_name
from icechunk.format.repo.repo_info import RepoInfo
from icechunk.log.repository.entries.embedded import Materialize, make_durable, nothing_embedded
from icechunk.log.repository.entries.reader import Head
from icechunk.log.repository.entry import copy_key
from icechunk.log.repository.marker import (
    NO_FILES,
    Kept,
    Marker,
    checkpoint_info,
    encode_marker,
    keep_updates,
    unmarked_info,
)
from icechunk.log.repository.objects import Known, RepoObject, encode, known_of, read_repo
from icechunk.runtime.clock import Sources
from icechunk.storage.outcome import is_refusal
from icechunk.storage.port import Absent, Matches, Put, Storage

__all__ = [
    "Embedded",
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
_ATTEMPTS: Final = 20

Embedded: TypeAlias = Callable[[int, int], Awaitable[Mapping[str, bytes]]]
"""Returns the files embedded in the entries after a slot, up to another (inclusive), that have no known object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """``repo`` holds at least what was to be written."""

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


async def write_checkpoint(
    storage: Storage,
    sources: Sources,
    head: Head,
    known: Known,
    *,
    materialize: Materialize = nothing_embedded,
    files: Mapping[str, bytes] = NO_FILES,
    updates_per_file: int,
) -> Written | LostRepo:
    """Bring ``repo`` forward to ``head``, if it is behind and still a checkpoint of the same log.

    Parameters
    ----------
    known
        The object as it was last seen; it is read again where that is not its version any more.
    materialize
        Makes objects of the files embedded in the entries after the checkpoint, first of all (rule 15).
    files
        Copies of small files for the marker, which save reading them at the next open.

    Raises
    ------
    StorageError
        The store gives no answer; nothing is lost, the next checkpoint tries again.
    """
    current, info = known, None
    for _ in range(_ATTEMPTS):
        # Rule 7: our epoch, a smaller n, and If-Match on exactly the version that was compared.
        if current.marker is None or current.marker.epoch != head.epoch or not current.read_only:
            return LostRepo(found=await read_repo(storage, sources))
        if current.marker.n >= head.n:
            return Written(known=current, info=info, by_us=False)
        await materialize(current.marker.n, head.n)
        kept = await _divide_updates(storage, sources, head, current, updates_per_file)
        if kept is not None:
            encoded = await encode(checkpoint_info(head.state, epoch=head.epoch, n=head.n, kept=kept, files=files))
            try:
                put = await storage.put(REPO_KEY, encoded.data, Matches(current.version))
                return Written(
                    known=known_of(encoded.info, put.version, len(encoded.data)), info=encoded.info, by_us=True
                )
            except PreconditionFailedError:
                pass
            except StorageError as error:
                if is_refusal(error):
                    raise
                await sources.sleep(0.05)
        found = await read_repo(storage, sources)
        if found is None:
            return LostRepo(found=None)
        current, info = found.known, found.info
    raise _no_certain_answer(storage)


async def write_unsynced(
    storage: Storage,
    sources: Sources,
    head: Head,
    known: Known,
    *,
    embedded: Embedded,
    updates_per_file: int,
) -> Written | LostRepo:
    """As `write_checkpoint` if syncs are deferred: without waiting for any. Parameters and errors are the same.

    Requires a durable copy of an earlier checkpoint; ``known`` is that checkpoint or a later one of the same log.
    """
    current, info = known, None
    for _ in range(_ATTEMPTS):
        if current.marker is None or current.marker.epoch != head.epoch or not current.read_only:
            return LostRepo(found=await read_repo(storage, sources))
        if current.marker.n >= head.n and current.copy is None:
            return Written(known=current, info=info, by_us=False)
        restored = await _restore(storage, current)
        kept = None if restored is None else await _divide_updates(storage, sources, head, restored, updates_per_file)
        if restored is not None and kept is not None:
            files = await embedded(current.marker.n, head.n)
            encoded = await encode(
                checkpoint_info(head.state, epoch=head.epoch, n=head.n, durable=current.marker.durable, kept=kept)
            )
            puts = [Put(key, data, Absent()) for key, data in files.items()]
            answers = await storage.put_unsynced([*puts, Put(REPO_KEY, encoded.data, Matches(restored.version))])
            if (answer := answers[-1]) is not None:
                written = known_of(encoded.info, answer.version, len(encoded.data))
                return Written(known=written, info=encoded.info, by_us=True)
        found = await read_repo(storage, sources)
        if found is None:
            return LostRepo(found=None)
        current, info = found.known, found.info
    raise _no_certain_answer(storage)


async def write_durable(
    storage: Storage, sources: Sources, head: Head, known: Known, *, updates_per_file: int
) -> Written | LostRepo:
    """If syncs are deferred: make the files of the log up to ``head`` durable, then the checkpoint and its copy.

    Parameters, and errors, as `write_checkpoint`. A ``repo`` that is ahead of ``head`` is not changed.
    """
    current, info = known, None
    for _ in range(_ATTEMPTS):
        if current.marker is None or current.marker.epoch != head.epoch or not current.read_only:
            return LostRepo(found=await read_repo(storage, sources))
        if current.marker.durable is not None and current.marker.durable >= head.n and current.copy is None:
            return Written(known=current, info=info, by_us=False)
        restored = await _restore(storage, current)
        kept = None if restored is None else await _divide_updates(storage, sources, head, restored, updates_per_file)
        if restored is not None and kept is not None:
            there = await make_durable(storage, head.epoch, current.marker.durable_n, head.n)
            if not there and head.n > current.marker.durable_n:
                # Such a slot is never pruned: the folder was removed, and must not come back.
                return LostRepo(found=await read_repo(storage, sources))
            encoded = await encode(checkpoint_info(head.state, epoch=head.epoch, n=head.n, durable=head.n, kept=kept))
            with suppress(PreconditionFailedError):
                await storage.put(copy_key(head.epoch, head.n), encoded.data, Absent())
            if current.marker.n > head.n:
                return Written(known=current, info=info, by_us=False)
            with suppress(PreconditionFailedError):
                put = await storage.put(REPO_KEY, encoded.data, Matches(restored.version))
                await _delete_copy(storage, current.marker)
                return Written(
                    known=known_of(encoded.info, put.version, len(encoded.data)), info=encoded.info, by_us=True
                )
        found = await read_repo(storage, sources)
        if found is None:
            return LostRepo(found=None)
        current, info = found.known, found.info
    raise _no_certain_answer(storage)


async def _restore(storage: Storage, current: Known) -> Known | None:
    """Replace a torn ``repo`` by its durable copy; None if another client has replaced it meanwhile."""
    if current.copy is None:
        return current
    try:
        put = await storage.put(REPO_KEY, current.copy, Matches(current.version))
    except PreconditionFailedError:
        return None
    return replace(current, version=put.version, copy=None)


async def _delete_copy(storage: Storage, marker: Marker) -> None:
    """Delete the durable copy that a checkpoint names, which has been replaced. Pruning deletes those that remain."""
    if marker.durable is not None:
        await storage.delete([copy_key(marker.epoch, marker.durable)])


def _no_certain_answer(storage: Storage) -> StorageError:
    return StorageError(
        f"cannot write the checkpoint of {storage.describe()}: no certain answer after {_ATTEMPTS} tries; the next "
        "commit tries again, and nothing is lost",
        ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
    )


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
    if kept.needs_backup and kept.before is not None:
        # A copy of any version: if that is not the one replaced below, the PUT fails and no object names this copy.
        found = await read_repo(storage, sources)
        if found is None:
            return None
        marker = found.known.marker
        if marker is not None and marker.files:
            # Backups are kept for their updates, and for ever: what chunks hold does not belong there.
            info = replace(found.info, extra=encode_marker(replace(marker, files={})))
            await storage.put(overwritten_repo_key(kept.before), (await encode(info)).data)
            return kept
        try:
            await storage.copy(REPO_KEY, overwritten_repo_key(kept.before))
        except ObjectNotFoundError:
            return None
    return kept


async def finish_conversion(
    storage: Storage,
    sources: Sources,
    head: Head,
    *,
    materialize: Materialize = nothing_embedded,
    updates_per_file: int,
) -> RepoObject | None:
    """After a seal has been folded: make ``repo`` authoritative, unless another client has done so (rule 8).

    All helpers write the same state, so it does not matter whose write wins.

    Parameters
    ----------
    materialize
        As for `write_checkpoint`.

    Returns
    -------
    RepoObject or None
        ``repo`` as it is afterwards; None if it is gone.
    """
    for _ in range(_ATTEMPTS):
        found = await read_repo(storage, sources)
        if found is None or found.known.marker is None or found.known.marker.epoch != head.epoch:
            return found
        if not found.known.read_only:
            return found
        current = await _restore(storage, found.known)
        if current is None:
            continue
        await materialize(found.known.marker.n, head.n)
        if storage.defers_syncs:
            await make_durable(storage, head.epoch, found.known.marker.durable_n, head.n)
        kept = await _divide_updates(storage, sources, head, current, updates_per_file)
        if kept is None:
            continue
        encoded = await encode(unmarked_info(head.state, kept=kept))
        try:
            await storage.put(REPO_KEY, encoded.data, Matches(current.version))
            await _delete_copy(storage, found.known.marker)
        except PreconditionFailedError:
            continue
        except StorageError as error:
            if is_refusal(error):
                raise
            await sources.sleep(0.05)
    raise StorageError(
        f"cannot finish the conversion of {storage.describe()}: no certain answer after {_ATTEMPTS} tries; opening the "
        "repository tries again",
        ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
    )
