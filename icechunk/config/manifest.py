"""How manifests are split, preloaded and compressed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, TypeAlias

from icechunk.runtime.representation import (
    Setting,
    TupleVariant,
    VariantMeta,
    checked,
    instance_of,
    optional,
    signed,
    text,
    unsigned,
)

__all__ = [
    "DEFAULT_MAX_ARRAYS_TO_SCAN",
    "DEFAULT_MAX_TOTAL_REFS",
    "DEFAULT_SPLIT_SIZE",
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


class _Condition(TupleVariant):
    """Base of the conditions: shown as the call that makes them."""

    __slots__ = ()
    _call: ClassVar[str]

    def __repr__(self) -> str:
        return f"icechunk.config.{self._call}({', '.join(_argument(v) for v in self._fields())})"

    def __str__(self) -> str:
        return repr(self)


def _argument(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(repr(v) for v in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _adopt(owner: type, **members: type) -> None:
    """Make module classes reachable, and picklable, as ``owner.Name``."""
    for name, cls in members.items():
        cls.__name__ = name
        cls.__qualname__ = f"{owner.__qualname__}.{name}"
        setattr(owner, name, cls)


# --- preloading -----------------------------------------------------------------------------------------------


class ManifestPreloadCondition(_Condition):
    """Which manifests a session fetches ahead of need. Made by the static methods, combined with ``&`` and ``|``."""

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


@dataclass(frozen=True, slots=True, repr=False)
class PreloadOr(ManifestPreloadCondition):
    """Any of the conditions."""

    __match_args__ = ("_0",)
    _call: ClassVar[str] = "ManifestPreloadCondition.or_conditions"

    conditions: tuple[ManifestPreloadCondition, ...]

    def __post_init__(self) -> None:
        _all_conditions(self.conditions, ManifestPreloadCondition)


@dataclass(frozen=True, slots=True, repr=False)
class PreloadAnd(ManifestPreloadCondition):
    """All of the conditions."""

    __match_args__ = ("_0",)
    _call: ClassVar[str] = "ManifestPreloadCondition.and_conditions"

    conditions: tuple[ManifestPreloadCondition, ...]

    def __post_init__(self) -> None:
        _all_conditions(self.conditions, ManifestPreloadCondition)


@dataclass(frozen=True, slots=True, repr=False)
class PreloadPathMatches(ManifestPreloadCondition):
    """A regular expression for whole paths."""

    _call: ClassVar[str] = "ManifestPreloadCondition.path_matches"

    regex: str

    def __post_init__(self) -> None:
        text("ManifestPreloadCondition.path_matches: regex", self.regex)


@dataclass(frozen=True, slots=True, repr=False)
class PreloadNameMatches(ManifestPreloadCondition):
    """A regular expression for names."""

    _call: ClassVar[str] = "ManifestPreloadCondition.name_matches"

    regex: str

    def __post_init__(self) -> None:
        text("ManifestPreloadCondition.name_matches: regex", self.regex)


@dataclass(frozen=True, slots=True, repr=False)
class PreloadNumRefs(ManifestPreloadCondition):
    """A range of numbers of references."""

    __match_args__ = ("from", "to")
    _call: ClassVar[str] = "ManifestPreloadCondition.num_refs"

    from_refs: int | None
    """Inclusive."""
    to_refs: int | None
    """Exclusive."""

    def __post_init__(self) -> None:
        for name in ("from_refs", "to_refs"):
            check = optional(unsigned(32))
            object.__setattr__(self, name, check(f"ManifestPreloadCondition.num_refs: {name}", getattr(self, name)))


# ``from`` cannot be written as a field, yet the official library's attributes are called so.
for _name in ("from", "to"):
    setattr(PreloadNumRefs, _name, property(operator.attrgetter(f"{_name}_refs")))


@dataclass(frozen=True, slots=True, repr=False)
class PreloadTrue(ManifestPreloadCondition):
    """Every manifest."""

    _call: ClassVar[str] = "ManifestPreloadCondition.true"


@dataclass(frozen=True, slots=True, repr=False)
class PreloadFalse(ManifestPreloadCondition):
    """No manifest."""

    _call: ClassVar[str] = "ManifestPreloadCondition.false"


def _all_conditions(conditions: tuple[Any, ...], kind: type) -> None:
    check = instance_of(kind)
    for condition in conditions:
        check("each condition", condition)


_adopt(
    ManifestPreloadCondition,
    Or=PreloadOr,
    And=PreloadAnd,
    PathMatches=PreloadPathMatches,
    NameMatches=PreloadNameMatches,
    NumRefs=PreloadNumRefs,
)
# ``class True`` is no syntax, yet the official library's classes are called so.
_adopt(ManifestPreloadCondition, **{"True": PreloadTrue, "False": PreloadFalse})


@dataclass(slots=True, repr=False)
class ManifestPreloadConfig(Setting):
    """What a new session fetches ahead of need."""

    _public_name: ClassVar[str] = "icechunk.config.ManifestPreloadConfig"

    max_total_refs: int | None = field(
        default=None, metadata=checked(optional(unsigned(32)), effective=DEFAULT_MAX_TOTAL_REFS)
    )
    """References in all preloaded manifests together."""
    preload_if: ManifestPreloadCondition | None = field(
        default=None, metadata=checked(optional(instance_of(ManifestPreloadCondition)))
    )
    """None: coordinate-like arrays, the official default."""
    max_arrays_to_scan: int | None = field(
        default=None, metadata=checked(optional(unsigned(32)), effective=DEFAULT_MAX_ARRAYS_TO_SCAN)
    )
    """Arrays looked at when choosing."""


# --- splitting ------------------------------------------------------------------------------------------------


class ManifestSplitCondition(_Condition):
    """Which arrays a rule is for. Made by the static methods, combined with ``&`` and ``|``; hashable."""

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


@dataclass(frozen=True, slots=True, repr=False)
class SplitOr(ManifestSplitCondition):
    """Any of the conditions."""

    __match_args__ = ("_0",)
    _call: ClassVar[str] = "ManifestSplitCondition.or_conditions"

    conditions: tuple[ManifestSplitCondition, ...]

    def __post_init__(self) -> None:
        _all_conditions(self.conditions, ManifestSplitCondition)


@dataclass(frozen=True, slots=True, repr=False)
class SplitAnd(ManifestSplitCondition):
    """All of the conditions."""

    __match_args__ = ("_0",)
    _call: ClassVar[str] = "ManifestSplitCondition.and_conditions"

    conditions: tuple[ManifestSplitCondition, ...]

    def __post_init__(self) -> None:
        _all_conditions(self.conditions, ManifestSplitCondition)


@dataclass(frozen=True, slots=True, repr=False)
class SplitPathMatches(ManifestSplitCondition):
    """A regular expression for whole paths."""

    _call: ClassVar[str] = "ManifestSplitCondition.path_matches"

    regex: str

    def __post_init__(self) -> None:
        text("ManifestSplitCondition.path_matches: regex", self.regex)


@dataclass(frozen=True, slots=True, repr=False)
class SplitNameMatches(ManifestSplitCondition):
    """A regular expression for names."""

    _call: ClassVar[str] = "ManifestSplitCondition.name_matches"

    regex: str

    def __post_init__(self) -> None:
        text("ManifestSplitCondition.name_matches: regex", self.regex)


@dataclass(frozen=True, slots=True, repr=False)
class SplitAnyArray(ManifestSplitCondition):
    """Every array."""

    _call: ClassVar[str] = "ManifestSplitCondition.any_array"


_adopt(
    ManifestSplitCondition,
    Or=SplitOr,
    And=SplitAnd,
    PathMatches=SplitPathMatches,
    NameMatches=SplitNameMatches,
    AnyArray=SplitAnyArray,
)


class ManifestSplitDimCondition(metaclass=VariantMeta):
    """Which dimensions of an array a size is for. One of the nested classes; hashable."""

    @dataclass(frozen=True, slots=True, repr=False)
    class Axis(_Condition):
        """The dimension at this position, counted from 0."""

        __match_args__ = ("_0",)
        _call: ClassVar[str] = "ManifestSplitDimCondition.axis"

        axis: int

        def __post_init__(self) -> None:
            object.__setattr__(self, "axis", unsigned(64)("ManifestSplitDimCondition.Axis", self.axis))

    @dataclass(frozen=True, slots=True, repr=False)
    class DimensionName(_Condition):
        """Dimensions whose name the regular expression matches."""

        __match_args__ = ("_0",)
        _call: ClassVar[str] = "ManifestSplitDimCondition.dimension_name"

        regex: str

        def __post_init__(self) -> None:
            text("ManifestSplitDimCondition.DimensionName", self.regex)

    @dataclass(frozen=True, slots=True, repr=False)
    class Any(_Condition):
        """Every dimension for which no other condition of the rule holds."""

        _call: ClassVar[str] = "ManifestSplitDimCondition.any"


_AnyDim: TypeAlias = (
    ManifestSplitDimCondition.Axis | ManifestSplitDimCondition.DimensionName | ManifestSplitDimCondition.Any
)
ManifestSplitValues: TypeAlias = dict[_AnyDim, int]
SplitSizesDict: TypeAlias = dict[ManifestSplitCondition, ManifestSplitValues]
_SplitSizes: TypeAlias = Iterable[tuple[ManifestSplitCondition, Iterable[tuple[_AnyDim, int]]]]


def _split_sizes(name: str, value: Any) -> list[tuple[ManifestSplitCondition, list[tuple[_AnyDim, int]]]]:
    condition_check = instance_of(ManifestSplitCondition)
    dim_check = instance_of(ManifestSplitDimCondition)
    # A size of 0 chunks is accepted by the official library, which then fails at the first commit.
    size_check = unsigned(32, minimum=1)
    return [
        (
            condition_check(f"each condition of {name}", condition),
            [(dim_check(f"each dimension of {name}", d), size_check(f"each size of {name}", n)) for d, n in sizes],
        )
        for condition, sizes in value
    ]


@dataclass(slots=True, repr=False)
class ManifestSplittingConfig(Setting):
    """How many chunks along each dimension one manifest serves."""

    _public_name: ClassVar[str] = "icechunk.config.ManifestSplittingConfig"

    split_sizes: _SplitSizes | None = field(default=None, metadata=checked(optional(_split_sizes)))
    """Rules in order of precedence: condition on the array, then (dimension, chunks per manifest) pairs."""

    @staticmethod
    def from_dict(split_sizes: Mapping[ManifestSplitCondition, Mapping[_AnyDim, int]]) -> ManifestSplittingConfig:
        """Build it from ``{array condition: {dimension condition: chunks per manifest}}``; order counts."""
        return from_dict(split_sizes)

    def to_dict(self) -> SplitSizesDict:
        """Give the rules back as a dict; empty where there are none."""
        return to_dict(self)


def from_dict(split_sizes: Mapping[ManifestSplitCondition, Mapping[_AnyDim, int]]) -> ManifestSplittingConfig:
    """See `ManifestSplittingConfig.from_dict`."""
    return ManifestSplittingConfig([(condition, list(sizes.items())) for condition, sizes in split_sizes.items()])


def to_dict(config: ManifestSplittingConfig) -> SplitSizesDict:
    """See `ManifestSplittingConfig.to_dict`."""
    return {condition: dict(sizes) for condition, sizes in config.split_sizes or ()}


# --- the rest -------------------------------------------------------------------------------------------------


@dataclass(slots=True, repr=False)
class ManifestVirtualChunkLocationCompressionConfig(Setting):
    """When and how locations of virtual references are compressed with a common dictionary."""

    _public_name: ClassVar[str] = "icechunk.config.ManifestVirtualChunkLocationCompressionConfig"

    min_num_chunks: int | None = field(default=None, metadata=checked(optional(unsigned(16)), effective=1000))
    """Manifests with fewer virtual references stay plain."""
    dictionary_max_training_samples: int | None = field(
        default=None, metadata=checked(optional(unsigned(16)), effective=100), kw_only=True
    )
    """Locations that the dictionary is trained on."""
    dictionary_max_size_bytes: int | None = field(
        default=None, metadata=checked(optional(unsigned(32)), effective=2048), kw_only=True
    )
    """Bytes of the dictionary."""
    compression_level: int | None = field(
        default=None, metadata=checked(optional(signed(32)), effective=3), kw_only=True
    )
    """zstd level."""


@dataclass(slots=True, repr=False)
class ManifestConfig(Setting):
    """Everything about manifests."""

    _public_name: ClassVar[str] = "icechunk.config.ManifestConfig"

    preload: ManifestPreloadConfig | None = field(
        default=None, metadata=checked(optional(instance_of(ManifestPreloadConfig)), effective=ManifestPreloadConfig())
    )
    """Fetching ahead of need."""
    splitting: ManifestSplittingConfig | None = field(
        default=None, metadata=checked(optional(instance_of(ManifestSplittingConfig)))
    )
    """None: the engine chooses (where the repository is shared with the official library, one manifest per array)."""
    virtual_chunk_location_compression: ManifestVirtualChunkLocationCompressionConfig | None = field(
        default=None,
        metadata=checked(
            optional(instance_of(ManifestVirtualChunkLocationCompressionConfig)),
            effective=ManifestVirtualChunkLocationCompressionConfig(),
        ),
    )
    """Dictionaries for locations."""
    max_concurrent_manifest_fetches_during_commit: int | None = field(
        default=None, metadata=checked(optional(unsigned(16)), effective=1)
    )
    """Manifests that a commit reads at a time; unset, as many as there may be requests."""
