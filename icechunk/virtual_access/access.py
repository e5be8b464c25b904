"""Reading virtual chunks: only from containers that the caller authorised, and only from unchanged objects.

Reads of one loop share one pool and one block reader, so that many small references to one file become few requests.
Bytes that were read ahead are kept under the location *and* the checksum that they were read for: bytes that passed one
check are never returned for a reference with another checksum. A reference without a checksum uses kept bytes for at
most `TRUST_S`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Final

from icechunk.config import ObjectStoreConfig, StorageSettings, VirtualChunkContainer
from icechunk.credentials import AnyCredential, Credentials
from icechunk.errors import ErrorKind, IcechunkError, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.format.values import ChunkRef
from icechunk.runtime.clock import Sources
from icechunk.runtime.loops import PerLoop
from icechunk.runtime.representation import redacted_url
from icechunk.runtime.tasks import run_all
from icechunk.storage.port import ByteRange, GetResult, Octets, Range
from icechunk.transfer.assets import Reads
from icechunk.transfer.limiter import Gates
from icechunk.virtual_access.locations import Prefixes
from icechunk.virtual_access.readers import BucketFiles, LocalFiles, Reader, WebFiles
from icechunk.virtual_access.trust import require_named

__all__ = ["TRUST_S", "VirtualAccess"]

TRUST_S: Final = 10
"""Seconds for which bytes without a checksum are kept."""

_KINDS: Final[tuple[tuple[tuple[type, ...], type, str], ...]] = (
    (
        (ObjectStoreConfig.S3, ObjectStoreConfig.S3Compatible, ObjectStoreConfig.Tigris),
        Credentials.S3,
        "S3 credentials",
    ),
    ((ObjectStoreConfig.Gcs,), Credentials.Gcs, "Google Cloud Storage credentials"),
    ((ObjectStoreConfig.Azure,), Credentials.Azure, "Azure credentials"),
    (
        (ObjectStoreConfig.LocalFileSystem,),
        Credentials.LocalFileSystemAccess,
        "icechunk.credentials.LocalFileSystemAccess",
    ),
    ((ObjectStoreConfig.Http,), Credentials.HttpAccess, "icechunk.credentials.HttpAccess"),
)
_MOST_RESOLVED: Final = 4096


class VirtualAccess:
    """The virtual chunk containers of one open repository.

    Parameters
    ----------
    containers
        As configured.
    authorized
        Credentials by the URL prefix of each container that may be read; None: the environment's. Prefixes that no
        container has are kept for one that is configured later.
    settings
        Tries and timeouts.
    gates
        Bounds on requests in flight, in each loop.
    reads
        How requests are made of reads.
    named, endpoint
        See `require_named`; without them every container is the reader's own.

    Raises
    ------
    TypeError
        If a value is not credentials.
    StorageError
        Credentials for another kind of store than the container's.
    """

    def __init__(
        self,
        containers: Iterable[VirtualChunkContainer],
        authorized: Mapping[str, AnyCredential | None],
        *,
        settings: StorageSettings | None,
        gates: Gates,
        reads: Reads,
        sources: Sources,
        named: Mapping[str, VirtualChunkContainer] | None = None,
        endpoint: str | None = None,
    ) -> None:
        found = list(containers)
        self.prefixes: Prefixes = Prefixes(found)
        authorized = _by_container(found, authorized)
        _check(found, authorized)
        own = {container.url_prefix: container for container in found} if named is None else named
        self._loop_readers: PerLoop[_LoopReaders] = PerLoop(
            partial(_LoopReaders, self.prefixes, authorized, settings, gates, reads, sources, own, endpoint),
            _LoopReaders.aclose,
        )

    async def read(self, ref: ChunkRef, start: int, end: int) -> Octets:
        """Bytes ``start`` to ``end`` (exclusive) of a virtual chunk, all of them.

        Raises
        ------
        InvalidInputError
            Its location belongs to no container (kind ``no-container-for-virtual-chunk``), or to one that was not
            authorised (``unauthorized-virtual-chunk-container``), or is none (``invalid-virtual-ref``).
        StorageError
            It cannot be fetched (``virtual-chunk-fetch``), or its file has changed (``virtual-chunk-modified``).
        """
        readers = self._loop_readers.peek() or await self._loop_readers.get()
        return await readers.read(ref, start, end)

    async def aclose(self) -> None:
        """Close the readers of this loop."""
        await self._loop_readers.aclose()


class _LoopReaders:
    """The open readers of one loop."""

    def __init__(
        self,
        prefixes: Prefixes,
        authorized: Mapping[str, AnyCredential | None],
        settings: StorageSettings | None,
        gates: Gates,
        reads: Reads,
        sources: Sources,
        named: Mapping[str, VirtualChunkContainer],
        endpoint: str | None,
    ) -> None:
        self._prefixes = prefixes
        self._named = named
        self._endpoint = endpoint
        self._authorized = authorized
        self._settings = settings
        self._sources = sources
        self._resolved: dict[str, tuple[str, VirtualChunkContainer]] = {}
        self._readers: dict[str, Reader] = {}
        self._blocks = reads.blocks(self, gates.here())

    async def read(self, ref: ChunkRef, start: int, end: int) -> Octets:
        location = ref.location or ""
        resolved, container = self._resolve(location)
        if container.url_prefix not in self._authorized:
            named = f" ({container.name})" if container.name else ""
            raise InvalidInputError(
                f"reading the virtual chunk at {redacted_url(resolved)!r} is not authorized: pass credentials for "
                f"{container.url_prefix!r}{named} in authorize_virtual_chunk_access when opening the repository",
                ErrorKind.UNAUTHORIZED_VIRTUAL_CHUNK_CONTAINER,
            )
        if start >= end:
            return b""
        key = f"{self._mark(ref)}\n{location}"
        try:
            data = await self._blocks.read(key, ref.offset + start, ref.offset + end)
        except IcechunkError as error:
            if error.kind in _KEPT_KINDS:
                raise type(error)(error.message, error.kind) from error
            reason = "it does not exist" if isinstance(error, ObjectNotFoundError) else error.message
            raise StorageError(
                f"the virtual chunk at {redacted_url(resolved)!r} (bytes {ref.offset} to {ref.offset + ref.length}) "
                f"cannot be fetched: {reason}",
                ErrorKind.VIRTUAL_CHUNK_FETCH,
            ) from error
        if len(data) != end - start:
            raise StorageError(
                f"the virtual chunk at {redacted_url(resolved)!r} (bytes {ref.offset} to {ref.offset + ref.length}) "
                f"cannot be fetched: the object ends before, only {len(data)} of {end - start} bytes are there",
                ErrorKind.VIRTUAL_CHUNK_FETCH,
            )
        return data

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        """One checked request, for the pool and the block reader."""
        mark, _, location = key.partition("\n")
        resolved, container = self._resolve(location)
        wanted = byte_range if isinstance(byte_range, Range) else Range(0)
        found = await self._reader(container).get(resolved, wanted)
        _check_unchanged(mark, found, resolved)
        return found

    async def aclose(self) -> None:
        readers, self._readers = self._readers, {}
        await run_all(*[reader.aclose for reader in readers.values()])

    def _mark(self, ref: ChunkRef) -> str:
        """The key under which a fetched range may be reused: the checksum; without one, a span of time."""
        if ref.etag is not None:
            return "e" + _plain(ref.etag)
        if ref.last_modified is not None:
            return f"m{ref.last_modified}"
        return f"t{self._sources.elapsed_us() // (TRUST_S * 1_000_000)}"

    def _resolve(self, location: str) -> tuple[str, VirtualChunkContainer]:
        known = self._resolved.get(location)
        if known is None:
            known = self._prefixes.resolve(location)
            if len(self._resolved) >= _MOST_RESOLVED:
                self._resolved.clear()
            self._resolved[location] = known
        return known

    def _reader(self, container: VirtualChunkContainer) -> Reader:
        reader = self._readers.get(container.url_prefix)
        if reader is None:
            credential = self._authorized[container.url_prefix]
            require_named(container, credential, self._named, self._endpoint)
            reader = self._open(container, credential)
            self._readers[container.url_prefix] = reader
        return reader

    def _open(self, container: VirtualChunkContainer, credential: Any) -> Reader:
        # Imported when needed: the libraries for HTTP and S3 take longer to load than all the rest.
        given = getattr(credential, "credentials", None)
        prefix = container.url_prefix
        match container.store:
            case ObjectStoreConfig.LocalFileSystem():
                return LocalFiles()
            case ObjectStoreConfig.Http(options, headers):
                return WebFiles(options or {}, headers or {}, self._settings, self._sources)
            case (
                ObjectStoreConfig.S3(options)
                | ObjectStoreConfig.S3Compatible(options)
                | ObjectStoreConfig.Tigris(options)
            ):
                return BucketFiles(prefix, options, given, self._settings, self._sources)
            case ObjectStoreConfig.Gcs(options):
                from icechunk.virtual_access.obstore_readers import gcs_files

                return gcs_files(prefix, options or {}, given, self._settings, self._sources)
            case ObjectStoreConfig.Azure(options):
                from icechunk.virtual_access.obstore_readers import azure_files

                return azure_files(prefix, options or {}, given, self._settings, self._sources)
        raise StorageError(
            f"cannot read virtual chunks from {type(container.store).__name__} ({prefix!r})", ErrorKind.STORAGE_CONFIG
        )


_KEPT_KINDS: Final = frozenset(
    {
        str(ErrorKind.INVALID_VIRTUAL_REF),
        str(ErrorKind.UNAUTHORIZED_VIRTUAL_CHUNK_CONTAINER),
        str(ErrorKind.VIRTUAL_CHUNK_MODIFIED),
    }
)


def _by_container(
    containers: Iterable[VirtualChunkContainer], authorized: Mapping[str, AnyCredential | None]
) -> dict[str, AnyCredential | None]:
    """The authorised credentials, by prefix of a container; prefixes may be given without their last slash."""
    whole = {container.url_prefix for container in containers}
    return {
        f"{prefix}/" if f"{prefix}/" in whole and prefix not in whole else prefix: credential
        for prefix, credential in authorized.items()
    }


def _check(containers: Iterable[VirtualChunkContainer], authorized: Mapping[str, AnyCredential | None]) -> None:
    for prefix, credential in authorized.items():
        if not isinstance(prefix, str):
            raise TypeError(
                f"authorize_virtual_chunk_access has the key {prefix!r}: keys are URL prefixes of containers"
            )
        if credential is not None and not isinstance(credential, Credentials):
            raise TypeError(
                f"authorize_virtual_chunk_access has {type(credential).__name__} for {prefix!r}: convert credentials "
                "with icechunk.containers_credentials"
            )
    for container in containers:
        given = authorized.get(container.url_prefix)
        for stores, credentials, name in _KINDS:
            if given is not None and isinstance(container.store, stores) and not isinstance(given, credentials):
                raise StorageError(
                    f"credentials of the wrong kind for the virtual chunk container {container.url_prefix!r}: it takes "
                    f"{name}, not {type(given).__name__}",
                    ErrorKind.STORAGE_OTHER,
                )


def _check_unchanged(mark: str, found: GetResult, location: str) -> None:
    kind, expected = mark[0], mark[1:]
    if kind == "e":
        unchanged, now = _plain(found.version) == expected, f"ETag {found.version or 'missing'}, not {expected}"
    elif kind == "m":
        # References keep whole seconds, rounded up; local files and some stores have fractions.
        unchanged = 0 < found.modified_us <= int(expected) * 1_000_000
        now = f"it was modified at {found.modified_us / 1e6:.6f}, after {expected}, in seconds since 1970"
    else:
        return
    if not unchanged:
        raise StorageError(
            f"the object of a virtual chunk has changed since the reference was written: {redacted_url(location)!r} "
            f"({now}); write the references again",
            ErrorKind.VIRTUAL_CHUNK_MODIFIED,
        )


def _plain(etag: str) -> str:
    """An ETag without its weakness prefix and quotes, on one line."""
    return etag.removeprefix("W/").strip('"').replace("\n", " ")
