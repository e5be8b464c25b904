"""One URL for a repository, a version of it and a path inside: parsing, and the storage that it names.

The grammar is that of URL pipelines (https://github.com/jbms/url-pipeline, and the ``icechunk`` adapter of
Neuroglancer): stages separated by ``|``, of which the first says where the repository is::

    {place}
    {place}|icechunk:[@branch.{name} | @tag.{name} | @{snapshot id}][/]{path}[|zarr3:{path}]

======================================  =======================================================================
place                                   storage
======================================  =======================================================================
``s3://bucket/prefix[?region=…]``       S3; options as in `icechunk.s3_storage`
``gs://bucket/prefix``                  Google Cloud Storage (extra ``obstore``)
``az://container/prefix``               Azure; the account from ``storage_options`` or ``AZURE_STORAGE_ACCOUNT_NAME``
``abfs://container@account…/prefix``    Azure, with the account
``https://host/path``                   a web server, read only
``file:///folder``, a plain path        local disk
``memory://name``                       memory of this process, shared by all that use the name
``alias:name``                          an entry of the file that ``icechunk config`` keeps, with its credentials
======================================  =======================================================================

Reserved characters inside names are percent-encoded: ``/`` in the name of a branch is ``%2F``, ``|`` in a path ``%7C``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.format.ids import object_id_from_text
from icechunk.runtime.checks import WrongTypeError, require_type
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import redacted_url
from icechunk.storage.aliases import Aliases, aliases_path
from icechunk.storage.constructors import (
    azure_storage,
    gcs_storage,
    http_storage,
    local_filesystem_storage,
    s3_storage,
)
from icechunk.storage.memory import MemoryStorage
from icechunk.storage.port import Storage

__all__ = ["RepositoryUrl", "StorageOrUrl", "parse_url", "storage_at", "storage_from_url"]

StorageOrUrl: TypeAlias = "Storage | str | os.PathLike[str]"
"""A storage, or a URL that `storage_from_url` takes."""

_SCHEMES: Final = "s3://, gs://, az://, abfs://, http://, https://, file://, memory://, alias: or a plain path"
_AZURE_ACCOUNT: Final = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT")

_in_memory: dict[str, Storage] = {}
_in_memory_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryUrl:
    """The parts of a repository's URL. At most one of ``branch``, ``tag`` and ``snapshot_id`` is set."""

    place: str
    """The location of the repository: the first stage of the pipeline, as it was given."""
    branch: str | None = None
    """The branch whose tip is meant."""
    tag: str | None = None
    """The tag that is meant."""
    snapshot_id: str | None = None
    """The snapshot that is meant, as 20 characters of Crockford base32."""
    path: str = ""
    """A node of the hierarchy, without slashes around it; empty for the root."""

    @property
    def names_version(self) -> bool:
        """Whether the URL names a branch, a tag or a snapshot."""
        return not self.branch is self.tag is self.snapshot_id is None

    @property
    def version(self) -> dict[str, Any]:
        """The version as keyword arguments of `Repository.readonly_session`: branch ``main`` where none is named."""
        given = {"branch": self.branch, "tag": self.tag, "snapshot_id": self.snapshot_id}
        return {name: value for name, value in given.items() if value is not None} or {"branch": "main"}


def parse_url(url: str | os.PathLike[str]) -> RepositoryUrl:
    """Take a repository's URL apart.

    Parameters
    ----------
    url
        As in `icechunk.storage.url`; a path object is a plain path.

    Raises
    ------
    InvalidInputError
        Kind ``cannot-parse-url``: the message names the part that is wrong.
    """
    require_type("url", url, str, os.PathLike)
    if not isinstance(url, str):
        path = os.fsdecode(url)
        # With a colon in its first part it would read as a URL.
        return RepositoryUrl(place=os.path.join(os.curdir, path) if ":" in path and not os.path.isabs(path) else path)
    place, *stages = url.split("|")
    if not place.strip():
        _refuse(url, "it names no repository before the first '|'")
    version: dict[str, str] = {}
    paths: list[str] = []
    for position, stage in enumerate(stages):
        scheme, colon, rest = stage.partition(":")
        if not colon:
            _refuse(url, f"stage {stage!r} has no scheme: write 'icechunk:' or 'zarr3:'")
        if rest.startswith("//"):
            # As in ``icechunk://tag.v1/path``, the older spelling: the version is where a URL has its host.
            rest = rest[2:] if scheme.lower().startswith("zarr") or rest[2:3] in ("@", "") else f"@{rest[2:]}"
        match scheme.lower():
            case "icechunk" | "ic" if position == 0:
                version, rest = _version(url, rest)
            case "icechunk" | "ic":
                _refuse(url, f"stage {stage!r}: icechunk: must follow the location of the repository, and only once")
            case "zarr3" | "zarr" if position == len(stages) - 1 > 0:
                pass
            case "zarr3" | "zarr":
                _refuse(url, f"stage {stage!r}: {scheme}: must be last, after icechunk:")
            case "zarr2":
                _refuse(url, f"stage {stage!r}: a repository holds Zarr 3 hierarchies: write zarr3:")
            case _:
                _refuse(url, f"stage {stage!r}: {scheme}: is not supported; the stages are icechunk: and zarr3:")
        paths += [unquote(part) for part in rest.split("/") if part]
    if any(part in (".", "..") for part in paths):
        _refuse(url, f"the path {'/'.join(paths)!r} has a segment '.' or '..'")
    return RepositoryUrl(place=place, path="/".join(paths), **version)


