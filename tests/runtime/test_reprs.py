"""Representations of objects: enough to recognise them, no secret, and no active HTML."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import zarr

import icechunk

SECRETS = ("hush-hush", "AKIA1234567890SECRET")


def on_s3() -> Any:
    return icechunk.s3_storage(
        bucket="b<i>",
        prefix="p",
        region="us-east-1",
        endpoint_url="http://user:hush-hush@localhost:1/",
        allow_http=True,
        force_path_style=True,
        access_key_id=SECRETS[1],
        secret_access_key="hush-hush",
        session_token="hush-hush",
        headers={"x-auth-token": "hush-hush"},
    )


@pytest.fixture
def repo() -> icechunk.Repository:
    config = icechunk.RepositoryConfig.default()
    config.set_virtual_chunk_container(
        icechunk.VirtualChunkContainer("s3://foo/", icechunk.s3_store(region="us-east-1"), name="<b>")
    )
    repo = icechunk.Repository.create(icechunk.in_memory_storage(), config)
    with repo.transaction("main", message="a <script>&", metadata={"<k>": "<v>"}) as store:
        zarr.create_array(store, name="a&b", shape=(2,), chunks=(1,), dtype="i1")[:] = 1
    return repo


Make = Callable[[icechunk.Repository], Any]
SHOWN: dict[str, tuple[Make, tuple[str, ...]]] = {
    "repository": (lambda r: r, ("icechunk.Repository (v2)", "layout: log", "type: in-memory", "config")),
    "session": (
        lambda r: r.writable_session("main"),
        (
            "icechunk.session.Session",
            "read_only: False",
            "snapshot_id: ",
            "branch: main",
            "has_uncommitted_changes: False",
        ),
    ),
    "read-only session": (lambda r: r.readonly_session("main"), ("read_only: True", "snapshot_id: ")),
    "fork": (lambda r: r.writable_session("main").fork(), ("read_only: False", "snapshot_id: ")),
    "store": (
        lambda r: r.writable_session("main").store,
        ("icechunk.IcechunkStore", "read_only: False", "snapshot_id: ", "branch: main"),
    ),
    "diff": (
        lambda r: r.diff(from_snapshot_id="1CECHNKREP0F1RSTCMT0", to_branch="main"),
        ("Arrays created:", "/a&b", "Chunks updated:", "[0]"),
    ),
    "snapshot": (
        lambda r: next(iter(r.ancestry(branch="main"))),
        ("id", "parent_id", "1CECHNKREP0F1RSTCMT0", "written_at", "message", "a <script>&", "metadata", "<v>"),
    ),
    "configuration": (
        lambda r: r.config,
        ("inline_chunk_threshold_bytes", "compression", "caching", "s3://foo/", "<b>"),
    ),
    "memory": (lambda r: r.storage, ("icechunk.Storage", "type: in-memory")),
    "S3": (
        lambda r: on_s3(),
        (
            "type: S3 (native)",
            "bucket: b<i>",
            "prefix: p",
            "region: us-east-1",
            "endpoint_url: http://****@localhost:1",
            "allow_http: True",
            "force_path_style: True",
        ),
    ),
    "settings": (lambda r: on_s3().default_settings(), ("concurrency", "retries", "max_tries", "storage_class")),
    "status": (
        lambda r: r.get_status(),
        ("icechunk.repository.RepoStatus", "availability: Online", "set_at", "limited_availability_reason"),
    ),
    "flag": (lambda r: r.feature_flags()[0], ("id", "name", "move_node", "default_enabled", "setting", "enabled")),
    "update": (lambda r: next(iter(r.ops_log())), ("NewCommit", "branch", "main", "updated_at", "backup_path")),
    "object": (
        lambda r: r.storage.list_objects_metadata()[0],
        ("StorageObjectInfo", "key", "size_bytes", "created_at"),
    ),
    "attribution": (lambda r: icechunk.Attribution(client="c/1"), ("client", "c/1", "workload", "principal")),
    "conflict": (
        lambda r: icechunk.Conflict(icechunk.ConflictType.ChunkDoubleUpdate, "/a", [[0]]),
        ("icechunk.conflicts.Conflict", "conflict_type: ChunkDoubleUpdate", "path: /a", "conflicted_chunks: [[0]]"),
    ),
    "container": (
        lambda r: icechunk.VirtualChunkContainer("s3://foo/", icechunk.s3_store(region="us-east-1")),
        ("name", "url_prefix", "s3://foo/", "store", "us-east-1"),
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_objects_are_shown_as_text_and_as_html(repo: icechunk.Repository, name: str) -> None:
    make, words = SHOWN[name]
    value = make(repo)
    shown = value._repr_html_()
    for word in words:
        assert word in repr(value) + str(value)
    tree = ElementTree.fromstring(f"<page>{shown}</page>")
    # `div`s and the like only: what the names and messages say is text.
    assert {element.tag for element in tree.iter()} <= {"page", "style", "div", "span", "details", "summary", "pre"}
    text = "".join(tree.itertext())
    for word in words:
        for part in word.rstrip(":").split(": "):
            assert part in text


TOLD = ("snapshot", "status", "flag", "update", "object", "conflict")


@pytest.mark.parametrize("name", TOLD)
def test_facts_are_described_one_to_a_line(repo: icechunk.Repository, name: str) -> None:
    value = SHOWN[name][0](repo)
    title, *lines = repr(value).splitlines()
    assert title == f"<{type(value)._public_name}>"
    assert repr(value) == str(value)
    assert all(": " in line for line in lines if line[0] not in " }")
    assert not [line for line in lines if line.endswith('"')]


def test_a_message_with_lines_of_its_own_stays_on_one_line(repo: icechunk.Repository) -> None:
    id = repo.writable_session("main").commit("one\nid: two", allow_empty=True)
    assert 'message: "one\\nid: two"' in repr(repo.lookup_snapshot(id)).splitlines()


def test_a_session_that_only_reads_has_neither_a_branch_nor_changes_to_show(repo: icechunk.Repository) -> None:
    for session in (repo.readonly_session("main"), repo.readonly_session(snapshot_id=repo.lookup_branch("main"))):
        assert repr(session).splitlines()[0] == "<icechunk.session.Session>"
        for shown in (repr(session), session._repr_html_()):
            assert "branch" not in shown
            assert "has_uncommitted_changes" not in shown


OPTIONS = icechunk.S3Options(region="us-east-1", allow_http=True)
STORES = (
    icechunk.ObjectStoreConfig.InMemory(),
    icechunk.ObjectStoreConfig.LocalFileSystem(Path("/tmp/a b")),
    icechunk.ObjectStoreConfig.S3(OPTIONS),
    icechunk.ObjectStoreConfig.S3Compatible(OPTIONS),
    icechunk.ObjectStoreConfig.Tigris(OPTIONS),
    icechunk.ObjectStoreConfig.Gcs({"application": "a"}),
    icechunk.ObjectStoreConfig.Azure({"account": "a"}),
    icechunk.ObjectStoreConfig.Http({"timeout": "5s"}, None),
)


@pytest.mark.parametrize("store", STORES, ids=lambda store: type(store).__name__)
def test_a_store_and_its_owner_are_shown_as_the_call_that_makes_them(store: Any) -> None:
    container = icechunk.VirtualChunkContainer("s3://foo/", store, name="b")
    for value in (store, container):
        assert eval(repr(value), {"icechunk": icechunk}) == value


CREDENTIALS: list[Callable[[], Any]] = [
    lambda: icechunk.s3_static_credentials(
        access_key_id=SECRETS[1], secret_access_key="hush-hush", session_token="hush-hush"
    ),
    lambda: icechunk.S3StaticCredentials(SECRETS[1], "hush-hush", "hush-hush"),
    lambda: icechunk.gcs_static_credentials(service_account_key="hush-hush"),
    lambda: icechunk.gcs_static_credentials(bearer_token="hush-hush"),
    lambda: icechunk.GcsBearerCredential("hush-hush", expires_after=datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)),
    lambda: icechunk.azure_static_credentials(access_key="hush-hush"),
    lambda: icechunk.azure_static_credentials(sas_token="hush-hush"),
    lambda: icechunk.azure_static_credentials(bearer_token="hush-hush"),
    lambda: icechunk.containers_credentials(
        {"s3://x/": icechunk.s3_static_credentials(access_key_id=SECRETS[1], secret_access_key="hush-hush")}
    ),
    on_s3,
]


@pytest.mark.parametrize("make", CREDENTIALS)
def test_secrets_are_never_shown(make: Callable[[], Any]) -> None:
    value = make()
    for item in [value, *(value.values() if isinstance(value, dict) else ())]:
        html = item._repr_html_() if hasattr(item, "_repr_html_") else ""
        for shown in (repr(item), str(item), html, f"{item}"):
            assert not [secret for secret in SECRETS if secret in shown]
