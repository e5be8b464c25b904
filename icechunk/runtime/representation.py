"""The base of the public value classes: checked assignments, and representations that never show a secret.

A settings class is a dataclass over `Setting`: every assignment, at construction and later, goes through the check that
follows from the field's annotation (`checks`). Settings compare by value and, being mutable, have no hash; unlike the
official library's they pickle. Tagged unions (`VariantMeta`, `TupleVariant`) and enumerations (`IntLikeEnum`) behave as
user code sees them in the official library.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import json
import re
from abc import ABCMeta
from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import Enum
from pathlib import PurePath
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit, urlunsplit

from icechunk.runtime.checks import checks_of
from icechunk.runtime.late_dataclass import dataclass

__all__ = [
    "Described",
    "IntLikeEnum",
    "Represented",
    "Setting",
    "TupleVariant",
    "VariantMeta",
    "code",
    "effective_default",
    "fields_html",
    "hidden",
    "redacted_mapping",
    "redacted_url",
    "snake_case",
    "unset",
]

_MASK: Final = "****"
_SECRET_KEY: Final = re.compile(r"auth|cookie|cred|key|pass|sas|secret|sig|token", re.IGNORECASE)


def unset(effective: Any = None) -> Any:
    """A dataclass field that is None by default, which means ``effective``: shown by ``str`` in its place.

    A callable, such as a class of settings, makes the value when it is shown.
    """
    return dataclasses.field(default=None, metadata={"effective": effective})


def effective_default(field: dataclasses.Field[Any]) -> Any:
    """The value that None stands for in a field; None where it stands for itself."""
    effective = field.metadata.get("effective")
    return effective() if callable(effective) else effective


def snake_case(name: str) -> str:
    """A class's name as functions and stored tags spell it."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@functools.cache
def hidden(kind: str = "") -> Any:
    """A placeholder for a secret in a representation."""
    return _Verbatim(f"<{kind}>" if kind else _MASK)


@dataclass(frozen=True, slots=True)
class _Verbatim:
    text: str

    def __repr__(self) -> str:
        return self.text


def redacted_url(url: str) -> str:
    """The URL without user, password, query and fragment, any of which may carry a secret."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")
    except ValueError:
        return _MASK
    netloc = f"{_MASK}@{host[2]}" if host[1] else host[2]
    shown = urlunsplit((parts.scheme, netloc, parts.path, _MASK if parts.query else "", ""))
    if not netloc and url.startswith(f"{parts.scheme}:///") and not shown.startswith(f"{parts.scheme}:///"):
        # urlunsplit drops the slashes of a host that is missing.
        shown = shown.replace(":", "://", 1)
    return shown


def redacted_mapping(options: Mapping[str, str] | None, *, everything: bool = False) -> Any:
    """Options with the values masked whose keys sound secret (or all of them)."""
    if options is None:
        return None
    return {k: _MASK if everything or _SECRET_KEY.search(k) else redacted_url(v) for k, v in options.items()}


class Represented:
    """Mixin: ``repr``, ``str`` and ``_repr_html_`` from `_shown`.

    Subclasses may override `_shown`, and set ``_public_name`` if the public name of a class differs from the one that
    follows from its module. The ``repr`` of a value that users construct is the call that makes it; values that a
    repository returns are `Described`.
    """

    __slots__ = ()
    _public_name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_public_name" not in vars(cls):
            cls._public_name = ".".join([*cls.__module__.split(".")[:2], cls.__qualname__])

    def _shown(self) -> list[tuple[str, Any, Any]]:
        """(name, value, effective default) of the fields to show, in order."""
        rows = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            if not f.repr:
                continue
            value = getattr(self, f.name)
            if f.metadata.get("secret") and value is not None:
                value = hidden()
            rows.append((f.name, value, effective_default(f)))
        return rows

    def __repr__(self) -> str:
        rows = self._shown()
        if not rows:
            return f"{self._public_name}()"
        body = "".join(f"{name}={code(value)},\n" for name, value, _ in rows)
        return f"{self._public_name}(\n{_indented(body)})"

    def __str__(self) -> str:
        lines = [f"<{self._public_name}>"]
        for name, value, effective in self._shown():
            shown = effective if value is None and effective is not None else value
            mark = " (default)" if value is None and effective is not None else ""
            if isinstance(shown, Represented) and "\n" in (block := str(shown)):
                lines.append(f"{name}:{mark}\n{_indented(block)}".rstrip("\n"))
            else:
                lines.append(f"{name}: {self._word(shown)}{mark}")
        return "\n".join(lines) + "\n"

    def _word(self, value: Any) -> str:
        """A field's value in ``str`` and HTML."""
        return code(value)

    def _repr_html_(self) -> str:
        return _HTML_STYLE + self._html()

    def _html(self) -> str:
        rows = [f'<div class="icechunk-header">{html.escape(self._public_name)}</div>']
        for name, value, effective in self._shown():
            shown = effective if value is None and effective is not None else value
            mark = " (default)" if value is None and effective is not None else ""
            if isinstance(shown, Represented):
                rows.append(f"<details><summary>{html.escape(name)}{mark}</summary>{shown._html()}</details>")
            else:
                rows.append(
                    f'<div class="icechunk-field"><span class="icechunk-field-name">{html.escape(name)}:</span> '
                    f'<span class="icechunk-field-value">{html.escape(self._word(shown))}{mark}</span></div>'
                )
        return '<div class="icechunk-repr">' + "\n".join(rows) + "</div>\n"


