"""Clients with few rights: what they may do works in every layout, and the rest names the right that is missing."""

from __future__ import annotations

import asyncio
import json
import pickle
import uuid
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime

import botocore.session
import numpy as np
import pytest
import zarr.api.asynchronous

import icechunk
from icechunk import AccessDeniedError, Repository
from icechunk.errors import IcechunkError, ObjectNotFoundError, StorageError
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.outcome import refused
from icechunk.storage.port import Storage
from icechunk.storage.rights import Right, Service, access_denied
from icechunk.testing.scripted import Request, ScriptedStorage, Send
from tests.conftest import s3_storage_on
from tests.nodes import write_node
from tools import services

GROUP = b'{"zarr_format":3,"node_type":"group"}'
LAYOUTS = ["log", "repo", "refs"]
RIGHTS = {
    "get": {Right.READ},
    "get+list": {Right.READ, Right.LIST},
    "get+put": {Right.READ, Right.WRITE},
    "get+put+list": {Right.READ, Right.WRITE, Right.LIST},
    "all": set(Right),
}
ACTIONS = {
    Right.READ: "s3:GetObject",
    Right.LIST: "s3:ListBucket",
    Right.WRITE: "s3:PutObject",
    Right.DELETE: "s3:DeleteObject",
}
_NEEDS = {"get": Right.READ, "head": Right.READ, "list": Right.LIST, "put": Right.WRITE, "copy": Right.WRITE}
_NEEDS |= {"delete": Right.DELETE}

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
hiding = pytest.mark.parametrize("hides", [False, True], ids=["404", "403"])


def denied(right: Right, key: str, said: str = "AccessDenied: Access Denied.") -> StorageError:
    return refused(access_denied(Service.S3, right, key, f"{right} {key!r}", said, "the policy"))


class _Client(ScriptedStorage):
    """One whose store tells times exactly, so that collections need not wait."""

    @property
    def clock_resolution_us(self) -> int:
        return self.inner.clock_resolution_us


def with_rights(inner: Storage, rights: set[Right], *, hides: bool = False, below: str = "") -> ScriptedStorage:
    """A client of a store that allows it so much below a prefix, and all elsewhere.

    Parameters
    ----------
    hides
        Reads of what does not exist are refused, unless the client may list.
    """

    async def script(request: Request, send: Send) -> object:
        need = _NEEDS[request.verb]
        if request.key.startswith(below) and need not in rights:
            raise denied(need, request.key)
        try:
            return await send()
        except ObjectNotFoundError:
            if hides and Right.LIST not in rights:
                raise denied(Right.READ, request.key) from None
            raise

    storage = _Client(inner)
    storage.script = script
    return storage


