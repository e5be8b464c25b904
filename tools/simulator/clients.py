"""What all actors of a simulation share: the store, how clients of it are made, and what they report."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from icechunk.errors import IcechunkError, StorageError
from icechunk.format.ids import FIRST_SNAPSHOT, ObjectId
from icechunk.format.values import ManifestFile
from icechunk.log.repository.entries.layout import LogLayout
from icechunk.log.repository.open import open_repository
from icechunk.runtime.clock import Sources
from tools.simulator.storage import Faults, SimulatedStorage, SimulatedStore, VirtualLoop

__all__ = ["Clients", "Report"]

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Report:
    """What happened under one seed."""

    seed: int
    acknowledged: set[ObjectId] = field(default_factory=set)
    failed: set[ObjectId] = field(default_factory=set)
    unknown: int = 0
    """Outcomes that were unknown at first."""
    conversions: int = 0
    crashes: int = 0
    pruned: int = 0
    collected: int = 0
    """Objects deleted by collections."""
    problems: list[str] = field(default_factory=list)
    """Broken promises; none, it is hoped."""


class Clients:
    """One store, and whoever comes to it."""

    def __init__(self, loop: VirtualLoop, seed: int, *, calm: bool, collect: bool) -> None:
        self.loop = loop
        self.collect = collect
        self.manifests: dict[ObjectId, tuple[ManifestFile, ...]] = {FIRST_SNAPSHOT: ()}
        self.rng = random.Random(seed)
        self.store = SimulatedStore(loop)
        self.report = Report(seed=seed)
        self.calm = calm

    def sources(self, skew_us: int = 0) -> Sources:
        """A client's clock and randomness."""
        rng = random.Random(self.rng.getrandbits(64))
        return Sources(
            wall_us=lambda: self.loop.now_us() + skew_us,
            elapsed_us=lambda: int(self.loop.time() * 1e6),
            random_bytes=rng.randbytes,
            sleep=asyncio.sleep,
        )

    def client(self, faults: Faults | None = None) -> tuple[SimulatedStorage, Sources]:
        """A new client's way to the store, and its sources."""
        usual = Faults(lost=0, late=0, doubled=0, dropped=0, pause=0) if self.calm else Faults()
        storage = SimulatedStorage(self.store, random.Random(self.rng.getrandbits(64)), faults or usual)
        return storage, self.sources(self.rng.randrange(-5_000_000, 5_000_000))

    def reliable(self) -> tuple[SimulatedStorage, Sources]:
        """The same, of a client whom no fault befalls."""
        return self.client(Faults(lost=0, late=0, doubled=0, dropped=0, pause=0))

    async def open(self, storage: SimulatedStorage, sources: Sources) -> LogLayout | None:
        """Open, patiently; None where the repository is not a log at present, again and again."""
        for _ in range(60):
            try:
                log = await open_repository(storage, sources)
            except StorageError:
                await asyncio.sleep(1)
                continue
            if isinstance(log, LogLayout):
                return log
            await log.aclose()
            await asyncio.sleep(30)
        return None

    async def quietly(self, action: Coroutine[Any, Any, T]) -> None:
        """What fails, fails."""
        try:
            await action
        except IcechunkError:
            return

    def crash(self, log: LogLayout) -> None:
        """Its client is gone, with all that it was about to do."""
        self.report.crashes += 1
        for task in log.tasks:
            task.cancel()
