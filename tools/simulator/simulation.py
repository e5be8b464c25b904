"""One schedule: a cluster of clients on one store, all chance from one seed.

A virtual clock makes waiting cost nothing, and one seeded generator decides the fate of every request. So a seed is
a schedule, and reproduces what it found. Clients open the repository as users do
(`icechunk.log.repository.open.open_repository`), in each of the three layouts.

Checks: the history of all operations by `tools.simulator.checker`, which knows nothing of the engine; the stored
objects, while they change, by `tools.simulator.watch`; and that no file is lost that history needs.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import random
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from icechunk.format.repo.repo_info import CommitAmended, NewCommit, Update
from icechunk.log.repository.open import create_repository
from icechunk.log.repository.port import Layout
from tools.simulator import sessions, upkeep
from tools.simulator.checker import MAIN, ROOT, View, check
from tools.simulator.cluster import Client, Cluster, Report, told_error
from tools.simulator.crowd import crowd
from tools.simulator.decoding import share
from tools.simulator.disk import simulate_power_loss
from tools.simulator.faults import CALM, Fault, Mix
from tools.simulator.loop import DAY_S, VirtualLoop
from tools.simulator.official import official_writer, take_over
from tools.simulator.storage import SimulatedStore, Stored
from tools.simulator.versions import as_known, newer_writer, older_writer
from tools.simulator.watch import Watch
from tools.simulator.writers import Powers, commit_proposal, reader, settle, writer

__all__ = ["Plan", "commit_proposal", "make_cluster", "plan_of", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The parameters of a seed's schedule."""

    layout: Layout
    collect: bool = False
    """Whether commits upload files, snapshots expire and garbage is collected."""
    convert: bool = False
    """Whether the repository is converted there and back, or upgraded."""
    writers: int = 2
    rounds: int = 3
    """Rounds of each writer."""
    readers: int = 1
    sessions: bool = False
    """Whether clients work with repositories and sessions, as users do, instead of the log alone."""
    official: bool = False
    """Whether a client that follows the official library's protocol takes part."""
    takeover: bool = False
    """Whether, after all that, the official library takes the log over, and this library's clients go on."""
    disk: bool = False
    """Whether it is one of a local disk whose power fails (`tools.simulator.disk`); only the layout counts besides."""
    leases: bool = False
    """Whether clients hold sessions with a lease while garbage is collected, instead of all else."""
    crowd: bool = False
    """Whether many clients commit to one branch at the same time and take turns (`tools.simulator.crowd`), instead of
    all else."""
    older: bool = False
    """Whether a client of an earlier version of this library takes part (`tools.simulator.versions`)."""
    newer: bool = False
    """Whether one of a later version writes what this one does not know."""
    calm: bool = False
    """No faults; only interleavings."""

    @property
    def profile(self) -> str:
        """A word or two for statistics."""
        if self.disk or self.leases or self.crowd:
            return f"{self.layout.value}-{'disk' if self.disk else 'leases' if self.leases else 'crowd'}"
        kinds = {
            "sessions": self.sessions,
            "collect": self.collect,
            "convert": self.convert,
            "official": self.official and not self.sessions,
            "takeover": self.takeover and not self.sessions,
            "older": self.older and not self.sessions,
            "newer": self.newer and not self.sessions,
        }
        return "-".join([self.layout.value, *(name for name, is_so in kinds.items() if is_so)])


_LAYOUTS: Final = (Layout.LOG, Layout.LOG, Layout.REPO, Layout.REFS)


def plan_of(seed: int, layout: Layout | None = None) -> Plan:
    """The plan of a seed; ``layout`` restricts it to one."""
    rng = random.Random(f"plan {seed}")
    chosen = layout if layout is not None else rng.choice(_LAYOUTS)
    collect, convert = rng.random() < 0.15, rng.random() < 0.12
    log = chosen is Layout.LOG
    # Small schedules, and many: what goes wrong nearly always needs few clients and few changes.
    large = rng.random() < 0.04
    has_sessions = rng.random() < 0.04
    return Plan(
        layout=chosen,
        collect=collect,
        convert=convert,
        sessions=has_sessions,
        official=chosen is not Layout.REFS and rng.random() < 0.15,
        takeover=chosen is Layout.LOG and not collect and rng.random() < 0.05,
        writers=4 if large else rng.choice((1, 2, 2, 3)),
        rounds=6 if large else rng.choice((1, 2, 2, 3)),
        readers=2 if large else 1,
        # They take ten times as long as others.
        disk=rng.random() < 0.004,
        leases=rng.random() < 0.004,
        older=log and rng.random() < 0.06,
        newer=log and not convert and rng.random() < 0.03,
        # Others upload files for days, or have other ways to commit.
        crowd=log and not (collect or convert or has_sessions) and rng.random() < 0.015,
    )


