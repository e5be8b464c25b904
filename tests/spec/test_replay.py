"""``spec/model/replay.py``: allowed traces pass, and each step that a rule forbids is named with the rule."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icechunk.runtime import json_codec
from spec.model.recorded import Slot, floor_of, slot_of_key
from spec.model.replay import G_US, Problem, main, replay
from tests.spec.pages import page

EPOCH = "ZYAYEPQZ041061050R3GG28A1C60"
DAY_US = 86_400_000_000


def key(n: int, epoch: str = EPOCH) -> str:
    letters = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    value, text = 2**40 - 1 - n, ""
    for _ in range(8):
        value, digit = divmod(value, 32)
        text = letters[digit] + text
    return f"log/{epoch}/{text}"


def floor_key(n: int) -> str:
    return f"log/{EPOCH}.floor/{n:08d}"


def commit(snapshot: str, parent: str, branch: str = "main") -> dict[str, Any]:
    return {"kind": "commit", "branch": branch, "snapshot": {"id": snapshot, "parent": parent}}


class Trace:
    """Records, written down step by step. Every step takes a second."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.now_us = 1_000_000_000
        self._names = 0
        self.version = ""
        creation = self.send("creator", "PUT", "repo", condition="absent", marker=[EPOCH, 0])
        self.executed(creation, version="v0")
        self.answer(creation, 200)

    def add(self, do: str, **fields: Any) -> None:
        self.now_us += 1_000_000
        self.records.append({"t": self.now_us, "do": do, **fields})

    def send(self, client: str, verb: str, key: str = "", **fields: Any) -> str:
        self._names += 1
        name = f"r{self._names}"
        self.add("send", request=name, client=client, verb=verb, key=key, **fields)
        return name

    def executed(self, request: str, *, done: bool = True, **fields: Any) -> None:
        self.version = fields.get("version", self.version)
        self.add("exec", request=request, done=done, **fields)

    def answer(self, request: str, status: int, **fields: Any) -> None:
        self.add("answer", request=request, status=status, **fields)

    def get(self, client: str, key: str, status: int = 200) -> None:
        request = self.send(client, "GET", key)
        self.add("exec", request=request)
        self.answer(request, status)

    def open(self, client: str, *slots: int) -> None:
        """Read ``repo``, these slots, and that the next one is empty."""
        self.get(client, "repo")
        for n in slots:
            self.get(client, key(n))
        listing = self.send(client, "LIST", prefix="log/")
        self.add("exec", request=listing)
        self.answer(listing, 200)

    def attempt(self, client: str, n: int, nonce: str, *events: Any, caller: str = "", **fields: Any) -> str:
        """An attempt leaves; a caller asks for it just before."""
        if caller:
            self.add("ask", client=client, caller=caller)
            self.token(client, n, nonce, caller)
        return self.sent(client, n, nonce, *events, **fields)

    def token(self, client: str, n: int, nonce: str, caller: str) -> None:
        self.add("token", client=client, caller=caller, epoch=EPOCH, n=n, nonce=nonce)

    def sent(self, client: str, n: int, nonce: str, *events: Any, **fields: Any) -> str:
        entry = {"v": 1, "n": n, "nonce": nonce, "time": 1, "since": None, "events": list(events), **fields}
        return self.send(client, "PUT", key(n), condition="absent", entry=entry)

    def lands(self, client: str, n: int, nonce: str, *events: Any, **fields: Any) -> None:
        request = self.attempt(client, n, nonce, *events, **fields)
        self.executed(request)
        self.answer(request, 200)

    def tell(self, client: str, caller: str, outcome: str) -> None:
        self.add("tell", client=client, caller=caller, outcome=outcome)

    def checkpoint(self, client: str, n: int | None, condition: str | None = None, *, done: bool = True) -> None:
        marker = None if n is None else [EPOCH, n]
        version = condition or self.version
        request = self.send(client, "PUT", "repo", condition=version, marker=marker)
        self.executed(request, done=done, **({"version": version + "'"} if done else {}))
        self.answer(request, 200 if done else 412)

    def put(self, client: str, key: str, **fields: Any) -> None:
        request = self.send(client, "PUT", key, condition="absent")
        self.executed(request, **fields)
        self.answer(request, 200)

    def delete(self, client: str, key: str) -> None:
        request = self.send(client, "DELETE", keys=[key])
        self.add("exec", request=request)
        self.answer(request, 200)

    def wait(self, us: int) -> None:
        self.now_us += us

    def problems(self) -> list[Problem]:
        return replay(self.records)

    def rules(self) -> list[int]:
        return [rule for _, rule, _ in self.problems()]


