from __future__ import annotations

import asyncio
import pickle
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from zarr.core.buffer import default_buffer_prototype

from icechunk import Repository, s3_storage
from icechunk.config import S3Options
from icechunk.credentials import AnyS3Credential, S3Credentials, S3StaticCredentials, s3_refreshable_credentials
from icechunk.errors import InvalidInputError, StorageError
from icechunk.runtime.clock import Sources
from icechunk.storage.s3.credentials import key_provider
from icechunk.storage.s3.storage import S3Storage
from tests.raising import raises
from tests.storage.s3.faulty_s3 import Say, serving

_calls: list[str] = []
_answers: list[S3StaticCredentials | Exception] = []


def fetch() -> S3StaticCredentials:
    """A function as users give it; at the top of a module, so that it pickles by name."""
    answer = _answers.pop(0)
    _calls.append("call")
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.fixture(autouse=True)
def _fresh() -> None:
    _calls.clear()
    _answers.clear()


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> int:
        return int(self.now.timestamp() * 1e6)

    def key(self, name: str, minutes: float) -> S3StaticCredentials:
        return S3StaticCredentials(name, "secret", "token", self.now + timedelta(minutes=minutes))


def storage_on(endpoint: str, credentials: AnyS3Credential | None) -> S3Storage:
    return S3Storage(
        "b",
        options=S3Options(region="us-east-1", endpoint_url=endpoint, allow_http=True, force_path_style=True),
        credentials=credentials,
    )


async def test_keys_are_fetched_again_before_they_expire() -> None:
    clock = Clock()
    keys = key_provider(s3_refreshable_credentials(fetch), Sources(wall_us=clock))
    _answers.extend([clock.key("one", 60), clock.key("two", 120)])
    assert (await keys.get()).access_key_id == "one"  # type: ignore[union-attr]
    clock.now += timedelta(minutes=54)
    assert (await keys.get()).access_key_id == "one"  # type: ignore[union-attr]
    clock.now += timedelta(minutes=2)
    assert (await keys.get()).access_key_id == "two"  # type: ignore[union-attr]
    assert len(_calls) == 2


async def test_many_requests_share_one_call() -> None:
    clock = Clock()
    keys = key_provider(s3_refreshable_credentials(fetch), Sources(wall_us=clock))
    _answers.append(clock.key("one", 60))
    found = await asyncio.gather(*(keys.get() for _ in range(20)))
    assert {key.access_key_id for key in found if key is not None} == {"one"}
    assert len(_calls) == 1


async def test_a_refresh_that_fails_early_does_not_fail_requests() -> None:
    clock = Clock()
    keys = key_provider(s3_refreshable_credentials(fetch), Sources(wall_us=clock))
    _answers.extend([clock.key("one", 60), OSError("vault is down"), OSError("vault is down")])
    await keys.get()
    clock.now += timedelta(minutes=58)
    assert (await keys.get()).access_key_id == "one"  # type: ignore[union-attr]
    clock.now += timedelta(minutes=3)
    with raises(InvalidInputError, "invalid-credentials", "S3Credentials.Refreshable", "OSError"):
        await keys.get()


async def test_initial_keys_are_used_before_the_function_is_called() -> None:
    clock = Clock()
    given = S3Credentials.Refreshable(pickle.dumps(fetch), clock.key("initial", 60))
    keys = key_provider(given, Sources(wall_us=clock))
    assert (await keys.get()).access_key_id == "initial"  # type: ignore[union-attr]
    assert _calls == []


async def test_an_expired_token_is_replaced_once_and_the_request_succeeds() -> None:
    _answers.extend(
        [S3StaticCredentials("one", "s"), S3StaticCredentials("two", "s"), S3StaticCredentials("three", "s")]
    )
    async with serving() as server:
        storage = storage_on(server.endpoint, s3_refreshable_credentials(fetch))
        server.objects["/b/x"] = (b"content", {})
        server.behaviours = [Say(400, "ExpiredToken")]
        assert (await storage.get("x")).data == b"content"
        names = [seen.headers["authorization"].split("Credential=")[1].split("/")[0] for seen in server.seen]
        assert names == ["one", "two"]
        server.behaviours = [Say(403, "ExpiredToken"), Say(403, "ExpiredToken")]
        with raises(StorageError, "object-store", "ExpiredToken"):
            await storage.get("x")


async def test_anonymous_requests_are_not_signed() -> None:
    async with serving() as server:
        server.objects["/b/x"] = (b"content", {})
        await storage_on(server.endpoint, S3Credentials.Anonymous()).get("x")
        assert "authorization" not in server.seen[0].headers
        assert "x-amz-date" not in server.seen[0].headers


async def test_the_environment_gives_keys_and_their_lack_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    async with serving() as server:
        server.objects["/b/x"] = (b"content", {})
        with raises(StorageError, "invalid-credentials", "AWS_ACCESS_KEY_ID"):
            await storage_on(server.endpoint, None).get("x")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "FROMENV")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        await storage_on(server.endpoint, None).get("x")
        assert "Credential=FROMENV/" in server.seen[0].headers["authorization"]


@pytest.mark.parametrize("name", ["access_key_id", "secret_access_key", "session_token"])
async def test_a_key_with_a_line_break_names_the_setting_that_it_came_from(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"access_key_id": "AKIA", "secret_access_key": "hush", "session_token": "hush", name: "hush\n"}
    with pytest.raises(InvalidInputError) as caught:
        s3_storage(bucket="b", prefix=None, **keys)  # type: ignore[arg-type]
    assert caught.value.kind == "invalid-credentials"
    _answers.append(S3StaticCredentials(**keys))  # type: ignore[arg-type]
    provider = key_provider(s3_refreshable_credentials(fetch), Sources())
    with pytest.raises(InvalidInputError) as called:
        await provider.get()
    for key, value in keys.items():
        monkeypatch.setenv(f"AWS_{key.upper()}", value)
    with pytest.raises(InvalidInputError) as chained:
        await key_provider(None, Sources()).get()
    for error, source in ((caught.value, "given"), (called.value, "get_credentials"), (chained.value, "env")):
        assert f"the {name} " in error.message
        assert source in error.message
        assert "hush" not in error.message


async def test_a_function_that_fails_is_named_with_its_place_and_without_its_arguments() -> None:
    _answers.append(PermissionError("hush"))
    with pytest.raises(InvalidInputError) as caught:
        await key_provider(s3_refreshable_credentials(fetch), Sources()).get()
    assert caught.value.kind == "invalid-credentials"
    assert f"PermissionError at {__file__}:" in caught.value.message
    assert "in fetch" in caught.value.message
    assert "hush" not in caught.value.message


async def test_scattered_credentials_are_pickled_and_cost_one_call() -> None:
    _answers.append(S3StaticCredentials("scattered", "s"))
    async with serving() as server:
        storage = s3_storage(
            bucket="b",
            prefix=None,
            region="us-east-1",
            endpoint_url=server.endpoint,
            allow_http=True,
            force_path_style=True,
            get_credentials=fetch,
            scatter_initial_credentials=True,
        )
        assert _calls == ["call"]
        repository = await Repository.create_async(storage)
        copy = pickle.loads(pickle.dumps(repository))
        session = pickle.loads(pickle.dumps(await copy.readonly_session_async("main")))
        assert [info async for info in copy.async_ancestry(branch="main")]
        assert await session.store.get("zarr.json", default_buffer_prototype()) is None
        assert all("Credential=scattered/" in seen.headers["authorization"] for seen in server.seen)
        for each in (repository, copy):
            await each.aclose()
    assert _calls == ["call"]
