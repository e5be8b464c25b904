"""The explored worlds: for each rule a small one that goes wrong without it, and larger ones with much at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, TypeAlias

from spec.model.creation import Creation, CreationModel
from spec.model.explore import Space
from spec.model.filesystem import Filesystem, FilesystemModel
from spec.model.histories import DELETE
from spec.model.model import LogModel
from spec.model.rules import ALL
from spec.model.world import Actor, Change, Faults, Scenario

__all__ = ["LARGE", "LIMITS", "QUICK", "SMALL", "AnyScenario", "space_of"]


AnyScenario: TypeAlias = Scenario | Creation | Filesystem


def writer(name: str, *groups: Change | tuple[Change, ...], **more: Any) -> Actor:
    """A client whose callers ask for one group of changes after the other."""
    shared = tuple((one,) if isinstance(one, Change) else one for one in groups)
    return Actor(role="writer", name=name, groups=shared, **more)


def actor(role: str, **more: Any) -> Actor:
    return Actor(role=role, name=role, **more)


def world(name: str, actors: Iterable[Actor], **more: Any) -> Scenario:
    faults = {field: more.pop(field) for field in Faults._fields if field in more}
    return Scenario(name=name, actors=tuple(actors), faults=Faults(**faults), **more)


X, Y = Change(1), Change(2)
"""Two commits to one branch."""
X_ON, Y_ON = Change(1, rebase=True), Change(2, rebase=True)
"""The same with a solver."""
OTHER, THIRD = Change(3, branch=2), Change(4, branch=3)
"""Commits to branches of their own."""
GONE = Change(5, kind=DELETE)
READER, CHECKPOINTER, PRUNER = actor("reader"), actor("checkpointer"), actor("pruner")
CONVERTER, COLLECTOR = actor("converter"), actor("collector")

SMALL: Final[dict[str, AnyScenario]] = {
    "conditions": world(
        "a store that ignores conditions", [writer("x", X), writer("y", OTHER)], ignores_conditions=True
    ),
    "order": world("a told attempt, and the next change", [writer("x", X, OTHER)], lost=1, told=1),
    "settle": world("a late PUT", [writer("x", X), writer("y", OTHER)], lost=1),
    "told": world("the caller changes its mind", [writer("x", X, OTHER)], lost=1, told=1),
    "nonce": world("two sessions of a process", [writer("x", X, process=7), writer("y", Y, process=7)], lost=1),
    "look": world("a lost answer, then 412", [writer("x", X)], lost=1),
    "shared": world(
        "one of two callers is cancelled", [writer("x", (X, Change(3, branch=2, rebase=True)))], lost=1, told=1
    ),
    "refusal": world("a late PUT, then 403", [writer("x", X)], lost=1, refused=1),
    "void": world("settled while the PUT travels", [writer("x", X, settles=True)], lost=1, told=1),
    "looked": world("built upon what another client did", [writer("x", X), writer("y", THIRD, Change(2, upon=1))]),
    "chain": world("two commits of a branch in an entry", [writer("x", (X, Y))]),
    "proof": world("a writer behind pruned slots", [writer("x", X), writer("y", OTHER), CHECKPOINTER, PRUNER], ticks=2),
    "reader-proof": world(
        "a reader behind pruned slots",
        [writer("x", X), actor("reader", rounds=2), CHECKPOINTER, PRUNER],
        ticks=2,
        fresh_reads=True,
    ),
    "after": world("a pause after the check", [writer("x", X), writer("y", OTHER), CHECKPOINTER, PRUNER], ticks=2),
    "trust": world("a proof that is nearly G old", [writer("x", X), writer("y", OTHER), CHECKPOINTER, PRUNER], ticks=2),
    "token-proof": world(
        "a token that is older than its slot",
        [actor("settler", settles=True), CHECKPOINTER, PRUNER],
        written=((1,),),
        pending=(Change(5, branch=17, kind=DELETE),),
        ticks=2,
    ),
    "contiguous": world(
        "opening while the tail is pruned",
        [READER, CHECKPOINTER, PRUNER],
        written=((1,), (2,)),
        ticks=2,
        given=frozenset({"reader-proof"}),
    ),
    "epoch": world(
        "log, repo object, log again",
        [writer("x", X), writer("y", OTHER), CHECKPOINTER, actor("converter", back=True)],
    ),
    "forward": world(
        "two checkpointers", [writer("x", X), writer("y", OTHER), CHECKPOINTER, actor("checkpointer", rounds=2)]
    ),
    "match": world(
        "two checkpointers at once", [writer("x", X), writer("y", OTHER), CHECKPOINTER, actor("checkpointer", rounds=2)]
    ),
    "seal": world("a conversion", [writer("x", X), CONVERTER]),
    "help": world("a converter that dies", [writer("x", X), actor("converter", crashes=True)], crashes=1),
    "announce": world(
        "pruning after a late checkpoint", [writer("x", X), READER, CHECKPOINTER, PRUNER], written=((3,),), ticks=2
    ),
    "wait": world(
        "pruning right after the announcement", [writer("x", X), writer("y", OTHER), CHECKPOINTER, PRUNER], ticks=2
    ),
    "floor": world("a floor at the head", [writer("x", X), READER, CHECKPOINTER, PRUNER], ticks=2),
    "fence": world("a slow commit and a collection", [writer("x", X), COLLECTOR], files="objects", ticks=1),
    "ahead": world(
        "a collection of what repo names",
        [writer("x", X, GONE), CHECKPOINTER, COLLECTOR],
        files="objects",
        ticks=1,
    ),
    "first": Creation(name="two creators"),
    "mine": Creation(name="a creator whose answer is lost", lost=1, doubled=1),
    "sync": Filesystem(name="power fails", kind="link", readers=1, power=1),
    "lock": Filesystem(name="a writer sleeps over an empty slot", kind="exclusive", crashes=1),
    "inode": Filesystem(name="a writer sleeps before it has the lock", kind="exclusive", crashes=1),
    "time": world(
        "clocks that differ", [writer("x", Change(1, clock=5)), writer("y", Change(3, branch=2))], times=True
    ),
    "resume": world("a session is resumed", [writer("x", X_ON, crashes=True, resumes=True)], lost=1, crashes=1),
    "materialize": world("a checkpoint of embedded files", [writer("x", X), CHECKPOINTER], files="embedded"),
    "materialize-last": world("a conversion of embedded files", [writer("x", X), CONVERTER], files="embedded"),
    "look-again": world("a reader of embedded files", [writer("x", X), READER, CHECKPOINTER], files="embedded"),
}
"""For each rule of the log a world in which it is needed."""

LIMITS: Final[dict[str, Scenario]] = {
    "takeover": world(
        "a client of another library takes over",
        [writer("x", X), Actor(role="takeover", name="other", groups=((Change(2),),))],
    ),
}
"""Worlds that go wrong with all rules."""

LARGE: Final[dict[str, AnyScenario]] = {
    "told twice": world(
        "callers that change their minds",
        [writer("x", X_ON, OTHER, settles=True), writer("y", Y, settles=True)],
        lost=2,
        doubled=1,
        refused=1,
        told=2,
    ),
    "told often": world(
        "three told attempts for one slot",
        [writer("x", X_ON, OTHER, Y_ON, settles=True), writer("y", THIRD, settles=True)],
        lost=3,
        doubled=1,
        refused=1,
        told=3,
    ),
    "told among others": world(
        "the same beside a checkpointer and a reader",
        [writer("x", X_ON, OTHER, settles=True), writer("y", Y, settles=True), CHECKPOINTER, READER],
        lost=2,
        doubled=1,
        refused=1,
        told=2,
    ),
    "callers": world(
        "entries with several callers",
        [writer("x", (X_ON, OTHER), THIRD, settles=True), writer("y", Y_ON)],
        lost=2,
        told=2,
    ),
    "settled elsewhere": world(
        "a client dies, its tokens are settled by another",
        [writer("x", X, GONE, crashes=True), writer("y", Y_ON), actor("settler", settles=True)],
        lost=2,
        told=2,
        crashes=1,
    ),
    "object": world(
        "the repo-object layout",
        [writer("x", X_ON, GONE, settles=True), writer("y", Y, OTHER, settles=True)],
        object_layout=True,
        lost=2,
        doubled=1,
        refused=1,
        told=2,
    ),
    "embedded": world(
        "files embedded in entries",
        [writer("x", X, OTHER), writer("y", Y_ON), actor("reader", rounds=2), actor("checkpointer", rounds=2)],
        files="embedded",
        lost=1,
    ),
    "prune": world(
        "pruning",
        [writer("x", X, settles=True), writer("y", OTHER), actor("reader", rounds=2), CHECKPOINTER, PRUNER],
        lost=1,
        told=1,
        ticks=2,
    ),
    "prune and look": world(
        "looks and openings without an answer while slots are pruned",
        [writer("x", X, settles=True), writer("y", OTHER), CHECKPOINTER, PRUNER],
        lost=2,
        told=1,
        ticks=2,
    ),
    "convert": world(
        "conversion, and back",
        [writer("x", X_ON, settles=True), writer("y", Y_ON), CHECKPOINTER, actor("converter", back=True, crashes=True)],
        lost=1,
        told=1,
        crashes=1,
    ),
    "convert and prune": world(
        "conversion and back while slots are pruned",
        [writer("x", X_ON), READER, CHECKPOINTER, PRUNER, actor("converter", back=True)],
        doubled=1,
        ticks=2,
    ),
    "collect": world(
        "collection",
        [writer("x", X, GONE), writer("y", OTHER), CHECKPOINTER, COLLECTOR],
        files="embedded",
        ticks=1,
    ),
    "collect and lose": world(
        "collection with lost answers",
        [writer("x", X, GONE), CHECKPOINTER, COLLECTOR],
        files="embedded",
        lost=1,
        ticks=1,
    ),
    "collect and prune": world(
        "collection while slots are pruned",
        [writer("x", X, GONE), CHECKPOINTER, PRUNER, COLLECTOR],
        files="embedded",
        ticks=2,
    ),
    "resumed": world(
        "sessions that are resumed",
        [writer("x", X_ON, crashes=True, resumes=True), writer("y", Y_ON), CHECKPOINTER, READER],
        lost=1,
        doubled=1,
        crashes=1,
    ),
    "create": Creation(name="three creators", creators=3, lost=2, doubled=1),
    "link": Filesystem(name="slots made by link", kind="link", writers=3, readers=1, power=1, crashes=1),
    "exclusive": Filesystem(name="slots made by O_EXCL", kind="exclusive", writers=3, crashes=2),
}
"""Worlds in which many things happen at once."""

QUICK: Final = (
    "told twice",
    "callers",
    "settled elsewhere",
    "collect and lose",
    "resumed",
    "create",
    "link",
    "exclusive",
)
"""Names of the scenarios that are explored within seconds."""


def space_of(scenario: AnyScenario, without: Iterable[str] = ()) -> Space:
    """The space of a scenario under all rules but those that are left out."""
    rules = ALL - scenario.given - set(without)
    match scenario:
        case Creation():
            return CreationModel(scenario, rules)
        case Filesystem():
            return FilesystemModel(scenario, rules)
        case Scenario():
            return LogModel(scenario, rules)
