"""Creating a repository of the log layout: exactly one creator wins (rule 11)."""

from __future__ import annotations

from dataclasses import replace

from icechunk.errors import PreconditionFailedError, StorageError
from icechunk.format.keys import REPO_KEY
from icechunk.format.repo import encode_repo
from icechunk.format.repo_values import RepoInfo
from icechunk.refs.create import (
    ATTEMPTS,
    Json,
    already_there,
    first_state,
    pause_before,
    require_clean,
    require_place,
    unsure,
)
from icechunk.refs.entry import new_epoch
from icechunk.refs.log_layout import LogLayout
from icechunk.refs.log_reader import Head, Known, Opened, instant, known_of, read_repo
from icechunk.refs.marker import checkpoint_info
from icechunk.refs.proof import Instant
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Absent, Storage

__all__ = ["create_log"]


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
    await require_place(storage, check_clean_root=check_clean_root)
    state = await first_state(storage, sources, config=config)
    epoch = new_epoch(sources.random_bytes(12), sources.wall_us())
    head = Head(epoch=epoch, n=0, state=state)
    info = checkpoint_info(state, epoch=epoch, n=0)
    proof, known = await _swap_in(storage, sources, epoch, info)
    await require_clean(storage, everything=False)
    opened = Opened(head=head, proof=proof, known=known, tail=())
    return LogLayout(storage, sources, opened, updates_per_file=updates_per_file)


async def _swap_in(storage: Storage, sources: Sources, epoch: str, info: RepoInfo) -> tuple[Instant, Known]:
    """Make ``repo`` the marker of this log, and say since when it is, and what stands there."""
    data = encode_repo(info)
    for attempt in range(ATTEMPTS):
        await pause_before(sources, attempt)
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
                raise already_there(storage) from None
            return found.asked, found.known
        return replace(asked, date_us=put.date_us), known_of(info, put.version, len(data))
    raise unsure(storage)
