"""Real components for load tests, tests and benchmarks: MinIO, versitygw, rclone, toxiproxy, Azurite, a moto server.

As a program it runs one until interrupted::

    python -m icechunk_loadtest.services minio --port 9000 --bucket data
    python -m icechunk_loadtest.services toxiproxy --upstream 127.0.0.1:9000 --latency-ms 20
    python -m icechunk_loadtest.services moto --bucket data
    python -m icechunk_loadtest.services azurite --container data
    python -m icechunk_loadtest.services install minio versitygw rclone toxiproxy azurite

In a checkout, ``python -m tools.services`` is the same. This module needs nothing but Python; moto, and buckets that
are made at the start, need their packages.

Binaries are looked for on ``PATH``, then in ``$GOBIN`` and ``~/go/bin``; `install` builds them with Go (MinIO takes
about three minutes). Azurite comes from npm, into a folder of its own below ``~/.cache``. Where there is no binary,
MinIO runs in docker. Every server listens on a free port of 127.0.0.1 and
ends with its context manager.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from email.utils import formatdate
from pathlib import Path

MINIO_MODULE = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c"
TOXIPROXY_MODULE = "github.com/Shopify/toxiproxy/v2/cmd/server@v2.5.0"
MINIO_IMAGE = "minio/minio"
VERSITYGW_MODULE = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"
RCLONE_MODULE = "github.com/rclone/rclone@v1.76.0"
AZURITE_VERSION = "3.35.0"
_MODULES = {
    "minio": MINIO_MODULE,
    "toxiproxy": TOXIPROXY_MODULE,
    "versitygw": VERSITYGW_MODULE,
    "rclone": RCLONE_MODULE,
}
# `go install` names toxiproxy's binary "server", distributions name it "toxiproxy-server".
_BINARIES = {
    "minio": ("minio",),
    "toxiproxy": ("toxiproxy-server", "server"),
    "versitygw": ("versitygw",),
    "rclone": ("rclone",),
}


class Unavailable(Exception):
    """A component is not on this machine; the message names the ways to get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Service:
    """A running S3 service."""

    endpoint: str
    """URL, ``http://127.0.0.1:port``."""
    access_key: str
    secret_key: str
    region: str = "us-east-1"
    pid: int | None = None
    """Process id of the server, if it is one of this machine."""

    @property
    def address(self) -> str:
        """Host and port."""
        return self.endpoint.removeprefix("http://")

    def make_bucket(self, name: str) -> None:
        """Create a bucket; one that exists already is fine."""
        asyncio.run(self._make_bucket(name))

    async def _make_bucket(self, name: str) -> None:
        from aiobotocore.config import AioConfig
        from aiobotocore.session import get_session

        async with get_session().create_client(
            "s3",
            region_name=self.region,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=AioConfig(s3={"addressing_style": "path"}, retries={"max_attempts": 5}),
        ) as client:
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                await client.create_bucket(Bucket=name)


def find_binary(component: str) -> str | None:
    """Path of a component's binary, or None."""
    places = [os.environ.get("GOBIN", ""), str(Path.home() / "go" / "bin")]
    for name in _BINARIES[component]:
        # "server" alone is too common a name to trust on PATH.
        found = shutil.which(name) if name != "server" else None
        found = found or shutil.which(name, path=os.pathsep.join(filter(None, places)))
        if found:
            return found
    return None


def install(component: str) -> str:
    """Build a component with Go unless it is there; returns the binary's path.

    Raises
    ------
    Unavailable
        No Go, or the build fails.
    """
    found = find_binary(component)
    if found:
        return found
    go = shutil.which("go")
    if go is None:
        raise Unavailable(
            f"{component} is not installed, and there is no Go to build it: put it on PATH, or install Go"
        )
    print(f"building {component} with Go, this takes some minutes", file=sys.stderr)
    done = subprocess.run([go, "install", _MODULES[component]], check=False)
    found = find_binary(component)
    if done.returncode != 0 or found is None:
        raise Unavailable(f"`go install {_MODULES[component]}` failed with code {done.returncode}")
    return found


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status < 500)
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, http.client.HTTPException):
        return False


