"""Filters of the package's log records, written as the directives that the official library takes.

Everything is logged through the standard library's `logging`, below the logger ``icechunk``: an application that
configures logging itself needs nothing from here. Importing the package configures nothing, unless the environment
asks for it with ``ICECHUNK_LOG``; until then warnings and errors reach standard error the way `logging` shows those of
any library.

A filter is a comma-separated list of directives: a level (``warn``), or a target and a level
(``icechunk.log=debug``; the official spelling ``icechunk::log`` is the same). The most specific target decides.
Levels are off, error, warn, info, debug and trace, or 0 to 5. Targets outside of this package have no effect: other
libraries' debug records may hold credentials, those of this package do not.

ICECHUNK_LOG
    The filter; ``warn`` where it is not set.
ICECHUNK_LOG_TO_STDOUT
    Write to standard output instead of standard error, where set and not ``0`` or ``false``.
ICECHUNK_NO_LOGS
    Importing the package does not look at ``ICECHUNK_LOG``, where this is set.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Mapping
from typing import Final, TextIO

from icechunk.errors import ErrorKind, InvalidInputError

__all__ = ["initialize_logs", "parse_filter", "set_logs_filter", "shutdown_telemetry"]

ROOT: Final = "icechunk"
_TRACE: Final = 5
_OFF: Final = logging.CRITICAL + 10
_LEVELS: Final = {
    "off": _OFF,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": _TRACE,
    **dict(zip("012345", (_OFF, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG, _TRACE), strict=True)),
}
_DEFAULT_FILTER: Final = "warn"
_FORMAT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class _Governed:
    """Levels that this module has set, and resets when the filter changes."""

    def __init__(self) -> None:
        self.handler: _LastResort | None = None
        self.loggers: set[str] = set()


class _LastResort(logging.Handler):
    """Shows records if the application has no handler of its own.

    It looks up the stream when it writes, so that a redirected one is found.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return
        try:
            stream = self._stream()
            stream.write(self.format(record) + "\n")
            stream.flush()
        except Exception:
            self.handleError(record)

    def _stream(self) -> TextIO:
        to_stdout = os.environ.get("ICECHUNK_LOG_TO_STDOUT", "").lower() not in ("", "0", "false")
        return sys.stdout if to_stdout else sys.stderr


_lock = threading.Lock()
_governed = _Governed()


def initialize_logs() -> None:
    """Show log records by the environment variables (see the module). Calling it again reads them again."""
    set_logs_filter(None)


def set_logs_filter(log_filter_directive: str | None) -> None:
    """Show those log records that a filter lets through, from now on.

    Parameters
    ----------
    log_filter_directive
        Such as ``"debug"`` or ``"icechunk.log=debug,warn"``; None: the value of ``ICECHUNK_LOG``. An invalid directive
        is reported on standard error and left out; the others hold.

    Raises
    ------
    TypeError
        It is neither text nor None.
    """
    if log_filter_directive is not None and not isinstance(log_filter_directive, str):
        raise TypeError(f"log_filter_directive must be text or None, not {type(log_filter_directive).__name__}")
    directive = log_filter_directive
    if directive is None:
        directive = os.environ.get("ICECHUNK_LOG") or _DEFAULT_FILTER
    for target in _misspelt(directive):
        print(
            f"WARNING: Did you mean {ROOT!r} instead of {target!r}? It governs no record of this package",
            file=sys.stderr,
        )
    levels, refused = parse_filter(directive)
    for part, reason in refused:
        if not _is_of_others(part):
            print(f"icechunk: log directive {part!r} is ignored: {reason}", file=sys.stderr)
    _apply(levels)


def shutdown_telemetry() -> None:
    """Write out the records that are logged and not written yet.

    The official library ends its export of traces here; this package exports none.
    """
    with _lock:
        if _governed.handler is not None:
            _governed.handler.flush()


def parse_filter(directives: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The levels of loggers that a filter asks for, and its parts that are no directives, each with the reason.

    Names of loggers begin with ``icechunk``, which is always among them: it shows errors where no directive is about
    it.
    """
    levels: dict[str, int] = {}
    overall = logging.ERROR
    refused = []
    for part in (part.strip() for part in directives.split(",")):
        if not part:
            continue
        target, equals, level = part.rpartition("=")
        try:
            if equals:
                _keep(levels, _logger_name(target), _level(level))
            elif part.lower() in _LEVELS:
                overall = _level(part)
            else:
                _keep(levels, _logger_name(part), _TRACE)
        except InvalidInputError as error:
            refused.append((part, error.message))
    return {ROOT: overall, **levels}, refused


def _misspelt(directives: str) -> list[str]:
    """Targets that look as if the name of this package was meant."""
    import difflib  # here, because importing the package rarely needs it

    names = [_first_name(part) for part in directives.split(",")]
    return [name for name in names if name != ROOT and difflib.get_close_matches(name, [ROOT], cutoff=0.8)]


def _is_of_others(directive: str) -> bool:
    """Whether it is about another package, with ``target:level`` for ``target=level``: neither has an effect here."""
    name = _first_name(directive)
    return ":" in directive and name.isidentifier() and name != ROOT


def _first_name(directive: str) -> str:
    """The text before the first separator: ``icechunk`` of ``icechunk::log=debug``."""
    return re.split("[.:=]", directive.strip(), maxsplit=1)[0]


def _keep(levels: dict[str, int], name: str, level: int) -> None:
    if name == ROOT or name.startswith(f"{ROOT}."):
        levels[name] = level


def _level(text: str) -> int:
    found = _LEVELS.get(text.strip().lower())
    if found is None:
        raise InvalidInputError(
            f"error parsing level filter: {text!r} is none of off, error, warn, info, debug and trace, or 0 to 5",
            ErrorKind.INVALID_SETTING,
        )
    return found


def _logger_name(target: str) -> str:
    name = target.strip().replace("::", ".")
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise InvalidInputError(
            f"{target!r} names no module; write for example icechunk.log=debug", ErrorKind.INVALID_SETTING
        )
    return name


def _apply(levels: Mapping[str, int]) -> None:
    with _lock:
        for name in _governed.loggers - set(levels):
            logging.getLogger(name).setLevel(logging.NOTSET)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        _governed.loggers = set(levels)
        if _governed.handler is None:
            _governed.handler = _LastResort()
            _governed.handler.setFormatter(logging.Formatter(_FORMAT))
            logging.getLogger(ROOT).addHandler(_governed.handler)


def initialize_on_import() -> None:
    """Called on import: does nothing unless the environment names a filter and does not forbid it."""
    if os.environ.get("ICECHUNK_LOG") and "ICECHUNK_NO_LOGS" not in os.environ:
        initialize_logs()
