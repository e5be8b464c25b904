"""The actors of a simulation that maintain a repository, or convert it to another layout: they write no commits."""

from __future__ import annotations

import asyncio
from typing import Final

from icechunk.errors import IcechunkError
from icechunk.format.keys import REPO_KEY
from icechunk.log.repository.convert import convert_log
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.port import Layout, RepositoryLog
from icechunk.log.repository.ref_files.upgrade import upgrade
from icechunk.maintenance.collect import collect_garbage
from icechunk.maintenance.expire import expire
from icechunk.maintenance.limits import Limits
from icechunk.maintenance.prune import prune_log
from tools.simulator.cluster import Client, Cluster
from tools.simulator.files import missing_files
from tools.simulator.loop import DAY_S

__all__ = ["SAFE_AGE_S", "auditor", "collector", "converter", "lost_files", "pruner", "upgrader"]

SAFE_AGE_S: Final = 60 * DAY_S
"""Age of the cutoff in the layouts of the published format, so that no session from before it is still open."""


async def pruner(cluster: Cluster, rounds: int) -> None:
    """Prunes the log now and then."""
    for _ in range(rounds):
        await asyncio.sleep(cluster.rng.choice((0.5, 3, 7.5)) * DAY_S)
        client = cluster.client("p")
        log = await client.open()
        if log is not None:
            cluster.report.pruned += await client.run(prune_log(log, client.storage, client.sources)) or 0
            await client.run(log.aclose())


async def collector(cluster: Cluster, rounds: int) -> None:
    """Expires snapshots and collects garbage, and sometimes ends on the way."""
    rng = cluster.rng
    limits = Limits(max_concurrent_deletes=2, max_concurrent_manifest_fetches=4, max_snapshots_in_memory=4)
    for _ in range(rounds):
        longest_s = 90 * DAY_S if cluster.layout is not Layout.LOG else rng.choice((5, 3600, 2 * DAY_S))
        await asyncio.sleep(longest_s * rng.random())
        client = cluster.client("g")
        log = await client.open()
        if log is None:
            continue
        published = log.layout is not Layout.LOG
        age_s = SAFE_AGE_S if published else rng.choice((0, 5, 600, DAY_S, 5 * DAY_S))
        older_than_us = cluster.loop.now_us() - int(age_s * 1e6)
        if rng.random() < 0.6:
            await client.run(
                expire(
                    log,
                    client.storage,
                    client.sources,
                    older_than_us=older_than_us,
                    delete_expired_branches=False,
                    delete_expired_tags=False,
                    level=1,
                )
            )
        task = client.own(
            collect_garbage(
                log,
                client.storage,
                client.sources,
                older_than_us=older_than_us,
                limits=limits,
                dry_run=False,
            )
        )
        if rng.random() < 0.2:
            await asyncio.sleep(rng.uniform(0, 3))
            client.crash()
        await client.cluster.loop.finished(task)
        if client.dead:
            continue
        if task.exception() is None:
            result = task.result()
            cluster.report.collected += result.snapshots_deleted + result.chunks_deleted
        await client.run(log.aclose())


async def auditor(cluster: Cluster, rounds: int) -> None:
    """Looks whether what history needs is there, also between collections."""
    rng = cluster.rng
    for _ in range(rounds):
        await asyncio.sleep((40 * DAY_S if cluster.layout is not Layout.LOG else DAY_S) * rng.random())
        client = cluster.client("a", faulty=False)
        log = await client.open()
        if log is None:
            continue
        if await lost_files(cluster, log) and (lost := await lost_files(cluster, log)):
            # Even now: they did not just leave the history.
            cluster.problem(f"{len(lost)} files are lost that history needs: {sorted(lost)[0]}")
        await log.aclose()


async def lost_files(cluster: Cluster, log: RepositoryLog) -> set[str]:
    """Keys of files that the newest history needs, and that are neither objects nor embedded."""
    state = await log.refresh()
    if log.layout is Layout.REFS:
        state = await log.learn(sorted(state.tips()), ancestry=True)
    objects = cluster.store.contents()
    if isinstance(log, LogLayout):
        objects |= log.view.embedded.all()
    return {key for _, key in missing_files(state, objects)}


async def converter(cluster: Cluster, rounds: int) -> None:
    """Makes the log a repo object, and that a log again."""
    rng = cluster.rng
    for _ in range(rounds):
        await asyncio.sleep(rng.choice((0.0001, 1, 3)) * DAY_S * rng.random())
        client = cluster.client("v")
        log = await client.open()
        if log is None:
            continue
        target = Layout.REPO if log.layout is Layout.LOG else Layout.LOG
        task = client.own(convert_log(log, client.storage, client.sources, target))
        # It may crash after its seal: the next client finishes the conversion.
        await _until(client, task, rng.choice((0.2, 1000)))
        cluster.report.conversions += 1
        if not client.dead:
            await client.run(log.aclose())
    await _back_to_log(cluster, cluster.client("v", faulty=False))


async def _back_to_log(cluster: Cluster, client: Client) -> None:
    log = await client.open()
    if log is not None and log.layout is Layout.REPO:
        await client.run(convert_log(log, client.storage, client.sources, Layout.LOG))
        await log.aclose()


async def _until(client: Client, task: asyncio.Task[None], seconds: float) -> None:
    """Wait for the end of what a client does; after a while it crashes."""
    await asyncio.wait({task}, timeout=seconds)
    if not task.done():
        client.crash()
        await client.cluster.loop.finished(task)
    if task.cancelled():
        return
    if (error := task.exception()) is not None and not isinstance(error, IcechunkError) and not client.dead:
        raise error


async def upgrader(cluster: Cluster, tries: int) -> None:
    """Upgrades a repository of format 1, perhaps in several tries."""
    rng = cluster.rng
    for _ in range(tries):
        await asyncio.sleep(rng.choice((1, 600, DAY_S)) * rng.random())
        client = cluster.client("u")
        task = client.own(upgrade(client.storage, client.sources, dry_run=False, delete_ref_files=True))
        await _until(client, task, rng.choice((0.1, 1000)))
    if REPO_KEY in cluster.store.objects:
        # An upgrade that was begun is finished: until then no client can change the repository.
        client = cluster.client("u", faulty=False)
        await client.run(upgrade(client.storage, client.sources, dry_run=False, delete_ref_files=True))
    cluster.report.conversions += 1
