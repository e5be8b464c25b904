"""The steps of a client of the log: opening, rule 2, and `settle`. One step is one request and the decision from its
answer.

Each function yields (label, world, proc) for every way in which the step may go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

from spec.model.histories import COMMIT, DELETE, GC, SEAL, VOID, Entry, Event
from spec.model.rules import Verdict, judge
from spec.model.world import OBJECT_LAYOUT, Change, Message, Proc, Repo, Setting, Token, World, slot_of

__all__ = [
    "CLOSED",
    "Step",
    "after_opening",
    "ask",
    "fresh",
    "get_repo",
    "idle",
    "listing",
    "look",
    "resend",
    "settle",
    "taken",
    "token_of",
]

Step: TypeAlias = tuple[tuple[object, ...], World, Proc]

CLOSED: Final = "done"


def fresh(m: Setting, s: World, proof: int, rule: str = "proof") -> bool:
    """Rule 5."""
    return rule not in m.rules or s.now - proof <= m.trust


# ---------------------------------------------------------------------- opening


def get_repo(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Rule 6, first half: GET ``repo``. That the listing is another step matters only where slots or layouts end."""
    p = p._replace(pc="list", x=(s.repo, s.now, s.acked))
    if m.moves:
        yield ("GET repo",), s, p
    else:
        yield from listing(m, s, i, p)


