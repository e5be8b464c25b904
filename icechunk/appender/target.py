"""The arrays of one group that rows are appended to: opened once, their open chunk row kept in memory.

A row is one position along the append dimension. Rows that do not fill a chunk yet are kept as they were written, so
the next append encodes the chunk from memory and reads nothing back.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from itertools import chain
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import zarr.api.asynchronous as azarr
from zarr.core.array import AsyncArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import MemoryStore, StorePath

from icechunk.appender.chunk_encoding import (
    Block,
    ChunkEncoder,
    EncodedChunk,
    Unfit,
    codings_of,
    encode,
    in_dtype,
    require_kept,
    shown_label,
    stored_values,
    unlike_dtype,
    whole_units,
)
from icechunk.appender.row_memory import RowMemory
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.keys import chunk_key
from icechunk.runtime import json_codec
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_each
from icechunk.session import Session
from icechunk.session.ahead import WrittenChunk
from icechunk.transfer.assets import off_loop

__all__ = ["Batch", "Target", "Variable", "WrittenRows", "encoded_rows"]

_CHUNK_BYTES: Final = 256 * 1024
"""Bytes of a chunk of an array that the first dataset creates, about: rows are added to a chunk until it has so many.

Each commit writes the open chunk anew: larger ones would cost more where commits have few rows. Small ones share packs.
"""
_ENCODINGS: Final = frozenset({"chunks", "shards", "compressors", "filters", "serializer"})
_UNIT_NAMES: Final = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_MOST_ROWS: Final = 65536
_CHUNKS_KEPT: Final = 4
"""Chunks, at least, of the rows that are kept where only so many are: one more may be there besides."""
_AT_ONCE: Final = 16
_ENCODERS: Final = max(1, min(4, os.cpu_count() or 1))
"""Threads that encode the rows of one commit."""
_FEW_BYTES: Final = 1024 * 1024
"""Bytes of rows up to which fast codecs run without a thread, chunk by chunk."""
_SHORT_PORTION_BYTES: Final = 256 * 1024
_SHORT_PORTION: Final = 32
"""Bytes of rows, and chunks, that are then encoded without a pause, about: half a millisecond."""
_LEAST_PORTION_BYTES: Final = 128 * 1024
_MOST_PORTION_BYTES: Final = 4 * 1024 * 1024
"""Bytes of rows that a thread encodes at once, at most: so much is held encoded beside the rows."""

Values = npt.NDArray[Any]
_Chunk: TypeAlias = "tuple[tuple[int, ...], memoryview | None]"


@dataclass(slots=True, kw_only=True)
class Variable:
    """An array of the group."""

    name: str
    meta: ArrayV3Metadata
    document: dict[str, Any]
    """Its zarr.json. The shape in it and in ``meta`` may be older than ``length``."""
    axis: int | None
    """Number of the append dimension, from 0; None: the array does not have it."""
    tail: Values | None = None
    """Rows since the last full chunk, the append dimension first; None: not known, they are read when needed."""
    values: Values | None = None
    """All values of an array without the append dimension, once they were needed or are to be written; else None."""
    length: int = 0
    """Rows that there are."""
    encoder: ChunkEncoder | None = None
    """Encoder of its chunks; None: zarr encodes them."""
    dtype: np.dtype[Any]
    dims: tuple[str | None, ...]
    codings: dict[str, Any]
    """Its attributes that say how values are kept, as `codings_of`."""
    row_shape: tuple[int, ...]
    """Shape without the append dimension."""
    is_new: bool = False
    """Whether the first dataset creates it."""

    @classmethod
    def of(cls, name: str, document: dict[str, Any], dim: str) -> Variable:
        """The variable that an array's zarr.json describes."""
        meta = ArrayV3Metadata.from_dict(document)
        dims = tuple(meta.dimension_names or ())
        axis = dims.index(dim) if dim in dims else None
        return cls(
            name=name,
            meta=meta,
            document=document,
            axis=axis,
            length=0 if axis is None else meta.shape[axis],
            encoder=ChunkEncoder.of(meta),
            dtype=meta.dtype.to_native_dtype(),
            dims=dims,
            codings=codings_of(meta.attributes),
            row_shape=tuple(n for d, n in enumerate(meta.shape) if d != axis),
        )

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk (of a shard, where there are shards)."""
        return 1 if self.axis is None else int(self.meta.chunk_grid.chunk_shape[self.axis])  # type: ignore[attr-defined]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        shape = list(self.meta.shape)
        if self.axis is not None:
            shape[self.axis] = self.length
        return tuple(shape)


@dataclass(slots=True, kw_only=True)
class Batch:
    """Rows that were checked against a target, as they will be written."""

    rows: int
    values: dict[str, Values]
    """Values by array: the append dimension first, encoded, in the array's dtype."""
    offset: Any = None
    num_bytes: int = 0
    fresh: Target | None = None
    """The target that this batch creates, if it does."""
    written: WrittenRows | None = None
    """Rows that are written already, these among them: ``values`` lacks some of the arrays."""
    replaced: int = 0
    """Rows that replaced stored ones, no longer among these."""


