"""What snapshots refer to, read from their files in bounded memory.

Anything that cannot be read ends the walk with an error: what is not known to be garbage is none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field

from icechunk.errors import ErrorKind, FormatError, ObjectNotFoundError
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.keys import manifest_key, snapshot_key
from icechunk.format.manifest import decode_manifest
from icechunk.format.snapshot import decode_snapshot
from icechunk.format.tables import Manifest, ManifestFile, Snapshot
from icechunk.maintenance.limits import Budget, Limits
from icechunk.refs.base import RepositoryLog
from icechunk.refs.log_layout import LogLayout
from icechunk.storage.base import Storage
from icechunk.tasks import run_each
from icechunk.transfer.assets import off_loop

__all__ = ["Files", "Walked", "read_manifests", "read_snapshot", "walk"]

_DECODED_BYTES_PER_REF = 160
"""About what a reference takes while a manifest is decoded."""


class Files:
    """The files of one repository, those that only ride in entries of its log included."""

    def __init__(self, storage: Storage, log: RepositoryLog) -> None:
        self.storage = storage
        self._log = log

    async def get(self, key: str) -> bytes:
        """The whole file. Raises `ObjectNotFoundError`."""
        carried = self._log.carried_object(key) if isinstance(self._log, LogLayout) else None
        if carried is not None:
            return carried
        try:
            return (await self.storage.get(key)).data
        except ObjectNotFoundError:
            found = await self._log.find_file(key)
            # It may have been put meanwhile.
            return (await self.storage.get(key)).data if found is None else found

    async def require(self, key: str, wanted_by: str) -> bytes:
        """The whole file, which something promises. Raises `FormatError` where it is missing."""
        try:
            return await self.get(key)
        except ObjectNotFoundError as error:
            raise FormatError(
                f"{key!r} is missing in {self.storage.describe()}, though {wanted_by} needs it: the repository is "
                "damaged. Restore the object, or drop what needs it, before anything is counted or deleted",
                ErrorKind.OBJECT_NOT_FOUND,
            ) from error


async def read_snapshot(files: Files, id: ObjectId) -> Snapshot:
    """A snapshot that history names. Raises `FormatError` where it is missing or cannot be read."""
    key = snapshot_key(id)
    data = await files.require(key, "the history")
    try:
        return await off_loop(len(data), lambda: decode_snapshot(data, expected_id=id))
    except FormatError as error:
        raise FormatError(f"cannot read {key!r}: {error.message}", error.kind) from error


@dataclass(slots=True, kw_only=True)
class Walked:
    """What a walk has found so far."""

    snapshots: set[ObjectId] = field(default_factory=set)
    manifests: dict[ObjectId, ManifestFile] = field(default_factory=dict)
    """Every manifest that one of the snapshots uses."""


async def walk(
    files: Files, start: Iterable[ObjectId], found: Walked, limits: Limits, *, follow_parents: bool
) -> dict[ObjectId, ManifestFile]:
    """Read snapshots, and add them and their manifests to what was found before.

    Parameters
    ----------
    start
        Those that were found before are not read again.
    follow_parents
        Whether to go on to the parents that the files name (format 1).

    Returns
    -------
    dict
        The manifests that are new.
    """
    fresh: dict[ObjectId, ManifestFile] = {}
    next_ones: set[ObjectId] = set(start) - found.snapshots

    async def read(id: ObjectId) -> None:
        snapshot = await read_snapshot(files, id)
        parent = snapshot.parent_id
        if follow_parents and parent is not None and parent not in found.snapshots:
            next_ones.add(parent)
        used = dict(snapshot.manifest_files)
        for node in snapshot.nodes.values():
            for manifest in node.manifests:
                if manifest.object_id not in used:
                    used[manifest.object_id] = ManifestFile(manifest.object_id, 0, 0)
        for manifest_id, file in used.items():
            if manifest_id not in found.manifests:
                found.manifests[manifest_id] = fresh[manifest_id] = file

    while next_ones:
        wave, next_ones = next_ones, set()
        found.snapshots |= wave
        await run_each(read, wave, limit=limits.max_snapshots_in_memory)
    return fresh


async def read_manifests(
    files: Files,
    manifests: Collection[ManifestFile],
    limits: Limits,
    visit: Callable[[Manifest], Awaitable[None]],
) -> None:
    """Read manifests, largest first, and hand each to ``visit``."""
    compressed = Budget(limits.max_compressed_manifest_mem_bytes)
    decoded = Budget(limits.max_decoded_manifest_mem_bytes)

    async def read(file: ManifestFile) -> None:
        key = manifest_key(file.object_id)
        async with (
            decoded.take(file.num_chunk_refs * _DECODED_BYTES_PER_REF),
            compressed.take(file.size_bytes),
        ):
            data = await files.require(key, "a snapshot")
            try:
                manifest = await off_loop(len(data), lambda: decode_manifest(data, expected_id=file.object_id))
            except FormatError as error:
                raise FormatError(f"cannot read {key!r}: {error.message}", error.kind) from error
            await visit(manifest)

    # Sorted also so that the order of requests does not depend on chance.
    ordered = sorted(manifests, key=lambda file: (-file.num_chunk_refs, encode_id(file.object_id)))
    await run_each(read, ordered, limit=limits.max_concurrent_manifest_fetches)
