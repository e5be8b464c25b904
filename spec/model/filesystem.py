"""Rule 12 as a space of its own: slots of a folder, whose writers die and whose machine loses power.

``link``: a slot is a complete file that gets its name by ``link(2)``. ``exclusive``: it is created empty under its name
(O_EXCL), and filled under a lock that the kernel drops when its owner dies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

from spec.model.explore import Label

__all__ = ["Filesystem", "FilesystemModel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filesystem:
    """The way in which slots are made, the number of writers, and the faults that may occur."""

    name: str
    kind: str
    writers: int = 2
    readers: int = 0
    power: int = 0
    crashes: int = 0
    given: frozenset[str] = frozenset()


class _File(NamedTuple):
    n: int
    """The slot."""
    owner: int
    whole: bool = True
    durable: bool = False
    locked: bool = False


class _Proc(NamedTuple):
    pc: str = "look"
    n: int = 0
    """The slot that it fills, or the last one that it has shown."""
    gone: bool = False
    """Whether its file has lost its name: what it writes goes nowhere."""


class _State(NamedTuple):
    procs: tuple[_Proc, ...]
    files: tuple[_File, ...] = ()
    acked: tuple[tuple[int, int], ...] = ()
    """Slot and owner of the entries that were acknowledged, or shown to a reader."""
    power: int = 0
    crashes: int = 0


class FilesystemModel:
    """Rule 12 under some of the rules."""

    def __init__(self, scenario: Filesystem, rules: frozenset[str]) -> None:
        self._scenario, self._rules = scenario, rules

    def initial(self) -> _State:
        scenario = self._scenario
        return _State(
            (_Proc(),) * (scenario.writers + scenario.readers), power=scenario.power, crashes=scenario.crashes
        )

    def successors(self, state: _State) -> Iterator[tuple[bool, Label, Any]]:
        for i, proc in enumerate(state.procs):
            if proc.pc in ("done", "dead"):
                continue
            writes = i < self._scenario.writers
            for label, after, q in self._write(state, i, proc) if writes else self._read(state, proc):
                procs = (*after.procs[:i], q, *after.procs[i + 1 :])
                yield True, (f"{'writer' if writes else 'reader'} {i + 1}:", *label), after._replace(procs=procs)
        yield from self._accidents(state)

    def _write(self, s: _State, i: int, p: _Proc) -> Iterator[tuple[Label, _State, _Proc]]:
        me = i + 1
        whole = [file for file in s.files if file.whole]
        n = len(whole) + 1
        torn = next((file for file in s.files if file.n == n), None)
        if p.pc == "look" and torn is not None:
            free = not torn.locked if "lock" in self._rules else True
            if free:
                files = tuple(file for file in s.files if file is not torn)
                procs = tuple(
                    q._replace(gone=True) if j + 1 == torn.owner and q.n == n else q for j, q in enumerate(s.procs)
                )
                yield ("removes the torn slot", n), s._replace(files=files, procs=procs), p
        elif p.pc == "look" and self._scenario.kind == "link":
            yield ("links slot", n), s._replace(files=_sorted(s.files, _File(n, me))), _Proc("sync", n)
        elif p.pc == "look":
            yield ("creates slot", n), s._replace(files=_sorted(s.files, _File(n, me, False))), _Proc("lock", n)
        elif p.pc == "lock":
            if p.gone and "inode" in self._rules:
                yield ("finds that its name is gone: again",), s, _Proc()
            else:
                yield ("locks its file",), self._own(s, p, me, locked=True), p._replace(pc="fill")
        elif p.pc == "fill":
            yield ("fills its file",), self._own(s, p, me, whole=True, locked=False), p._replace(pc="sync")
        elif p.pc == "sync":
            after = self._synced(s) if "sync" in self._rules else s
            yield ("syncs, and acknowledges",), after._replace(acked=_sorted(after.acked, (p.n, me))), _Proc("done")

    def _own(self, s: _State, p: _Proc, me: int, **fields: bool) -> _State:
        if p.gone:
            return s
        return s._replace(
            files=tuple(file._replace(**fields) if (file.n, file.owner) == (p.n, me) else file for file in s.files)
        )

    def _read(self, s: _State, p: _Proc) -> Iterator[tuple[Label, _State, _Proc]]:
        shown = [(file.n, file.owner) for file in s.files if file.whole]
        after = self._synced(s) if "sync" in self._rules else s
        yield ("shows", len(shown), "slots"), after._replace(acked=tuple(sorted({*s.acked, *shown}))), _Proc("done")

    def _synced(self, s: _State) -> _State:
        return s._replace(files=tuple(file._replace(durable=True) for file in s.files))

    def _accidents(self, s: _State) -> Iterator[tuple[bool, Label, _State]]:
        if s.crashes:
            for i, proc in enumerate(s.procs):
                if proc.pc not in ("look", "done", "dead"):
                    files = tuple(file._replace(locked=False) if file.owner == i + 1 else file for file in s.files)
                    procs = (*s.procs[:i], _Proc("dead"), *s.procs[i + 1 :])
                    yield (
                        False,
                        (f"writer {i + 1}: CRASHES",),
                        s._replace(files=files, procs=procs, crashes=s.crashes - 1),
                    )
        if s.power:
            # Of what was not synced any part may be left.
            loose = [file for file in s.files if not file.durable]
            procs = tuple(proc if proc.pc == "done" else _Proc("dead") for proc in s.procs)
            for count in range(len(loose) + 1):
                for kept in combinations(loose, count):
                    files = tuple(
                        file._replace(durable=True, locked=False) for file in s.files if file.durable or file in kept
                    )
                    yield False, ("POWER FAILS",), s._replace(files=files, procs=procs, power=0)

    def broken(self, before: _State, s: _State) -> str:
        there = {(file.n, file.owner) for file in s.files if file.whole}
        if not set(s.acked) <= there:
            return "ACKNOWLEDGED: a slot that was acknowledged, or shown to a reader, is gone"
        return ""

    def stuck(self, s: _State) -> str:
        if all(proc.pc in ("done", "dead") for proc in s.procs):
            return ""
        return "STUCK: a process waits for ever"


def _sorted(items: tuple[Any, ...], item: Any) -> tuple[Any, ...]:
    return tuple(sorted((*items, item)))
