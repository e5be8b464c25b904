"""Where the access key of a request comes from, and when a new one is fetched.

A key is replaced some time before it expires, by one caller while the others go on with the old one, so that no request
waits or fails at the change; after the store has said that a token expired it is replaced at once.
"""

from __future__ import annotations

import asyncio
import os
from datetime import UTC
from typing import Any, Final, TypeAlias

from aiobotocore.session import AioSession, get_session

from icechunk.credentials import AnyS3Credential, S3Credentials, S3StaticCredentials
from icechunk.errors import ErrorKind, IcechunkError, StorageError
from icechunk.sources import Sources
from icechunk.storage.s3_sigv4 import SigningKeys

__all__ = ["KeyProvider", "key_provider"]

_EARLY_US: Final = 5 * 60 * 1_000_000


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


class RefreshableKeys:
    """Keys of the user's function; one call at a time for each event loop, the result shared by all."""

    def __init__(self, given: S3Credentials.Refreshable, sources: Sources) -> None:
        self._given = given
        self._wall_us = sources.wall_us
        self._current: tuple[SigningKeys, int | None, int] | None = None
        self._pid = os.getpid()
        self._calls: dict[asyncio.AbstractEventLoop, asyncio.Future[None]] = {}
        if given.current is not None:
            self._keep(given.current)

    async def get(self) -> SigningKeys | None:
        while True:
            current = self._current
            now_us = self._wall_us()
            if current is not None:
                keys, expires_us, early_us = current
                if expires_us is None or now_us < expires_us - early_us:
                    return keys
                if now_us < expires_us and self._call_under_way() is not None:
                    return keys
            try:
                await self._refresh()
            except IcechunkError:
                if current is not None and current[1] is not None and self._wall_us() < current[1]:
                    return current[0]
                raise
            if self._current is not None and self._current is not current:
                # Whatever its age: a function that returns expired keys is not called in a circle.
                return self._current[0]

    def expired(self, keys: SigningKeys | None) -> bool:
        current = self._current
        if current is not None and current[0] is keys:
            self._current = None
        return True

    def _call_under_way(self) -> asyncio.Future[None] | None:
        call = self._calls.get(asyncio.get_running_loop())
        return None if call is None or call.done() or self._pid != os.getpid() else call

    async def _refresh(self) -> None:
        call = self._call_under_way()
        if call is None:
            loop = asyncio.get_running_loop()
            self._pid = os.getpid()
            self._calls = {other: future for other, future in self._calls.items() if not other.is_closed()}
            # A task of its own: the caller that happens to be first may be cancelled.
            call = self._calls[loop] = asyncio.ensure_future(self._fetch())
            call.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(call)

    async def _fetch(self) -> None:
        self._keep(await asyncio.to_thread(self._given.refreshed))

    def _keep(self, given: S3StaticCredentials) -> None:
        if given.expires_after is None:
            self._current = (_signing_keys(given), None, 0)
            return
        expires_us = int(given.expires_after.replace(tzinfo=given.expires_after.tzinfo or UTC).timestamp() * 1e6)
        lifetime_us = max(0, expires_us - self._wall_us())
        self._current = (_signing_keys(given), expires_us, min(_EARLY_US, lifetime_us // 4))


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
        return SigningKeys(
            access_key_id=frozen.access_key, secret_access_key=frozen.secret_key, session_token=frozen.token
        )

    def expired(self, keys: SigningKeys | None) -> bool:
        self._found.pop(asyncio.get_running_loop(), None)
        return True


KeyProvider: TypeAlias = AnonymousKeys | StaticKeys | RefreshableKeys | ChainKeys
"""``get`` returns the key to sign with; ``expired`` is told that it was refused, and says if a new one may help."""


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


def _signing_keys(given: S3StaticCredentials) -> SigningKeys:
    return SigningKeys(
        access_key_id=given.access_key_id,
        secret_access_key=given.secret_access_key,
        session_token=given.session_token,
    )
