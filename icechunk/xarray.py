"""Write xarray objects into a session.

`to_icechunk` is to a session what ``Dataset.to_zarr`` is to a store: xarray decides which variables, chunks and
encodings there are, and everything it writes stands in the session until ``commit``. Reading needs nothing of ours:
``xarray.open_zarr(session.store, consolidated=False)``.

Dask arrays are computed here and now by whatever scheduler is the default, in other processes too: their tasks write to
a fork of the session, which is merged when all are done.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from icechunk.errors import ErrorKind, ReadOnlyError

if TYPE_CHECKING:
    from xarray import DataArray, Dataset

    from icechunk.session import Session

__all__ = ["to_icechunk"]

Region: TypeAlias = "Mapping[str, slice | Literal['auto']] | Literal['auto'] | None"
ZarrWriteModes: TypeAlias = Literal["w", "w-", "a", "a-", "r+", "r"]


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
) -> None:
    """Write a Dataset or DataArray into a writable session; nobody else sees it before the session is committed.

    Parameters
    ----------
    obj
        What to write. A DataArray becomes a Dataset of one variable, named as ``DataArray.to_zarr`` names it.
    session
        A writable session. It is changed, not committed.
    group
        Path of the target group, created with its parents where absent; the root group where None.
    mode
        ``"w"`` replaces whatever the group holds, ``"w-"`` creates and refuses a group that holds data, ``"a"``
        replaces variables of the same name, ``"a-"`` appends and leaves variables without ``append_dim`` alone,
        ``"r+"`` changes values of what exists. None means ``"a"`` with ``append_dim``, ``"r+"`` with ``region``, else
        ``"w-"``.
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

    Raises
    ------
    TypeError
        ``obj`` is no xarray object.
    ReadOnlyError
        The session cannot be written to.
    ValueError, FileExistsError, KeyError
        As from ``Dataset.to_zarr``: an unknown mode, a dimension that does not match, a group that already holds data.

    Notes
    -----
    A write that fails or is interrupted may leave part of it in the session: `Session.discard_changes` drops it. The
    repository is never touched before the commit.
    """
    from xarray import DataArray, Dataset

    if not isinstance(obj, DataArray | Dataset):
        raise TypeError(f"to_icechunk writes a Dataset or a DataArray, not {type(obj).__name__}")
    if session.read_only:
        raise ReadOnlyError(
            f"cannot write to group {group or '/'!r}: the session is read-only; open one with "
            "repo.writable_session(branch)",
            ErrorKind.READ_ONLY_SESSION,
        )
    # typed as Any: xarray's overloads know nothing of a store that is not a path, a mapping or fsspec's
    source: Any = obj
    dataset = _as_dataset(source) if isinstance(obj, DataArray) else source
    how = {
        "group": group,
        "mode": mode,
        "append_dim": append_dim,
        "region": region,
        "safe_chunks": safe_chunks,
        "align_chunks": align_chunks,
        "zarr_format": 3,
        # a second copy of all metadata would only go stale: the snapshot is the consolidation
        "consolidated": False,
    }
    if dataset.__dask_graph__() is None:
        store_kwargs = None if chunkmanager_store_kwargs is None else dict(chunkmanager_store_kwargs)
        dataset.to_zarr(session.store, encoding=encoding, chunkmanager_store_kwargs=store_kwargs, **how)
    else:
        _write_lazily(dataset, session, encoding, dict(chunkmanager_store_kwargs or {}), split_every, how)


def _as_dataset(array: Any) -> Any:
    """A Dataset of one variable, named so that xarray gives the DataArray back."""
    from xarray.backends.api import DATAARRAY_NAME, DATAARRAY_VARIABLE

    if array.name is None:
        return array.to_dataset(name=DATAARRAY_VARIABLE)
    if array.name not in array.coords and array.name not in array.dims:
        return array.to_dataset()
    dataset = array.to_dataset(name=DATAARRAY_VARIABLE)
    dataset.attrs[DATAARRAY_NAME] = array.name
    return dataset


def _write_lazily(
    dataset: Any,
    session: Session,
    encoding: Mapping[Any, Any] | None,
    store_kwargs: dict[Any, Any],
    split_every: int | None,
    how: dict[str, Any],
) -> None:
    """Write metadata and what is in memory to the session, and dask arrays to a fork of it."""
    import zarr
    from xarray.backends import common, writers

    from icechunk.dask import store_dask

    # typed as Any: half of these are untyped
    xarray_common: Any = common
    xarray_writers: Any = writers
    target = xarray_writers.get_writable_zarr_store(session.store, **how)
    dataset = target._validate_and_autodetect_region(dataset)
    target._validate_encoding(encoding or {})
    writer = xarray_common.ArrayWriter()
    xarray_writers.dump_to_store(dataset, target, writer, encoding=encoding or {})
    if writer.sources:
        store = session.fork().store
        merged = store_dask(
            sources=writer.sources,
            targets=[zarr.open_array(store, path=array.path, mode="r+") for array in writer.targets],
            regions=writer.regions,
            split_every=split_every,
            **store_kwargs,
        )
        session.merge(merged)
