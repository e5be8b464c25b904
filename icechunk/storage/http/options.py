"""Options of the HTTP client, by the official names, and the reader of web servers that they describe."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Final

from icechunk.config import StorageSettings, StorageTimeoutSettings
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.clock import Sources
from icechunk.storage.http.reading import HttpReader
from icechunk.storage.retry import Limits, limits_of

__all__ = ["check_options", "reader_maker"]

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|h)?")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, None: 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_USED: Final = (
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "proxy_url",
    "read_timeout",
    "timeout",
    "user_agent",
)
# Options that tune the official library's HTTP client, and have no effect on ours.
_IGNORED: Final = frozenset(
    {
        "default_content_type",
        "http1_only",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "http2_keep_alive_while_idle",
        "http2_max_frame_size",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "randomize_addresses",
    }
)


def check_options(options: Mapping[str, str]) -> None:
    """Refuse names that are none of the options', in lower case.

    Raises
    ------
    InvalidInputError
        Kind ``storage-config``.
    """
    unknown = sorted(set(options) - set(_USED) - _IGNORED)
    if unknown:
        raise InvalidInputError(
            f"unknown options {unknown} of a web server; the options are {list(_USED)}", ErrorKind.STORAGE_CONFIG
        )


def reader_maker(
    options: Mapping[str, str],
    headers: Mapping[str, str],
    settings: StorageSettings | None,
    sources: Sources,
    *,
    serves_ranges: bool,
) -> Callable[[], HttpReader]:
    """A function that makes a reader, on the event loop that calls it.

    Parameters
    ----------
    options
        As `check_options` accepts them; timeouts that the settings have come before those here.
    headers, settings, sources, serves_ranges
        As `HttpReader` and `limits_of` take them.

    Raises
    ------
    InvalidInputError
        A timeout that is none (kind ``storage-config``).
    """
    sent = dict(headers)
    if "user_agent" in options and not any(name.lower() == "user-agent" for name in sent):
        sent["user-agent"] = options["user_agent"]
    return partial(
        HttpReader,
        sent,
        _limits(settings, options),
        sources,
        serves_ranges=serves_ranges,
        proxy=options.get("proxy_url"),
        tls=_any_certificate if options.get("allow_invalid_certificates", "false").lower() == "true" else None,
    )


def _any_certificate() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _limits(settings: StorageSettings | None, options: Mapping[str, str]) -> Limits:
    found = limits_of(settings)
    given = (None if settings is None else settings.timeouts) or StorageTimeoutSettings()
    connect_s = _seconds(options, "connect_timeout") if given.connect_timeout_ms is None else None
    read_s = _seconds(options, "read_timeout") if given.read_timeout_ms is None else None
    attempt_s = _seconds(options, "timeout") if given.operation_attempt_timeout_ms is None else None
    return replace(
        found,
        connect_s=connect_s or found.connect_s,
        read_s=read_s or found.read_s,
        attempt_s=found.attempt_s if attempt_s is None else attempt_s,
    )


def _seconds(options: Mapping[str, str], name: str) -> float | None:
    if name not in options:
        return None
    match = _DURATION.fullmatch(options[name].strip())
    if match is None:
        raise InvalidInputError(
            f"bad option {name}={options[name]!r}: durations are like 30s, 500ms or 2m", ErrorKind.STORAGE_CONFIG
        )
    return float(match[1]) * _SECONDS[match[2]]
