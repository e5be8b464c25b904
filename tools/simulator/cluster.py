"""Shared state of a simulation: the store, its clients, and the history for the checker."""

from __future__ import annotations

import asyncio
import random
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from icechunk.errors import ErrorKind, IcechunkError, SessionStateError
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.values import ManifestFile
from icechunk.log.repository.open import open_repository
from icechunk.log.repository.port import Layout, RepositoryLog, SwapToken
from icechunk.log.repository.queue import UpdateRetries
from icechunk.log.repository.state import RepoState
from tools.simulator.checker import ROOT, Operation, Outcome, View
from tools.simulator.faults import CALM, Fault, Mix
from tools.simulator.loop import DAY_S, VirtualLoop
from tools.simulator.storage import SimulatedStorage, SimulatedStore, Stored
from tools.simulator.trace import Trace

__all__ = ["Client", "Cluster", "Report", "keep_no_list_of_tasks", "told_error"]

T = TypeVar("T")

_LAST_LINES: Final = 12
_RETRIES: Final = UpdateRetries(tries=12, first_pause_s=0.05, longest_pause_s=2.0)
_owner: ContextVar[Client | None] = ContextVar("owner", default=None)


@dataclass(slots=True, kw_only=True)
class Report:
    """The events and findings of one seed."""

    seed: int
    profile: str = ""
    """The kind of schedule."""
    injected: Counter[Fault] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    """Operations by outcome."""
    unknown: int = 0
    """Outcomes that were unknown at first."""
    requests: int = 0
    crashes: int = 0
    conversions: int = 0
    pruned: int = 0
    """Slots deleted."""
    collected: int = 0
    """Objects deleted by collections."""
    problems: list[str] = field(default_factory=list)
    """Broken promises; none, it is hoped."""
    undecided: bool = False
    """Whether the checker gave up."""
    history: list[Operation] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    last_lines: list[str] = field(default_factory=list)
    """The end of the trace of a schedule that broke a promise."""

    @property
    def counts(self) -> bool:
        """Whether anything went wrong at all: a schedule without faults proves nothing."""
        return bool(self.injected)

    def without_trace(self) -> Report:
        """The same, small enough to be sent from process to process by the thousand."""
        if self.problems:
            self.last_lines = list(self.trace.lines())[-_LAST_LINES:]
        self.history, self.trace = [], Trace()
        return self


class Client:
    """One process that has opened the repository: its way to the store, its clock, its tasks."""

    def __init__(self, cluster: Cluster, name: str, *, faulty: bool) -> None:
        rng = cluster.rng
        self.name = name
        self.cluster = cluster
        self.storage = SimulatedStorage(cluster.store, name, faulty=faulty, dated=rng.random() < 0.9)
        self.storage.on_crash = self.crash
        self.storage.on_clock_jump = self._jump
        self.skew_us = rng.randrange(-5_000_000, 5_000_000)
        self.tasks: list[asyncio.Task[Any]] = []
        loop = cluster.loop
        self.sources = loop.sources(rng.randbytes, lambda: loop.now_us() + self.skew_us)

    @property
    def dead(self) -> bool:
        """Whether its process has ended."""
        return self.storage.dead

    def crash(self) -> None:
        """Its process is gone, with all that it was about to do."""
        self.storage.dead = True
        self.cluster.report.crashes += 1
        self.cluster.note(self.name, "crashes")
        self.cluster.on_crash(self)
        for task in self.tasks:
            if not task.done():
                task.cancel()

    def _jump(self) -> None:
        rng = self.cluster.rng
        by_s = rng.choice((5.0, 400.0, 3600.0, 2 * DAY_S)) * rng.uniform(-1, 1)
        self.skew_us += int(by_s * 1e6)
        self.cluster.note(self.name, f"clock jumps by {by_s:.0f} s")

    def own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something in this process: it ends with it."""
        token = _owner.set(self)
        try:
            return self.cluster.loop.create_task(work)
        finally:
            _owner.reset(token)

    async def run(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of what runs in this process; None where it fails, or where the process ends first."""
        task = self.own(work)
        await self.cluster.loop.finished(task)
        if task.cancelled() or isinstance(task.exception(), IcechunkError) or self.dead:
            return None
        return task.result()

    async def open(self) -> RepositoryLog | None:
        """Open the repository as users do, patiently; None where that never works, or the process ends."""
        for _ in range(40):
            if self.dead:
                return None
            window = self.cluster.updates_per_file
            opening = open_repository(self.storage, self.sources, updates_per_file=window, retries=_RETRIES)
            task = self.own(opening)
            await self.cluster.loop.finished(task)
            if task.cancelled() or self.dead:
                continue
            error = task.exception()
            if error is None:
                return task.result()
            if not isinstance(error, IcechunkError):
                raise error
            if error.kind == ErrorKind.UNSUPPORTED_SPEC_VERSION:
                return None
            await asyncio.sleep(self.cluster.rng.choice((1, 30)))
        return None


