"""Objects in a bucket of S3 or of a service with its protocol.

Requests are signed and sent by `icechunk.storage.s3.requests`; aiobotocore supplies the credential chain, the
configuration and the rules for endpoints. There is one client per event loop, shared by all storages that
`S3Storage.with_settings` derives from one.

**Conditional writes are verified.** Each has a random id of its own in the object's user metadata. After 412, 409,
and whenever no certain answer came, the object's metadata is read back: our id means that an earlier try landed and
only its answer was lost. Otherwise the outcome follows from the
object that is found, by the table of `icechunk.storage.outcome`.

If ``unsafe_use_metadata`` is off, contents are compared instead, and only after a try without answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, Unpack

from icechunk.config import StorageSettings
from icechunk.errors import AccessDeniedError, ErrorKind, InvalidInputError, ObjectNotFoundError, StorageError
from icechunk.runtime.clock import SYSTEM, Sources
from icechunk.runtime.pickles import call_of
from icechunk.runtime.representation import redacted_url
from icechunk.storage.http.headers import (
    content_length,
    date_us,
    most_bytes,
    range_header,
    result_of,
    served_size,
    version_of,
)
from icechunk.storage.outcome import REFUSING_STATUSES, Found, Seen, Tried, follow, judge, landed
from icechunk.storage.port import (
    ANY,
    ByteRange,
    DeleteResult,
    GetResult,
    ObjectInfo,
    ObjectKind,
    Precondition,
    PutResult,
    Sender,
    Storage,
    Suffix,
    Unchecked,
    Version,
    check_key,
    check_range,
    resolve_range,
)
from icechunk.storage.s3.answers import Answer, Unanswered, is_transient, parse_refusal, require_document, text_of
from icechunk.storage.s3.bucket import Bucket, BucketOptions, condition_header, require_sendable
from icechunk.storage.s3.bulk import delete, list_pages
from icechunk.storage.s3.requests import Request, S3Client
from icechunk.storage.s3.sigv4 import encode_key
from icechunk.storage.s3.uploads import (
    abort_upload,
    checksum_of,
    completion_of,
    header_name,
    part_bytes,
    start_upload,
    upload_parts,
)
from icechunk.storage.settings import Effective, object_store_settings

__all__ = ["S3Storage"]

_WRITE_ID: Final = "x-amz-meta-icechunk-write-id"


class S3Storage(Storage):
    """A storage in a bucket, below a prefix.

    Parameters
    ----------
    bucket, prefix, described
        See `Bucket`.
    settings
        Tries, timeouts, storage classes; official defaults where silent.
    sources
        Clock, randomness and pauses.

    Raises
    ------
    InvalidInputError
        No bucket, or headers that cannot be sent.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str | None = None,
        *,
        settings: StorageSettings | None = None,
        sources: Sources = SYSTEM,
        **described: Unpack[BucketOptions],
    ) -> None:
        self._bucket = Bucket(bucket, prefix, sources, **described)
        self._use(settings)

    def _use(self, settings: StorageSettings | None) -> None:
        bucket = self._bucket
        self._effective = Effective(
            settings,
            default_read_s=bucket.options.network_stream_timeout_seconds,
            keeps_metadata=bucket.keeps_metadata,
        )

    # -- reading ---------------------------------------------------------------------------------------------------

    async def get(self, key: str, byte_range: ByteRange = None) -> GetResult:
        check_range(byte_range)
        headers = self._bucket.read_headers | range_header(byte_range)
        request = replace(self._bucket.request("read", "GET", key, headers), most_bytes=most_bytes(byte_range))
        client = await self._bucket.client()
        answer = await client.call(request, self._effective.limits)
        if answer.status == 416:
            return await self._get_empty(key, byte_range)
        if answer.status >= 300:
            raise self._missing(client, request, key, answer)
        data = answer.content
        if answer.status == 200:
            # A service that ignores ranges sends everything.
            start, stop = resolve_range(byte_range, len(data), key)
            return result_of(answer.headers, data[start:stop], len(data))
        size = served_size(answer.headers, byte_range, len(data)) if answer.status == 206 else None
        if size is None:
            raise StorageError(
                f"cannot {request.what}: {answer.status} came with {len(data)} bytes and the range "
                f"{answer.headers.get('Content-Range')!r}, where {headers.get('range', 'all')} were asked for; "
                "a proxy or gateway between here and the store changes answers",
                ErrorKind.OBJECT_STORE,
            )
        return result_of(answer.headers, data, size)

    async def _get_empty(self, key: str, byte_range: ByteRange) -> GetResult:
        answer = await self._head_answer(key)
        size = self._reported_size(key, answer)
        if not isinstance(byte_range, Suffix) or size > 0:
            raise InvalidInputError(
                f"cannot read {byte_range} of {self._bucket.url(key)}: the object has {size} bytes",
                ErrorKind.INVALID_BYTE_RANGE,
            )
        return result_of(answer.headers, b"", 0)

    def _reported_size(self, key: str, answer: Answer) -> int:
        size = content_length(answer.headers)
        if size is None:
            raise StorageError(
                f"cannot look at {self._bucket.url(key)}: the answer does not give the object's size",
                ErrorKind.OBJECT_STORE,
            )
        return size

    async def head(self, key: str) -> ObjectInfo:
        answer = await self._head_answer(key)
        headers = answer.headers
        return ObjectInfo(
            key=key,
            size=self._reported_size(key, answer),
            version=version_of(headers),
            modified_us=date_us(headers, "Last-Modified") or 0,
        )

    async def _head_answer(self, key: str) -> Answer:
        request = self._bucket.request("look at", "HEAD", key, self._bucket.read_headers)
        client = await self._bucket.client()
        answer = await client.call(request, self._effective.limits)
        if answer.status >= 300:
            raise self._missing(client, request, key, answer)
        return answer

    def list_pages(
        self, prefix: str = "", *, start_after: str | None = None, page_size: int = 1000
    ) -> AsyncIterator[list[ObjectInfo]]:
        return list_pages(self._bucket, self._effective.limits, prefix, start_after, page_size)

    # -- writing ---------------------------------------------------------------------------------------------------

    async def put(
        self,
        key: str,
        data: bytes | bytearray | memoryview,
        precondition: Precondition = ANY,
        *,
        kind: ObjectKind = "metadata",
        metadata: Mapping[str, str] | None = None,
    ) -> PutResult:
        content = data if isinstance(data, bytes) else bytes(data)
        precondition = await self._effective.condition_of(self, key, self._bucket.url(key), precondition)
        headers = dict(self._bucket.write_headers)
        storage_class = self._effective.storage_class(kind)
        if storage_class is not None:
            headers["x-amz-storage-class"] = storage_class
        if metadata and self._effective.uses_metadata:
            require_sendable(metadata)
            headers.update({f"x-amz-meta-{name.lower()}": value for name, value in metadata.items()})
        write_id = None
        if not isinstance(precondition, Unchecked) and self._effective.uses_metadata:
            write_id = headers[_WRITE_ID] = self._bucket.sources.random_bytes(16).hex()
        check_key(key)
        client = await self._bucket.client()
        if len(content) >= self._effective.multipart_bytes:
            return await self._put_in_parts(client, key, content, precondition, headers, write_id)
        checksum = self._bucket.options.checksum_algorithm
        if checksum is not None:
            headers[header_name(checksum)] = checksum_of(checksum, content)
        headers.update(condition_header(precondition))
        request = self._bucket.request("write", "PUT", key, headers, content)
        return await self._finish(client, key, request, content, precondition, write_id)

    async def _put_in_parts(
        self,
        client: S3Client,
        key: str,
        data: bytes,
        precondition: Precondition,
        headers: Mapping[str, str],
        write_id: str | None,
    ) -> PutResult:
        checksum = self._bucket.options.checksum_algorithm
        path = self._bucket.path(key)
        what = f"write {self._bucket.url(key)}"
        # Parts need the customer's key of SSE-C again, and refuse the other headers of the object.
        again = {n: v for n, v in headers.items() if "-customer-" in n or n == "x-amz-request-payer"}
        try:
            upload = await start_upload(client, path, what, headers, checksum, self._effective.limits)
        except StorageError as error:
            _note_invisible(error, key)
            raise
        try:
            try:
                parts = await upload_parts(
                    client,
                    path,
                    what,
                    upload,
                    data,
                    size=part_bytes(len(data), self._effective.part_bytes),
                    concurrency=self._effective.parts_at_once,
                    headers=again,
                    checksum=checksum,
                    limits=self._effective.limits,
                )
            except StorageError as error:
                # Without the request that completes it nothing becomes visible.
                _note_invisible(error, key)
                raise
            request = Request(
                what=what,
                method="POST",
                key=key,
                path=path,
                query=(("uploadId", upload),),
                headers={**again, **condition_header(precondition), "content-type": "application/xml"},
                body=completion_of(parts, checksum),
            )
            return await self._finish(client, key, request, data, precondition, write_id)
        except BaseException:
            await abort_upload(client, path, what, upload, self._effective.limits)
            raise

    async def _finish(
        self,
        client: S3Client,
        key: str,
        request: Request,
        data: bytes,
        precondition: Precondition,
        write_id: str | None,
    ) -> PutResult:
        """Send the request that makes an object visible, and find out its outcome."""
        if isinstance(precondition, Unchecked) and request.method == "PUT":
            return self._landed(client, request, await client.call(request, self._effective.limits))
        write = _Finish(self, client, key, request, data, precondition, write_id)
        return landed(self._bucket.url(key), precondition, await follow(write))

    async def delete(self, keys: Iterable[str]) -> DeleteResult:
        return await delete(self._bucket, self._effective.limits, keys)

    async def copy(self, source: str, target: str) -> PutResult:
        check_key(source)
        storage_class = self._effective.storage_class("metadata")
        headers = {
            **self._bucket.write_headers,
            **({} if storage_class is None else {"x-amz-storage-class": storage_class}),
            "x-amz-copy-source": encode_key(f"/{self._bucket.name}/{self._bucket.root}{source}"),
        }
        request = self._bucket.request(f"copy {self._bucket.url(source)} to", "PUT", target, headers)
        client = await self._bucket.client()
        retrier = client.retrier(self._effective.limits, request)
        while True:
            answer = await client.call(request, retrier.limits)
            if answer.status >= 300:
                raise self._missing(client, request, source, answer)
            # A copy that fails on the way says so in the body of a 200.
            if not _hidden_refusal(answer):
                break
            if not await retrier.again(answer):
                raise client.failure(request, answer, retrier.tries)
        etag = text_of(require_document(request.what, answer), "ETag").strip('"')
        return PutResult(version=Version(etag), date_us=date_us(answer.headers))

    # -- the bucket ------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        await self._bucket.clients.aclose()

    @property
    def supports_writes(self) -> bool:
        return True

    @property
    def settings(self) -> StorageSettings:
        """The settings in force; those that are None have the defaults of `default_settings`."""
        return self._effective.settings

    def with_settings(self, settings: StorageSettings | None) -> Storage:
        # Not copy.copy, which pickles, and would therefore make new clients.
        other = object.__new__(type(self))
        other._bucket = self._bucket
        other._use(settings)
        return other

    def for_sender(self, sender: Sender) -> Storage:
        other = object.__new__(type(self))
        other._bucket = self._bucket
        other._effective = self._effective.for_sender(sender)
        return other

    def with_user_agent(self, user_agent: str) -> Storage:
        if user_agent == self._bucket.user_agent:
            return self
        other = object.__new__(type(self))
        other._bucket = self._bucket.named(user_agent)
        other._effective = self._effective
        return other

    def default_settings(self) -> StorageSettings:
        return object_store_settings()

    @property
    def atomic_preconditions(self) -> frozenset[type[Precondition]]:
        return self._effective.atomic_preconditions

    @property
    def endpoint_url(self) -> str | None:
        return self._bucket.options.endpoint_url

    def describe(self) -> str:
        return self._bucket.url()

    def __repr__(self) -> str:
        options = self._bucket.options
        rows = [("type", "S3 (native)"), ("bucket", self._bucket.name)]
        rows += [("prefix", self._bucket.root.rstrip("/"))] if self._bucket.root.rstrip("/") else []
        rows += [("region", options.region)] if options.region else []
        rows += [("endpoint_url", redacted_url(options.endpoint_url))] if options.endpoint_url else []
        rows += [
            (name, "True")
            for name in ("allow_http", "anonymous", "force_path_style", "requester_pays")
            if getattr(options, name)
        ]
        return "<icechunk.Storage>\n" + "".join(f"{name}: {value}\n" for name, value in rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, S3Storage):
            return NotImplemented
        mine, theirs = self._bucket, other._bucket
        return (mine.name, mine.root, mine.options) == (theirs.name, theirs.root, theirs.options)

    def __hash__(self) -> int:
        return hash((S3Storage, self._bucket.name, self._bucket.root))

    def __reduce__(self) -> tuple[Any, ...]:
        bucket = self._bucket
        return call_of(_unpickled, bucket.name, bucket.prefix, self._effective.settings, bucket.described)

    def _landed(self, client: S3Client, request: Request, answer: Answer) -> PutResult:
        if answer.status >= 300:
            raise client.failure(request, answer, 1)
        version = version_of(answer.headers)
        if request.method == "POST":
            version = Version(text_of(require_document(request.what, answer), "ETag").strip('"'))
        return PutResult(version=version, date_us=date_us(answer.headers))

    def _missing(self, client: S3Client, request: Request, key: str, answer: Answer) -> Exception:
        if answer.status == 404 and parse_refusal(answer).code != "NoSuchBucket":
            return ObjectNotFoundError(f"no object {key!r} in {self.describe()}")
        return client.failure(request, answer, 1)


