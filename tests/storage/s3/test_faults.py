"""Faults of a service: every fault has a test, and conditional writes report the right outcome for each."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import pickle
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from icechunk.config import S3Options, StorageRetriesSettings, StorageSettings, StorageTimeoutSettings
from icechunk.credentials import S3Credentials, S3StaticCredentials
from icechunk.errors import PreconditionFailedError, StorageError
from icechunk.runtime.clock import Sources
from icechunk.storage.port import Absent, Matches, Version
from icechunk.storage.s3.endpoint import Endpoint
from icechunk.storage.s3.storage import S3Storage
from tests.raising import raises
from tests.storage.s3.faulty_s3 import HANG, LOSE, LOSE_THEN_REPLACE, OK, RESET, STALL, TRUNCATE, FaultyS3, Say, serving

SLOW_DOWN = Say(503, "SlowDown")
PATH = "/b/p/x"


@dataclass
class Pauses:
    lengths: list[float] = field(default_factory=list)

    async def __call__(self, seconds: float) -> None:
        self.lengths.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
async def server() -> AsyncIterator[FaultyS3]:
    async with serving() as faulty:
        yield faulty


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def storage(server: FaultyS3, pauses: Pauses) -> S3Storage:
    return storage_on(server, pauses)


def storage_on(server: FaultyS3, pauses: Pauses, **settings: object) -> S3Storage:
    return S3Storage(
        "b",
        "p",
        options=S3Options(region="us-east-1", endpoint_url=server.endpoint, allow_http=True, force_path_style=True),
        credentials=S3Credentials.Static(S3StaticCredentials("AKID", "secret")),
        settings=StorageSettings(
            retries=StorageRetriesSettings(max_tries=4),
            timeouts=StorageTimeoutSettings(read_timeout_ms=150),
            **settings,  # type: ignore[arg-type]
        ),
        # Half of each ceiling, always.
        sources=Sources(sleep=pauses, random_bytes=lambda n: b"\x80" + b"\0" * (n - 1)),
    )


@pytest.mark.parametrize(
    "fault", [RESET, SLOW_DOWN, Say(500), Say(429), TRUNCATE, STALL, HANG, Say(400, "RequestTimeout")]
)
async def test_reads_are_tried_again(server: FaultyS3, storage: S3Storage, pauses: Pauses, fault: str | Say) -> None:
    server.objects[PATH] = (b"content", {})
    server.behaviours = [fault, fault, OK]
    assert (await storage.get("x")).data == b"content"
    assert pauses.lengths == pytest.approx([0.05, 0.1])


async def test_retries_are_logged_with_their_object_and_without_secrets(
    server: FaultyS3, storage: S3Storage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "icechunk")
    server.behaviours = [SLOW_DOWN, RESET, OK]
    await storage.put("x", b"new")
    messages = [record.getMessage() for record in caplog.records if record.name == "icechunk.storage.s3.requests"]
    assert len(messages) == 2
    assert messages[0].startswith("trying again to write s3://b/p/x in 50 ms, after try 1: HTTP 503")
    assert not [line for line in messages if "AKID" in line or "secret" in line]


@pytest.mark.parametrize("fault", [RESET, LOSE, SLOW_DOWN, HANG])
async def test_unconditional_writes_are_tried_again(server: FaultyS3, storage: S3Storage, fault: str | Say) -> None:
    server.behaviours = [fault]
    await storage.put("x", b"new")
    assert server.objects[PATH][0] == b"new"
    assert server.methods() == ["PUT", "PUT"]


async def test_tries_and_pauses_are_bounded(server: FaultyS3, storage: S3Storage, pauses: Pauses) -> None:
    server.behaviours = [SLOW_DOWN] * 100
    with raises(StorageError, "throttled", "s3://b/p/x", "SlowDown"):
        await storage.get("x")
    assert len(server.seen) == 4
    assert pauses.lengths == pytest.approx([0.05, 0.1, 0.2])


async def test_one_try_is_one_request(server: FaultyS3, storage: S3Storage) -> None:
    """aiohttp repeats requests by itself when a kept connection broke; ours must not, or a 412 is ambiguous."""
    server.objects[PATH] = (b"content", {})
    await storage.get("x")
    server.behaviours = [RESET]
    single = storage.with_settings(StorageSettings(retries=StorageRetriesSettings(max_tries=1)))
    with raises(StorageError, "object-store", "ConnectionResetError"):
        await single.get("x")
    assert len(server.seen) == 2


async def test_no_expect_header_and_a_signed_payload_over_http(server: FaultyS3, storage: S3Storage) -> None:
    await storage.put("x", b"data")
    sent = server.seen[0].headers
    assert "expect" not in sent
    assert sent["x-amz-content-sha256"] == "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"
    assert sent["authorization"].startswith("AWS4-HMAC-SHA256 Credential=AKID/")


async def test_a_large_body_that_stays_on_this_machine_goes_without_its_hash(
    server: FaultyS3, storage: S3Storage
) -> None:
    data = b"x" * 600_000
    await storage.put("x", data)
    assert server.seen[0].headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    assert server.objects[PATH][0] == data


async def test_a_service_that_requires_the_hash_gets_it_from_then_on(server: FaultyS3, storage: S3Storage) -> None:
    data = b"x" * 600_000
    server.behaviours = [Say(400, "InvalidRequest")]
    await storage.put("x", data)
    await storage.put("x", data)
    sent = [seen.headers["x-amz-content-sha256"] for seen in server.seen]
    assert sent == ["UNSIGNED-PAYLOAD", *[hashlib.sha256(data).hexdigest()] * 2]


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1:9000", True),
        ("[::1]:9000", True),
        ("localhost", True),
        ("minio.localhost", True),
        ("192.168.0.2", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback_addresses_are_recognised(host: str, here: bool) -> None:
    endpoint = Endpoint(scheme="http", host=host, path="/b", region="r", region_is_a_guess=False)
    assert endpoint.is_this_machine is here


@pytest.mark.parametrize(
    ("fault", "metadata"),
    [
        (LOSE, True),
        (LOSE, False),
        (Say(500, carry_out=True), True),
        (Say(500, carry_out=True), False),
        # Without metadata nothing contradicts the service's word that nothing landed.
        (Say(409, "ConditionalRequestConflict", carry_out=True), True),
    ],
)
async def test_creation_that_landed_but_lost_its_answer_succeeds(
    server: FaultyS3, pauses: Pauses, fault: str | Say, metadata: bool
) -> None:
    storage = storage_on(server, pauses, unsafe_use_metadata=metadata)
    server.behaviours = [fault]
    put = await storage.put("x", b"mine", Absent())
    assert put.version == (await storage.get("x")).version
    assert server.methods()[:2] == ["PUT", "HEAD" if metadata else "GET"]


@pytest.mark.parametrize("fault", [RESET, SLOW_DOWN, Say(500), HANG, Say(409, "ConditionalRequestConflict")])
async def test_creation_that_did_not_land_is_sent_again_with_the_same_bytes(
    server: FaultyS3, storage: S3Storage, fault: str | Say
) -> None:
    server.behaviours = [fault]
    await storage.put("x", b"mine", Absent())
    puts = [seen for seen in server.seen if seen.method == "PUT"]
    assert len(puts) == 2
    assert puts[0].body == puts[1].body == b"mine"
    assert len({seen.headers["x-amz-meta-icechunk-write-id"] for seen in puts}) == 1


@pytest.mark.parametrize("fault", [LOSE, OK, HANG, SLOW_DOWN])
async def test_creation_over_an_existing_object_is_refused_for_certain(
    server: FaultyS3, storage: S3Storage, fault: str | Say
) -> None:
    server.objects[PATH] = (b"another's", {})
    server.behaviours = [fault]
    with raises(PreconditionFailedError, "object-store", "s3://b/p/x"):
        await storage.put("x", b"another's", Absent())


async def test_a_412_of_our_own_lost_write_is_success(server: FaultyS3, storage: S3Storage) -> None:
    # The answer is lost, and reading back fails too; the second try meets the first one's object.
    server.behaviours = [LOSE, *[RESET] * 4]
    await storage.put("x", b"mine", Absent())
    assert server.methods() == ["PUT", *["HEAD"] * 4, "PUT", "HEAD"]


async def test_replacement_that_landed_but_lost_its_answer_succeeds(server: FaultyS3, storage: S3Storage) -> None:
    base = await storage.put("x", b"base")
    server.behaviours = [LOSE]
    put = await storage.put("x", b"mine", Matches(base.version))
    assert put.version == (await storage.head("x")).version


async def test_replacement_that_may_have_been_replaced_in_turn_is_uncertain(
    server: FaultyS3, storage: S3Storage
) -> None:
    base = await storage.put("x", b"base")
    server.behaviours = [LOSE_THEN_REPLACE]
    with raises(StorageError, "object-store", "s3://b/p/x") as caught:
        await storage.put("x", b"mine", Matches(base.version))
    assert not isinstance(caught.value, PreconditionFailedError)
    assert (caught.value.refused, caught.value.unsent) == (False, False)


async def test_replacement_of_a_missing_object_is_a_failed_precondition(server: FaultyS3, storage: S3Storage) -> None:
    with pytest.raises(PreconditionFailedError):
        await storage.put("x", b"mine", Matches(Version("abc")))


async def test_a_write_without_answer_to_the_end_is_called_uncertain(server: FaultyS3, storage: S3Storage) -> None:
    server.behaviours = [RESET] * 100
    with raises(StorageError, "object-store", "s3://b/p/x") as caught:
        await storage.put("x", b"mine", Absent())
    assert not isinstance(caught.value, PreconditionFailedError)
    assert (caught.value.refused, caught.value.unsent) == (False, False)


REFUSALS = [
    Say(400, "InvalidRequest"),
    Say(401, "Unauthorized"),
    Say(403, "AccessDenied"),
    Say(404, "NoSuchBucket"),
    Say(405, "MethodNotAllowed"),
    Say(411, "MissingContentLength"),
    Say(501, "NotImplemented"),
]


@pytest.mark.parametrize("answer", REFUSALS, ids=lambda say: str(say.status))
async def test_a_refusal_of_every_try_is_certain(server: FaultyS3, storage: S3Storage, answer: Say) -> None:
    server.behaviours = [answer]
    with pytest.raises(StorageError) as caught:
        await storage.put("x", b"mine", Absent())
    assert (caught.value.refused, caught.value.unsent) == (True, False)
    assert len(server.seen) == 1
    assert pickle.loads(pickle.dumps(caught.value)).refused


async def test_a_deletion_from_a_bucket_that_is_not_there_is_refused(server: FaultyS3, storage: S3Storage) -> None:
    server.behaviours = [Say(404, "NoSuchBucket")]
    with pytest.raises(StorageError) as caught:
        await storage.delete(["x"])
    assert caught.value.refused
    assert len(server.seen) == 1


@pytest.mark.parametrize("before", [RESET, LOSE, Say(503, "SlowDown"), Say(500, "InternalError")], ids=str)
async def test_a_refusal_after_a_try_without_answer_is_not(
    server: FaultyS3, storage: S3Storage, before: str | Say
) -> None:
    server.faulty = lambda seen: RESET if seen.method == "HEAD" else before if len(server.seen) == 1 else Say(403, "No")
    with pytest.raises(StorageError) as caught:
        await storage.put("x", b"mine", Absent())
    assert not caught.value.refused
    assert not caught.value.unsent


async def test_a_write_that_reached_no_server_is_known_not_to_have_landed(server: FaultyS3, pauses: Pauses) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        server.port = nobody.getsockname()[1]
        elsewhere = storage_on(server, pauses)
        with pytest.raises(StorageError) as caught:
            await elsewhere.put("x", b"mine", Absent())
        await elsewhere.aclose()
    assert (caught.value.refused, caught.value.unsent) == (False, True)


@dataclass
class ToldOnceSeen:
    """A sender that is notified as soon as the server has had a request."""

    server: FaultyS3

    @property
    def is_told(self) -> bool:
        return len(self.server.seen) > 0


@pytest.mark.parametrize("fault", [Say(503, "SlowDown"), RESET, Say(403, "ExpiredToken")], ids=str)
async def test_a_told_attempt_is_not_sent_again(server: FaultyS3, storage: S3Storage, fault: str | Say) -> None:
    server.faulty = lambda seen: fault if seen.method == "PUT" else OK
    with pytest.raises(StorageError):
        await storage.for_sender(ToldOnceSeen(server)).put("x", b"mine", Absent())
    assert server.methods().count("PUT") == 1


async def test_a_write_in_parts_that_was_not_completed_is_known_not_to_have_landed(
    server: FaultyS3, pauses: Pauses
) -> None:
    storage = storage_on(server, pauses, minimum_size_for_multipart_upload=6 << 20)
    for answer, certain in ((Say(403, "AccessDenied"), (True, False)), (Say(503, "SlowDown"), (False, True))):
        server.faulty = lambda seen, answer=answer: answer if seen.method == "POST" else OK
        with pytest.raises(StorageError) as caught:
            await storage.put("x", bytes(7 << 20), Absent())
        assert (caught.value.refused, caught.value.unsent) == certain
    await storage.aclose()


async def test_a_first_412_costs_one_request(server: FaultyS3, storage: S3Storage) -> None:
    server.objects[PATH] = (b"another's", {})
    with pytest.raises(PreconditionFailedError):
        await storage.put("x", b"mine", Absent())
    assert server.methods() == ["PUT"]


async def test_a_proxy_that_lost_its_client_is_asked_again(server: FaultyS3, storage: S3Storage) -> None:
    server.behaviours = [Say(499, "")]
    await storage.put("x", b"mine", Absent())
    assert (await storage.get("x")).data == b"mine"


async def test_cancelling_leaves_no_task_behind(server: FaultyS3, storage: S3Storage) -> None:
    server.objects[PATH] = (b"content", {})
    before = asyncio.all_tasks()
    for fault in (HANG, STALL):
        server.behaviours = [fault]
        server.arrived.clear()
        task = asyncio.create_task(storage.get("x"))
        await server.arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (await storage.get("x")).data == b"content"
    new = {t.get_coro().__qualname__ for t in asyncio.all_tasks() - before}  # type: ignore[union-attr]
    assert all("serving" in name or "handle" in name for name in new), new


async def test_a_wrong_clock_is_corrected_by_the_stores_date(server: FaultyS3, storage: S3Storage) -> None:
    server.objects[PATH] = (b"content", {})
    server.behaviours = [Say(403, "RequestTimeTooSkewed")]
    assert (await storage.get("x")).data == b"content"
    assert server.seen[1].headers["x-amz-date"].startswith("20010909T0146")
    await storage.get("x")
    assert server.seen[2].headers["x-amz-date"].startswith("20010909T0146")


@pytest.mark.parametrize(
    ("say", "kind", "remedy"),
    [
        (Say(404, "NoSuchBucket"), "object-store", "the bucket does not exist"),
        (Say(403, "AccessDenied"), "object-store", "check credentials and the bucket's policy"),
        (Say(403, "InvalidAccessKeyId"), "object-store", "credentials were not accepted"),
        (Say(403, "SignatureDoesNotMatch"), "object-store", "credentials were not accepted"),
        (
            Say(301, "PermanentRedirect", {"x-amz-bucket-region": "eu-west-1"}),
            "bad-redirect",
            "set region: it is in 'eu-west-1'",
        ),
        (Say(307, "TemporaryRedirect"), "bad-redirect", "redirects elsewhere"),
        (Say(403, "RequestTimeTooSkewed", {"Date": "?"}), "object-store", "clock is wrong"),
    ],
)
async def test_refusals_name_object_and_remedy_at_once(
    server: FaultyS3, storage: S3Storage, say: Say, kind: str, remedy: str
) -> None:
    server.behaviours = [say] * 2
    with raises(StorageError, kind, "s3://b/p/x", remedy):  # words: each refusal has its own remedy
        await storage.get("x")
    assert len(server.seen) == 1
    assert "secret" not in repr(storage)


async def test_a_service_that_is_not_there_is_given_up_soon(pauses: Pauses) -> None:
    async with serving() as server:
        storage = storage_on(server, pauses).with_settings(None)
    with raises(StorageError, "object-store", "s3://b/p/x", "endpoint_url"):
        await storage.get("x")
    assert len(pauses.lengths) == 3


async def test_a_try_ends_at_its_time_limit(server: FaultyS3, storage: S3Storage) -> None:
    server.objects[PATH] = (b"content", {})
    server.behaviours = [HANG, STALL, OK]
    hurried = storage.with_settings(
        StorageSettings(timeouts=StorageTimeoutSettings(operation_attempt_timeout_ms=100, read_timeout_ms=60_000))
    )
    assert (await hurried.get("x")).data == b"content"
    assert len(server.seen) == 3


@pytest.mark.parametrize("fault", [HANG, STALL])
async def test_all_tries_together_take_no_longer_than_their_limit(
    server: FaultyS3, storage: S3Storage, fault: str
) -> None:
    server.objects[PATH] = (b"content", {})
    server.behaviours = [fault] * 100
    limit = StorageTimeoutSettings(operation_timeout_ms=150, read_timeout_ms=60_000)
    hurried = storage.with_settings(StorageSettings(timeouts=limit))
    with raises(StorageError, "object-store", "s3://b/p/x"):
        await hurried.get("x")
    assert len(server.seen) == 1
    if fault == HANG:
        with raises(StorageError, "object-store", "s3://b/p/x") as caught:
            await hurried.put("x", b"new", Absent())
        assert (caught.value.refused, caught.value.unsent) == (False, False)
        assert [seen.method for seen in server.seen].count("PUT") == 1


async def test_a_connection_that_is_not_made_is_given_up_after_its_limit(pauses: Pauses) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
        address = silent.getsockname()
        # The queue of a listener that accepts no connection: the next one is not even refused.
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        storage = S3Storage(
            "b",
            "p",
            options=S3Options(
                region="us-east-1",
                endpoint_url=f"http://127.0.0.1:{address[1]}",
                allow_http=True,
                force_path_style=True,
            ),
            credentials=S3Credentials.Static(S3StaticCredentials("AKID", "secret")),
            settings=StorageSettings(timeouts=StorageTimeoutSettings(connect_timeout_ms=50)),
            sources=Sources(sleep=pauses),
        )
        with raises(StorageError, "object-store", "s3://b/p/x"):
            await storage.get("x")
        assert len(pauses.lengths) == 3
        await storage.aclose()
        for one in waiting:
            one.close()


async def test_tls_to_a_plain_port_names_the_remedy(server: FaultyS3, pauses: Pauses) -> None:
    storage = S3Storage(
        "b",
        options=S3Options(region="x", endpoint_url=server.endpoint.replace("http", "https"), force_path_style=True),
        credentials=S3Credentials.Anonymous(),
        sources=Sources(sleep=pauses),
    )
    with raises(StorageError, "object-store", "allow_http=True", "SSL"):
        await storage.get("x")


async def test_plain_http_needs_permission(server: FaultyS3) -> None:
    storage = S3Storage("b", options=S3Options(region="x", endpoint_url=server.endpoint))
    with raises(StorageError, "storage-config", "allow_http=True", "http://127.0.0.1"):
        await storage.get("x")
