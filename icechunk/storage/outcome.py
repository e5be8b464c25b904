"""Conditional writes to stores whose answers may be lost: sent until their outcome is certain.

`follow` is the one loop that does it, for the stores' own tries and for the repository log's changes: it sends, looks
where the answer was not certain, and sends the same bytes again as long as nothing else took their place. A writer
(`Write`) supplies the request, the recognition of its own write, and the pauses. `Fate` is what became of the write.

A store's conditional write has a random id of its own in the object's user metadata. Its writer reads that back: its
own id means that an earlier try landed and only its answer was lost. Otherwise `judge` decides:

===========  ==========================  =====================================================
condition    found                       fate
===========  ==========================  =====================================================
any          not looked for: every try   lost
             so far was turned down
Absent       another's object            lost: a late try can only land in an empty place
Absent       nothing                     open: the same bytes are sent again
Matches      still that version          open: the same bytes are sent again
Matches      anything else, every try    lost
             so far was certain
Matches      anything else, after a try  undecided: ours may have landed and been replaced since
             without answer
===========  ==========================  =====================================================

`landed` turns the outcome into what `Storage.put` returns or raises: `PreconditionFailedError` where the write is lost.
If every try of a write failed in a way that certainly wrote nothing, the error says so: it is marked `refused` if
another try would fail too, and `unsent` if it may succeed. `tried_by` reads the mark.

A conditional write that is made through `Storage` is a `Sending`: up to eight requests, each with the own tries of the
store, with pauses that grow. It is recognised by what its object contains. `certain` makes a bool of its outcome.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum, auto
from typing import Final, Protocol, TypeVar

from icechunk.errors import (
    ErrorKind,
    FormatError,
    IcechunkError,
    InvalidInputError,
    PreconditionFailedError,
    ReadOnlyError,
    StorageError,
)
from icechunk.runtime.clock import Sources
from icechunk.runtime.late_dataclass import dataclass
from icechunk.storage.port import Absent, Matches, Precondition, PutResult, Storage, Unchecked, Version

__all__ = [
    "REFUSING_STATUSES",
    "ROUNDS",
    "Creation",
    "Fate",
    "Found",
    "Outcome",
    "Seen",
    "Sending",
    "Tried",
    "Write",
    "backoff_s",
    "certain",
    "follow",
    "is_refusal",
    "judge",
    "landed",
    "precondition_failed",
    "refused",
    "replaced_since",
    "tried_by",
    "uncertain",
    "unsent",
]

REFUSING_STATUSES: Final = frozenset({400, 401, 403, 404, 405, 411, 501})
"""HTTP answers to a PUT that say for certain that it was not executed; 404 is that of the bucket."""
ROUNDS: Final = 8
"""Most requests of one write."""
_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 5.0

E = TypeVar("E", bound=StorageError)


class Fate(Enum):
    """The knowledge about a conditional write."""

    LANDED = auto()
    """It is what took its place."""
    LOST = auto()
    """Something else took its place: it did not land and never will."""
    REFUSED = auto()
    """Every request of it was refused, or never left: nothing of it was executed, nor will be."""
    OPEN = auto()
    """Its place is as it was: a request of it may still arrive."""
    UNDECIDED = auto()
    """Its place was taken, and by which write cannot be found out any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """The result of one request of a conditional write."""

    landed: bool = False
    """Whether it was executed."""
    put: PutResult | None = None
    """The answer of one that was executed, where the writer wants to know it."""
    error: Exception | None = None
    """Error to raise if this was the last one."""
    turned_down: bool = False
    """Whether the condition did not hold; certain unless an earlier request may have landed."""
    final: bool = False
    """Whether another try would fail too."""
    refused: bool = False
    """Whether it certainly wrote nothing, and every other try would fail in the same way."""
    may_land: bool = False
    """Whether it may have been executed, or may be later."""
    reached: bool = True
    """Whether the service may have received the request."""
    look: bool = False
    """Whether it is worth looking before the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The result of looking at a write's place."""

    fate: Fate
    """Fate of the write; never `Fate.REFUSED`."""
    put: PutResult | None = None
    """The answer that the write must have had, where it landed and the writer wants to know it."""
    why: Exception | None = None
    """Error because of which the place could not be looked at; then the fate is open."""
    final: bool = False
    """Whether looking again would show no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of following a conditional write."""

    fate: Fate
    put: PutResult | None = None
    """The answer of a write that landed, where the writer wants to know it."""
    why: Exception | None = None
    """The last answer of the store, where none was certain."""
    may_land: bool = False
    """Whether some request of it was not certainly without effect."""
    reached: bool = True
    """Whether the service may have had some request."""
    used_up: bool = False
    """Whether the tries were used up, or looking is of no use, so that it is open."""


