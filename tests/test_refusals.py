"""A certain refusal by a store is raised at once, with its message, and leaves nothing behind, as users see it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import icechunk
from icechunk import Repository, Storage
from icechunk.errors import CommitOutcomeUnknown, IcechunkError, InvalidInputError, StorageError
from icechunk.storage import outcome
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.outcome import refused
from icechunk.testing.scripted import Request, ScriptedStorage, Send, lost_answer
from tests.nodes import write_node
from tests.raising import raises

GROUP = b'{"zarr_format":3,"node_type":"group"}'
LAYOUTS = ["log", "repo", "refs"]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(autouse=True)
def _layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "layout" in request.fixturenames:
        monkeypatch.setenv("ICECHUNK_LAYOUT", request.getfixturevalue("layout"))


def changes_refs(request: Request) -> bool:
    """Whether a request makes a change visible, in whatever layout."""
    return request.verb in ("put", "delete") and (request.key == "repo" or request.key.startswith(("log/", "refs/")))


def answering(storage: ScriptedStorage, error: Callable[[], Exception]) -> None:
    async def script(request: Request, send: Send) -> object:
        if changes_refs(request):
            raise error()
        return await send()

    storage.script = script


def denied() -> StorageError:
    return refused(StorageError("access denied (AccessDenied: policy of log/)"))


async def opened(layout: str) -> tuple[Repository, ScriptedStorage]:
    storage = ScriptedStorage(MemoryStorage())
    repository = await Repository.create_async(storage)
    assert str(repository.layout) == layout
    await repository.create_branch_async("precious", await repository.lookup_branch_async("main"))
    return repository, storage


async def commit(repository: Repository, name: str) -> str:
    session = await repository.writable_session_async("main")
    await write_node(session, f"/{name}", GROUP)
    return await session.commit_async(name)


@every_layout
async def test_a_session_whose_commit_is_refused_can_commit_again(layout: str) -> None:
    repository, storage = await opened(layout)
    session = await repository.writable_session_async("main")
    await write_node(session, "/a", GROUP)
    answering(storage, denied)
    with raises(StorageError, "storage-other", "AccessDenied") as caught:
        await session.commit_async("a")
    assert caught.value.refused
    assert session.unsettled_commit is None
    await write_node(session, "/b", GROUP)
    storage.script = None
    snapshot = await session.commit_async("a and b")
    assert await repository.lookup_branch_async("main") == snapshot
    await repository.aclose()


@every_layout
@pytest.mark.parametrize("answer", [denied, lost_answer], ids=["refused", "lost"])
async def test_a_branch_whose_deletion_was_not_acknowledged_is_kept_by_later_changes(
    layout: str, answer: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "backoff_s", lambda *_: 0.0)
    repository, storage = await opened(layout)
    answering(storage, answer)
    with pytest.raises(IcechunkError) as caught:
        await repository.delete_branch_async("precious")
    assert isinstance(caught.value, CommitOutcomeUnknown) is (answer is lost_answer)
    storage.script = None
    await commit(repository, "unrelated")
    assert await repository.list_branches_async() == {"main", "precious"}
    await repository.aclose()


@every_layout
async def test_creating_where_nothing_may_be_written_fails_at_once(layout: str) -> None:
    storage = ScriptedStorage(MemoryStorage())

    async def script(request: Request, send: Send) -> object:
        if request.verb == "put":
            raise denied()
        return await send()

    storage.script = script
    with raises(StorageError, "storage-other", "AccessDenied"):
        await Repository.create_async(storage)
    assert len(storage.of("put")) <= 2


@every_layout
async def test_creating_below_a_file_fails_at_once(layout: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"here")
    with pytest.raises(StorageError) as caught:
        await asyncio.wait_for(
            Repository.create_async(icechunk.local_filesystem_storage(str(tmp_path / "file"))), timeout=5
        )
    assert caught.value.kind == "io"
    assert (tmp_path / "file").read_bytes() == b"here"


class _Unable(BaseHTTPRequestHandler):
    """Answers 501 to every PUT, and as an empty bucket otherwise."""

    def do_GET(self) -> None:
        listing = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
        missing = b"<Error><Code>NoSuchKey</Code></Error>"
        self._answer(*((200, listing) if "list-type" in self.path else (404, missing)))

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.puts.append(self.path)  # type: ignore[attr-defined]
        self._answer(501, b"<Error><Code>NotImplemented</Code><Message>no conditional writes</Message></Error>")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def unable() -> Iterator[tuple[Storage, list[str]]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Unable)
    server.puts = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield (
        icechunk.s3_storage(
            bucket="b",
            prefix="p",
            region="us-east-1",
            endpoint_url=f"http://127.0.0.1:{server.server_port}",
            allow_http=True,
            force_path_style=True,
            access_key_id="a",
            secret_access_key="s",
        ),
        server.puts,  # type: ignore[attr-defined]
    )
    server.shutdown()
    server.server_close()


@every_layout
async def test_creating_on_a_store_without_conditional_writes_fails_at_once(
    layout: str, unable: tuple[Storage, list[str]]
) -> None:
    storage, puts = unable
    with raises(StorageError, "object-store", "NotImplemented"):
        await asyncio.wait_for(Repository.create_async(storage), timeout=10)
    assert len(puts) <= 2
    await storage.aclose()


@pytest.mark.parametrize("local", [True, False])
async def test_a_name_that_is_too_long_for_format_1_is_refused_without_side_effects(
    local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICECHUNK_LAYOUT", "refs")
    storage = icechunk.local_filesystem_storage(str(tmp_path)) if local else MemoryStorage()
    repository = await Repository.create_async(storage)
    tip = await repository.lookup_branch_async("main")
    name = "x" * (300 if local else 1100)
    for refusing in (repository.create_branch_async(name, tip), repository.create_tag_async(name, tip)):
        with pytest.raises(InvalidInputError) as caught:
            await refusing
        assert caught.value.kind == "invalid-ref-name"
    fits = "x" * (248 if local else 900)
    await repository.create_branch_async(fits, tip)
    await repository.create_tag_async(fits, tip)
    await repository.delete_tag_async(fits)
    await commit(repository, "a")
    assert await repository.list_branches_async() == {"main", fits}
    await repository.aclose()
