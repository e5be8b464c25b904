"""Settings for splitting, preloading and compressing manifests."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY
from typing import Annotated, Any, Final, TypeAlias

from icechunk.errors import ErrorKind
from icechunk.format.manifest.location_compression import LocationCompression
from icechunk.runtime.checks import U16, U32, U64, WrongTypeError, instance_of, unsigned, whole
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import Setting, TupleVariant, VariantMeta, snake_case, unset

__all__ = [
    "DEFAULT_MAX_ARRAYS_TO_SCAN",
    "DEFAULT_MAX_TOTAL_REFS",
    "DEFAULT_SPLIT_SIZE",
    "PRELOAD_CONDITIONS",
    "SPLIT_CONDITIONS",
    "AnyDimension",
    "ManifestConfig",
    "ManifestPreloadCondition",
    "ManifestPreloadConfig",
    "ManifestSplitCondition",
    "ManifestSplitDimCondition",
    "ManifestSplitValues",
    "ManifestSplittingConfig",
    "ManifestVirtualChunkLocationCompressionConfig",
    "SplitSizesDict",
]

DEFAULT_MAX_ARRAYS_TO_SCAN: Final = 50
DEFAULT_MAX_TOTAL_REFS: Final = 10_000
DEFAULT_SPLIT_SIZE: Final = 2**32 - 1
_LOCATIONS: Final = LocationCompression()


class Condition(TupleVariant):
    """Base of the conditions: shown as the call that makes them."""

    __slots__ = ()

    def __repr__(self) -> str:
        owner, _, name = type(self).__qualname__.rpartition(".")
        call = snake_case(name) + ("_conditions" if isinstance(self, Several) else "")
        return f"icechunk.config.{owner}.{call}({', '.join(_argument(v) for v in self._fields())})"

    def __str__(self) -> str:
        return repr(self)


def _argument(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(repr(v) for v in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


@dataclass(frozen=True, slots=True, repr=False)
class Several(Condition):
    """Base of the conditions that combine others of their own kind."""

    __match_args__ = ("_0",)

    conditions: tuple[Any, ...]

    def __post_init__(self) -> None:
        kind = next(base for base in (ManifestPreloadCondition, ManifestSplitCondition) if isinstance(self, base))
        for condition in self.conditions:
            instance_of(kind)("each condition", condition)


@dataclass(frozen=True, slots=True, repr=False)
class Pattern(Condition):
    """Base of the conditions on a path or a name: a regular expression matches somewhere in it."""

    regex: str


def _adopt(owner: type, prefix: str, members: tuple[type, ...]) -> None:
    """Make module classes reachable, and picklable, as ``owner.Name``.

    They cannot be written in the body of their base; and ``class True`` is no syntax, yet the official name.
    """
    for cls in members:
        cls.__name__ = cls.__name__.removeprefix(prefix)
        cls.__qualname__ = f"{owner.__qualname__}.{cls.__name__}"
        setattr(owner, cls.__name__, cls)


# --- preloading -----------------------------------------------------------------------------------------------


class ManifestPreloadCondition(Condition):
    """Manifests that a session fetches ahead of need. Made by the static methods, combined with ``&`` and ``|``."""

    __slots__ = ()

    def __init__(self) -> None:
        raise TypeError("cannot create 'ManifestPreloadCondition' instances; use its static methods")

    @staticmethod
    def or_conditions(conditions: Iterable[ManifestPreloadCondition]) -> ManifestPreloadCondition:
        """Any of the conditions; false where there are none."""
        return PreloadOr(tuple(conditions))

    @staticmethod
    def and_conditions(conditions: Iterable[ManifestPreloadCondition]) -> ManifestPreloadCondition:
        """All of the conditions; true where there are none."""
        return PreloadAnd(tuple(conditions))

    @staticmethod
    def path_matches(regex: str) -> ManifestPreloadCondition:
        """Arrays whose whole path the regular expression matches somewhere."""
        return PreloadPathMatches(regex)

    @staticmethod
    def name_matches(regex: str) -> ManifestPreloadCondition:
        """Arrays whose name (last segment of the path) the regular expression matches somewhere."""
        return PreloadNameMatches(regex)

    @staticmethod
    def num_refs(from_refs: int | None, to_refs: int | None) -> ManifestPreloadCondition:
        """Manifests with ``from_refs`` (inclusive) to ``to_refs`` (exclusive) references; None: no bound."""
        return PreloadNumRefs(from_refs, to_refs)

    @staticmethod
    def true() -> ManifestPreloadCondition:
        """Every manifest."""
        return PreloadTrue()

    @staticmethod
    def false() -> ManifestPreloadCondition:
        """No manifest."""
        return PreloadFalse()

    def __and__(self, other: ManifestPreloadCondition, /) -> ManifestPreloadCondition:
        if not isinstance(other, ManifestPreloadCondition):
            return NotImplemented
        return PreloadAnd((self, other))

    def __or__(self, other: ManifestPreloadCondition, /) -> ManifestPreloadCondition:
        if not isinstance(other, ManifestPreloadCondition):
            return NotImplemented
        return PreloadOr((self, other))


class PreloadOr(Several, ManifestPreloadCondition):
    """Any of the conditions."""

    __slots__ = ()


class PreloadAnd(Several, ManifestPreloadCondition):
    """All of the conditions."""

    __slots__ = ()


class PreloadPathMatches(Pattern, ManifestPreloadCondition):
    """A regular expression for whole paths."""

    __slots__ = ()


class PreloadNameMatches(Pattern, ManifestPreloadCondition):
    """A regular expression for names."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, repr=False)