def _version(url: str, rest: str) -> tuple[dict[str, str], str]:
    """The version that the stage ``icechunk:`` begins with, and the text behind it."""
    if not rest.startswith("@"):
        return {}, rest
    text, _, path = rest[1:].partition("/")
    kind, dot, name = text.partition(".")
    if dot and kind in ("branch", "tag"):
        if not name:
            _refuse(url, f"version '@{text}' names no {kind}")
        return {kind: unquote(name)}, path
    try:
        object_id_from_text(text)
    except InvalidInputError as error:
        _refuse(
            url,
            f"version '@{text}' is none of @branch.NAME, @tag.NAME and @ with the 20 characters of a snapshot's id",
            error,
        )
    return {"snapshot_id": text}, path


def storage_from_url(url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Storage:
    """The storage that a URL names.

    Parameters
    ----------
    url
        The place alone, as in `icechunk.storage.url`: without version and path.
    storage_options
        Keyword arguments of the function that makes such storages (`icechunk.s3_storage`, `icechunk.gcs_storage`,
        `icechunk.azure_storage`, `icechunk.http_storage`), as ``endpoint_url``, ``region``, ``anonymous``,
        ``from_env``, ``access_key_id``. Without credentials those of the environment are used.

    Raises
    ------
    InvalidInputError
        Kind ``cannot-parse-url``: the URL is wrong, or names a version or a path; kind ``invalid-setting``: an option
        that such storages do not have.
    """
    parsed = parse_url(url)
    if parsed.names_version or parsed.path:
        _refuse(
            os.fspath(url),
            "only the location of a repository is allowed here, without a version or path: use icechunk.open",
        )
    return storage_at(parsed, storage_options)


def storage_at(url: RepositoryUrl, storage_options: Mapping[str, Any] | None = None) -> Storage:
    """The storage of a parsed URL; its version and path do not matter. Errors are those of `storage_from_url`."""
    if storage_options is not None:
        require_type("storage_options", storage_options, Mapping)
    options = dict(storage_options or {})
    place = url.place
    scheme, separator, _ = place.partition(":")
    # One letter is a Windows drive.
    if not separator or len(scheme) == 1 or not scheme.replace("+", "").isalnum():
        if place.partition("/")[0].endswith(":") and "://" in place:
            _refuse(place, f"{scheme}: is not supported; the schemes are {_SCHEMES}")
        return _made(place, local_filesystem_storage, {}, options, path=place)
    try:
        parts = urlsplit(place)
    except ValueError as error:
        _refuse(place, f"it has no valid host: {error}", error)
    if parts.fragment:
        _refuse(place, f"the fragment '#{parts.fragment}' has no meaning in it")
    prefix = unquote(parts.path).strip("/")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.query and parts.scheme in ("file", "memory"):
        _refuse(place, "options behind '?' have no meaning in it; a question mark in a name is written %3F")
    match parts.scheme:
        case "s3" | "s3a":
            _require_bucket(place, parts.netloc)
            _require_plain(place, prefix)
            return _made(place, s3_storage, query, options, bucket=parts.netloc, prefix=prefix or None)
        case "gs" | "gcs":
            _require_bucket(place, parts.netloc)
            _require_plain(place, prefix)
            return _made(place, gcs_storage, query, options, bucket=parts.netloc, prefix=prefix or None)
        case "az" | "azure" | "adl" | "abfs" | "abfss":
            container, at, host = parts.netloc.partition("@")
            if at:
                account: Any = host.partition(".")[0]
            else:
                named = [where.pop(name, None) for where in (options, query) for name in ("account", "account_name")]
                account = next(filter(None, named), None)
            account = account or next((os.environ[name] for name in _AZURE_ACCOUNT if os.environ.get(name)), None)
            _require(place, container, "container")
            _require_plain(place, prefix)
            if not account:
                _refuse(
                    place,
                    "it names no account: give storage_options={'account': …}, set AZURE_STORAGE_ACCOUNT_NAME, or "
                    "write az://container/prefix?account=… or abfs://container@account.dfs.core.windows.net/prefix",
                )
            return _made(place, azure_storage, query, options, account=account, container=container, prefix=prefix)
        case "http" | "https":
            _require(place, parts.netloc, "host")
            return _made(place, http_storage, {}, options, base_url=place)
        case "file":
            if parts.netloc not in ("", "localhost"):
                host = parts.netloc.rpartition("@")[2]
                _refuse(place, f"its host {host!r} is another machine: file:///folder has three slashes")
            # Here, because it brings a client of HTTP and a parser of mail with it.
            from urllib.request import url2pathname

            _require(place, prefix, "folder")
            return _made(place, local_filesystem_storage, {}, options, path=url2pathname(parts.path))
        case "local":
            return _made(place, local_filesystem_storage, {}, options, path=place.partition("://")[2])
        case "alias":
            if options:
                _refuse_options(place, options)
            storage: Storage = Aliases(aliases_path()).find(place.partition(":")[2].strip("/")).storage
            return storage
        case "memory":
            name = (parts.netloc + parts.path).strip("/")
            _require(place, name, "name")
            if options:
                _refuse_options(place, options)
            with _in_memory_lock:
                return _in_memory.setdefault(name, MemoryStorage(name=name))
    _refuse(place, f"{parts.scheme}: is not supported; the schemes are {_SCHEMES}")


def _made(
    place: str, make: Callable[..., Storage], query: Mapping[str, str], options: Mapping[str, Any], **arguments: Any
) -> Storage:
    known = set(make.__annotations__) - {"return"} - set(arguments)
    unknown = (set(query) | set(options)) - known
    if unknown:
        _refuse_options(place, unknown, known)
    given = {name: _typed(make, name, value) for name, value in query.items()} | dict(options) | arguments
    try:
        return make(**given)
    except InvalidInputError:
        raise
    except TypeError as error:
        raise WrongTypeError(f"{redacted_url(place)!r}: {error}", ErrorKind.INVALID_SETTING) from error


def _typed(make: Callable[..., Storage], name: str, value: str) -> Any:
    """A value of the query as the parameter's type has it."""
    kind = str(make.__annotations__[name]).removesuffix(" | None")
    if kind == "bool":
        if value.lower() not in ("", "true", "false", "1", "0"):
            raise InvalidInputError(f"{name}={value!r} in a URL is true or false", ErrorKind.INVALID_SETTING)
        return value.lower() in ("", "true", "1")
    if kind == "int" and value.isdecimal():
        return int(value)
    return value


def _require(url: str, found: str, what: str) -> None:
    if not found:
        _refuse(url, f"it names no {what}")


def _require_bucket(url: str, found: str) -> None:
    """Refuse a URL without bucket, or with a key before it: a name of a bucket is shown in errors."""
    if "@" in found:
        _refuse(
            url,
            "no user, password or key may stand before the bucket: give credentials as storage_options or by the "
            "environment, and replace the key if this URL was kept anywhere",
        )
    _require(url, found, "bucket")
    if ":" in found:
        _refuse(
            url,
            f"a bucket has no port, as {found!r} has: give the address of a server as the option endpoint_url",
        )


def _require_plain(url: str, prefix: str) -> None:
    """Refuse segments that some servers and proxies resolve, so that keys would lie elsewhere."""
    if any(part in (".", "..") for part in prefix.split("/")):
        _refuse(url, f"the prefix {prefix!r} has a segment '.' or '..'")


def _refuse(url: str, reason: str, cause: Exception | None = None) -> NoReturn:
    raise InvalidInputError(
        f"cannot parse the URL {redacted_url(str(url))!r} of a repository: {reason}", ErrorKind.CANNOT_PARSE_URL
    ) from cause


def _refuse_options(place: str, unknown: Any, known: set[str] | None = None) -> NoReturn:
    there = f"there are {', '.join(sorted(known))}" if known else "there are none"
    raise InvalidInputError(
        f"{redacted_url(place)!r} does not take the options {', '.join(sorted(unknown))}: {there}",
        ErrorKind.INVALID_SETTING,
    )