@dataclass(slots=True, kw_only=True, eq=False)
class WrittenRows:
    """Rows of batches, of arrays with large chunks, whose chunks are written, and no commit refers to them yet."""

    first: int
    """The row that they begin with, if no other writer appends any: the first of a chunk of each array."""
    rows: int
    variables: dict[str, Variable]
    """The arrays, as they were then; the rows are whole chunks of each."""
    chunks: dict[str, list[WrittenChunk]]
    """Chunks by name of the array, at the coordinates that they have then."""
    since_us: int
    """Store time, µs, not later than their upload."""
    batches: Sequence[Batch]
    """All that have these rows."""

    async def require_stored(self, session: Session) -> None:
        """Raise `ObjectNotFoundError` where a chunk's object is not there any more."""
        storage = session._content.core.storage
        places = [place for chunks in self.chunks.values() for _, place in chunks if isinstance(place, tuple)]
        await run_each(storage.head, {chunk_key(id) for id, _, _ in places}, limit=_AT_ONCE)

    def moved(self, name: str, rows: int) -> list[WrittenChunk]:
        """The chunks of an array, where the rows begin so many rows later."""
        axis, steps = self.variables[name].axis or 0, rows // self.variables[name].chunk_rows
        if not steps:
            return self.chunks[name]
        return [((*at[:axis], at[axis] + steps, *at[axis + 1 :]), chunk) for at, chunk in self.chunks[name]]