def _unpickled(bucket: str, prefix: str | None, settings: StorageSettings, described: BucketOptions) -> Storage:
    return S3Storage(bucket, prefix, settings=settings, **described)


def _note_invisible(error: StorageError, key: str) -> None:
    """Note on the error of an upload in parts that it was not completed."""
    error.unsent = not error.refused
    if isinstance(error, AccessDeniedError):
        error.key = key


def _hidden_refusal(answer: Answer) -> bool:
    """True for a 200 whose body is an error document, as completing and copying may answer."""
    if answer.status != 200:
        return False
    head = answer.body[:300].lstrip()
    return b"<Error>" in head or b"<Error " in head


class _Finish:
    """The request that makes an object visible, as `icechunk.storage.outcome.follow` sends it."""

    def __init__(
        self,
        storage: S3Storage,
        client: S3Client,
        key: str,
        request: Request,
        data: bytes,
        precondition: Precondition,
        write_id: str | None,
    ) -> None:
        self._storage = storage
        self._client = client
        self._key = key
        self._request = request
        self._data = data
        self._precondition = precondition
        self._write_id = write_id
        self._retrier = client.retrier(storage._effective.limits, request)
        self._answer: Answer | Unanswered | None = None

    async def send(self, may_land: bool) -> Tried:
        answer = self._answer = await self._client.attempt(self._request, self._retrier.limits)
        tries = self._retrier.tries
        if isinstance(answer, Unanswered):
            error = self._client.failure(self._request, answer, tries)
            return Tried(
                error=error, may_land=answer.connected, reached=answer.connected, look=may_land or answer.connected
            )
        if answer.status < 300 and not _hidden_refusal(answer):
            return Tried(landed=True, put=self._storage._landed(self._client, self._request, answer))
        error = self._client.failure(self._request, answer, tries)
        code = parse_refusal(answer).code
        turned_down = answer.status == 412 or (answer.status == 404 and code == "NoSuchKey")
        vanished = code == "NoSuchUpload" and tries > 1
        if not (turned_down or vanished or answer.status in (200, 409) or is_transient(answer)):
            return Tried(error=error, final=True, refused=answer.status in REFUSING_STATUSES)
        return Tried(
            error=error,
            turned_down=turned_down and not isinstance(self._precondition, Unchecked),
            may_land=not turned_down and answer.status != 409,
            look=answer.status not in (429, 503),
        )

    async def look(self, may_land: bool) -> Seen:
        return judge(await self._read_back(may_land), self._precondition, may_land=may_land)

    async def _read_back(self, may_land: bool) -> Found | StorageError | None:
        storage, write_id = self._storage, self._write_id
        try:
            if write_id is not None or not may_land:
                headers = (await storage._head_answer(self._key)).headers
                ours = write_id is not None and headers.get(_WRITE_ID) == write_id
                return Found(ours=ours, version=version_of(headers), date_us=date_us(headers))
            found = await storage.get(self._key)
            return Found(ours=found.data == self._data, version=found.version, date_us=found.date_us)
        except ObjectNotFoundError:
            return None
        except StorageError as error:
            return error

    async def again(self, reached: bool) -> bool:
        assert self._answer is not None
        return await self._retrier.again(self._answer)
