"""Sources of the access key of a request."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import Any, TypeAlias

from aiobotocore.session import AioSession, get_session

from icechunk.credentials import AnyS3Credential, S3Credentials, S3StaticCredentials
from icechunk.errors import ErrorKind, InvalidInputError, StorageError
from icechunk.runtime.clock import Sources
from icechunk.storage.refreshed_credentials import Refreshed
from icechunk.storage.s3.sigv4 import SigningKeys

__all__ = ["KeyProvider", "key_provider"]


class AnonymousKeys:
    """Requests go unsigned."""

    async def get(self) -> SigningKeys | None:
        return None

    def expired(self, keys: SigningKeys | None) -> bool:
        return False


class StaticKeys:
    """One key for good."""

    def __init__(self, given: S3StaticCredentials) -> None:
        self._keys = _signing_keys(given)

    async def get(self) -> SigningKeys | None:
        return self._keys

    def expired(self, keys: SigningKeys | None) -> bool:
        return False


class RefreshableKeys(Refreshed[SigningKeys]):
    """Keys of the user's function."""

    def __init__(self, given: S3Credentials.Refreshable, sources: Sources) -> None:
        super().__init__(given, partial(_signing_keys, source="that get_credentials returned"), sources)


class ChainKeys:
    """Keys of botocore's credential chain: environment, profiles, web identity, SSO, container and instance roles."""

    def __init__(self) -> None:
        self._found: dict[asyncio.AbstractEventLoop, tuple[int, AioSession, Any]] = {}

    async def get(self) -> SigningKeys | None:
        loop = asyncio.get_running_loop()
        found = self._found.get(loop)
        if found is None or found[0] != os.getpid():
            session = get_session()
            credentials = await session.get_credentials()
            if credentials is None:
                raise StorageError(
                    "no AWS credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile, or give "
                    "access_key_id, get_credentials or anonymous=True",
                    ErrorKind.INVALID_CREDENTIALS,
                )
            self._found = {o: f for o, f in self._found.items() if not o.is_closed() and f[0] == os.getpid()}
            found = self._found[loop] = (os.getpid(), session, credentials)
        frozen = await found[2].get_frozen_credentials()
        return _checked(
            SigningKeys(
                access_key_id=frozen.access_key, secret_access_key=frozen.secret_key, session_token=frozen.token
            ),
            f"of botocore's credential chain (found by {getattr(found[2], 'method', None) or 'its usual means'})",
        )

    def expired(self, keys: SigningKeys | None) -> bool:
        self._found.pop(asyncio.get_running_loop(), None)
        return True


KeyProvider: TypeAlias = AnonymousKeys | StaticKeys | RefreshableKeys | ChainKeys
"""``get`` returns the key to sign with; ``expired`` is called when it was refused: whether another try may help."""


def key_provider(credentials: AnyS3Credential | None, sources: Sources) -> KeyProvider:
    """The provider that a credentials value describes; None means the environment."""
    match credentials:
        case None | S3Credentials.FromEnv():
            return ChainKeys()
        case S3Credentials.Anonymous():
            return AnonymousKeys()
        case S3Credentials.Static():
            return StaticKeys(credentials.credentials)
        case S3Credentials.Refreshable():
            return RefreshableKeys(credentials, sources)


def _signing_keys(given: S3StaticCredentials, source: str = "given") -> SigningKeys:
    return _checked(
        SigningKeys(
            access_key_id=given.access_key_id,
            secret_access_key=given.secret_access_key,
            session_token=given.session_token,
        ),
        source,
    )


def _checked(keys: SigningKeys, source: str) -> SigningKeys:
    """The keys. Raises `InvalidInputError` where no request can carry them, as with the line break of a file's end."""
    for name in ("access_key_id", "secret_access_key", "session_token"):
        value = getattr(keys, name)
        if value is not None and not (value.isascii() and value.isprintable() and value == value.strip()):
            raise InvalidInputError(
                f"the {name} {source} has a line break, a space at an end or other characters that keys do not have: "
                "strip it",
                ErrorKind.INVALID_CREDENTIALS,
            )
    return keys
