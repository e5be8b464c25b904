"""Virtual chunk containers: the places that virtual references may point into."""

from __future__ import annotations

from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from icechunk.config.storage import AnyObjectStoreConfig, ObjectStoreConfig
from icechunk.errors import ErrorKind, InvalidInputError
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.representation import Setting, redacted_url

__all__ = ["VirtualChunkContainer"]

_SCHEMES: Final[dict[type, frozenset[str]]] = {
    ObjectStoreConfig.S3: frozenset({"s3"}),
    ObjectStoreConfig.S3Compatible: frozenset({"s3"}),
    ObjectStoreConfig.Tigris: frozenset({"s3", "tigris"}),
    ObjectStoreConfig.Gcs: frozenset({"gs", "gcs"}),
    ObjectStoreConfig.Azure: frozenset({"az", "azure", "abfs"}),
    ObjectStoreConfig.LocalFileSystem: frozenset({"file"}),
    ObjectStoreConfig.Http: frozenset({"http", "https"}),
    ObjectStoreConfig.InMemory: frozenset(),
}


@dataclass(slots=True, repr=False)
class VirtualChunkContainer(Setting):
    """A place that virtual references may point into, and how to reach it."""

    _public_name: ClassVar[str] = "icechunk.virtual.VirtualChunkContainer"

    url_prefix: str
    """Locations that start with it belong to this container; ends in ``/``."""
    store: AnyObjectStoreConfig
    """The kind of object store, with its options."""
    name: str | None = None
    """Locations ``vcc://name/rest`` mean ``url_prefix + rest``."""

    def _shown(self) -> list[tuple[str, Any, Any]]:
        return [(n, redacted_url(v) if n == "url_prefix" else v, d) for n, v, d in Setting._shown(self)]

    def validate(self) -> None:
        """Refuse a container that cannot work, as `RepositoryConfig.set_virtual_chunk_container` does.

        Raises
        ------
        InvalidInputError
            A prefix without a final ``/``, without the host or path it needs, or with a scheme that the
            kind of store does not serve; an empty name or one with ``/`` (kind ``invalid-virtual-ref``).
        """
        shown = redacted_url(self.url_prefix)
        if self.name is not None and (not self.name or "/" in self.name):
            raise _refused(f"container name {self.name!r}: it must be non-empty and not contain '/'")
        if not self.url_prefix.endswith("/"):
            raise _refused(f"url_prefix {shown!r}: it must end in '/', or it would match more than one folder")
        try:
            parts = urlsplit(self.url_prefix)
        except ValueError as error:
            raise _refused(f"url_prefix {shown!r}: {error}") from None
        if not parts.scheme:
            raise _refused(f"url_prefix {shown!r}: it must be a URL such as s3://bucket/ or file:///folder/")
        schemes = _SCHEMES[type(self.store)]
        if parts.scheme not in schemes:
            allowed = ", ".join(sorted(schemes)) or "none"
            raise _refused(
                f"url_prefix {shown!r}: ObjectStoreConfig.{type(self.store).__name__} serves these schemes: {allowed}"
            )
        if parts.scheme == "file":
            if not parts.netloc and not parts.path.strip("/"):
                raise _refused(f"url_prefix {shown!r}: a file:// container must include a path")
        elif not parts.netloc or any(c.isspace() for c in parts.netloc):
            raise _refused(f"url_prefix {shown!r}: a {parts.scheme}:// container must include a bucket or host")


def _refused(reason: str) -> InvalidInputError:
    return InvalidInputError(f"invalid virtual chunk {reason}", ErrorKind.INVALID_VIRTUAL_REF)