class PreloadNumRefs(ManifestPreloadCondition):
    """A range of numbers of references."""

    __match_args__ = ("from", "to")

    from_refs: U32 | None
    """Least number, inclusive."""
    to_refs: U32 | None
    """End of the range, exclusive."""


# ``from`` cannot be written as a field, yet the official library's attributes are called so.
for _name in ("from", "to"):
    setattr(PreloadNumRefs, _name, property(operator.attrgetter(f"{_name}_refs")))


@dataclass(frozen=True, slots=True, repr=False)
class PreloadTrue(ManifestPreloadCondition):
    """Every manifest."""


@dataclass(frozen=True, slots=True, repr=False)
class PreloadFalse(ManifestPreloadCondition):
    """No manifest."""


PRELOAD_CONDITIONS: Final = (
    PreloadOr,
    PreloadAnd,
    PreloadPathMatches,
    PreloadNameMatches,
    PreloadNumRefs,
    PreloadTrue,
    PreloadFalse,
)
_adopt(ManifestPreloadCondition, "Preload", PRELOAD_CONDITIONS)


@dataclass(slots=True, repr=False)
class ManifestPreloadConfig(Setting):
    """The manifests that a new session fetches ahead of need."""

    max_total_refs: U32 | None = unset(DEFAULT_MAX_TOTAL_REFS)
    """References in all preloaded manifests together."""
    preload_if: ManifestPreloadCondition | None = None
    """Arrays whose manifests are fetched. None: coordinate-like arrays, the official default."""
    max_arrays_to_scan: U32 | None = unset(DEFAULT_MAX_ARRAYS_TO_SCAN)
    """Arrays looked at when choosing."""


# --- splitting ------------------------------------------------------------------------------------------------


class ManifestSplitCondition(Condition):
    """Arrays that a rule is for. Made by the static methods, combined with ``&`` and ``|``; hashable."""

    __slots__ = ()

    def __init__(self) -> None:
        raise TypeError("cannot create 'ManifestSplitCondition' instances; use its static methods")

    @staticmethod
    def or_conditions(conditions: Iterable[ManifestSplitCondition]) -> ManifestSplitCondition:
        """Any of the conditions; no array where there are none."""
        return SplitOr(tuple(conditions))

    @staticmethod
    def and_conditions(conditions: Iterable[ManifestSplitCondition]) -> ManifestSplitCondition:
        """All of the conditions; every array where there are none."""
        return SplitAnd(tuple(conditions))

    @staticmethod
    def path_matches(regex: str) -> ManifestSplitCondition:
        """Arrays whose whole path the regular expression matches somewhere."""
        return SplitPathMatches(regex)

    @staticmethod
    def name_matches(regex: str) -> ManifestSplitCondition:
        """Arrays whose name (last segment of the path) the regular expression matches somewhere."""
        return SplitNameMatches(regex)

    @staticmethod
    def AnyArray() -> ManifestSplitCondition:  # noqa: N802 - the official name
        """Every array."""
        return SplitAnyArray()

    def __or__(self, other: ManifestSplitCondition, /) -> ManifestSplitCondition:
        if not isinstance(other, ManifestSplitCondition):
            return NotImplemented
        return SplitOr((self, other))

    def __and__(self, other: ManifestSplitCondition, /) -> ManifestSplitCondition:
        if not isinstance(other, ManifestSplitCondition):
            return NotImplemented
        return SplitAnd((self, other))


class SplitOr(Several, ManifestSplitCondition):
    """Any of the conditions."""

    __slots__ = ()


class SplitAnd(Several, ManifestSplitCondition):
    """All of the conditions."""

    __slots__ = ()


class SplitPathMatches(Pattern, ManifestSplitCondition):
    """A regular expression for whole paths."""

    __slots__ = ()


