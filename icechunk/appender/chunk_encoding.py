"""Encoding of rows as arrays store them: values by the CF conventions, then chunks by the array's codecs.

xarray and zarr do this for every array; this module has shorter ways for the common cases, which give the same values:
numbers that need no conversion, times in whole units, and codecs that zarr can run without an event loop. Where zstd
comes last, as by default, a compressor that is kept does it: zarr makes one for every chunk, which takes longer than
compressing 64 KiB.
"""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from zarr.codecs import BytesCodec, ZstdCodec
from zarr.core.array_spec import ArraySpec, parse_array_config
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata import ArrayV3Metadata

from icechunk.runtime.zstd import zstd

__all__ = [
    "Block",
    "ChunkEncoder",
    "EncodedChunk",
    "Unfit",
    "codings_of",
    "encode",
    "in_dtype",
    "require_kept",
    "shown_label",
    "stored_values",
    "unlike_dtype",
    "whole_units",
]

Values = npt.NDArray[Any]

_CODINGS: Final = ("units", "calendar", "scale_factor", "add_offset", "_FillValue", "missing_value")
_NS: Final = np.dtype("M8[ns]")
_NAT: Final = np.iinfo("i8").min
_MOST: Final = np.iinfo("i8").max
_FEW_TIMES: Final = 8
_MIDNIGHT: Final = re.compile(r"[ T]00:00(:00(\.0+)?)?$")
_CALENDARS: Final = ("standard", "gregorian", "proleptic_gregorian")
_NANOSECONDS: Final = {
    "days": 86_400_000_000_000,
    "hours": 3_600_000_000_000,
    "minutes": 60_000_000_000,
    "seconds": 1_000_000_000,
    "milliseconds": 1_000_000,
    "microseconds": 1_000,
    "nanoseconds": 1,
}
# From 1700: earlier dates differ between calendars, or do not fit 64 bits of nanoseconds.
_UNITS: Final = re.compile(
    rf"({'|'.join(_NANOSECONDS)}) since ((?:1[7-9]|2[01])\d\d-\d\d-\d\d)(?:[ T](\d\d:\d\d:\d\d))?"
)


class Unfit(ValueError):
    """Values cannot be kept exactly as the array stores them; the message says why."""


# -- values ------------------------------------------------------------------------------------------------------------


