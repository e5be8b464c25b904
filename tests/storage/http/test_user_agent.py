"""Requests name their client in the logs of the storage."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import pytest

import icechunk
from icechunk.config import StorageSettings
from icechunk.ops import Attribution
from icechunk.storage.http.connections import Connections
from icechunk.storage.http.storage import HttpStorage
from icechunk.storage.s3.storage import S3Storage
from tests.storage.http.web_server import serving_files
from tests.storage.obstore.fake_gcs import serving_gcs

WHO = Attribution(client="weather/0.9", workload="nightly run", principal="u_1")
SENT = f"weather/0.9 {icechunk.user_agent()} (workload=nightly run; principal=u_1)"


def test_only_known_facts_are_in_the_user_agent() -> None:
    assert Attribution().user_agent("p") == "p"
    assert Attribution(client="c/1").user_agent("p") == "c/1 p"
    assert Attribution(principal="me").user_agent("p") == "p (principal=me)"


async def test_every_request_to_s3_is_attributed_and_so_are_those_of_a_copy(
    moto_storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    exchange = Connections.exchange

    async def recorded(
        self: Connections, origin: Any, method: str, target: str, headers: Any, *a: Any, **k: Any
    ) -> Any:
        sent.append(headers["user-agent"])
        return await exchange(self, origin, method, target, headers, *a, **k)

    monkeypatch.setattr(Connections, "exchange", recorded)
    storage = moto_storage.with_settings(StorageSettings(storage_class="STANDARD_IA"))
    repo = await icechunk.Repository.create_async(storage, spec_version=2, attribution=WHO)
    assert repo.storage == storage
    copy = pickle.loads(pickle.dumps(repo))
    for each in (repo, copy):
        assert isinstance(each.storage, S3Storage)
        assert (each.attribution, each.storage.settings.storage_class) == (WHO, "STANDARD_IA")
        session = await each.writable_session_async("main")
        await session.commit_async("nothing", allow_empty=True)
    assert len(sent) > 5
    assert set(sent) == {SENT}
    sent.clear()
    other = await icechunk.Repository.open_async(storage)
    assert set(sent) == {icechunk.user_agent()}
    for each in (repo, copy, other):
        await each.aclose()


async def test_requests_to_a_web_server_are_attributed_unless_the_caller_names_another_header(tmp_path: Path) -> None:
    with serving_files(tmp_path) as server:
        for options, sent in (({}, SENT), ({"user_agent": "mine"}, "mine")):
            storage = HttpStorage(server.url, {"allow_http": "true", **options})
            assert await icechunk.Repository.exists_async(storage) is False
            server.seen.clear()
            with contextlib.suppress(icechunk.RepositoryNotFoundError):
                await icechunk.Repository.open_async(storage, attribution=WHO)
            assert {headers["user-agent"] for _, _, headers in server.seen} == {sent}


async def test_requests_through_obstore_are_attributed_unless_the_caller_names_another_header() -> None:
    pytest.importorskip("obstore", reason="the extra obstore")
    with serving_gcs() as server:
        for options, sent in (({}, SENT), ({"user_agent": "mine"}, "mine")):
            storage = icechunk.gcs_storage(
                bucket="bucket", prefix=sent[:4], bearer_token="token", config={**server.config(), **options}
            )
            server.requests.clear()
            repo = await icechunk.Repository.create_async(storage, attribution=WHO)
            copy = pickle.loads(pickle.dumps(repo))
            for each in (repo, copy):
                session = await each.writable_session_async("main")
                await session.commit_async("nothing", allow_empty=True)
                await each.aclose()
            assert len(server.requests) > 5
            assert {headers["user-agent"] for _, _, headers in server.requests} == {sent}
            server.requests.clear()
            await icechunk.Repository.exists_async(storage)
            ours = sent if options else icechunk.user_agent()
            assert {headers["user-agent"] for _, _, headers in server.requests} == {ours}


async def test_requests_to_the_target_of_a_redirect_are_attributed(tmp_path: Path) -> None:
    with serving_files(tmp_path) as server:
        server.redirects["/ask"] = f"http+icechunk://{server.url.removeprefix('http://')}/r"
        storage = icechunk.redirect_storage(f"{server.url}/ask")
        for each in (storage, storage.with_settings(StorageSettings())):
            server.seen.clear()
            with contextlib.suppress(icechunk.RepositoryNotFoundError):
                await icechunk.Repository.open_async(each, attribution=WHO)
            sent = [headers["user-agent"] for _, path, headers in server.seen if path.startswith("/r/")]
            assert set(sent) == {SENT}
