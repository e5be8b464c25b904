"""The place of the demo's repository: a folder, an S3 server inside the process, or any S3 endpoint."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import icechunk
from icechunk.cli.terminal import CommandError
from icechunk.runtime.late_dataclass import dataclass

__all__ = ["Target", "open_target"]

BUCKET = "icechunk-demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A place for a new repository."""

    storage: Any
    """The storage to create it in."""
    place: str
    """The place as people write it: a path, or a URL with its endpoint."""
    keep: str
    """A sentence that says whether the repository is kept after the demo."""
    stored_bytes: Callable[[], int] | None
    """Bytes stored so far, where they can be counted cheaply."""


@contextmanager
def open_target(args: argparse.Namespace) -> Iterator[Target]:
    """The place that the arguments name; a server that was started for it ends with the block.

    Raises
    ------
    CommandError
        The arguments name no usable place.
    """
    if args.storage is None and (args.endpoint_url or args.region):
        raise CommandError("--endpoint-url and --region go with --storage s3://bucket/prefix")
    if args.storage is not None:
        yield _endpoint(args.storage, args.endpoint_url, args.region)
    elif args.s3:
        with _embedded_s3() as target:
            yield target
    else:
        yield _folder(args.path)


def _folder(path: str | None) -> Target:
    if path is None:
        root = Path(tempfile.mkdtemp(prefix="icechunk-demo-"))
    else:
        root = Path(path).expanduser().absolute()
        if root.exists() and not root.is_dir():
            raise CommandError(f"{root} is a file; --path takes a folder that is new or empty")
        if root.is_dir() and any(root.iterdir()):
            raise CommandError(f"{root} is not empty; name a new folder with --path, or delete this one")
    return Target(
        storage=icechunk.local_filesystem_storage(str(root)),
        place=str(root),
        keep=f"The repository stays there; `rm -r {shlex.quote(str(root))}` removes it.",
        stored_bytes=lambda: sum(file.stat().st_size for file in root.rglob("*") if file.is_file()),
    )


def _endpoint(url: str, endpoint_url: str | None, region: str | None) -> Target:
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc:
        raise CommandError(f"--storage {url} is not of the form s3://bucket/prefix")
    prefix = parts.path.strip("/")
    if not prefix:
        raise CommandError(f"--storage {url} names a whole bucket; add a prefix for the demo: s3://{parts.netloc}/demo")
    if endpoint_url is not None and urlsplit(endpoint_url).scheme not in ("http", "https"):
        raise CommandError(f"--endpoint-url {endpoint_url} must start with http:// or https://")
    return Target(
        storage=icechunk.s3_storage(
            bucket=parts.netloc,
            prefix=prefix,
            region=region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
            endpoint_url=endpoint_url,
            allow_http=endpoint_url is not None and endpoint_url.startswith("http://"),
            # an endpoint of one's own rarely has a name per bucket in DNS
            force_path_style=endpoint_url is not None,
            from_env=True,
        ),
        place=f"s3://{parts.netloc}/{prefix}" + (f" at {endpoint_url}" if endpoint_url else ""),
        keep="The repository stays there; delete the prefix to remove it.",
        stored_bytes=None,
    )


@contextmanager
def _embedded_s3() -> Iterator[Target]:
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as error:
        raise CommandError("--s3 needs moto: pip install 'aioicechunk[demo]'") from error
    # the demo's output is for people, not a request log
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).close()
        yield Target(
            storage=icechunk.s3_storage(
                bucket=BUCKET,
                prefix="demo",
                region="us-east-1",
                endpoint_url=endpoint,
                allow_http=True,
                force_path_style=True,
                access_key_id="demo",
                secret_access_key="demo-secret",
            ),
            place=f"s3://{BUCKET}/demo at {endpoint} (embedded moto server)",
            keep="The server and its data ended with the demo.",
            stored_bytes=None,
        )
    finally:
        server.stop()
