"""A `dataclass` decorator whose classes get their methods when the first of them is used.

The standard library compiles about five methods of a dataclass when it defines it, which takes half a millisecond. This
package has hundreds of dataclasses, of which a program uses a few dozen: compiling all of them took 40 % of the time
from the start of a process to an open repository. Here a class gets its slots at once, and a placeholder for each
attribute that the standard library's decorator adds. The first look-up of a placeholder lets that decorator make the
attribute, and it replaces the placeholder: from then on it is the one that the standard library makes. The attributes
that compare, hash and show instances are made together. So are the others, except two that most programs need alone:
the fields, and ``__init__`` of a class of usual fields. `_init_of` compiles that one in a quarter of the time, since
the standard library compiles three methods for a frozen class, and makes the class again. Compiling still takes longer
than all else, and most classes that one operation uses have a few instances: the first ones are made without
(`_Initializer.assign`). A method of such a class names its class in ``super(…)``: without arguments it would mean the
class before the slots were made.

For type checkers this is the decorator of the standard library. `dataclasses.field`, ``fields``, ``replace`` and the
rest work as they do there; `replace` of this module does without the fields, for what a program does first. An error in
a definition, such as a field without a default after one with a default, is raised when the class is first used.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

__all__ = ["dataclass", "replace"]

_Class = TypeVar("_Class", bound=type)
_Instance = TypeVar("_Instance")

_NO_FIELDS: Final = ("ClassVar", "InitVar", "KW_ONLY")
"""The beginnings of annotations that make no attribute of an instance."""
_ALWAYS: Final = ("__init__", "__dataclass_fields__", "__dataclass_params__")
_REPLACE: Final = ("__replace__",) if sys.version_info >= (3, 13) else ()
_OPTIONAL: Final = {
    "repr": ("__repr__",),
    "eq": ("__eq__",),
    "order": ("__lt__", "__le__", "__gt__", "__ge__"),
    "frozen": ("__setattr__", "__delattr__", "__getstate__", "__setstate__"),
    "kw_only": (),
    "match_args": ("__match_args__",),
}
"""The attributes that each option adds."""
_INIT: Final = ("__init__", "__match_args__")
"""The attributes that `_init_of` makes."""
_COMPARING: Final = {"__hash__", "__dataclass_params__", *_OPTIONAL["repr"], *_OPTIONAL["eq"], *_OPTIONAL["order"]}
"""The attributes that are made apart: most values are made and read, few are compared or shown.