def listing(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Rule 6, second half: LIST, GET the tail, fold what is contiguous."""
    repo, asked, _ = p.x
    role = m.actors[i].role
    if not fresh(m, s, asked, "reader-proof" if role == "reader" else "proof"):
        yield ("opening took longer than G/2: again",), s, p._replace(pc="open", x=None)
    elif repo.epoch == OBJECT_LAYOUT:
        yield opened(m, s, i, p, Repo(OBJECT_LAYOUT, 0, repo.h))
    else:
        if p.attempt:
            yield from unanswered(m, s, i, p, "the opening fails on the way")
        n, h, gap = m.tail(s, *repo)
        if gap and "contiguous" in m.rules:
            yield ("gap in the tail: again",), s, p._replace(pc="open", x=None)
            return
        if gap:
            for slot, entry, _ in s.slots:
                if slot_of(repo.epoch, n) < slot < slot_of(repo.epoch + 1, 0):
                    n, h = slot & 255, m.histories.fold(h, entry)
        yield opened(m, s, i, p, Repo(repo.epoch, n, h))


def opened(m: Setting, s: World, i: int, p: Proc, head: Repo) -> Step:
    """A client has folded the log up to ``head``; what it had sent before is decided (rule 2, opening again)."""
    before, (repo, _, acked) = p, p.x
    p = p._replace(epoch=head.epoch, head=head.n, h=head.h, proof=s.now, x=None, looked=True)
    if before.attempt or before.told:
        moved = head.epoch != before.epoch or (head.n != before.head if head.epoch else head.h != before.h)
        if moved:
            s, p = reopened(m, s, i, before, p, repo)
    note = f"opens at {'repo object' if not head.epoch else f'slot {head.n} of epoch {head.epoch}'}"
    return after_opening(m, s, i, p, acked, note)


def reopened(m: Setting, s: World, i: int, before: Proc, p: Proc, repo: Repo) -> tuple[World, Proc]:
    """The head has moved while the client had attempts: each has landed, is lost, or is not known."""
    slot = slot_of(before.epoch, before.head + 1)
    in_tail = repo.epoch == before.epoch and repo.epoch and before.head + 1 > repo.n
    ids = m.histories.ids(p.h)
    landed = 0
    for entry in (*before.told, before.attempt):
        mine = m.histories.entry_ids[entry]
        known = mine if not before.epoch else mine & m.commits
        same = in_tail and m.histories.entries[m.found(s, slot)].nonce == m.histories.entries[entry].nonce
        landed |= mine if same or ids & known else 0
    sure = m.commits if before.epoch and not in_tail else -1
    s, p = resolved(m, s, i, p, landed, own=bool(landed & m.histories.entry_ids[before.attempt]), sure=sure)
    if before.attempt and not in_tail and before.epoch:
        # A change without a snapshot cannot be looked for: its callers are told that the outcome is unknown.
        for index, _, _ in p.base:
            change = m.actors[i].groups[p.turn][index]
            if change.kind == DELETE and m.histories.entry_ids[before.attempt] >> change.id & 1:
                s, p = told_one(m, s, i, p, index, before)
    if before.base and not p.base:
        p = p._replace(turn=p.turn + 1)
    return s, p._replace(attempt=0, unsure=False, stop=False, told=(), made=0)


def after_opening(m: Setting, s: World, i: int, p: Proc, acked: int, note: str) -> Step:
    """The next step of a client, by its role."""
    actor = m.actors[i]
    if actor.role == "reader":
        return read(m, s, i, p, acked, note)
    if p.attempt:
        return (note,), s, p._replace(pc="again")
    if actor.role in ("checkpointer", "converter", "collector") and not p.epoch:
        return (note,), s, p._replace(pc=CLOSED)
    if actor.role == "checkpointer":
        return (note,), s, p._replace(pc="convert" if m.histories.sealed(p.h) else "checkpoint")
    if actor.role == "converter" and "seal" not in m.rules:
        return (note,), s, p._replace(pc="convert", x=s.repo)
    if actor.role == "collector" and "fence" not in m.rules:
        return (note,), s, p._replace(pc="collect", x=s.now)
    s, p = begin(m, s, i, p)
    return (note,), s, p._replace(pc="idle")


def read(m: Setting, s: World, i: int, p: Proc, acked: int, note: str) -> Step:
    """A reader returns a state to its caller."""
    actor, histories = m.actors[i], m.histories
    bad = s.bad
    if not histories.is_prefix(p.seen, p.h):
        bad = "READER: it went backwards or sideways"
    elif not histories.is_prefix(p.h, m.truth(s)):
        bad = "READER: it saw what is not history"
    elif m.scenario.fresh_reads and acked & ~histories.ids(p.h):
        bad = "READER: it missed a change that was acknowledged before it asked"
    rounds = p.rounds + 1
    pc = "refresh" if rounds < actor.rounds else CLOSED
    if m.scenario.files == "embedded" and not bad:
        pc = "file"
    return (note, "and returns it"), s._replace(bad=bad), p._replace(seen=p.h, rounds=rounds, pc=pc)


# ---------------------------------------------------------------------- what callers ask for


def begin(m: Setting, s: World, i: int, p: Proc) -> tuple[World, Proc]:
    """Sessions of the next group of changes begin at the state that the client knows, and put their files."""
    actor = m.actors[i]
    if p.base or p.turn >= len(actor.groups):
        return s, p
    group = actor.groups[p.turn]
    if any(change.upon and not s.acked >> change.upon & 1 for change in group):
        return s, p
    base = []
    for index, change in enumerate(group):
        base.append((index, change.upon or m.histories.tip(p.h, change.branch), s.now if m.collects else 0))
        if change.kind == COMMIT and m.scenario.files:
            s = m.put_objects(s, 1 << change.id, part=0)
            if m.scenario.files == "objects":
                s = m.put_objects(s, 1 << change.id)
    return s, p._replace(base=tuple(base), looked=False)


def events_of(m: Setting, i: int, p: Proc) -> tuple[list[Event], list[tuple[int, int, int]], int]:
    """The events of the present group that apply, those who stay, and the bits of those that are refused (rule 4)."""
    histories, group = m.histories, m.actors[i].groups[p.turn]
    h, events, staying, refused = p.h, [], [], 0
    for index, parent, since in p.base:
        change: Change = group[index]
        on = h if "chain" in m.rules else p.h
        if change.kind == COMMIT:
            if change.rebase:
                parent = histories.tip(on, change.branch)
            time = 0
            if m.scenario.times:
                time = max(change.clock, histories.last_time(on) + 1) if "time" in m.rules else change.clock
            event = Event(COMMIT, change.id, change.branch, parent, since, time)
        else:
            event = Event(DELETE, change.id, change.branch)
        if histories.apply(on, event) < 0:
            refused |= 1 << change.id
            continue
        after = histories.apply(h, event)
        h = after if after >= 0 else h
        events.append(event)
        staying.append((index, parent, since))
    return events, staying, refused


def idle(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Rule 2, steps 1 and 2: make an attempt and send it. Or settle, or end."""
    actor, histories = m.actors[i], m.histories
    if "after" not in m.rules and s.now - p.proof > m.trust:
        yield ("the proof is old: opens again",), s, p._replace(pc="open")
        return
    owned = [token for token in s.tokens if token.owner == i or actor.role == "settler"]
    if owned and (actor.settles or actor.resumes):
        yield ("settles change", owned[0].id), s, p._replace(pc="settle", x=owned[0])
        if actor.resumes:
            return
    over = p.turn >= len(actor.groups)
    if actor.role in ("writer", "settler"):
        if over:
            if not (owned and actor.settles) and actor.role == "writer":
                yield ("closes",), s, p._replace(pc=CLOSED)
            return
        if not p.base:
            s2, q = begin(m, s, i, p)
            if q.base:
                yield ("a session begins",), s2, q
            return
        if histories.sealed(p.h):
            yield meets_seal(m, s, i, p)
            return
        if "told" not in m.rules and p.told:
            q = p._replace(attempt=p.told[-1], told=p.told[:-1], unsure=True)
            yield from send(m, s, i, q, "the told attempt is sent again:")
            return
        events, staying, refused = events_of(m, i, p)
        if refused and not p.looked and "looked" in m.rules:
            yield ("something does not apply: looks first",), s, p._replace(pc="look")
            return
        if refused:
            bad = s.bad
            for index, parent, _ in p.base:
                change = actor.groups[p.turn][index]
                if change.upon and refused >> change.id & 1 and histories.tip(m.truth(s), change.branch) == parent:
                    bad = "REFUSED: a change was refused although the reason never held since it was asked for"
            s = s._replace(failed=s.failed | refused, bad=bad)
        p = p._replace(base=tuple(staying))
        if not events:
            s, p = next_turn(m, s, i, p)
            yield ("ConflictError",), s, p
            return
        p = p._replace(made=p.made + 1)
        embedded = m.scenario.files == "embedded" and p.epoch != OBJECT_LAYOUT
        if m.scenario.files and not embedded:
            for event in events:
                s = m.put_objects(s, 1 << event.id) if event.kind == COMMIT else s
        entry = Entry(nonce_of(m, i, p), tuple(events), embedded)
    elif histories.sealed(p.h):
        yield meets_seal(m, s, i, p)
        return
    elif actor.role == "converter":
        entry = Entry(nonce_of(m, i, p), (Event(SEAL),))
    else:
        entry = Entry(nonce_of(m, i, p), (Event(GC, since=s.now),))
    if "conditions" in m.rules and m.scenario.ignores_conditions:
        yield ("the store ignores conditions: refuses to write",), s, p._replace(pc=CLOSED)
        return
    q = p._replace(attempt=histories.entry(entry), unsure=False, stop=False)
    if "after" not in m.rules:
        yield ("is about to send",), s, q._replace(pc="again")
        return
    yield from send(m, s, i, q, "sends")


def nonce_of(m: Setting, i: int, p: Proc) -> int:
    if "nonce" not in m.rules and m.actors[i].process:
        return m.actors[i].process
    return ((p.epoch << 4 | p.head) << 4 | i) << 4 | p.made


def meets_seal(m: Setting, s: World, i: int, p: Proc) -> Step:
    """Rule 8: the log has ended; a client that folds the seal finishes the conversion."""
    actor = m.actors[i]
    if "help" in m.rules or actor.role == "converter":
        return ("finds the seal",), s, p._replace(pc="convert")
    for index, _, _ in p.base:
        s = s._replace(failed=s.failed | 1 << actor.groups[p.turn][index].id | 1)
    return ("finds the seal, and stops",), s, p._replace(pc=CLOSED, base=())


def is_void(m: Setting, p: Proc) -> bool:
    """Whether the attempt in flight is that of a `settle`."""
    return bool(p.attempt) and m.histories.entries[p.attempt].events[0].kind == VOID


def next_turn(m: Setting, s: World, i: int, p: Proc) -> tuple[World, Proc]:
    """The present group is over."""
    p = p._replace(pc="idle", turn=p.turn + 1, base=(), attempt=0, unsure=False, stop=False)
    return begin(m, s, i, p)


# ---------------------------------------------------------------------- rule 2


def message_of(m: Setting, s: World, p: Proc) -> Message:
    """The request for the attempt in flight."""
    ids = m.histories.entry_ids[p.attempt]
    told = bool(ids & s.told)
    if p.epoch == OBJECT_LAYOUT:
        old = Repo(OBJECT_LAYOUT, 0, p.h)
        return "repo", old, Repo(OBJECT_LAYOUT, 0, m.histories.fold(p.h, p.attempt)), told
    n = p.head + 1
    if "order" not in m.rules:
        n += len(p.told)
    return "slot", slot_of(p.epoch, n), p.attempt, told


def send(m: Setting, s: World, i: int, p: Proc, verb: str) -> Iterator[Step]:
    """PUT the attempt, and decide from the answer."""
    message = message_of(m, s, p)
    entry = m.histories.entries[p.attempt]
    what = ", ".join(f"{event.kind}{f' {event.id}' if event.id else ''}" for event in entry.events)
    place = f"slot {message[1] & 255}" if message[0] == "slot" else "repo"
    for label, after, answer in m.put(s, message, (verb, what, "to", place)):
        if answer == 200:
            yield from answered(m, after, i, p, label)
        elif answer == 403 and ("refusal" not in m.rules or not p.unsure):
            yield refused_for_certain(m, after, i, p, label)
        elif answer == 403:
            yield label, after, p._replace(pc="ask", stop=True)
        elif answer == 412 and "look" not in m.rules:
            yield from judged(m, after, i, p, label, believe=False)
        elif answer == 412 and not m.prunes:
            yield from judged(m, after, i, p, label)
        else:
            yield label, after, p._replace(pc="ask", unsure=p.unsure or answer is None)


def resend(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """The same bytes to the same slot; or the caller is told something instead."""
    yield from send(m, s, i, p, "sends again")
    if p.unsure:
        yield from tell(m, s, i, p)


def ask(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Rule 2, step 3: GET the slot. Or a caller is told something first."""
    yield from judged(m, s, i, p, ("GETs the slot",))
    yield from unanswered(m, s, i, p, "GETs the slot → NO ANSWER")
    yield from tell(m, s, i, p)


def unanswered(m: Setting, s: World, i: int, p: Proc, what: str) -> Iterator[Step]:
    """Nothing was learned about the attempt in flight: what was read on the way counts for nothing."""
    lost, *rest = s.faults
    if not lost:
        return
    s = s._replace(faults=(lost - 1, *rest))
    if p.stop:
        s, q = given_up(m, s, i, p)
        yield (what, "· was refused: outcome unknown"), s, q
    else:
        yield (what,), s, p._replace(pc="again")


def answered(m: Setting, s: World, i: int, p: Proc, label: tuple[object, ...]) -> Iterator[Step]:
    """A 200: it counts if it is fresh."""
    if p.epoch != OBJECT_LAYOUT and not believed(m, s, p):
        yield (*label, "· too late to be believed"), s, p._replace(pc="open", unsure=True)
    else:
        yield landed(m, s, i, p, p.attempt, (*label, "· landed"), proved=True)


def believed(m: Setting, s: World, p: Proc) -> bool:
    return "after" not in m.rules or fresh(m, s, p.proof)


def judged(m: Setting, s: World, i: int, p: Proc, label: tuple[object, ...], *, believe: bool = True) -> Iterator[Step]:
    """Decide from the entry in the slot."""
    if p.epoch == OBJECT_LAYOUT:
        yield from judged_object(m, s, i, p, label)
        return
    found = m.found(s, slot_of(p.epoch, p.head + 1 + (len(p.told) if "order" not in m.rules else 0)))
    nonce = m.histories.entries[found].nonce if found else None
    verdict = judge(m.histories.entries[p.attempt].nonce, nonce, fresh=believed(m, s, p))
    if verdict is Verdict.LANDED and not believe:
        verdict = Verdict.LOST
    if verdict is Verdict.REOPEN:
        yield (*label, "· too late to be believed"), s, p._replace(pc="open", x=None)
    elif verdict is Verdict.LANDED:
        yield landed(m, s, i, p, p.attempt, (*label, "· landed"))
    elif verdict is Verdict.LOST:
        p = p if believe else p._replace(attempt=0)
        yield landed(m, s, i, p, found, (*label, "· taken: folds it"))
    elif p.stop:
        s, q = given_up(m, s, i, p._replace(proof=s.now))
        yield (*label, "· empty, and was refused: outcome unknown"), s, q
    elif "settle" not in m.rules and p.base:
        ids = m.histories.entry_ids[p.attempt]
        s, q = next_turn(m, s._replace(failed=s.failed | ids), i, p)
        yield (*label, "· empty: reports failure"), s, q
    else:
        yield (*label, "· empty"), s, p._replace(pc="again", proof=s.now)


def judged_object(m: Setting, s: World, i: int, p: Proc, label: tuple[object, ...]) -> Iterator[Step]:
    """The same in the repo-object layout: ``repo`` is read."""
    if s.repo == Repo(OBJECT_LAYOUT, 0, p.h):
        if p.stop:
            s, q = given_up(m, s, i, p)
            yield (*label, "· unchanged, and was refused: outcome unknown"), s, q
        else:
            yield (*label, "· unchanged"), s, p._replace(pc="again")
        return
    landed = 0
    ids = m.histories.ids(s.repo.h)
    for entry in (*p.told, p.attempt):
        mine = m.histories.entry_ids[entry]
        landed |= mine if ids & mine else 0
    s, q = resolved(m, s, i, p, landed, own=bool(landed & m.histories.entry_ids[p.attempt]))
    q = q._replace(pc="idle", h=s.repo.h, attempt=0, unsure=False, stop=False, told=(), made=0, x=None)
    if p.base and not q.base:
        s, q = next_turn(m, s, i, q)
    if s.repo.epoch:
        q = q._replace(pc="open")
    yield (*label, "· changed: adopts it"), s, q


def landed(
    m: Setting, s: World, i: int, p: Proc, entry: int, label: tuple[object, ...], *, proved: bool = False
) -> Step:
    """The slot after the head is seen taken by ``entry``, while an attempt for it was in flight."""
    actor, histories = m.actors[i], m.histories
    ours = bool(p.attempt) and histories.entries[p.attempt].nonce == histories.entries[entry].nonce
    void = is_void(m, p)
    s, p = taken(m, s, i, p, entry)
    if proved and p.epoch != OBJECT_LAYOUT:
        p = p._replace(proof=s.now, looked=True)
    if void and isinstance(p.x, tuple):
        p = p._replace(pc="settle")
    elif actor.role == "converter" and ours:
        p = p._replace(pc="convert")
    elif actor.role == "collector" and ours:
        p = p._replace(pc="ahead" if "ahead" in m.rules else "collect", x=histories.cutoff(p.h))
    return label, s, p


def taken(m: Setting, s: World, i: int, p: Proc, entry: int) -> tuple[World, Proc]:
    """Fold the slot after the head; every attempt for it has landed or is lost."""
    histories, waited = m.histories, bool(p.base)
    nonce = histories.entries[entry].nonce
    ids = 0
    for one in (*p.told, p.attempt):
        if one and histories.entries[one].nonce == nonce:
            ids |= histories.entry_ids[one]
    own = bool(p.attempt) and histories.entries[p.attempt].nonce == nonce
    s, p = resolved(m, s, i, p, ids, own=own)
    p = p._replace(pc="idle", h=histories.fold(p.h, entry), attempt=0, unsure=False, stop=False, told=(), made=0)
    if p.epoch != OBJECT_LAYOUT:
        p = p._replace(head=p.head + 1)
    if ids and m.scenario.files == "embedded":
        late = set(s.late)
        late.update(("object", id) for id in range(1, ids.bit_length()) if ids & m.commits & 1 << id)
        s = s._replace(late=tuple(sorted(late, key=repr)))
    if waited and not p.base:
        s, p = next_turn(m, s, i, p)
    return s, p


def resolved(m: Setting, s: World, i: int, p: Proc, landed: int, *, own: bool, sure: int = -1) -> tuple[World, Proc]:
    """All attempts of a client for a place are certain: tell the callers that left, and those that wait if they landed.

    Parameters
    ----------
    landed
        Bits of the changes that landed.
    own
        Whether it was the attempt in flight that landed.
    sure
        Bits of the changes of which not having landed is certain.
    """
    if not p.told and not p.attempt:
        return s, p
    group = m.actors[i].groups[p.turn] if p.base else ()
    waiting = 0
    for index, _, _ in p.base:
        waiting |= 1 << group[index].id
    done = landed & waiting if own or "shared" in m.rules else 0
    keep = tuple(one for one in p.base if not done >> group[one[0]].id & 1)
    left = 0
    for entry in p.told:
        left |= m.histories.entry_ids[entry]
    left &= s.told & ~waiting & ~s.acked & ~s.failed
    acked, failed = s.acked | done | left & landed, s.failed | left & ~landed & sure
    over = acked | failed
    tokens = tuple(token for token in s.tokens if not over >> token[0] & 1) if over & s.told else s.tokens
    return s._replace(acked=acked, failed=failed, tokens=tokens), p._replace(base=keep)


def refused_for_certain(m: Setting, s: World, i: int, p: Proc, label: tuple[object, ...]) -> Step:
    """Every request of the attempt was refused: nothing is pending, the slot stays next."""
    if is_void(m, p):
        return (*label, "· refused for certain"), s, p._replace(pc="idle", attempt=0, unsure=False, x=None)
    if not p.base:
        return (*label, "· refused for certain"), s, p._replace(pc=CLOSED)
    s = s._replace(failed=s.failed | m.histories.entry_ids[p.attempt])
    s, p = next_turn(m, s, i, p)
    return (*label, "· refused for certain"), s, p


def tell(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """Rule 2, step 4: callers are told something while the attempt is in flight."""
    lost, doubled, refused, told, *rest = s.faults
    if not told or not p.unsure:
        return
    s = s._replace(faults=(lost, doubled, refused, told - 1, *rest))
    void = is_void(m, p)
    if not void and not p.base:
        return
    after, q = given_up(m, s, i, p)
    yield ("cannot settle yet" if void else "outcome unknown",), after, q
    if len(p.base) > 1 and not void:
        after, q = told_one(m, s, i, p, p.base[0][0], p)
        keep = (*p.told, p.attempt)
        yield (
            ("the first caller is cancelled",),
            after,
            q._replace(pc="idle", attempt=0, unsure=False, stop=False, told=keep),
        )


def given_up(m: Setting, s: World, i: int, p: Proc) -> tuple[World, Proc]:
    """Every caller of the attempt is told that its outcome is unknown."""
    told = (*p.told, p.attempt)
    if is_void(m, p):
        return s, p._replace(pc="idle", attempt=0, unsure=False, stop=False, told=told, x=None)
    if not p.base:
        return s, p._replace(pc=CLOSED)
    for index, _, _ in p.base:
        s, p = told_one(m, s, i, p, index, p)
    s, p = next_turn(m, s, i, p)
    return s, p._replace(told=told)


def with_token(m: Setting, s: World, token: Token) -> tuple[Token, ...]:
    return tuple(sorted((*s.tokens, token))) if m.settles else s.tokens


def token_of(m: Setting, i: int, p: Proc, id: int) -> Token:
    """The token that names a client's attempts for one place, for the caller of one of its changes."""
    nonces = tuple(
        m.histories.entries[entry].nonce for entry in (*p.told, p.attempt) if m.histories.entry_ids[entry] >> id & 1
    )
    place = slot_of(p.epoch, p.head + 1) if p.epoch else -1 - p.h
    return Token(id, i, place, nonces, p.proof)


def told_one(m: Setting, s: World, i: int, p: Proc, index: int, at: Proc) -> tuple[World, Proc]:
    """One caller is told something, and gets its token."""
    change = m.actors[i].groups[p.turn][index]
    token = token_of(m, i, at, change.id)
    s = s._replace(told=s.told | 1 << change.id, tokens=with_token(m, s, token))
    return s, p._replace(base=tuple(one for one in p.base if one[0] != index))


# ---------------------------------------------------------------------- settle


def settle(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """`settle(token)`: refresh, then decide, or fill the slot."""
    token = p.x
    id, place = token.id, token.place
    if token not in s.tokens:
        yield ("it is settled already",), s, p._replace(pc="idle", x=None)
        return
    if p.epoch == OBJECT_LAYOUT:
        if s.repo.epoch:
            yield ("repo has changed: opens again",), s, p._replace(pc="open", x=None)
            return
        h = s.repo.h
        s, p = adopt(m, s, i, p, h)
    elif not fresh(m, s, p.proof) or m.histories.sealed(p.h):
        yield ("opens again",), s, p._replace(pc="convert" if m.histories.sealed(p.h) else "open", x=None)
        return
    else:
        s, p = refreshed(m, s, i, p)
    if token not in s.tokens:
        yield ("has seen the slot taken",), s, p._replace(pc="idle", x=None)
        return
    ids, bit = m.histories.ids(p.h), 1 << id
    by_id = bool(m.commits & bit) or place < 0
    if by_id and ids & bit:
        yield concluded(m, s, i, p, True, "its snapshot is in history")
    elif place < 0:
        if p.epoch == OBJECT_LAYOUT and p.h == -1 - place:
            if "void" not in m.rules:
                yield concluded(m, s, i, p, False, "repo is unchanged")
            else:
                yield from fill(m, s, i, p)
        else:
            yield concluded(m, s, i, p, False, "repo has changed without it")
    elif place >> 8 != p.epoch or place & 255 <= p.head:
        if by_id:
            yield concluded(m, s, i, p, False, "its slot is taken, and its snapshot is not in history")
        else:
            yield from settle_by_slot(m, s, i, p)
    elif "void" not in m.rules:
        yield concluded(m, s, i, p, False, "its slot is empty")
    elif m.histories.sealed(p.h):
        yield ("finds the seal",), s, p._replace(pc="convert", x=None)
    else:
        yield from fill(m, s, i, p)


def settle_by_slot(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """An event without a snapshot is looked for in its slot, which counts past the marker or while T is fresh."""
    place, nonces, proof = p.x.place, p.x.nonces, p.x.proof
    found = m.found(s, place)
    past = place >> 8 == s.repo.epoch and place & 255 > s.repo.n
    counts = past or "token-proof" not in m.rules or s.now - proof <= m.trust
    if found and counts:
        landed = m.histories.entries[found].nonce in nonces
        yield concluded(m, s, i, p, landed, "by the nonce in its slot")
    else:
        tokens = tuple(token for token in s.tokens if token != p.x)
        yield ("it can not be known any more",), s._replace(tokens=tokens), p._replace(pc="idle", x=None)


def concluded(m: Setting, s: World, i: int, p: Proc, landed: bool, why: str) -> Step:
    """The caller of settle is told the outcome of its change."""
    bit = 1 << p.x.id
    s, p = s._replace(tokens=tuple(token for token in s.tokens if token != p.x)), p._replace(pc="idle", x=None)
    label = "settled:", "committed," if landed else "lost,", why
    if landed:
        s = s._replace(acked=s.acked | bit)
    if s.told & bit:
        return label, s if landed else s._replace(failed=s.failed | bit), p
    # A session that was resumed: no caller was told anything, and it commits a lost change again.
    if landed:
        s, p = next_turn(m, s, i, p)
    return label, s, p


def fill(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """The slot is next, and empty: fill it."""
    p = p._replace(made=p.made + 1)
    entry = m.histories.entry(Entry(nonce_of(m, i, p), (Event(VOID),)))
    yield from send(m, s, i, p._replace(attempt=entry, unsure=False, stop=False), "fills:")


def refreshed(m: Setting, s: World, i: int, p: Proc) -> tuple[World, Proc]:
    """GET the slots after the head until one is empty."""
    while found := m.found(s, slot_of(p.epoch, p.head + 1)):
        if m.histories.sealed(p.h):
            break
        s, p = taken(m, s, i, p, found)
    return s, p._replace(proof=s.now, looked=True)


def adopt(m: Setting, s: World, i: int, p: Proc, h: int) -> tuple[World, Proc]:
    """Read ``repo`` in the repo-object layout."""
    if h == p.h:
        return s, p
    ids, landed = m.histories.ids(h), 0
    for entry in p.told:
        mine = m.histories.entry_ids[entry]
        landed |= mine if ids & mine else 0
    s, p = resolved(m, s, i, p, landed, own=False)
    return s, p._replace(h=h, told=(), made=0)


def look(m: Setting, s: World, i: int, p: Proc) -> Iterator[Step]:
    """One look before a refusal (rule 3)."""
    if p.epoch == OBJECT_LAYOUT:
        if s.repo.epoch:
            yield ("repo has changed: opens again",), s, p._replace(pc="open", x=None)
        else:
            s, p = adopt(m, s, i, p, s.repo.h)
            yield ("GETs repo",), s, p._replace(pc="idle", looked=True)
    elif not fresh(m, s, p.proof):
        yield ("the proof is old: opens again",), s, p._replace(pc="open", x=None)
    else:
        s, p = refreshed(m, s, i, p)
        yield ("GETs the slots after its head",), s, p._replace(pc="idle", x=None)
