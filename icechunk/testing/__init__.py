"""Helpers for tests of this package and of packages that are built on it.

Simulations: contract suites; recording, faulty and slow storages. For property tests with hypothesis: `strategies`,
`trees`, `models`, `invariants` and `utils`, under the names that the official library gives them. Not here: tests
(`tests/`), the simulator (`tools/simulator/`), and anything that the engine imports.
"""

from __future__ import annotations

from icechunk.testing.latency import LatencyStorage

__all__ = ["LatencyStorage"]