def codings_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of an array that say how its values are kept."""
    return {key: attributes[key] for key in _CODINGS if key in attributes}


def stored_values(name: str, variable: Any, codings: Mapping[str, Any], dtype: np.dtype[Any]) -> Values:
    """The values of an xarray variable as an array of these codings (`codings_of`) and this dtype keeps them.

    Raises
    ------
    Unfit
        The values need other units than the array has.
    """
    kind = variable.dtype.kind
    encoding = dict(codings)
    if kind in "SUTO" and dtype.kind not in "SUTO":
        _require_no_texts(name, variable.values, encoding, dtype)
    if isinstance(encoding.get("_FillValue"), str) and kind in "fiu":
        del encoding["_FillValue"]  # xarray keeps it as base64 where it is the array's own fill value
    if not encoding and kind in "fiucbUS":
        return np.asarray(variable.data)
    if kind == "M" and dtype == np.int64 and encoding.keys() <= {"units", "calendar"}:
        numbers = whole_units(np.asarray(variable.values), encoding)
        if numbers is not None:
            return numbers
    return _by_xarray(name, variable, encoding, dtype)


def _require_no_texts(name: str, values: Any, encoding: Mapping[str, Any], dtype: np.dtype[Any]) -> None:
    """Refuse texts where the array has numbers: numpy would say only how casting failed."""
    texts = [value for value in np.asarray(values).flat if isinstance(value, str | bytes)][:1]
    if texts and "units" in encoding:
        raise Unfit(
            f"{name} has texts, as {str(texts[0])!r:.40}, the array times in {encoding['units']!r}: convert them, for "
            "example with astype('datetime64[ns]')"
        )
    if texts:
        raise Unfit(f"{name} {unlike_dtype(np.asarray(values), dtype)}")


def unlike_dtype(given: Values, stored: np.dtype[Any]) -> str:
    """The words of a message on values that an array of another dtype cannot hold, and on what to do."""
    if (given.dtype.kind in "SUTO") != (stored.kind in "SUTO"):
        kinds = "texts or objects" if given.dtype.kind in "SUTO" else "values"
        shown = f", as {str(given.flat[0])!r:.40}" if given.size else ""
        return f"has {kinds} of dtype {given.dtype}{shown}, the array has dtype {stored}: convert them"
    return (
        f"is of dtype {given.dtype}, the array of {stored}, which lacks some values of that: cast them with "
        f"astype({str(stored)!r}) if the nearest ones will do"
    )


def shown_label(label: Any, codings: Mapping[str, Any]) -> str:
    """A label in a message: a time where the array has numbers of units since one."""
    known = _epoch(str(codings.get("units")), str(codings.get("calendar", "standard")))
    plain = label.item() if isinstance(label, np.generic) and label.dtype.kind not in "mM" else label
    if known is None or not isinstance(plain, int):
        return repr(plain) if not isinstance(label, np.datetime64 | np.timedelta64) else str(label)
    since, _, unit_ns = known
    try:
        return str(np.datetime_as_string(since + np.timedelta64(plain * unit_ns, "ns"), unit="auto"))
    except (OverflowError, ValueError):
        return repr(plain)


def whole_units(times: Values, encoding: Mapping[str, Any]) -> Values | None:
    """Times as whole numbers of their units; None where it is not as simple as that."""
    known = _epoch(str(encoding.get("units")), str(encoding.get("calendar", "standard")))
    if known is None:
        return None
    since, since_ns, unit_ns = known
    exact = times if times.dtype == _NS else in_dtype(times, _NS)
    if exact is None:
        return None
    if exact.size <= _FEW_TIMES:
        return _exact_units(exact, since_ns, unit_ns)
    is_absent = np.isnat(exact)
    any_absent = bool(is_absent.any())
    # As integers, which wrap around: since numpy 2.5 times raise an error then.
    with np.errstate(over="ignore"):
        passed_ns = np.asarray(exact.view(np.int64) - since_ns)
    if any_absent:
        passed_ns[is_absent] = 0
    if not np.array_equal(passed_ns < 0, exact < since):
        # More than 292 years: nanoseconds do not fit, these units may.
        return _exact_units(exact, since_ns, unit_ns)
    numbers, rest = np.divmod(passed_ns, unit_ns)
    if rest.any():
        return None
    if any_absent:
        numbers[is_absent] = _NAT
    return np.asarray(numbers)


def _exact_units(times: Values, since_ns: int, unit_ns: int) -> Values | None:
    """As `whole_units`, of nanoseconds, with integers of any size. For few times it takes less time than numpy."""
    numbers = []
    for time_ns in times.ravel().view(np.int64).tolist():
        number, rest = divmod(time_ns - since_ns, unit_ns)
        if time_ns == _NAT:
            number = _NAT
        elif rest or abs(number) > _MOST:
            return None
        numbers.append(number)
    return np.array(numbers, np.int64).reshape(times.shape)


def in_dtype(values: Values, dtype: np.dtype[Any]) -> Values | None:
    """The same values in another dtype, as a copy; None where not all of them exist in it."""
    if values.dtype == dtype:
        return values.copy()
    if (values.dtype.kind in "SUOT") != (dtype.kind in "SUOT"):
        return None
    if values.dtype.kind == "O" and not all(isinstance(value, str) for value in values.flat):
        return None
    with np.errstate(all="ignore"):
        try:
            found = values.astype(dtype)
            same = np.array_equal(found.astype(values.dtype), values, equal_nan=values.dtype.kind in "fcmM")
        except (ValueError, TypeError, OverflowError):
            return None
    return found if same else None


@lru_cache(maxsize=256)
def _epoch(units: str, calendar: str) -> tuple[np.datetime64, int, int] | None:
    """The beginning of times of these units, also in nanoseconds, and the nanoseconds of one unit; None where it is not
    as simple as that."""
    found = _UNITS.fullmatch(units)
    if found is None or calendar not in _CALENDARS:
        return None
    unit, day, time = found.groups()
    try:
        since = np.datetime64(f"{day}T{time or '00:00:00'}", "ns")
        return since, int(since.astype(np.int64)), _NANOSECONDS[unit]
    except ValueError:
        return None


def _by_xarray(name: str, variable: Any, encoding: dict[str, Any], dtype: np.dtype[Any]) -> Values:
    from xarray import Variable
    from xarray.conventions import encode_cf_variable

    values = np.asarray(variable.values)
    kind = values.dtype.kind
    if (kind in "mMO" and "units" in encoding) or (kind in "mM" and dtype.kind != kind):
        encoding["dtype"] = dtype
        if kind in "mM":
            # xarray encodes times of a coarser dtype in finer units as absent ones.
            finest = in_dtype(values, np.dtype(f"{kind}8[ns]"))
            values = values if finest is None else finest
    elif encoding:
        encoding["dtype"] = dtype
    cleaned = Variable(variable.dims, values, {}, encoding)
    with warnings.catch_warnings():
        # xarray warns, and takes other units, where it cannot keep a value in these: that is refused below.
        warnings.simplefilter("ignore")
        try:
            encoded = encode_cf_variable(cleaned, name=name)
        except (KeyError, OverflowError, ValueError, TypeError) as error:
            if "units" not in encoding:
                raise Unfit(f"{name} {unlike_dtype(values, dtype)}") from error
            # xarray looks for units that would fit, and knows none.
            raise Unfit(
                f"values of {name} cannot be kept as {dtype} in {encoding.get('units')!r}, as stored: {error}"
            ) from error
    if _plain_units(encoded.attrs.get("units")) != _plain_units(encoding.get("units")):
        raise Unfit(
            f"values of {name} cannot be kept exactly as {dtype} in {encoding.get('units')!r}, as stored; "
            f"they would need {encoded.attrs.get('units')!r}"
        )
    require_kept(name, values, encoded)
    return np.asarray(encoded.values)


def require_kept(name: str, values: Values, encoded: Any) -> None:
    """Refuse values that cannot be read back: times that changed, numbers beyond the range of integers.

    Parameters
    ----------
    encoded
        The xarray variable that keeps them, with its attributes.

    Raises
    ------
    Unfit
        A value would be another one, or absent.
    """
    stored = np.asarray(encoded.values)
    if stored.dtype.kind not in "iu":
        if values.dtype.kind in "mM" and not np.array_equal(np.isnat(values), stored != stored):
            raise Unfit(f"times of {name} cannot be kept as {stored.dtype}")
        return
    if values.dtype.kind in "mM":
        from xarray.conventions import decode_cf_variable

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                decoded = np.asarray(decode_cf_variable(name, encoded).values)
            except (ValueError, OverflowError) as error:
                # Of most calendars, xarray cannot read times of which one is absent.
                raise Unfit(f"times of {name} could not be read back: {error}") from error
        if decoded.dtype.kind == values.dtype.kind:
            back = in_dtype(decoded, values.dtype)
            if back is None or not np.array_equal(back, values, equal_nan=True):
                raise Unfit(f"times of {name} cannot be kept exactly as {stored.dtype} in {encoded.attrs['units']!r}")
        elif not np.array_equal(np.isnat(values), stored == _NAT):
            raise Unfit(f"times of {name} cannot be kept as {stored.dtype} in {encoded.attrs.get('units')!r}")
    elif values.dtype.kind in "fiu":
        scale = float(encoded.attrs.get("scale_factor", 1))
        back = stored * scale + float(encoded.attrs.get("add_offset", 0))
        is_absent = np.zeros(stored.shape, bool)
        for absent in ("_FillValue", "missing_value"):
            if absent in encoded.attrs:
                is_absent |= stored == encoded.attrs[absent]
        wanted = values.astype("f8")
        with np.errstate(all="ignore"):
            is_near = np.abs(back - wanted) <= 0.5 * abs(scale) * (1 + 1e-6) + 1e-6 * np.abs(wanted)
        is_lost = ~((is_near & np.isfinite(wanted)) | (is_absent & np.isnan(wanted)))
        if is_lost.any():
            raise Unfit(
                f"values of {name} cannot be kept as {stored.dtype} with the scale and offset that are stored: they "
                f"are beyond its range, or absent (NaN) where it has no _FillValue: {wanted[is_lost][:3]}"
            )


def _plain_units(units: Any) -> Any:
    """Units in one of the ways in which xarray writes them: midnight may be left out."""
    return _MIDNIGHT.sub("", units) if isinstance(units, str) else units


# -- chunks ------------------------------------------------------------------------------------------------------------


class ChunkEncoder:
    """Runs the codecs of an array over whole chunks, in the thread that calls it."""

    __slots__ = ("_codecs", "_ends", "_fill_value", "_is_plain", "_shape", "_skips_empty", "_spec", "_zstd", "is_fast")

    def __init__(self, spec: ArraySpec, codecs: Sequence[tuple[Any, ArraySpec]]) -> None:
        self._spec, self._codecs = spec, codecs
        self._shape, self._fill_value = spec.shape, spec.fill_value
        self._ends = (0,) * len(spec.shape), (-1,) * len(spec.shape)
        self._skips_empty: bool = not spec.config.write_empty_chunks
        self._zstd: _Zstd | None = None
        if codecs and type(codecs[-1][0]) is ZstdCodec and codecs[-1][0].level <= _FAST_LEVEL:
            self._zstd = _Zstd.of(codecs[-1][0])
            self._codecs = codecs[:-1]
        self.is_fast: bool = all(isinstance(codec, BytesCodec) for codec, _ in self._codecs)
        """Whether it takes about a millisecond for a MiB."""
        self._is_plain = len(self._codecs) == 1 and _changes_nothing(*self._codecs[0])

    @classmethod
    def of(cls, meta: ArrayV3Metadata) -> ChunkEncoder | None:
        """The encoder for an array; None where its data type or one of its codecs needs zarr's own, asynchronous
        way."""
        if meta.dtype.to_native_dtype().kind not in "biufcmM" or not hasattr(meta.chunk_grid, "chunk_shape"):
            return None
        spec = chunk_spec = ArraySpec(
            shape=tuple(meta.chunk_grid.chunk_shape),
            dtype=meta.dtype,
            fill_value=meta.fill_value,
            config=parse_array_config(None),
            prototype=default_buffer_prototype(),
        )
        codecs = []
        for codec in meta.codecs:
            evolved = codec.evolve_from_array_spec(spec)
            # zarr has it since 3.1 for codecs that compute only; sharding says whether its inner codecs are such.
            if not hasattr(evolved, "_encode_sync") or not getattr(evolved, "_sync_capable", True):
                return None
            codecs.append((evolved, spec))
            spec = evolved.resolve_metadata(spec)
        return cls(chunk_spec, codecs)

    def _parts(self, block: Values, first: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Values]]:
        """Coordinates and values of the chunks that a block fills; those at an end may have fewer values."""
        if block.shape == self._shape:
            yield first, block
            return
        counts = [-(-size // chunk) for size, chunk in zip(block.shape, self._shape, strict=True)]
        for steps in itertools.product(*map(range, counts)):
            part = block[tuple(slice(s * c, (s + 1) * c) for s, c in zip(steps, self._shape, strict=True))]
            yield tuple(f + s for f, s in zip(first, steps, strict=True)), part

    def _uncompressed(self, part: Values) -> memoryview | None:
        """A chunk encoded but for zstd, if that comes last; None for one of fill values."""
        spec, fill_value, (first, last) = self._spec, self._fill_value, self._ends
        # Most chunks with other values have one at an end.
        may_be_empty = (
            self._skips_empty
            and _equals_or_is_nan(part[first], fill_value)
            and _equals_or_is_nan(part[last], fill_value)
        )
        if part.shape != self._shape:
            padded = np.full(self._shape, fill_value, part.dtype)
            padded[tuple(map(slice, part.shape))] = part
            part = padded
        chunk = np.ascontiguousarray(part)
        if may_be_empty and spec.prototype.nd_buffer.from_numpy_array(chunk).all_equal(fill_value):
            return None
        if not self._is_plain:
            encoded: Any = spec.prototype.nd_buffer.from_numpy_array(chunk)
            for codec, its_spec in self._codecs:
                encoded = codec._encode_sync(encoded, its_spec)
                if encoded is None:
                    return None
            chunk = np.ascontiguousarray(encoded.as_numpy_array())
        return chunk.reshape(-1).view(np.uint8).data


class Block(NamedTuple):
    """Values of an array to encode; every chunk that they touch they fill up to the array's end."""

    name: str
    """The array's."""
    encoder: ChunkEncoder
    values: Values
    first: tuple[int, ...]
    """Coordinates of the chunk in which the values begin."""