@dataclass(slots=True, kw_only=True)
class Target:
    """The arrays of a group as of one snapshot."""

    dim: str
    group: str
    """Path without slashes around it; empty for the root."""
    variables: dict[str, Variable] = field(default_factory=dict)
    snapshot_id: str = ""
    created: bool = True
    """Whether arrays along the dimension exist; else the first write makes them."""
    groups: set[str] = field(default_factory=set)
    """Names of the groups directly below the group."""
    group_attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def growing(self) -> list[Variable]:
        """The arrays that have the append dimension."""
        return [v for v in self.variables.values() if v.axis is not None]

    @property
    def length(self) -> int:
        """Rows that there are."""
        return self.growing[0].length if self.growing else 0

    @property
    def chunk_rows(self) -> int:
        """Rows after which chunks of all arrays begin anew."""
        return math.lcm(*(v.chunk_rows for v in self.growing))

    def path(self, name: str) -> str:
        """Path of an array, without slashes around it."""
        return f"{self.group}/{name}" if self.group else name

    # -- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, session: Session, group: str, dim: str) -> Target:
        """The arrays directly below a group.

        Raises
        ------
        InvalidInputError
            They do not agree on the dimension, or the chunks of one that has it are not all of one size; or an array is
            where the group, or one above it, would be.
        """
        target = cls(dim=dim, group=group, snapshot_id=session.snapshot_id)

        async def found_at(path: str) -> dict[str, Any] | None:
            document = await session.store.get(f"{path}/zarr.json".lstrip("/"), default_buffer_prototype())
            return None if document is None else json_codec.loads(document.to_bytes())

        parts = group.split("/") if group else []
        for depth in range(len(parts) + 1):
            above = "/".join(parts[:depth])
            node = await found_at(above)
            if node is not None and node.get("node_type") == "array":
                raise target._refused(f"{'/' + above!r} is an array: name a group")
        names = [name async for name in session.store.list_dir(group) if name != "zarr.json"]

        async def read(name: str) -> None:
            found = await found_at(target.path(name))
            if found is None:
                return
            if found.get("node_type") != "array":
                target.groups.add(name)
                return
            if dim in (found.get("dimension_names") or ()) and found["chunk_grid"]["name"] != "regular":
                raise target._refused(f"the chunks of {name} are not all of one size")
            target.variables[name] = Variable.of(name, found, dim)

        await run_each(read, sorted(names), limit=_AT_ONCE)
        target.variables = dict(sorted(target.variables.items()))
        lengths = {v.name: v.length for v in target.growing}
        if len(set(lengths.values())) > 1:
            raise InvalidInputError(
                f"cannot append along {dim!r} in group {group or '/'!r}: its arrays have different lengths: {lengths}",
                ErrorKind.INVALID_SETTING,
            )
        target.created = bool(target.growing)
        return target

    async def labels(self, session: Session, *, last_only: bool = False) -> Values | None:
        """The values of the coordinate of the append dimension as stored; None where there is none."""
        variable = self.variables.get(self.dim)
        if variable is None or variable.axis is None:
            return None
        first = max(variable.length - 1, 0) if last_only else 0
        return np.asarray(await self._array(session, variable).getitem(slice(first, None)))

    def _array(self, session: Session, variable: Variable) -> AsyncArray[Any]:
        meta = replace(variable.meta, shape=variable.shape)
        return AsyncArray(meta, StorePath(session.store, self.path(variable.name)))

    async def _set(self, session: Session, variable: Variable, where: Any, values: Values) -> None:
        # Before numcodecs 0.17 texts are stored in the order in which they are in memory.
        await self._array(session, variable).setitem(where, np.asarray(values, order="C"))

    # -- checking --------------------------------------------------------------------------------------------------

    def unlike(self, other: Target) -> str | None:
        """A difference that makes rows checked against this target unfit for the other; None where there is none."""
        ours, theirs = ({v.name: v for v in target.growing} for target in (self, other))
        if ours.keys() != theirs.keys():
            return f"those along {self.dim!r} were {sorted(ours)} and are {sorted(theirs)}"
        for name, variable in ours.items():
            found = theirs[name]
            for what in ("dtype", "dims", "row_shape", "codings"):
                before, now = getattr(variable, what), getattr(found, what)
                if before != now:
                    return f"{what} of {name} was {before} and is {now}"
        return None

    async def unlike_fixed(self, other: Target, session: Session, *, new: bool = True) -> str | None:
        """As `unlike`, of the arrays without the dimension that the first dataset gave.

        Parameters
        ----------
        session
            One in which the other's arrays can be read.
        new
            Those too that this target would have created.
        """
        for variable in self.variables.values():
            if variable.is_new and not new:
                continue
            if variable.axis is not None or variable.values is None:
                continue
            found = other.variables.get(variable.name)
            if found is None or found.axis is not None:
                return f"there is no {variable.name} besides those along {self.dim!r}"
            try:
                await other._require_same(session, found, np.asarray(variable.values))
            except InvalidInputError:
                return f"the values of {variable.name} are others"
        return None

    async def planned_beside(self, other: Target, session: Session) -> Target:
        """This target, whose arrays do not exist yet, with the fixed arrays of another, newer one.

        Parameters
        ----------
        session
            One in which the other's arrays can be read.

        Raises
        ------
        InvalidInputError
            An array that is to be created would replace something, or does not fit; or one that was to be kept changed.
        """
        if (reason := await self.unlike_fixed(other, session, new=False)) is not None:
            raise self._refused(reason)
        planned = {name: v for name, v in self.variables.items() if v.is_new}
        for variable in planned.values():
            other._require_free(variable.name, variable.dims)
            other._require_sizes(variable.name, variable.dims, variable.shape)
        return replace(self, snapshot_id=other.snapshot_id, variables=other.variables | planned, groups=other.groups)

    def _require_free(self, name: str, dims: tuple[Any, ...]) -> None:
        """Refuse to create an array where something is."""
        found = self.variables.get(name)
        if found is not None:
            named = f"dimensions {found.dims}" if found.dims else "dimensions without names" if found.shape else "none"
            raise self._refused(
                f"{name!r} exists already, with shape {found.shape} and {named}, and would be replaced by one with "
                f"dimensions {dims}: append to another group, delete it first, or, if its rows are along "
                f"{self.dim!r}, give that name to its dimension"
            )
        if name in self.groups:
            raise self._refused(f"{name!r} is a group already: rename the variable, or append to another group")
        if "/" in name or name in ("", ".", "..", "zarr.json"):
            raise self._refused(f"{name!r} is no name of an array: name it without '/'")

    def _require_sizes(self, name: str, dims: Sequence[str | None], shape: Sequence[int]) -> None:
        """Refuse an array whose dimensions have other sizes than those of the arrays that there are."""
        for stored in self.variables.values():
            sizes = dict(zip(stored.dims, stored.shape, strict=False))
            for dim, size in zip(dims, shape, strict=True):
                if dim is not None and dim != self.dim and sizes.get(dim, size) != size:
                    raise self._refused(
                        f"{name!r} has {size} along {dim!r}, and {stored.name!r}, which exists already, has "
                        f"{sizes[dim]}: append to another group, or give data of this size"
                    )

    def shown_label(self, label: Any) -> str:
        """A label of the append dimension in a message."""
        return shown_label(label, self.variables[self.dim].codings)

    def require_labels(self, labels: Values) -> None:
        """Refuse labels of the append dimension, at least one, that do not grow, or are missing."""
        if len(labels) > 1 and not np.all(labels[1:] > labels[:-1]):
            shown = ", ".join(map(self.shown_label, labels[:5]))
            raise self._refused(f"labels of {self.dim!r} do not grow within the data: {shown}…")
        kind = labels.dtype.kind
        if kind == "i":
            # A time that is absent is kept as the lowest number.
            codings = self.variables[self.dim].codings
            is_absent = bool(codings) and "units" in codings and labels[0] == np.iinfo(labels.dtype).min
        else:
            is_absent = kind in "fcmM" and labels[-1] != labels[-1]
        if is_absent:
            raise self._refused(f"a label of {self.dim!r} is missing (NaN or NaT)")

    async def checked_before_first(self, session: Session, data: Any) -> Batch:
        """As `checked`, of rows that go before the first."""
        if not self.created:
            raise self._refused("there are no arrays whose first row these go before: put them")
        batch = await self.checked(session, data)
        labels = batch.values.get(self.dim)
        if labels is not None and len(labels):
            self.require_labels(labels)
            if self.length:
                coordinate = self.variables[self.dim]
                (first,) = np.asarray(await self._array(session, coordinate).getitem(slice(0, 1)))
                if not labels[-1] < first:
                    raise self._refused(
                        f"label {self.shown_label(labels[-1])} of {self.dim!r} is not before the first one, "
                        f"{self.shown_label(first)}"
                    )
        return batch

    async def checked(
        self, session: Session, data: Any, *, keep: int | None = None, memory: RowMemory | None = None
    ) -> Batch:
        """Check rows against the arrays, before anything is buffered.

        Parameters
        ----------
        session
            Of this target's snapshot.
        data
            A dataset, or a mapping of names to arrays.
        keep
            Rows that are kept: arrays that are created have some chunks for so many.
        memory
            Memory for the rows; None: each has its own.

        Raises
        ------
        InvalidInputError
            Names, dimensions, dtypes, sizes or fixed coordinates do not fit; the message says which.
        """
        from_xarray = _is_dataset(data)
        if not from_xarray and type(data) is not dict and not isinstance(data, Mapping):
            raise self._refused(f"expected an xarray.Dataset, or a mapping of names to arrays, not {type(data)}")
        if not self.growing:
            if not from_xarray:
                raise self._refused(
                    f"it has no arrays along {self.dim!r} yet: create them, or put an xarray.Dataset first"
                )
            kept = await self._kept(session, data)
            return await _first(data, self, keep, kept)
        values = self._encoded(data) if from_xarray else self._plain(data)
        if values.keys() != self.variables.keys():
            self._require_names(values)
        found: dict[str, Values] = {}
        rows, num_bytes = -1, 0
        for name, given in values.items():
            variable = self.variables[name]
            axis = variable.axis
            if axis is None:
                await self._require_same(session, variable, given)
                continue
            ndim = len(variable.row_shape) + 1
            if given.ndim == ndim - 1 and not from_xarray:
                given = np.expand_dims(given, axis)
            if given.ndim != ndim:
                raise self._refused(f"{name} has {given.ndim} dimensions, the array {ndim}")
            if axis:
                given = np.moveaxis(given, axis, 0)
            num_rows = len(given)
            if given.shape[1:] != variable.row_shape:
                raise self._refused(f"rows of {name} have shape {given.shape[1:]}, where {variable.row_shape} fits")
            if rows not in (-1, num_rows):
                raise self._refused(f"{name} has {num_rows} rows, other variables {rows}")
            rows = num_rows
            # A copy: the caller may use its memory again as soon as `put` returns.
            copied: Values | None = None
            if given.dtype == variable.dtype:
                copied = given.copy() if memory is None else memory.copy(given)
            elif _may_cast(given.dtype, variable.dtype):
                copied = in_dtype(given, variable.dtype)
            if copied is None and (times := self._times(variable, given)) is not given:
                copied = in_dtype(times, variable.dtype)
            if copied is None:
                raise self._refused(f"{name} {unlike_dtype(given, variable.dtype)}")
            found[name] = copied
            num_bytes += copied.nbytes
        return Batch(rows=rows, values=found, num_bytes=num_bytes)

    async def _kept(self, session: Session, dataset: Any) -> set[str]:
        """The names of the variables of a first dataset that exist, with the same values."""
        kept = set()
        for name, variable in dataset.variables.items():
            stored = self.variables.get(str(name))
            if stored is None or set(stored.dims) != set(variable.dims):
                self._require_free(str(name), variable.dims)
            if stored is None:
                self._require_sizes(str(name), variable.dims, variable.shape)
            else:
                await self._require_same(session, stored, self._encoded_as(stored, variable))
                kept.add(str(name))
        return kept

    def _require_names(self, values: Mapping[str, Values]) -> None:
        missing = {v.name for v in self.growing} - values.keys()
        unknown = values.keys() - self.variables.keys()
        if missing or unknown:
            what = [f"{kind} {sorted(names)}" for kind, names in (("missing", missing), ("unknown", unknown)) if names]
            raise self._refused(f"variables do not fit: {', '.join(what)}")

    def _plain(self, data: Mapping[str, Any]) -> dict[str, Values]:
        for name, values in data.items():
            if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
                raise self._refused(f"{name} has masked values: give what stands for them, with filled()")
        try:
            return {str(k): np.asarray(v) for k, v in data.items()}
        except (ValueError, TypeError) as error:
            raise self._refused(f"a value is no array: {error}") from error

    def _times(self, variable: Variable, given: Values) -> Values:
        """Datetimes of a mapping as the array keeps them; other values, or where it has no units, as given."""
        units = variable.codings.get("units")
        if given.dtype.kind != "M" or variable.dtype.kind != "i" or units is None:
            return given
        numbers = whole_units(given, variable.codings)
        if numbers is None:
            raise self._refused(
                f"times of {variable.name} are no whole numbers of {units!r} in its calendar, as stored"
            )
        return numbers

    def _encoded(self, dataset: Any) -> dict[str, Values]:
        """The variables of a dataset as the stored arrays keep them."""
        found = {}
        for name, variable in dataset.variables.items():
            stored = self.variables.get(str(name))
            if stored is None:
                found[str(name)] = np.asarray(variable.values)
                continue
            found[str(name)] = self._encoded_as(stored, variable)
        return found

    def _encoded_as(self, stored: Variable, variable: Any) -> Values:
        """A variable of a dataset as an array keeps it."""
        if variable.dims != stored.dims:
            if set(variable.dims) != set(stored.dims):
                raise self._refused(f"{stored.name} has the dimensions {variable.dims}, the array {stored.dims}")
            variable = variable.transpose(*stored.dims)
        codings = stored.codings
        if variable.dtype.kind in "mMO" and "units" not in codings:
            codings = self._codings_of_bounds(stored.name) | codings
        try:
            return stored_values(stored.name, variable, codings, stored.dtype)
        except Unfit as unfit:
            raise self._refused(str(unfit)) from None

    def _codings_of_bounds(self, name: str) -> dict[str, Any]:
        """The codings of times that are the bounds of other ones: by the CF conventions they have none themselves."""
        for variable in self.variables.values():
            if variable.meta.attributes.get("bounds") == name:
                return {key: value for key, value in variable.codings.items() if key in ("units", "calendar")}
        return {}

    async def _require_same(self, session: Session, variable: Variable, given: Values) -> None:
        if variable.values is None:
            variable.values = np.asarray(await self._array(session, variable).getitem(Ellipsis))
        stored, given = variable.values, self._times(variable, given)
        equal_nan = stored.dtype.kind in "fc" and given.dtype.kind in "fc"
        if stored.shape != given.shape or not np.array_equal(stored, given, equal_nan=equal_nan):
            sizes = "" if stored.shape == given.shape else f" (shape {given.shape}, stored {stored.shape})"
            raise self._refused(
                f"{variable.name!r} differs from its stored values{sizes}; only variables along {self.dim!r} grow: "
                "give the stored values, or leave it out"
            )

    def _refused(self, reason: str) -> InvalidInputError:
        return InvalidInputError(
            f"cannot append along {self.dim!r} to group {'/' + self.group!r}: {reason}", ErrorKind.INVALID_SETTING
        )

    # -- writing ---------------------------------------------------------------------------------------------------

    async def write(self, session: Session, batches: Sequence[Batch]) -> Target:
        """Append rows in a session of this target's snapshot; returns the target as it is then."""
        rows = sum(batch.rows for batch in batches)
        after = replace(self, variables=dict(self.variables), created=True)
        if not self.created:
            await self._create(session)
        unknown = [variable for variable in self.growing if variable.tail is None]
        await run_each(lambda variable: self._read_tail(session, variable), unknown, limit=_AT_ONCE)
        writes = []
        for variable in self.growing:
            start = variable.length
            first = start - start % variable.chunk_rows
            stretches, written = _stretches(variable, first, batches)
            stretches_of_bands = [(row, list(_bands(parts, variable.chunk_rows))) for row, parts in stretches]
            # A copy, so that the memory of the batches can be freed.
            open_rows = (start + rows) % variable.chunk_rows
            bands = stretches_of_bands[-1][1]
            tail = np.concatenate(bands[-1]) if open_rows else np.empty((0, *variable.row_shape), variable.dtype)
            if open_rows:
                bands[-1] = [tail]
            grown = after.variables[variable.name] = replace(variable, length=start + rows, tail=tail)
            path = self.path(variable.name)
            await _put_document(session.store, path, grown)
            if written:
                chunks = chain.from_iterable(one.moved(variable.name, row - one.first) for row, one in written)
                since_us = min(one.since_us for _, one in written)
                session._content.set_written("/" + path, list(chunks), since_us)
            writes += [(grown, bands, row) for row, bands in stretches_of_bands]
        await self._put_bands(session, writes)
        return after

    def unfit(self, batches: Sequence[Batch]) -> list[WrittenRows]:
        """Written rows that `write` cannot refer to behind the rows that there are now: chunks begin at other rows, or
        are encoded otherwise."""
        found: list[WrittenRows] = []
        row = self.length
        for batch in batches:
            written = batch.written
            if written is not None and batch is written.batches[0]:
                moved = row - written.first
                for name, variable in written.variables.items():
                    if moved % variable.chunk_rows or not _encodes_alike(variable, self.variables[name]):
                        found.append(written)
                        break
            row += batch.rows
        return found

    async def read_back(self, session: Session, written: WrittenRows) -> None:
        """Have the rows in memory again, as if they had not been written.

        Parameters
        ----------
        session
            One without changes; it has none afterwards either.

        Raises
        ------
        StorageError
            They cannot be read.
        """
        await _put_groups(session.store, self.group, {})
        found: dict[str, Values] = {}
        for name, variable in written.variables.items():
            grown = replace(variable, length=written.first + written.rows)
            await _put_document(session.store, self.path(name), grown)
            content = session._content
            content.set_written("/" + self.path(name), written.chunks[name], content.since_us)
            where = [slice(None)] * len(variable.shape)
            where[variable.axis or 0] = slice(written.first, grown.length)
            values = np.asarray(await self._array(session, grown).getitem(tuple(where)))
            found[name] = np.moveaxis(values, variable.axis or 0, 0)
        session.discard_changes()
        row = 0
        for batch in written.batches:
            batch.values |= {name: values[row : row + batch.rows] for name, values in found.items()}
            batch.written = None
            row += batch.rows

    async def _create(self, session: Session) -> None:
        """Write the groups, and the arrays that do not grow."""
        await _put_groups(session.store, self.group, self.group_attributes)
        for variable in self.variables.values():
            if variable.axis is None and variable.is_new:
                await _put_document(session.store, self.path(variable.name), variable)
                await self._set(session, variable, Ellipsis, np.asarray(variable.values))

    async def _put_bands(self, session: Session, writes: Sequence[tuple[Variable, list[list[Values]], int]]) -> None:
        """Write rows from the beginning of a chunk up to the end of another or of the array: nothing is read back.

        Parameters
        ----------
        writes
            Of each array: it as it is afterwards, its rows by chunk, and the first of them.
        """
        todo: list[_Band] = []
        for variable, bands, start in writes:
            if variable.encoder is None:
                if not bands:
                    continue
                block = np.concatenate([part for band in bands for part in band])
                where: list[slice] = [slice(None)] * len(variable.shape)
                where[variable.axis or 0] = slice(start, start + len(block))
                await self._set(session, variable, tuple(where), np.moveaxis(block, 0, variable.axis or 0))
                continue
            first = start // variable.chunk_rows
            path = "/" + self.path(variable.name)
            todo += [_Band(variable, path, first + number, parts) for number, parts in enumerate(bands)]
        content, encoders = session._content, asyncio.Semaphore(_ENCODERS)
        size = _size(todo)
        is_short = size <= _FEW_BYTES and all(band.is_fast for band in todo)

        async def put(portion: list[_Band]) -> None:
            work = partial(_encoded, portion)
            encoded = work() if is_short else await off_loop(_size(portion), work, encoders)
            for path, chunks in encoded.items():
                empty = [coords for coords, chunk in chunks if chunk is None]
                await content.set_chunks(path, [(coords, chunk) for coords, chunk in chunks if chunk is not None])
                for coords in empty:
                    content.delete_chunk(path, coords)

        if is_short:
            # Threads would take longer to begin. Between the portions other tasks have a turn.
            for portion in _portions(todo, _SHORT_PORTION_BYTES, _SHORT_PORTION):
                await put(portion)
                await asyncio.sleep(0)
            return
        most = min(max(size // _ENCODERS, _LEAST_PORTION_BYTES), _MOST_PORTION_BYTES)
        # While some portions are written, as many are encoded.
        await run_each(put, _portions(todo, most, len(todo)), limit=2 * _ENCODERS)

    async def _read_tail(self, session: Session, variable: Variable) -> None:
        variable.tail = await self._tail(session, variable, variable.length - variable.length % variable.chunk_rows)

    async def _tail(self, session: Session, variable: Variable, aligned: int) -> Values:
        if variable.tail is not None and len(variable.tail) == variable.length - aligned:
            return variable.tail
        where = [slice(None)] * len(variable.shape)
        where[variable.axis or 0] = slice(aligned, variable.length)
        found = np.asarray(await self._array(session, variable).getitem(tuple(where)))
        return np.moveaxis(found, variable.axis or 0, 0)

    async def replace_rows(self, session: Session, rows: Sequence[tuple[int, Mapping[str, Values]]]) -> Target:
        """Write rows that exist already anew; returns the target as it is then.

        Parameters
        ----------
        rows
            Position of each row, and its values by array, with the append dimension.
        """
        after = replace(self, variables=dict(self.variables))
        for variable in self.growing:
            aligned = variable.length - variable.length % variable.chunk_rows
            open_rows = [position - aligned for position, _ in rows if position >= aligned]
            if open_rows:
                tail = (await self._tail(session, variable, aligned)).copy()
                new = [values[variable.name] for position, values in rows if position >= aligned]
                tail[open_rows] = np.concatenate(new)
                after.variables[variable.name] = replace(variable, tail=tail)
            for position, values in rows:
                where = [slice(None)] * len(variable.meta.shape)
                where[variable.axis or 0] = slice(position, position + 1)
                row = np.moveaxis(values[variable.name], 0, variable.axis or 0)
                await self._set(session, variable, tuple(where), row)
        return after

    async def drop_first(self, session: Session, rows: int) -> Target:
        """Leave the oldest rows out by shifting whole chunks; ``rows`` is a multiple of `chunk_rows`."""
        after = replace(self, variables=dict(self.variables))
        for variable in self.growing:
            offset = [0] * len(variable.meta.shape)
            offset[variable.axis or 0] = -(rows // variable.chunk_rows)
            await session.shift_array_async("/" + self.path(variable.name), offset)
            shorter = replace(variable, length=variable.length - rows)
            await _put_document(session.store, self.path(variable.name), shorter)
            after.variables[variable.name] = shorter
        return after

    async def prepend(self, session: Session, batch: Batch) -> Target:
        """Put rows before the first; their number is a multiple of `chunk_rows`."""
        if batch.rows % self.chunk_rows:
            raise self._refused(
                f"{batch.rows} rows cannot go before the first: whole chunks are shifted, so their number must be a "
                f"multiple of {self.chunk_rows}, which the rows of a chunk of each array divide: "
                f"{ {v.name: v.chunk_rows for v in self.growing} }; the encoding of the first dataset can choose others"
            )
        after = replace(self, variables=dict(self.variables))
        for variable in self.growing:
            longer = replace(variable, length=variable.length + batch.rows)
            await _put_document(session.store, self.path(variable.name), longer)
            offset = [0] * len(variable.meta.shape)
            offset[variable.axis or 0] = batch.rows // variable.chunk_rows
            await session.shift_array_async("/" + self.path(variable.name), offset)
            bands = list(_bands([batch.values[variable.name]], variable.chunk_rows))
            await self._put_bands(session, [(longer, bands, 0)])
            after.variables[variable.name] = longer
        return after


def encoded_rows(variables: Sequence[Variable], rows: Sequence[Sequence[Values]], first: int) -> Iterator[EncodedChunk]:
    """The encoded chunks of whole chunk rows of arrays whose encoder is known.

    Parameters
    ----------
    rows
        Rows of each array, in parts.
    first
        The first row; a chunk of each array begins there.
    """
    for variable, parts in zip(variables, rows, strict=True):
        bands = enumerate(_bands(parts, variable.chunk_rows), first // variable.chunk_rows)
        yield from encode(_block(variable, variable.name, number, band) for number, band in bands)


def _stretches(
    variable: Variable, first: int, batches: Sequence[Batch]
) -> tuple[list[tuple[int, list[Values]]], list[tuple[int, WrittenRows]]]:
    """The rows of an array in stretches that are in memory, the last of them empty or up to the end, and those that
    are written; each with its first row.

    Parameters
    ----------
    first
        First row of the open chunk.
    """
    row, stretches, written = variable.length, [(first, list[Values]())], list[tuple[int, WrittenRows]]()
    if variable.tail is not None and len(variable.tail):
        stretches[0][1].append(variable.tail)
    for batch in batches:
        one = batch.written
        if one is None or variable.name not in one.variables:
            stretches[-1][1].append(batch.values[variable.name])
        elif batch is one.batches[0]:
            written.append((row, one))
            stretches.append((row + one.rows, []))
        row += batch.rows
    return stretches, written


def _encodes_alike(one: Variable, other: Variable) -> bool:
    """Whether two arrays, or states of one, keep the same rows as the same chunks."""
    changing = {"shape": None, "attributes": None}
    return one.document | changing == other.document | changing


@dataclass(slots=True, frozen=True)
class _Band:
    """Rows that fill one chunk along the append dimension, up to the end of the array."""

    variable: Variable
    path: str
    number: int
    """Number of the chunk along the append dimension, from 0."""
    parts: list[Values]

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def is_fast(self) -> bool:
        return self.variable.encoder is not None and self.variable.encoder.is_fast

    def block(self) -> Block:
        """The rows as they are encoded, of an array with an encoder."""
        return _block(self.variable, self.path, self.number, self.parts)


def _block(variable: Variable, name: str, number: int, parts: Sequence[Values]) -> Block:
    """The rows that fill a chunk along the append dimension, as they are encoded, of an array with an encoder."""
    assert variable.encoder is not None
    axis = variable.axis or 0
    rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
    first = [0] * rows.ndim
    first[axis] = number
    return Block(name, variable.encoder, np.moveaxis(rows, 0, axis) if axis else rows, tuple(first))


def _bands(parts: Sequence[Values], chunk_rows: int) -> Iterator[list[Values]]:
    """Rows by chunk; the first row is the first of a chunk."""
    band: list[Values] = []
    room = chunk_rows
    for part in parts:
        first = 0
        while first < len(part):
            taken = part[first : first + room]
            band.append(taken)
            first += len(taken)
            room -= len(taken)
            if not room:
                yield band
                band, room = [], chunk_rows
    if band:
        yield band


def _power_of_two(most: int) -> int:
    """The largest one that is not larger; at least 1."""
    return 1 << (max(most, 1).bit_length() - 1)


def _encoded(bands: Sequence[_Band]) -> dict[str, list[_Chunk]]:
    """The encoded chunks by path of their array."""
    found: dict[str, list[_Chunk]] = {}
    for path, coords, data in encode(band.block() for band in bands):
        found.setdefault(path, []).append((coords, data))
    return found


def _size(bands: Sequence[_Band]) -> int:
    return sum(band.num_bytes for band in bands)


def _portions(bands: Sequence[_Band], enough_bytes: int, enough: int) -> Iterator[list[_Band]]:
    """Bands in portions, each as small as has so many bytes, or so many bands."""
    portion: list[_Band] = []
    held = 0
    for band in bands:
        portion.append(band)
        held += band.num_bytes
        if held >= enough_bytes or len(portion) >= enough:
            yield portion
            portion, held = [], 0
    if portion:
        yield portion


async def _put_document(store: Any, path: str, variable: Variable) -> None:
    # zarr takes a millisecond to write the document again, though only its shape differs.
    document = json_codec.dumps(variable.document | {"shape": variable.shape})
    await store.set(f"{path}/zarr.json", default_buffer_prototype().buffer.from_bytes(document))


async def _put_groups(store: Any, group: str, attributes: dict[str, Any]) -> None:
    """The documents of a group and of those above it, where there are none."""
    prototype = default_buffer_prototype()
    parts = group.split("/") if group else []
    for depth in range(len(parts) + 1):
        key = "/".join([*parts[:depth], "zarr.json"])
        if not await store.exists(key):
            own = attributes if depth == len(parts) else {}
            await store.set(key, GroupMetadata(attributes=own, zarr_format=3).to_buffer_dict(prototype)["zarr.json"])


def _is_dataset(data: Any) -> bool:
    xarray = sys.modules.get("xarray")
    return xarray is not None and isinstance(data, xarray.Dataset)


async def _first(dataset: Any, empty: Target, keep: int | None, kept_names: set[str]) -> Batch:
    """The batch that creates the arrays: their metadata are those that xarray would write for this dataset.

    Chunks have a power of two of rows, so that those of all arrays begin anew after few rows: rows are left out, and
    put before the first, by whole chunks of all arrays.

    Parameters
    ----------
    kept_names
        Variables that exist and stay as they are.
    """
    from xarray.backends import zarr as xarray_zarr
    from xarray.conventions import encode_dataset_coordinates

    if empty.dim not in dataset.dims:
        raise empty._refused(f"the dataset has no dimension {empty.dim!r}; it has {tuple(dataset.dims)}")
    # As Any: half of these have no types.
    backend: Any = xarray_zarr
    variables, attributes = encode_dataset_coordinates(dataset)
    attributes = {str(key): backend.encode_zarr_attr_value(value) for key, value in attributes.items()}
    _require_json(empty, "the dataset", attributes)
    fresh = replace(empty, variables=dict(empty.variables), created=False, group_attributes=attributes)
    batch = Batch(rows=dataset.sizes[empty.dim], values={}, fresh=fresh)
    scratch = MemoryStore()
    for name, given in variables.items():
        if str(name) in kept_names:
            continue
        given = given.copy(deep=False)
        given.encoding = _units_for_any(given)
        try:
            with warnings.catch_warnings():
                # xarray warns of what is refused here.
                warnings.simplefilter("ignore")
                variable = backend.encode_zarr_variable(given, name=name, zarr_format=3)
            require_kept(str(name), np.asarray(given.values), variable)
        except (Unfit, ValueError, TypeError, OverflowError) as error:
            raise empty._refused(f"{name} cannot be stored: {error}") from error
        values = np.asarray(variable.values)
        own = {str(key): backend.encode_zarr_attr_value(v) for key, v in variable.attrs.items() if key != "_FillValue"}
        if variable.attrs.get("_FillValue") is not None:
            own["_FillValue"] = backend.FillValueCoder.encode(variable.attrs["_FillValue"], values.dtype)
        _require_json(empty, str(name), own)
        axis = variable.dims.index(empty.dim) if empty.dim in variable.dims else None
        shape = list(values.shape)
        # As xarray's own backend, chunks and codecs may be given by the variable's encoding.
        wanted = {k: v for k, v in dataset.variables[name].encoding.items() if k in _ENCODINGS and v is not None}
        if len(wanted.get("chunks", ())) != len(shape):
            wanted["chunks"] = [max(n, 1) for n in shape]
            if axis is not None:
                row_bytes = max(values.nbytes // max(values.shape[axis], 1), 1)
                most = _MOST_ROWS if keep is None else max(keep // _CHUNKS_KEPT, 1)
                wanted["chunks"][axis] = _power_of_two(min(_CHUNK_BYTES // row_bytes, most))
        if axis is not None:
            shape[axis] = 0
        try:
            array = await azarr.create_array(
                store=scratch,
                name=str(name),
                shape=tuple(shape),
                **wanted | {"chunks": tuple(wanted["chunks"]) if shape else "auto"},
                dtype=str if values.dtype.kind == "O" else values.dtype,
                dimension_names=[str(d) for d in variable.dims],
                attributes=own,
                zarr_format=3,
            )
        except (ValueError, TypeError) as error:
            raise empty._refused(f"{name} cannot be stored: {error}") from error
        meta = array.metadata
        assert isinstance(meta, ArrayV3Metadata)
        document = meta.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes()
        made = Variable.of(str(name), json_codec.loads(document), empty.dim)
        made.is_new = True
        kept = in_dtype(values, made.dtype)
        if kept is None:
            raise empty._refused(f"{name} cannot be stored: its values are not all of one kind: {values.flat[0]!r}…")
        if axis is None:
            made.values = kept
        else:
            made.tail = np.empty((0, *(n for d, n in enumerate(values.shape) if d != axis)), made.dtype)
            batch.values[str(name)] = np.ascontiguousarray(np.moveaxis(kept, axis, 0))
        fresh.variables[str(name)] = made
    batch.num_bytes = sum(v.nbytes for v in batch.values.values())
    return batch


def _may_cast(given: np.dtype[Any], stored: np.dtype[Any]) -> bool:
    """Whether values of one dtype may be kept in another at all, provided that it has them."""
    return given == stored or (given.kind == "O" and stored.kind in "OT") or np.can_cast(given, stored, "safe")


def _require_json(target: Target, owner: str, attributes: Mapping[str, Any]) -> None:
    for key, value in attributes.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise target._refused(f"attribute {key!r} of {owner} cannot be stored as JSON: {error}") from error


def _units_for_any(variable: Any) -> dict[str, Any]:
    """The encoding of a variable of a first dataset: units that fit the first times might not fit the next."""
    encoding: dict[str, Any] = dict(variable.encoding)
    kind = variable.dtype.kind
    if "units" in encoding or "units" in variable.attrs:
        return encoding
    if kind in "mM":
        unit = _UNIT_NAMES.get(np.datetime_data(variable.dtype)[0], "nanoseconds")
        return encoding | {"units": unit if kind == "m" else f"{unit} since 1970-01-01", "dtype": np.dtype("i8")}
    if kind == "O" and variable.size and type(variable.values.flat[0]).__module__.startswith("cftime"):
        return encoding | {"units": "microseconds since 1970-01-01", "dtype": np.dtype("i8")}
    return encoding
