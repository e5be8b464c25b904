"""The official library for interop tests and benchmarks: runs modules of ``tools`` in an environment of its own.

``icechunk_loadtest.oracle``, in the load test's distribution, finds and makes the environments; its names are here too.

From a shell: ``python tools/oracle.py 2.3.0`` prints the path of the python.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
# works where the load test is not installed, e.g. in CI before anything is
sys.path.insert(0, str(PROJECT / "tools" / "loadtest" / "src"))

from icechunk_loadtest.oracle import (  # noqa: E402
    OFFICIAL_CURRENT,
    OFFICIAL_FORMAT_1,
    OracleUnavailable,
    ensure,
    environment,
    find,
    main,
)

__all__ = [
    "OFFICIAL_CURRENT",
    "OFFICIAL_FORMAT_1",
    "PROJECT",
    "OracleError",
    "OracleUnavailable",
    "Resident",
    "ensure",
    "environment",
    "find",
    "run",
]


class OracleError(RuntimeError):
    """A script failed inside the official library's environment; the message ends with its standard error."""


def run(version: str, module: str, *args: str, stdin: Any = None, timeout_s: float = 120.0) -> Any:
    """Run a module of ``tools`` with the official `version` and return what it printed last, read as JSON.

    Parameters
    ----------
    module
        A module below ``tools`` that runs with ``python -m``, e.g. ``"tools.interop.dump"``; its ``import icechunk``
        finds the official library.
    args
        Its arguments.
    stdin
        Given to it as JSON on standard input, unless None.
    timeout_s
        Seconds until it is killed.

    Raises
    ------
    OracleUnavailable
        As in `ensure`.
    OracleError
        It failed, timed out, or its last line is not JSON.
    """
    python = ensure(version)
    what = f"{module} with icechunk {version}"
    # a folder with nothing but `tools`: python puts it on sys.path, and ours holds our own icechunk too
    with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
        (Path(folder) / "tools").symlink_to(PROJECT / "tools")
        try:
            done = subprocess.run(
                [str(python), "-u", "-m", module, *args],
                input="" if stdin is None else json.dumps(stdin),
                capture_output=True,
                text=True,
                timeout=timeout_s,
                cwd=folder,
                env=environment(),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise OracleError(f"{what} took longer than {timeout_s} s") from error
    lines = done.stdout.strip().splitlines()
    # The official library sometimes crashes when its process ends; the result has been printed then.
    crashed_at_end = done.returncode == -signal.SIGSEGV and bool(lines)
    if done.returncode != 0 and not crashed_at_end:
        raise OracleError(f"{what} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise OracleError(f"{what} printed no JSON:\n{done.stdout[-2000:]}") from error


class Resident:
    """The official library in a process that stays, for many small calls. Close it, or use it as a context.

    Parameters
    ----------
    version
        As in `ensure`, with its errors.
    """

    def __init__(self, version: str = OFFICIAL_CURRENT) -> None:
        self.version = version
        self._folder = tempfile.TemporaryDirectory(prefix="oracle-")
        (Path(self._folder.name) / "tools").symlink_to(PROJECT / "tools")
        self._log = (Path(self._folder.name) / "log").open("w+")
        self._process = subprocess.Popen(
            [str(ensure(version)), "-m", "tools.interop.serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=self._folder.name,
            env=environment(),
        )

    def call(self, function: str, *arguments: Any) -> Any:
        """Call ``module:function`` there; arguments and result are JSON values. Raises `OracleError` if it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"call": function, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise OracleError(f"{function} ended the process of icechunk {self.version}:\n{self._log.read()[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise OracleError(f"{function} with icechunk {self.version}: {answer['type']}\n{answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