class EncodedChunk(NamedTuple):
    """A chunk of an array."""

    name: str
    """The array's."""
    coords: tuple[int, ...]
    data: memoryview | None
    """Its bytes, which may share memory with those of others; None for a chunk of fill values, which is not stored."""


def encode(blocks: Iterable[Block]) -> Iterator[EncodedChunk]:
    """The chunks that blocks fill, in their order.

    Chunks are compressed some at a time: then threads do not wait for each other between any two of them.
    """
    together: list[EncodedChunk] = []
    size, last = 0, None
    for name, encoder, values, first in blocks:
        if encoder._zstd is not last:
            yield from _compressed(together, last)
            together, size, last = [], 0, encoder._zstd
        for coords, part in encoder._parts(values, first):
            if size >= _TOGETHER_BYTES:
                yield from _compressed(together, last)
                together, size = [], 0
            chunk = EncodedChunk(name, coords, encoder._uncompressed(part))
            size += 0 if chunk.data is None else len(chunk.data)
            together.append(chunk)
    yield from _compressed(together, last)


def _compressed(chunks: Sequence[EncodedChunk], last: _Zstd | None) -> Iterable[EncodedChunk]:
    full = [chunk.data for chunk in chunks if chunk.data is not None]
    if last is None or not full:
        return chunks
    frames = iter(last.encode(full))
    return [
        EncodedChunk(name, coords, None if data is None else memoryview(next(frames))) for name, coords, data in chunks
    ]


