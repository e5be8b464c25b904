from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import pytest

import icechunk.storage as public
from icechunk.config import ChecksumAlgorithm, ObjectStoreConfig, S3Options, StorageRetriesSettings, StorageSettings
from icechunk.credentials import AzureCredentials, GcsCredentials, S3Credentials, S3StaticCredentials
from icechunk.errors import InvalidInputError, StorageError
from icechunk.storage import s3_object_store_storage
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage
from icechunk.storage.s3.endpoint import resolve_endpoint
from icechunk.storage.s3.storage import S3Storage
from tests.raising import raises
from tests.storage.s3.faulty_s3 import serving


def test_local_listings_are_those_of_the_official_class(tmp_path: Path) -> None:
    import asyncio

    storage = public.local_filesystem_storage(str(tmp_path))
    asyncio.run(storage.put("snapshots/A", b"12"))
    asyncio.run(storage.put("repo", b"1"))
    assert storage.list_objects() == [("repo", 1), ("snapshots/A", 2)]
    assert storage.list_objects(prefix="snapshots") == storage.list_objects(prefix="snapshots/") == [("A", 2)]
    assert storage.list_objects(prefix="snap") == []
    info = storage.list_objects_metadata(prefix="snapshots")[0]
    assert (info.key, info.size_bytes) == ("A", 2)
    assert info.created_at.tzinfo is not None


def test_representations_show_the_location_and_no_secret() -> None:
    storage = public.s3_storage(
        bucket="b",
        prefix="p/",
        region="us-east-1",
        endpoint_url="https://user:hush@example.com",
        access_key_id="AKIA",
        secret_access_key="hush",
        session_token="hush",
        headers={"authorization-extra": "hush"},
    )
    assert repr(storage).startswith("<icechunk.Storage>\ntype: S3 (native)\nbucket: b\nprefix: p\nregion: us-east-1\n")
    assert "hush" not in repr(storage) + storage.describe() + storage._repr_html_()
    assert repr(public.in_memory_storage()) == "<icechunk.Storage>\ntype: in-memory\n"


def test_pickles_hold_credentials_settings_and_headers() -> None:
    storage = S3Storage(
        "b",
        "p",
        options=S3Options(region="r"),
        credentials=S3Credentials.Static(S3StaticCredentials("AKIA", "hush")),
        settings=StorageSettings(storage_class="STANDARD_IA"),
        write_headers={"x-amz-server-side-encryption": "AES256"},
    )
    again = pickle.loads(pickle.dumps(storage))
    assert again == storage
    assert again._bucket.credentials == storage._bucket.credentials
    assert again.settings == storage.settings
    assert again._bucket.write_headers == {"x-amz-server-side-encryption": "AES256"}


def test_other_settings_share_the_place_and_its_clients() -> None:
    storage = S3Storage("b", options=S3Options(region="r"), credentials=S3Credentials.Anonymous())
    other = storage.with_settings(StorageSettings(retries=StorageRetriesSettings(max_tries=1)))
    assert isinstance(other, S3Storage)
    assert other._bucket is storage._bucket
    assert (other._effective.limits.max_tries, storage._effective.limits.max_tries) == (1, 10)


@pytest.mark.parametrize(
    "arguments",
    [
        {"anonymous": True, "access_key_id": "x"},
        {"access_key_id": "x"},
        {"from_env": True, "anonymous": True},
        {"session_token": "x"},
    ],
)
def test_conflicting_credentials_are_refused(arguments: dict[str, Any]) -> None:
    with raises(InvalidInputError, "invalid-credentials", "s3_credentials"):
        public.s3_storage(bucket="b", prefix=None, **arguments)


@pytest.mark.parametrize("arguments", [{"bucket": ""}, {"bucket": "a/b"}, {"bucket": "b", "headers": {"a": "é"}}])
def test_bad_places_and_headers_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        public.s3_storage(prefix=None, **arguments)


def test_rooted_keys_need_an_empty_prefix() -> None:
    with raises(StorageError, "storage-config", "legacy_rooted_keys"):
        public.s3_storage(bucket="b", prefix="p", legacy_rooted_keys=True)
    storage = public.s3_storage(bucket="b", prefix=None, legacy_rooted_keys=True)
    assert storage._bucket.path("repo") == "//repo"  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(storage))._bucket.path("repo") == "//repo"


