"""Benchmarks, fuzzers, real components and the official library: what develops the package, and is never part of it."""