class SplitNameMatches(Pattern, ManifestSplitCondition):
    """A regular expression for names."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, repr=False)
class SplitAnyArray(ManifestSplitCondition):
    """Every array."""


SPLIT_CONDITIONS: Final = (SplitOr, SplitAnd, SplitPathMatches, SplitNameMatches, SplitAnyArray)
_adopt(ManifestSplitCondition, "Split", SPLIT_CONDITIONS)


class ManifestSplitDimCondition(metaclass=VariantMeta):
    """Dimensions of an array that a size is for. One of the nested classes; hashable."""

    @dataclass(frozen=True, slots=True, repr=False)
    class Axis(Condition):
        """The dimension at this position, counted from 0."""

        __match_args__ = ("_0",)
        axis: U64

    @dataclass(frozen=True, slots=True, repr=False)
    class DimensionName(Pattern):
        """Dimensions whose name the regular expression matches."""

        __match_args__ = ("_0",)

    @dataclass(frozen=True, slots=True, repr=False)
    class Any(Condition):
        """Every dimension for which no other condition of the rule holds."""


AnyDimension: TypeAlias = (
    ManifestSplitDimCondition.Axis | ManifestSplitDimCondition.DimensionName | ManifestSplitDimCondition.Any
)
ManifestSplitValues: TypeAlias = dict[AnyDimension, int]
SplitSizesDict: TypeAlias = dict[ManifestSplitCondition, ManifestSplitValues]
_SplitSizes: TypeAlias = Iterable[tuple[ManifestSplitCondition, Iterable[tuple[AnyDimension, int]]]]


def _split_sizes(name: str, value: Any) -> list[tuple[ManifestSplitCondition, list[tuple[AnyDimension, int]]]]:
    condition_check = instance_of(ManifestSplitCondition)
    dim_check = instance_of(ManifestSplitDimCondition)
    # A size of 0 chunks is accepted by the official library, which then fails at the first commit.
    size_check = unsigned(32, minimum=1)
    if isinstance(value, Mapping):
        raise WrongTypeError(
            f"{name} must be pairs, not a mapping; use ManifestSplittingConfig.from_dict", ErrorKind.INVALID_SETTING
        )
    return [
        (
            condition_check(f"each condition of {name}", condition),
            [(dim_check(f"each dimension of {name}", d), size_check(f"each size of {name}", n)) for d, n in sizes],
        )
        for condition, sizes in value
    ]


@dataclass(slots=True, repr=False)
class ManifestSplittingConfig(Setting):
    """Number of chunks along each dimension in one manifest."""

    split_sizes: Annotated[_SplitSizes, _split_sizes] | None = None
    """Rules in order of precedence: condition on the array, then (dimension, chunks per manifest) pairs."""

    @staticmethod
    def from_dict(
        split_sizes: Mapping[ManifestSplitCondition, Mapping[AnyDimension, int]],
    ) -> ManifestSplittingConfig:
        """Build it from ``{array condition: {dimension condition: chunks per manifest}}``; order counts."""
        return from_dict(split_sizes)

    def to_dict(self) -> SplitSizesDict:
        """Give the rules back as a dict; empty where there are none."""
        return to_dict(self)


def from_dict(
    split_sizes: Mapping[ManifestSplitCondition, Mapping[AnyDimension, int]],
) -> ManifestSplittingConfig:
    """See `ManifestSplittingConfig.from_dict`."""
    return ManifestSplittingConfig([(condition, list(sizes.items())) for condition, sizes in split_sizes.items()])


def to_dict(config: ManifestSplittingConfig) -> SplitSizesDict:
    """See `ManifestSplittingConfig.to_dict`."""
    return {condition: dict(sizes) for condition, sizes in config.split_sizes or ()}


# --- the rest -------------------------------------------------------------------------------------------------


@dataclass(slots=True, repr=False)
class ManifestVirtualChunkLocationCompressionConfig(Setting):
    """Compression of the locations of virtual references with a common dictionary."""

    min_num_chunks: U16 | None = unset(_LOCATIONS.min_refs)
    """Manifests with fewer virtual references stay plain."""
    _: KW_ONLY
    dictionary_max_training_samples: U16 | None = unset(_LOCATIONS.samples)
    """Locations that the dictionary is trained on."""
    dictionary_max_size_bytes: U32 | None = unset(_LOCATIONS.dictionary_bytes)
    """Bytes of the dictionary."""
    compression_level: Annotated[int, whole(-(2**31), 2**31 - 1)] | None = unset(_LOCATIONS.level)
    """Level of zstd."""


@dataclass(slots=True, repr=False)
class ManifestConfig(Setting):
    """Everything about manifests."""

    preload: ManifestPreloadConfig | None = unset(ManifestPreloadConfig)
    """Fetching ahead of need."""
    splitting: ManifestSplittingConfig | None = None
    """Splitting of arrays into manifests. None: the engine chooses (where the repository is shared with the official
    library, one manifest per array)."""
    virtual_chunk_location_compression: ManifestVirtualChunkLocationCompressionConfig | None = None
    """Compression of each location by itself. None: as the defaults of its fields say where the repository is shared
    with the official library; elsewhere locations are compressed with the rest of the manifest, which takes half the
    time to write and to read."""
    max_concurrent_manifest_fetches_during_commit: U16 | None = None
    """Manifests that a commit reads at a time; None: as many as there may be requests for the whole repository."""