async def make(storage: Storage, layout: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository with commits on two branches, a tag, and something to collect; the id of the tagged snapshot."""
    monkeypatch.setenv("ICECHUNK_LAYOUT", layout)
    async with await Repository.create_async(storage) as repository:
        first = await commit(repository, "first")
        await repository.create_tag_async("v1", first)
        await repository.create_tag_async("gone", first)
        await repository.delete_tag_async("gone")
        await repository.create_branch_async("dev", first)
        await commit(repository, "dev", branch="dev")
        await commit(repository, "second")
        await storage.put("chunks/" + "0" * 20, b"garbage")
    return first


async def commit(repository: Repository, name: str, branch: str = "main") -> str:
    session = await repository.writable_session_async(branch)
    await write_node(session, f"/{name}", GROUP)
    return await session.commit_async(name)


async def missing_right(use: Awaitable[object]) -> str | None:
    """The right that a use fails for; None: it works."""
    [result] = await asyncio.gather(use, return_exceptions=True)
    if isinstance(result, AccessDeniedError):
        assert result.action == ACTIONS[Right(result.right)]
        assert result.action in str(result)
        return result.right
    if isinstance(result, BaseException):
        raise result
    return None


async def outcomes(
    storage: Storage, first: str, *, collect_from: datetime = datetime(2100, 1, 1, tzinfo=UTC)
) -> dict[str, str | None]:
    """Each use by a client that opens the repository there: the right that it misses."""
    assert await Repository.exists_async(storage)
    found: dict[str, str | None] = {}
    async with await Repository.open_async(storage) as repository:

        async def read() -> None:
            for session in (
                await repository.readonly_session_async("main"),
                await repository.readonly_session_async("dev"),
                await repository.readonly_session_async(tag="v1"),
                await repository.readonly_session_async(snapshot_id=first),
            ):
                assert await session.store.exists("first/zarr.json")
            assert [one.message async for one in repository.async_ancestry(branch="dev")][:2] == ["dev", "first"]
            with pytest.raises(icechunk.RefNotFoundError):
                await repository.lookup_tag_async("gone")
            with pytest.raises(icechunk.RefNotFoundError):
                await repository.lookup_branch_async("none")

        async def list_refs() -> None:
            assert await repository.list_branches_async() >= {"main", "dev"}
            assert await repository.list_tags_async() == {"v1"}

        async def write() -> None:
            new = await commit(repository, uuid.uuid4().hex, branch="dev")
            assert await repository.lookup_branch_async("dev") == new

        uses: dict[str, Callable[[], Awaitable[object]]] = {
            "read": read,
            "list": list_refs,
            "commit": write,
            "collect": lambda: repository.garbage_collect_async(collect_from),
        }
        for name, use in uses.items():
            found[name] = await missing_right(use())
    return found


def expected(rights: set[Right], layout: str) -> dict[str, str | None]:
    def first_of(*needed: Right) -> str | None:
        return next((str(right) for right in needed if right not in rights), None)

    collecting = (Right.LIST, Right.DELETE) if layout == "refs" else (Right.LIST, Right.WRITE, Right.DELETE)
    return {
        "read": None,
        "list": first_of(Right.LIST) if layout == "refs" else None,
        "commit": first_of(Right.WRITE),
        "collect": first_of(*collecting),
    }


@every_layout
@hiding
@pytest.mark.parametrize("granted", RIGHTS)
async def test_every_use_works_or_names_the_right_that_is_missing(
    granted: str, hides: bool, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStorage()
    first = await make(store, layout, monkeypatch)
    found = await outcomes(with_rights(store, RIGHTS[granted], hides=hides), first)
    assert found == expected(RIGHTS[granted], layout)


@every_layout
@hiding
async def test_a_session_whose_first_write_is_refused_commits_once_it_is_allowed(
    hides: bool, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStorage()
    await make(store, layout, monkeypatch)
    storage = with_rights(store, {Right.READ}, hides=hides)
    async with await Repository.open_async(storage) as repository:
        session = await repository.writable_session_async("dev")
        await write_node(session, "/a", GROUP)
        for _ in range(2):
            with pytest.raises(AccessDeniedError) as caught:
                await session.commit_async("a")
            assert (caught.value.right, caught.value.refused) == ("write", True)
            assert caught.value.key
        storage.script = with_rights(store, {Right.READ, Right.WRITE}, hides=hides).script
        snapshot = await session.commit_async("a")
        assert await repository.lookup_branch_async("dev") == snapshot


@every_layout
@hiding
async def test_sessions_are_persisted_without_listing_and_resumed_with_it(
    hides: bool, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStorage()
    await make(store, layout, monkeypatch)
    ids = []
    async with await Repository.open_async(with_rights(store, {Right.READ, Right.WRITE}, hides=hides)) as repository:
        for name in ("a", "b", "c"):
            session = await repository.writable_session_async("dev")
            await write_node(session, f"/{name}", GROUP)
            ids.append(await session.checkpoint_async())
            if name == "a":
                await session.commit_async(name)
            elif name == "b":
                await session.abandon_async()
        assert await missing_right(repository.resume_session_async(ids[2])) == "list"
    rights = {Right.READ, Right.WRITE, Right.LIST}
    async with await Repository.open_async(with_rights(store, rights, hides=hides)) as repository:
        for id, kind in zip(ids, ("session-committed", "session-abandoned"), strict=False):
            with pytest.raises(icechunk.SessionEndedError) as ended:
                await repository.resume_session_async(id)
            assert ended.value.kind == kind
        fork = await repository.join_session_async(ids[2])
        await write_node(fork, "/d", GROUP)
        await fork.checkpoint_async()
        session = await repository.resume_session_async(ids[2])
        assert await session.collect_forks_async() == 1
        await session.commit_async("c and d", rebase_with=icechunk.ConflictDetector())
        assert await repository.sessions_async() == []


@every_layout
async def test_the_error_for_an_absent_repository_says_so_or_names_the_missing_right(layout: str) -> None:
    for rights, hides in (({Right.READ}, False), ({Right.READ, Right.LIST}, True)):
        storage = with_rights(MemoryStorage(), rights, hides=hides)
        assert not await Repository.exists_async(storage)
        with pytest.raises(icechunk.RepositoryNotFoundError):
            await Repository.open_async(storage)
    storage = with_rights(MemoryStorage(), {Right.READ}, hides=True)
    for use in (Repository.exists_async(storage), Repository.open_async(storage)):
        with pytest.raises(AccessDeniedError) as caught:
            await use
        assert (caught.value.right, caught.value.key, caught.value.may_be_absent) == ("read", "repo", True)


async def test_a_log_that_may_not_be_read_is_not_taken_for_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStorage()
    await make(store, "log", monkeypatch)
    for rights in (set[Right](), {Right.WRITE}):
        with pytest.raises(AccessDeniedError) as caught:
            await Repository.open_async(with_rights(store, rights, hides=True, below="log/"))
        assert caught.value.right == "read"
        assert caught.value.key.startswith("log/")


async def test_a_client_of_a_log_without_commits_sees_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICECHUNK_LAYOUT", "log")
    store = MemoryStorage()
    writer = await Repository.create_async(store)
    async with await Repository.open_async(with_rights(store, {Right.READ}, hides=True)) as reader:
        assert await reader.lookup_branch_async("main") == await writer.lookup_branch_async("main")
        tip = await commit(writer, "a")
        await writer.checkpoint_async()
        assert await reader.lookup_branch_async("main") == tip
        tip = await commit(writer, "b")
        assert await reader.lookup_branch_async("main") == tip
    await writer.aclose()


@hiding
async def test_a_log_is_read_without_listing_where_it_was_pruned(hides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStorage()
    await make(store, "log", monkeypatch)
    slots = sorted([info.key async for page in store.list_pages("log/") for info in page])
    # All but the newest, which pruning leaves.
    await store.delete(slots[1:])
    async with await Repository.open_async(with_rights(store, {Right.READ}, hides=hides)) as reader:
        assert await reader.list_branches_async() == {"main", "dev"}


@every_layout
@hiding
async def test_creating_without_the_right_to_list_names_it(
    hides: bool, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICECHUNK_LAYOUT", layout)
    storage = with_rights(MemoryStorage(), {Right.READ, Right.WRITE}, hides=hides)
    with pytest.raises(AccessDeniedError) as caught:
        await Repository.create_async(storage)
    assert caught.value.right == "list"
    assert not storage.of("put")
    if hides:
        with pytest.raises(AccessDeniedError) as caught:
            await Repository.create_async(storage, check_clean_root=False)
        assert (caught.value.right, caught.value.may_be_absent) == ("read", True)
        assert not storage.of("put")
    else:
        async with await Repository.create_async(storage, check_clean_root=False) as repository:
            await commit(repository, "a")


@every_layout
async def test_a_branch_of_format_1_is_written_by_name_in_another_process(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStorage()
    await make(store, layout, monkeypatch)
    storage = with_rights(store, {Right.READ, Right.WRITE}, hides=True)
    async with await Repository.open_async(storage) as repository:
        tip = await repository.lookup_branch_async("dev")
        await repository.create_branch_async("new", tip)
        for taken in ("dev", "new"):
            with pytest.raises(icechunk.AlreadyExistsError):
                await repository.create_branch_async(taken, tip)
        with pytest.raises(icechunk.AlreadyExistsError) as caught:
            await repository.create_tag_async("gone", tip)
        assert caught.value.kind == "tag-previously-deleted"
        await repository.create_tag_async("v2", tip)
        assert await repository.lookup_tag_async("v2") == tip
        await repository.reset_branch_async("new", await repository.lookup_tag_async("v1"))
    async with await Repository.open_async(with_rights(store, set(Right))) as repository:
        assert await repository.list_branches_async() == {"main", "dev", "new"}
        assert await repository.lookup_branch_async("new") == await repository.lookup_tag_async("v1")


async def test_an_interrupted_conversion_is_readable_by_those_who_may_not_finish_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStorage()
    await make(store, "log", monkeypatch)
    only_log = with_rights(store, {Right.READ, Right.LIST}, below="repo")
    repository = await Repository.open_async(only_log)
    with pytest.raises(IcechunkError):
        await repository.convert_async("repo")
    await repository.aclose()
    async with await Repository.open_async(with_rights(store, {Right.READ, Right.LIST})) as reader:
        assert await reader.list_branches_async() == {"main", "dev"}
    assert (await Repository.open_async(store)).layout == "repo"


async def test_the_error_survives_pickling() -> None:
    error = denied(Right.READ, "repo")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, AccessDeniedError)
    assert (again.right, again.action, again.key, again.may_be_absent, again.refused) == (
        "read",
        "s3:GetObject",
        "repo",
        True,
        True,
    )
    assert str(again) == str(error)


def test_the_right_that_the_service_names_decides() -> None:
    said = "AccessDenied: User: arn:aws:iam::1:user/u is not authorized to perform: {} on resource: r because no policy"
    assert isinstance(denied(Right.READ, "k", said.format("s3:ListBucket")), ObjectNotFoundError)
    refusal = denied(Right.READ, "k", said.format("s3:GetObject"))
    assert isinstance(refusal, AccessDeniedError)
    assert (refusal.action, refusal.may_be_absent) == ("s3:GetObject", False)
    other = denied(Right.WRITE, "k", said.format("kms:GenerateDataKey"))
    assert isinstance(other, AccessDeniedError)
    assert (other.right, other.action) == ("write", "kms:GenerateDataKey")


# -- a real service, with policies -----------------------------------------------------------------------------------


@pytest.fixture
def guarded(minio: services.S3Service) -> Iterator[tuple[Storage, Callable[[set[Right]], Storage]]]:
    """A storage of a bucket's owner, and a function that makes one of clients that its policy allows so much."""
    bucket = f"rights-{uuid.uuid4().hex}"
    minio.make_bucket(bucket)
    owner = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=minio.endpoint,
        region_name=minio.region,
        aws_access_key_id=minio.access_key,
        aws_secret_access_key=minio.secret_key,
    )

    def client(rights: set[Right]) -> Storage:
        policy = [(f"arn:aws:s3:::{bucket}/*", [ACTIONS[right] for right in rights - {Right.LIST}])]
        policy += [(f"arn:aws:s3:::{bucket}", [ACTIONS[Right.LIST]])] if Right.LIST in rights else []
        statements = [
            {"Effect": "Allow", "Principal": {"AWS": ["*"]}, "Action": actions, "Resource": [resource]}
            for resource, actions in policy
        ]
        document = {"Version": "2012-10-17", "Statement": statements}
        owner.put_bucket_policy(Bucket=bucket, Policy=json.dumps(document))
        return icechunk.s3_storage(
            bucket=bucket,
            prefix="p",
            region=minio.region,
            endpoint_url=minio.endpoint,
            allow_http=True,
            force_path_style=True,
            anonymous=True,
        )

    yield s3_storage_on(minio, bucket=bucket, prefix="p"), client
    owner.close()


