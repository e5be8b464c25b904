"""``python -m tools.simulator.replay``: the formal model judges schedules of the simulator, step by step.

    python -m tools.simulator.replay [--traces 200] [--seed 0] [--keep FOLDER]

Each schedule of the log layout is written down as `spec/model/README.md` describes traces: requests as they are sent,
executed and answered, calls and what their callers are told. `spec.model.replay` says which steps the rules do not
allow. The command ends with 1 where there is one; ``--keep`` writes those traces as JSON lines.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from icechunk.errors import CommitOutcomeUnknown, ConflictError, FormatError, SessionStateError, StorageError
from icechunk.format.keys import REPO_KEY
from icechunk.format.repo.codec import decode_repo
from icechunk.log.repository import queue
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.events import Event
from icechunk.log.repository.marker import decode_marker
from icechunk.log.repository.port import Layout, Proposal, Propose, SwapToken
from icechunk.log.repository.queue import Waiting, proposal_of
from icechunk.log.repository.state import RepoState
from icechunk.runtime import json_codec
from icechunk.storage.port import DeleteResult, ObjectInfo
from spec.model.replay import Problem, Record, replay
from tools.simulator import simulation
from tools.simulator.cluster import Cluster, Report
from tools.simulator.faults import Fault
from tools.simulator.simulation import Plan, plan_of
from tools.simulator.storage import SimulatedStorage
from tools.simulator.trace import Request

__all__ = ["Recorder", "judged", "main", "recorded"]


class Recorder:
    """Writes down what a cluster does, from its first request on."""

    def __init__(self, cluster: Cluster) -> None:
        self.records: list[Record] = []
        self._tokens: dict[str, SwapToken] = {}
        """The newest token of each caller."""
        self._cluster = cluster
        self._names: dict[int, tuple[str, Request]] = {}
        self._missing: set[str] = set()
        self._callers = itertools.count(1)
        # Slots last first in the store's order of keys; a history is filled from its beginning.
        for key, stored in sorted(cluster.store.objects.items(), reverse=True):
            version = {"version": str(stored.info.version)} if key == REPO_KEY else {}
            self.note("have", modified=stored.info.modified_us, **version, **_written(key, stored.data))

    def note(self, do: str, **fields: Any) -> None:
        """Add a record."""
        self.records.append({"do": do, "t": self._cluster.loop.now_us(), **fields})

    def caller(self) -> str:
        """A new name of a caller."""
        return f"k{next(self._callers)}"

    def gets(self, caller: str, token: SwapToken) -> None:
        """A caller gets a token."""
        self._tokens[caller] = token

    def holder(self, token: SwapToken) -> str | None:
        """The caller whose newest token this is. If there are several, they share an attempt, and its outcome."""
        return next((caller for caller, newest in self._tokens.items() if newest == token), None)

    def sent(self, request: Request) -> None:
        """As `tools.simulator.storage.RequestRecorder`."""
        if request.verb == "copy":
            return
        name = f"r{len(self._names) + 1}"
        self._names[id(request)] = name, request
        match request.verb:
            case "put":
                what = _put(request.key, request.detail, request.data)
            case "get":
                what = {"verb": "GET", "key": request.key}
            case "list":
                what = {"verb": "LIST", "prefix": request.key}
            case _:
                what = {"verb": "DELETE", "keys": request.key.split(",")}
        foreign = {"foreign": True} if request.client in self._cluster.foreign else {}
        self.note("send", request=name, client=request.client, **what, **foreign)

    def executed(self, request: Request, result: object) -> None:
        """As `tools.simulator.storage.RequestRecorder`."""
        if request.verb == "copy":
            return
        name, _ = self._names[id(request)]
        what: dict[str, Any] = {}
        match request.verb:
            case "put":
                what["done"] = result is not None
                if result is not None:
                    stored = self._cluster.store.objects[request.key].info
                    what["modified"] = stored.modified_us
                    if request.key == REPO_KEY:
                        what["version"] = str(stored.version)
            case "get":
                if isinstance(result, tuple) and result[0] is None:
                    self._missing.add(name)
            case "list":
                assert isinstance(result, list)
                what["found"] = [info.key for info in result if isinstance(info, ObjectInfo)]
            case _:
                assert isinstance(result, DeleteResult)
                left = {key for key, _ in result.failures}
                what["keys"] = [key for key in request.key.split(",") if key not in left]
        self.note("exec", request=name, **what)

    def answered(self, request: Request) -> None:
        """As `tools.simulator.storage.RequestRecorder`."""
        if request.verb == "copy":
            return
        name, _ = self._names[id(request)]
        status, answer = 0, request.answer
        if answer == "ok":
            status = 404 if name in self._missing else 200
        elif answer.startswith("412"):
            status = 412
        elif answer.startswith("refused with "):
            status = int(answer.removeprefix("refused with "))
        unsent = {"unsent": True} if answer == "no connection" else {}
        self.note("answer", request=name, status=status, **unsent)


def _put(key: str, condition: str, data: bytes) -> dict[str, Any]:
    expected = None if not condition else "absent" if condition == "if absent" else condition.removeprefix("if ")
    return {"verb": "PUT", "condition": expected, **_written(key, data)}


def _written(key: str, data: bytes) -> dict[str, Any]:
    record: dict[str, Any] = {"key": key}
    if key.startswith("log/") and ".floor/" not in key and ".repo/" not in key:
        entry = json_codec.loads(data)
        record["entry"] = {**entry, "objects": list(entry.get("objects", ()))}
    if key == REPO_KEY:
        marker = decode_marker(decode_repo(data).extra)
        record["marker"] = None if marker is None else [marker.epoch, marker.n]
    return record


# ------------------------------------------------------------------------------------------- callers of a schedule


class _Noted(Proposal):
    """A proposal, and the record of the tokens that it gets."""

    def __init__(self, recorder: Recorder, client: str, name: str, proposal: Proposal) -> None:
        self._recorder = recorder
        self._client = client
        self._name = name
        self._proposal = proposal
        self.is_told = False
        """Whether it is noted what the caller was told."""

    def unknown(self) -> None:
        """The caller is told that the outcome is unknown; the task of the log may go on before the caller does."""
        if not self.is_told:
            self.is_told = True
            self._recorder.note("tell", client=self._client, caller=self._name, outcome="unknown")

    def events(self, state: RepoState) -> Sequence[Event]:
        return self._proposal.events(state)

    def queued(self) -> None:
        self._proposal.queued()

    def sent(self, token: SwapToken | None) -> None:
        if token is not None:
            self._recorder.note(
                "token",
                client=self._client,
                caller=self._name,
                epoch=token.epoch,
                n=token.n,
                nonce=token.nonces[-1].hex(),
            )
            self._recorder.gets(self._name, token)
        self._proposal.sent(token)


@contextmanager
def _noting(recorders: list[Recorder]) -> Iterator[None]:
    """Calls of the log layout are written down by the newest recorder."""
    append, settle, resolve = LogLayout.append, LogLayout.settle, queue.resolve

    async def noted_append(self: LogLayout, proposal: Proposal | Propose, **options: Any) -> RepoState:
        if not recorders:
            return await append(self, proposal, **options)
        recorder, client = recorders[-1], _client_of(self)
        name = recorder.caller()
        recorder.note("ask", client=client, caller=name)
        outcome, noted = "conflict", _Noted(recorder, client, name, proposal_of(proposal))
        try:
            state = await append(self, noted, **options)
            outcome = "committed"
            return state
        except CommitOutcomeUnknown:
            outcome = "unknown"
            raise
        except ConflictError:
            raise
        except (FormatError, SessionStateError, StorageError):
            # The log cannot be read on, or nothing was sent.
            outcome = "refused"
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            if not noted.is_told:
                recorder.note("tell", client=client, caller=name, outcome=outcome)

    def noted_resolve(one: Waiting, outcome: RepoState | Exception) -> None:
        waits = not one.abandoned and not one.outcome.done()
        resolve(one, outcome)
        if waits and isinstance(outcome, CommitOutcomeUnknown) and isinstance(one.proposal, _Noted):
            one.proposal.unknown()

    async def noted_settle(self: LogLayout, token: SwapToken) -> bool:
        landed: bool | None = None
        try:
            landed = await settle(self, token)
            return landed
        finally:
            caller = recorders[-1].holder(token) if recorders else None
            if caller is not None:
                recorders[-1].note("settle", client=_client_of(self), caller=caller, landed=landed)

    with (
        mock.patch.object(LogLayout, "append", noted_append),
        mock.patch.object(LogLayout, "settle", noted_settle),
        mock.patch("icechunk.log.repository.settle.resolve", noted_resolve),
    ):
        yield


def _client_of(log: LogLayout) -> str:
    storage = log.view.storage
    assert isinstance(storage, SimulatedStorage)
    return storage.name


# ------------------------------------------------------------------------------------------------------ schedules


def recorded(seed: int, plan: Plan) -> tuple[Report, list[Record]]:
    """Run the schedule of a seed, and write it down."""
    recorders: list[Recorder] = []
    made = simulation.make_cluster

    def watched(*arguments: Any) -> Cluster:
        cluster = made(*arguments)
        recorder = Recorder(cluster)
        cluster.store.recorder = recorder
        cluster.on_crash = lambda client: recorder.note("end", client=client.name)
        recorders.append(recorder)
        return cluster

    with _noting(recorders), mock.patch.object(simulation, "make_cluster", watched):
        report = simulation.simulate(seed, plan)
    return report, recorders[-1].records


@dataclass(frozen=True, slots=True)
class Judged:
    """The model's judgement of one schedule."""

    seed: int
    report: Report
    records: list[Record]
    problems: list[Problem]


