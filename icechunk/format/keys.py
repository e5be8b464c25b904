"""Keys of a repository's objects, relative to its root prefix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from icechunk.format.ids import ObjectId, encode_id, encode_ids

__all__ = [
    "CHUNKS_PREFIX",
    "CONFIG_KEY",
    "MANIFESTS_PREFIX",
    "OVERWRITTEN_PREFIX",
    "REFS_PREFIX",
    "REPO_KEY",
    "SESSIONS_PREFIX",
    "SNAPSHOTS_PREFIX",
    "TRANSACTIONS_PREFIX",
    "chunk_key",
    "manifest_key",
    "manifest_keys",
    "overwritten_config_key",
    "overwritten_repo_key",
    "overwritten_repo_name",
    "recent_chunk_key",
    "snapshot_key",
    "snapshot_keys",
    "transaction_key",
]

REPO_KEY: Final = "repo"
"""The repo info of format 2."""
CONFIG_KEY: Final = "config.yaml"
"""The persisted configuration of format 1."""
SNAPSHOTS_PREFIX: Final = "snapshots/"
MANIFESTS_PREFIX: Final = "manifests/"
TRANSACTIONS_PREFIX: Final = "transactions/"
CHUNKS_PREFIX: Final = "chunks/"
REFS_PREFIX: Final = "refs/"
SESSIONS_PREFIX: Final = "sessions/"
"""Segments of persisted sessions; the official library ignores them."""
OVERWRITTEN_PREFIX: Final = "overwritten/"
"""Copies of mutable objects, made before each overwrite."""

_YEAR_3000_MS: Final = 32_503_680_000_000
_BACKUP_RANDOM_BYTES: Final = 12


def snapshot_key(id: ObjectId) -> str:
    """Key of a snapshot."""
    return SNAPSHOTS_PREFIX + encode_id(id)


def snapshot_keys(ids: Sequence[ObjectId]) -> list[str]:
    """Keys of many snapshots."""
    return [SNAPSHOTS_PREFIX + text for text in encode_ids(ids)]


def manifest_key(id: ObjectId) -> str:
    """Key of a manifest."""
    return MANIFESTS_PREFIX + encode_id(id)


def manifest_keys(ids: Sequence[ObjectId]) -> list[str]:
    """Keys of many manifests."""
    return [MANIFESTS_PREFIX + text for text in encode_ids(ids)]


def transaction_key(id: ObjectId) -> str:
    """Key of the transaction log of the snapshot with this id."""
    return TRANSACTIONS_PREFIX + encode_id(id)


def chunk_key(id: ObjectId) -> str:
    """Key of a chunk object, which may hold several chunks."""
    return CHUNKS_PREFIX + encode_id(id)


@lru_cache(maxsize=4096)
def recent_chunk_key(id: ObjectId) -> str:
    """As `chunk_key`, faster for what was asked for lately: packs hold many chunks."""
    return chunk_key(id)


def _backup_suffix(now_ms: int, random: bytes) -> str:
    if len(random) != _BACKUP_RANDOM_BYTES:
        raise ValueError(f"a backup's name takes {_BACKUP_RANDOM_BYTES} random bytes, got {len(random)}")
    # The time counts down to the year 3000, so that a listing returns the newest copy first.
    return f"{_YEAR_3000_MS - now_ms}.{encode_id(random)}"


def overwritten_repo_name(now_ms: int, random: bytes) -> str:
    """Bare name of a copy of `repo`, as updates and ``repo_before_updates`` hold it.

    Parameters
    ----------
    now_ms
        ms since the epoch.
    random
        12 random bytes.

    Raises
    ------
    ValueError
        If ``random`` has another length.
    """
    return f"repo.{_backup_suffix(now_ms, random)}"


def overwritten_repo_key(name: str) -> str:
    """Key of the copy of `repo` with that bare name."""
    return OVERWRITTEN_PREFIX + name


def overwritten_config_key(now_ms: int, random: bytes) -> str:
    """Key of a copy of format 1's ``config.yaml``; parameters and errors as `overwritten_repo_name`."""
    return f"{OVERWRITTEN_PREFIX}{CONFIG_KEY}.{_backup_suffix(now_ms, random)}"
