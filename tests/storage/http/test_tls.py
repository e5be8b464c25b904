"""Repositories and virtual chunks behind https: which certificates are taken, and that nothing goes on unencrypted."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

import icechunk
from icechunk.config import StorageRetriesSettings, StorageSettings
from icechunk.credentials import HttpAccess
from icechunk.errors import ErrorKind, StorageError
from icechunk.storage.http.storage import HttpStorage
from icechunk.storage.local.storage import LocalStorage
from icechunk.storage.s3.requests import _tls_context
from tests.raising import raises
from tests.storage.http.certificates import tls_contexts
from tests.storage.http.web_server import WebServer, serving_files
from tests.virtual_builders import FILE_BYTES, array, config_of

QUICK = StorageSettings(retries=StorageRetriesSettings(max_tries=3, initial_backoff_ms=1))
ANY_CERTIFICATE = {"allow_invalid_certificates": "true"}


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    tls, _ = tls_contexts(tmp_path)
    (tmp_path / "served").mkdir()
    with serving_files(tmp_path / "served", tls) as server:
        yield server


async def test_a_certificate_of_an_unknown_authority_is_refused_at_once_with_a_remedy(web: WebServer) -> None:
    (web.folder / "x").write_bytes(b"1")
    storage = HttpStorage(web.url, settings=QUICK)
    with raises(StorageError, "object-store", "CERTIFICATE_VERIFY_FAILED", "SSL_CERT_FILE") as caught:
        await storage.get("x")
    assert "tries" not in caught.value.message
    assert web.seen == []
    await storage.aclose()


async def test_a_repository_is_read_where_any_certificate_will_do(web: WebServer) -> None:
    made = await icechunk.Repository.create_async(LocalStorage(web.folder))
    session = await made.writable_session_async("main")
    await zarr.api.asynchronous.create_array(store=session.store, name="a", data=np.arange(6), chunks=(2,))
    await session.commit_async("commit")
    await made.aclose()
    storage = icechunk.http_storage(web.url, ANY_CERTIFICATE, {"authorization": "Bearer t"}).with_settings(QUICK)
    repo = await icechunk.Repository.open_async(storage)
    reading = await repo.readonly_session_async("main")
    found = await zarr.api.asynchronous.open_array(store=reading.store, path="a", mode="r")
    np.testing.assert_array_equal(await found.getitem(slice(None)), np.arange(6))
    assert {headers["authorization"] for _, _, headers in web.seen} == {"Bearer t"}
    await repo.aclose()
    await storage.aclose()


def test_the_authority_that_the_environment_names_is_trusted(web: WebServer, tmp_path: Path) -> None:
    (web.folder / "x").write_bytes(b"over tls")
    script = (
        "import asyncio, icechunk, sys\n"
        "async def main():\n"
        "    storage = icechunk.http_storage(sys.argv[1])\n"
        "    print((await storage.get('x')).data.decode())\n"
        "    await storage.aclose()\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, web.url],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SSL_CERT_FILE": str(tmp_path / "cert.pem")},
    )
    assert done.stdout == "over tls\n", done.stderr


async def test_a_redirect_to_plain_http_is_not_followed(web: WebServer, tmp_path: Path) -> None:
    with serving_files(web.folder) as plain:
        (web.folder / "y").write_bytes(b"1")
        web.redirects["/x"] = f"{plain.url}/y"
        web.redirects["/z"] = f"{web.url}/y"
        storage = HttpStorage(web.url, ANY_CERTIFICATE, settings=QUICK)
        with pytest.raises(StorageError) as caught:
            await storage.get("x")
        assert caught.value.kind == ErrorKind.BAD_REDIRECT
        assert plain.seen == []
        assert (await storage.get("z")).data == b"1"
        await storage.aclose()


@pytest.mark.parametrize("options", [{}, ANY_CERTIFICATE], ids=["known", "any"])
async def test_virtual_chunks_use_the_certificates_of_their_container(web: WebServer, options: dict[str, str]) -> None:
    (web.folder / "f").write_bytes(FILE_BYTES)
    prefix = f"{web.url}/"
    config = config_of(icechunk.VirtualChunkContainer(prefix, icechunk.http_store(options)))
    config.storage = QUICK
    repo = await icechunk.Repository.create_async(icechunk.in_memory_storage(), config, {prefix: HttpAccess})
    session = await repo.writable_session_async("main")
    found = array(session.store)
    await session.store.set_virtual_ref_async("a/c/0", f"{prefix}f", offset=5, length=10)
    if options:
        np.testing.assert_array_equal(np.asarray(found[:10]), np.frombuffer(FILE_BYTES[5:15], "u1"))
    else:
        with raises(StorageError, "virtual-chunk-fetch", "CERTIFICATE_VERIFY_FAILED"):
            found[:10]
    await repo.aclose()


@pytest.mark.parametrize("source", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle"])
def test_a_bundle_that_is_named_for_aws_replaces_the_systems_authorities(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls_contexts(tmp_path)
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("SSL_CERT_FILE", ssl.get_default_verify_paths().cafile or "")
    assert len(_tls_context().get_ca_certs()) > 1
    for path in (tmp_path / "cert.pem", tmp_path / "nothing"):
        if source == "ca_bundle":
            (tmp_path / "config").write_text(f"[default]\nca_bundle = {path}\n")
        else:
            monkeypatch.setenv(source, str(path))
        if path.exists():
            [trusted] = _tls_context().get_ca_certs()
            assert trusted["subject"] == ((("commonName", "test"),),)
        else:
            with pytest.raises(StorageError) as caught:
                _tls_context()
            assert caught.value.kind == "storage-config"
            assert source in caught.value.message
