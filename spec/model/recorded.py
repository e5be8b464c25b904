"""The store and the history that follow from a trace: the executed requests, without the knowledge of clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

__all__ = ["FILES", "Marker", "Recorded", "Slot", "floor_of", "slot_of_key"]

_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LAST: Final = 2**40 - 1
FILES: Final = ("chunks/", "manifests/", "snapshots/", "transactions/")

Entry = Mapping[str, Any]
"""A slot's JSON, as `repository-log.md` describes it."""


class Slot(NamedTuple):
    """A slot of an epoch."""

    epoch: str
    n: int


class Marker(NamedTuple):
    """The marker of ``repo`` in the log layout."""

    epoch: str
    n: int


def _number(text: str) -> int | None:
    if len(text) != 8 or any(letter not in _ALPHABET for letter in text):
        return None
    value = 0
    for letter in text:
        value = value * 32 + _ALPHABET.index(letter)
    return value


def slot_of_key(key: str) -> Slot | None:
    """The slot that a key names; None if it is no slot's."""
    parts = key.split("/")
    if len(parts) != 3 or parts[0] != "log" or parts[1].endswith(".floor"):
        return None
    n = _number(parts[2])
    return None if n is None else Slot(parts[1], _LAST - n)


def floor_of(key: str) -> Slot | None:
    """The epoch and the slot up to which an announcement allows to delete; None if the key is none."""
    parts = key.split("/")
    if len(parts) != 3 or parts[0] != "log" or not parts[1].endswith(".floor"):
        return None
    n = _number(parts[2])
    return None if n is None else Slot(parts[1].removesuffix(".floor"), n)


@dataclass(slots=True)
class Recorded:
    """The stored objects, and all entries that were ever in slots."""

    objects: dict[str, int] = field(default_factory=dict)
    """Last-Modified of everything, µs, but for slots and ``repo``."""
    slots: dict[Slot, Entry] = field(default_factory=dict)
    """Entries that are there now."""
    history: dict[Slot, Entry] = field(default_factory=dict)
    """The first entry of each slot, also if it was pruned: what happened."""
    version: str | None = None
    """Version of ``repo``; None: there is none."""
    markers: dict[str, Marker | None] = field(default_factory=dict)
    """Marker of each version that ``repo`` ever had; None: the repo-object layout."""
    foreign: set[str] = field(default_factory=set)
    """Versions of ``repo`` that another library wrote."""
    tips: dict[str, str | None] = field(default_factory=dict)
    """Tips of the branches that an event has named; None: deleted. Others are not known."""
    cutoff: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    """Epochs that were sealed, with the seal's slot."""
    gc: list[tuple[Slot, int]] = field(default_factory=list)
    """Collections that happened, with their cutoffs."""

    @property
    def marker(self) -> Marker | None:
        return None if self.version is None else self.markers[self.version]

    def nonce(self, slot: Slot) -> str | None:
        """Nonce of the entry that is in a slot now."""
        entry = self.slots.get(slot)
        return None if entry is None else str(entry["nonce"])

    def landed(self, slot: Slot, nonce: str) -> bool:
        """Whether this entry is part of what happened."""
        entry = self.history.get(slot)
        return entry is not None and entry["nonce"] == nonce

    def fill(self, slot: Slot, entry: Entry) -> Iterator[tuple[int, str]]:
        """An entry has been created in a slot. Yields rule and reason of what is wrong with that."""
        self.slots[slot] = entry
        if slot in self.history:
            return  # pruned, and filled again by a late request: no part of what happened
        self.history[slot] = entry
        marker = self.marker
        first = slot.n == 1 or (marker is not None and marker == Marker(slot.epoch, slot.n - 1))
        if not first and Slot(slot.epoch, slot.n - 1) not in self.history:
            yield 1, f"slot {slot.n} was filled before slot {slot.n - 1}"
        if slot.epoch in self.ended:
            yield 8, f"slot {slot.n} was filled after the seal in slot {self.ended[slot.epoch]}"
        why = self._apply(slot, entry)
        if why:
            yield 4, f"the entry in slot {slot.n} does not apply: {why}"

    def _apply(self, slot: Slot, entry: Entry) -> str:
        """Fold an entry; what is known of its preconditions."""
        tips, events = dict(self.tips), entry["events"]
        for event in events:
            branch, kind = event.get("branch", event.get("name")), event["kind"]
            if kind in ("commit", "amend", "detached"):
                since = entry.get("since")
                if self.cutoff and (since is None or since < self.cutoff):
                    return "its files are older than the cutoff of a collection"
            if kind in ("commit", "amend"):
                on = event["snapshot"]["parent"] if kind == "commit" else event["previous"]
                if branch in tips and tips[branch] != on:
                    return f"branch {branch!r} is not at {on}"
                tips[branch] = event["snapshot"]["id"]
            elif kind == "branch-created":
                if tips.get(branch) is not None:
                    return f"branch {branch!r} exists"
                tips[branch] = event["snapshot"]
            elif kind == "branch-reset":
                if branch in tips and event.get("expected") not in (None, tips[branch]):
                    return f"branch {branch!r} is not at {event['expected']}"
                tips[branch] = event["snapshot"]
            elif kind == "branch-deleted":
                if branch in tips and tips[branch] is None:
                    return f"there is no branch {branch!r}"
                tips[branch] = None
            elif kind == "gc":
                self.cutoff = max(self.cutoff, event["cutoff"])
                self.gc.append((slot, event["cutoff"]))
            elif kind == "seal":
                self.ended.setdefault(slot.epoch, slot.n)
        self.tips = tips
        return ""

    def embedded(self, epoch: str, after: int, upto: int) -> Iterator[str]:
        """Keys of the files that are embedded in the entries after one slot up to another."""
        for n in range(after + 1, upto + 1):
            yield from self.history.get(Slot(epoch, n), {}).get("objects") or ()

    def listing(self, prefix: str) -> Sequence[Slot]:
        """Slots whose keys begin so."""
        return [slot for slot in self.slots if f"log/{slot.epoch}/".startswith(prefix)]