class _Task(asyncio.Task[Any]):
    """A task that is hashed by its number.

    asyncio keeps tasks in sets, for instance those that a group cancels. By address, their order would depend on what
    the process did before.
    """

    def __init__(self, number: int, work: Any, **options: Any) -> None:
        self.number = number
        super().__init__(work, **options)

    def __hash__(self) -> int:
        return self.number


def keep_no_list_of_tasks() -> None:
    """Let asyncio not enter this process's tasks into its list of all tasks, which nothing in a simulation asks for.

    To enter a task and take it out again takes longer than to make it.
    """
    for name in ("_all_tasks", "_scheduled_tasks"):  # of Python 3.11, and of later ones
        if (tasks := getattr(asyncio.tasks, name, None)) is not None:
            tasks.add = bool


class Cluster:
    """One store, all of its clients, and the outcomes that they got.

    Parameters
    ----------
    layout
        The layout of the repository in the beginning.
    objects
        The repository, as it is in the beginning.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        seed: int,
        rng: random.Random,
        *,
        layout: Layout,
        mix: Mix,
        objects: Mapping[str, Stored],
        collect: bool = False,
        converts: bool = False,
        sessions: bool = False,
    ) -> None:
        self.loop = loop
        self.rng = rng
        self.layout = layout
        self.mix = mix
        self.collect = collect
        self.converts = converts
        self.sessions = sessions
        self.amends = layout is not Layout.REFS
        self.updates_per_file = rng.choice((None, None, 3))
        """Most lines of the ops log in one object."""
        self.deleting: set[str] = set()
        """Branches whose deletion was requested, where it has no condition: of two such calls both succeed."""
        self.clients: list[Client] = []
        self.store = SimulatedStore(loop, mix, rng, objects)
        if sessions:
            # A session that waits for its chunks checks about once a second whether it has to send them itself.
            self.store.pause_s = 60.0
        self.report = Report(seed=seed, injected=self.store.injected, trace=self.store.trace)
        self.history: list[Operation] = self.report.history
        self.tokens: dict[int, SwapToken] = {}
        """Tokens of operations whose outcome is, or was, unknown, by the identity of the operation."""
        self.ids: dict[str, ObjectId] = {ROOT: FIRST_SNAPSHOT}
        self.names: dict[ObjectId, str] = {FIRST_SNAPSHOT: ROOT}
        self.manifests: dict[ObjectId, tuple[ManifestFile, ...]] = {FIRST_SNAPSHOT: ()}
        self.embedded: dict[str, bytes] = {}
        """Every file that was ever handed to `RepositoryLog.append`."""
        self.on_told: Callable[[Operation, SwapToken], None] = lambda operation, token: None
        """Called with every operation whose outcome is unknown."""
        self.on_crash: Callable[[Client], None] = lambda client: None
        """Called with every process that ends without being asked."""
        self.foreign: set[str] = set()
        """Names of clients that are another library, which knows nothing of the log."""
        self.newer_slot: str | None = None
        """Key of the slot in which a newer version of this library has written what this one does not know."""
        self.taken_over = False
        """Whether another library has taken the repository over from the log."""
        self._time = 0
        self._commits = 0
        self.tasks: list[asyncio.Task[Any]] = []
        """All that were begun, of whatever process; asyncio would look for them among those of all schedules."""
        loop.set_task_factory(self._new_task)

    def _new_task(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        # Not the same as in other schedules: asyncio has one set of all tasks, and dead ones stay in it for a while.
        task = _Task(hash((self.report.seed, len(self.tasks))), work, loop=loop, **options)
        self.tasks.append(task)
        owner = _owner.get()
        if owner is not None:
            owner.tasks.append(task)
        return task

    def client(self, role: str, *, faulty: bool = True) -> Client:
        """A new process."""
        client = Client(self, f"{role}{len(self.clients) + 1}", faulty=faulty and self.mix is not CALM)
        self.clients.append(client)
        return client

    def end_of_faults(self) -> None:
        """From now on nothing goes wrong; clocks that were wrong are set."""
        self.mix = CALM
        for client in self.clients:
            client.storage.recover()
            client.skew_us = 0
        self.note("", "there are no faults from here on")

    def tick(self) -> int:
        """The next position in the order of all calls and outcomes."""
        self._time += 1
        return self._time

    def note(self, who: str, what: str) -> None:
        """Write something down in the trace."""
        self.store.trace.note(self.loop.now_s, who, what)

    def problem(self, what: str) -> None:
        """A promise is broken."""
        self.report.problems.append(what)
        self.note("", f"PROBLEM: {what}")

    def inject(self, fault: Fault, who: str, what: str) -> None:
        """A fault that is not one of a request."""
        self.store.injected[fault] += 1
        self.store.trace.note(self.loop.now_s, who, what, fault=fault.value)

    def begin(self, operation: Operation) -> Operation:
        """Note that an operation was called."""
        operation.began = self.tick()
        self.history.append(operation)
        self.note(operation.client, f"asks for {_words(operation)}")
        return operation

    def end(self, operation: Operation, outcome: Outcome, note: str = "") -> None:
        """Note the outcome of an operation."""
        operation.ended, operation.outcome, operation.note = self.tick(), outcome, note
        self.note(operation.client, f"is told {outcome} about {_words(operation)}{f': {note}' if note else ''}")

    def unknown(self, operation: Operation, token: SwapToken | None) -> bool:
        """Note that the outcome of an operation is unknown to its caller; False: without a token, which is a fault."""
        self.report.unknown += 1
        if token is None:
            self.problem(f"the outcome of {operation} is unknown, and there is no token")
            return False
        self.told(operation, token)
        return True

    def told(self, operation: Operation, token: SwapToken) -> None:
        """Note that a caller got an unknown outcome, with its token."""
        self.tokens[id(operation)] = token
        self.on_told(operation, token)

    def settled_as(self, operation: Operation, who: str, landed: bool) -> None:
        """Note the settled outcome of an operation whose outcome was unknown."""
        outcome: Outcome = "ok" if landed else "failed"
        if operation.outcome in ("ok", "failed") and operation.outcome != outcome:
            self.problem(f"settled as {outcome} what was settled as {operation.outcome}: {operation}")
        self.note(who, f"settles {_words(operation)}: {outcome}")
        if operation.outcome in ("unknown", "open"):
            operation.ended, operation.outcome = self.tick(), outcome

    def new_name(self) -> str:
        """A new name of a commit; if the engine chooses the commit's id, its message is the name."""
        self._commits += 1
        return f"c{self._commits}"

    def new_commit(self) -> str:
        """A new name of a commit, with an id."""
        name, id = self.new_name(), ObjectId(self.rng.randbytes(12))
        self.ids[name], self.names[id] = id, name
        return name

    def name_of(self, id: ObjectId, message: str | None = None) -> str:
        """The name of a snapshot; its message where its id was chosen by the engine."""
        return self.names.get(id) or message or f"?{id.hex()}"

    def view(self, state: RepoState) -> View:
        """The checker's view of a state."""
        branches = {}
        for branch, tip in state.branches.items():
            commits = [self.name_of(record.id, record.message) for record in state.ancestry(tip)]
            branches[branch] = tuple(commits[::-1])
        tags = {}
        for tag, target in state.tags.items():
            known = state.snapshots.get(target)
            tags[tag] = self.name_of(target, known.message if known is not None else None)
        return View(branches=branches, tags=tags)

    async def read(self, client: Client, log: RepositoryLog) -> View | None:
        """Look at the repository as it is now, and enter that into the history; None without an answer."""
        operation = Operation(client=client.name, verb="read", began=self.tick())

        async def look() -> RepoState:
            state = await log.refresh()
            if log.layout is Layout.REFS:
                state = await log.learn(sorted(state.tips()), ancestry=True)
            return state

        state = await client.run(look())
        if state is None:
            return None
        operation.seen = self.view(state)
        operation.ended, operation.outcome = self.tick(), "ok"
        self.history.append(operation)
        self.note(client.name, f"sees {_shown(operation.seen)}")
        return operation.seen

    async def quietly(self, action: Coroutine[Any, Any, T]) -> T | None:
        """The result of an action; None where it fails as actions may."""
        try:
            return await action
        except (IcechunkError, SessionStateError):
            return None


def told_error(error: BaseException) -> str:
    """An error that nothing in a simulation may raise, and the places that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = "; ".join(f"{frame.name} {frame.filename}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__}: {error} ({where})"


def _words(operation: Operation) -> str:
    on = f" on {operation.parent}" if operation.parent is not None else ""
    return " ".join(part for part in (operation.verb, operation.ref, operation.commit) if part) + on


def _shown(view: View) -> str:
    branches = ", ".join(f"{name}: {'←'.join(commits)}" for name, commits in sorted(view.branches.items()))
    tags = ", ".join(f"{name} = {commit}" for name, commit in sorted(view.tags.items()))
    return branches + (f"; tags {tags}" if tags else "")
