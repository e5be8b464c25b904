"""Is a recorded run allowed by the rules? ``python -m spec.model.replay TRACE...`` reads JSON lines, one record each.

The records are described in ``README.md``. The checker keeps two things apart: the store and the history, as they were
executed (`spec.model.recorded`), and what each client can know, from the answers that it got. Requests are judged when
they are sent, by what their client knows; what callers are told is judged by both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final, NamedTuple

from spec.model.recorded import FILES, Entry, Marker, Recorded, Slot, floor_of, slot_of_key
from spec.model.rules import Verdict, judge, may_replace_checkpoint

__all__ = ["Problem", "main", "replay"]

G_US: Final = 7 * 24 * 3600 * 1_000_000
REFUSALS: Final = frozenset({400, 401, 403, 404, 405, 411, 501})
"""Answers to a PUT that say for certain that it was not executed."""

Record = Mapping[str, Any]


class Problem(NamedTuple):
    """A step that the rules do not allow."""

    line: int
    """Number of the record, from 1."""
    rule: int
    """0: the store did what is demanded of none, or the trace is not one."""
    what: str


class _State(Enum):
    IN_FLIGHT = "in flight"
    TOLD = "told"
    LANDED = "landed"
    LOST = "lost"
    REFUSED = "refused"
    UNKNOWABLE = "unknowable"


_OPEN: Final = (_State.IN_FLIGHT, _State.TOLD)


@dataclass(slots=True)
class _Attempt:
    client: str
    slot: Slot
    nonce: str
    entry: Entry | None = None
    """None: announced by a token, and not sent yet."""
    state: _State = _State.IN_FLIGHT
    by_history: bool = False
    """Whether its client has read a checkpoint past its slot, or of a later life of the log: the history decides."""
    proof_us: int | None = None
    """T of its client when it was sent first: what its slot holds counts only for so long after that."""
    callers: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)

    @property
    def is_filler(self) -> bool:
        """Whether it has no caller, and only takes a slot: `settle` sends such an entry."""
        return not self.callers and [event["kind"] for event in (self.entry or {}).get("events", ())] == ["void"]

    @property
    def is_seal(self) -> bool:
        """Whether it has no caller, and seals a log that was taken over; its write may end with an error."""
        return not self.callers and [event["kind"] for event in (self.entry or {}).get("events", ())] == ["seal"]

    @property
    def adds_snapshots(self) -> bool:
        return any(event["kind"] in ("commit", "amend", "detached") for event in (self.entry or {}).get("events", ()))


@dataclass(slots=True)
class _Log:
    """The knowledge of a client about one epoch."""

    known: int = 0
    """Its head, as far as it can be: the last slot that it has folded."""
    seen: set[int] = field(default_factory=set)
    """Slots that it has read."""
    sealed: bool = False
    proof_us: int | None = None
    """T."""
    absent: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Slots that it has seen empty: store time, and line of the request."""
    returned: int = 0

    def fresh(self, date_us: int) -> bool:
        return self.proof_us is not None and date_us - self.proof_us <= G_US // 2


@dataclass(slots=True)
class _Client:
    name: str
    logs: dict[str, _Log] = field(default_factory=dict)
    """By epoch: a client may still work on the old one while it opens the new one."""
    read: Marker | None = None
    """The marker that it read last."""
    looked: int = 0
    """Line at which the last request was sent whose answer proved where the log ends."""
    ended: bool = False

    def known(self, epoch: str) -> int:
        """The last slot of an epoch that it has folded; -1: it has never read it."""
        return self.logs[epoch].known if epoch in self.logs else -1


@dataclass(slots=True)
class _Caller:
    client: str
    asked: int
    outcome: str = ""


@dataclass(slots=True)
class _Request:
    line: int
    record: Record
    executed_us: int | None = None
    done: bool = False
    """Whether a PUT was executed with success, ever."""
    found: Any = None
    """The result of a GET or a LIST."""
    answered: int | None = None
    """Status; 0: it ended without one."""
    unsent: bool = False
    """Whether it certainly never left, for want of a connection."""

    @property
    def refused(self) -> bool:
        """Whether its client knows for certain that it was not executed, and never will be."""
        return self.unsent or self.answered in REFUSALS


