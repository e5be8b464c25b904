"""What a repository is at the moment: format version, availability, feature flags; and who asks."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.values import Described, IntLikeEnum, Represented, aware, boolean, instance_of, optional, text, unsigned

__all__ = ["Attribution", "FeatureFlag", "RepoAvailability", "RepoStatus", "SessionMode", "SpecVersion"]


class SpecVersion(IntLikeEnum):
    """Version of the on-disk format."""

    v1 = 1
    v2 = 2

    @staticmethod
    def current() -> SpecVersion:
        """The newest version."""
        return SpecVersion.v2

    def __eq__(self, other: object, /) -> bool:
        return IntLikeEnum.__eq__(self, other)

    def __hash__(self) -> int:
        return hash(self.value)

    def __lt__(self, other: object, /) -> bool:
        return self.value < int(other) if isinstance(other, int | SpecVersion) else NotImplemented

    def __le__(self, other: object, /) -> bool:
        return self.value <= int(other) if isinstance(other, int | SpecVersion) else NotImplemented

    def __gt__(self, other: object, /) -> bool:
        return self.value > int(other) if isinstance(other, int | SpecVersion) else NotImplemented

    def __ge__(self, other: object, /) -> bool:
        return self.value >= int(other) if isinstance(other, int | SpecVersion) else NotImplemented

    def __repr__(self) -> str:
        return f"SpecVersion.{self.name}" + (" (current)" if self is SpecVersion.v2 else "")


class SessionMode(IntLikeEnum):
    """What a session may do."""

    readonly = 0
    writable = 1
    rearrange = 2

    # The official library compares these by identity only.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return hash(self.value)


class RepoAvailability(IntLikeEnum):
    """What the repository's owner allows."""

    online = 0
    read_only = 1


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, repr=False)
class RepoStatus(Described):
    """Availability of a repository, since when and why."""

    _public_name: ClassVar[str] = "icechunk.repository.RepoStatus"

    availability: RepoAvailability
    set_at: datetime = None  # type: ignore[assignment]
    """With a time zone; now, where None is given."""
    limited_availability_reason: str | None = None
    """Shown to those who are refused."""

    def __post_init__(self) -> None:
        instance_of(RepoAvailability)("RepoStatus.availability", self.availability)
        optional(text)("RepoStatus.limited_availability_reason", self.limited_availability_reason)
        set_at: Any = self.set_at
        object.__setattr__(self, "set_at", _now() if set_at is None else aware("RepoStatus.set_at", set_at))


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class FeatureFlag(Described):
    """A feature that the repository's owner can switch off."""

    _public_name: ClassVar[str] = "icechunk.config.FeatureFlag"

    id: int
    """Number on storage."""
    name: str
    default_enabled: bool
    setting: bool | None = None
    """What the owner says; None: the default holds."""
    enabled: bool = field(init=False)
    """What holds."""

    def __post_init__(self) -> None:
        unsigned(16)("FeatureFlag.id", self.id)
        optional(boolean)("FeatureFlag.setting", self.setting)
        object.__setattr__(self, "enabled", self.default_enabled if self.setting is None else self.setting)


_MAX_ATTRIBUTION_BYTES: Final = 128
_TOKEN: Final = r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+"
_CLIENT: Final = re.compile(f"{_TOKEN}(/{_TOKEN})?")


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class Attribution(Represented):
    """Who works with the repository; sent in the ``User-Agent`` of every request to a store, for its logs."""

    _public_name: ClassVar[str] = "icechunk.Attribution"

    client: str | None = None
    """Program, ``name`` or ``name/version``."""
    workload: str | None = None
    """Job, in printable ASCII without any of ``"();=\\``."""
    principal: str | None = None
    """Person or service, in printable ASCII without any of ``"();=\\``."""

    def __post_init__(self) -> None:
        for name in ("client", "workload", "principal"):
            value = getattr(self, name)
            if value is None:
                continue
            text(f"Attribution.{name}", value)
            if len(value.encode(errors="surrogatepass")) > _MAX_ATTRIBUTION_BYTES:
                raise _refused(name, f"is longer than {_MAX_ATTRIBUTION_BYTES} bytes")
            if name == "client" and not _CLIENT.fullmatch(value):
                raise _refused(name, f"must be `name` or `name/version` in token characters, got {json.dumps(value)}")
            if name != "client":
                for char in value:
                    if not " " <= char <= "~" or char in '"();=\\':
                        raise _refused(name, f"contains the forbidden character {char!r}")

    def user_agent(self, program: str) -> str:
        """The header of requests by ``program``: ``client program (workload=…; principal=…)``."""
        about = "; ".join(
            f"{name}={value}"
            for name, value in (("workload", self.workload), ("principal", self.principal))
            if value is not None
        )
        return " ".join(part for part in (self.client, program, f"({about})" if about else None) if part)


def _refused(name: str, reason: str) -> InvalidInputError:
    return InvalidInputError(f"attribution `{name}` {reason}", ErrorKind.INVALID_SETTING)