X, Y, DEV = commit("X", "S0"), commit("Y", "S0"), {"kind": "branch-created", "name": "dev", "snapshot": "S0"}
GONE = {"kind": "branch-deleted", "name": "dev"}
SEAL = {"kind": "seal", "reason": "convert"}


def lost_answer(t: Trace) -> None:
    t.open("a")
    request = t.attempt("a", 1, "n1", X, caller="x")
    t.executed(request)
    t.answer(request, 0)
    t.get("a", key(1))
    t.tell("a", "x", "committed")


def late_and_sent_again(t: Trace) -> None:
    t.open("a")
    first = t.attempt("a", 1, "n1", X, caller="x")
    t.answer(first, 0)
    t.get("a", key(1), 404)
    second = t.sent("a", 1, "n1", X)
    t.executed(second)
    t.executed(first, done=False)
    t.answer(second, 200)
    t.tell("a", "x", "committed")


def told_and_the_next_change(t: Trace) -> None:
    """The second race of the safety argument, first branch."""
    t.open("a")
    first = t.attempt("a", 1, "n1", X, caller="x")
    t.answer(first, 0)
    t.tell("a", "x", "unknown")
    t.lands("a", 1, "n2", DEV, caller="dev")
    t.tell("a", "dev", "committed")
    t.executed(first, done=False)
    t.add("settle", client="a", caller="x", landed=False)


def told_and_it_landed(t: Trace) -> None:
    """Its second branch."""
    t.open("a")
    first = t.attempt("a", 1, "n1", X, caller="x")
    t.answer(first, 0)
    t.tell("a", "x", "unknown")
    second = t.attempt("a", 1, "n2", DEV, caller="dev")
    t.executed(first)
    t.executed(second, done=False)
    t.answer(second, 412)
    t.get("a", key(1))
    t.token("a", 2, "n3", "dev")
    third = t.sent("a", 2, "n3", DEV)
    t.executed(third)
    t.answer(third, 200)
    t.tell("a", "dev", "committed")
    t.add("settle", client="a", caller="x", landed=True)


def one_of_two_callers_leaves(t: Trace) -> None:
    t.open("a")
    for caller in ("x", "dev"):
        t.add("ask", client="a", caller=caller)
        t.token("a", 1, "n1", caller)
    first = t.sent("a", 1, "n1", X, DEV)
    t.tell("a", "x", "cancelled")
    t.answer(first, 0)
    t.get("a", key(1), 404)
    t.token("a", 1, "n2", "dev")
    second = t.sent("a", 1, "n2", DEV)
    t.executed(second)
    t.answer(second, 200)
    t.tell("a", "dev", "committed")


def refused_for_certain(t: Trace) -> None:
    t.open("a")
    first = t.attempt("a", 1, "n1", X, caller="x")
    t.answer(first, 403)
    t.tell("a", "x", "refused")
    t.lands("a", 1, "n2", Y, caller="y")
    t.tell("a", "y", "committed")


def lost_to_another(t: Trace) -> None:
    t.open("a")
    t.open("b")
    t.lands("b", 1, "n2", Y, caller="y")
    t.tell("b", "y", "committed")
    request = t.attempt("a", 1, "n1", X, caller="x")
    t.executed(request, done=False)
    t.answer(request, 412)
    t.get("a", key(1))
    t.tell("a", "x", "conflict")


