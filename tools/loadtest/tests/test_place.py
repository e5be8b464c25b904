"""Request counters are read from what MinIO answers; endpoints are checked before anything goes there."""

from __future__ import annotations

import pytest

from icechunk_loadtest.errors import LoadTestError
from icechunk_loadtest.place import memory_or_local, named_endpoint, parse_counters
from tools.loadtest.tests.raising import raises

ANSWER = """# HELP minio_api_requests_total Total number of requests
minio_api_requests_total{name="GetObject",server="127.0.0.1:1",type="s3"} 20
minio_api_requests_total{name="PutObject",server="127.0.0.1:1",type="s3"} 5e+01
minio_api_requests_traffic_received_bytes{server="127.0.0.1:1",type="s3"} 50000
minio_api_requests_traffic_sent_bytes{server="127.0.0.1:1",type="s3"} 20000
"""


def test_counters_are_read_and_subtracted() -> None:
    before, after = parse_counters(""), parse_counters(ANSWER)
    assert after.by_name == {"GetObject": 20, "PutObject": 50}
    assert (after.since(before).received_bytes, after.sent_bytes) == (50_000, 20_000)
    assert after.since(after).by_name == {}


def test_an_endpoint_needs_a_url_and_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    with raises(LoadTestError, repr("minio:9000")), named_endpoint("minio:9000", "b", region="r", delay=False):
        pass
    with (
        raises(LoadTestError, "AWS_ACCESS_KEY_ID"),
        named_endpoint("http://h", "b", region="r", delay=False),
    ):
        pass
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with raises(LoadTestError, "http"), named_endpoint("https://h", "b", region="r", delay=True):
        pass
    with named_endpoint("http://h:9000/", "b", region="r", delay=False) as place:
        assert place.at(0)["endpoint"] == "http://h:9000"
        assert place.at(0)["prefix"] != place.at(0)["prefix"]
        assert place.requests() is None


def test_memory_and_disk_have_no_latency_to_add() -> None:
    with memory_or_local("memory") as place, raises(LoadTestError, "memory"):
        place.at(20)