@pytest.mark.minio
@every_layout
@pytest.mark.parametrize("granted", RIGHTS)
async def test_policies_of_a_real_service_are_named(
    granted: str,
    layout: str,
    guarded: tuple[Storage, Callable[[set[Right]], Storage]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, client = guarded
    first = await make(storage, layout, monkeypatch)
    found = await outcomes(client(RIGHTS[granted]), first)
    assert found == expected(RIGHTS[granted], layout)


@pytest.mark.minio
async def test_a_session_without_the_right_to_write_goes_on_once_the_policy_grants_it(
    guarded: tuple[Storage, Callable[[set[Right]], Storage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, client = guarded
    await make(storage, "log", monkeypatch)
    async with await Repository.open_async(client({Right.READ})) as repository:
        session = await repository.writable_session_async("main")
        array = await zarr.api.asynchronous.create_array(
            session.store, name="a", shape=(1 << 17,), chunks=(1 << 17,), dtype="f8", compressors=None
        )
        await array.setitem(slice(None), np.random.default_rng(0).random(1 << 17))
        with pytest.raises(AccessDeniedError) as caught:
            await session.commit_async("a")
        assert (caught.value.right, caught.value.action) == ("write", "s3:PutObject")
        client({Right.READ, Right.WRITE})
        snapshot = await session.commit_async("a")
        assert await repository.lookup_branch_async("main") == snapshot
    await storage.aclose()