def settled_elsewhere(t: Trace) -> None:
    t.open("a")
    first = t.attempt("a", 1, "n1", X, caller="x")
    t.answer(first, 0)
    t.tell("a", "x", "unknown")
    t.add("end", client="a")
    t.open("b")
    t.lands("b", 1, "n2", {"kind": "void", "nonce": "n1"})
    t.add("settle", client="b", caller="x", landed=False)
    t.executed(first, done=False)


def checkpoint_of_embedded_files(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", X, objects={"snapshots/X": None})
    t.put("a", "snapshots/X")
    t.checkpoint("a", 1)
    t.open("b")
    t.add("return", client="b", epoch=EPOCH, n=1)


def conversion(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", SEAL)
    t.checkpoint("a", None)
    t.get("b", "repo")


def pruning(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", X)
    t.checkpoint("a", 1)
    t.get("a", "repo")
    t.put("a", floor_key(1))
    t.wait(G_US)
    t.delete("a", key(1))
    t.open("b")


def collection(t: Trace) -> None:
    t.put("a", "chunks/C")
    t.open("a")
    t.wait(DAY_US)
    t.lands("a", 1, "n1", {"kind": "gc", "cutoff": t.now_us - DAY_US // 2})
    t.checkpoint("a", 1)
    t.delete("a", "chunks/C")


def slept_and_opened_again(t: Trace) -> None:
    t.open("a")
    t.wait(G_US)
    request = t.attempt("a", 1, "n1", X, caller="x")
    t.executed(request)
    t.answer(request, 200)
    t.open("a", 1)
    t.tell("a", "x", "committed")


def the_store_check(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", X)
    t.open("b", 1)
    request = t.sent("b", 1, "n1", X)
    t.executed(request, done=False)
    t.answer(request, 412)
    t.lands("b", 2, "n2", DEV)


def _slept_beside_another_writer(t: Trace) -> None:
    """The attempt of ``a`` is without answer, ``b`` has its slot, and the knowledge of ``a`` is too old to rely on."""
    t.open("a")
    t.open("b")
    t.answer(t.attempt("a", 1, "n1", X, caller="x"), 0)
    t.lands("b", 1, "n2", Y)
    t.wait(4 * DAY_US)
    # An opening begins: what it reads would show that the slot is taken. The listing has no answer.
    t.get("a", "repo")
    t.get("a", key(1))
    t.answer(t.send("a", "LIST", prefix="log/"), 0)


def sent_again_after_an_opening_that_failed(t: Trace) -> None:
    _slept_beside_another_writer(t)
    again = t.sent("a", 1, "n1", X)
    t.executed(again, done=False)
    t.answer(again, 412)
    t.open("a", 1)
    t.tell("a", "x", "conflict")


GOOD = [
    lost_answer,
    late_and_sent_again,
    told_and_the_next_change,
    told_and_it_landed,
    one_of_two_callers_leaves,
    refused_for_certain,
    lost_to_another,
    settled_elsewhere,
    checkpoint_of_embedded_files,
    conversion,
    pruning,
    collection,
    slept_and_opened_again,
    sent_again_after_an_opening_that_failed,
    the_store_check,
]


@pytest.mark.parametrize("script", GOOD, ids=lambda script: script.__name__)
def test_an_allowed_trace_passes(script: Callable[[Trace], None]) -> None:
    trace = Trace()
    script(trace)
    assert trace.problems() == []


# ---------------------------------------------------------------- what is not allowed


def told_is_sent_again(t: Trace) -> None:
    """The defect that field tests found: rule 2."""
    t.open("a")
    first = t.attempt("a", 1, "n1", GONE, caller="x")
    t.answer(first, 0)
    t.tell("a", "x", "unknown")
    t.add("ask", client="a", caller="dev")
    again = t.sent("a", 1, "n1", GONE)
    t.executed(again)
    t.answer(again, 200)


def lost_and_told_is_sent_again(t: Trace) -> None:
    _slept_beside_another_writer(t)
    t.tell("a", "x", "unknown")
    t.sent("a", 1, "n1", X)


def lost_by_a_fresh_answer_is_sent_again(t: Trace) -> None:
    t.open("a")
    t.open("b")
    t.answer(t.attempt("a", 1, "n1", X, caller="x"), 0)
    t.lands("b", 1, "n2", Y)
    t.get("a", key(1))
    t.sent("a", 1, "n1", X)


def sent_after_the_client_has_died(t: Trace) -> None:
    t.open("a")
    t.add("end", client="a")
    t.attempt("a", 1, "n1", X)


def the_next_slot_too_early(t: Trace) -> None:
    t.open("a")
    first = t.attempt("a", 1, "n1", X, caller="x")
    t.answer(first, 0)
    t.tell("a", "x", "unknown")
    t.attempt("a", 2, "n2", DEV)


def two_in_flight(t: Trace) -> None:
    t.open("a")
    t.attempt("a", 1, "n1", X)
    t.attempt("a", 1, "n2", DEV)


def other_bytes(t: Trace) -> None:
    t.open("a")
    t.answer(t.attempt("a", 1, "n1", X), 0)
    t.sent("a", 1, "n1", DEV)


def proposed_again_although_it_landed(t: Trace) -> None:
    t.open("a")
    for caller in ("x", "dev"):
        t.add("ask", client="a", caller=caller)
        t.token("a", 1, "n1", caller)
    first = t.sent("a", 1, "n1", X, DEV)
    t.executed(first)
    t.tell("a", "x", "cancelled")
    t.answer(first, 0)
    t.get("a", key(1))
    t.token("a", 2, "n2", "dev")


def asked_for_nothing_any_more(t: Trace) -> None:
    t.open("a")
    first = t.attempt("a", 1, "n1", X, caller="x")
    t.answer(first, 0)
    t.tell("a", "x", "unknown")
    t.token("a", 1, "n2", "x")


def failed_while_it_travels(t: Trace) -> None:
    t.open("a")
    first = t.attempt("a", 1, "n1", X, caller="x")
    t.answer(first, 0)
    t.get("a", key(1), 404)
    t.tell("a", "x", "refused")
    t.executed(first)


def refused_after_a_try_without_answer(t: Trace) -> None:
    t.open("a")
    first = t.attempt("a", 1, "n1", X, caller="x")
    t.answer(first, 0)
    t.answer(t.sent("a", 1, "n1", X), 403)
    t.tell("a", "x", "refused")


def refused_on_old_knowledge(t: Trace) -> None:
    t.open("a")
    t.add("ask", client="a", caller="x")
    t.tell("a", "x", "conflict")


def committed_by_a_late_answer(t: Trace) -> None:
    t.open("a")
    t.wait(G_US)
    request = t.attempt("a", 1, "n1", X, caller="x")
    t.executed(request)
    t.answer(request, 200)
    t.tell("a", "x", "committed")


def committed_without_any(t: Trace) -> None:
    t.open("a")
    first = t.attempt("a", 1, "n1", X, caller="x")
    t.answer(first, 0)
    t.tell("a", "x", "committed")


def settled_as_lost_while_empty(t: Trace) -> None:
    t.open("a")
    first = t.attempt("a", 1, "n1", X, caller="x")
    t.answer(first, 0)
    t.tell("a", "x", "unknown")
    t.get("a", key(1), 404)
    t.add("settle", client="a", caller="x", landed=False)


def unknown_though_nothing_was_sent(t: Trace) -> None:
    t.add("ask", client="a", caller="x")
    t.tell("a", "x", "unknown")


def not_validated(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", X)
    t.lands("a", 2, "n2", Y)


def unconditional(t: Trace) -> None:
    t.open("a")
    entry = {"n": 1, "nonce": "n1", "events": [X]}
    t.send("a", "PUT", key(1), condition=None, entry=entry)


def returned_beyond_its_knowledge(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", X)
    t.get("b", "repo")
    t.add("return", client="b", epoch=EPOCH, n=1)


def returned_backwards(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", X)
    t.add("return", client="a", epoch=EPOCH, n=1)
    t.add("return", client="a", epoch=EPOCH, n=0)


def checkpoint_backwards(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", X)
    t.lands("a", 2, "n2", DEV)
    t.checkpoint("a", 2)
    t.checkpoint("a", 1)


def checkpoint_without_a_condition(t: Trace) -> None:
    t.open("a")
    t.send("a", "PUT", "repo", condition=None, marker=[EPOCH, 1])


def checkpoint_of_what_it_has_not_folded(t: Trace) -> None:
    t.open("a")
    t.open("b")
    t.lands("a", 1, "n1", X)
    t.checkpoint("b", 1)


def converted_without_a_seal(t: Trace) -> None:
    t.open("a")
    t.checkpoint("a", None)


def sent_after_a_seal(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", SEAL)
    t.attempt("a", 2, "n2", X)


def floor_past_the_marker(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", X)
    t.put("a", floor_key(1))


def pruned_too_early(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", X)
    t.checkpoint("a", 1)
    t.get("a", "repo")
    t.put("a", floor_key(1))
    t.wait(G_US // 2)
    t.delete("a", key(1))


def collected_without_an_entry(t: Trace) -> None:
    t.put("a", "chunks/C")
    t.open("a")
    t.delete("a", "chunks/C")


def collected_before_the_checkpoint(t: Trace) -> None:
    t.put("a", "chunks/C")
    t.open("a")
    t.wait(DAY_US)
    t.lands("a", 1, "n1", {"kind": "gc", "cutoff": t.now_us - DAY_US // 2})
    t.delete("a", "chunks/C")


def committed_with_collected_files(t: Trace) -> None:
    t.open("a")
    t.wait(DAY_US)
    t.lands("a", 1, "n1", {"kind": "gc", "cutoff": t.now_us - DAY_US // 2})
    t.lands("a", 2, "n2", X, since=t.now_us - DAY_US)


def created_ahead(t: Trace) -> None:
    t.send("b", "PUT", "repo", condition="absent", marker=["OTHER", 3])


def checkpoint_of_files_that_are_embedded_only(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", X, objects={"snapshots/X": None})
    t.checkpoint("a", 1)


def the_store_overwrites(t: Trace) -> None:
    t.open("a")
    t.lands("a", 1, "n1", X)
    t.open("b")
    t.executed(t.attempt("b", 1, "n2", DEV))


def refused_and_executed(t: Trace) -> None:
    t.open("a")
    request = t.attempt("a", 1, "n1", X)
    t.answer(request, 403)
    t.executed(request)


BAD: list[tuple[int, Callable[[Trace], None]]] = [
    (1, unconditional),
    (1, the_next_slot_too_early),
    (2, told_is_sent_again),
    (2, lost_and_told_is_sent_again),
    (2, lost_by_a_fresh_answer_is_sent_again),
    (2, sent_after_the_client_has_died),
    (2, two_in_flight),
    (2, other_bytes),
    (2, proposed_again_although_it_landed),
    (2, asked_for_nothing_any_more),
    (3, failed_while_it_travels),
    (3, refused_after_a_try_without_answer),
    (3, refused_on_old_knowledge),
    (3, committed_without_any),
    (3, settled_as_lost_while_empty),
    (3, unknown_though_nothing_was_sent),
    (4, not_validated),
    (4, committed_with_collected_files),
    (5, committed_by_a_late_answer),
    (6, returned_beyond_its_knowledge),
    (6, returned_backwards),
    (7, checkpoint_backwards),
    (7, checkpoint_without_a_condition),
    (7, checkpoint_of_what_it_has_not_folded),
    (8, converted_without_a_seal),
    (8, sent_after_a_seal),
    (9, floor_past_the_marker),
    (9, pruned_too_early),
    (10, collected_without_an_entry),
    (10, collected_before_the_checkpoint),
    (11, created_ahead),
    (15, checkpoint_of_files_that_are_embedded_only),
    (0, the_store_overwrites),
    (0, refused_and_executed),
]


@pytest.mark.parametrize(("rule", "script"), BAD, ids=lambda case: getattr(case, "__name__", str(case)))
def test_a_step_that_a_rule_forbids_is_named_with_the_rule(rule: int, script: Callable[[Trace], None]) -> None:
    trace = Trace()
    script(trace)
    assert rule in trace.rules(), trace.problems()
    assert {found for found in trace.rules() if found} <= {rule, 2 if rule == 1 else rule}


def unsent(trace: Trace) -> str:
    """A commit for which there was no connection."""
    trace.open("a")
    request = trace.attempt("a", 1, "n1", commit("A", "S0"), caller="x")
    trace.answer(request, 0, unsent=True)
    return request


def test_a_request_that_never_left_may_be_sent_again_and_is_no_reason_for_an_unknown_outcome() -> None:
    again, refused, late = Trace(), Trace(), Trace()
    unsent(again)
    again.lands("a", 1, "n1", commit("A", "S0"))
    again.tell("a", "x", "committed")
    assert replay(again.records) == []
    unsent(refused)
    refused.tell("a", "x", "refused")
    refused.lands("a", 1, "n2", commit("B", "S0"))
    assert replay(refused.records) == []
    request = unsent(late)
    late.executed(request)
    assert [problem.rule for problem in replay(late.records)] == [0]


def test_a_trace_may_begin_with_a_repository_that_has_a_history() -> None:
    trace = Trace()
    entry = {"v": 1, "n": 1, "nonce": "n1", "time": 1, "since": None, "events": [commit("A", "S0")]}
    trace.records = [
        {"do": "have", "t": 0, "key": key(1), "entry": entry},
        {"do": "have", "t": 0, "key": "repo", "version": "v9", "marker": [EPOCH, 1]},
    ]
    trace.open("a")
    trace.lands("a", 2, "n2", commit("B", "A"))
    assert replay(trace.records) == []
    trace.lands("a", 3, "n3", commit("C", "A"))
    assert [problem.rule for problem in replay(trace.records)] == [4]


def test_the_forbidden_step_is_the_one_that_is_named() -> None:
    trace = Trace()
    told_is_sent_again(trace)
    (problem,) = trace.problems()
    assert trace.records[problem.line - 1]["do"] == "send"
    assert problem.line == len(trace.records) - 2


def test_keys_are_read_as_they_are_written() -> None:
    assert slot_of_key(f"log/{EPOCH}/ZZZZZZYT") == Slot(EPOCH, 37)
    assert floor_of(f"log/{EPOCH}.floor/00000015") == Slot(EPOCH, 37)
    assert slot_of_key(f"log/{EPOCH}.floor/00000015") is None
    assert floor_of(f"log/{EPOCH}/ZZZZZZYT") is None
    assert slot_of_key(f"log/{EPOCH}/now.0123456789abcdef") is None


def test_a_record_that_is_none_is_named() -> None:
    assert [problem.rule for problem in replay([{"t": 1, "do": "dance"}])] == [0]


def test_the_example_on_the_page_is_allowed() -> None:
    trace = Trace()
    trace.records[0]["marker"] = ["E", 0]
    trace.get("a", "repo")
    lines = re.search(r"^```jsonl\n(.*?)^```$", page("model/README.md"), re.MULTILINE | re.DOTALL)
    assert lines is not None
    example = [json_codec.loads(line) for line in lines[1].splitlines()]
    later = [{**record, "t": trace.now_us + record["t"]} for record in example]
    assert replay([*trace.records, *later]) == []


def test_files_of_json_lines_are_read_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = Trace(), Trace()
    lost_answer(good)
    told_is_sent_again(bad)
    for name, trace in (("good", good), ("bad", bad)):
        (tmp_path / name).write_bytes(b"\n".join(json_codec.dumps(record) for record in trace.records))
    assert main([str(tmp_path / "good")]) == 0
    assert main([str(tmp_path / "good"), str(tmp_path / "bad")]) == 1
    assert "rule 2" in capsys.readouterr().out
