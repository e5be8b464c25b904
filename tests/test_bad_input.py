"""Mistakes of users and damage by storage: a specific error that names the object; nothing is lost."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.config import EngineConfig, RepositoryConfig
from icechunk.errors import (
    AlreadyExistsError,
    ErrorKind,
    FormatError,
    IcechunkError,
    InvalidInputError,
    RepositoryNotFoundError,
    StorageError,
)
from icechunk.format.ids import FIRST_SNAPSHOT, encode_id
from icechunk.format.keys import transaction_key
from icechunk.repository import Repository
from icechunk.runtime.twins import run_sync
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from tests.conftest import s3_storage_on
from tests.raising import raises
from tools import services

# -- places ------------------------------------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist_is_named(moto_service: services.S3Service) -> None:
    storage = s3_storage_on(moto_service, bucket="no-such-bucket", prefix="p")
    calls: list[Callable[[], Repository]] = [lambda: Repository.create(storage), lambda: Repository.open(storage)]
    for call in calls:
        with raises(StorageError, "object-store", "s3://no-such-bucket/p/"):
            call()


def test_credentials_that_are_missing_or_wrong_are_said_to_be(
    moto_service: services.S3Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    storage = icechunk.s3_storage(
        bucket="icechunk-tests",
        prefix="p",
        endpoint_url=moto_service.endpoint,
        region="us-east-1",
        allow_http=True,
        force_path_style=True,
        from_env=True,
    )
    with raises(StorageError, "invalid-credentials", "AWS_ACCESS_KEY_ID"):
        Repository.create(storage)


def test_a_place_without_a_repository_is_named(storage: Storage) -> None:
    with pytest.raises(RepositoryNotFoundError) as missing:
        Repository.open(storage)
    assert storage.describe() in str(missing.value)
    assert missing.value.kind == ErrorKind.REPOSITORY_NOT_FOUND
    assert keys(storage) == set()


def test_a_location_that_is_not_empty_is_refused_for_creation(storage: Storage) -> None:
    put(storage, "data/file", b"precious")
    with raises(InvalidInputError, "parent-directory-not-clean", "data/file"):
        Repository.create(storage)
    assert keys(storage) == {"data/file"}
    Repository.create(storage, check_clean_root=False)
    before = read_all(storage)
    with pytest.raises(AlreadyExistsError):
        Repository.create(storage, check_clean_root=False)
    assert read_all(storage) == before


def test_a_storage_that_can_only_be_read_is_not_written_to(tmp_path: Path) -> None:
    class ReadOnly(MemoryStorage):
        @property
        def supports_writes(self) -> bool:
            return False

    with pytest.raises(icechunk.ReadOnlyError) as refused:
        Repository.create(ReadOnly())
    assert refused.value.kind == ErrorKind.READ_ONLY_STORAGE


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda storage: Repository.create(42),  # type: ignore[arg-type]
        lambda storage: Repository.open(42),  # type: ignore[arg-type]
        lambda storage: Repository.exists(42),  # type: ignore[arg-type]
        lambda storage: Repository.fetch_config(None),  # type: ignore[arg-type]
        lambda storage: Repository.create(storage, {"compression": None}),  # type: ignore[arg-type]
        lambda storage: Repository.create(storage, "config"),  # type: ignore[arg-type]
        lambda storage: Repository.create(storage, attribution="me"),  # type: ignore[arg-type]
        lambda storage: Repository.create(storage, authorize_virtual_chunk_access=["s3://"]),  # type: ignore[arg-type]
        lambda storage: Repository.create(storage, spec_version=17),
        lambda storage: Repository.create(storage, RepositoryConfig(max_concurrent_requests=0)),
    ],
)
def test_arguments_of_the_wrong_type_are_refused_before_anything_is_written(call: Callable[[Storage], Any]) -> None:
    storage = MemoryStorage()
    with pytest.raises(InvalidInputError):
        call(storage)
    assert keys(storage) == set()


@pytest.mark.parametrize(
    "call",
    [
        lambda repository: repository.create_branch(None, "1CECHNKREP0F1RSTCMT0"),
        lambda repository: repository.create_branch(b"dev", "1CECHNKREP0F1RSTCMT0"),
        lambda repository: repository.create_branch("\ud800", "1CECHNKREP0F1RSTCMT0"),
        lambda repository: repository.create_tag(7, "1CECHNKREP0F1RSTCMT0"),
        lambda repository: repository.create_tag("v1", "1CECHNKREP0F1RSTCMT"),
        lambda repository: repository.create_tag("v1", ""),
        lambda repository: repository.create_tag("v1", "UUUUUUUUUUUUUUUUUUUU"),
        lambda repository: repository.create_tag("v1", None),
        lambda repository: repository.create_tag("v1", b"1CECHNKREP0F1RSTCMT0"),
        lambda repository: repository.lookup_branch(None),
        lambda repository: repository.writable_session(None),
        lambda repository: repository.readonly_session(snapshot_id=7),
        lambda repository: repository.readonly_session(b"main"),
        lambda repository: repository.set_metadata({"a": object()}),
        lambda repository: repository.set_metadata({"a": b"bytes"}),
        lambda repository: repository.update_metadata({1: 1}),
        lambda repository: repository.set_metadata("text"),
        lambda repository: repository.set_default_commit_metadata([1]),
        lambda repository: repository.set_feature_flag("create_tag", "off"),
        lambda repository: repository.set_feature_flag(None, True),
        lambda repository: repository.set_status("read-only"),
        lambda repository: repository.reopen(config=3),
    ],
)
def test_wrong_arguments_of_repository_methods_change_nothing(call: Callable[[Repository], Any]) -> None:
    storage = MemoryStorage()
    repository = Repository.create(storage)
    before = read_all(storage)
    with pytest.raises((InvalidInputError, icechunk.RefNotFoundError)):
        call(repository)
    assert read_all(storage) == before


# -- corrupt, truncated and foreign objects ----------------------------------------------------------------------------


def keys(storage: Storage) -> set[str]:
    return set(read_all(storage))


def read_all(storage: Storage) -> dict[str, bytes]:
    async def read() -> dict[str, bytes]:
        found = [item.key async for page in storage.list_pages() for item in page]
        return {key: (await storage.get(key)).data for key in found}

    return run_sync(read())


def put(storage: Storage, key: str, data: bytes) -> None:
    run_sync(storage.put(key, data))


def filled() -> MemoryStorage:
    """A repository whose history takes every kind of file to read, with an entry that no checkpoint holds."""
    storage = MemoryStorage()
    # No file is embedded in the log, so none is copied into repo: else damage to the objects would not be noticed.
    config = RepositoryConfig(inline_chunk_threshold_bytes=0, engine=EngineConfig(small_commit_bytes=0))
    repository = Repository.create(storage, config)
    session = repository.writable_session("main")
    array = zarr.create_array(session.store, name="a", shape=(64, 64), chunks=(16, 64), dtype="f8", compressors=None)
    array[:] = 1
    session.commit("first")
    repository.checkpoint()
    checkpoint = run_sync(storage.get("repo")).data
    session = repository.writable_session("main")
    zarr.open_array(session.store, path="a", mode="a")[0] = 2
    session.commit("second")
    run_sync(repository.aclose())
    put(storage, "repo", checkpoint)
    return storage


def read_everything(storage: Storage) -> float:
    """Use every file of the newest version and of the history."""
    repository = Repository.open(storage)
    history = [info.id for info in repository.ancestry(branch="main")]
    total = 0.0
    for snapshot_id in history[:-1]:
        session = repository.readonly_session(snapshot_id=snapshot_id)
        total += float(np.asarray(zarr.open_array(session.store, path="a", mode="r")[:]).sum())
    repository.diff(from_snapshot_id=history[-1], to_branch="main")
    list(repository.ops_log())
    return total


KINDS = ["repo", "snapshots/", "manifests/", "transactions/", "log/", "chunks/"]

CHANCE = random.Random(7)

FIRST_TRANSACTION = transaction_key(FIRST_SNAPSHOT)

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated to half": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "random": lambda data: CHANCE.randbytes(len(data)),
    "text": lambda data: b"<html>404</html>",
    "other magic": lambda data: b"X" + data[1:],
    "flipped in the middle": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_found_named_and_left_alone(kind: str, damage: str) -> None:
    storage = filled()
    good = read_all(storage)
    expected = read_everything(storage)
    chosen = [key for key in sorted(good) if key.startswith(kind)]
    if kind == "log/":
        chosen = chosen[:1]  # the newest entry, which is after the checkpoint
    assert chosen
    if kind == "chunks/" and damage not in ("empty", "truncated to half", "without its last byte", "text"):
        pytest.skip("chunks have no checksum of their own: only their codecs can notice damage")
    if kind == "transactions/":
        chosen.remove(FIRST_TRANSACTION)  # that of the first snapshot is never read
    for key in chosen:
        put(storage, key, DAMAGES[damage](good[key]))
        before = read_all(storage)
        with pytest.raises((FormatError, StorageError), match=re.escape(key.rsplit("/", 1)[-1])):
            read_everything(storage)
        assert read_all(storage) == before
        put(storage, key, good[key])
    assert read_everything(storage) == expected


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_file_of_another_kind_or_object_is_not_taken_for_it(kind: str) -> None:
    storage = filled()
    good = read_all(storage)
    key = next(key for key in sorted(good) if key.startswith(kind) and encode_id(FIRST_SNAPSHOT) not in key)
    for name, foreign in sorted(good.items()):
        if name != key:
            put(storage, key, foreign)
            with pytest.raises(IcechunkError):
                read_everything(storage)
    put(storage, key, good[key])
    read_everything(storage)


@pytest.mark.parametrize("kind", ["snapshots/", "manifests/", "transactions/", "chunks/"])
def test_missing_files_are_named_and_never_read_as_empty(kind: str) -> None:
    storage = filled()
    good = read_all(storage)
    # The transaction log of the first snapshot is never read.
    chosen = [key for key in sorted(good) if key.startswith(kind) and encode_id(FIRST_SNAPSHOT) not in key]
    for key in chosen:
        run_sync(storage.delete([key]))
        with pytest.raises(IcechunkError, match=re.escape(key.rsplit("/", 1)[-1])):
            read_everything(storage)
        put(storage, key, good[key])


def test_a_missing_entry_of_the_log_is_never_skipped() -> None:
    storage = filled()
    repository = Repository.open(storage)
    session = repository.writable_session("main")
    zarr.create_group(session.store, path="x")
    good = run_sync(storage.get("repo")).data
    session.commit("third")
    run_sync(repository.aclose())
    put(storage, "repo", good)
    newest, before, *_ = sorted(key for key in read_all(storage) if key.startswith("log/"))
    assert newest < before
    run_sync(storage.delete([before]))
    with raises(FormatError, "invalid-file-format", before):
        Repository.open(storage)


def test_a_commit_on_top_of_a_damaged_manifest_is_refused_and_loses_nothing() -> None:
    storage = filled()
    good = read_all(storage)
    repository = Repository.open(storage)
    session = repository.writable_session("main")
    zarr.open_array(session.store, path="a", mode="a")[16:32] = 3
    manifests = [key for key in good if key.startswith("manifests/")]
    for key in manifests:
        put(storage, key, b"garbage")
    with raises(FormatError, "invalid-file-format", "manifests/"):
        session.commit("third")
    assert session.has_uncommitted_changes
    assert not session.read_only
    assert {key for key in read_all(storage) if key.startswith("log/")} == {
        key for key in good if key.startswith("log/")
    }
    for key in manifests:
        put(storage, key, good[key])
    session.commit("third")
    assert zarr.open_array(Repository.open(storage).readonly_session("main").store, path="a", mode="r")[20, 0] == 3
