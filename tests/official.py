"""The official library's environment, for the tests that compare with it."""

from __future__ import annotations

import os

import pytest

from tools import oracle

__all__ = ["need_official"]


def need_official(version: str = oracle.OFFICIAL_CURRENT) -> None:
    """Skip the test without an environment of that version; make one instead where ``ICECHUNK_REQUIRE_ORACLE`` is 1."""
    if os.environ.get("ICECHUNK_REQUIRE_ORACLE") == "1":
        oracle.ensure(version)
    elif oracle.find(version) is None:
        pytest.skip(f"the official library has no environment here; `python tools/oracle.py {version}` makes one")
