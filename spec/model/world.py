"""The world of the log layout: clients, a store, what travels between them, and the promises.

A tick is half of G: a client may believe what it learned in this tick or in the one before (at most G/2 ago), and a
pruner may delete what was announced two ticks ago (at least G ago). That is coarser than the rules, on the dangerous
side of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from spec.model.histories import COMMIT, Entry, Event, Histories

__all__ = [
    "EPOCH_A",
    "EPOCH_B",
    "OBJECT_LAYOUT",
    "Actor",
    "Change",
    "Faults",
    "Message",
    "Proc",
    "Repo",
    "Scenario",
    "Setting",
    "Token",
    "World",
    "slot_of",
]

EPOCH_A: Final = 1
EPOCH_B: Final = 2
OBJECT_LAYOUT: Final = 0
"""In the place of an epoch: `repo` is authoritative."""

Message: TypeAlias = tuple[Any, ...]
"""A request: ``("slot", slot, entry, told)``, ``("repo", old, new, told)`` with If-Match, ``("set", new)`` without,
``("object", id)``. ``told``: whether a caller of what it carries had been told something when it was sent."""


def slot_of(epoch: int, n: int) -> int:
    """A slot's key; slots of an epoch are consecutive."""
    return epoch << 8 | n


class Change(NamedTuple):
    """A change that a caller asks for."""

    id: int
    branch: int = 1
    kind: str = COMMIT
    rebase: bool = False
    """Whether the caller gave a solver."""
    upon: int = 0
    """Another caller's change that the commit is built upon; the commit is asked for only once that is acknowledged."""
    clock: int = 1
    """Wall clock of the writer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """One client of a scenario."""

    role: str
    """writer, settler, reader, checkpointer, pruner, converter, collector, takeover"""
    name: str
    groups: tuple[tuple[Change, ...], ...] = ()
    """A writer's changes: one group after the other, the changes of a group share an entry."""
    settles: bool = False
    """Whether this client settles changes of unknown outcome in the end."""
    crashes: bool = False
    resumes: bool = False
    """Whether its session is resumed after a crash."""
    process: int = 0
    rounds: int = 1
    """Number of its reads, checkpoints or announcements."""
    back: bool = False
    """Whether a converter makes a log of the repo object again."""


class Faults(NamedTuple):
    """Numbers of faults that are left."""

    lost: int = 0
    """Answers that are lost, and requests that are late, with no answer."""
    doubled: int = 0
    refused: int = 0
    told: int = 0
    """Callers that are told something while their attempt is in flight."""
    crashes: int = 0
    ticks: int = 0


NO_FAULTS: Final = Faults()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """The clients of a world, and the faults that may happen."""

    name: str
    actors: tuple[Actor, ...]
    faults: Faults = NO_FAULTS
    written: tuple[tuple[int, ...], ...] = ()
    """Entries that are there at the beginning: each the ids of its commits, each on a branch of its own."""
    pending: tuple[Change, ...] = ()
    """The events of an attempt for slot 1 whose client has died. Its callers were told, its request still travels."""
    files: str = ""
    """Empty: not looked at; ``objects``: put before the entry is sent; ``embedded``: in the entry, but for chunks."""
    object_layout: bool = False
    """Whether the repository is a repo object at the beginning."""
    times: bool = False
    ignores_conditions: bool = False
    """Whether the store ignores If-None-Match."""
    given: frozenset[str] = frozenset()
    """Rules that are left out besides: each of them would protect from the same."""
    fresh_reads: bool = False
    """Whether a read must show what was acknowledged before it began."""


class Repo(NamedTuple):
    """The object ``repo``. Its contents are its version."""

    epoch: int
    """0: the repo-object layout."""
    n: int
    h: int


