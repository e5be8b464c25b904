"""Write xarray objects into a session.

`to_icechunk` writes to a session as ``Dataset.to_zarr`` writes to a store: xarray decides which variables, chunks and
encodings there are, and everything it writes stays in the session until ``commit``. Reading needs no function of this
module: ``xarray.open_zarr(session.store, consolidated=False)``.

Dask arrays are computed during the call by the default scheduler, in other processes too: their tasks write to a fork
of the session, which is merged when all tasks are done.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import zarr
from xarray import DataArray, Dataset, register_dataset_accessor
from xarray.backends import api, common, writers

from icechunk.errors import ErrorKind, InvalidInputError, ReadOnlyError
from icechunk.repository.by_url import session_at
from icechunk.runtime.checks import WrongTypeError
from icechunk.runtime.twins import run_sync
from icechunk.session import ForkSession, Session
from icechunk.storage.url import parse_url
from icechunk.store import IcechunkStore

__all__ = ["IcechunkAccessor", "to_icechunk"]

ZarrWriteModes: TypeAlias = Literal["w", "w-", "a", "a-", "r+", "r"]
Region: TypeAlias = "Mapping[str, slice | Literal['auto']] | Literal['auto'] | None"

# As Any: half of these have no types, and it changes from version to version which.
_api: Any = api
_common: Any = common
_writers: Any = writers


def to_icechunk(
    obj: DataArray | Dataset,
    session: Session,
    *,
    group: str | None = None,
    mode: ZarrWriteModes | None = None,
    safe_chunks: bool = True,
    align_chunks: bool = False,
    append_dim: Hashable | None = None,
    region: Region = None,
    encoding: Mapping[Any, Any] | None = None,
    chunkmanager_store_kwargs: MutableMapping[Any, Any] | None = None,
    split_every: int | None = None,
    through_storage: bool = False,
) -> None:
    """Write a Dataset or DataArray into a writable session; others see it only after the session is committed.

    Parameters
    ----------
    obj
        Object to write. A DataArray becomes a Dataset of one variable, named as ``DataArray.to_zarr`` names it.
    session
        A writable session. It is changed, not committed.
    group
        Path of the target group, created with its parents if absent; None: the root group.
    mode
        ``"w"`` replaces all that the group holds, ``"w-"`` creates and refuses a group that holds data, ``"a"``
        replaces variables of the same name, ``"a-"`` appends and leaves variables without ``append_dim`` alone,
        ``"r+"`` changes values of existing variables. None means ``"a"`` with ``append_dim``, ``"r+"`` with ``region``,
        else ``"w-"``.
    safe_chunks
        Refuse dask chunks that would make two tasks write one Zarr chunk.
    align_chunks
        Rechunk dask arrays to the Zarr chunks instead of refusing them.
    append_dim
        Dimension along which to append to the arrays that exist.
    region
        Slices of existing arrays to write, by dimension; ``"auto"`` finds them from the index coordinates. Variables
        that share no dimension with the region must be dropped first.
    encoding
        Encodings by variable name, e.g. ``{"t2m": {"chunks": (1, 100, 100)}}``.
    chunkmanager_store_kwargs
        Passed on to the chunk manager's ``store`` (dask's).
    split_every
        Width of the tree in which the changes of dask's tasks are merged.
    through_storage
        Let dask's tasks hand over their changes through the repository, instead of sending them back to this process.
        The session is persisted for that: see `Session.checkpoint`.

    Raises
    ------
    TypeError
        If ``obj`` is not an xarray object.
    SessionStateError
        If ``through_storage`` is asked for, and the session is a fork (kind ``not-allowed``).
    ReadOnlyError
        If the session is read-only.
    ValueError, FileExistsError, KeyError
        As from ``Dataset.to_zarr``: an unknown mode, a dimension that does not match, a group that already holds data.

    Notes
    -----
    A write that fails or is interrupted may leave part of it in the session: `Session.discard_changes` drops it. The
    repository is never touched before the commit.
    """
    if not isinstance(obj, DataArray | Dataset):
        raise WrongTypeError(
            f"to_icechunk writes a Dataset or a DataArray, not {type(obj).__name__}", ErrorKind.INVALID_SETTING
        )
    if session.read_only:
        raise ReadOnlyError(
            f"cannot write to group {group or '/'!r}: the session is read-only; open one with "
            "repo.writable_session(branch)",
            ErrorKind.READ_ONLY_SESSION,
        )
    dataset: Any = _make_dataset(obj)
    if dataset.__dask_graph__() is None:
        dataset.to_zarr(
            session.store,
            group=group,
            mode=mode,
            append_dim=append_dim,
            region=region,
            safe_chunks=safe_chunks,
            align_chunks=align_chunks,
            encoding=encoding,
            chunkmanager_store_kwargs=None if chunkmanager_store_kwargs is None else dict(chunkmanager_store_kwargs),
            **_FORMAT,
        )
        return
    writer = _XarrayDatasetWriter(dataset, store=session.store, safe_chunks=safe_chunks, align_chunks=align_chunks)
    writer._open_group(group=group, mode=mode, append_dim=append_dim, region=region)
    writer.write_metadata(encoding)
    writer.write_eager()
    if writer.writer.sources and through_storage:
        fork = run_sync(session._joined_fork())
        writer.write_lazy(chunkmanager_store_kwargs, split_every, fork)
        session.collect_forks()
    elif writer.writer.sources:
        session.merge(writer.write_lazy(chunkmanager_store_kwargs, split_every))


_FORMAT = {
    "zarr_format": 3,
    # The snapshot already holds all metadata in one file; a consolidated copy would only become stale.
    "consolidated": False,
}


class LazyArrayWriter(common.ArrayWriter):
    """Collects the arrays that xarray writes, and writes them on request: first arrays in memory, then dask arrays."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._eager: list[tuple[Any, Any, Any]] = []

    def add(self, source: Any, target: Any, region: Any = None) -> Any:
        """Register ``source`` to be written to ``target``, or to a region of it."""
        if is_dask_collection(source):
            super().add(source, target, region)  # type: ignore[no-untyped-call]
        else:
            self._eager.append((source, target, region))

    def write_eager(self) -> None:
        """Write the arrays that are in memory."""
        waiting, self._eager = self._eager, []
        for source, target, region in waiting:
            target[... if region is None else region] = source