class _Replay:
    def __init__(self) -> None:
        self.store = Recorded()
        self.clients: dict[str, _Client] = {}
        self.callers: dict[str, _Caller] = {}
        self.requests: dict[str, _Request] = {}
        self.attempts: dict[str, _Attempt] = {}
        self.line = 0
        self.now_us = 0
        self._handlers: dict[str, Callable[[Record], Iterator[tuple[int, str]]]] = {
            "have": self._have,
            "send": self._send,
            "exec": self._exec,
            "answer": self._answer,
            "ask": self._ask,
            "token": self._token,
            "tell": self._tell,
            "settle": self._settle,
            "return": self._return,
            "end": self._end,
        }

    def step(self, record: Record) -> Iterator[Problem]:
        self.line += 1
        handler = self._handlers.get(str(record.get("do")))
        if handler is None:
            yield Problem(self.line, 0, f"unknown record {record.get('do')!r}")
            return
        if record["t"] < self.now_us:
            yield Problem(self.line, 0, "store time goes back")
        self.now_us = max(self.now_us, record["t"])
        for rule, what in handler(record):
            yield Problem(self.line, rule, what)

    def _client(self, record: Record) -> _Client:
        return self.clients.setdefault(record["client"], _Client(record["client"]))

    def _state(self, attempt: _Attempt) -> _State:
        """The state of an attempt as far as a client can know it."""
        if attempt.state not in _OPEN or not attempt.by_history:
            return attempt.state
        if not attempt.adds_snapshots:
            return _State.UNKNOWABLE
        return _State.LANDED if self.store.landed(attempt.slot, attempt.nonce) else _State.LOST

    def _have(self, record: Record) -> Iterator[tuple[int, str]]:
        """An object that was there before the trace begins."""
        key, store = record["key"], self.store
        if (slot := slot_of_key(key)) is not None:
            yield from store.fill(slot, record["entry"])
        elif key == "repo":
            store.version = record["version"]
            store.markers[record["version"]] = _marker(record)
        else:
            store.objects[key] = record.get("modified", record["t"])

    # ------------------------------------------------------------------ requests leave

    def _send(self, record: Record) -> Iterator[tuple[int, str]]:
        client = self._client(record)
        if client.ended:
            yield 2, "a client sends a request after it has ended"
        if record["request"] in self.requests:
            yield 0, f"request {record['request']} was sent before"
        self.requests[record["request"]] = _Request(self.line, record)
        if record["verb"] == "DELETE":
            for key in record["keys"]:
                yield from self._send_delete(client, key)
        if record["verb"] != "PUT":
            return
        key = record["key"]
        if (slot := slot_of_key(key)) is not None:
            yield from self._send_slot(client, record, slot)
        elif key == "repo":
            yield from self._send_repo(client, record)
        elif (floor := floor_of(key)) is not None:
            yield from self._send_floor(client, floor)

    def _send_slot(self, client: _Client, record: Record, slot: Slot) -> Iterator[tuple[int, str]]:
        entry, nonce = record["entry"], record["entry"]["nonce"]
        known = client.known(slot.epoch)
        if slot.n <= known and record.get("condition") == "absent" and self.store.history.get(slot) == entry:
            return  # rule 1: whether the store refuses it tells whether it honours the condition
        if record.get("condition") != "absent":
            yield 1, f"slot {slot.n} is sent without If-None-Match"
        if entry["n"] != slot.n:
            yield 1, f"an entry for slot {entry['n']} is sent to slot {slot.n}"
        if known < slot.n - 1:
            yield 1, f"slot {slot.n} is sent by a client that has folded {known} slots of its epoch"
        if known >= slot.n - 1 and slot.n > self.store.ended.get(slot.epoch, slot.n):
            yield 8, f"slot {slot.n} is sent after a seal was folded"
        attempt = self.attempts.get(nonce)
        if attempt is None:
            attempt = self.attempts[nonce] = _Attempt(record["client"], slot, nonce)
        if attempt.client != record["client"]:
            yield 2, f"nonce {nonce} is that of another client"
        if attempt.entry is None:
            for other in self.attempts.values():
                if other.client != record["client"] or other is attempt or other.entry is None:
                    continue
                if self._is_refused(other):
                    continue
                if other.is_seal and other.state is _State.IN_FLIGHT and other.slot == slot:
                    # Its write has ended with an error, and is made anew.
                    other.state = _State.TOLD
                if self._state(other) is _State.IN_FLIGHT:
                    yield 2, f"attempt {nonce} is sent while {other.nonce} is in flight"
                elif self._state(other) is _State.TOLD and other.slot != slot:
                    yield 2, f"slot {slot.n} is sent before slot {other.slot.n} of attempt {other.nonce} is seen taken"
        elif attempt.entry != entry or attempt.slot != slot:
            yield 2, f"attempt {nonce} is sent with other bytes, or to another slot"
        elif attempt.state is not _State.IN_FLIGHT and not self._may_be_unaware(attempt):
            yield 2, f"attempt {nonce} is sent again, and it is {attempt.state.value}"
        if attempt.entry is None and slot.epoch in client.logs:
            attempt.proof_us = client.logs[slot.epoch].proof_us
        attempt.entry, attempt.slot = entry, slot
        attempt.requests.append(record["request"])

    def _may_be_unaware(self, attempt: _Attempt) -> bool:
        """Whether what shows that an attempt is lost may be part of an opening that failed, and counts for nothing.

        A client opens the log again if the slot is not believed any more; see "An opening that fails" in rule 2.
        """
        stale = not _Log(proof_us=attempt.proof_us).fresh(self.now_us)
        told = any(self.callers[caller].outcome for caller in attempt.callers)
        return attempt.state is _State.LOST and stale and not told

    def _send_repo(self, client: _Client, record: Record) -> Iterator[tuple[int, str]]:
        if record.get("foreign"):
            return
        new, condition = _marker(record), record.get("condition")
        if condition == "absent":
            if new is not None and new.n:
                yield 11, f"repo is created with slot {new.n} in its marker"
            return
        if condition is None:
            yield 7, "repo is replaced without If-Match"
            return
        if condition not in self.store.markers:
            yield 0, f"repo never had version {condition}"
            return
        if condition != self.store.version:
            return  # no version comes back: it can never succeed
        old = self.store.markers[condition]
        if condition in self.store.foreign:
            # Another library has taken over, and copied the marker; the log is sealed, and its clients follow.
            if new is not None and old is not None and new.epoch == old.epoch:
                yield 7, f"a checkpoint at {new} replaces what another library wrote"
        elif old is None:
            if new is not None and (
                new.n or any(marker and marker.epoch == new.epoch for marker in self.store.markers.values())
            ):
                yield 8, "a repo object becomes a log that is not a fresh one"
        elif new is None:
            if old.epoch not in client.logs or not client.logs[old.epoch].sealed:
                yield 8, "a log becomes a repo object by a client that has not folded a seal"
        else:
            if not may_replace_checkpoint(epoch=new.epoch, n=new.n, found_epoch=old.epoch, found_n=old.n):
                yield 7, f"a checkpoint at {new} replaces one at {old}"
            if client.known(new.epoch) < new.n:
                yield 7, f"a checkpoint at slot {new.n} is by a client that has folded {client.known(new.epoch)} slots"

    def _send_floor(self, client: _Client, floor: Slot) -> Iterator[tuple[int, str]]:
        read, seal = client.read, self.store.ended.get(floor.epoch)
        within = read is not None and read.epoch == floor.epoch and floor.n <= read.n
        closed = (read is None or read.epoch != floor.epoch) and seal is not None and floor.n <= seal
        if not within and not closed:
            yield 9, f"floor {floor.n} is past the marker that the client has read ({read})"

    def _send_delete(self, client: _Client, key: str) -> Iterator[tuple[int, str]]:
        if (slot := slot_of_key(key)) is not None:
            floors = [
                at
                for name, at in self.store.objects.items()
                if (floor := floor_of(name)) is not None and floor.epoch == slot.epoch and floor.n >= slot.n
            ]
            if not floors or self.now_us - min(floors) <= G_US:
                yield 9, f"slot {slot.n} is deleted, and no floor past it was announced more than G ago"
        elif key.startswith(FILES):
            modified = self.store.objects.get(key)
            if modified is None:
                return
            folded = [gc for gc, cutoff in self.store.gc if modified < cutoff and gc.n <= client.known(gc.epoch)]
            if not folded:
                yield 10, f"{key} is deleted, and no collection with a later cutoff was folded"
                return
            marker = self.store.marker
            if all(marker is not None and marker.epoch == gc.epoch and marker.n < gc.n for gc in folded):
                yield 10, f"{key} is deleted before a checkpoint past the collection's entry"

    # ------------------------------------------------------------------ requests arrive

    def _exec(self, record: Record) -> Iterator[tuple[int, str]]:
        request = self.requests.get(record["request"])
        if request is None:
            yield 0, f"request {record['request']} was never sent"
            return
        sent, store = request.record, self.store
        request.executed_us = self.now_us
        if request.refused and sent["verb"] == "PUT":
            yield 0, "a request is executed after it was refused"
        match sent["verb"]:
            case "PUT":
                yield from self._exec_put(request, record)
            case "GET" if sent["key"] == "repo":
                request.found = store.version
            case "GET" if (slot := slot_of_key(sent["key"])) is not None:
                request.found = store.slots.get(slot)
            case "LIST":
                found = record.get("found")
                slots = store.listing(sent["prefix"]) if found is None else [slot_of_key(key) for key in found]
                request.found = [slot for slot in slots if slot is not None]
            case "DELETE":
                for key in record.get("keys", sent["keys"]):
                    slot = slot_of_key(key)
                    store.objects.pop(key, None)
                    if slot is not None:
                        store.slots.pop(slot, None)

    def _exec_put(self, request: _Request, record: Record) -> Iterator[tuple[int, str]]:
        sent, store, done = request.record, self.store, bool(record["done"])
        key, condition = sent["key"], sent.get("condition")
        slot = slot_of_key(key)
        if key == "repo":
            allowed = condition is None or store.version == (None if condition == "absent" else condition)
        elif condition in (None, "absent"):
            there = slot in store.slots if slot is not None else key in store.objects
            allowed = condition is None or not there
        else:
            allowed = done  # versions are known of ``repo`` only
        if done and not allowed:
            yield 0, f"PUT of {key} succeeds against its condition"
        if not done and allowed:
            yield 0, f"PUT of {key} fails although its condition holds"
        if not done:
            return
        request.done = True
        if slot is not None:
            yield from store.fill(slot, sent["entry"])
            yield from self._landed(slot, sent["entry"]["nonce"])
        elif key == "repo":
            old, new = store.marker, _marker(sent)
            if old is not None and not sent.get("foreign"):
                upto = new.n if new is not None else store.ended.get(old.epoch, old.n)
                missing = [file for file in store.embedded(old.epoch, old.n, upto) if file not in store.objects]
                if missing:
                    yield 15, f"repo names {missing[0]}, which is embedded in an entry only"
            if old is None and new is not None:
                # Of what happened in the repo-object layout nothing is known.
                store.tips.clear()
            store.version = record["version"]
            store.markers[record["version"]] = new
            if sent.get("foreign"):
                store.foreign.add(record["version"])
        else:
            store.objects[key] = record.get("modified", self.now_us)

    def _landed(self, slot: Slot, nonce: str) -> Iterator[tuple[int, str]]:
        attempt = self.attempts.get(nonce)
        if attempt is None or not self.store.landed(slot, nonce):
            return
        for caller in sorted(attempt.callers):
            if self.callers[caller].outcome in ("conflict", "refused", "lost"):
                yield 3, f"{caller} was told that it failed, and its attempt {nonce} lands"

    # ------------------------------------------------------------------ answers

    def _answer(self, record: Record) -> Iterator[tuple[int, str]]:
        request = self.requests.get(record["request"])
        if request is None:
            yield 0, f"request {record['request']} was never sent"
            return
        sent, status = request.record, record["status"] or 0
        request.answered = status
        request.unsent = bool(record.get("unsent"))
        if request.unsent and request.executed_us is not None:
            yield 0, "a request that never left was executed"
        client, key = self.clients[sent["client"]], sent.get("key", "")
        if sent["verb"] == "PUT" and (slot := slot_of_key(key)) is not None:
            yield from self._answer_slot_put(client, request, slot)
        elif sent["verb"] == "PUT" and status in REFUSALS and request.done:
            yield 0, f"PUT of {key} was refused, and was executed"
        elif sent["verb"] == "GET" and key == "repo" and status in (200, 404):
            self._reads_repo(client, request)
        elif sent["verb"] == "GET" and (slot := slot_of_key(key)) is not None and status in (200, 404):
            if (status == 200) != (request.found is not None):
                yield 0, f"GET of slot {slot.n} is answered {status}, and found {request.found}"
                return
            self._reads_slot(client, request, slot)
        elif sent["verb"] == "LIST" and status == 200:
            self._reads_listing(client, request)

    def _answer_slot_put(self, client: _Client, request: _Request, slot: Slot) -> Iterator[tuple[int, str]]:
        nonce, status = request.record["entry"]["nonce"], request.answered
        attempt = self.attempts[nonce]
        date_us = request.executed_us if request.executed_us is not None else self.now_us
        if status == 200:
            if not request.done:
                yield 0, f"PUT of slot {slot.n} is answered 200, and was not executed"
            elif (log := client.logs.get(slot.epoch)) is not None and log.fresh(date_us):
                self._sees(client, slot, nonce)
                log.proof_us, client.looked = date_us, request.line
        elif request.refused:
            if request.done:
                yield 0, f"PUT of slot {slot.n} is refused, and was executed"
            # One that never left may be sent again.
            if attempt.state in _OPEN and not request.unsent and self._is_refused(attempt):
                attempt.state = _State.REFUSED

    def _reads_slot(self, client: _Client, request: _Request, slot: Slot) -> None:
        date_us = request.executed_us or self.now_us
        log = client.logs.get(slot.epoch)
        if log is None or not log.fresh(date_us):
            return
        if request.found is not None:
            self._sees(client, slot, request.found["nonce"])
        else:
            log.absent[slot.n] = date_us, request.line
            self._catches_up(client, slot.epoch)

    def _reads_listing(self, client: _Client, request: _Request) -> None:
        for epoch, log in client.logs.items():
            if f"log/{epoch}/".startswith(request.record["prefix"]):
                last = max((slot.n for slot in request.found or () if slot.epoch == epoch), default=0)
                log.absent[last + 1] = request.executed_us or self.now_us, request.line
                self._catches_up(client, epoch)

    def _reads_repo(self, client: _Client, request: _Request) -> None:
        date_us = request.executed_us or self.now_us
        marker = self.store.markers[request.found] if request.found is not None else None
        client.read = marker
        client.looked = request.line
        for attempt in self.attempts.values():
            if attempt.client == client.name and attempt.state in _OPEN:
                slot = attempt.slot
                attempt.by_history |= marker is None or marker.epoch != slot.epoch or slot.n <= marker.n
        if marker is not None:
            log = client.logs.setdefault(marker.epoch, _Log())
            log.known, log.proof_us = max(log.known, marker.n), date_us
            self._catches_up(client, marker.epoch)

    def _sees(self, client: _Client, slot: Slot, nonce: str) -> None:
        """A client has learned, from a fresh answer, whose entry is in a slot."""
        for attempt in self.attempts.values():
            if attempt.client == client.name and attempt.slot == slot and attempt.state in _OPEN:
                verdict = judge(attempt.nonce, nonce, fresh=True)
                attempt.state = _State.LANDED if verdict is Verdict.LANDED else _State.LOST
        client.logs[slot.epoch].seen.add(slot.n)
        self._catches_up(client, slot.epoch)

    def _catches_up(self, client: _Client, epoch: str) -> None:
        log, seal = client.logs[epoch], self.store.ended.get(epoch)
        while log.known + 1 in log.seen:
            log.known += 1
        log.sealed = seal is not None and log.known >= seal
        # An empty slot that has been taken since shows, too, that none after it was taken then.
        date_us, line = max((seen for n, seen in log.absent.items() if n <= log.known + 1), default=(0, 0))
        if line and log.fresh(date_us):
            log.proof_us, client.looked = max(log.proof_us or 0, date_us), max(client.looked, line)

    def _is_refused(self, attempt: _Attempt) -> bool:
        """Whether its client knows for certain that no request of it was executed."""
        return all(self.requests[name].refused for name in attempt.requests)

    # ------------------------------------------------------------------ callers

    def _ask(self, record: Record) -> Iterator[tuple[int, str]]:
        self._client(record)
        if record["caller"] in self.callers:
            yield 0, f"{record['caller']} has asked before"
        self.callers[record["caller"]] = _Caller(record["client"], self.line)

    def _of(self, caller: str) -> list[_Attempt]:
        return [attempt for attempt in self.attempts.values() if caller in attempt.callers]

    def _token(self, record: Record) -> Iterator[tuple[int, str]]:
        name, nonce = record["caller"], record["nonce"]
        caller = self.callers[name]
        slot = Slot(record["epoch"], record["n"])
        if caller.outcome:
            yield 2, f"events of {name} go into an attempt after it was told {caller.outcome!r}"
        for other in self._of(name):
            if self._state(other) is _State.LANDED:
                yield 2, f"events of {name} are proposed again, and attempt {other.nonce} landed"
            elif self._state(other) in _OPEN and other.slot != slot and other.nonce != nonce:
                yield 2, f"events of {name} go to slot {slot.n} before slot {other.slot.n} is seen taken"
        attempt = self.attempts.setdefault(nonce, _Attempt(record["client"], slot, nonce))
        attempt.callers.add(name)

    def _tell(self, record: Record) -> Iterator[tuple[int, str]]:
        name, outcome = record["caller"], record["outcome"]
        caller, attempts = self.callers[name], self._of(name)
        client = self.clients[caller.client]
        sent = [attempt for attempt in attempts if attempt.requests]
        happened = [attempt for attempt in sent if self.store.landed(attempt.slot, attempt.nonce)]
        pending = [
            attempt
            for attempt in sent
            if self._state(attempt) in (*_OPEN, _State.UNKNOWABLE) and not self._is_refused(attempt)
        ]
        caller.outcome = outcome
        if outcome == "committed":
            if not happened:
                yield 3, f"{name} is told that it is committed, and nothing of it is in history"
            elif not any(self._state(attempt) is _State.LANDED for attempt in sent):
                yield (
                    5,
                    f"{name} is told that it is committed, by answers that are too late or that its client did not get",
                )
        elif outcome in ("conflict", "refused"):
            if happened:
                yield 3, f"{name} is told that it failed, and attempt {happened[0].nonce} is in history"
            elif pending:
                yield 3, f"{name} is told that it failed, and attempt {pending[0].nonce} is {pending[0].state.value}"
            elif outcome == "conflict" and not sent and client.looked < caller.asked:
                yield 3, f"{name} is refused on a state that was learned before it asked"
        elif outcome in ("unknown", "cancelled"):
            if outcome == "unknown" and not sent:
                yield 3, f"{name} is told that its outcome is unknown, and nothing of it was sent"
            for attempt in attempts:
                if attempt.state is _State.IN_FLIGHT:
                    attempt.state = _State.TOLD
        else:
            yield 0, f"unknown outcome {outcome!r}"

    def _settle(self, record: Record) -> Iterator[tuple[int, str]]:
        name = record["caller"]
        attempts = [attempt for attempt in self._of(name) if attempt.requests]
        happened = any(self.store.landed(attempt.slot, attempt.nonce) for attempt in attempts)
        if record["landed"] is None:
            # It ended without an answer: the entry by which it wanted to fill the slot is not sent again.
            for attempt in self.attempts.values():
                if attempt.client == record["client"] and attempt.is_filler and attempt.state is _State.IN_FLIGHT:
                    attempt.state = _State.TOLD
            return
        if record["landed"]:
            if not happened:
                yield 3, f"{name} is settled as committed, and nothing of it is in history"
            return
        self.callers[name].outcome = "lost"
        if happened:
            yield 3, f"{name} is settled as lost, and it is in history"
        for attempt in attempts:
            if attempt.slot not in self.store.history and not self._is_refused(attempt):
                yield 3, f"{name} is settled as lost while slot {attempt.slot.n} is empty"

    def _return(self, record: Record) -> Iterator[tuple[int, str]]:
        epoch, n = record["epoch"], record["n"]
        log = self._client(record).logs.get(epoch, _Log(known=-1))
        if n > log.known:
            yield 6, f"a state at slot {n} is returned by a client that has folded {log.known} slots"
        if n < log.returned:
            yield 6, f"a client returns slot {n} after slot {log.returned}"
        log.returned = n

    def _end(self, record: Record) -> Iterator[tuple[int, str]]:
        self._client(record).ended = True
        for attempt in self.attempts.values():
            if attempt.client == record["client"] and attempt.state is _State.IN_FLIGHT:
                attempt.state = _State.TOLD
        yield from ()


def _marker(record: Record) -> Marker | None:
    marker = record.get("marker")
    return None if marker is None else Marker(*marker)


def replay(records: Iterable[Record]) -> list[Problem]:
    """Every step of a trace that the rules do not allow, in order; an empty list if there is none."""
    state = _Replay()
    return [problem for record in records for problem in state.step(record)]


def main(arguments: list[str] | None = None) -> int:
    """Check files of JSON lines (``-``: the standard input); the exit code is 1 if a step is not allowed."""
    wrong = 0
    for name in (sys.argv[1:] if arguments is None else arguments) or ["-"]:
        text = sys.stdin.read() if name == "-" else Path(name).read_text("utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        problems = replay(json.loads(line) for line in lines)
        for line, rule, what in problems:
            print(f"{name}:{line}: {f'rule {rule}' if rule else 'store'}: {what}")
        print(f"{name}: {len(lines)} steps, {len(problems) or 'none'} not allowed")
        wrong += bool(problems)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
