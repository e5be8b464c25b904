"""Commit to one branch again and again, while others do: the same script on our library and on the official one.

``python -m tools.interop.race ENDPOINT ACCESS SECRET BUCKET PREFIX NAME COUNT`` commits COUNT times to ``main``, begins
again after each conflict, and prints the ids of its snapshots as JSON. With ``until-refused`` in place of COUNT it goes
on until it is refused for another reason than a conflict.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import zarr

import icechunk

__all__ = ["commits", "commits_until_refused", "storage_on"]

_TRIES = 200


def storage_on(endpoint: str, access: str, secret: str, bucket: str, prefix: str) -> Any:
    """A prefix of a bucket behind an endpoint."""
    return icechunk.s3_storage(
        bucket=bucket,
        prefix=prefix,
        endpoint_url=endpoint,
        region="us-east-1",
        allow_http=True,
        force_path_style=True,
        access_key_id=access,
        secret_access_key=secret,
    )


def commits(repo: Any, name: str, count: int) -> list[str]:
    """The ids of as many snapshots, each with a group of its own."""
    done: list[str] = []
    for _ in range(_TRIES):
        session = repo.writable_session("main")
        zarr.create_group(store=session.store, path=f"{name}_{len(done)}")
        try:
            done.append(session.commit(f"{name} {len(done)}"))
        except icechunk.ConflictError:
            continue
        if len(done) == count:
            return done
    raise RuntimeError(f"{name} had {len(done)} of {count} commits after {_TRIES} tries")


def commits_until_refused(repo: Any, name: str) -> list[str]:
    """The ids of the snapshots that were acknowledged before the repository took no more of this client."""
    done: list[str] = []
    lost = 0
    while lost < _TRIES and len(done) < _TRIES:
        try:
            session = repo.writable_session("main")
            zarr.create_group(store=session.store, path=f"{name}_{len(done)}")
            done.append(session.commit(f"{name} {len(done)}"))
            lost = 0
        except icechunk.ConflictError:
            lost += 1
        except (icechunk.IcechunkError, ValueError):
            return done
    return done


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    *place, name, count = arguments
    repo = icechunk.Repository.open(storage_on(*place))
    done = commits_until_refused(repo, name) if count == "until-refused" else commits(repo, name, int(count))
    print(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1:])
    # Not through the interpreter's end, where official 1.1.21 sometimes aborts.
    sys.stdout.flush()
    os._exit(0)