@dataclass
class _XarrayDatasetWriter:
    """Writes a dataset in three steps: metadata, arrays in memory, and dask arrays through a fork."""

    dataset: Dataset = field(repr=False)
    store: IcechunkStore = field(kw_only=True)
    safe_chunks: bool = field(kw_only=True, default=True)
    align_chunks: bool = field(kw_only=True, default=False)
    _initialized: bool = field(default=False, repr=False)
    xarray_store: Any = field(init=False, repr=False)
    """xarray's own view of the group that is written to."""
    writer: LazyArrayWriter = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.store, IcechunkStore):
            raise WrongTypeError(
                f"an IcechunkStore is needed to write to, not {type(self.store).__name__}", ErrorKind.INVALID_SETTING
            )

    def _open_group(
        self, *, group: str | None, mode: ZarrWriteModes | None, append_dim: Hashable | None, region: Region
    ) -> None:
        mode = _choose_default_mode(mode=mode, append_dim=append_dim, region=region)
        self.xarray_store = _writers.get_writable_zarr_store(
            self.store,
            group=group,
            mode=mode,
            append_dim=append_dim,
            region=region,
            safe_chunks=self.safe_chunks,
            align_chunks=self.align_chunks,
            **_FORMAT,
        )
        self.dataset = self.xarray_store._validate_and_autodetect_region(self.dataset)

    def write_metadata(self, encoding: Mapping[Any, Any] | None = None) -> None:
        """Create the group and its arrays, with attributes and coordinates of their own."""
        self.xarray_store._validate_encoding(encoding or {})
        self.writer = LazyArrayWriter()
        _writers.dump_to_store(self.dataset, self.xarray_store, self.writer, encoding=encoding or {})
        self._initialized = True

    def write_eager(self) -> None:
        """Write the arrays that are in memory."""
        self._require_metadata()
        self.writer.write_eager()

    def write_lazy(
        self,
        chunkmanager_store_kwargs: MutableMapping[Any, Any] | None = None,
        split_every: int | None = None,
        joined: ForkSession | None = None,
    ) -> ForkSession:
        """Compute and write dask arrays; returns the session with their changes, to be merged.

        Parameters
        ----------
        chunkmanager_store_kwargs, split_every
            As in `to_icechunk`.
        joined
            A fork that has joined the session: the tasks hand over through storage, and nothing is to be merged.
        """
        self._require_metadata()
        if not self.writer.sources:
            raise WrongTypeError(
                "there is nothing to write lazily: no variable is a dask array", ErrorKind.INVALID_SETTING
            )
        from icechunk.dask import store_dask

        session = self.store.session
        fork = joined or (session if isinstance(session, ForkSession) else session.fork())
        return store_dask(
            sources=self.writer.sources,
            targets=[zarr.open_array(fork.store, path=array.path, mode="r+") for array in self.writer.targets],
            regions=self.writer.regions,
            split_every=split_every,
            through_storage=joined is not None,
            **dict(chunkmanager_store_kwargs or {}),
        )

    def _require_metadata(self) -> None:
        if not self._initialized:
            raise InvalidInputError("write_metadata must be called before", ErrorKind.INVALID_SETTING)


