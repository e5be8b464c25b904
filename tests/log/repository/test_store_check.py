"""Places that the log may be written to: what storages say of their preconditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from icechunk.config import StorageSettings
from icechunk.errors import StorageError
from icechunk.log.repository.store_check import may_write, require_atomic
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Absent, Matches, Unchecked
from icechunk.storage.s3.storage import S3Storage
from tests.raising import raises


@pytest.mark.parametrize("setting", ["unsafe_use_conditional_create", "unsafe_use_conditional_update"])
def test_s3_that_is_set_to_do_without_a_condition_may_not_be_written_to(setting: str) -> None:
    switched: dict[str, Any] = {setting: False}
    settings = StorageSettings(**switched)
    storage = S3Storage("b", "p", settings=settings)
    assert not may_write(storage)
    with raises(StorageError, "storage-config", "s3://b/p", setting):
        require_atomic(storage)


def test_every_storage_has_all_preconditions_unless_it_is_set_otherwise(tmp_path: Path) -> None:
    for storage in (
        S3Storage("b"),
        S3Storage("b", settings=StorageSettings()),
        MemoryStorage(),
        LocalStorage(tmp_path),
    ):
        assert storage.atomic_preconditions == {Absent, Matches, Unchecked}
        require_atomic(storage)
