"""The door to `icechunk.loadtest` in a checkout; it lives in the package so that a wheel has it."""

from __future__ import annotations
