"""The trace of a schedule, request by request: for people, for comparing, and for the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Request", "Trace"]


@dataclass(slots=True)
class Request:
    """One request, or one thing that befell a client."""

    sent_s: float
    client: str
    verb: str
    key: str
    detail: str = ""
    """Condition of a put, and a checksum of its bytes."""
    fault: str = ""
    data: bytes = b""
    """Bytes of a put."""
    executed_s: list[float] = field(default_factory=list)
    """Times at which the store executed it: usually one."""
    effects: list[str] = field(default_factory=list)
    """The effect of each execution."""
    answered_s: float | None = None
    answer: str = ""


class Trace:
    """All requests of a schedule, in the order in which they were sent."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def note(self, time_s: float, client: str, what: str, fault: str = "") -> None:
        """Something that is no request."""
        self.requests.append(Request(time_s, client, "note", what, fault=fault))

    @property
    def digest(self) -> str:
        """Equal for equal traces."""
        hashed = hashlib.sha256()
        for one in self.requests:
            hashed.update(repr((one.sent_s, one.client, one.verb, one.key, one.detail, one.fault)).encode())
            hashed.update(repr((one.executed_s, one.effects, one.answered_s, one.answer)).encode())
        return hashed.hexdigest()[:16]

    def lines(self) -> Iterator[str]:
        """One line for each event, by time: sent, executed, answered."""
        events: list[tuple[float, int, str]] = []
        for i, one in enumerate(self.requests):
            if one.verb == "note":
                events.append((one.sent_s, i, f"{one.client:>4}  {one.key}{_in_brackets(one.fault)}"))
                continue
            name = f"{one.verb.upper()} {short(one.key)}"
            detail = f" {one.detail}" if one.detail else ""
            events.append((one.sent_s, i, f"{one.client:>4}  {name}{detail}{_in_brackets(one.fault)}"))
            for at, effect in zip(one.executed_s, one.effects, strict=True):
                events.append((at, i, f"{'':4}    at the store: {name} of {one.client} → {effect}"))
            if one.answered_s is not None:
                events.append((one.answered_s, i, f"{one.client:>4}    {name} ← {one.answer}"))
        for at, i, line in sorted(events, key=lambda event: event[:2]):
            yield f"{_clock(at)} {f'#{i}':>5} {line}"


def _clock(seconds: float) -> str:
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    prefix = f"{int(days)}d " if days else ""
    return f"{prefix + f'{int(hours):02}:{int(minutes):02}:{rest:06.3f}':>17}"


def _in_brackets(fault: str) -> str:
    return f"   [{fault}]" if fault else ""


def short(key: str) -> str:
    """A key without what is the same in all keys of a schedule."""
    folder, slash, name = key.partition("/")
    if folder == "log" and len(name) > 28:
        return f"log/{name[:2]}…{name[24:]}"
    return f"{folder}{slash}{name}"