class Write(Protocol):
    """One conditional write on its way: always the same bytes, on the same condition."""

    async def send(self, may_land: bool) -> Tried:
        """Make one request. ``may_land``: whether an earlier one may have landed, or may land.

        Raises
        ------
        PreconditionFailedError
            The condition does not hold, for certain.
        IcechunkError
            It could not even be tried: there are no credentials any more, for one.
        """

    async def look(self, may_land: bool) -> Seen:
        """Look at the place of the write, and recognise what took it."""

    async def again(self, reached: bool) -> bool:
        """Pause before another try; False if there will be none. ``reached``: whether some try reached the service."""


async def follow(write: Write) -> Outcome:
    """Send a conditional write, and look, until its outcome is certain or there are no more tries."""
    may_land = reached = False
    why: Exception | None = None
    while True:
        try:
            tried = await write.send(may_land)
        except PreconditionFailedError as error:
            return Outcome(fate=Fate.LOST, why=error)
        except IcechunkError as lapse:
            return Outcome(fate=Fate.OPEN, why=lapse, may_land=may_land)
        if tried.landed:
            return Outcome(fate=Fate.LANDED, put=tried.put)
        reached = reached or tried.reached
        why = tried.error or why
        if tried.turned_down and not may_land:
            # One try is one request, so what took the place is not our own.
            return Outcome(fate=Fate.LOST, why=why)
        may_land = may_land or tried.may_land
        if tried.final and tried.refused and not may_land:
            return Outcome(fate=Fate.REFUSED, why=why)
        if tried.look:
            seen = await write.look(may_land)
            if seen.fate is not Fate.OPEN:
                return Outcome(fate=seen.fate, put=seen.put, why=why, may_land=may_land)
            if seen.final:
                return Outcome(fate=Fate.OPEN, why=seen.why, may_land=may_land, used_up=True)
            why = why if tried.final else seen.why or why
        if tried.final:
            return Outcome(fate=Fate.OPEN, why=why, may_land=may_land)
        if not await write.again(reached):
            return Outcome(fate=Fate.OPEN, why=why, may_land=may_land, reached=reached, used_up=True)


# ------------------------------------------------------- writes that a store tries by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An object that was read back."""

    ours: bool
    """Whether it is what this call wrote."""
    version: Version
    date_us: int | None
    """The store's clock when it answered; None where it does not say."""


def judge(found: Found | StorageError | None, precondition: Precondition, *, may_land: bool) -> Seen:
    """Judge what reading an object back found; None: there is none; an error: it could not be read."""
    if isinstance(found, StorageError):
        # The answer to the write says more.
        return Seen(fate=Fate.OPEN)
    if found is not None and found.ours:
        return Seen(fate=Fate.LANDED, put=PutResult(version=found.version, date_us=found.date_us))
    match precondition:
        case Absent():
            return Seen(fate=Fate.OPEN if found is None else Fate.LOST)
        case Matches(version):
            if found is not None and found.version == version:
                return Seen(fate=Fate.OPEN)
            return Seen(fate=Fate.UNDECIDED if may_land else Fate.LOST)
        case Unchecked():
            return Seen(fate=Fate.OPEN)


def landed(name: str, precondition: Precondition, outcome: Outcome) -> PutResult:
    """The answer of a store's write that was followed. ``name``: of the object, for messages.

    Raises
    ------
    PreconditionFailedError
        It did not land, for certain.
    StorageError
        As `Storage.put` says: ``refused``, ``unsent``, or not certain.
    """
    why = outcome.why
    match outcome.fate:
        case Fate.LANDED:
            assert outcome.put is not None
            return outcome.put
        case Fate.LOST:
            raise precondition_failed(name, precondition) from why
        case Fate.UNDECIDED:
            raise replaced_since(name) from why
        case _:
            assert why is not None
            if outcome.may_land:
                raise uncertain(why)
            if isinstance(why, StorageError):
                if outcome.fate is Fate.REFUSED:
                    raise refused(why)
                if outcome.used_up and not outcome.reached:
                    raise unsent(why)
            raise why


def tried_by(error: Exception) -> Tried:
    """A request that `Storage.put` answered with an error that says nothing of its condition."""
    refusal = is_refusal(error)
    may_land = not refusal and not getattr(error, "unsent", False)
    return Tried(error=error, final=refusal, refused=refusal, may_land=may_land, look=True)


def replaced_since(name: str) -> StorageError:
    """The error for a replacement without answer whose object has another version by now."""
    return StorageError(
        f"cannot find out whether the write of {name} landed: its answer was lost, and the object has another "
        "version now; read it back to see which write it holds",
        ErrorKind.OBJECT_STORE,
    )


