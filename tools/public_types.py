"""Whether type checkers know the type of every public name: ``python -m tools.public_types``; exit code 1 if not.

Runs ``basedpyright --verifytypes`` (of the group ``lint``; it brings its own Node) on the package that this Python
imports, and prints each name whose type is unknown, or inferred where another checker may infer a different one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["UNTYPED", "incomplete", "report_of"]

UNTYPED = {
    "icechunk.adapters.fsspec_files.IcechunkFileSystem": "its base class is of the extra fsspec, which has no types",
    "icechunk.adapters.zarr_url.IcechunkAdapter": "its base class is not in every zarr that we run with",
    "icechunk.dask.session_merge_reduction": "an array of dask has a type argument that dask leaves unknown",
}
"""Names that may have unknown types, with the reason."""


def report_of(package: str) -> Mapping[str, Any]:
    """The report of basedpyright on a package that this Python imports. Raises `RuntimeError` if there is none."""
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        [scripts / "basedpyright", "--verifytypes", package, "--ignoreexternal", "--outputjson"],
        # It asks the first Python of the path for the places to import from.
        env={**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        report: Mapping[str, Any] = json.loads(done.stdout)["typeCompleteness"]
    except (ValueError, KeyError):
        raise RuntimeError(f"basedpyright ended with {done.returncode}: {done.stdout}{done.stderr}") from None
    return report


def incomplete(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and reasons of every public name whose type is not known for certain."""
    for symbol in report["symbols"]:
        if symbol["isExported"] and not (symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]):
            yield symbol["name"], "; ".join(" ".join(said["message"].split()) for said in symbol["diagnostics"])


def main() -> int:
    report = report_of("icechunk")
    counts = report["exportedSymbolCounts"]
    found = [(name, reasons) for name, reasons in incomplete(report) if name not in UNTYPED]
    for name, reasons in found:
        print(f"{name}: {reasons or 'a part of it is in this list'}")
    known, names = counts["withKnownType"], sum(counts.values())
    if found:
        print("annotate where these are set (`self.size: int = size`), or give a reason in UNTYPED")
    print(f"{known} of {names} public names have known types; {len(found)} others without a reason")
    return 1 if found or not known else 0


if __name__ == "__main__":
    sys.exit(main())
