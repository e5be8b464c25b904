"""Buckets of Google and Azure through obstore: what its answers become, and which credentials it is given."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import icechunk
from icechunk.errors import InvalidInputError, ObjectNotFoundError
from icechunk.storage.obstore.buckets import azure_options, gcs_options
from icechunk.storage.port import Range
from icechunk.virtual_access.obstore_readers import ObstoreFiles, azure_files, gcs_files
from tests.virtual_builders import FILE_BYTES

LATER = datetime.now(UTC) + timedelta(hours=1)


def refreshed_gcs() -> icechunk.GcsBearerCredential:
    return icechunk.GcsBearerCredential("token", expires_after=LATER)


def refreshed_azure() -> Any:
    return icechunk.AzureRefreshableCredential.SasToken("sas", LATER)


async def test_answers_of_obstore_have_version_time_and_size() -> None:
    obstore = pytest.importorskip("obstore", reason="the extra obstore")
    store = obstore.store.MemoryStore()
    await obstore.put_async(store, "folder/f g", FILE_BYTES)
    files = ObstoreFiles(store)
    found = await files.get("gs://bucket/folder/f%20g", Range(5, 15))
    assert found.data == FILE_BYTES[5:15]
    assert found.size == len(FILE_BYTES)
    meta = await obstore.head_async(store, "folder/f g")
    assert found.version == meta["e_tag"].strip('"')
    assert found.modified_us == round(meta["last_modified"].timestamp() * 1e6)
    assert (await files.get("gs://bucket/folder/f g", Range(990, 2000))).data == FILE_BYTES[990:]
    with pytest.raises(ObjectNotFoundError):
        await files.get("gs://bucket/none", Range(0, 1))
    with pytest.raises((InvalidInputError, icechunk.StorageError)):
        await files.get("gs://bucket/folder/f g", Range(5000, 5001))
    await files.aclose()


def test_stores_of_google_and_azure_are_made_from_containers() -> None:
    pytest.importorskip("obstore", reason="the extra obstore")
    gcs = gcs_files("gs://bucket/x/", {}, icechunk.gcs_credentials(anonymous=True))
    azure = azure_files("az://box/x/", {"account": "someone"}, icechunk.azure_credentials(access_key="a2V5"))
    assert (type(gcs._store).__name__, gcs._store.config["bucket"]) == ("GCSStore", "bucket")
    assert (type(azure._store).__name__, azure._store.config["container_name"]) == ("AzureStore", "box")


async def test_credentials_become_obstores() -> None:
    assert gcs_options(None) == ({}, None)
    assert gcs_options(icechunk.gcs_credentials(from_env=True)) == ({}, None)
    assert gcs_options(icechunk.gcs_credentials(anonymous=True)) == ({"skip_signature": "true"}, None)
    assert gcs_options(icechunk.gcs_credentials(service_account_file="/x")) == ({"service_account": "/x"}, None)
    assert gcs_options(icechunk.gcs_credentials(service_account_key="{}")) == ({"service_account_key": "{}"}, None)
    _, provider = gcs_options(icechunk.gcs_credentials(bearer_token="t"))
    assert provider is not None
    assert await provider() == {"token": "t", "expires_at": None}
    _, provider = gcs_options(icechunk.gcs_credentials(get_credentials=refreshed_gcs))
    assert provider is not None
    assert await provider() == {"token": "token", "expires_at": LATER}
    assert azure_options(None) == ({}, None)
    assert azure_options(icechunk.azure_credentials(access_key="k")) == ({"access_key": "k"}, None)
    assert azure_options(icechunk.azure_credentials(sas_token="s")) == ({"sas_token": "s"}, None)
    assert azure_options(icechunk.azure_credentials(bearer_token="b")) == ({"bearer_token": "b"}, None)
    _, provider = azure_options(icechunk.azure_credentials(get_credentials=refreshed_azure))
    assert provider is not None
    assert await provider() == {"sas_token": "sas", "expires_at": LATER}


def test_without_obstore_the_error_names_the_package_to_install() -> None:
    script = (
        "import sys; sys.modules['obstore'] = None\n"
        "import icechunk\n"
        "from icechunk.virtual_access.obstore_readers import gcs_files\n"
        "try:\n    gcs_files('gs://b/', {}, None)\n"
        "except icechunk.StorageError as error:\n    print(error.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "aioicechunk[obstore]" in done.stdout
