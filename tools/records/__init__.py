"""Findings of runs that take too long to be repeated for every document: small files that commands write and read.

``mutants.json`` is kept by ``python -m tools.mutants``, ``runs.json`` by ``python -m tools.reliability``.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["commit_here"]


def commit_here(project: Path) -> str:
    """Short name of the commit that is checked out; with a plus where files differ from it."""
    said = [
        subprocess.run(["git", *words], cwd=project, capture_output=True, text=True).stdout.strip()
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "icechunk"])
    ]
    return said[0] + ("+" if said[1] else "")
