"""Creating a repository of the ref-files layout: exactly one creator wins (rule 11)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeAlias

from icechunk.config import config_from_dict, config_to_yaml
from icechunk.errors import (
    AlreadyExistsError,
    ErrorKind,
    ObjectNotFoundError,
    PreconditionFailedError,
    ReadOnlyError,
)
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.format.keys import CONFIG_KEY, REPO_KEY, snapshot_key
from icechunk.format.snapshot import encode_snapshot
from icechunk.format.tables import Snapshot
from icechunk.refs.create import FIRST_MESSAGE, FIRST_METADATA, require_clean
from icechunk.refs.ref_files_layout import RefFilesLayout
from icechunk.refs.ref_names import RefNames, encode_ref
from icechunk.refs.state import MAIN
from icechunk.refs.store_check import require_atomic
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Absent, Storage

__all__ = ["create_ref_files"]

Json: TypeAlias = Any


async def create_ref_files(
    storage: Storage, sources: Sources = SYSTEM, *, config: Json | None = None, check_clean_root: bool = True
) -> RefFilesLayout:
    """Create a repository of format 1 with one empty snapshot on ``main``; parameters and errors as `create_log`.

    The branch is created last, if it is absent: of several creators one wins.
    """
    if not storage.supports_writes:
        raise ReadOnlyError(
            f"cannot create a repository: {storage.describe()} can only be read", ErrorKind.READ_ONLY_STORAGE
        )
    require_atomic(storage)
    await require_clean(storage, everything=check_clean_root)
    if not check_clean_root:
        with suppress(ObjectNotFoundError):
            await storage.head(REPO_KEY)
            raise _exists(storage)
    root = Snapshot(
        id=FIRST_SNAPSHOT,
        nodes={},
        flushed_at_us=max(sources.wall_us(), 1),
        message=FIRST_MESSAGE,
        metadata=FIRST_METADATA,
    )
    with suppress(PreconditionFailedError):
        await storage.put(snapshot_key(FIRST_SNAPSHOT), encode_snapshot(root, 1), Absent())
    if config is not None:
        with suppress(PreconditionFailedError):
            await storage.put(CONFIG_KEY, config_to_yaml(config_from_dict(config)), Absent())
    names = RefNames.of(storage)
    try:
        await storage.put(names.branch_key(MAIN), encode_ref(FIRST_SNAPSHOT), Absent())
    except PreconditionFailedError:
        raise _exists(storage) from None
    return await RefFilesLayout.open(storage, sources)


def _exists(storage: Storage) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"cannot create a repository in {storage.describe()}: there is one already; open it, or choose another prefix",
        ErrorKind.PARENT_DIRECTORY_NOT_CLEAN,
    )
