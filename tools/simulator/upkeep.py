"""The actors of a simulation who keep a repository in order, or turn it into another: they write no commits."""

from __future__ import annotations

import asyncio
import contextlib
import random

from icechunk.errors import IcechunkError
from icechunk.log.repository.entries.checkpoint import convert_to_log
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.open import open_repository
from icechunk.maintenance.collect import collect_garbage
from icechunk.maintenance.expire import expire
from icechunk.maintenance.prune import prune_log
from icechunk.maintenance.reachability import Limits
from tools.simulator.clients import Clients
from tools.simulator.files import missing_files
from tools.simulator.storage import DAY_S

__all__ = ["auditor", "collector", "converter", "pruner"]


async def pruner(clients: Clients, rounds: int) -> None:
    """Prunes the log now and then."""
    for _ in range(rounds):
        storage, sources = clients.client()
        log = await clients.open(storage, sources)
        if log is not None:
            with contextlib.suppress(IcechunkError):
                clients.report.pruned += await prune_log(log, storage, sources)
            await log.aclose()
        await asyncio.sleep(clients.rng.choice((0.5, 3, 7.5)) * DAY_S)


async def collector(clients: Clients, rounds: int) -> None:
    """Expires snapshots and collects garbage, and sometimes dies on the way."""
    rng = random.Random(clients.rng.getrandbits(64))
    limits = Limits(max_concurrent_deletes=2, max_concurrent_manifest_fetches=4, max_snapshots_in_memory=4)
    for _ in range(rounds):
        await asyncio.sleep(rng.choice((5, 3600, 2 * DAY_S)) * rng.random())
        storage, sources = clients.client()
        log = await clients.open(storage, sources)
        if log is None:
            continue
        age_s = rng.choice((0, 5, 600, DAY_S, 5 * DAY_S))
        if rng.random() < 0.6:
            old_us = clients.loop.now_us() - int(age_s * 1e6)
            await clients.quietly(
                expire(
                    log,
                    storage,
                    older_than_us=old_us,
                    delete_expired_branches=False,
                    delete_expired_tags=False,
                    level=1,
                )
            )
        task = asyncio.ensure_future(
            collect_garbage(
                log,
                storage,
                sources,
                older_than_us=clients.loop.now_us() - int(age_s * 1e6),
                limits=limits,
                dry_run=False,
            )
        )
        if rng.random() < 0.2:
            # It dies on the way.
            await asyncio.sleep(rng.uniform(0, 3))
            task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            result = task.result()
            clients.report.collected += result.snapshots_deleted + result.chunks_deleted
        elif not task.cancelled() and not isinstance(task.exception(), IcechunkError):
            clients.report.problems.append(f"a collection failed: {task.exception()!r}")
        await log.aclose()


async def auditor(clients: Clients, rounds: int) -> None:
    """Looks whether what history needs is there, also between collections."""
    rng = random.Random(clients.rng.getrandbits(64))
    for _ in range(rounds):
        await asyncio.sleep(rng.choice((5, 3600, 2 * DAY_S)) * rng.random())
        storage, sources = clients.reliable()
        log = await clients.open(storage, sources)
        if log is None:
            continue
        missing = missing_files(log.state, clients.store.contents() | log.view.carried.all())
        if missing:
            # Unless they left the history in the meantime.
            state = await log.refresh()
            still = {key for _, key in missing_files(state, clients.store.contents() | log.view.carried.all())}
            if lost := still & {key for _, key in missing}:
                clients.report.problems.append(f"{len(lost)} files are lost that history needs")


async def converter(clients: Clients, rounds: int) -> None:
    """Makes the log a repo object, and that a log again."""
    rng = random.Random(clients.rng.getrandbits(64))
    for _ in range(rounds):
        await asyncio.sleep(rng.uniform(0.2, 3) * DAY_S)
        storage, sources = clients.client()
        log = await clients.open(storage, sources)
        if log is None:
            continue
        task = asyncio.ensure_future(log.convert_to_repo_object())
        await asyncio.wait({task}, timeout=rng.choice((0.2, 1000)))
        if not task.done():
            # It dies after its seal, perhaps: whoever comes next finishes what it began.
            clients.crash(log)
            task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()
        clients.report.conversions += 1
        await asyncio.sleep(rng.uniform(0, 60))
        reliable, clock = clients.reliable()
        if not isinstance(await open_repository(reliable, clock), LogLayout):
            await convert_to_log(reliable, clock)
