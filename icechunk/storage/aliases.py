"""Repositories by alias: the file that the ``icechunk`` command keeps them in, shared with the official command.

It is ``icechunk/cli-config.yaml`` in the user's folder for configuration. Each alias has a tagged entry: where the
repository is (``!LocalFileSystem``, ``!S3``, ``!Tigris``, ``!GCS``, ``!Azure``), with which credentials it is reached,
and its configuration. It holds no secrets, unless static credentials are written into it by hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from icechunk.config import RepositoryConfig, S3Options, config_from_dict
from icechunk.config.serialise import Tag, config_tree
from icechunk.errors import ErrorKind, IcechunkError, InvalidInputError
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.constructors import (
    azure_storage,
    gcs_storage,
    local_filesystem_storage,
    s3_storage,
    tigris_storage,
)

__all__ = ["KINDS", "AliasError", "AliasedRepository", "Aliases", "aliases_path", "new_entry", "shown"]

KINDS: Final = ("Local", "S3", "Tigris", "GCS", "Azure")
"""Kinds that can be chosen interactively, in this order."""

_OPTIONS: Final = (
    "region",
    "endpoint_url",
    "anonymous",
    "allow_http",
    "force_path_style",
    "network_stream_timeout_seconds",
    "requester_pays",
)


class AliasError(InvalidInputError):
    """The file with the aliases cannot be read or written, or an alias is not in it; the message says which."""

    def __init__(self, message: str, kind: ErrorKind = ErrorKind.INVALID_SETTING) -> None:
        super().__init__(message, kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasedRepository:
    """A repository that has an alias."""

    storage: Any
    """Its location."""
    config: RepositoryConfig
    """Configuration to create and open it with."""


def aliases_path() -> Path:
    """The file with the aliases, whether it exists or not."""
    home = os.environ.get("XDG_CONFIG_HOME")
    if home and Path(home).is_absolute():
        return Path(home) / "icechunk" / "cli-config.yaml"
    if sys.platform == "win32" and os.environ.get("APPDATA"):
        return Path(os.environ["APPDATA"]) / "icechunk" / "cli-config.yaml"
    return Path.home() / ".config" / "icechunk" / "cli-config.yaml"


class Aliases:
    """The aliases in one file, as they were when it was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        from icechunk.config.yaml_text import load_yaml

        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise AliasError(f"Failed to read the config {self.path}: {error.strerror}") from error
        try:
            value = load_yaml(data)
        except ValueError as error:
            raise AliasError(f"The config {self.path} is not valid YAML ({error}); repair or remove it") from error
        repos = {} if value is None else value.get("repos") if isinstance(value, Mapping) else value
        if repos is not None and not isinstance(repos, Mapping):
            raise AliasError(f"The config {self.path} has no map of repositories under 'repos'; repair or remove it")
        return {str(alias): entry for alias, entry in (repos or {}).items()}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, alias: str) -> bool:
        return alias in self._entries

    def clear(self) -> None:
        """Drop all aliases (of this object, not of the file)."""
        self._entries.clear()

    def add(self, alias: str, entry: Tag) -> None:
        """Give a repository an alias."""
        self._entries[alias] = {entry.name: entry.value}

    def text(self, *, secrets: bool = False) -> str:
        """The file's contents; secrets are masked, unless it is for the file itself."""
        from icechunk.config.yaml_text import dump_yaml

        tagged = {alias: _tagged(entry) for alias, entry in self._entries.items()}
        return dump_yaml({"repos": tagged if secrets else _masked(tagged)})

    def save(self) -> None:
        """Replace the file as a whole; it is for its owner only."""
        import tempfile

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".cli-config-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(self.text(secrets=True))
                os.replace(name, self.path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            raise AliasError(f"Failed to write the config {self.path}: {error.strerror}") from error

    def find(self, alias: str) -> AliasedRepository:
        """The repository with an alias. Raises `AliasError` where there is none, or its entry cannot be understood."""
        entry = self._entries.get(alias)
        if entry is None:
            raise AliasError(
                f"Repository {shown(alias)} not found in config {self.path}: add it with `icechunk config add {alias}`"
            )
        try:
            (kind, value), *more = entry.items()
            if more:
                raise ValueError("more than one kind of storage")
            config = config_from_dict(value.get("config") or {})
            return AliasedRepository(storage=_storage(kind, value), config=config)
        except (IcechunkError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise AliasError(f"Repository {shown(alias)} cannot be used as {self.path} has it: {reason}") from error


def shown(alias: str) -> str:
    """An alias in a message, as the official command writes it."""
    return f'RepositoryAlias("{alias}")'


def new_entry(kind: str, answers: Mapping[str, str]) -> Tag:
    """The entry of a repository that a user described in answers, with credentials from the environment."""
    config = config_tree(RepositoryConfig())
    place = {"bucket": answers.get("bucket"), "prefix": answers.get("prefix") or None}
    match kind:
        case "Local":
            return Tag("LocalFileSystem", {"path": answers["path"], "config": config})
        case "S3" | "Tigris":
            options = S3Options(region=answers["region"], endpoint_url=answers.get("endpoint_url") or None)
            described = {name: getattr(options, name) for name in _OPTIONS} | {"checksum_algorithm": None}
            credentials: dict[str, Any] = {"s3_credential_type": "from_env"}
        case "GCS":
            described, credentials = {}, {"gcs_credential_type": "from_env"}
        case _:
            place = {name: answers[name] for name in ("account", "container", "prefix")}
            described, credentials = {}, {"az_credential_type": "from_env"}
    value = {"location": place, "object_store_config": described, "credentials": credentials, "config": config}
    return Tag(kind, value)


def _storage(kind: str, value: Mapping[str, Any]) -> Any:
    if kind == "LocalFileSystem":
        return local_filesystem_storage(_text(value, "path"))
    location, options = value["location"], dict(value.get("object_store_config") or {})
    credentials = dict(value.get("credentials") or {})
    chosen = next((str(v) for k, v in credentials.items() if k.endswith("_credential_type")), "from_env")
    if chosen not in ("from_env", "anonymous", "static"):
        raise ValueError(f"credentials of type {chosen!r} are not allowed in this file")
    how: dict[str, Any] = {"from_env": chosen == "from_env" or None, "anonymous": chosen == "anonymous" or None}
    secrets = {name: v for name, v in credentials.items() if not name.endswith("_credential_type")}
    how |= secrets if chosen == "static" else {}
    match kind:
        case "S3" | "Tigris":
            make = s3_storage if kind == "S3" else tigris_storage
            names = ["region", "endpoint_url", "allow_http", "network_stream_timeout_seconds"]
            names += ["force_path_style", "requester_pays"] if kind == "S3" else []
            given = {name: options[name] for name in names if options.get(name) is not None}
            if options.get("anonymous"):
                how = {"anonymous": True}
            return make(bucket=_text(location, "bucket"), prefix=location.get("prefix"), **given, **how)
        case "GCS":
            return gcs_storage(
                bucket=_text(location, "bucket"), prefix=location.get("prefix"), config=options or None, **how
            )
        case "Azure":
            parts: dict[str, Any] = {name: _text(location, name) for name in ("account", "container", "prefix")}
            return azure_storage(**parts, config=options or None, **how)
    raise ValueError(f"{kind} is no kind of storage")


def _text(value: Mapping[str, Any], name: str) -> str:
    found = value[name]
    if not isinstance(found, str) or not found:
        raise ValueError(f"{name} is {found!r}, where text is expected")
    return found


def _tagged(entry: Any) -> Any:
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((kind, value),) = entry.items()
        return Tag(str(kind), value)
    return entry


def _masked(value: Any) -> Any:
    match value:
        case Tag(name=name, value=inner):
            return Tag(name, _masked(inner))
        case dict():
            return {
                key: _masked_credentials(item) if key == "credentials" else _masked(item) for key, item in value.items()
            }
    return value


def _masked_credentials(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: item if str(key).endswith("_credential_type") or item is None else "****" for key, item in value.items()
    }
