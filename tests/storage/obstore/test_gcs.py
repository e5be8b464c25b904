"""Google Cloud Storage: the contract, conditions on generations, lost answers, credentials and headers."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import icechunk
from icechunk.config import StorageConcurrencySettings, StorageRetriesSettings, StorageSettings
from icechunk.credentials import gcs_credentials
from icechunk.errors import ObjectNotFoundError, PreconditionFailedError, StorageError
from icechunk.runtime.clock import SYSTEM
from icechunk.storage import patience
from icechunk.storage.obstore.buckets import GcsBucket
from icechunk.storage.obstore.storage import ObstoreStorage
from icechunk.storage.port import Absent, Matches, Storage
from icechunk.storage.retry import repeats_so_far
from icechunk.testing.storage_contract import StorageContract
from tests.raising import raises
from tests.storage.obstore.fake_gcs import FakeGcs, serving_gcs

pytest.importorskip("obstore", reason="the extra obstore")


@pytest.fixture
def gcs() -> Iterator[FakeGcs]:
    with serving_gcs() as server:
        yield server


def storage_on(gcs: FakeGcs, **options: Any) -> ObstoreStorage:
    place = GcsBucket(
        "bucket",
        "some/prefix/",
        credentials=options.pop("credentials", gcs_credentials(bearer_token="token")),
        config=gcs.config(),
        read_headers={},
        write_headers={},
        sources=SYSTEM,
    )
    settings = StorageSettings(retries=StorageRetriesSettings(max_tries=4, initial_backoff_ms=1, max_backoff_ms=5))
    return ObstoreStorage(place, options.pop("settings", settings))


@pytest.fixture
def storage(gcs: FakeGcs) -> ObstoreStorage:
    return storage_on(gcs)


class TestGcsContract(StorageContract):
    @pytest.fixture
    def storage(self, gcs: FakeGcs) -> Storage:
        return storage_on(gcs)


async def test_creations_and_replacements_are_conditions_on_generations(gcs: FakeGcs, storage: ObstoreStorage) -> None:
    await storage.put("x", b"1", Absent())
    first = await storage.get("x")
    await storage.put("x", b"2", Matches(first.version))
    sent = [h.get("x-goog-if-generation-match") for m, _, h in gcs.requests if m == "PUT"]
    assert sent[0] == "0"
    assert int(sent[1] or 0) > 0
    # Nothing was asked in between: the generation came with the answer.
    assert [m for m, _, _ in gcs.requests] == ["PUT", "GET", "PUT"]


async def test_a_version_from_another_client_is_looked_up(gcs: FakeGcs, storage: ObstoreStorage) -> None:
    put = await storage.put("x", b"1")
    other = storage_on(gcs)
    assert (await other.put("x", b"2", Matches(put.version))).version != put.version
    with pytest.raises(PreconditionFailedError):
        await storage.put("x", b"3", Matches(put.version))
    # The same bytes again are the same version, under another generation than we remember.
    again = await other.put("x", b"1")
    assert again.version == put.version
    await storage.put("x", b"3", Matches(put.version))
    assert (await storage.get("x")).data == b"3"


@pytest.mark.parametrize("metadata", [True, False], ids=["write id", "contents"])
@pytest.mark.parametrize("fault", ["lose answer", "503 after"])
async def test_a_write_whose_answer_is_lost_is_found_to_have_landed(gcs: FakeGcs, fault: str, metadata: bool) -> None:
    settings = StorageSettings(
        unsafe_use_metadata=metadata, retries=StorageRetriesSettings(max_tries=4, initial_backoff_ms=1)
    )
    storage = storage_on(gcs, settings=settings)
    gcs.faults = [("PUT", fault)]
    put = await storage.put("slot", b"ours", Absent())
    assert put.version == (await storage.get("slot")).version
    gcs.faults = [("PUT", fault)]
    await storage.put("slot", b"newer", Matches(put.version))
    assert (await storage.get("slot")).data == b"newer"
    assert len([1 for method, _, _ in gcs.requests if method == "PUT"]) == 2


async def test_a_write_that_never_arrived_is_sent_again_and_throttling_is_waited_out(
    gcs: FakeGcs, storage: ObstoreStorage
) -> None:
    gcs.faults = [("PUT", "503 before"), ("PUT", "429 before")]
    await storage.put("slot", b"ours", Absent())
    assert (await storage.get("slot")).data == b"ours"
    gcs.faults = [("PUT", "503 before")]
    with pytest.raises(PreconditionFailedError):
        await storage.put("slot", b"late", Absent())
    assert (await storage.get("slot")).data == b"ours"


async def test_a_write_without_answer_to_the_end_is_called_uncertain(gcs: FakeGcs, storage: ObstoreStorage) -> None:
    gcs.faults = [("PUT", "503 before")] * 4
    with raises(StorageError, "object-store", "gs://bucket/some/prefix/slot") as caught:
        await storage.put("slot", b"ours", Absent())
    assert not isinstance(caught.value, PreconditionFailedError)
    assert (caught.value.refused, caught.value.unsent) == (False, False)


@pytest.mark.parametrize(("status", "kind"), [("429", "throttled"), ("503", "object-store")])
async def test_the_status_says_whether_the_service_throttles_and_no_other_number(
    gcs: FakeGcs, storage: ObstoreStorage, status: str, kind: str
) -> None:
    gcs.faults = [("PUT", f"{status} before")] * 4
    with raises(StorageError, kind, "429.json"):
        await storage.put("429.json", b"ours", Absent())


@pytest.mark.parametrize("status", [400, 401, 403, 405, 501])
async def test_a_refusal_of_every_try_is_certain(gcs: FakeGcs, storage: ObstoreStorage, status: int) -> None:
    gcs.faults = [("PUT", f"{status} before")]
    with pytest.raises(StorageError) as caught:
        await storage.put("slot", b"ours", Absent())
    assert (caught.value.refused, caught.value.unsent) == (True, False)
    gcs.faults = [("PUT", "503 before"), ("PUT", f"{status} before")]
    with pytest.raises(StorageError) as caught:
        await storage.put("slot", b"ours", Absent())
    assert not caught.value.refused


async def test_headers_storage_classes_and_metadata_are_sent(gcs: FakeGcs) -> None:
    storage = icechunk.gcs_storage(
        bucket="bucket",
        prefix="p",
        bearer_token="hush",
        config=gcs.config(),
        headers={"x-both": "1"},
        write_headers={"x-goog-acl": "private"},
        read_headers={"x-both": "read"},
    ).with_settings(StorageSettings(chunks_storage_class="NEARLINE"))
    await storage.put("x", b"1", kind="chunk", metadata={"spec-version": "2"})
    await storage.get("x")
    (_, _, wrote), (_, _, read) = gcs.requests
    assert (wrote["x-goog-acl"], wrote["x-both"], wrote["x-goog-storage-class"]) == ("private", "1", "NEARLINE")
    assert wrote["x-goog-meta-spec_version"] == "2"
    assert read["x-both"] == "read"
    assert "x-goog-acl" not in read
    assert wrote["authorization"] == "Bearer hush"
    assert "hush" not in repr(storage) + storage.describe()


async def test_large_objects_go_in_parts(gcs: FakeGcs) -> None:
    settings = StorageSettings(minimum_size_for_multipart_upload=1024, concurrency=StorageConcurrencySettings(2, 1))
    storage = storage_on(gcs, settings=settings)
    data = bytes(range(256)) * (44 * 1024)
    await storage.put("big", data)
    assert (await storage.get("big")).data == data
    assert len([1 for method, path, _ in gcs.requests if method == "PUT" and "partNumber" in path]) == 3


_tokens: list[icechunk.GcsBearerCredential] = []


def next_token() -> icechunk.GcsBearerCredential:
    return _tokens.pop(0)


async def test_tokens_are_fetched_before_they_expire_and_no_request_fails(gcs: FakeGcs) -> None:
    def token(name: str, minutes: float) -> icechunk.GcsBearerCredential:
        return icechunk.GcsBearerCredential(name, expires_after=datetime.now(UTC) + timedelta(minutes=minutes))

    gcs.tokens = {"one", "two"}
    # The first is over before anything is asked, so the function is called at once.
    _tokens[:] = [token("stale", -1), token("one", 4), token("two", 60)]
    storage = icechunk.gcs_storage(
        bucket="bucket",
        prefix="p",
        config=gcs.config(),
        get_credentials=next_token,
        scatter_initial_credentials=True,
    )
    copy = pickle.loads(pickle.dumps(storage))
    assert copy == storage
    await copy.put("x", b"1")
    await copy.get("x")
    used = [h["authorization"] for _, _, h in gcs.requests]
    assert used == ["Bearer one"] * 2
    assert len(_tokens) == 1
    _tokens.clear()


async def test_a_missing_bucket_and_refused_credentials_are_said(gcs: FakeGcs, storage: ObstoreStorage) -> None:
    gcs.buckets = set()
    for attempt in (storage.get("x"), storage.put("x", b""), storage.put("x", b"", Absent())):
        with raises(StorageError, "object-store", "gs://bucket/some/prefix/x", "NoSuchBucket") as caught:
            await attempt
        assert not isinstance(caught.value, ObjectNotFoundError)
    gcs.buckets, gcs.tokens = {"bucket"}, {"other"}
    with raises(StorageError, "object-store", "gs://bucket/some/prefix/x", 401):
        await storage.get("x")


async def test_bad_configurations_are_refused_without_showing_secrets() -> None:
    with raises(icechunk.InvalidInputError, "storage-config", repr("a/b")):
        icechunk.gcs_storage(bucket="a/b", prefix=None)
    storage = icechunk.gcs_storage(bucket="b", prefix=None, service_account_key="hush", config={"bogus": "hush"})
    with raises(StorageError, "storage-config", "bogus") as caught:
        await storage.get("x")
    assert "hush" not in caught.value.message
    with raises(icechunk.InvalidInputError, "invalid-credentials", "Google"):
        icechunk.Storage.new_gcs("b", "p", icechunk.azure_credentials(access_key="k"))


async def test_deletion_names_the_objects_that_could_not_be_deleted(gcs: FakeGcs, storage: ObstoreStorage) -> None:
    for n in range(5):
        await storage.put(f"{n}", b"")
    gcs.faults = [("DELETE", "400 before")] * 2
    result = await storage.delete([f"{n}" for n in range(5)] + ["never"])
    assert result.deleted + len(result.failures) == 6
    assert all("cannot delete" in reason for _, reason in result.failures)


async def test_listings_of_many_pages_stop_where_the_prefix_ends(gcs: FakeGcs, storage: ObstoreStorage) -> None:
    gcs.page = 3
    for n in range(8):
        await storage.put(f"log/{n}", b"")
    for n in range(20):
        await storage.put(f"logs/{n:02}", b"")
    gcs.requests.clear()
    keys = [info.key async for page in storage.list_pages("log/", page_size=5) for info in page]
    assert keys == [f"log/{n}" for n in range(8)]
    assert len(gcs.requests) == 3


@pytest.mark.parametrize("fault", ["hang", "hang after"])
async def test_requests_that_are_silent_are_given_up_and_sent_again(
    gcs: FakeGcs, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_LEAST_PATIENCE_S", 0.1)
    storage = storage_on(gcs)
    before = repeats_so_far().abandoned
    async with asyncio.timeout(15):
        gcs.faults = [("PUT", fault)]
        put = await storage.put("slot", b"ours", Absent())
        gcs.faults = [("PUT", fault)]
        put = await storage.put("slot", b"newer", Matches(put.version))
        gcs.faults = [("PUT", fault)]
        await storage.put("chunk", bytes(100_000))
        gcs.faults = [("GET", fault)]
        assert (await storage.get("slot")).data == b"newer"
        gcs.faults = [("HEAD", fault)]
        assert (await storage.head("slot")).version == put.version
        gcs.faults = [("PUT", fault)]
        with pytest.raises(PreconditionFailedError):
            await storage.put("slot", b"late", Absent())
    assert repeats_so_far().abandoned >= before + 6


async def test_a_service_that_is_slow_by_nature_is_given_the_time_at_a_later_try(
    gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_LEAST_PATIENCE_S", 0.025)
    storage = storage_on(gcs)
    await storage.put("x", b"1")
    gcs.faults = [("GET", "hang after")] * 4
    asyncio.get_running_loop().call_later(2.0, gcs.released.set)
    async with asyncio.timeout(15):
        assert (await storage.get("x")).data == b"1"
