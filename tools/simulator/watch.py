"""Checks at the store while a schedule runs, of rules that no history of outcomes shows.

- A checkpoint never goes back within its epoch, and everything that it names exists.
- A told attempt is never sent again.
- An attempt of which every request was refused is not called unknown.
- Under one nonce the same bytes are sent, and always to the same slot.
- Nothing follows what a newer version of this library has written, and no checkpoint holds it.
- No log is sealed as taken over that no other library has taken over.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

from icechunk.format.ids import ObjectId
from icechunk.format.keys import REPO_KEY, snapshot_key, transaction_key
from icechunk.format.repo.codec import decode_repo
from icechunk.log.repository.entry import parse_slot_key
from icechunk.log.repository.marker import decode_marker
from icechunk.log.repository.port import SwapToken
from tools.simulator.checker import Operation
from tools.simulator.cluster import Cluster
from tools.simulator.storage import SimulatedStorage

__all__ = ["Watch"]

_TAKEOVER: Final = b'"reason":"takeover"'
_NONCE: Final = re.compile(rb'"nonce":"([0-9a-f]{32})"')


class Watch:
    """Watches one cluster's store, and writes what is wrong into its report."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._store = cluster.store
        self._reached: dict[str, int] = {}
        self._found: set[ObjectId] = set()
        self._told: set[bytes] = set()
        self._bytes: dict[bytes, tuple[str, bytes]] = {}
        self._answers: dict[bytes, set[str]] = {}
        self._flying: Counter[bytes] = Counter()
        self._store.on_write = self._written
        self._store.on_put = self._sent
        self._store.on_answer = self._answered

    def _written(self, key: str, data: bytes) -> None:
        if self._cluster.newer_slot is not None:
            self._check_newer(self._cluster.newer_slot, key, data)
        # Decoding takes time, so not in every schedule.
        if key == REPO_KEY and self._cluster.report.seed % 3 == 0:
            self._checkpointed(data)

    def _check_newer(self, newer: str, key: str, data: bytes) -> None:
        taken, slot = parse_slot_key(newer), parse_slot_key(key)
        if key == REPO_KEY and (marker := decode_marker(decode_repo(data).extra)) is not None:
            slot = marker.epoch, marker.n + 1
        if taken is not None and slot is not None and slot[0] == taken[0] and slot[1] > taken[1]:
            self._cluster.problem(f"{key} is written over slot {taken[1]}, which only newer versions can read")

    def _checkpointed(self, data: bytes) -> None:
        info = decode_repo(data)
        marker = decode_marker(info.extra)
        embedded = self._cluster.embedded
        if embedded:
            for id in info.snapshots:
                if id in self._found:
                    continue
                self._found.add(id)
                for key in (snapshot_key(id), transaction_key(id)):
                    if key in embedded:
                        found = self._store.objects.get(key)
                        if found is None or found.data != embedded[key]:
                            self._cluster.problem(f"repo names {key}, which is not there")
        if marker is not None:
            if marker.n < self._reached.get(marker.epoch, 0):
                self._cluster.problem("a checkpoint went back")
            self._reached[marker.epoch] = marker.n

    def _sent(self, storage: SimulatedStorage, key: str, data: bytes) -> None:
        if key.startswith("log/") and (found := _NONCE.search(data)) is not None:
            self._flying[found[1]] += 1
            if self._bytes.setdefault(found[1], (key, data)) != (key, data):
                self._cluster.problem(f"{storage.name} sends other bytes under a nonce that it has used")
            if _TAKEOVER in data and not self._cluster.taken_over:
                self._cluster.problem(f"{storage.name} takes a log for taken over")
        # An entry may be sent again to the slot it is in: so clients check whether the store honours conditions.
        if not self._told or not key.startswith("log/") or key in self._store.objects:
            return
        if (found := _NONCE.search(data)) is not None and found[1] in self._told:
            self._cluster.problem(f"{storage.name} sends a told attempt again")

    def _answered(self, key: str, data: bytes, answer: str) -> None:
        if key.startswith("log/") and (found := _NONCE.search(data)):
            self._answers.setdefault(found[1], set()).add(answer)
            self._flying[found[1]] -= 1

    def told(self, operation: Operation, token: SwapToken) -> None:
        """Note that a caller got an unknown outcome."""
        nonces = [nonce.hex().encode() for nonce in token.nonces]
        self._told.update(nonces)
        answers = set[str]().union(*(self._answers.get(nonce, {"none"}) for nonce in nonces))
        if any(self._flying[nonce] for nonce in nonces):
            answers.add("none")
        if answers == {"refused"} and operation.outcome == "unknown" and operation.note != "cancelled":
            self._cluster.problem(f"every request of it was refused, and its outcome is called unknown: {operation}")
