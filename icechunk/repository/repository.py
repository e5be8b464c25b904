"""The class `Repository`: creating, finding and opening; its other groups of methods are its bases."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Final, Self

from icechunk.config import Attribution, RepositoryConfig, StorageSettings, config_from_dict, config_to_dict
from icechunk.credentials import AnyCredential
from icechunk.errors import AlreadyExistsError, ErrorKind, InvalidInputError
from icechunk.log.repository.open import create_repository, detect, open_repository
from icechunk.log.repository.port import Layout
from icechunk.ops import SpecVersion
from icechunk.repository.appending import Appending
from icechunk.repository.branches_and_tags import BranchesAndTags
from icechunk.repository.configuration import Configuration
from icechunk.repository.history import History
from icechunk.repository.inspection import Inspection
from icechunk.repository.maintenance import Maintenance
from icechunk.repository.watch import Watching
from icechunk.runtime.checks import require_type
from icechunk.runtime.clock import SYSTEM
from icechunk.runtime.twins import run_sync, synchronous, warn_caller
from icechunk.session.core import Core
from icechunk.storage.port import Storage
from icechunk.storage.url import StorageOrUrl, storage_from_url

__all__ = ["Repository"]

_LOG: Final = logging.getLogger(__name__)
_S3: Final = "icechunk.Credentials.S3(icechunk.S3Credentials.FromEnv())"
_GCS: Final = "icechunk.Credentials.Gcs(icechunk.GcsCredentials.FromEnv())"
_AZURE: Final = "icechunk.Credentials.Azure(icechunk.AzureCredentials.FromEnv())"
_HTTP: Final = "icechunk.credentials.HttpAccess"
_INSTEAD: Final = {
    "file": "icechunk.credentials.LocalFileSystemAccess",
    "http": _HTTP,
    "https": _HTTP,
    "s3": _S3,
    "tigris": _S3,
    "gs": _GCS,
    "gcs": _GCS,
    "az": _AZURE,
    "azure": _AZURE,
    "abfs": _AZURE,
}
_FROM_ENVIRONMENT: Final = ", because it takes credentials from the environment without saying so"


def _none_credential_guidance(scheme: str) -> tuple[str, str]:
    """The replacement of None for containers of a URL scheme, and the danger of None there."""
    instead = _INSTEAD.get(scheme, "explicit credentials")
    return instead, _FROM_ENVIRONMENT if ".FromEnv" in instead else ""


def _warn_of_missing_credentials(access: Mapping[str, AnyCredential | None] | None) -> None:
    """Give a `DeprecationWarning` for each container whose credentials are None."""
    if not isinstance(access, dict):
        return  # None, or a value that is refused elsewhere
    for prefix, credential in access.items():
        if credential is None:
            instead, why = _none_credential_guidance(prefix.partition(":")[0])
            warn_caller(
                f"None in authorize_virtual_chunk_access for the container {prefix!r} is deprecated{why}: "
                f"pass {instead}",
                DeprecationWarning,
            )


class Repository(Maintenance, BranchesAndTags, History, Inspection, Watching, Appending, Configuration):
    """A transactional Zarr hierarchy with its history.

    Made by `create`, `open` or `open_or_create`. Methods that end in ``_async`` are the engine; their synchronous
    twins run them on one background loop. Safe to share among event loops and threads; pickles with its storage
    and credentials, and opens again where it arrives.
    """

    # The twins of class methods are written out: mypy cannot see through a function that is given one.

    @classmethod
    async def create_async(
        cls,
        storage: StorageOrUrl,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: dict[str, AnyCredential | None] | None = None,
        spec_version: SpecVersion | int | None = None,
        check_clean_root: bool = True,
        attribution: Attribution | None = None,
    ) -> Self:
        """Create a repository with an empty first snapshot on branch ``main``.

        Parameters
        ----------
        storage
            Where, or the URL of the place as in `icechunk.storage_from_url`; of several that create there at the same
            time exactly one succeeds.
        config
            Persisted with the repository, where it sets anything.
        authorize_virtual_chunk_access
            Credentials by the URL prefix of each virtual chunk container that may be read.
        spec_version
            2: format 2.1 as the official library keeps it, so that it can write too; 1: format 1. None for the log
            layout, unless ``config.engine.layout`` or the environment variable ``ICECHUNK_LAYOUT`` names another one.
        check_clean_root
            Refuse where anything at all is under the prefix already.
        attribution
            Who works here, for the logs of the storage.

        Raises
        ------
        InvalidInputError
            There is something there already (kind ``parent-directory-not-clean``), or arguments that do not fit.
        AlreadyExistsError
            Another client created a repository there at the same time.
        StorageError
            The place cannot be written, or does not have the conditional writes that the layout needs.
        """
        core = _new_core(storage, config, authorize_virtual_chunk_access, attribution)
        layout = _layout(spec_version, config)
        _warn_of_missing_credentials(authorize_virtual_chunk_access)
        _LOG.debug("Creating Repository in %s, layout %s", core.storage.describe(), layout.value)
        log = await create_repository(
            core.storage,
            layout,
            core.sources,
            config=_worth_persisting(config),
            check_clean_root=check_clean_root,
        )
        await core.adopt(log)
        return cls(core)

    @classmethod
    def create(
        cls,
        storage: StorageOrUrl,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: dict[str, AnyCredential | None] | None = None,
        spec_version: SpecVersion | int | None = None,
        check_clean_root: bool = True,
        attribution: Attribution | None = None,
    ) -> Self:
        """Synchronous twin of `create_async`."""
        return run_sync(
            cls.create_async(
                storage, config, authorize_virtual_chunk_access, spec_version, check_clean_root, attribution
            )
        )

    @classmethod
    async def open_async(
        cls,
        storage: StorageOrUrl,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: dict[str, AnyCredential | None] | None = None,
        attribution: Attribution | None = None,
    ) -> Self:
        """Open a repository that exists.

        Parameters
        ----------
        config
            Options that take precedence over the persisted ones, here only.
        authorize_virtual_chunk_access, attribution
            As in `create_async`.

        Raises
        ------
        RepositoryNotFoundError
            None there.
        FormatError
            What is there is not a repository that this version can read.
        """
        _warn_of_missing_credentials(authorize_virtual_chunk_access)
        core = _new_core(storage, config, authorize_virtual_chunk_access, attribution)
        await core.load_config()
        return cls(core)

    @classmethod
    def open(
        cls,
        storage: StorageOrUrl,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: dict[str, AnyCredential | None] | None = None,
        attribution: Attribution | None = None,
    ) -> Self:
        """Synchronous twin of `open_async`."""
        return run_sync(cls.open_async(storage, config, authorize_virtual_chunk_access, attribution))

    @classmethod
    async def open_or_create_async(
        cls,
        storage: StorageOrUrl,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: dict[str, AnyCredential | None] | None = None,
        create_version: SpecVersion | int | None = None,
        check_clean_root: bool = True,
        attribution: Attribution | None = None,
    ) -> Self:
        """Open the repository, or create it where there is none; arguments as in `open_async` and `create_async`."""
        if await cls.exists_async(storage):
            return await cls.open_async(storage, config, authorize_virtual_chunk_access, attribution)
        try:
            return await cls.create_async(
                storage, config, authorize_virtual_chunk_access, create_version, check_clean_root, attribution
            )
        except (AlreadyExistsError, InvalidInputError):
            # Another client may have created it meanwhile.
            if not await cls.exists_async(storage):
                raise
            return await cls.open_async(storage, config, authorize_virtual_chunk_access, attribution)

    @classmethod
    def open_or_create(
        cls,
        storage: StorageOrUrl,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: dict[str, AnyCredential | None] | None = None,
        create_version: SpecVersion | int | None = None,
        check_clean_root: bool = True,
        attribution: Attribution | None = None,
    ) -> Self:
        """Synchronous twin of `open_or_create_async`."""
        return run_sync(
            cls.open_or_create_async(
                storage, config, authorize_virtual_chunk_access, create_version, check_clean_root, attribution
            )
        )

    @staticmethod
    async def exists_async(storage: StorageOrUrl, storage_settings: StorageSettings | None = None) -> bool:
        """Whether there is a repository at this place."""
        return await detect(_with(storage, storage_settings)) is not None

    exists: Final = staticmethod(synchronous(exists_async))

    @staticmethod
    async def fetch_spec_version_async(
        storage: StorageOrUrl, storage_settings: StorageSettings | None = None
    ) -> SpecVersion | None:
        """Version of the format that a repository is in; None where there is none."""
        layout = await detect(_with(storage, storage_settings))
        if layout is None:
            return None
        return SpecVersion.v1 if layout is Layout.REFS else SpecVersion.v2

    fetch_spec_version: Final = staticmethod(synchronous(fetch_spec_version_async))

    @staticmethod
    async def fetch_config_async(storage: StorageOrUrl) -> RepositoryConfig | None:
        """The configuration persisted with a repository; None where none is.

        Raises
        ------
        RepositoryNotFoundError
            There is no repository.
        """
        log = await open_repository(_with(storage, None), SYSTEM)
        try:
            return None if log.state.config is None else config_from_dict(log.state.config)
        finally:
            await log.aclose()

    fetch_config: Final = staticmethod(synchronous(fetch_config_async))

    async def reopen_async(
        self,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: dict[str, AnyCredential | None] | None = None,
    ) -> Self:
        """The same repository opened anew, with other options merged over the present ones."""
        _warn_of_missing_credentials(authorize_virtual_chunk_access)
        access = self._core.virtual_access if authorize_virtual_chunk_access is None else authorize_virtual_chunk_access
        _check_config(config)
        merged = self._core.config if config is None else self._core.config.merge(config)
        core = Core(
            self._core.storage,
            merged,
            sources=self._core.sources,
            attribution=self._core.attribution,
            virtual_access=access,
            default_metadata=self._core.default_metadata,
            named_containers={
                **self._core.named_containers,
                **((config.virtual_chunk_containers if config is not None else None) or {}),
            },
        )
        await core.load_config()
        return type(self)(core)

    reopen: Final = synchronous(reopen_async)


def _new_core(
    storage: StorageOrUrl,
    config: RepositoryConfig | None,
    virtual_access: dict[str, AnyCredential | None] | None,
    attribution: Attribution | None,
) -> Core:
    storage = _storage(storage)
    _check_config(config)
    require_type("authorize_virtual_chunk_access", virtual_access, dict, optional=True)
    require_type("attribution", attribution, Attribution, optional=True)
    return Core(storage, config or RepositoryConfig(), attribution=attribution, virtual_access=virtual_access)


def _storage(storage: StorageOrUrl) -> Storage:
    """The storage of an argument: itself, or the one that a URL names."""
    require_type("storage", storage, Storage, str, os.PathLike)
    return storage if isinstance(storage, Storage) else storage_from_url(storage)


def _worth_persisting(config: RepositoryConfig | None) -> dict[str, Any] | None:
    found = None if config is None else config_to_dict(config)
    return None if found == config_to_dict(RepositoryConfig()) else found


def _check_config(config: RepositoryConfig | None) -> None:
    require_type("config", config, RepositoryConfig, optional=True)
    if config is None:
        return
    config.validate()
    off = [name for name in ("num_snapshot_nodes", "num_chunk_refs") if getattr(config.caching, name, None) == 0]
    if off:
        _LOG.warning("caching is off: %s is 0, so metadata is read again for every access", " and ".join(off))


def _with(storage: StorageOrUrl, settings: StorageSettings | None) -> Storage:
    storage = _storage(storage)
    require_type("storage_settings", settings, StorageSettings, optional=True)
    return storage if settings is None else storage.with_settings(settings)


def _layout(spec_version: SpecVersion | int | None, config: RepositoryConfig | None) -> Layout:
    """The layout of a new repository: the requested one, if it fits the version of the format."""
    asked: str | None = config.engine.layout if config is not None and config.engine is not None else None
    if spec_version is None and asked is None:
        asked = os.environ.get("ICECHUNK_LAYOUT") or None
    if asked is not None and asked not in tuple(Layout):
        raise InvalidInputError(
            f"ICECHUNK_LAYOUT must be 'log', 'repo' or 'refs', not {asked!r}", ErrorKind.INVALID_SETTING
        )
    if spec_version is None:
        return Layout.LOG if asked is None else Layout(asked)
    try:
        version = int(spec_version)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"Couldn't parse a valid version from {spec_version!r}: spec_version is 1 or 2",
            ErrorKind.UNSUPPORTED_SPEC_VERSION,
        ) from error
    fitting = {1: (Layout.REFS,), 2: (Layout.REPO, Layout.LOG)}.get(version)
    if fitting is None:
        raise InvalidInputError(
            f"Unsupported version {version}: the versions of the format (spec_version) are 1 and 2",
            ErrorKind.UNSUPPORTED_SPEC_VERSION,
        )
    layout = fitting[0] if asked is None else Layout(asked)
    if layout not in fitting:
        raise InvalidInputError(
            f"cannot create a repository with spec_version={version} and layout {layout.value!r}: that layout belongs "
            "to the other version; leave one of them out",
            ErrorKind.INVALID_SETTING,
        )
    return layout
