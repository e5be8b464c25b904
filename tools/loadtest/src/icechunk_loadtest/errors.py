"""What ends a load test early, with one line for whoever started it."""

from __future__ import annotations

__all__ = ["LoadTestError"]


class LoadTestError(Exception):
    """Bad input, or a machine that lacks something; the message says what to do. The exit code is 2."""