@contextlib.contextmanager
def _process(command: list[str], health_url: str, name: str, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]
        try:
            deadline = time.monotonic() + 60
            while not _answers(health_url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    text = log.read()[-2000:].decode("utf-8", "replace")
                    raise Unavailable(f"{name} did not start (exit code {process.poll()}): {text}")
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def minio(*, port: int | None = None, buckets: Iterable[str] = ()) -> Iterator[S3Service]:
    """A MinIO with an empty disk.

    Raises
    ------
    Unavailable
        Neither binary nor docker, or it does not start.
    """
    port = port or free_port()
    service = S3Service(endpoint=f"http://127.0.0.1:{port}", access_key="minio-root", secret_key="minio-secret")
    settings = {
        "MINIO_ROOT_USER": service.access_key,
        "MINIO_ROOT_PASSWORD": service.secret_key,
        "MINIO_BROWSER": "off",
    }
    binary = find_binary("minio")
    with contextlib.ExitStack() as stack:
        if binary is not None:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="icechunk-minio-", ignore_cleanup_errors=True)
            )
            command = [binary, "server", folder, "--address", f"127.0.0.1:{port}", "--quiet"]
        elif docker := shutil.which("docker"):
            command = [docker, "run", "--rm", "-p", f"127.0.0.1:{port}:9000"]
            for name, value in settings.items():
                command += ["-e", f"{name}={value}"]
            command += [MINIO_IMAGE, "server", "/data"]
        else:
            raise Unavailable(
                f"no MinIO: put `minio` on PATH, or `go install {MINIO_MODULE}` "
                "(python -m icechunk_loadtest.services install minio), or install docker"
            )
        process = stack.enter_context(
            _process(command, f"{service.endpoint}/minio/health/live", "MinIO", env={**os.environ, **settings})
        )
        for bucket in buckets:
            service.make_bucket(bucket)
        yield replace(service, pid=process.pid if binary is not None else None)


@contextlib.contextmanager
def versitygw(*, port: int | None = None, buckets: Iterable[str] = ()) -> Iterator[S3Service]:
    """A Versity S3 Gateway over an empty folder.

    Raises
    ------
    Unavailable
        No binary, or it does not start.
    """
    service = _local_service(port)
    with _folder("versitygw") as folder:
        settings = {"ROOT_ACCESS_KEY_ID": service.access_key, "ROOT_SECRET_ACCESS_KEY": service.secret_key}
        command = [_binary("versitygw"), "--port", service.address, "--quiet", "posix", "--sidecar", f"{folder}/meta"]
        for part in ("meta", "data"):
            os.mkdir(f"{folder}/{part}")
        with _process(
            [*command, f"{folder}/data"], service.endpoint, "versitygw", env={**os.environ, **settings}
        ) as process:
            for bucket in buckets:
                service.make_bucket(bucket)
            yield replace(service, pid=process.pid)


@contextlib.contextmanager
def rclone(*, port: int | None = None, buckets: Iterable[str] = ()) -> Iterator[S3Service]:
    """``rclone serve s3`` over an empty folder.

    Raises
    ------
    Unavailable
        No binary, or it does not start.
    """
    service = _local_service(port)
    with _folder("rclone") as folder:
        keys = f"{service.access_key},{service.secret_key}"
        command = [_binary("rclone"), "serve", "s3", folder, "--addr", service.address, "--auth-key", keys]
        with _process([*command, "--vfs-cache-mode", "off"], service.endpoint, "rclone") as process:
            for bucket in buckets:
                service.make_bucket(bucket)
            yield replace(service, pid=process.pid)


def _local_service(port: int | None) -> S3Service:
    endpoint = f"http://127.0.0.1:{port or free_port()}"
    return S3Service(endpoint=endpoint, access_key="loadtest-root", secret_key="loadtest-secret")


def _folder(component: str) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=f"icechunk-{component}-", ignore_cleanup_errors=True)