class Proc(NamedTuple):
    """The knowledge of a client."""

    pc: str = "open"
    epoch: int = 0
    head: int = 0
    h: int = 0
    proof: int = 0
    """T: the tick of the last answer that proved where the log ends."""
    attempt: int = 0
    """The entry in flight, or 0."""
    unsure: bool = False
    """Whether a request of it had no answer."""
    stop: bool = False
    """Whether a later one was refused: it is not sent again."""
    told: tuple[int, ...] = ()
    """Entries of told attempts for the slot after the head."""
    made: int = 0
    """Attempts made for that slot."""
    turn: int = 0
    """Groups of changes that are over."""
    base: tuple[tuple[int, int, int], ...] = ()
    """Index, parent and since of each change of the present group that still waits."""
    looked: bool = False
    """Whether the head was learned after the present group was asked for."""
    x: Any = None
    """Scratch: what an earlier step read; the token that is being settled."""
    rounds: int = 0
    seen: int = 0
    """The last history that a reader returned."""


class Token(NamedTuple):
    """Names the attempts with one change whose outcome is not known."""

    id: int
    owner: int
    """The client of the change."""
    place: int
    """The slot; in the repo-object layout minus one minus the history that ``repo`` had."""
    nonces: tuple[int, ...]
    proof: int
    """T: when the slot was known to be the next."""


class World(NamedTuple):
    """One state."""

    procs: tuple[Proc, ...]
    faults: tuple[int, ...]
    repo: Repo
    slots: tuple[tuple[int, int, int], ...] = ()
    """Key, entry, and tick of its creation (where it matters); sorted."""
    now: int = 0
    objects: int = 0
    """Three bits for each object: 0, or 1 + the tick of its Last-Modified; the chunk of change i is object 2·i, its
    metadata 2·i + 1."""
    floors: tuple[tuple[int, int, int], ...] = ()
    """Epoch, n, tick."""
    late: tuple[Message, ...] = ()
    """Requests that are still travelling; sorted."""
    acked: int = 0
    """Bits of the changes whose callers were told that they are committed."""
    failed: int = 0
    """Bits of the changes whose callers were told that they are not, and never will be. Bit 0: one of them because the
    log was sealed."""
    told: int = 0
    """Bits of the changes whose callers were told anything else."""
    tokens: tuple[Token, ...] = ()
    """Tokens of changes whose outcome is unknown; sorted."""
    bad: str = ""
    """A promise that the last step broke."""


