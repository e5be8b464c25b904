"""Hugging Face's S3 gateway, which drops user metadata."""

from __future__ import annotations

import pickle

import pytest

import icechunk
from icechunk.config import S3Options, StorageRetriesSettings, StorageSettings
from icechunk.credentials import s3_static_credentials
from icechunk.errors import InvalidInputError, PreconditionFailedError
from icechunk.storage.port import Absent, Matches
from tests.raising import raises
from tests.storage.s3.faulty_s3 import LOSE, serving


def test_the_gateway_and_the_namespace_are_in_the_endpoint() -> None:
    storage = icechunk.hf_storage(
        bucket="b", prefix="p", namespace="ns", access_key_id="HFAK", secret_access_key="hush"
    )
    assert repr(storage) == (
        "<icechunk.Storage>\ntype: S3 (native)\nbucket: b\nprefix: p\nregion: us-east-1\n"
        "endpoint_url: https://s3.hf.co/ns\nforce_path_style: True\n"
    )
    for bad in ("", "a/b"):
        with raises(InvalidInputError, "storage-config", "namespace", repr(bad)):
            icechunk.hf_storage(bucket="b", prefix="p", namespace=bad)


async def test_a_lost_answer_is_recognised_without_metadata() -> None:
    async with serving() as server:
        made = icechunk.Storage.new_hf(
            S3Options(endpoint_url=f"{server.endpoint}/ns", allow_http=True),
            "b",
            "p",
            "ns",
            s3_static_credentials(access_key_id="HFAK", secret_access_key="hush"),
        ).with_settings(StorageSettings(retries=StorageRetriesSettings(max_tries=3, initial_backoff_ms=1)))
        storage = pickle.loads(pickle.dumps(made))
        server.behaviours = [LOSE]
        put = await storage.put("slot", b"ours", Absent())
        server.behaviours = [LOSE]
        await storage.put("slot", b"newer", Matches(put.version))
        assert server.objects["/ns/b/p/slot"][0] == b"newer"
        with pytest.raises(PreconditionFailedError):
            await storage.put("slot", b"late", Absent())
        assert not any(name.startswith("x-amz-meta") for seen in server.seen for name in seen.headers)
        await storage.aclose()
