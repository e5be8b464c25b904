"""``xarray.open_dataset(url, engine="icechunk")``: the engine that xarray finds by its entry point."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from xarray import Dataset, DataTree
from xarray.backends import BackendEntrypoint
from xarray.backends.zarr import ZarrBackendEntrypoint
from zarr.errors import ContainsArrayError

from icechunk.config import RepositoryConfig
from icechunk.credentials import AnyCredential
from icechunk.errors import ErrorKind, IcechunkError, InvalidInputError
from icechunk.repository.by_url import session_at
from icechunk.runtime.twins import run_sync
from icechunk.session import Session
from icechunk.storage.url import parse_url

__all__ = ["IcechunkBackend"]

Virtual = dict[str, AnyCredential | None]


class IcechunkBackend(BackendEntrypoint):
    """Opens datasets and trees lazily from a version of a repository, through xarray's own Zarr engine.

    Besides a URL, a read-only or writable `Session` is taken as it is.
    """

    description: ClassVar[str] = "Open versions of Icechunk repositories by URL"
    url: ClassVar[str] = "https://icechunk.io"
    supports_groups: ClassVar[bool] = True

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        mask_and_scale: bool = True,
        decode_times: bool = True,
        concat_characters: bool = True,
        decode_coords: bool = True,
        drop_variables: str | Iterable[str] | None = None,
        use_cftime: bool | None = None,
        decode_timedelta: bool | None = None,
        group: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: Virtual | None = None,
    ) -> Dataset:
        """The group that the URL's path and ``group`` name, as a dataset. Options as in `icechunk.open` and xarray."""
        store, path = _opened(filename_or_obj, storage_options, config, authorize_virtual_chunk_access)
        with _naming_arrays(group := _below(path, group)):
            return ZarrBackendEntrypoint().open_dataset(
                store,
                mask_and_scale=mask_and_scale,
                decode_times=decode_times,
                concat_characters=concat_characters,
                decode_coords=decode_coords,
                drop_variables=drop_variables,
                use_cftime=use_cftime,
                decode_timedelta=decode_timedelta,
                group=group,
                consolidated=False,
                zarr_format=3,
            )

    def open_datatree(
        self,
        filename_or_obj: Any,
        *,
        group: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: Virtual | None = None,
        **options: Any,
    ) -> DataTree:
        """The group that the URL's path and ``group`` name with all groups below it, as a tree."""
        store, path = _opened(filename_or_obj, storage_options, config, authorize_virtual_chunk_access)
        with _naming_arrays(group := _below(path, group)):
            return ZarrBackendEntrypoint().open_datatree(
                store, group=group, consolidated=False, zarr_format=3, **options
            )

    def open_groups_as_dict(
        self,
        filename_or_obj: Any,
        *,
        group: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        config: RepositoryConfig | None = None,
        authorize_virtual_chunk_access: Virtual | None = None,
        **options: Any,
    ) -> dict[str, Dataset]:
        """The datasets of all groups below the one that the URL's path and ``group`` name, by their paths."""
        store, path = _opened(filename_or_obj, storage_options, config, authorize_virtual_chunk_access)
        with _naming_arrays(group := _below(path, group)):
            return ZarrBackendEntrypoint().open_groups_as_dict(
                store, group=group, consolidated=False, zarr_format=3, **options
            )

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Whether it is a session, or a URL with a stage ``icechunk:``."""
        if isinstance(filename_or_obj, Session):
            return True
        if not isinstance(filename_or_obj, str) or "|" not in filename_or_obj:
            return False
        try:
            parse_url(filename_or_obj)
        except IcechunkError:
            return False
        return True


def _opened(
    place: Any, storage_options: Mapping[str, Any] | None, config: RepositoryConfig | None, virtual: Virtual | None
) -> tuple[Any, str]:
    """The store of a session, and the path that the URL names in it."""
    if isinstance(place, Session):
        return place.store, ""
    url = parse_url(place if isinstance(place, str | os.PathLike) else str(place))
    session = run_sync(
        session_at(url, storage_options=storage_options, config=config, authorize_virtual_chunk_access=virtual)
    )
    return session.store, url.path


@contextmanager
def _naming_arrays(path: str | None) -> Iterator[None]:
    """Say of a path that is an array's what to open instead."""
    try:
        yield
    except ContainsArrayError as error:
        name = (path or "").rpartition("/")[2]
        raise InvalidInputError(
            f"cannot open {path!r} as a dataset: it is an array; open the group that it is in, and take "
            f"{name!r} of the dataset",
            ErrorKind.NOT_A_GROUP,
        ) from error


def _below(path: str, group: str | None) -> str | None:
    return "/".join(filter(None, (path, (group or "").strip("/")))) or None