class Setting:
    """A scenario under a set of rules, with everything about it that never changes."""

    def __init__(self, scenario: Scenario, rules: frozenset[str]) -> None:
        self.scenario = scenario
        self.rules = rules
        self.actors = scenario.actors
        self.histories = Histories()
        self.prunes = any(actor.role == "pruner" for actor in scenario.actors)
        self.collects = any(actor.role == "collector" for actor in scenario.actors)
        self.moves = self.prunes or any(actor.role in ("converter", "takeover") for actor in scenario.actors)
        self.settles = any(actor.settles or actor.resumes for actor in scenario.actors)
        self.by_age = self.prunes and "announce" not in rules
        self.trust = 1 if "trust" in rules else 2
        self._tails: dict[tuple[Any, ...], tuple[int, int, bool]] = {}
        self._truths: dict[tuple[Any, ...], int] = {}
        commits = 0
        for group in (scenario.pending, *(group for actor in scenario.actors for group in actor.groups)):
            for change in group:
                commits |= (change.kind == COMMIT) << change.id
        for entry in scenario.written:
            for id in entry:
                commits |= 1 << id
        self.commits = commits
        """Bits of the changes that are commits: known by their snapshots."""

    # ------------------------------------------------------------------ the store

    def found(self, world: World, slot: int) -> int:
        """The entry in a slot; 0: empty."""
        return next((entry for key, entry, _ in world.slots if key == slot), 0)

    def tail(self, world: World, epoch: int, n: int, h: int) -> tuple[int, int, bool]:
        """Head and history after the contiguous slots past ``n``, and whether there are slots beyond a gap."""
        key = world.slots, epoch, n, h
        out = self._tails.get(key)
        if out is None:
            entries = {slot: entry for slot, entry, _ in world.slots}
            listed = sum(slot_of(epoch, n) < slot < slot_of(epoch + 1, 0) for slot in entries)
            first = n
            while entry := entries.get(slot_of(epoch, n + 1), 0):
                n, h = n + 1, self.histories.fold(h, entry)
            out = self._tails[key] = n, h, listed > n - first
        return out

    def truth(self, world: World) -> int:
        """The history that a client would read if it looked at everything at once."""
        key = world.repo, world.slots
        h = self._truths.get(key)
        if h is None:
            epoch, n, h = world.repo
            if epoch:
                h = self.tail(world, epoch, n, h)[1]
            self._truths[key] = h
        return h

    def execute(self, world: World, message: Message) -> tuple[World, bool]:
        """A request reaches the store: the world afterwards, and whether it succeeded."""
        kind = message[0]
        if kind == "slot":
            slot, told = message[1], message[3]
            if self.found(world, slot):
                if not self.scenario.ignores_conditions:
                    return world, False
                world = world._replace(slots=tuple(one for one in world.slots if one[0] != slot))
            tick = world.now if self.by_age else 0
            return world._replace(
                slots=tuple(sorted((*world.slots, (slot, message[2], tick)))), bad=_LATER if told else world.bad
            ), True
        if kind == "repo":
            _, old, new, told = message
            if world.repo != old:
                return world, False
            return world._replace(repo=new, bad=_LATER if told else world.bad), True
        if kind == "set":
            return world._replace(repo=message[1]), True
        return self.put_objects(world, 1 << message[1]), True

    def put_objects(self, world: World, ids: int, *, part: int = 1) -> World:
        """PUT the objects of these changes, if absent."""
        objects, id = world.objects, 0
        while ids >> id:
            shift = (2 * id + part) * 3
            if ids >> id & 1 and not objects >> shift & 7:
                objects |= world.now + 1 << shift
            id += 1
        return world if objects == world.objects else world._replace(objects=objects)

    def standing(self, world: World, part: int) -> int:
        """Bits of the changes of which this object is there."""
        out, id, objects = 0, 0, world.objects >> part * 3
        while objects:
            out |= bool(objects & 7) << id
            objects >>= 6
            id += 1
        return out

    def put(self, world: World, message: Message, what: tuple[object, ...]) -> Iterator[tuple[Any, World, int | None]]:
        """A client sends a request: label, world, answer (200, 412, 403, or None: no answer)."""
        after, done = self.execute(world, message)
        lost, doubled, refused, *rest = world.faults
        yield (*what, "→", "200" if done else "412"), after, 200 if done else 412
        if lost:
            fewer = (lost - 1, doubled, refused, *rest)
            if done:
                yield (*what, "→ done, ANSWER LOST"), after._replace(faults=fewer), None
            yield (
                (*what, "→ TIMED OUT, still travelling"),
                world._replace(faults=fewer, late=_with(world.late, message)),
                None,
            )
        if doubled and done:
            fewer = (lost, doubled - 1, refused, *rest)
            yield (*what, "→ 200, DOUBLED"), after._replace(faults=fewer, late=_with(world.late, message)), 200
        if refused:
            yield (*what, "→ 403"), world._replace(faults=(lost, doubled, refused - 1, *rest)), 403

    def arrivals(self, world: World) -> Iterator[tuple[Any, World]]:
        """The arrivals of requests that are on their way."""
        for message in world.late:
            after, done = self.execute(world, message)
            late = tuple(one for one in world.late if one != message)
            yield (*_late(message), "arrives" if done else "is refused"), after._replace(late=late)

    def without_vain(self, world: World) -> World:
        """Drop requests that can never succeed any more: states that differ in nothing else are one state."""
        if not world.late:
            return world
        late = tuple(message for message in world.late if not self._is_vain(world, message))
        return world if len(late) == len(world.late) else world._replace(late=late)

    def _is_vain(self, world: World, message: Message) -> bool:
        match message[0]:
            case "slot":
                return not self.prunes and not self.scenario.ignores_conditions and bool(self.found(world, message[1]))
            case "repo":
                return bool(message[1] != world.repo)
            case "object":
                return not self.collects and bool(world.objects >> (2 * message[1] + 1) * 3 & 7)
            case _:
                return False

    # ------------------------------------------------------------------ promises

    def broken(self, before: World, world: World) -> str:
        """The promise that a step breaks."""
        if world.bad:
            return world.bad
        histories = self.histories
        h = self.truth(world)
        ids = histories.ids(h)
        if world.acked & ~ids:
            return "ACKNOWLEDGED: an acknowledged change is not in history"
        if world.failed & ids:
            return "FAILED: a change that was reported as failed is in history"
        if world.repo.epoch == before.repo.epoch and world.repo.n < before.repo.n:
            return "CHECKPOINT: it went backwards"
        if (h0 := self.truth(before)) != h:
            if not histories.is_prefix(h0, h):
                return "HISTORY: it was rewritten"
            if histories.twice(h):
                return "ONCE: a change happened twice"
            if self.scenario.times and not histories.times_increase(h):
                return "TIME: times in history do not increase"
        if self.scenario.files and (
            world.objects != before.objects or world.repo != before.repo or world.slots != before.slots
        ):
            return self._missing_files(world, h)
        return ""

    def _missing_files(self, world: World, h: int) -> str:
        histories = self.histories
        chunks, metadata = self.standing(world, 0), self.standing(world, 1)
        named = histories.graph(world.repo.h) & self.commits
        if named & ~(chunks & metadata):
            return "FILES: repo names a snapshot whose objects are not there"
        needed = histories.reached(h) & self.commits
        if needed & ~(chunks & (metadata | self.embedded(world))):
            return "FILES: a commit in history has lost its files"
        return ""

    def embedded(self, world: World) -> int:
        """Bits of the commits whose metadata is in an entry after the checkpoint."""
        out, (epoch, n, _) = 0, world.repo
        for slot, entry, _ in world.slots:
            if slot_of(epoch, n) < slot < slot_of(epoch + 1, 0) and self.histories.entries[entry].embedded:
                out |= self.histories.entry_ids[entry]
        return out

    def stuck(self, world: World) -> str:
        """The fault of a state in which no client can do anything any more; empty: none."""
        if world.late:
            return ""
        for actor, proc in zip(self.actors, world.procs, strict=True):
            if proc.pc not in ("done", "dead") and actor.role not in ("pruner", "settler"):
                return "STUCK: a client waits for ever"
        if world.failed & 1 and world.repo.epoch and self.histories.sealed(self.truth(world)):
            return "STUCK: a change was refused because of a seal whose conversion no client finishes"
        return ""

    def initial(self) -> World:
        """The state in which everything begins."""
        scenario, histories = self.scenario, self.histories
        slots = []
        world = World(
            procs=tuple(Proc() for _ in self.actors),
            faults=tuple(scenario.faults),
            repo=Repo(OBJECT_LAYOUT if scenario.object_layout else EPOCH_A, 0, 0),
        )
        for n, ids in enumerate(scenario.written, 1):
            entry = Entry(-n, tuple(Event(COMMIT, id=id, branch=16 + id, time=n) for id in ids))
            slots.append((slot_of(EPOCH_A, n), histories.entry(entry), 0))
        world = world._replace(slots=tuple(slots))
        if not scenario.pending:
            return world
        events = tuple(Event(change.kind, change.id, change.branch) for change in scenario.pending)
        number, slot = histories.entry(Entry(-100, events)), slot_of(EPOCH_A, 1)
        told, tokens = 0, []
        for change in scenario.pending:
            told |= 1 << change.id
            tokens.append(Token(change.id, -1, slot, (-100,), 0))
        return world._replace(late=(("slot", slot, number, False),), told=told, tokens=tuple(tokens))


_LATER: Final = "LATER: an attempt was carried out by a request that was sent after its caller had been told"


def _late(message: Message) -> tuple[object, ...]:
    match message[0]:
        case "slot":
            return ("LATE PUT of slot", message[1] & 255)
        case "object":
            return ("LATE PUT of the embedded file of", message[1])
        case _:
            return ("LATE PUT of repo",)


def _with(late: tuple[Message, ...], message: Message) -> tuple[Message, ...]:
    return late if message in late else tuple(sorted((*late, message), key=repr))