def test_stores_of_virtual_chunks() -> None:
    assert isinstance(public.s3_store(region="r"), ObjectStoreConfig.S3)
    assert isinstance(public.s3_store(s3_compatible=True), ObjectStoreConfig.S3Compatible)
    assert public.local_filesystem_store("/data") == ObjectStoreConfig.LocalFileSystem(Path("/data"))


def test_r2_and_tigris_are_s3_elsewhere() -> None:
    assert "endpoint_url: https://acc.r2.cloudflarestorage.com" in repr(
        public.r2_storage(prefix="b/p", account_id="acc")
    )
    assert "endpoint_url: https://t3.storage.dev" in repr(public.tigris_storage(bucket="b", prefix="p", region="iad"))
    attempts: list[Callable[[], object]] = [
        lambda: public.r2_storage(bucket="b"),
        lambda: public.r2_storage(account_id="acc"),
        lambda: public.tigris_storage(bucket="b", prefix=None),
    ]
    for attempt in attempts:
        with pytest.raises(StorageError):
            attempt()


@pytest.mark.parametrize(
    ("bucket", "options", "url"),
    [
        ("data", {"endpoint_url": "https://s3.example.com"}, "https://data.s3.example.com"),
        ("data", {"endpoint_url": "https://s3.example.com/", "force_path_style": True}, "https://s3.example.com/data"),
        ("data.x", {"endpoint_url": "https://s3.example.com"}, "https://s3.example.com/data.x"),
        ("data", {"endpoint_url": "http://127.0.0.1:9000", "allow_http": True}, "http://127.0.0.1:9000/data"),
        ("data", {"endpoint_url": "http://minio:9000", "allow_http": True}, "http://minio:9000/data"),
        ("data", {"endpoint_url": "http://[::1]:9000", "allow_http": True}, "http://[::1]:9000/data"),
        ("data", {"endpoint_url": "https://x.org:443/base"}, "https://data.x.org/base"),
        ("data", {"region": "eu-west-1"}, "https://data.s3.eu-west-1.amazonaws.com"),
        ("data", {"region": "cn-north-1"}, "https://data.s3.cn-north-1.amazonaws.com.cn"),
        ("da.ta", {"region": "eu-west-1"}, "https://s3.eu-west-1.amazonaws.com/da.ta"),
    ],
)
async def test_endpoints(bucket: str, options: dict[str, Any], url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    found = await resolve_endpoint(bucket, S3Options(**options))
    assert found.url == url
    assert found.region == options.get("region", "us-east-1")


@pytest.mark.parametrize(
    "url", ["s3.example.com", "ftp://x", "https://", "https://x:port", "https://x:99999", "https://[x", "http://a\n.b"]
)
async def test_bad_endpoints_are_refused(url: str) -> None:
    with raises(StorageError, "cannot-parse-url", "endpoint_url", repr("b")):
        await resolve_endpoint("b", S3Options(endpoint_url=url))


async def test_options_and_headers_reach_the_service() -> None:
    async with serving() as server:
        storage = S3Storage(
            "b",
            options=S3Options(
                region="us-east-1",
                endpoint_url=server.endpoint,
                allow_http=True,
                force_path_style=True,
                requester_pays=True,
                checksum_algorithm=ChecksumAlgorithm.Crc32,
            ),
            credentials=S3Credentials.Anonymous(),
            settings=StorageSettings(storage_class="STANDARD_IA", chunks_storage_class="GLACIER_IR"),
            read_headers={"X-Read": "r"},
            write_headers={"x-amz-server-side-encryption": "aws:kms"},
        )
        await storage.put("x", b"123456789", metadata={"a": "b"})
        await storage.put("c", b"", kind="chunk")
        await storage.get("x")
        put, chunk, get = (seen.headers for seen in server.seen)
    assert put["x-amz-request-payer"] == get["x-amz-request-payer"] == "requester"
    assert put["x-amz-checksum-crc32"] == "y/Q5Jg=="
    assert (put["x-amz-storage-class"], chunk["x-amz-storage-class"]) == ("STANDARD_IA", "GLACIER_IR")
    assert put["x-amz-server-side-encryption"] == "aws:kms"
    assert put["x-amz-meta-a"] == "b"
    assert get["x-read"] == "r"
    assert "x-read" not in put


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_signatures_have_the_official_names() -> None:
    assert _parameters(public.s3_storage)[:4] == ["bucket", "prefix", "region", "endpoint_url"]
    assert _parameters(public.s3_storage)[-4:] == ["legacy_rooted_keys", "read_headers", "write_headers", "headers"]
    assert _parameters(Storage.new_s3) == [
        "config",
        "bucket",
        "prefix",
        "credentials",
        "legacy_rooted_keys",
        "read_headers",
        "write_headers",
        "headers",
    ]


ANONYMOUS = S3Credentials.Anonymous()
IN_REGION = S3Options(region="r", network_stream_timeout_seconds=60)
TWICE: dict[str, tuple[Storage, Storage]] = {
    "local": (Storage.new_local_filesystem("x"), public.local_filesystem_storage("x")),
    "s3": (
        Storage.new_s3(IN_REGION, "b", "p", ANONYMOUS, headers={"a": "1"}, read_headers={"a": "2"}),
        public.s3_storage(
            bucket="b", prefix="p", region="r", anonymous=True, headers={"a": "1"}, read_headers={"a": "2"}
        ),
    ),
    "s3_rooted": (
        Storage.new_s3(IN_REGION, "b", None, ANONYMOUS, True),
        public.s3_storage(bucket="b", prefix=None, region="r", anonymous=True, legacy_rooted_keys=True),
    ),
    "s3_object_store": (
        Storage.new_s3_object_store(S3Options(region="r"), "b", None, ANONYMOUS, write_headers={"a": "1"}),
        s3_object_store_storage(bucket="b", prefix=None, region="r", anonymous=True, write_headers={"a": "1"}),
    ),
    "tigris": (
        Storage.new_tigris(IN_REGION, "b", "p", False, ANONYMOUS, headers={"a": "1"}),
        public.tigris_storage(bucket="b", prefix="p", region="r", anonymous=True, headers={"a": "1"}),
    ),
    "r2": (
        Storage.new_r2(S3Options(network_stream_timeout_seconds=60), None, "b/p", "acc", ANONYMOUS),
        public.r2_storage(bucket="b", prefix="p", account_id="acc", anonymous=True),
    ),
    "hf": (
        Storage.new_hf(S3Options(network_stream_timeout_seconds=60), "b", "p", "me", S3Credentials.FromEnv()),
        public.hf_storage(bucket="b", prefix="p", namespace="me", from_env=True),
    ),
    "gcs": (
        Storage.new_gcs("b", "p", GcsCredentials.Anonymous(), config={"a": "1"}, headers={"a": "1"}),
        public.gcs_storage(bucket="b", prefix="p", anonymous=True, config={"a": "1"}, headers={"a": "1"}),
    ),
    "azure": (
        Storage.new_azure_blob("acc", "c", "p", AzureCredentials.FromEnv(), config={"a": "1"}),
        public.azure_storage(account="acc", container="c", prefix="p", from_env=True, config={"a": "1"}),
    ),
    "http": (
        Storage.new_http("https://x.org/r", {"timeout": "3s"}, {"a": "1"}),
        public.http_storage("https://x.org/r", {"timeout": "3s"}, {"a": "1"}),
    ),
    "redirect": (Storage.new_redirect("https://x.org/r"), public.redirect_storage("https://x.org/r")),
}
"""Storage of the class method and that of the function, by kind."""


@pytest.mark.parametrize("kind", TWICE)
def test_class_methods_and_functions_make_the_same_storages(kind: str) -> None:
    method, function = (pickle.loads(pickle.dumps(storage)) for storage in TWICE[kind])
    assert type(method) is type(function)
    assert (method, repr(method)) == (function, repr(function))
    if isinstance(method, S3Storage):
        assert method._bucket.described == function._bucket.described


def test_memory_is_one_of_the_kinds() -> None:
    assert type(Storage.new_in_memory()) is type(public.in_memory_storage()) is MemoryStorage


def test_type_checkers_see_storages_made_by_the_class_methods() -> None:
    assert assert_type(Storage.new_in_memory(), Storage) is not None
    assert assert_type(S3Storage.new_local_filesystem("x"), Storage) == LocalStorage("x")


def test_unknown_arguments_are_refused_as_python_does() -> None:
    with pytest.raises(TypeError):
        public.hf_storage(bucket="b", prefix=None, namespace="n", region="r")  # type: ignore[call-arg]
