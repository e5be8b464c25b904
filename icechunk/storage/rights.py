"""The rights that requests need, in the terms of each service, and the error where one is missing.

A service may hide the existence of objects: a read of an object that does not exist is then answered like one that is
not allowed, unless the client may list. Some services name the missing right in their answer.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final

from icechunk.errors import AccessDeniedError, ObjectNotFoundError, StorageError

__all__ = ["Right", "Service", "access_denied"]


class Right(StrEnum):
    """The rights that a client needs."""

    READ = "read"
    LIST = "list"
    WRITE = "write"
    DELETE = "delete"


class Service(StrEnum):
    """A kind of storage that has rights."""

    S3 = "s3"
    GCS = "gcs"
    AZURE = "azure"
    WEB = "web"


_BLOBS: Final = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs"
_ACTIONS: Final = {
    Service.S3: {
        Right.READ: "s3:GetObject",
        Right.LIST: "s3:ListBucket",
        Right.WRITE: "s3:PutObject",
        Right.DELETE: "s3:DeleteObject",
    },
    Service.GCS: {
        Right.READ: "storage.objects.get",
        Right.LIST: "storage.objects.list",
        Right.WRITE: "storage.objects.create and storage.objects.delete",
        Right.DELETE: "storage.objects.delete",
    },
    Service.AZURE: {
        Right.READ: f"{_BLOBS}/read",
        Right.LIST: f"{_BLOBS}/read",
        Right.WRITE: f"{_BLOBS}/write",
        Right.DELETE: f"{_BLOBS}/delete",
    },
}
_MISSING_ACTION: Final = re.compile(r"not authorized to perform:? (\w+:\w+)|does not have (storage\.\w+\.\w+) access")
_HIDES: Final = frozenset({Service.S3, Service.GCS, Service.WEB})
"""Services that may refuse to read a missing object; Azure answers 404 to every client with the right to read."""


def access_denied(service: Service, right: Right, key: str, what: str, said: str, where: str) -> StorageError:
    """The error for a request that the service does not allow.

    Parameters
    ----------
    key
        As of `AccessDeniedError`.
    what
        What was attempted on which object, as in ``read s3://bucket/key``.
    said
        The service's own words.
    where
        What is to be checked: ``credentials and the bucket's policy``.

    Returns
    -------
    StorageError
        An `ObjectNotFoundError` where the service says that nothing but the right to list is missing for a read.
    """
    actions = _ACTIONS.get(service, {})
    action = actions.get(right, "")
    named = _MISSING_ACTION.search(said)
    missing = (named[1] or named[2]) if named is not None else None
    if right is Right.READ and missing is not None and missing == actions.get(Right.LIST):
        return ObjectNotFoundError(f"no object {key!r}: cannot {what}: {said}")
    if missing is not None and missing not in actions.values():
        action = missing  # for example the use of an encryption key
    needed = f"the right to {right} {'keys' if right is Right.LIST else 'it'}" + (f" ({action})" if action else "")
    may_be_absent = right is Right.READ and missing is None and service in _HIDES
    hint = ""
    if may_be_absent and actions:
        hint = (
            f"; or there is no such object, which the service says only with the right to list ({actions[Right.LIST]})"
        )
    elif may_be_absent:
        hint = "; or there is no such file: let the server answer 404 for these"
    return AccessDeniedError(
        f"cannot {what}: access denied ({said}); check {where}: {needed} is missing{hint}",
        right=str(right),
        action=action,
        key=key,
        may_be_absent=may_be_absent,
    )
