"""The files of a commit, one after another: no more of them are held than are on their way.

Manifests come first, since the snapshot names them and their sizes. Each is made, encoded, and forgotten once it is
put, so that a commit of many references needs little more memory than the session's log of them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from icechunk.core import Core
from icechunk.format.by_node import num_rows
from icechunk.format.ids import ObjectId
from icechunk.format.keys import manifest_key, snapshot_key, transaction_key
from icechunk.format.manifest import encode_manifest, max_refs
from icechunk.format.snapshot import encode_snapshot
from icechunk.format.tables import Manifest, Snapshot, TransactionLog
from icechunk.format.transaction import encode_transaction_log, require_room
from icechunk.log.compaction import Placed, Plan, new_manifests, new_snapshot, placed
from icechunk.log.diff import combined
from icechunk.log.pieces import require_fit
from icechunk.log.reuse import Earlier, Remembered
from icechunk.log.transaction_parts import in_parts
from icechunk.tasks import run_each
from icechunk.transfer.assets import off_loop

__all__ = ["CommitFiles", "File"]

_BYTES_PER_REF = 64
"""About what a reference costs to encode; decides whether that happens in a thread."""
_BYTES_PER_CHANGE = 16
"""The same for a changed chunk in a transaction log."""
_BYTES_PER_NODE = 256
"""The same for a node of the snapshot."""


class File(NamedTuple):
    """A metadata file."""

    key: str
    data: bytes


@dataclass(slots=True, kw_only=True, eq=False)
class CommitFiles:
    """Makes the files of one try of a commit."""

    core: Core
    plan: Plan
    spec_version: int
    message: str
    metadata: Mapping[str, Any]
    amended: TransactionLog | None
    """Of the snapshot that this one takes the place of."""
    earlier: Earlier | None
    """What earlier tries have put; None where no other try can follow."""
    snapshot: Snapshot | None = None
    """Known once its file was made."""
    further_transactions: tuple[ObjectId, ...] = ()
    """Of transaction logs that the snapshot is to name, oldest first: they tell the rest of what it changed."""
    new: list[Remembered] = field(default_factory=list)
    """Manifests whose files were made, for the next try, if there can be one."""

    async def make(self) -> AsyncGenerator[File, None]:
        """All files; the caches get to know what is in them.

        Raises as `new_manifests` and the encoders do; what is larger than a file can be is found before the first one.
        """
        core, plan = self.core, self.plan
        snapshot_id = core.sources.new_object_id()
        transactions = self._transactions(snapshot_id)
        for array in plan.arrays:
            require_fit(array, max_refs(len(array.node.shape)))
        found: dict[ObjectId, Manifest] = {}

        async def read(id: ObjectId) -> None:
            found[id] = await core.assets.manifest(id)

        await run_each(read, plan.manifests_to_read, limit=max(1, core.settings.commit_fetches))
        touched = plan.num_rows + sum(manifest.num_chunk_refs for manifest in found.values())
        manifests = new_manifests(plan, found, core.sources.new_object_id)
        keep = core.assets.has_room_for(touched)
        places: list[Placed] = []
        while True:
            step = await off_loop(touched * _BYTES_PER_REF, partial(self._encode_next, manifests))
            if step is None:
                break
            manifest, place, data = step
            places.append(place)
            if data is None:
                continue
            if keep:
                # Before the commit has landed: whoever comes next in the queue builds upon it. If it does not land,
                # nobody asks for it.
                core.assets.keep_manifest(manifest)
            del manifest, step
            yield File(manifest_key(place.file.object_id), data)
            del data
        make = partial(
            self._encode_snapshot,
            places,
            snapshot_id=snapshot_id,
            flushed_at_us=max(core.sources.wall_us(), plan.base.flushed_at_us + 1),
        )
        self.snapshot, encoded = await off_loop(len(plan.nodes) * _BYTES_PER_NODE, make)
        yield File(snapshot_key(snapshot_id), encoded)
        level = core.settings.compression_level
        for transaction in transactions:
            rows = num_rows(transaction.updated_chunks)
            encode = partial(encode_transaction_log, transaction, self.spec_version, level)
            yield File(transaction_key(transaction.id), await off_loop(rows * _BYTES_PER_CHANGE, encode))

    def _transactions(self, snapshot_id: ObjectId) -> list[TransactionLog]:
        log = self.plan.changes.transaction(snapshot_id)
        if self.amended is not None:
            log = combined(self.amended, log)
        others: list[TransactionLog] = []
        # Snapshots of format 1 can name no further logs.
        if self.spec_version != 1:
            log, others = in_parts(log, self.core.sources.new_object_id)
        require_room(log)
        self.further_transactions = tuple(other.id for other in others)
        return [*others, log]

    def _encode_snapshot(
        self, places: Sequence[Placed], *, snapshot_id: ObjectId, flushed_at_us: int
    ) -> tuple[Snapshot, bytes]:
        snapshot = new_snapshot(
            self.plan,
            places,
            snapshot_id=snapshot_id,
            # Format 1 keeps ancestry in the snapshots.
            parent_id=self.plan.base.id if self.spec_version == 1 else None,
            flushed_at_us=flushed_at_us,
            message=self.message,
            metadata=self.metadata,
        )
        return snapshot, encode_snapshot(snapshot, self.spec_version, self.core.settings.compression_level)

    def _encode_next(self, manifests: Iterator[Manifest]) -> tuple[Manifest, Placed, bytes | None] | None:
        """The next manifest, where it is, and its file, if there is none yet that holds the same."""
        settings = self.core.settings
        manifest = next(manifests, None)
        if manifest is None:
            return None
        known = None if self.earlier is None else self.earlier.find(manifest)
        if known is not None:
            return manifest, known, None
        data = encode_manifest(manifest, self.spec_version, settings.compression_level, settings.locations)
        place = placed(manifest, len(data))
        if self.earlier is not None:
            self.new.append(self.earlier.remembered(manifest, place))
        return manifest, place, data