def judged(seeds: range) -> Iterator[Judged]:
    """Have the model judge the schedules of some seeds in the log layout; those without a fault are left out.

    So are those of other machinery than simulated clients on a simulated store: power failures, and leases.
    """
    for seed in seeds:
        plan = plan_of(seed, Layout.LOG)
        if plan.disk or plan.leases:
            continue
        report, records = recorded(seed, plan)
        if report.counts:
            yield Judged(seed, report, records, replay(records))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--keep", type=Path, help="folder for traces that are not allowed")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tools.simulator.replay", *sys.argv[1:]])
    began, traces, steps, wrong = time.monotonic(), 0, 0, 0
    injected: Counter[Fault] = Counter()
    outcomes: Counter[str] = Counter()
    for one in itertools.islice(judged(range(options.seed, sys.maxsize)), options.traces):
        traces += 1
        steps += len(one.records)
        injected += one.report.injected
        outcomes.update(_told(one.records))
        if one.problems:
            wrong += 1
            print(f"seed {one.seed} ({one.report.profile}):")
            for line, rule, what in one.problems[:5]:
                print(f"    step {line}: {f'rule {rule}' if rule else 'store'}: {what}")
            print(f"    python -m tools.simulate --seed {one.seed} --runs 1 --trace --layout log", flush=True)
            if options.keep is not None:
                options.keep.mkdir(parents=True, exist_ok=True)
                text = "".join(f"{json.dumps(record)}\n" for record in one.records)
                (options.keep / f"{one.seed}.jsonl").write_text(text, encoding="utf-8")
    print(
        f"{traces} traces with {steps} steps and {sum(injected.values())} faults in {time.monotonic() - began:.0f} s: "
        f"{wrong} not allowed by the model"
    )
    print("callers were told: " + ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items())))
    return 1 if wrong else 0


def _told(records: list[Record]) -> Iterator[str]:
    return (str(record["outcome"]) for record in records if record["do"] == "tell")


if __name__ == "__main__":
    sys.exit(main())
