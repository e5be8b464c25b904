"""Vectors of FlatBuffers tables: fields of all tables as numpy columns, or tables that are read on request.

The rules are those of `icechunk.format.flat.flatbuffers`: every position is checked before it is read. Nothing here
loops over rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from icechunk.format.flat.flatbuffers import Buffer, Payload, Table

__all__ = [
    "Column",
    "JoinedBuffer",
    "LazyTables",
    "Positions",
    "Spans",
    "TableColumns",
    "TextTraits",
    "Vectors",
    "all_of",
    "any_of",
    "copy_spans",
    "extremes",
    "first_rows",
    "gather",
    "is_ascending",
    "joined",
    "lexicographic_order",
    "put",
    "read_coords",
    "regular_vectors",
    "targets",
    "text_traits",
]

Positions = npt.NDArray[np.int64]
_NO_POSITIONS: Final[Positions] = np.empty(0, np.int64)
_FIRST: Final[Positions] = np.zeros(1, np.int64)

_MAX_NDIM: Final = 1024
_WORD: Final = 8
_WORD_BITS: Final = 3
_FIELD_OFFSETS: Final = 4
"""Position of the field offsets in a vtable, after its own size and the table's; bytes."""
_USUAL_FIELDS: Final = 32
"""Number of fields of a vtable; reading many with more could take long."""
_FEW_VTABLES: Final = 64
_VTABLES_SHARE: Final = 16
"""Number of vtables, or share of the tables as its reciprocal, up to which vtables are compared one by one."""
_FEW: Final = 64
"""Up to so many items, a list of them is looked through in less time than numpy takes to begin."""


def extremes(numbers: Positions) -> tuple[int, int]:
    """The least and the greatest of at least one number."""
    if len(numbers) <= _FEW:
        few: list[int] = numbers.tolist()
        return min(few), max(few)
    return int(numbers.min()), int(numbers.max())


def any_of(mask: npt.NDArray[np.bool_]) -> bool:
    """Whether an item is true; as ``mask.any()``."""
    return True in mask.tolist() if len(mask) <= _FEW else bool(mask.any())


def all_of(mask: npt.NDArray[np.bool_]) -> bool:
    """Whether all items are true; as ``mask.all()``."""
    return False not in mask.tolist() if len(mask) <= _FEW else bool(mask.all())