def is_dask_collection(x: Any) -> bool:
    """Whether ``x`` is computed by dask."""
    graph = getattr(x, "__dask_graph__", None)
    return callable(graph) and graph() is not None


def _make_dataset(obj: DataArray | Dataset) -> Dataset:
    """The dataset itself, or a dataset of one variable, named so that xarray can restore the DataArray."""
    if isinstance(obj, Dataset):
        return obj
    if obj.name is None:
        return obj.to_dataset(name=_api.DATAARRAY_VARIABLE)
    if obj.name not in obj.coords and obj.name not in obj.dims:
        return obj.to_dataset()
    dataset = obj.to_dataset(name=_api.DATAARRAY_VARIABLE)
    dataset.attrs[_api.DATAARRAY_NAME] = obj.name
    return dataset


_WRITING = ("w", "w-", "a", "a-", "r+")


def _choose_default_mode(
    *,
    mode: ZarrWriteModes | None,
    append_dim: Hashable | None,
    region: Mapping[str, slice | Literal["auto"]] | Literal["auto"] | None,
) -> ZarrWriteModes:
    """The mode of a write, with a default if None is given; raises `ValueError` for a mode that does not fit."""
    if mode is None:
        return "a" if append_dim is not None else "w-" if region is None else "r+"
    if append_dim is not None and mode not in ("a", "a-"):
        raise _refused(f"append_dim goes with mode 'a', 'a-' or None, not with mode={mode!r}")
    if region is not None and mode not in ("a", "a-", "r+"):
        raise _refused(f"region goes with mode 'a', 'a-', 'r+' or None, not with mode={mode!r}")
    if mode not in _WRITING:
        raise _refused(f"mode must be one of {', '.join(map(repr, _WRITING))}, not {mode!r}")
    return mode


def _refused(reason: str) -> InvalidInputError:
    return InvalidInputError(reason, ErrorKind.INVALID_SETTING)


@register_dataset_accessor("icechunk")  # type: ignore[no-untyped-call]  # xarray does not type it
class IcechunkAccessor:
    """``ds.icechunk``: writes a dataset to a repository that a URL names. Known once `icechunk.xarray` is imported."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def to(
        self,
        url: str | os.PathLike[str],
        *,
        message: str,
        metadata: dict[str, Any] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Write the dataset in one commit; the repository is created if there is none.

        Parameters
        ----------
        url
            As in `icechunk.open`: a location, and a branch if it is not ``main``; its path is the group.
        message, metadata
            Message and metadata of the commit.
        storage_options
            Keyword arguments of the storage: see `icechunk.storage_from_url`.
        options
            Those of `to_icechunk`: ``mode``, ``append_dim``, ``region``, ``encoding``, …

        Returns
        -------
        str
            The id of the new snapshot.

        Raises
        ------
        InvalidInputError
            The URL is wrong, or names a tag or a snapshot.
        ConflictError
            Another commit landed on the branch meanwhile; nothing was written.
        """
        parsed = parse_url(url)
        session = run_sync(session_at(parsed, "a", storage_options=storage_options))
        if parsed.path:
            options["group"] = "/".join(filter(None, (parsed.path, (options.get("group") or "").strip("/"))))
        to_icechunk(self._dataset, session, **options)
        return session.commit(message, metadata)