def precondition_failed(name: str, precondition: Precondition) -> PreconditionFailedError:
    """The error for a write that was refused for certain."""
    if isinstance(precondition, Matches):
        return PreconditionFailedError(
            f"cannot replace version {precondition.version} of {name}: the object has another version now, or is gone"
        )
    return PreconditionFailedError(f"cannot create {name}: the object exists already")


def refused(error: E) -> E:
    """Note on the error of a write that every try of it was refused for certain; returns the error."""
    error.refused = True
    return error


def lost(error: E) -> E:
    """Note on the error of a write that was refused since objects before it may be lost; returns the error."""
    # The system says so once: what another sync says does not count.
    error.lost = True
    return refused(error)


def unsent(error: E) -> E:
    """Note on the error of a write that no try of it reached the storage; returns the error."""
    error.unsent = True
    return error


def is_refusal(error: BaseException) -> bool:
    """Whether what a write raised says that it was refused for certain, and that the same write would be again."""
    if isinstance(error, StorageError):
        return error.refused
    # Arguments are refused before anything is sent.
    return isinstance(error, InvalidInputError | ReadOnlyError)


def uncertain(error: Exception) -> StorageError:
    """The error for a write that may have landed, or may land later."""
    result = StorageError(
        f"{error}; the outcome is uncertain: an earlier try may have landed, or may land later. Read the object back",
        getattr(error, "kind", ErrorKind.OBJECT_STORE),
    )
    result.__cause__ = error
    return result


# ------------------------------------------------------- writes through `Storage`


def backoff_s(sources: Sources, round_: int) -> float:
    """A pause with full jitter before try ``round_`` (counted from 1)."""
    longest: float = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**round_)
    return longest * sources.fraction()


class Sending(Write, ABC):
    """A conditional write through `Storage`: up to `ROUNDS` requests, with pauses that grow."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._rounds = 0

    @abstractmethod
    async def put(self) -> bool:
        """Make one request; False: its condition does not hold.

        Raises
        ------
        IcechunkError, OSError
            No answer, or a refusal (`icechunk.storage.outcome.is_refusal`).
        """

    @abstractmethod
    async def fate(self, may_land: bool) -> Fate:
        """The fate by the object that is there now. ``may_land``: whether some request may have landed, or may land.

        Raises
        ------
        IcechunkError, OSError
            The object cannot be read; `FormatError`: its contents cannot be understood.
        """

    async def send(self, may_land: bool) -> Tried:
        """As `Write.send`."""
        try:
            if await self.put():
                return Tried(landed=True)
        except (IcechunkError, OSError) as error:
            return tried_by(error)
        # Perhaps because of a request of this write that the store has had twice: looking decides.
        return Tried(may_land=True, look=True)

    async def look(self, may_land: bool) -> Seen:
        """As `Write.look`."""
        try:
            return Seen(fate=await self.fate(may_land))
        except FormatError as error:
            # The place is taken, by something that this client does not understand.
            return Seen(fate=Fate.OPEN, why=error, final=True)
        except (IcechunkError, OSError) as error:
            return Seen(fate=Fate.OPEN, why=error)

    async def again(self, reached: bool) -> bool:
        """As `Write.again`."""
        self._rounds += 1
        if self._rounds >= ROUNDS:
            return False
        await self._sources.sleep(backoff_s(self._sources, self._rounds))
        return True


def certain(outcome: Outcome, unsure: StorageError) -> bool:
    """Whether a single write landed (True), or something else took its place (False).

    Parameters
    ----------
    unsure
        To be raised where that is not known.

    Raises
    ------
    IcechunkError, OSError
        The write was refused for certain, or what took its place cannot be understood (`FormatError`).
    StorageError
        ``unsure``.
    """
    match outcome.fate:
        case Fate.LANDED:
            return True
        case Fate.LOST | Fate.UNDECIDED:
            return False
        case Fate.OPEN if not isinstance(outcome.why, FormatError):
            raise unsure from outcome.why
        case _:
            assert outcome.why is not None
            raise outcome.why


class Creation(Sending):
    """The creation of an object where there is none, recognised as a subclass says."""

    def __init__(self, storage: Storage, sources: Sources, key: str, data: bytes) -> None:
        super().__init__(sources)
        self.storage = storage
        self._key = key
        self._data = data
        self.answer: PutResult | None = None
        """The answer of the store that it landed; None where there was none."""

    async def put(self) -> bool:
        """As `Sending.put`."""
        try:
            self.answer = await self.storage.put(self._key, self._data, Absent())
        except PreconditionFailedError:
            return False
        return True
