"""The log layout as a space that `spec.model.explore` explores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from spec.model import clients, upkeep
from spec.model.clients import Step
from spec.model.explore import Label
from spec.model.world import Proc, Scenario, Setting, World

__all__ = ["LogModel"]

_STEPS: Final[dict[str, Callable[[Setting, World, int, Proc], Iterator[Step]]]] = {
    "open": clients.get_repo,
    "list": clients.listing,
    "idle": clients.idle,
    "look": clients.look,
    "ask": clients.ask,
    "again": clients.resend,
    "settle": clients.settle,
    "refresh": upkeep.refresh,
    "checkpoint": upkeep.checkpoint,
    "put": upkeep.put_checkpoint,
    "ahead": upkeep.checkpoint,
    "put ahead": upkeep.put_checkpoint,
    "convert": upkeep.convert,
    "back": upkeep.back,
    "collect": upkeep.collect,
    "sweep": upkeep.sweep,
    "file": upkeep.files,
    "file in tail": upkeep.files,
    "file again": upkeep.files,
}


class LogModel:
    """A scenario under some of the rules."""

    def __init__(self, scenario: Scenario, rules: frozenset[str]) -> None:
        self._setting = Setting(scenario, rules)

    def initial(self) -> World:
        return self._setting.initial()

    def broken(self, before: World, after: World) -> str:
        return self._setting.broken(before, after)

    def stuck(self, world: World) -> str:
        return self._setting.stuck(world)

    def successors(self, world: World) -> Iterator[tuple[bool, Label, Any]]:
        m, procs = self._setting, world.procs
        for i, proc in enumerate(procs):
            pc, actor = proc.pc, m.actors[i]
            if pc in ("done", "dead"):
                continue
            if actor.role == "pruner":
                steps = upkeep.prune(m, world, i, proc)
            elif actor.role == "takeover":
                steps = upkeep.takeover(m, world, i, proc)
            else:
                steps = _STEPS[pc](m, world, i, proc)
            for label, after, q in steps:
                if q.pc in ("done", "dead"):
                    q = Proc(pc=q.pc)
                after = World((*after.procs[:i], q, *after.procs[i + 1 :]), *after[1:])
                yield True, (actor.name + ":", *label), m.without_vain(after)
        for label, after in m.arrivals(world):
            yield False, label, m.without_vain(after)
        yield from self._accidents(world)

    def _accidents(self, world: World) -> Iterator[tuple[bool, Label, World]]:
        m = self._setting
        *others, crashes, ticks = world.faults
        if ticks:
            yield False, ("G/2 PASSES",), world._replace(now=world.now + 1, faults=(*others, crashes, ticks - 1))
        if not crashes:
            return
        for i, proc in enumerate(world.procs):
            actor = m.actors[i]
            if not actor.crashes or proc.pc in ("open", "done", "dead"):
                continue
            after = world._replace(faults=(*others, crashes - 1, ticks))
            if not actor.resumes:
                dead = (*world.procs[:i], Proc(pc="dead"), *world.procs[i + 1 :])
                yield False, (actor.name + ": CRASHES",), after._replace(procs=dead)
                continue
            # The session survives; with the rule it names the attempt that was in flight.
            resumed = Proc(turn=proc.turn, base=proc.base, made=proc.made)
            if "resume" in m.rules and proc.attempt and proc.base:
                index = proc.base[0][0]
                token = clients.token_of(m, i, proc, actor.groups[proc.turn][index].id)
                after = after._replace(tokens=tuple(sorted((*after.tokens, token))))
            procs = (*world.procs[:i], resumed, *world.procs[i + 1 :])
            yield False, (actor.name + ": CRASHES, and is resumed",), after._replace(procs=procs)
