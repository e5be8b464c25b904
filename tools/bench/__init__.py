"""Benchmarks: ratios against the official library, measured in one run on one machine."""
