"""History in format 1, which is in the snapshots' files: following it, and changing it.

Each change is one conditional write, and leaves a repository whose refs all lead to the first snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from icechunk.errors import (
    ConflictError,
    ErrorKind,
    FormatError,
    ObjectNotFoundError,
    StorageError,
)
from icechunk.format.ids import ObjectId, encode_id
from icechunk.format.keys import snapshot_key
from icechunk.format.snapshot.codec import decode_snapshot, encode_snapshot
from icechunk.format.values import Snapshot
from icechunk.log.repository.conditional import replace_object
from icechunk.log.repository.events import BranchReset
from icechunk.log.repository.ref_files.layout import RefFilesLayout
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.runtime.tasks import run_each
from icechunk.storage.port import Storage, Version

__all__ = ["Link", "Links", "replace_in_refs"]

_CONCURRENT: Final = 16
_ROUNDS: Final = 5
_VERSIONS: Final = 3
"""Most versions of a snapshot's file that one change is tried on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A snapshot of format 1, as far as its place in history goes."""

    id: ObjectId
    parent: ObjectId | None
    flushed_at_us: int


class Links:
    """Reads snapshots as they are now, each once."""

    def __init__(self, storage: Storage, sources: Sources) -> None:
        self._storage = storage
        self._sources = sources
        self._links: dict[ObjectId, Link] = {}

    async def chain(self, tip: ObjectId) -> list[Link]:
        """A snapshot and its ancestors. Raises `FormatError` where one of them is missing."""
        links: list[Link] = []
        current: ObjectId | None = tip
        while current is not None:
            link = self._links.get(current)
            if link is None:
                snapshot, _ = await self._get(current)
                link = self._links[current] = Link(
                    id=current, parent=snapshot.parent_id, flushed_at_us=snapshot.flushed_at_us
                )
            links.append(link)
            current = link.parent
        return links

    async def set_parent(self, id: ObjectId, parent: ObjectId, level: int) -> None:
        """Write a snapshot again with another parent.

        Raises
        ------
        StorageError
            Refused for certain, in the store's own words; or no certain answer came; or others change it all the time.
        """
        key = snapshot_key(id)
        where = self._storage.describe()
        unsure = StorageError(f"it is not known whether {key!r} in {where} has its new parent: no certain answer")
        for _ in range(_VERSIONS):
            snapshot, version = await self._get(id)
            if snapshot.parent_id == parent:
                return
            data = encode_snapshot(replace(snapshot, parent_id=parent), 1, level)
            if await replace_object(self._storage, self._sources, key, data, version, unsure) is not None:
                return
            # Another client changes it as well.
        raise StorageError(
            f"cannot give {key!r} in {where} another parent: another client changes it again and again; try again",
            ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
        )

    async def _get(self, id: ObjectId) -> tuple[Snapshot, Version]:
        key = snapshot_key(id)
        try:
            answer = await self._storage.get(key)
        except ObjectNotFoundError as error:
            raise FormatError(
                f"cannot follow the history: {key!r} is missing in {self._storage.describe()}, though a branch or tag "
                f"descends from snapshot {encode_id(id)}; restore it, or delete the branch or tag",
                ErrorKind.OBJECT_NOT_FOUND,
            ) from error
        return decode_snapshot(answer.data, expected_id=id), answer.version


async def replace_in_refs(
    log: RefFilesLayout, storage: Storage, sources: Sources, replaced: Mapping[ObjectId, ObjectId], level: int
) -> None:
    """Put new snapshots in the place of old ones: as parents of others, and in branches and tags.

    Parameters
    ----------
    replaced
        Old id to new id; the files of the new ones exist, and name new parents where these are replaced too.
    level
        Of zstd, for the snapshots that get another parent.

    Raises
    ------
    StorageError
        Others change refs all the time (kind ``update-attempts-exhausted``): some still lead to old snapshots, whose
        files must stay.
    """
    for _ in range(_ROUNDS):
        state = await log.refresh()
        links = Links(storage, sources)
        edits: dict[ObjectId, ObjectId] = {}

        async def read(tip: ObjectId, links: Links = links, edits: dict[ObjectId, ObjectId] = edits) -> None:
            for link in await links.chain(tip):
                if link.id not in replaced and link.parent is not None and link.parent in replaced:
                    edits[link.id] = replaced[link.parent]

        async def edit(id: ObjectId, links: Links = links, edits: dict[ObjectId, ObjectId] = edits) -> None:
            await links.set_parent(id, edits[id], level)

        await run_each(read, state.tips(), limit=_CONCURRENT)
        await run_each(edit, edits, limit=_CONCURRENT)
        log.forget(edits)
        branches = {name: tip for name, tip in state.branches.items() if tip in replaced}
        tags = {name: target for name, target in state.tags.items() if target in replaced}
        if not edits and not branches and not tags:
            return
        for name, tip in branches.items():
            await _reset(log, name, tip, replaced[tip])
        for name, target in tags.items():
            await log.retarget(name, target, replaced[target])
    raise StorageError(
        f"cannot put rewritten snapshots in the place of others in {storage.describe()}: refs are changed by others "
        "again and again; collect again",
        ErrorKind.UPDATE_ATTEMPTS_EXHAUSTED,
    )


async def _reset(log: RefFilesLayout, name: str, tip: ObjectId, new: ObjectId) -> None:
    try:
        await log.append(
            lambda state: (
                [BranchReset(name=name, snapshot=new, expected=tip)] if state.branches.get(name) == tip else []
            )
        )
    except ConflictError:
        # Another client committed: the next round gives that commit its new parent.
        return