def gather(buffer: Buffer, positions: Positions, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The values of ``dtype`` at ``positions``, which need not be aligned.

    Raises
    ------
    FormatError
        If a value is not within the buffer.
    """
    kind = np.dtype(dtype)
    if not len(positions) or not kind.itemsize:
        return np.zeros(len(positions), kind)
    last = buffer.size - kind.itemsize
    lowest, highest = extremes(positions)
    if lowest < 0 or highest > last:
        raise buffer.fail(f"offsets lead to {lowest} to {highest}, outside its {buffer.size} bytes")
    size = kind.itemsize
    if size <= _WIDEST_NUMBER and len(positions) > _FEW and not int(np.bitwise_or.reduce(positions)) % size:
        # Fields of most writers are aligned: numbers are taken in a third of the time.
        numbers = np.frombuffer(buffer.data, kind, buffer.size // size)
        if numbers.flags.aligned:
            return numbers.take(positions if size == 1 else positions >> (size // 2))
    everywhere: npt.NDArray[Any] = np.ndarray((last + 1,), kind, buffer.data, strides=(1,))
    return everywhere[positions]


_WIDEST_NUMBER: Final = 4
"""Bytes; positions of wider fields are often not multiples of their size."""


_JOINED_BYTES: Final = 8 * 1024 * 1024


def joined(payloads: Sequence[Payload], name: str) -> Iterator[tuple[slice, JoinedBuffer]]:
    """Consecutive payloads together, in buffers that fit into a processor's cache; the slice selects them."""
    first, size = 0, 0
    for i, payload in enumerate(payloads):
        if size and size + len(payload) > _JOINED_BYTES:
            yield slice(first, i), JoinedBuffer(payloads[first:i], name)
            first, size = i, 0
        size += len(payload)
    if payloads:
        yield slice(first, len(payloads)), JoinedBuffer(payloads[first:], name)


class JoinedBuffer(Buffer):
    """Several payloads one after another, for reading the same fields of all of them at once.

    Parameters
    ----------
    payloads
        At least one.
    """

    __slots__ = ("_payloads", "_starts")

    def __init__(self, payloads: Sequence[Payload], name: str) -> None:
        padded = [part for payload in payloads for part in (payload, bytes(-len(payload) % _WORD))]
        super().__init__(payloads[0] if len(payloads) == 1 else b"".join(padded), name)
        sizes = np.fromiter(map(len, payloads), np.int64, len(payloads))
        sizes += -sizes % _WORD
        self._starts: Positions = np.cumsum(sizes) - sizes
        # With one payload there is nothing to tell apart.
        words = sizes // _WORD if len(payloads) > 1 else np.zeros_like(sizes)
        # The smallest type, so that the numbers of all words stay in a processor's cache.
        self._payloads = np.repeat(np.arange(len(payloads), dtype=np.min_scalar_type(len(payloads))), words)

    @property
    def roots(self) -> Positions:
        """Position of the root table of each payload. Raises `FormatError` if one is outside its payload."""
        return targets(self, self._starts)

    def files_of(self, positions: Positions) -> npt.NDArray[np.unsignedinteger[Any]] | None:
        """The number of the payload that each position is in; None: there is only one payload."""
        if len(self._starts) == 1:
            return None
        # Payloads begin at whole words. Positions outside the buffer are found when their bytes are read.
        return self._payloads.take(positions >> _WORD_BITS, mode="clip")

    def require_files(self, targets: Positions, files: npt.NDArray[np.unsignedinteger[Any]] | None) -> None:
        """Check that targets are in the payloads of the positions that lead to them. Raises `FormatError`."""
        if files is not None and any_of(files != self.files_of(targets)):
            raise self.fail("an offset leads out of its file")


def targets(buffer: Buffer, fields: Positions) -> Positions:
    """Positions that these offset fields point to.

    Raises
    ------
    FormatError
        If a field is not within the buffer, or leads into another one of several files.
    """
    found: Positions = fields + gather(buffer, fields, "<u4")
    buffer.require_files(found, buffer.files_of(fields))
    return found


class Column(NamedTuple):
    """An inline field of many tables, for the tables that have it."""

    rows: npt.NDArray[np.intp] | None
    """Numbers of the tables that have it; None when all do."""
    positions: Positions
    """Position of the field in each of those tables."""


class Spans(NamedTuple):
    """Ranges of bytes."""

    starts: Positions
    sizes: Positions


class Vectors(NamedTuple):
    """The vectors or strings that an offset field of many tables points to."""

    rows: npt.NDArray[np.intp] | None
    """Numbers of the tables that have it; None when all do."""
    starts: Positions
    """Position of the first item of each."""
    counts: Positions
    """Number of items of each."""


class TableColumns:
    """The tables at ``positions``, whose vtables may differ.

    Raises
    ------
    FormatError
        If a table or its vtable is not within the buffer.
    """

    __slots__ = (
        "_buffer",
        "_files",
        "_layout_of",
        "_layouts",
        "_positions",
        "_table_sizes",
        "_vectors",
        "_vtable_sizes",
        "_vtables",
    )

    def __init__(self, buffer: Buffer, positions: Positions) -> None:
        self._buffer = buffer
        self._positions = positions
        self._vectors: dict[tuple[int, int], Vectors] = {}
        """Vectors that were read, by slot and size of an item."""
        self._layouts: Sequence[tuple[int, ...]] | None = None
        """The distinct vtables of the tables, of which files of one writer and kind have few; None: there may be many,
        and each table's own vtable is looked up."""
        self._layout_of: npt.NDArray[np.intp] | None = None
        """Number of each table's vtable among them; None where all have the first."""
        vtables: Positions = positions - gather(buffer, positions, "<i4")
        self._vtables: Positions = vtables
        """Position of each distinct vtable, if they are few, else of the vtable of each table."""
        if not len(vtables):
            self._layouts = [(0,)]
            self._vtable_sizes = self._table_sizes = _NO_POSITIONS
            return
        self._files = buffer.files_of(positions)
        buffer.require_files(vtables, self._files)
        if not self._find_layouts(vtables):
            head = gather(buffer, vtables, "<u4")
            self._vtable_sizes = (head & 0xFFFF).astype(np.int64)
            self._table_sizes = (head >> 16).astype(np.int64)
            if (
                extremes(self._vtable_sizes)[0] < _FIELD_OFFSETS
                or any_of((self._vtable_sizes & 1) != 0)
                or extremes(vtables + self._vtable_sizes)[1] > buffer.size
            ):
                raise buffer.fail("a vtable ends past its end, or has an odd size")
        if extremes(positions + self._table_sizes)[1] > buffer.size:
            raise buffer.fail("a table ends past its end")
        buffer.require_files(positions + np.maximum(self._table_sizes - 1, 0), self._files)
        buffer.require_files(self._vtables + self._vtable_sizes - 1, buffer.files_of(self._vtables))

    def _find_layouts(self, vtables: Positions) -> bool:
        """Find the distinct vtables among those at these positions; False if they may be so many that this takes long.

        Raises
        ------
        FormatError
            If one of them is not within the buffer.
        """
        buffer = self._buffer
        # Tables of one file usually share their vtable, and those of one file follow one another.
        first, last = extremes(vtables)
        begins = _FIRST if first == last else np.flatnonzero(np.append(True, vtables[1:] != vtables[:-1]))
        if len(begins) > max(_FEW_VTABLES, len(vtables) // _VTABLES_SHARE):
            return False
        firsts = vtables[begins].tolist()
        places = sorted(set(firsts))
        found = [buffer.vtable(place) for place in places]
        if any(len(layout) > _USUAL_FIELDS for layout in found):
            return False
        self._vtables = np.array(places, np.int64)
        self._vtable_sizes = np.array([2 * len(layout) + 2 for layout in found], np.int64)
        numbers = {layout: number for number, layout in enumerate(dict.fromkeys(found))}
        self._layouts = list(numbers)
        sizes = [layout[0] for layout in self._layouts]
        if len(numbers) == 1:
            self._table_sizes = np.array(sizes, np.int64)
        else:
            number_at = {place: numbers[layout] for place, layout in zip(places, found, strict=True)}
            own = np.array([number_at[first] for first in firsts])
            self._layout_of = np.repeat(own, np.diff(np.append(begins, len(vtables))))
            self._table_sizes = np.array(sizes, np.int64)[self._layout_of]
        return True

    def __len__(self) -> int:
        return len(self._positions)

    def require_ids(self, slot: int, ids: Sequence[bytes]) -> None:
        """Require that the tables hold these ids, of one size, at ``slot``.

        Raises
        ------
        FormatError
            If one of them holds another, or none.
        """
        buffer, size = self._buffer, len(ids[0]) if ids else 0
        column = self.column(slot, size)
        if column is None or column.rows is not None:
            raise buffer.fail("one of them has no id")
        if gather(buffer, column.positions, f"V{size}").tobytes() != b"".join(ids):
            raise buffer.fail("one of them has another id")

    def column(self, slot: int, size: int) -> Column | None:
        """Positions of the field of ``size`` bytes at ``slot``; None when no table has it.

        Raises
        ------
        FormatError
            If it is not within its table.
        """
        buffer = self._buffer
        if self._layouts is not None:
            few = [layout[slot + 1] if slot + 1 < len(layout) else 0 for layout in self._layouts]
            if any(at and not 4 <= at <= layout[0] - size for at, layout in zip(few, self._layouts, strict=True)):
                raise buffer.fail(f"field {slot} of a table is outside it")
            if not any(few):
                return None
            if self._layout_of is None or few.count(few[0]) == len(few):
                return Column(None, self._positions + few[0])
            return self._present(np.array(few, np.int64)[self._layout_of])
        at = _FIELD_OFFSETS + 2 * slot
        known = self._vtable_sizes >= at + 2
        if not any_of(known):
            return None
        if all_of(known):
            offsets = gather(buffer, self._vtables + at, "<u2").astype(np.int64)
        else:
            offsets = np.zeros(len(known), np.int64)
            offsets[known] = gather(buffer, self._vtables[known] + at, "<u2")
        present = offsets != 0
        if not any_of(present):
            return None
        ends = offsets + size
        if any_of((present & (offsets < 4)) | (present & (ends > self._table_sizes))):
            raise buffer.fail(f"field {slot} of a table is outside it")
        return self._present(offsets)

    def _present(self, offsets: Positions) -> Column:
        """The field at these offsets from the tables, 0 where a table does not have it."""
        present = offsets != 0
        if all_of(present):
            return Column(None, self._positions + offsets)
        rows = np.flatnonzero(present)
        return Column(rows, self._positions[rows] + offsets[rows])

    def spans(self) -> tuple[Spans, Spans]:
        """The bytes of the tables, and of their vtables."""
        sizes = np.broadcast_to(self._table_sizes, len(self._positions))
        return Spans(self._positions, sizes), Spans(self._vtables, self._vtable_sizes)

    def has_field_from(self, slot: int) -> bool:
        """Whether a vtable has room for a field at ``slot`` or a later one."""
        return any_of(self._vtable_sizes > _FIELD_OFFSETS + 2 * slot)

    def numbers(self, slot: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A column of numbers or structs, zero where absent; errors as `column`."""
        kind = np.dtype(dtype)
        column = self.column(slot, kind.itemsize)
        if column is None:
            return np.zeros(len(self), kind)
        values = gather(self._buffer, column.positions, kind)
        if column.rows is None:
            return values
        full = np.zeros(len(self), kind)
        full[column.rows] = values
        return full

    def vectors(self, slot: int, item_size: int) -> Vectors | None:
        """The vectors, with items of that many bytes, that the offset field at ``slot`` points to; None when no table
        has it.

        Raises
        ------
        FormatError
            If the field is not within its table or a vector not within the buffer.
        """
        known = self._vectors.get((slot, item_size))
        if known is not None:
            return known
        column = self.column(slot, 4)
        if column is None:
            return None
        buffer = self._buffer
        heads: Positions = column.positions + gather(buffer, column.positions, "<u4")
        counts = gather(buffer, heads, "<u4").astype(np.int64)
        starts = heads + 4
        ends = starts + counts * item_size
        if extremes(ends)[1] > buffer.size:
            raise buffer.fail(f"the target of field {slot} of a table ends past its end")
        # An offset is not negative, so a vector begins between its table and its own end.
        files = self._files if self._files is None or column.rows is None else self._files[column.rows]
        buffer.require_files(ends - 1, files)
        found = self._vectors[slot, item_size] = Vectors(column.rows, starts, counts)
        return found


_HIGH_BITS: Final = np.uint64(0x8080808080808080)
_FIRST_BYTES: Final = np.array([2**64 - 2 ** (64 - 8 * i) for i in range(_WORD + 1)], np.uint64)
"""Masks of a word's first 0 to 8 bytes."""
_SEARCHES: Final = 16
"""A search for a number takes about as long as writing so many."""


def _words(buffer: Buffer, texts: Vectors) -> Iterator[tuple[npt.NDArray[np.intp] | None, npt.NDArray[np.uint64]]]:
    """The bytes of many vectors of bytes, 8 at a time, as numbers that compare as they do: first those at 0 to 7, then
    those at 8 to 15, and so on.

    Yields
    ------
    rows : intp[k] or None
        The vectors that have bytes there; None: all of them.
    words : uint64[k]
        Of each; bytes after its end are zero.
    """
    rows: npt.NDArray[np.intp] | None = None
    starts, counts = texts.starts, texts.counts
    last = max(buffer.size - _WORD, 0)
    at = 0
    while len(starts):
        places = starts + at
        inside = places if int(places.max()) <= last else np.minimum(places, last)
        words = gather(buffer, inside, ">u8").astype(np.uint64)
        if inside is not places:
            # Near the end of the buffer the word begins too early, and its first bytes have to go.
            words <<= (_WORD * (places - inside)).astype(np.uint64)
        left = counts - at
        if int(left.min()) < _WORD:
            words &= _FIRST_BYTES[np.minimum(left, _WORD)]
        yield rows, words
        at += _WORD
        longer = np.flatnonzero(left > _WORD)
        if len(longer) < len(starts):
            rows = longer if rows is None else rows[longer]
            starts, counts = starts[longer], counts[longer]


_SHORT: Final = 64
"""Texts of so many bytes are compared whole."""


class TextTraits(NamedTuple):
    """Properties of many texts."""

    is_ascending: bool
    """Whether they are strictly ascending."""
    is_ascii: bool
    """Whether all of them are ASCII."""


def text_traits(buffer: Buffer, texts: Vectors) -> TextTraits:
    """Properties of vectors of bytes, which are within the buffer and at most a few thousand bytes long."""
    count = len(texts.starts)
    size = _WORD * -(-extremes(texts.counts)[1] // _WORD) if count else 0
    if 0 < size <= _SHORT and extremes(texts.starts)[1] + size <= buffer.size:
        return _short_text_traits(buffer, texts, size)
    undecided = np.arange(max(count - 1, 0))
    """Numbers of the vectors that begin with all that was read so far of the next vector."""
    is_ascii = is_ascending = True
    for rows, words in _words(buffer, texts):
        is_ascii = is_ascii and not any_of(words & _HIGH_BITS != 0)
        if is_ascending and len(undecided):
            everywhere = _everywhere(rows, words, count) if len(undecided) * _SEARCHES > count else None
            if everywhere is None:
                before, after = _at(rows, words, undecided), _at(rows, words, undecided + 1)
            elif len(undecided) == count - 1:
                before, after = everywhere[:-1], everywhere[1:]
            else:
                before, after = everywhere[undecided], everywhere[undecided + 1]
            is_ascending = not any_of(before > after)
            undecided = undecided[before == after]
    # The texts that are left are equal but for zero bytes at the end.
    is_ascending = is_ascending and bool((texts.counts[undecided] < texts.counts[undecided + 1]).all())
    return TextTraits(is_ascending, is_ascii)


def _short_text_traits(buffer: Buffer, texts: Vectors, size: int) -> TextTraits:
    """As `text_traits`, for texts of at most ``size`` bytes: whole words, which are in the buffer for each text."""
    padded = gather(buffer, texts.starts, f"V{size}").view(np.uint8).reshape(-1, size)
    padded *= np.arange(size, dtype=np.uint8) < texts.counts.astype(np.uint8)[:, np.newaxis]
    words = padded.view(">u8").astype(np.uint64)
    # Whether all that was read so far of each text is that of the next one.
    equal = np.ones(len(words) - 1, np.bool_)
    is_ascending = True
    for before, after in zip(words[:-1].T, words[1:].T, strict=True):
        is_ascending = is_ascending and not any_of(equal & (before > after))
        equal &= before == after
    # The texts that are left are equal but for zero bytes at the end.
    rows = np.flatnonzero(equal)
    is_ascending = is_ascending and all_of(texts.counts[rows] < texts.counts[rows + 1])
    return TextTraits(is_ascending, padded.tobytes().isascii())


def _everywhere(rows: npt.NDArray[np.intp] | None, words: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.uint64]:
    """The words of ``count`` vectors, 0 for those that have none."""
    if rows is None:
        return words
    everywhere = np.zeros(count, np.uint64)
    everywhere[rows] = words
    return everywhere


def _at(
    rows: npt.NDArray[np.intp] | None, words: npt.NDArray[np.uint64], wanted: npt.NDArray[np.intp]
) -> npt.NDArray[np.uint64]:
    """The words of these few vectors, 0 for those that have none."""
    if rows is None:
        return words[wanted]
    at = np.minimum(np.searchsorted(rows, wanted), len(rows) - 1)
    return np.where(rows[at] == wanted, words[at], np.uint64(0))


def read_coords(buffer: Buffer, starts: Positions, ndim: int) -> npt.NDArray[np.uint32]:
    """Chunk coordinates, uint32[n, ndim], from vectors of ``ndim`` items that begin at ``starts``.

    Raises
    ------
    FormatError
        If there are more than 1024 dimensions, or the vectors are not within the buffer.
    """
    if ndim > _MAX_NDIM:
        raise buffer.fail(f"a chunk has {ndim} coordinates")
    buffer.charge(4 * ndim * len(starts))
    if not ndim:
        return np.empty((len(starts), 0), np.uint32)
    rows = gather(buffer, starts, f"V{4 * ndim}").view("<u4").reshape(len(starts), ndim)
    return rows.astype(np.uint32, copy=False)


_LEAST_RUN: Final = 1024
"""Tables at equal distances that are worth reading together, on average."""
_FEW_RUNS: Final = 16
_BLOCK: Final = 65536
"""Tables whose positions fit into a processor's cache."""


def regular_vectors(buffer: Buffer, start: int, count: int, slot: int, size: int) -> npt.NDArray[np.uint32] | None:
    """The numbers of 4 bytes in the vector field at ``slot`` of many tables that lie at equal distances.

    Writers lay tables of one kind out so. Their fields are columns with a stride, which are read in a fraction of the
    time that a look-up of each position takes.

    Parameters
    ----------
    start
        Position of the offset to the first of the tables; those to the others follow it.
    count
        Number of tables, at least 1.
    size
        Number of items of each vector.

    Returns
    -------
    uint32[count, size] or None
        The vectors, in any order. None: the tables lie otherwise, or something in them is not as it must be.
    """
    if not 0 < size <= _MAX_NDIM or not 0 <= start <= buffer.size - 4 * count:
        return None
    found = np.empty((count, size), "<u4")
    for first in range(0, count, _BLOCK):
        part = found[first : first + _BLOCK]
        at = start + 4 * first
        # Positions of the tables less those of the offsets to them, which are 4 bytes apart.
        tables: npt.NDArray[Any] = np.frombuffer(buffer.data, "<u4", len(part), at)
        apart = 4
        runs = _runs(tables)
        if runs is None:
            # Tables of several kinds take turns: those of one kind lie together.
            tables = np.arange(0, 4 * len(part), 4, dtype=np.int64) + tables
            tables.sort()
            apart = 0
            runs = _runs(tables)
        if runs is None:
            return None
        for begin, end in itertools.pairwise(runs):
            step = _step(tables[begin:end])
            if step is None or not _read_run(
                buffer, at + apart * begin + int(tables[begin]), step + apart, slot, part[begin:end]
            ):
                return None
    buffer.charge(found.nbytes)
    return found.astype(np.uint32, copy=False)


def _runs(positions: npt.NDArray[Any]) -> list[int] | None:
    """The first of each run of positions at equal distances, and the end of the last; None where runs are short."""
    distances = positions[1:] - positions[:-1]
    changes = np.flatnonzero(distances[1:] != distances[:-1]) + 1
    if len(changes) > max(_FEW_RUNS, 2 * len(positions) // _LEAST_RUN):
        return None
    edges = [0]
    for end in [*(changes + 1).tolist(), len(positions)]:
        if end == edges[-1] + 2:
            # Any two have a distance: they may be of different kinds.
            edges.append(end - 1)
        if end > edges[-1]:
            edges.append(end)
    return edges


def _read_run(buffer: Buffer, first: int, stride: int, slot: int, found: npt.NDArray[np.uint32]) -> bool:
    """Read the vectors of tables at equal distances; False: they are not alike, or not all within the buffer."""
    count = len(found)
    offsets = _strided(buffer, first, stride, count, "<i4")
    # All have one vtable if the offsets to it grow as the positions of the tables do.
    if offsets is None or (count > 1 and _step(offsets) != stride):
        return False
    table_size, *fields = buffer.vtable(first - int(offsets[0]))
    field = fields[slot] if slot < len(fields) else 0
    if not 4 <= field <= table_size - 4 or max(first, first + stride * (count - 1)) + table_size > buffer.size:
        return False
    heads = _strided(buffer, first + field, stride, count, "<u4")
    step = None if heads is None else _step(heads)
    if heads is None or step is None:
        return False
    row = f"V{4 * found.shape[1]}"
    kind = np.dtype([("count", "<u4"), ("items", row)])
    vectors = _strided(buffer, first + field + int(heads[0]), stride + step, count, kind)
    if vectors is None or (vectors["count"] != found.shape[1]).any():
        return False
    # Row by row: numbers one by one would take several times as long.
    found.view(row)[:, 0] = vectors["items"]
    return True


def _step(numbers: npt.NDArray[Any]) -> int | None:
    """The difference of each number and the one before it, 0 for one number; None where it is not always the same."""
    if len(numbers) < 2:
        return 0
    first, second, last = int(numbers[0]), int(numbers[1]), int(numbers[-1])
    if last - first != (second - first) * (len(numbers) - 1):
        return None
    # In 32 bits, differences that are not the same may seem so, but then their sum is another.
    numbers = np.ascontiguousarray(numbers)
    differences = numbers[1:] - numbers[:-1]
    return None if (differences != differences[0]).any() else second - first


def _strided(buffer: Buffer, first: int, stride: int, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any] | None:
    """The values of ``dtype`` at positions at equal distances, not copied; None: one is not within the buffer."""
    kind = np.dtype(dtype)
    last = first + stride * (count - 1)
    if min(first, last) < 0 or max(first, last) + kind.itemsize > buffer.size:
        return None
    values: npt.NDArray[Any] = np.ndarray((count,), kind, buffer.data, first, (stride,))
    return values


def copy_spans(
    target: npt.NDArray[np.uint8],
    target_starts: Positions,
    source: Payload | memoryview | npt.NDArray[np.uint8],
    source_starts: Positions,
    lengths: Positions,
) -> None:
    """Copy many byte ranges, ``lengths[i]`` bytes from ``source_starts[i]`` to ``target_starts[i]``.

    All ranges lie within source and target. Loops over distinct lengths, not over ranges.
    """
    octets = np.frombuffer(source, np.uint8)
    if not len(lengths):
        return
    order = np.argsort(lengths, kind="stable") if lengths.min() != lengths.max() else None
    if order is not None:
        lengths, target_starts, source_starts = lengths[order], target_starts[order], source_starts[order]
    edges = np.flatnonzero(np.diff(lengths)) + 1
    bounds = [0, *edges.tolist(), len(lengths)]
    for first, last in itertools.pairwise(bounds):
        size = int(lengths[first])
        if size:
            item = f"V{size}"
            reading: npt.NDArray[Any] = np.ndarray((len(octets) - size + 1,), item, octets, strides=(1,))
            writing: npt.NDArray[Any] = np.ndarray((len(target) - size + 1,), item, target, strides=(1,))
            writing[target_starts[first:last]] = reading[source_starts[first:last]]


def put(target: npt.NDArray[np.uint8], at: Positions, values: npt.NDArray[Any]) -> None:
    """Write each value into ``target`` at its position, which need not be aligned but must be within ``target``."""
    if len(at):
        last = len(target) - values.dtype.itemsize
        everywhere: npt.NDArray[Any] = np.ndarray((last + 1,), values.dtype, target, strides=(1,))
        everywhere[at] = values


def is_ascending(rows: npt.NDArray[np.uint32], first_of_group: npt.NDArray[np.bool_] | None = None) -> bool:
    """Whether ``rows`` (n × ndim) are strictly ascending lexicographically.

    ``first_of_group[i]`` exempts row ``i`` from being compared with the one before it.
    """
    # In blocks, as memory for columns of all rows takes longer to get than to look at.
    for first in range(0, len(rows) - 1, _BLOCK):
        block = slice(first, first + _BLOCK + 1)
        if not _block_ascends(rows[block], None if first_of_group is None else first_of_group[block]):
            return False
    return True


def _block_ascends(rows: npt.NDArray[np.uint32], first_of_group: npt.NDArray[np.bool_] | None) -> bool:
    """As `is_ascending`, for at least two rows."""
    before, after = rows[:-1], rows[1:]
    greater = np.zeros(len(before), np.bool_) if first_of_group is None else first_of_group[1:].copy()
    equal = np.ones(len(before), np.bool_)
    for axis in range(rows.shape[1]):
        left, right = before[:, axis], after[:, axis]
        greater |= equal & (right > left)
        equal &= right == left
    return bool(greater.all())


def first_rows(edges: Positions) -> npt.NDArray[np.bool_]:
    """For each row of several concatenated groups, whether it is the first of its group; ``edges`` are the first row of
    each group and the end of the last."""
    mask = np.zeros(int(edges[-1]) + 1, np.bool_)
    mask[edges] = True
    return mask[:-1]


def lexicographic_order(rows: npt.NDArray[np.uint32], owner: Positions | None = None) -> npt.NDArray[np.intp]:
    """Numbers of the rows (n × ndim) in ascending lexicographic order; if ``owner`` is given, rows are ordered by it
    first. Equal rows keep their order."""
    keys = [*rows.T[::-1]] if owner is None else [*rows.T[::-1], owner]
    return np.lexsort(keys) if keys else np.arange(len(rows))


class LazyTables:
    """The tables of a vector, each read only when it is requested.

    Each table counts against the budget of `Buffer` once, however often it is read. Reading all of a hostile file
    therefore costs no more than reading it at once, and repeated reads of one table of a valid file never use up the
    budget.

    Parameters
    ----------
    buffer
        The payload that they are in.
    start, count
        Position of the vector's first offset, and number of tables, as `Table.vector` returns them.

    Raises
    ------
    FormatError
        If a table or its vtable is not within the buffer, or there are more tables than the buffer has room for.
    """

    __slots__ = ("_buffer", "_count", "_seen", "_start")

    def __init__(self, buffer: Buffer, start: int, count: int) -> None:
        buffer.charge_tables(count)
        self._buffer = buffer
        self._start = start
        self._count = count
        self._seen = bytearray(count)

    def __len__(self) -> int:
        return self._count

    @property
    def read_count(self) -> int:
        """Number of distinct tables that have been read individually."""
        return self._seen.count(1)

    @property
    def payload(self) -> Payload:
        """All bytes of the buffer."""
        return self._buffer.data

    @property
    def name(self) -> str:
        """Name of the buffer in errors."""
        return self._buffer.name

    def positions(self) -> npt.NDArray[np.int64]:
        """int64[n]: position of each table; not checked."""
        offsets = np.frombuffer(self._buffer.data, "<u4", self._count, self._start)
        positions: npt.NDArray[np.int64] = self._start + 4 * np.arange(self._count, dtype=np.int64) + offsets
        return positions

    def position(self, row: int) -> int:
        """Position of the table with that number; not checked."""
        field = self._start + 4 * row
        return field + self._buffer.u32(field)

    def columns(self, rows: npt.NDArray[np.intp] | None = None) -> tuple[Buffer, TableColumns]:
        """The tables of some rows (None: all) as columns, and a buffer with a budget of its own to read their
        targets.

        Raises
        ------
        FormatError
            If a table is not within the buffer.
        """
        buffer, positions = Buffer(self._buffer.data, self._buffer.name), self.positions()
        return buffer, TableColumns(buffer, positions if rows is None else positions[rows])

    def table(self, row: int) -> Table:
        """The table with that number, 0 ≤ ``row`` < ``len(self)``.

        Raises
        ------
        FormatError
            If the table is not within the buffer.
        """
        buffer = self._buffer
        if self._seen[row]:
            buffer = Buffer(buffer.data, buffer.name)
        else:
            self._seen[row] = 1
        field = self._start + 4 * row
        return Table(buffer, field + buffer.u32(field))