def simulate(seed: int, plan: Plan | None = None) -> Report:
    """Run the schedule of a seed.

    Parameters
    ----------
    plan
        What kind of schedule; None: as the seed says.

    Returns
    -------
    Report
        With its ``problems``, none if all promises held.
    """
    plan = plan if plan is not None else plan_of(seed)
    share()
    with _quiet():
        if plan.disk:
            return simulate_power_loss(seed, plan.layout)
        loop = VirtualLoop()
        cluster = make_cluster(loop, seed, plan)
        report = cluster.report
        try:
            try:
                loop.run_until_complete(_run(cluster, plan))
            except Exception as error:
                cluster.problem(told_error(error))
            try:
                _end(cluster)
            except Exception as error:
                cluster.problem(told_error(error))
            _judge(cluster)
            report.requests = sum(1 for one in report.trace.requests if one.verb != "note")
            return report
        finally:
            loop.close()
            _take_apart(cluster)


def make_cluster(loop: VirtualLoop, seed: int, plan: Plan) -> Cluster:
    """The cluster of a seed's schedule, before anything happens in it."""
    rng = random.Random(seed)
    mix = CALM if plan.calm else Mix.drawn(rng)
    cluster = Cluster(
        loop,
        seed,
        rng,
        layout=plan.layout,
        mix=mix,
        objects=_template(plan.layout, plan.sessions or plan.leases),
        collect=plan.collect or plan.leases,
        converts=plan.convert,
        sessions=plan.sessions or plan.leases,
    )
    cluster.report.profile = plan.profile
    cluster.store.force_at = rng.randrange(5, 40)
    return cluster


async def _run(cluster: Cluster, plan: Plan) -> None:
    watch = Watch(cluster)
    cluster.on_told = watch.told
    refs = plan.layout is Layout.REFS
    # The deletion of a ref has no condition: one that is late deletes whatever is there, and lets late creations land.
    deletes = not refs or not any(fault in cluster.mix for fault in (Fault.LATE, Fault.DOUBLED, Fault.CUT))
    powers = Powers(cluster.rng, plan.layout, only_commits=refs and plan.convert, deletes=deletes)
    actors: list[Coroutine[Any, Any, None]] = []
    if plan.leases:
        await _run_leases(cluster, plan)
        return
    if plan.sessions:
        actors += [sessions.content_writer(cluster, plan.rounds) for _ in range(plan.writers)]
        actors += [sessions.content_reader(cluster, 2) for _ in range(plan.readers)]
        if plan.collect:
            age_s = cluster.rng.choice((0.0, 600.0, DAY_S)) if plan.layout is Layout.LOG else upkeep.SAFE_AGE_S
            actors.append(sessions.content_collector(cluster, 2, age_s=age_s))
        await asyncio.gather(*actors)
        await _verify(cluster)
        await sessions.verify_content(cluster, cluster.client("z", faulty=False))
        return
    if plan.crowd:
        await asyncio.gather(crowd(cluster, 2 + plan.writers, plan.rounds), reader(cluster, 2))
        await _verify(cluster)
        return
    actors += [writer(cluster, powers, plan.rounds) for _ in range(plan.writers)]
    actors += [reader(cluster, 2) for _ in range(plan.readers)]
    if plan.official:
        actors.append(official_writer(cluster, plan.rounds))
    if plan.layout is Layout.LOG and (plan.collect or cluster.rng.random() < 0.3):
        actors.append(upkeep.pruner(cluster, 2))
    if plan.older:
        actors.append(older_writer(cluster, plan.rounds))
    if plan.newer:
        actors.append(newer_writer(cluster))
    if plan.collect:
        actors.append(upkeep.collector(cluster, plan.rounds))
    if plan.collect and not plan.newer:
        actors.append(upkeep.auditor(cluster, 2))
    if plan.convert:
        actors.append(upkeep.upgrader(cluster, 2) if refs else upkeep.converter(cluster, 2))
    await asyncio.gather(*actors)
    if plan.takeover:
        await take_over(cluster)
        await asyncio.gather(*(writer(cluster, powers, plan.rounds) for _ in range(plan.writers)), reader(cluster, 2))
    await _verify(cluster)


async def _run_leases(cluster: Cluster, plan: Plan) -> None:
    # Without the log nothing refuses a commit whose chunks are older than the cutoff, so only old ones are collected.
    log = plan.layout is Layout.LOG
    lease_s = cluster.rng.choice((3600.0, DAY_S, 7 * DAY_S)) if log else 3 * upkeep.SAFE_AGE_S
    await asyncio.gather(
        *(sessions.lease_holder(cluster, plan.rounds, lease_s=lease_s) for _ in range(plan.writers)),
        sessions.content_reader(cluster, 2),
        sessions.content_collector(
            cluster, 4, age_s=0.0 if log else upkeep.SAFE_AGE_S, pause_s=lease_s * plan.rounds / 3
        ),
    )
    await _verify(cluster)
    await sessions.verify_content(cluster, cluster.client("z", faulty=False))