class Described(Represented):
    """Mixin: both ``repr`` and ``str`` are a description, since no call makes such a value."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    def _word(self, value: Any) -> str:
        match value:
            case Enum():
                return "".join(word[:1].upper() + word[1:] for word in value.name.split("_"))
            case str() if value.isprintable():
                return value
            case _:
                return code(value)


_HTML_STYLE: Final = (
    "<style>.icechunk-repr{line-height:1.6;max-width:700px}"
    ".icechunk-repr .icechunk-header{font-weight:500;border-bottom:1px solid #8888;margin-bottom:4px}"
    ".icechunk-repr .icechunk-field-name,.icechunk-repr summary{font-weight:500;opacity:.7}"
    ".icechunk-repr details>.icechunk-repr{margin-left:12px}</style>\n"
)


def fields_html(title: str, fields: Iterable[tuple[str, object]]) -> str:
    """Names and values under a title, for ``_repr_html_``; a `Represented` value can be folded out.

    Everything is escaped.
    """
    rows = [f'<div class="icechunk-header">{html.escape(title)}</div>']
    for name, value in fields:
        if isinstance(value, Represented):
            rows.append(f"<details><summary>{html.escape(name)}</summary>{value._html()}</details>")
        else:
            rows.append(
                f'<div class="icechunk-field"><span class="icechunk-field-name">{html.escape(name)}:</span> '
                f'<span class="icechunk-field-value">{html.escape(str(value))}</span></div>'
            )
    return _HTML_STYLE + '<div class="icechunk-repr">' + "\n".join(rows) + "</div>\n"


def _indented(block: str) -> str:
    return "".join(f"    {line}\n" for line in block.splitlines())


def code(value: Any) -> str:
    """A value as the source text that makes it, as far as there is one."""
    match value:
        case Represented() | _Verbatim():
            return repr(value).rstrip("\n")
        case Enum():
            return f"icechunk.{type(value).__name__}.{value.name}"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case PurePath():
            return json.dumps(str(value), ensure_ascii=False)
        case datetime():
            return value.isoformat()
        case Mapping():
            if not value:
                return "{}"
            return "{\n" + _indented("".join(f"{code(k)}: {code(v)},\n" for k, v in value.items())) + "}"
        case list() | tuple() | set() | frozenset():
            items = sorted(value) if isinstance(value, set | frozenset) else value
            return "[" + ", ".join(code(v) for v in items) + "]"
        case _:
            return repr(value)


# --- base classes ---------------------------------------------------------------------------------------------


class Setting(Represented):
    """Base of the mutable settings dataclasses: assignments are checked, attributes cannot be deleted."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        check = checks_of(type(self)).get(name)
        if check is not None:
            value = check(f"{type(self).__name__}.{name}", value)
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be deleted; assign None to unset it")


class VariantMeta(ABCMeta):
    """Metaclass of tagged unions: nested classes count as subclasses, and the union itself has no instances.

    ``isinstance(S3Credentials.Anonymous(), S3Credentials)`` holds, as with the official library, while type
    checkers see the nested classes as plain ones (which is how the official stubs declare them).
    """

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(name, bases, namespace, **kwargs)
        for member in namespace.values():
            if isinstance(member, type):
                cls.register(member)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"cannot create {cls.__name__!r} instances; use one of its nested classes")


class TupleVariant(Represented):
    """Base of union members with positional fields: ``_0``, ``len``, indexing and matching by position.

    Members are frozen dataclasses; their fields are checked as those of settings.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, check in checks_of(type(self)).items():
            object.__setattr__(self, name, check(f"{type(self).__qualname__}.{name}", getattr(self, name)))

    def _fields(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self))  # type: ignore[arg-type]

    @property
    def _0(self) -> Any:
        return self._positional(0)

    @property
    def _1(self) -> Any:
        return self._positional(1)

    def _positional(self, index: int) -> Any:
        fields = self._fields()
        if index >= len(fields):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute '_{index}'")
        return fields[index]

    def __len__(self) -> int:
        return len(self._fields())

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: int) -> Any:
        return self._fields()[index]


class IntLikeEnum(Enum):
    """Enumeration whose members equal their number, as the official library's do; hashable and picklable besides."""

    def __int__(self) -> int:
        return int(self.value)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Enum):
            return self is other
        return self.value == other if isinstance(other, int) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __str__(self) -> str:
        return repr(self)