The parameters are with them because they are those of all attributes.
"""
_NOT_COMPARING: Final = {"repr": False, "eq": False, "order": False}
_FIELDS: Final = "__dataclass_fields__"
_ALL_BUT_FIELDS: Final = {**_NOT_COMPARING, "init": False, "frozen": False, "match_args": False}
"""Options that make fields alone, as `dataclasses.replace` needs them. They are not for classes that inherit fields: a
frozen one cannot inherit as if it were not frozen."""
_FIRST_CALLS: Final = 8
"""Instances that a class has before its constructor is compiled, which takes as long as a few dozen without."""
_DEFAULTS: Final = {"repr": True, "eq": True, "match_args": True}


class _Placeholder:
    """An attribute of a class until its first look-up."""

    __slots__ = ("_complete", "_name")

    def __init__(self, name: str, complete: Callable[[str], Mapping[str, Any]]) -> None:
        self._name = name
        self._complete = complete

    def __get__(self, instance: object, owner: type) -> Any:
        value = self._complete(self._name)[self._name]
        return value.__get__(instance, owner) if hasattr(type(value), "__get__") else value


class _FirstInit(_Placeholder):
    """``__init__`` of a class until it is compiled: when the class is asked for it, or has had a few instances.

    Parameters
    ----------
    initializer
        Makes the values that the class needs for its first instances; None: they need the compiled one.
    """

    __slots__ = ("_calls_left", "_initializer", "_make")

    def __init__(
        self, complete: Callable[[str], Mapping[str, Any]], initializer: Callable[[], _Initializer | None]
    ) -> None:
        super().__init__("__init__", complete)
        self._make = initializer
        self._initializer: _Initializer | None = None
        self._calls_left = _FIRST_CALLS

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is not None and self._calls_left:
            self._initializer = self._initializer or self._make()
            if self._initializer is not None:
                self._calls_left -= 1
                return partial(self._call, self._initializer, instance, owner)
        return super().__get__(instance, owner)

    def _call(self, initializer: _Initializer, instance: object, owner: type, /, *args: Any, **named: Any) -> None:
        if not initializer.assign(instance, args, named):
            # Its error names what is wrong with the arguments.
            super().__get__(instance, owner)(*args, **named)


def _late_dataclass(*, slots: bool, **options: bool) -> Callable[[_Class], _Class]:
    """The decorator of the standard library, for classes with slots.

    Parameters
    ----------
    slots
        True. A class without slots takes the decorator of the standard library.
    options
        ``repr``, ``eq``, ``order``, ``frozen``, ``kw_only`` and ``match_args``, with the defaults of the standard
        library.
    """
    if not slots or options.keys() - _OPTIONAL.keys():
        raise TypeError(f"this decorator takes slots=True, and of the other options {', '.join(_OPTIONAL)}")
    chosen = [name for name, on in (_DEFAULTS | options).items() if on]
    added = [*_ALWAYS, *_REPLACE, *(attribute for name in chosen for attribute in _OPTIONAL[name])]

    def decorate(cls: _Class) -> _Class:
        definition = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}

        def complete(wanted: str) -> Mapping[str, Any]:
            # The same definition gives the same attributes: two threads that come here at once need no lock.
            if wanted in _INIT and (own := _init_of(cls, **options)) is not None:
                for name in placeholders.keys() & own.keys():
                    setattr(late, name, own[name])
                return own
            if wanted in _COMPARING:
                left_out, group = {}, _COMPARING
            elif wanted == _FIELDS and not inherits:
                left_out, group = _ALL_BUT_FIELDS, {_FIELDS}
            else:
                left_out, group = _NOT_COMPARING, placeholders.keys() - _COMPARING
            made = vars(dataclasses.dataclass(slots=True, **options | left_out)(_class_like(cls, definition)))
            if made["__slots__"] != slots_kept:
                raise TypeError(f"{cls.__qualname__} has the slots {slots_kept}, its fields are {made['__slots__']}")
            for name in placeholders.keys() & group:
                # Some may have been made alone.
                if isinstance(vars(late)[name], _Placeholder):
                    setattr(late, name, made[name])
            return made

        inherits = any(_FIELDS in vars(base) for base in cls.__mro__[1:])
        names = [name for name in added if name == "__init__" or name not in definition]
        if "eq" in chosen and "frozen" in chosen and definition.get("__hash__") is None:
            names.append("__hash__")
        placeholders = {name: _Placeholder(name, complete) for name in names}
        placeholders["__init__"] = _FirstInit(complete, lambda: _initializer_of(cls, **options))
        inherited = {name for base in cls.__mro__[1:] for name in getattr(base, "__slots__", ())}
        fields = [name for name, kind in cls.__annotations__.items() if not kind.startswith(_NO_FIELDS)]
        kept = {name: value for name, value in definition.items() if name not in fields}
        slots_kept = tuple(name for name in fields if name not in inherited)
        late = _class_like(cls, kept | placeholders | {"__slots__": slots_kept})
        return late

    return decorate


class _Factory:
    """Default of a parameter whose field has a function that makes its value."""

    def __repr__(self) -> str:
        return "<factory>"


_FACTORY: Final = _Factory()


class _Initializer:
    """The work of ``__init__`` of a class of usual fields.

    Parameters
    ----------
    frozen
        Whether the class is.
    is_followed
        Whether ``__post_init__`` comes after.
    """

    def __init__(self, *, frozen: bool, is_followed: bool) -> None:
        self.frozen = frozen
        self.is_followed = is_followed
        self.kinds: dict[str, str] = {}
        """The annotation of each field, in the order in which they are assigned."""
        self.names: dict[bool, list[str]] = {False: [], True: []}
        """The parameters, by whether they are for keywords only."""
        self.defaults: dict[str, Any] = {}
        self.factories: dict[str, Callable[[], Any]] = {}

    def assign(self, instance: object, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
        """Do it; False: these are no arguments for it, and nothing was done."""
        values = dict(zip(self.names[False], args, strict=False))
        if len(args) > len(values) or not values.keys().isdisjoint(named):
            return False
        values |= named
        required = self.kinds.keys() - self.defaults.keys() - self.factories.keys()
        if not required <= values.keys() <= self.kinds.keys():
            return False
        set_value = object.__setattr__ if self.frozen else setattr
        for name in self.kinds:
            if name in values:
                value = values[name]
            elif name in self.factories:
                value = self.factories[name]()
            else:
                value = self.defaults[name]
            set_value(instance, name, value)
        if self.is_followed:
            instance.__post_init__()  # type: ignore[attr-defined]
        return True


def _initializer_of(cls: type, *, frozen: bool = False, kw_only: bool = False, **_: bool) -> _Initializer | None:
    """The work of the constructor of a class; parameters as the decorator has them.

    None: only the standard library knows, since the definition has an error, or fields that are rare, such as those
    that are not in ``__init__``, or that replace inherited ones.
    """
    if not vars(cls).keys().isdisjoint(("__init__", *(_OPTIONAL["frozen"] if frozen else ()))):
        return None
    found = _Initializer(frozen=frozen, is_followed=hasattr(cls, "__post_init__"))
    inherited: dict[str, Any] = {}
    for base in cls.__mro__[:0:-1]:
        if _FIELDS in vars(base):
            if frozen != ("__setattr__" in vars(base)):
                return None
            inherited.update(getattr(base, _FIELDS))
    if not inherited.keys().isdisjoint(cls.__annotations__):
        return None
    kinds = {name: str(field.type) for name, field in inherited.items()} | cls.__annotations__
    for name, kind in kinds.items():
        if kind == "ClassVar" or kind.startswith("ClassVar["):
            continue
        default: Any = inherited.get(name, getattr(cls, name, dataclasses.MISSING))
        field: Any = default if isinstance(default, dataclasses.Field) else dataclasses.field(default=default)
        named = kw_only if field.kw_only is dataclasses.MISSING else field.kw_only
        before = found.names[named]
        if field.default_factory is not dataclasses.MISSING:
            found.factories[name] = field.default_factory
        elif field.default is not dataclasses.MISSING:
            found.defaults[name] = field.default
        elif before and not named and (before[-1] in found.defaults or before[-1] in found.factories):
            return None
        is_usual = field.init and not hasattr(type(field.default), "__get__") and type(field.default).__hash__
        if kind.startswith(_NO_FIELDS) or name == "self" or name.startswith("_") or not is_usual:
            return None
        before.append(name)
        found.kinds[name] = kind
    return found


def _init_of(cls: type, *, match_args: bool = True, **options: bool) -> dict[str, Any] | None:
    """``__init__`` and ``__match_args__`` of a class; parameters, and None, as `_initializer_of` has them."""
    initializer = _initializer_of(cls, **options)
    if initializer is None:
        return None
    known: dict[str, Any] = {"_FACTORY": _FACTORY, "_set": object.__setattr__}
    texts: dict[str, str] = {}
    body = []
    for name in initializer.kinds:
        texts[name] = value = name
        if name in initializer.factories:
            known[f"_new_{name}"] = initializer.factories[name]
            texts[name], value = f"{name}=_FACTORY", f"_new_{name}() if {name} is _FACTORY else {name}"
        elif name in initializer.defaults:
            known[f"_default_{name}"] = initializer.defaults[name]
            texts[name] = f"{name}=_default_{name}"
        body.append(f"_set(self, {name!r}, {value})" if initializer.frozen else f"self.{name} = {value}")
    if initializer.is_followed:
        body.append("self.__post_init__()")
    positional, named = initializer.names[False], initializer.names[True]
    parameters = [texts[name] for name in positional], [texts[name] for name in named]
    listed = ["self", *parameters[0], *(["*", *parameters[1]] if named else [])]
    lines = [f"def make({', '.join(known)}):", f" def __init__({', '.join(listed)}):"]
    lines += [f"  {line}" for line in body or ["pass"]]
    made: dict[str, Any] = {}
    exec("\n".join([*lines, " return __init__"]), vars(sys.modules[cls.__module__]), made)
    init = made["make"](**known)
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__annotations__ = {name: initializer.kinds[name] for name in [*positional, *named]} | {"return": None}
    return {"__init__": init} | ({"__match_args__": tuple(positional)} if match_args else {})


def _class_like(cls: _Class, namespace: dict[str, Any]) -> _Class:
    """A class of the same name and bases, with other attributes."""
    made = type(cls)(cls.__name__, cls.__bases__, dict(namespace))
    made.__qualname__ = cls.__qualname__
    return made


_NAMES: Final[dict[type, tuple[str, ...]]] = {}
"""The fields of each class of which `replace` had an instance, inherited ones first."""


def replace(instance: _Instance, /, **changes: Any) -> _Instance:
    """As `dataclasses.replace`, without making the fields of the class, which takes a first call most of its time.

    Parameters
    ----------
    instance
        Of a late class whose fields are all in its constructor.
    changes
        New values by field.
    """
    cls = type(instance)
    names = _NAMES.get(cls)
    if names is None:
        names = tuple(name for base in reversed(cls.__mro__) for name in vars(base).get("__slots__", ()))
        _NAMES[cls] = names
    for name in names:
        if name not in changes:
            changes[name] = getattr(instance, name)
    return cls(**changes)


if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    dataclass = _late_dataclass