async def _verify(cluster: Cluster) -> None:
    """Wait for all requests under way, settle unknown outcomes, and check the final state."""
    while cluster.store.travelling:
        await asyncio.wait(cluster.store.travelling)
    await as_known(cluster)
    client = cluster.client("z", faulty=False)
    log = await client.open()
    if log is None:
        cluster.problem("the repository cannot be opened in the end")
        return
    await cluster.read(client, log)
    unknown = [op for op in cluster.history if id(op) in cluster.tokens and op.outcome in ("unknown", "open")]
    if unknown and log.layout is not Layout.REFS:
        for op in unknown:
            await settle(cluster, client, log, op)
        await cluster.read(client, log)
    if cluster.collect and not cluster.sessions and (lost := await upkeep.lost_files(cluster, log)):
        cluster.problem(f"{len(lost)} files are lost that history needs in the end: {sorted(lost)[0]}")
    if log.layout is not Layout.REFS and not cluster.sessions:
        _check_ops_log(cluster, [update async for update in log.updates()][::-1])
    await log.aclose()


def _check_ops_log(cluster: Cluster, updates: list[Update]) -> None:
    """Every change that happened has one line in it, and no other has."""
    times = [update.updated_at_us for update in updates]
    if times != sorted(set(times)):
        cluster.problem("times in the ops log do not increase")
    changes = [update.change for update in updates if isinstance(update.change, NewCommit | CommitAmended)]
    told = [cluster.name_of(change.snapshot) for change in changes]
    if len(told) != len(set(told)):
        cluster.problem("a commit is in the ops log twice")
    for op in cluster.history:
        if op.commit and op.verb in ("commit", "amend"):
            if op.outcome == "ok" and op.commit not in told:
                cluster.problem(f"{op.commit} was acknowledged, and is not in the ops log")
            if op.outcome in ("failed", "refused") and op.commit in told:
                cluster.problem(f"{op.commit} was reported as {op.outcome}, and is in the ops log")


def _judge(cluster: Cluster) -> None:
    report = cluster.report
    start = View(branches={MAIN: (ROOT, sessions.FIRST)}, tags={}) if cluster.sessions else None
    independent = cluster.layout is Layout.REFS
    verdict = check(cluster.history, independent=independent, shortened=cluster.collect, start=start)
    for problem in verdict.problems:
        cluster.problem(problem)
    report.undecided = verdict.undecided
    for op in cluster.history:
        report.outcomes[op.outcome] += 1


def _end(cluster: Cluster) -> None:
    """Check that no task is left, and that no error of a finished task was lost."""
    pending = [task for task in cluster.tasks if not task.done()]
    for task in pending:
        task.cancel()
    if pending:
        cluster.loop.run_until_complete(asyncio.wait(pending))
    for client in cluster.clients:
        for task in client.tasks:
            if task.done() and not task.cancelled():
                task.exception()


def _take_apart(cluster: Cluster) -> None:
    """Cut the cycles of references, so that the memory of a schedule is free at once, without the garbage collector."""
    for task in cluster.tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            error.__traceback__ = error.__context__ = error.__cause__ = None
    loop = cluster.loop
    for client in cluster.clients:
        vars(client.storage).clear()
        vars(client).clear()
    vars(cluster.store).clear()
    vars(cluster).clear()
    loop.take_apart()


@cache
def _template(layout: Layout, content: bool) -> dict[str, Stored]:
    """A repository that was just created, and perhaps has an array."""
    loop = VirtualLoop()
    store = SimulatedStore(loop, CALM, random.Random(0))
    cluster = Cluster(loop, 0, random.Random(0), layout=layout, mix=CALM, objects={})
    cluster.store = store
    client = Client(cluster, "t", faulty=False)

    async def create() -> None:
        log = await create_repository(client.storage, layout, client.sources)
        await log.aclose()
        if content:
            await sessions.first_content(client)

    loop.run_until_complete(create())
    loop.close()
    return store.objects


@contextmanager
def _quiet() -> Iterator[None]:
    """Without logs, of which a simulation is full, and without the garbage collector, which finds little in it."""
    level, collecting = logging.root.manager.disable, gc.isenabled()
    if level < logging.CRITICAL:
        logging.disable(logging.CRITICAL)
    gc.disable()
    try:
        yield
    finally:
        if level < logging.CRITICAL:
            logging.disable(level)
        if collecting:
            gc.enable()
        if next(_runs) % 100 == 0:
            gc.collect()


_runs = itertools.count(1)