_TOGETHER_BYTES: Final = 1024 * 1024
"""Bytes of chunks that are compressed in one call, about."""
_LARGE_BYTES: Final = 4096
_MANY: Final = 8
"""Least size of chunks, and their least number, for one call: with smaller or fewer ones it takes longer."""
_FAST_LEVEL: Final = 3
"""Level of zstd up to which a compressor takes little memory."""


class _Zstd(NamedTuple):
    """zstd with these parameters, whose frames have the size of their content, as zarr's."""

    level: int
    """As zstd has it: 0 is its default, 3."""
    checksum: bool
    free: list[zstd.ZstdCompressor]
    """Compressors that are not in use; while one is in use, no other thread finds it."""

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, codec: ZstdCodec) -> _Zstd:
        return cls(codec.level, codec.checksum, [])

    def encode(self, chunks: Sequence[memoryview]) -> Sequence[Any]:
        """A frame of each chunk, which has a buffer and a length."""
        try:
            compressor = self.free.pop()
        except IndexError:
            compressor = zstd.ZstdCompressor(level=self.level, write_checksum=self.checksum)
        many = len(chunks) >= _MANY and len(chunks[0]) >= _LARGE_BYTES
        if many and hasattr(compressor, "multi_compress_to_buffer"):
            # Only implementations in C have it; each call makes a compressor anew.
            made = compressor.multi_compress_to_buffer([*chunks], threads=1)
            frames: Sequence[Any] = [made[i] for i in range(len(made))]
        else:
            frames = [compressor.compress(chunk) for chunk in chunks]
        self.free.append(compressor)
        return frames


def _changes_nothing(codec: Any, spec: ArraySpec) -> bool:
    """Whether encoded values are the bytes of an array in memory."""
    dtype = spec.dtype.to_native_dtype()
    if type(codec) is not BytesCodec or dtype.hasobject:
        return False
    order = {"<": "little", ">": "big", "=": sys.byteorder}.get(dtype.byteorder)
    # An enumeration in some versions of zarr, its text in others.
    return dtype.itemsize == 1 or getattr(codec.endian, "value", codec.endian) == order


def _equals_or_is_nan(value: Any, fill_value: Any) -> bool:
    return bool(value == fill_value or value != value)
