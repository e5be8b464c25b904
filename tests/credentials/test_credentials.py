"""Credentials: chosen by their arguments, refused when they contradict, never shown."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from icechunk import credentials as c
from icechunk.errors import ErrorKind, InvalidInputError
from tests.raising import raises

LATER = datetime(2030, 1, 1, tzinfo=UTC)


def fetch_s3() -> c.S3StaticCredentials:
    return c.S3StaticCredentials("AKIA", "SECRET", "SECRET", LATER)


def fetch_gcs() -> c.GcsBearerCredential:
    return c.GcsBearerCredential("SECRET", expires_after=LATER)


def fetch_azure() -> c.AnyAzureRefreshableCredential:
    return c.AzureRefreshableCredential.SasToken("SECRET", LATER)


def fetch_nonsense() -> int:
    return 3


def fail() -> c.S3StaticCredentials:
    raise OSError("SECRET")


EVERY: list[Any] = [
    c.S3StaticCredentials("AKIA1234567", "SECRET", "SECRET"),
    c.s3_static_credentials(access_key_id="AKIA1234567", secret_access_key="SECRET"),
    c.s3_anonymous_credentials(),
    c.s3_from_env_credentials(),
    c.s3_refreshable_credentials(fetch_s3),
    c.s3_refreshable_credentials(fetch_s3, scatter_initial_credentials=True),
    c.gcs_credentials(service_account_file="/path"),
    c.gcs_credentials(service_account_key="SECRET"),
    c.gcs_credentials(application_credentials="/path"),
    c.gcs_credentials(bearer_token="SECRET"),
    c.gcs_anonymous_credentials(),
    c.gcs_from_env_credentials(),
    c.gcs_refreshable_credentials(fetch_gcs, True),
    fetch_gcs(),
    c.azure_credentials(access_key="SECRET"),
    c.azure_credentials(sas_token="SECRET"),
    c.azure_credentials(bearer_token="SECRET"),
    c.azure_anonymous_credentials(),
    c.azure_from_env_credentials(),
    c.azure_refreshable_credentials(fetch_azure, True),
    c.AzureRefreshableCredential.AccessKey("SECRET"),
    c.AzureRefreshableCredential.BearerToken("SECRET", None),
    c.LocalFileSystemAccess,
    c.HttpAccess,
]


@pytest.mark.parametrize("value", EVERY, ids=lambda v: type(v).__qualname__)
def test_credentials_pickle_and_are_shown_without_secrets(value: Any) -> None:
    assert pickle.loads(pickle.dumps(value)) == value
    for shown in (repr(value), str(value), value._repr_html_(), f"{[value]}"):
        assert "SECRET" not in shown
        assert "1234567" not in shown


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({}, c.S3Credentials.FromEnv),
        ({"from_env": True}, c.S3Credentials.FromEnv),
        ({"anonymous": False}, c.S3Credentials.FromEnv),
        ({"anonymous": True}, c.S3Credentials.Anonymous),
        ({"access_key_id": "a", "secret_access_key": "b"}, c.S3Credentials.Static),
        ({"access_key_id": "a", "secret_access_key": "b", "session_token": "c"}, c.S3Credentials.Static),
        ({"get_credentials": fetch_s3}, c.S3Credentials.Refreshable),
    ],
)
def test_the_arguments_decide_the_kind_of_s3_credentials(arguments: dict[str, Any], kind: type) -> None:
    value = c.s3_credentials(**arguments)
    assert type(value) is kind
    assert isinstance(value, c.S3Credentials)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (c.s3_credentials, {"access_key_id": "a"}),
        (c.s3_credentials, {"secret_access_key": "SECRET"}),
        (c.s3_credentials, {"session_token": "SECRET"}),
        (c.s3_credentials, {"expires_after": LATER}),
        (c.s3_credentials, {"from_env": False}),
        (c.s3_credentials, {"anonymous": True, "from_env": True}),
        (c.s3_credentials, {"anonymous": True, "access_key_id": "a", "secret_access_key": "SECRET"}),
        (c.s3_credentials, {"get_credentials": fetch_s3, "anonymous": True}),
        (c.gcs_static_credentials, {}),
        (c.gcs_credentials, {"from_env": True, "bearer_token": "SECRET"}),
        (c.azure_static_credentials, {}),
        (c.azure_static_credentials, {"access_key": "SECRET", "sas_token": "SECRET"}),
        (c.azure_credentials, {"from_env": True, "sas_token": "SECRET"}),
    ],
)
def test_contradicting_arguments_are_refused_without_their_values(
    function: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        function(**arguments)
    assert caught.value.kind == ErrorKind.INVALID_CREDENTIALS
    assert isinstance(caught.value, ValueError)
    assert "SECRET" not in str(caught.value)


def test_times_without_a_zone_are_refused() -> None:
    naive = datetime(2030, 1, 1)
    with pytest.raises(TypeError, match=re.escape("S3StaticCredentials.expires_after")):
        c.S3StaticCredentials("a", "b", expires_after=naive)
    with pytest.raises(TypeError, match=re.escape("GcsBearerCredential.expires_after")):
        c.GcsBearerCredential("a", expires_after=naive)
    with pytest.raises(TypeError, match=re.escape("AzureRefreshableCredential.AccessKey.expires_after")):
        c.AzureRefreshableCredential.AccessKey("a", naive)


def test_wrong_types_are_refused_without_their_values() -> None:
    makers: list[Callable[[], Any]] = [
        lambda: c.S3StaticCredentials("a", b"SECRET"),  # type: ignore[arg-type]
        lambda: c.S3Credentials.Static("SECRET"),  # type: ignore[arg-type]
        lambda: c.Credentials.S3(c.gcs_anonymous_credentials()),  # type: ignore[arg-type]
        lambda: c.GcsStaticCredentials.BearerToken(b"SECRET"),  # type: ignore[arg-type]
        lambda: c.S3Credentials.Refreshable("SECRET"),  # type: ignore[arg-type]
        lambda: c.s3_refreshable_credentials(3),  # type: ignore[arg-type]
    ]
    for make in makers:
        with pytest.raises(TypeError) as caught:
            make()
        assert "SECRET" not in str(caught.value)


def test_scattered_credentials_are_fetched_now_and_pickled() -> None:
    assert c.s3_refreshable_credentials(fetch_s3).current is None
    scattered = pickle.loads(pickle.dumps(c.s3_refreshable_credentials(fetch_s3, True)))
    assert scattered.current == fetch_s3()
    assert scattered.refreshed() == fetch_s3()
    assert c.gcs_refreshable_credentials(fetch_gcs).refreshed() == fetch_gcs()
    assert c.azure_refreshable_credentials(fetch_azure).refreshed() == fetch_azure()


def test_a_function_that_cannot_be_pickled_is_refused() -> None:
    with raises(InvalidInputError, "invalid-credentials", "get_credentials"):
        c.s3_refreshable_credentials(lambda: fetch_s3())


@pytest.mark.parametrize("function", [fail, fetch_nonsense])
def test_a_refresh_that_fails_raises_an_error_without_secrets(function: Callable[[], Any]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        c.s3_refreshable_credentials(function).refreshed()
    assert caught.value.kind == ErrorKind.INVALID_CREDENTIALS
    assert "SECRET" not in str(caught.value)
    with pytest.raises(InvalidInputError):
        c.S3Credentials.Refreshable(b"garbage").refreshed()


def test_containers_credentials_wraps_each_by_its_store() -> None:
    s3, gcs, azure = c.s3_anonymous_credentials(), c.gcs_anonymous_credentials(), c.azure_anonymous_credentials()
    wrapped = c.containers_credentials({"a": s3, "b": gcs, "c": azure, "d": None, "e": c.HttpAccess})
    assert wrapped == {
        "a": c.Credentials.S3(s3),
        "b": c.Credentials.Gcs(gcs),
        "c": c.Credentials.Azure(azure),
        "d": None,
        "e": c.HttpAccess,
    }
    assert all(value is None or isinstance(value, c.Credentials) for value in wrapped.values())
    with raises(InvalidInputError, "invalid-credentials", "'x'"):
        c.containers_credentials({"x": 3})  # type: ignore[dict-item]


def test_unions_have_no_instances_of_their_own() -> None:
    for union in (c.S3Credentials, c.GcsCredentials, c.AzureCredentials, c.Credentials, c.AzureRefreshableCredential):
        with pytest.raises(TypeError):
            union()
