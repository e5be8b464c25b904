"""A session by one URL: the repository, the version and the mode in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from icechunk.config import RepositoryConfig
from icechunk.credentials import AnyCredential
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.repository.repository import Repository
from icechunk.runtime.twins import run_sync
from icechunk.session import Session
from icechunk.storage.url import RepositoryUrl, parse_url, storage_at

__all__ = ["Mode", "open_async", "open_sync", "session_at"]

Mode: TypeAlias = Literal["r", "r+", "a"]


async def open_async(
    url: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    storage_options: Mapping[str, Any] | None = None,
    config: RepositoryConfig | None = None,
    authorize_virtual_chunk_access: dict[str, AnyCredential | None] | None = None,
) -> Session:
    """Open a repository at a version, by one URL.

    Parameters
    ----------
    url
        ``{place}`` or ``{place}|icechunk:[@branch.NAME | @tag.NAME | @SNAPSHOT]``, as `icechunk.storage.url` says:
        ``s3://bucket/prefix|icechunk:@tag.v1``, ``/data/repo``. Branch ``main`` where no version is named.
    mode
        "r": a read-only session; "r+": a writable session on the branch; "a": the same, and the repository is created
        where there is none.
    storage_options
        Keyword arguments of the storage: see `icechunk.storage_from_url`.
    config, authorize_virtual_chunk_access
        As for `Repository.open`.

    Returns
    -------
    Session
        Its ``store`` is the argument for zarr and xarray.

    Raises
    ------
    InvalidInputError
        Kind ``cannot-parse-url``: the URL is wrong, or names a path (`zarr.open` takes it beside ``session.store``);
        kind ``invalid-setting``: a mode that does not exist, or a writable one for a tag or a snapshot.
    RepositoryNotFoundError, RefNotFoundError, SnapshotNotFoundError
        There is no such repository or version.
    """
    parsed = parse_url(url)
    if parsed.path:
        raise InvalidInputError(
            f"cannot open {parsed.path!r} as a repository: icechunk.open gives a session, whose store has all nodes; "
            "leave the path out, and name it to zarr or xarray",
            ErrorKind.CANNOT_PARSE_URL,
        )
    return await session_at(
        parsed,
        mode,
        storage_options=storage_options,
        config=config,
        authorize_virtual_chunk_access=authorize_virtual_chunk_access,
    )


async def session_at(
    url: RepositoryUrl,
    mode: Mode = "r",
    *,
    storage_options: Mapping[str, Any] | None = None,
    config: RepositoryConfig | None = None,
    authorize_virtual_chunk_access: dict[str, AnyCredential | None] | None = None,
) -> Session:
    """The session that a parsed URL names; its path does not matter. Errors are those of `open_async`."""
    if mode not in ("r", "r+", "a"):
        raise InvalidInputError(f"mode must be 'r', 'r+' or 'a', not {mode!r}", ErrorKind.INVALID_SETTING)
    if mode != "r" and (url.tag or url.snapshot_id):
        raise InvalidInputError(
            f"cannot write to {url.tag or url.snapshot_id!r}: only branches take changes; name one with @branch.NAME",
            ErrorKind.INVALID_SETTING,
        )
    storage = storage_at(url, storage_options)
    opening = Repository.open_or_create_async if mode == "a" else Repository.open_async
    repository = await opening(storage, config=config, authorize_virtual_chunk_access=authorize_virtual_chunk_access)
    if mode == "r":
        return await repository.readonly_session_async(**url.version)
    return await repository.writable_session_async(url.branch or "main")


def open_sync(
    url: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    storage_options: Mapping[str, Any] | None = None,
    config: RepositoryConfig | None = None,
    authorize_virtual_chunk_access: dict[str, AnyCredential | None] | None = None,
) -> Session:
    """Synchronous twin of `open_async`; public as ``icechunk.open``."""
    return run_sync(
        open_async(
            url,
            mode,
            storage_options=storage_options,
            config=config,
            authorize_virtual_chunk_access=authorize_virtual_chunk_access,
        )
    )
