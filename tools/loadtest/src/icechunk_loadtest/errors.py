"""The error that ends a load test early."""

from __future__ import annotations

__all__ = ["LoadTestError"]


class LoadTestError(Exception):
    """Bad input or a missing component; the message names the remedy. The exit code is 2."""
