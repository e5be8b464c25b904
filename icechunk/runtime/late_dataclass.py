"""A `dataclass` decorator whose classes get their methods when the first of them is used.

The standard library compiles about five methods of a dataclass when it defines it, which takes half a millisecond. This
package has hundreds of dataclasses, of which a program uses a few dozen: compiling all of them took 40 % of the time
from the start of a process to an open repository. Here a class gets its slots at once, and a placeholder for each
attribute that the standard library's decorator adds. The first look-up of a placeholder lets that decorator make the
attribute, and it replaces the placeholder: from then on it is the one that the standard library makes. The attributes
that make and read instances are made together, and those that compare, hash and show them together. A method of such a
class names its class in ``super(…)``: without arguments it would mean the class before the slots were made.

For type checkers this is the decorator of the standard library. `dataclasses.field`, ``fields``, ``replace`` and the
rest work as they do there. An error in a definition, such as a field without a default after one with a default, is
raised when the class is first used.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

__all__ = ["dataclass"]

_Class = TypeVar("_Class", bound=type)

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
_COMPARING: Final = {"__hash__", "__dataclass_params__", *_OPTIONAL["repr"], *_OPTIONAL["eq"], *_OPTIONAL["order"]}
"""The attributes that are made apart: most values are made and read, few are compared or shown.

The parameters are with them because they are those of all attributes.
"""
_NOT_COMPARING: Final = {"repr": False, "eq": False, "order": False}
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
            compares = wanted in _COMPARING
            needed = options if compares else options | _NOT_COMPARING
            made = vars(dataclasses.dataclass(slots=True, **needed)(_class_like(cls, definition)))
            if made["__slots__"] != slots_kept:
                raise TypeError(f"{cls.__qualname__} has the slots {slots_kept}, its fields are {made['__slots__']}")
            for name in placeholders:
                if (name in _COMPARING) == compares:
                    setattr(late, name, made[name])
            return made

        names = [name for name in added if name == "__init__" or name not in definition]
        if "eq" in chosen and "frozen" in chosen and definition.get("__hash__") is None:
            names.append("__hash__")
        placeholders = {name: _Placeholder(name, complete) for name in names}
        inherited = {name for base in cls.__mro__[1:] for name in getattr(base, "__slots__", ())}
        fields = [name for name, kind in cls.__annotations__.items() if not kind.startswith(_NO_FIELDS)]
        kept = {name: value for name, value in definition.items() if name not in fields}
        slots_kept = tuple(name for name in fields if name not in inherited)
        late = _class_like(cls, kept | placeholders | {"__slots__": slots_kept})
        return late

    return decorate


def _class_like(cls: _Class, namespace: dict[str, Any]) -> _Class:
    """A class of the same name and bases, with other attributes."""
    made = type(cls)(cls.__name__, cls.__bases__, dict(namespace))
    made.__qualname__ = cls.__qualname__
    return made


if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    dataclass = _late_dataclass
