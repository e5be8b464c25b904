"""Our credentials as obstore takes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from icechunk.credentials import AzureCredentials, AzureStaticCredentials, GcsCredentials, GcsStaticCredentials
from icechunk.credentials.azure import AzureRefreshableCredential
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.storage.refreshed_credentials import Refreshed

__all__ = ["Access", "azure_options", "gcs_options"]

Provider: TypeAlias = Callable[[], Awaitable[Mapping[str, Any]]]
Access: TypeAlias = tuple[dict[str, str], Provider | None]
"""Options of a store, and what it asks for credentials."""


def gcs_options(credential: Any, sources: Sources = SYSTEM) -> Access:
    """Options and credential provider of a `GCSStore`; None: as the environment says."""
    match credential:
        case GcsCredentials.Anonymous():
            return {"skip_signature": "true"}, None
        case GcsCredentials.Static(GcsStaticCredentials.ServiceAccount(path)):
            return {"service_account": path}, None
        case GcsCredentials.Static(GcsStaticCredentials.ServiceAccountKey(key)):
            return {"service_account_key": key}, None
        case GcsCredentials.Static(GcsStaticCredentials.ApplicationCredentials(path)):
            return {"application_credentials": path}, None
        case GcsCredentials.Static(GcsStaticCredentials.BearerToken(token)):
            return {}, _constant({"token": token, "expires_at": None})
        case GcsCredentials.Refreshable():
            return {}, Refreshed(credential, _gcs_token, sources).get
    return {}, None


def azure_options(credential: Any, sources: Sources = SYSTEM) -> Access:
    """Options and credential provider of an `AzureStore`; None: as the environment says."""
    match credential:
        case AzureCredentials.Anonymous():
            return {"skip_signature": "true"}, None
        case AzureCredentials.Static(AzureStaticCredentials.AccessKey(key)):
            return {"access_key": key}, None
        case AzureCredentials.Static(AzureStaticCredentials.SasToken(token)):
            return {"sas_token": token}, None
        case AzureCredentials.Static(AzureStaticCredentials.BearerToken(token)):
            return {"bearer_token": token}, None
        case AzureCredentials.Refreshable():
            return {}, Refreshed(credential, _azure_secret, sources).get
    return {}, None


def _gcs_token(found: Any) -> dict[str, Any]:
    return {"token": found.bearer, "expires_at": found.expires_after}


def _azure_secret(found: Any) -> dict[str, Any]:
    match found:
        case AzureRefreshableCredential.AccessKey(key, expires):
            return {"access_key": key, "expires_at": expires}
        case AzureRefreshableCredential.SasToken(token, expires):
            return {"sas_token": token, "expires_at": expires}
    return {"token": found.bearer, "expires_at": found.expires_after}


def _constant(value: Mapping[str, Any]) -> Provider:
    async def provide() -> Mapping[str, Any]:
        return value

    return provide
