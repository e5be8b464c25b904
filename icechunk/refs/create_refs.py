"""Creating a repository of the ref-files layout: exactly one creator wins (rule 11)."""

from __future__ import annotations

from contextlib import suppress

from icechunk.config import config_from_dict, config_to_yaml
from icechunk.errors import ObjectNotFoundError, PreconditionFailedError
from icechunk.format.ids import FIRST_SNAPSHOT
from icechunk.format.keys import CONFIG_KEY, REPO_KEY, snapshot_key
from icechunk.format.snapshot import encode_snapshot
from icechunk.refs.create import Json, already_there, first_snapshot, require_place
from icechunk.refs.ref_files_layout import RefFilesLayout
from icechunk.refs.ref_names import RefNames, encode_ref
from icechunk.refs.state import MAIN
from icechunk.sources import SYSTEM, Sources
from icechunk.storage.base import Absent, Storage

__all__ = ["create_ref_files"]


async def create_ref_files(
    storage: Storage, sources: Sources = SYSTEM, *, config: Json | None = None, check_clean_root: bool = True
) -> RefFilesLayout:
    """Create a repository of format 1 with one empty snapshot on ``main``; parameters and errors as `create_log`.

    The branch is created last, if it is absent: of several creators one wins.
    """
    await require_place(storage, check_clean_root=check_clean_root)
    if not check_clean_root:
        with suppress(ObjectNotFoundError):
            await storage.head(REPO_KEY)
            raise already_there(storage)
    with suppress(PreconditionFailedError):
        await storage.put(snapshot_key(FIRST_SNAPSHOT), encode_snapshot(first_snapshot(sources), 1), Absent())
    if config is not None:
        with suppress(PreconditionFailedError):
            await storage.put(CONFIG_KEY, config_to_yaml(config_from_dict(config)), Absent())
    names = RefNames.of(storage)
    try:
        await storage.put(names.branch_key(MAIN), encode_ref(FIRST_SNAPSHOT), Absent())
    except PreconditionFailedError:
        raise already_there(storage) from None
    return await RefFilesLayout.open(storage, sources)
