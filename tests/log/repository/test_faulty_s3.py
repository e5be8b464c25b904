"""Commits of the published layouts to an S3 that loses, doubts and delays answers: they land once, or not at all."""

from __future__ import annotations

import asyncio
import http.client
import uuid
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import pytest

import icechunk
from icechunk.config import S3Options, StorageRetriesSettings, StorageSettings
from icechunk.credentials import S3Credentials, S3StaticCredentials
from icechunk.storage.s3.storage import S3Storage
from tests.conftest import BUCKET
from tests.inside import prepare_writes
from tests.storage.s3.faulty_s3 import LOSE, OK, RESET, FaultyS3, Say, Seen, serving
from tools import services

LATE = "late"
"""The connection is reset, and the request executed after the next one like it."""

FAULTS: dict[str, str | Say] = {
    "landed, answer lost": LOSE,
    "did not land, connection lost": RESET,
    "landed, 500": Say(500, "InternalError", carry_out=True),
    "did not land, 500": Say(500, "InternalError"),
    "409, did not land": Say(409, "ConditionalRequestConflict"),
    "409, landed": Say(409, "ConditionalRequestConflict", carry_out=True),
    "412, landed": Say(412, "PreconditionFailed", carry_out=True),
    "503, did not land": Say(503, "SlowDown"),
    "late": LATE,
}
SWAPPED = {"repo": "/repo", "refs": "/refs/branch.main/ref.json"}
VERSIONS = {"repo": 2, "refs": 1}


class Proxy:
    """Makes a `FaultyS3` pass everything on to a real service, but for requests that are chosen."""

    def __init__(self, faulty: FaultyS3, endpoint: str) -> None:
        self._target = urlsplit(endpoint).netloc
        self.choose: Callable[[Seen], str | Say] = lambda seen: OK
        self.late: list[Seen] = []
        self.struck = 0
        self._faulty = faulty
        self._behave = faulty.behave
        faulty.carry_out = self.carry_out  # type: ignore[method-assign]
        faulty.behave = self.behave  # type: ignore[method-assign]

    async def behave(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        choice = self.choose(seen)
        self.struck += choice != OK
        if choice == LATE:
            self.late.append(seen)
            choice = RESET
        self._faulty.behaviours = [choice]
        going_on = await self._behave(seen, writer)
        if choice == OK and self.late and seen.method == "PUT" and seen.path == self.late[0].path:
            self.carry_out(self.late.pop())
        return going_on

    def carry_out(self, seen: Seen) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection(self._target, timeout=10)
        headers = {name: value for name, value in seen.headers.items() if name not in ("connection",)}
        connection.request(seen.method, seen.path, seen.body, headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        kept = {n: v for n, v in answer.getheaders() if n.lower() not in ("content-length", "connection", "date")}
        return answer.status, body, {**kept, "Date": answer.headers["Date"]}


@pytest.fixture
async def proxy(moto_service: services.S3Service) -> AsyncIterator[tuple[Proxy, S3Storage]]:
    async with serving() as faulty:
        storage = S3Storage(
            BUCKET,
            uuid.uuid4().hex,
            options=S3Options(
                region=moto_service.region, endpoint_url=faulty.endpoint, allow_http=True, force_path_style=True
            ),
            credentials=S3Credentials.Static(S3StaticCredentials(moto_service.access_key, moto_service.secret_key)),
            settings=StorageSettings(retries=StorageRetriesSettings(max_tries=2, initial_backoff_ms=1)),
        )
        yield Proxy(faulty, moto_service.endpoint), storage
        await storage.aclose()


def strike(path: str, behaviour: str | Say, times: int) -> Callable[[Seen], str | Say]:
    """Lets the first PUTs of an object suffer."""
    left = times

    def choose(seen: Seen) -> str | Say:
        nonlocal left
        if seen.method == "PUT" and seen.path.endswith(path) and "if-match" in seen.headers and left:
            left -= 1
            return behaviour
        return OK

    return choose


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layout", VERSIONS)
async def test_a_commit_lands_exactly_once_with_any_fate_of_its_answer(
    proxy: tuple[Proxy, S3Storage], layout: str, fault: str, times: int
) -> None:
    server, storage = proxy
    repo = await icechunk.Repository.create_async(storage, spec_version=VERSIONS[layout])
    made = []
    for number in range(2):
        session = await repo.writable_session_async("main")
        if number == 0:
            # The first request, which checks whether the store honours If-Match, is not meant.
            await prepare_writes(repo)
            server.choose = strike(SWAPPED[layout], FAULTS[fault], times)
        made.append(await session.commit_async(f"commit {number}", allow_empty=True))
    assert 1 <= server.struck <= times
    server.choose = lambda seen: OK
    other = await icechunk.Repository.open_async(storage)
    history = [(info.message, info.id) async for info in other.async_ancestry(branch="main")]
    assert history[:-1] == [("commit 1", made[1]), ("commit 0", made[0])]
    assert await other.lookup_branch_async("main") == made[1]
    await repo.aclose()
    await other.aclose()
