"""What users of the official package expect on a `Storage`: settings, listings, representation, constructors."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, cast

from icechunk.moments import moment
from icechunk.values import Described, fields_html

if TYPE_CHECKING:
    from icechunk.config import S3Options, StorageSettings
    from icechunk.storage.base import Storage

__all__ = ["StorageFacade", "StorageObjectInfo"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True, repr=False)
class StorageObjectInfo(Described):
    """An object that `Storage.list_objects_metadata` found."""

    _public_name: ClassVar[str] = "icechunk.storage.StorageObjectInfo"

    key: str
    """Relative to the listed prefix."""
    size_bytes: int
    """Size of the object."""
    created_at: datetime
    """Last-Modified by the store's clock, UTC."""


class StorageFacade:
    """Public methods that every storage shares; synchronous twins run on the background loop."""

    __slots__ = ()

    def default_settings(self) -> StorageSettings:
        """Settings that this kind of storage uses where the configuration gives none."""
        from icechunk.storage.defaults import place_settings

        return place_settings(ideal_request_bytes=4096)

    def with_settings(self, settings: StorageSettings | None) -> Storage:
        """The same place under other settings; shares the clients and caches of this one.

        Storages without settings of their own (memory, local file systems) return themselves.
        """
        return cast("Storage", self)

    def with_user_agent(self, user_agent: str) -> Storage:
        """The same place, whose requests name themselves so; storages that send no such header return themselves."""
        return cast("Storage", self)

    async def list_objects_metadata_async(
        self,
        settings: StorageSettings | None = None,
        prefix: str | None = None,
    ) -> list[StorageObjectInfo]:
        """Every object below the folder ``prefix``, with keys relative to that folder, ascending.

        Parameters
        ----------
        settings
            Used for this listing instead of the storage's own.
        prefix
            A folder, with or without its final ``/``; None for all objects of the storage.
        """
        folder = prefix.rstrip("/") + "/" if prefix and prefix.rstrip("/") else ""
        storage = cast("Storage", self) if settings is None else self.with_settings(settings)
        return [
            StorageObjectInfo(
                key=info.key[len(folder) :],
                size_bytes=info.size,
                created_at=moment(info.modified_us),
            )
            async for page in storage.list_pages(folder)
            for info in page
        ]

    def list_objects_metadata(
        self,
        settings: StorageSettings | None = None,
        prefix: str | None = None,
    ) -> list[StorageObjectInfo]:
        """Synchronous twin of `list_objects_metadata_async`."""
        from icechunk.sync import run_sync

        return run_sync(self.list_objects_metadata_async(settings, prefix))

    async def list_objects_async(
        self,
        settings: StorageSettings | None = None,
        prefix: str | None = None,
    ) -> list[tuple[str, int]]:
        """Key (relative to the folder ``prefix``) and size in bytes of every object below it, ascending."""
        return [(info.key, info.size_bytes) for info in await self.list_objects_metadata_async(settings, prefix)]

    def list_objects(
        self,
        settings: StorageSettings | None = None,
        prefix: str | None = None,
    ) -> list[tuple[str, int]]:
        """Synchronous twin of `list_objects_async`."""
        from icechunk.sync import run_sync

        return run_sync(self.list_objects_async(settings, prefix))

    def _repr_html_(self) -> str:
        title, *lines = repr(self).splitlines()
        rows = [line.partition(": ") for line in lines]
        return fields_html(title.strip("<>"), [(name, value) for name, _, value in rows])

    @classmethod
    def new_in_memory(cls) -> Storage:
        """See `icechunk.in_memory_storage`."""
        from icechunk.storage.memory import MemoryStorage

        return MemoryStorage()

    @classmethod
    def new_local_filesystem(cls, path: str) -> Storage:
        """See `icechunk.local_filesystem_storage`."""
        from icechunk.storage.local import LocalStorage

        return LocalStorage(path)

    @classmethod
    def new_s3(
        cls,
        config: S3Options,
        bucket: str,
        prefix: str | None,
        credentials: Any = None,
        legacy_rooted_keys: bool | None = None,
        *,
        read_headers: dict[str, str] | None = None,
        write_headers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Storage:
        """See `icechunk.s3_storage`; ``credentials`` is one of `icechunk.S3Credentials`."""
        from icechunk.storage.places import s3_place

        return s3_place(config, bucket, prefix, credentials, legacy_rooted_keys, read_headers, write_headers, headers)

    @classmethod
    def new_s3_object_store(
        cls,
        config: S3Options,
        bucket: str,
        prefix: str | None,
        credentials: Any = None,
        *,
        read_headers: dict[str, str] | None = None,
        write_headers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Storage:
        """The same storage as `new_s3`: there is one way to S3 here, where the official library has two."""
        from icechunk.storage.places import s3_place

        return s3_place(config, bucket, prefix, credentials, None, read_headers, write_headers, headers)

    @classmethod
    def new_tigris(
        cls,
        config: S3Options,
        bucket: str,
        prefix: str | None,
        use_weak_consistency: bool,
        credentials: Any = None,
        legacy_rooted_keys: bool | None = None,
        *,
        read_headers: dict[str, str] | None = None,
        write_headers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Storage:
        """See `icechunk.tigris_storage`."""
        from icechunk.storage.places import s3_place, tigris_headers, tigris_options

        headers = {**tigris_headers(config.region, use_weak_consistency), **(headers or {})}
        options = tigris_options(config)
        return s3_place(options, bucket, prefix, credentials, legacy_rooted_keys, read_headers, write_headers, headers)

    @classmethod
    def new_r2(
        cls,
        config: S3Options,
        bucket: str | None = None,
        prefix: str | None = None,
        account_id: str | None = None,
        credentials: Any = None,
        legacy_rooted_keys: bool | None = None,
        *,
        read_headers: dict[str, str] | None = None,
        write_headers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Storage:
        """See `icechunk.r2_storage`."""
        from icechunk.storage.places import r2_bucket, r2_options, s3_place

        options = r2_options(config, account_id)
        bucket, prefix = r2_bucket(bucket, prefix)
        return s3_place(options, bucket, prefix, credentials, legacy_rooted_keys, read_headers, write_headers, headers)

    @classmethod
    def new_hf(
        cls,
        config: S3Options,
        bucket: str,
        prefix: str | None,
        namespace: str,
        credentials: Any = None,
        legacy_rooted_keys: bool | None = None,
        *,
        read_headers: dict[str, str] | None = None,
        write_headers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Storage:
        """See `icechunk.hf_storage`."""
        from icechunk.storage.places import hf_options, s3_place

        options = hf_options(config, namespace)
        return s3_place(
            options,
            bucket,
            prefix,
            credentials,
            legacy_rooted_keys,
            read_headers,
            write_headers,
            headers,
            keeps_metadata=False,
        )

    @classmethod
    def new_gcs(
        cls,
        bucket: str,
        prefix: str | None,
        credentials: Any = None,
        *,
        config: dict[str, str] | None = None,
        read_headers: dict[str, str] | None = None,
        write_headers: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Storage:
        """See `icechunk.gcs_storage`; ``credentials`` is one of `icechunk.GcsCredentials`."""
        from icechunk.storage.places import gcs_place

        return gcs_place(bucket, prefix, credentials, config, read_headers, write_headers, headers)

    @classmethod
    def new_azure_blob(
        cls,
        account: str,
        container: str,
        prefix: str,
        credentials: Any = None,
        *,
        config: dict[str, str] | None = None,
    ) -> Storage:
        """See `icechunk.azure_storage`; ``credentials`` is one of `icechunk.AzureCredentials`."""
        from icechunk.storage.places import azure_place

        return azure_place(account, container, prefix, credentials, config)

    @classmethod
    def new_http(
        cls, base_url: str, config: dict[str, str] | None = None, headers: dict[str, str] | None = None
    ) -> Storage:
        """See `icechunk.http_storage`."""
        from icechunk.storage.http import HttpStorage

        return HttpStorage(base_url, config, headers)

    @classmethod
    def new_redirect(cls, base_url: str) -> Storage:
        """See `icechunk.redirect_storage`."""
        from icechunk.storage.redirect import RedirectStorage

        return RedirectStorage(base_url)