def _binary(component: str) -> str:
    found = find_binary(component)
    if found is None:
        raise Unavailable(
            f"no {component}: put it on PATH, or `go install {_MODULES[component]}` "
            f"(python -m icechunk_loadtest.services install {component})"
        )
    return found


def cpu_s(pid: int) -> float | None:
    """Processor time of a process so far in seconds, user and system; None where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def moto(*, port: int | None = None, buckets: Iterable[str] = ()) -> Iterator[S3Service]:
    """A moto server in a process of its own, about 200 requests a second: for semantics, not for load."""
    port = port or free_port()
    service = S3Service(endpoint=f"http://127.0.0.1:{port}", access_key="testing", secret_key="testing")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _process(command, f"{service.endpoint}/moto-api/", "moto"):
        for bucket in buckets:
            service.make_bucket(bucket)
        yield service


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureService:
    """A running Azure Blob Storage."""

    endpoint: str
    """URL of the account, ``http://127.0.0.1:port/account``."""
    account: str = "devstoreaccount1"
    # Azurite's published key, the same for all users.
    access_key: str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

    def make_container(self, name: str, *, public: bool = False) -> None:
        """Create a container; a `public` one can be read without credentials."""
        extra = {"x-ms-blob-public-access": "container"} if public else {}
        rows = {**extra, "x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
        signed = "".join(f"{header}:{value}\n" for header, value in sorted(rows.items()))
        text = f"PUT{chr(10) * 12}{signed}/{self.account}/{self.account}/{name}\nrestype:container"
        digest = hmac.new(base64.b64decode(self.access_key), text.encode(), hashlib.sha256).digest()
        rows["Authorization"] = f"SharedKey {self.account}:{base64.b64encode(digest).decode()}"
        host = self.endpoint.removeprefix("http://").partition("/")[0]
        connection = http.client.HTTPConnection(host, timeout=30)
        try:
            connection.putrequest("PUT", f"/{self.account}/{name}?restype=container", skip_accept_encoding=True)
            for header, value in {**rows, "Content-Length": "0"}.items():
                connection.putheader(header, value)
            connection.endheaders()
            answer = connection.getresponse()
            if answer.status not in (201, 409):
                raise Unavailable(f"Azurite refused to make a container: {answer.status} {answer.read(300)!r}")
        finally:
            connection.close()


def _azurite_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / f"icechunk-azurite-{AZURITE_VERSION}"


def find_azurite() -> str | None:
    """Path of Azurite's blob service, or None."""
    place = _azurite_folder() / "node_modules" / ".bin"
    return shutil.which("azurite-blob", path=str(place)) or shutil.which("azurite-blob")


def install_azurite() -> str:
    """Get Azurite from npm unless it is there; returns the program's path.

    Raises
    ------
    Unavailable
        No npm, or it fails.
    """
    found = find_azurite()
    if found:
        return found
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("azurite is not installed, and there is no npm to get it: install Node.js")
    folder = _azurite_folder()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"getting azurite {AZURITE_VERSION} from npm", file=sys.stderr)
    command = [npm, "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder)]
    done = subprocess.run([*command, f"azurite@{AZURITE_VERSION}"], check=False)
    found = find_azurite()
    if done.returncode != 0 or found is None:
        raise Unavailable(f"`npm install azurite@{AZURITE_VERSION}` failed with code {done.returncode}")
    return found


@contextlib.contextmanager
def azurite(*, port: int | None = None, containers: Iterable[str] = ()) -> Iterator[AzureService]:
    """An empty Azurite, Microsoft's emulator of Azure Blob Storage.

    Raises
    ------
    Unavailable
        It is not installed, or does not start.
    """
    program = find_azurite()
    if program is None:
        raise Unavailable("no Azurite: python -m icechunk_loadtest.services install azurite (needs npm)")
    port = port or free_port()
    service = AzureService(endpoint=f"http://127.0.0.1:{port}/devstoreaccount1")
    command = [program, "--silent", "--skipApiVersionCheck", "--inMemoryPersistence", "--disableTelemetry"]
    command += ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with _process(command, f"http://127.0.0.1:{port}/", "Azurite"):
        for container in containers:
            service.make_container(container)
        yield service


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """A toxiproxy in front of a service."""

    endpoint: str
    """URL through the proxy."""
    control: str
    """URL of the proxy's REST interface."""

    def add(self, kind: str, *, name: str = "", stream: str = "downstream", **attributes: float) -> None:
        """Add a toxic: ``latency``, ``timeout``, ``reset_peer``, ``limit_data``, ``slow_close``, ``bandwidth``."""
        body = {"name": name or kind, "type": kind, "stream": stream, "toxicity": 1.0, "attributes": attributes}
        _post(f"{self.control}/proxies/upstream/toxics", body)

    def remove(self, name: str) -> None:
        """Remove a toxic by its name."""
        request = urllib.request.Request(f"{self.control}/proxies/upstream/toxics/{name}", method="DELETE")
        with urllib.request.urlopen(request, timeout=10):
            pass


def _post(url: str, body: object) -> None:
    request = urllib.request.Request(
        url,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "User-Agent": "icechunk-loadtest"},
    )
    with urllib.request.urlopen(request, timeout=10):
        pass


