"""The effect of settings on an object store."""

from __future__ import annotations

import pytest

from icechunk.config import StorageConcurrencySettings, StorageRetriesSettings, StorageSettings
from icechunk.errors import ObjectNotFoundError, PreconditionFailedError
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import ANY, Absent, Matches, Unchecked, Version
from icechunk.storage.settings import Effective
from tests.raising import raises

ALL = {Unchecked, Absent, Matches}


def test_unset_settings_mean_the_defaults() -> None:
    silent, absent = Effective(StorageSettings()), Effective(None)
    assert vars(silent) == vars(absent)
    assert silent.uses_metadata
    assert silent.atomic_preconditions == ALL
    assert (silent.multipart_bytes, silent.part_bytes, silent.parts_at_once) == (100 << 20, 12 << 20, 18)


def test_later_changes_of_the_given_values_have_no_effect() -> None:
    given = StorageSettings(retries=StorageRetriesSettings(max_tries=3), storage_class="A")
    effective = Effective(given)
    given.storage_class = "B"
    effective.settings.storage_class = "C"
    assert effective.storage_class("metadata") == "A"
    assert effective.limits.max_tries == 3


def test_numbers_that_are_given_count() -> None:
    effective = Effective(
        StorageSettings(
            minimum_size_for_multipart_upload=0,
            concurrency=StorageConcurrencySettings(
                max_concurrent_requests_for_object=2, ideal_concurrent_request_size=7
            ),
        ),
        default_read_s=5,
    )
    # An empty object has no parts.
    assert (effective.multipart_bytes, effective.part_bytes, effective.parts_at_once) == (1, 7, 2)
    assert effective.limits.read_s == 5


def test_a_place_without_metadata_overrules_the_settings() -> None:
    assert not Effective(StorageSettings(unsafe_use_metadata=True), keeps_metadata=False).uses_metadata
    assert not Effective(StorageSettings(unsafe_use_metadata=False)).uses_metadata


async def test_conditions_that_the_service_has_are_sent() -> None:
    storage, effective = MemoryStorage(), Effective(None)
    for precondition in (ANY, Absent(), Matches(Version("1"))):
        assert await effective.condition_of(storage, "k", "k", precondition) == precondition


@pytest.mark.parametrize("there", [False, True], ids=["absent", "present"])
async def test_conditions_that_it_lacks_are_looked_up(there: bool) -> None:
    storage = MemoryStorage()
    effective = Effective(StorageSettings(unsafe_use_conditional_create=False, unsafe_use_conditional_update=False))
    assert effective.atomic_preconditions == {Unchecked}
    assert await effective.condition_of(storage, "k", "k", ANY) == ANY
    version = (await storage.put("k", b"x")).version if there else Version("gone")
    held, broken = (Matches(version), Absent()) if there else (Absent(), Matches(version))
    assert await effective.condition_of(storage, "k", "the object", held) == ANY
    for precondition in (broken, Matches(Version("another"))):
        with raises(PreconditionFailedError, "object-store"):
            await effective.condition_of(storage, "k", "the object", precondition)
    if not there:
        with pytest.raises(ObjectNotFoundError):
            await storage.head("k")
