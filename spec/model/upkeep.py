"""The other clients: checkpointers, converters, collectors, pruners, and the steps of a reader after it has opened.

Functions yield as those of `spec.model.clients` do.
"""

from __future__ import annotations

from collections.abc import Iterator

from spec.model.clients import CLOSED, Step, after_opening, fresh
from spec.model.histories import COMMIT, OBJECT, Event
from spec.model.rules import may_replace_checkpoint
from spec.model.world import EPOCH_B, OBJECT_LAYOUT, Proc, Repo, Setting, World

__all__ = [
    "back",
    "checkpoint",
    "collect",
    "convert",
    "files",
    "prune",
    "put_checkpoint",
    "refresh",
    "sweep",
    "takeover",
]


# ---------------------------------------------------------------------- checkpoints and conversion


def checkpoint(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Rule 7: GET ``repo``, and compare. A collector does the same before it deletes (pc ``ahead``)."""
    repo, ahead = s.repo, p.pc == "ahead"
    allowed = may_replace_checkpoint(epoch=p.epoch, n=p.head, found_epoch=repo.epoch, found_n=repo.n)
    if "epoch" not in m.rules:
        allowed = repo.epoch != OBJECT_LAYOUT and repo.n < p.head
    if "forward" not in m.rules:
        allowed = repo.epoch == p.epoch and repo.n != p.head
    if not allowed:
        yield ("has nothing to bring forward",), s, p._replace(pc="collect" if ahead else CLOSED)
        return
    yield ("GET repo for a checkpoint",), s, p._replace(pc="put ahead" if ahead else "put", x=(repo, p.x, False))


def put_checkpoint(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """PUT what is embedded, then ``repo`` with If-Match."""
    old, cutoff, put = p.x
    ahead = p.pc == "put ahead"
    if not put and "materialize" in m.rules and (missing := unput(m, s, p, old)):
        yield ("PUTs embedded files",), m.put_objects(s, missing), p._replace(x=(old, cutoff, True))
        return
    new = Repo(p.epoch, p.head, p.h)
    message = ("repo", old, new, False) if "match" in m.rules else ("set", new)
    for label, after, answer in m.put(s, message, ("PUT repo, checkpoint at slot", p.head)):
        if answer == 200 and ahead:
            q = p._replace(pc="collect", x=cutoff)
        elif answer == 200:
            q = p._replace(pc="refresh" if p.rounds + 1 < m.actors[i].rounds else CLOSED, rounds=p.rounds + 1, x=None)
        elif answer == 403:
            q = p._replace(pc=CLOSED)
        else:
            q = p._replace(pc="ahead" if ahead else "checkpoint", x=cutoff)
        yield label, after, q


def unput(m: Setting, s: World, p: Proc, repo: Repo) -> int:
    """Bits of the commits after a checkpoint whose metadata is not known to be in objects."""
    if m.scenario.files != "embedded":
        return 0
    new = m.histories.ids(p.h) & ~m.histories.ids(repo.h) & m.commits
    return new & ~m.standing(s, 1)


def convert(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Rule 8, second step: GET ``repo``; then replace it without a marker, If-Match."""
    actor = m.actors[i]
    after_it = "back" if actor.back and actor.role == "converter" else "open"
    if actor.role == "converter" and not actor.back:
        after_it = CLOSED
    if not isinstance(p.x, Repo) or ("seal" in m.rules and not p.stop):
        if s.repo.epoch != p.epoch:
            yield ("finds it converted",), s, p._replace(pc=after_it, x=None)
        else:
            yield ("GET repo for the conversion",), s, p._replace(x=s.repo, stop=True)
        return
    if "materialize-last" in m.rules and (missing := unput(m, s, p, p.x)):
        yield ("PUTs embedded files",), m.put_objects(s, missing), p
        return
    new = Repo(OBJECT_LAYOUT, 0, m.histories.apply(p.h, Event(OBJECT)))
    for label, after, answer in m.put(s, ("repo", p.x, new, False), ("PUT repo, unmarked",)):
        if answer == 200:
            q = p._replace(pc=after_it, x=None, stop=False)
        elif answer == 403:
            q = p._replace(pc=CLOSED)
        else:
            q = p._replace(pc="convert" if "seal" in m.rules else "open", x=None, stop=False)
        yield label, after, q


def back(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Repo object to log: one PUT of ``repo`` under a fresh epoch."""
    new = Repo(EPOCH_B, 0, s.repo.h)
    if s.repo.epoch != OBJECT_LAYOUT:
        yield ("it is a log already",), s, p._replace(pc=CLOSED)
        return
    for label, after, answer in m.put(s, ("repo", s.repo, new, False), ("PUT repo, a fresh epoch",)):
        yield label, after, p._replace(pc="back" if answer is None else CLOSED)


# ---------------------------------------------------------------------- collection and pruning


def collect(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Rule 10: list what the graph does not have and is older than the cutoff."""
    graph, victims = m.histories.graph(p.h), 0
    objects, number = s.objects, 0
    while objects >> number * 3:
        stamp = objects >> number * 3 & 7
        if stamp and stamp - 1 < p.x and not graph >> number // 2 & 1:
            victims |= 7 << number * 3
        number += 1
    if victims:
        yield ("lists garbage",), s, p._replace(pc="sweep", x=victims)
    else:
        yield ("finds no garbage",), s, p._replace(pc=CLOSED)


def sweep(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Delete it."""
    yield ("DELETEs garbage",), s._replace(objects=s.objects & ~p.x), p._replace(pc=CLOSED)


def prune(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Rule 9: announce a floor; delete what was announced long ago, oldest first."""
    limits: dict[int, int] = {}
    for slot, entry, _ in s.slots:
        epoch, n = slot >> 8, slot & 255
        if epoch == s.repo.epoch:
            limits[epoch] = s.repo.n if "floor" in m.rules else m.tail(s, *s.repo)[0]
        elif m.histories.entries[entry].events[0].kind == "seal":
            limits[epoch] = n
    announced = {(epoch, n) for epoch, n, _ in s.floors}
    for epoch, n in limits.items():
        if n and (epoch, n) not in announced and len(s.floors) < m.actors[i].rounds and "announce" in m.rules:
            floors = tuple(sorted((*s.floors, (epoch, n, s.now))))
            yield ("announces the floor", n, "of epoch", epoch), s._replace(floors=floors), p
    wait = 2 if "wait" in m.rules else 0
    for slot, _, tick in s.slots:
        epoch, n = slot >> 8, slot & 255
        if "announce" in m.rules:
            old = any(name == epoch and n <= floor and s.now - at >= wait for name, floor, at in s.floors)
        else:
            old = n <= limits.get(epoch, 0) and s.now - tick >= wait
        if old:
            yield (
                ("DELETEs slot", n, "of epoch", epoch),
                s._replace(slots=tuple(one for one in s.slots if one[0] != slot)),
                p,
            )
            return


def takeover(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Another library sets the status of the checkpoint to online, and commits."""
    histories, (change,) = m.histories, m.actors[i].groups[0]
    h = histories.apply(s.repo.h, Event(OBJECT))
    h = histories.apply(h, Event(COMMIT, change.id, change.branch, histories.tip(h, change.branch)))
    s = s._replace(repo=Repo(OBJECT_LAYOUT, 0, h), acked=s.acked | 1 << change.id)
    yield ("lifts read-only, and commits", change.id), s, p._replace(pc=CLOSED)


# ---------------------------------------------------------------------- readers


def refresh(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """GET the slots after the head; or open again where the proof is old or the log has ended."""
    if not p.epoch or m.histories.sealed(p.h) or not fresh(m, s, p.proof, "reader-proof"):
        yield ("opens again",), s, p._replace(pc="open")
        return
    n, h, _ = m.tail(s, p.epoch, p.head, p.h)
    p = p._replace(head=n, h=h, proof=s.now)
    yield after_opening(m, s, i, p, s.acked, f"GETs the slots up to {n}")


def files(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Rule 15: read the metadata of the history that it returned: objects, else the tail, else objects once more."""
    following = p._replace(pc="refresh" if p.rounds < m.actors[i].rounds else CLOSED, x=None)
    wanted = p.x if p.pc != "file" else m.histories.reached(p.h) & m.commits
    missing = wanted & ~(m.embedded(s) if p.pc == "file in tail" else m.standing(s, 1))
    if not missing:
        yield ("has all files",), s, following
    elif p.pc == "file":
        yield ("a file has no object",), s, p._replace(pc="file in tail", x=missing)
    elif p.pc == "file in tail" and "look-again" in m.rules:
        yield ("it is not in the tail",), s, p._replace(pc="file again", x=missing)
    elif missing & m.histories.graph(m.truth(s)):
        yield ("it is nowhere",), s._replace(bad="FILES: a reader does not find a file of history"), following
    else:
        yield ("it was collected",), s, following