@contextlib.contextmanager
def toxiproxy(upstream: str, *, latency_ms: int = 0) -> Iterator[Proxy]:
    """A proxy to ``upstream`` (``host:port``) with that much latency on the way back.

    Raises
    ------
    Unavailable
        No binary, or it does not start.
    """
    binary = find_binary("toxiproxy")
    if binary is None:
        raise Unavailable(
            f"no toxiproxy: `go install {TOXIPROXY_MODULE}` (python -m icechunk_loadtest.services install toxiproxy)"
        )
    control_port, port = free_port(), free_port()
    control = f"http://127.0.0.1:{control_port}"
    with _process([binary, "-host", "127.0.0.1", "-port", str(control_port)], f"{control}/version", "toxiproxy"):
        _post(f"{control}/proxies", {"name": "upstream", "listen": f"127.0.0.1:{port}", "upstream": upstream})
        proxy = Proxy(endpoint=f"http://127.0.0.1:{port}", control=control)
        if latency_ms:
            proxy.add("latency", latency=latency_ms)
        yield proxy


_SERVERS = {"minio": minio, "moto": moto, "versitygw": versitygw, "rclone": rclone}


def main(arguments: list[str] | None = None) -> int:
    """Run a component until interrupted, or install some."""
    parser = argparse.ArgumentParser(description="real components for tests and benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in _SERVERS:
        command = commands.add_parser(name)
        command.add_argument("--port", type=int)
        command.add_argument("--bucket", action="append", default=[])
    blobs = commands.add_parser("azurite")
    blobs.add_argument("--port", type=int)
    blobs.add_argument("--container", action="append", default=[])
    proxy = commands.add_parser("toxiproxy")
    proxy.add_argument("--upstream", required=True, metavar="HOST:PORT")
    proxy.add_argument("--latency-ms", type=int, default=0)
    building = commands.add_parser("install")
    building.add_argument("component", nargs="+", choices=sorted([*_MODULES, "azurite"]))
    options = parser.parse_args(arguments)
    try:
        if options.command == "install":
            for component in options.component:
                print(install_azurite() if component == "azurite" else install(component))
            return 0
        with contextlib.ExitStack() as stack:
            if options.command == "toxiproxy":
                print(stack.enter_context(toxiproxy(options.upstream, latency_ms=options.latency_ms)).endpoint)
            elif options.command == "azurite":
                blob = stack.enter_context(azurite(port=options.port, containers=options.container))
                print(f"{blob.endpoint} account {blob.account}, access key {blob.access_key}")
            else:
                service = stack.enter_context(_SERVERS[options.command](port=options.port, buckets=options.bucket))
                print(f"{service.endpoint} access key {service.access_key}, secret {service.secret_key}")
            sys.stdout.flush()
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
