"""Creating a repository of the log layout: exactly one creator wins (rule 11)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeAlias

from icechunk.errors import (
    AlreadyExistsError,
    ErrorKind,
    InvalidInputError,
    ObjectNotFoundError,
    PreconditionFailedError,
    ReadOnlyError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.format.keys import REFS_PREFIX, REPO_KEY, snapshot_key, transaction_key
from icechunk.format.repo import encode_repo
from icechunk.format.repo_values import SnapshotRecord
from icechunk.format.snapshot import decode_snapshot, encode_snapshot
from icechunk.format.tables import Snapshot, TransactionLog
from icechunk.format.transaction import encode_transaction_log
from icechunk.refs.entry import new_epoch
from icechunk.refs.log_layout import LogLayout
from icechunk.refs.log_reader import Head, Opened, instant, known_of, read_repo
from icechunk.refs.marker import checkpoint_info
from icechunk.refs.proof import Instant
from icechunk.refs.state import initial_state
from icechunk.refs.store_check import require_atomic
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Absent, Storage
from icechunk.tasks import run_jobs

__all__ = ["FIRST_MESSAGE", "FIRST_METADATA", "create_log", "put_first_files", "require_clean"]

Json: TypeAlias = Any

FIRST_MESSAGE: Final = "Repository initialized"
FIRST_METADATA: Final = {"__icechunk": {"is_root": True}}
_ATTEMPTS: Final = 10


async def create_log(
    storage: Storage,
    sources: Sources = SYSTEM,
    *,
    config: Json | None = None,
    check_clean_root: bool = True,
    updates_per_file: int | None = None,
) -> LogLayout:
    """Create a repository with one empty snapshot on ``main``.

    Parameters
    ----------
    config
        The configuration to persist, as the format keeps it (snake_case keys); None: none.
    check_clean_root
        Refuse where anything at all is below the prefix.

    Raises
    ------
    InvalidInputError
        Something is there already (kind ``parent-directory-not-clean``).
    AlreadyExistsError
        Another creator was first, or the root was not checked and there is a repository.
    ReadOnlyError
        The storage cannot be written to.
    StorageError
        No certain answer: the repository may exist now; try to open it. Or the storage does without conditional
        writes (kind ``storage-config``): nothing was written.
    """
    if not storage.supports_writes:
        raise ReadOnlyError(
            f"cannot create a repository: {storage.describe()} can only be read", ErrorKind.READ_ONLY_STORAGE
        )
    require_atomic(storage)
    await require_clean(storage, everything=check_clean_root)
    root = await put_first_files(storage, sources)
    record = SnapshotRecord(
        id=root.id, parent=None, flushed_at_us=root.flushed_at_us, message=root.message, metadata=root.metadata
    )
    now_us = max(sources.wall_us(), root.flushed_at_us + 1)
    epoch = new_epoch(sources.random_bytes(12), sources.wall_us())
    head = Head(epoch=epoch, n=0, state=initial_state(record, time_us=now_us, config=config))
    info = checkpoint_info(head.state, epoch=epoch, n=0)
    data = encode_repo(info)
    proof: Instant | None = None
    for attempt in range(_ATTEMPTS):
        if attempt:
            await sources.sleep(min(1.0, 0.02 * 2**attempt))
        asked = instant(sources)
        try:
            put = await storage.put(REPO_KEY, data, Absent())
        except (PreconditionFailedError, StorageError):
            # Settled as a slot is: a marker with our epoch is our own success, whatever the answer was.
            try:
                found = await read_repo(storage, sources)
            except StorageError:
                continue
            if found is None:
                continue
            if found.known.marker is None or found.known.marker.epoch != epoch:
                raise AlreadyExistsError(
                    f"cannot create a repository in {storage.describe()}: there is one already; open it, or choose "
                    "another prefix",
                    ErrorKind.PARENT_DIRECTORY_NOT_CLEAN,
                ) from None
            proof, known = found.asked, found.known
            break
        proof = replace(asked, date_us=put.date_us)
        known = known_of(info, put.version, len(data))
        break
    if proof is None:
        raise StorageError(
            f"it is not known whether a repository was created in {storage.describe()}: no certain answer after "
            f"{_ATTEMPTS} tries; try to open it"
        )
    await require_clean(storage, everything=False)
    opened = Opened(head=head, proof=proof, known=known, tail=())
    return LogLayout(storage, sources, opened, updates_per_file=updates_per_file)


async def require_clean(storage: Storage, *, everything: bool) -> None:
    """Refuse a place where a repository of format 1 is, or, if asked, anything.

    Raises
    ------
    InvalidInputError
        Kind ``parent-directory-not-clean``.
    """
    prefix = "" if everything else REFS_PREFIX
    pages = storage.list_pages(prefix, page_size=1)
    try:
        async for page in pages:
            if page:
                raise InvalidInputError(
                    f"cannot create a repository in {storage.describe()}: {page[0].key!r} is there already; choose an "
                    "empty prefix, or open the repository that is there",
                    ErrorKind.PARENT_DIRECTORY_NOT_CLEAN,
                )
    finally:
        aclose = getattr(pages, "aclose", None)
        if aclose is not None:
            await aclose()


async def put_first_files(storage: Storage, sources: Sources) -> Snapshot:
    """Create the first snapshot and its transaction log, or use those of a creator who was first.

    The key is a constant, so a loser must not replace what the winner's ``repo`` describes.
    """
    root = Snapshot(
        id=FIRST_SNAPSHOT,
        nodes={},
        flushed_at_us=max(sources.wall_us(), 1),
        message=FIRST_MESSAGE,
        metadata=FIRST_METADATA,
    )
    snapshot_bytes = encode_snapshot(root)
    log_bytes = encode_transaction_log(TransactionLog(id=FIRST_SNAPSHOT))
    found = await run_jobs(
        [
            partial(_put_or_read, storage, sources, snapshot_key(FIRST_SNAPSHOT), snapshot_bytes),
            partial(_put_or_read, storage, sources, transaction_key(FIRST_SNAPSHOT), log_bytes),
        ]
    )
    return root if found[0] == snapshot_bytes else decode_snapshot(found[0], expected_id=FIRST_SNAPSHOT)


async def _put_or_read(storage: Storage, sources: Sources, key: str, data: bytes) -> bytes:
    """The bytes that stand at the key: these, if nothing stood there before."""
    why: StorageError | None = None
    for attempt in range(_ATTEMPTS):
        if attempt:
            await sources.sleep(min(1.0, 0.02 * 2**attempt))
        try:
            await storage.put(key, data, Absent())
            return data
        except (PreconditionFailedError, StorageError) as error:
            why = error
        try:
            return (await storage.get(key)).data
        except ObjectNotFoundError:
            continue
        except StorageError as error:
            why = error
    raise StorageError(f"cannot create {key!r} in {storage.describe()}: no certain answer") from why
