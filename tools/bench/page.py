"""The page of documents that shows the newest result of every case, and the file that it is made from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tools import oracle

__all__ = ["PAGE", "RESULTS", "text", "time_text", "write"]

PAGE: Final = Path(oracle.PROJECT) / "docs" / "benchmarks.md"
RESULTS: Final = Path(__file__).with_name("results.json")
"""Results by case: ``commit``, ``date``, ``machine``, and ``rows`` as `tools.bench` measures them."""

_HEAD: Final = """# Benchmarks

Made by `python -m tools.bench --write`, which measures this library and the official one (2.3.0) in one run, each case
in fresh processes in turn; the best of the repeats counts. Ratios above 1: this library is faster. A floor is what the
project asks of itself; rows below it are marked. `python -m tools.bench --only CASE` measures one case again, `--check`
fails below a floor, and `icechunk-loadtest` ([loadtest.md](loadtest.md)) measures on your own store.

On local disk this library waits for the disk with each change, and the official one with none. The rows "waits for the
disk alone" have the time that these waits take without any library: where it is near official's time for the whole row
above, the floor of that row is out of reach for a writer whose changes survive a power failure.
"""


def write(rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the results of the cases among these rows, and make the page anew."""
    known: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    measured = {str(row["case"]): [one for one in rows if one["case"] == row["case"]] for row in rows if "floor" in row}
    about = {"commit": _commit(), "date": datetime.now(UTC).date().isoformat(), "machine": _machine()}
    known |= {case: {**about, "rows": found} for case, found in measured.items()}
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(text(known), encoding="utf-8")


def text(results: Mapping[str, Any]) -> str:
    """The page."""
    lines = [_HEAD, "| case | what | ours | official | ratio | floor |", "|---|---|---|---|---|---|"]
    for case, found in sorted(results.items()):
        for row in found["rows"]:
            floor = "" if row["floor"] is None else f"{row['floor']:g}" + ("" if row["ok"] else " (below)")
            ratio = f"{row['times_as_fast']:.2f}"
            times = f"{time_text(row['ours_s'])} | {time_text(row['official_s'])}"
            lines.append(f"| {case} | {row['what']} | {times} | {ratio} | {floor} |")
    lines += ["", "| case | commit | date | machine |", "|---|---|---|---|"]
    lines += [f"| {case} | {f['commit']} | {f['date']} | {f['machine']} |" for case, f in sorted(results.items())]
    return "\n".join(lines) + "\n"


def time_text(seconds: float) -> str:
    """A time with its unit."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _commit() -> str:
    command = ["git", "-C", str(oracle.PROJECT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _machine() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} processors, {platform.system()}, load {os.getloadavg()[0]:.1f}"
