"""Dataclasses that get their methods late are those that the standard library makes."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
import pickle
import pkgutil
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import pytest

import icechunk
from icechunk.runtime import late_dataclass

T = TypeVar("T")
Decorator = Callable[..., Callable[[type], Any]]
LATE: Decorator = getattr(late_dataclass, "dataclass")  # noqa: B009  type checkers see the standard library's
STANDARD: Decorator = dataclasses.dataclass
OPTIONS = [
    dict(zip(("frozen", "eq", "order", "repr", "kw_only", "match_args"), chosen, strict=True))
    for chosen in product((False, True), repeat=6)
    if chosen[1] or not chosen[2]
]
"""All options; the standard library refuses an order without equality."""


@LATE(slots=True, frozen=True)
class Point:
    """A point, in a module, so that it pickles."""

    x: int
    y: int = 2


@LATE(slots=True)
class Counter:
    counts: list[int] = field(default_factory=list)
    total: int = field(init=False, default=7)


POINT: Any = Point
COUNTER: Any = Counter


def plain(decorator: Decorator, **options: bool) -> Any:
    @decorator(slots=True, **options)
    class Plain:
        """A class."""

        kind: ClassVar[str] = "plain"
        first: int
        second: list[int] = field(default_factory=list, compare=False)
        third: str = field(default="three", repr=False, metadata={"unit": "m"})
        _: KW_ONLY
        fourth: int = 4

        def sum(self) -> int:
            return self.first + self.fourth

    return Plain


def usual(decorator: Decorator, **options: bool) -> Any:
    @decorator(slots=True, **options)
    class Usual:
        """A class."""

        kind: ClassVar[str] = "usual"
        first: int
        second: list[int] = field(default_factory=list, compare=False)
        third: str = field(default="three", repr=False, metadata={"unit": "m"})
        fourth: int = field(default=4, kw_only=True)
        fifth: int | None = None

        def __post_init__(self) -> None:
            if self.fourth == self.first:
                raise ValueError("the first and the fourth are the same")

        def sum(self) -> int:
            return self.first + self.fourth

    return Usual


def with_required_keywords(decorator: Decorator, **options: bool) -> Any:
    @decorator(slots=True, **options)
    class Keywords:
        first: int = 1
        second: int = field(kw_only=True, default=2)
        self: int = 3
        _third: int = 3
        fourth: int = field(default=4, init=False)

    return Keywords


def with_wrong_order(decorator: Decorator, **options: bool) -> Any:
    @decorator(slots=True, **options)
    class Wrong:
        first: int = 1
        second: int

    return Wrong


def with_own_assignment(decorator: Decorator, **options: bool) -> Any:
    @decorator(slots=True, **options)
    class Own:
        first: int = 1

        def __setattr__(self, name: str, value: object) -> None:
            object.__setattr__(self, name, value)

    return Own


def with_default_of_a_base(decorator: Decorator, **options: bool) -> Any:
    class Base:
        __slots__ = ()
        second = 2

    @decorator(slots=True, **options)
    class Derived(Base):
        first: int
        second: int

    return Derived


def with_own_methods(decorator: Decorator, **options: bool) -> Any:
    @decorator(slots=True, **options)
    class Own:
        __match_args__ = ("second",)
        first: int = 1
        second: int = 2

        def __repr__(self) -> str:
            return "own"

        def __eq__(self, other: object) -> bool:
            return True

        def __post_init__(self) -> None:
            object.__setattr__(self, "second", self.first + 1)

    return Own


def with_own_hash(decorator: Decorator, **options: bool) -> Any:
    @decorator(slots=True, **options)
    class Own:
        first: int = 1

        def __hash__(self) -> int:
            return 5

    return Own


def derived(decorator: Decorator, **options: bool) -> Any:
    class Mixin:
        __slots__ = ()

        def twice(self: Any) -> Any:
            return self.first * 2

    @decorator(slots=True, **options)
    class Base(Mixin, Generic[T]):
        first: int
        second: str = "two"

    @decorator(slots=True, **options)
    class Derived(Base[int]):
        second: str = "another"
        third: float = 3.0

    return Derived


def extended(decorator: Decorator, **options: bool) -> Any:
    @decorator(slots=True, **options)
    class Base:
        kind: ClassVar[str] = "extended"
        first: int
        second: list[int] = field(default_factory=list)
        third: str = field(default="three", kw_only=True)

    @decorator(slots=True, **options)
    class Middle(Base):
        pass

    @decorator(slots=True, **options)
    class Extended(Middle):
        fourth: int = 4

        def __post_init__(self) -> None:
            if self.fourth == self.first:
                raise ValueError("the first and the fourth are the same")

    return Extended


def with_required_after_inherited_default(decorator: Decorator, **options: bool) -> Any:
    @decorator(slots=True, **options)
    class Base:
        first: int = 1

    @decorator(slots=True, **options)
    class Wrong(Base):
        second: int

    return Wrong


def with_another_kind_of_base(decorator: Decorator, **options: bool) -> Any:
    @decorator(slots=True, **options | {"frozen": not options["frozen"]})
    class Base:
        first: int = 1

    @decorator(slots=True, **options)
    class Wrong(Base):
        second: int = 2

    return Wrong


def abstract(decorator: Decorator, **options: bool) -> Any:
    @decorator(slots=True, **options)
    class Base(ABC):
        first: int = 1

        @abstractmethod
        def name(self) -> str: ...

    @decorator(slots=True, **options)
    class Derived(Base):
        def name(self) -> str:
            return "derived"

    return Derived


DEFINITIONS = [
    plain,
    usual,
    with_required_keywords,
    with_wrong_order,
    with_own_assignment,
    with_default_of_a_base,
    with_own_methods,
    with_own_hash,
    derived,
    extended,
    with_required_after_inherited_default,
    abstract,
]


def outcome(run: Callable[[], Any]) -> Any:
    """What a call returns, or the type and the words of its error."""
    try:
        return run()
    except Exception as error:
        return type(error).__name__, str(error)


def constructed(cls: Any) -> dict[str, Any]:
    """What comes of calls with arguments of all kinds, by what they are."""

    def made(*args: Any, **named: Any) -> Any:
        return outcome(lambda: dataclasses.astuple(cls(*args, **named)))

    return {
        "positional": made(1),
        "all positional": made(1, [2], "3", 5),
        "all by name": made(first=1, second=[2], third="3", fourth=5, fifth=6),
        "refused": made(1, fourth=1),
        "unknown": made(nothing=1),
        "missing": made(),
        "twice": made(1, first=1),
        "too many": made(1, 2, 3, 4, 5, 6),
    }


def described(cls: Any) -> dict[str, Any]:
    """All that shows how a class behaves whose first field is a number."""
    one, same, other = (cls(first=number) for number in (1, 1, 2))
    first_calls = constructed(cls)
    constructor = (cls.__init__.__module__, cls.__init__.__doc__, cls.__init__.__name__)
    params = repr(cls.__dataclass_params__)
    fields = [str(found) for found in dataclasses.fields(cls)]
    positions = getattr(cls, "__match_args__", None)
    assignment = outcome(lambda: setattr(one, "first", 3))
    state = outcome(other.__getstate__)  # from here on there is no placeholder
    members = {
        name: str(inspect.signature(member)) if inspect.isfunction(member) else None
        for name, member in vars(cls).items()
        if name != "__doc__" and not name.startswith("__anno")
    }
    return {
        "members": members,
        "names of methods": {
            name: member.__qualname__ for name, member in vars(cls).items() if inspect.isfunction(member)
        },
        "slots": cls.__slots__,
        "signature": str(inspect.signature(cls)),
        "fields": fields,
        "params": params,
        "match": positions,
        "instance": (repr(one).rpartition(" at ")[0], dataclasses.asdict(one)),
        "annotations": cls.__init__.__annotations__,
        "constructor": constructor,
        "first calls": first_calls,
        "later calls": constructed(cls),
        "equal": (one == same, one == other, one != other, one == 1),
        "order": outcome(lambda: (one < other, one <= other, one > other, one >= other)),
        "hash": outcome(lambda: hash(one) == hash(same)),
        "assignment": assignment,
        "deletion": outcome(lambda: delattr(one, "first")),
        "replaced": dataclasses.asdict(dataclasses.replace(other, first=9)),
        "copied": dataclasses.asdict(copy.deepcopy(other)),
        "state": state,
        "replaces": hasattr(cls, "__replace__"),
        "weak": hasattr(cls, "__weakref__"),
    }


@pytest.mark.parametrize("define", DEFINITIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda chosen: "+".join(name for name in chosen if chosen[name]))
def test_a_late_class_is_the_one_that_the_standard_library_makes(
    define: Callable[..., Any], options: dict[str, bool]
) -> None:
    assert outcome(lambda: described(define(LATE, **options))) == outcome(
        lambda: described(define(STANDARD, **options))
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_a_class_is_as_frozen_as_its_base(frozen: bool) -> None:
    kind, words = outcome(lambda: with_another_kind_of_base(STANDARD, frozen=frozen))
    assert outcome(lambda: with_another_kind_of_base(LATE, frozen=frozen)(2)) == (kind, words)
    assert kind == "TypeError"


FIELDS_ONLY = [dataclasses.fields, dataclasses.is_dataclass]


@pytest.mark.parametrize(
    "use",
    [
        lambda cls: cls(1),
        *FIELDS_ONLY,
        lambda cls: cls.__match_args__,
        inspect.signature,
        lambda cls: repr(object.__new__(type("Derived", (cls,), {"first": 1, "second": 2, "fourth": 4}))),
        lambda cls: hash(object.__new__(cls)) if cls.__hash__ else cls.__init__,
        lambda cls: object.__new__(cls) == object.__new__(cls),
    ],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_the_first_use_of_a_class_makes_its_methods_and_no_other_does(
    use: Callable[[Any], Any], frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(**options: bool) -> Any:
        def decorate(cls: type) -> Any:
            made.append(cls.__name__)
            return STANDARD(**options)(cls)

        return decorate

    cls = plain(LATE, frozen=frozen)
    monkeypatch.setattr(dataclasses, "dataclass", counted)
    assert (cls.kind, cls.__doc__, cls.sum.__name__) == ("plain", "A class.", "sum")
    assert made == []
    outcome(lambda: use(cls))
    assert made == ["Plain"]
    for _ in range(2):
        # Some attributes are made with the constructor, some with what compares, and fields alone.
        assert (cls(3).sum(), cls(1) == cls(1), bool(repr(cls(1)))) == (7, True, True)
        assert made == ["Plain"] * (3 if use in FIELDS_ONLY else 2)


@pytest.mark.parametrize("frozen", [True, False])
def test_values_are_made_and_matched_without_the_standard_library(
    frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = usual(LATE, frozen=frozen)
    with monkeypatch.context() as patched:
        patched.delattr(dataclasses, "dataclass")
        one = cls(3, [2], fifth=5)
        match one:
            case cls(first, second, third, fifth):
                assert (first, second, third, fifth) == (3, [2], "three", 5)
        assert cls(3).second is not cls(3).second
        assert one.sum() == 7
        with pytest.raises(ValueError, match="the same"):  # words: the definition's own
            cls(4)
    constructor = cls.__init__
    assert len(dataclasses.fields(cls)) == 5
    assert cls.__init__ is constructor
    assert outcome(lambda: setattr(one, "first", 4)) == (
        ("FrozenInstanceError", "cannot assign to field 'first'") if frozen else None
    )


@pytest.mark.parametrize("define", [usual, extended])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_constructor_is_compiled_for_a_class_of_many_instances(define: Callable[..., Any], frozen: bool) -> None:
    cls = define(LATE, frozen=frozen)
    compiled: list[bool] = []
    for number in range(2 * late_dataclass._FIRST_CALLS):
        made = cls(number + 10, third="3")
        assert (made.first, made.second, made.third, made.fourth) == (number + 10, [], "3", 4)
        compiled.append(inspect.isfunction(vars(cls)["__init__"]))
    assert (compiled[0], compiled[-1]) == (False, True)


@pytest.mark.parametrize("define", [usual, extended])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_replaced_instance_is_that_of_the_standard_library(define: Callable[..., Any], frozen: bool) -> None:
    cls = define(LATE, frozen=frozen)
    one = cls(1, [2], third="three", fourth=5)
    for changes in ({}, {"first": 7}, {"second": [3], "third": "3", "fourth": 8}, {"first": 5}, {"nothing": 1}):
        ours = outcome(lambda: late_dataclass.replace(one, **changes))  # noqa: B023  called at once
        assert ours == outcome(lambda: dataclasses.replace(one, **changes))  # noqa: B023
        assert ours is not one


def test_late_classes_pickle_before_and_after_their_first_use() -> None:
    empty: Any = object.__new__(Point)
    empty.__setstate__([3, 4])
    assert empty == POINT(3, 4)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        for value in (POINT(1), COUNTER([1])):
            assert pickle.loads(pickle.dumps(value, protocol)) == value


def test_many_threads_may_use_a_class_first() -> None:
    for _ in range(20):
        cls = derived(LATE, frozen=True)
        found: list[Any] = []
        at_once = threading.Barrier(8)

        def use(cls: Any = cls, found: list[Any] = found, at_once: threading.Barrier = at_once) -> None:
            at_once.wait()
            value = cls(1, third=2.5)
            found.append((value == cls(1, "another", 2.5), hash(value) == hash(cls(1, third=2.5)), repr(value)))

        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        assert len(set(found)) == 1


def test_a_wrong_definition_is_refused_at_the_first_use_each_time() -> None:
    @LATE(slots=True)
    class Wrong:
        first: list[int] = []  # noqa: RUF012

    for _ in range(2):
        with pytest.raises(ValueError, match="mutable default"):  # words: neither is an error with a kind
            Wrong()


def test_a_definition_whose_fields_are_not_its_slots_is_refused() -> None:
    @LATE(slots=True)
    class Wrong:
        first: ClassVariable = 1  # type: ignore[name-defined]  # noqa: F821  it begins as the name of `ClassVar` does

    with pytest.raises(TypeError, match="has the slots"):  # words: neither is an error with a kind
        Wrong()


@pytest.mark.parametrize("options", [{"slots": False}, {"slots": True, "weakref_slot": True}])
def test_classes_without_slots_and_rare_options_are_left_to_the_standard_library(options: dict[str, bool]) -> None:
    with pytest.raises(TypeError, match="slots=True"):  # words: neither is an error with a kind
        LATE(**options)


def test_all_dataclasses_of_the_package_are_late_and_well_defined() -> None:
    for info in pkgutil.walk_packages(icechunk.__path__, "icechunk."):
        if info.name == "icechunk.adapters.zarr_url" and not importlib.util.find_spec("zarr.abc.url_pipeline"):
            continue  # the zarr that is installed knows no URL pipelines
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    checked = 0
    for name, module in sorted(sys.modules.items()):
        if not name.startswith("icechunk."):
            continue
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == name and dataclasses.is_dataclass(cls):
                made = list(inspect.signature(cls).parameters)
                if (
                    getattr(cls.__init__, "__code__", None) and cls.__init__.__code__.co_filename == "<string>"
                ):  # not the definition's own
                    known = [found for found in dataclasses.fields(cls) if found.init]
                    assert made == [found.name for found in sorted(known, key=lambda found: bool(found.kw_only))], cls
                checked += 1
    assert checked > 200


def test_no_class_with_slots_takes_the_decorator_of_the_standard_library() -> None:
    package = Path(icechunk.__file__).parent
    eager = [
        path.relative_to(package).as_posix()
        for path in sorted(package.rglob("*.py"))
        if "slots=True" in (text := path.read_text("utf-8")) and "dataclasses import dataclass" in text
    ]
    assert eager == ["runtime/late_dataclass.py"]
