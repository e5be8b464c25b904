"""Helpers for tests of this package and of what is built on it: contract suites, recording and faulty storages."""

from __future__ import annotations

from icechunk.testing.latency import LatencyStorage

__all__ = ["LatencyStorage"]
