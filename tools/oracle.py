"""The official library, in an environment of its own: found, or made.

Interop tests and benchmarks run scripts in it by subprocess; nothing of it is ever imported here. An environment is a
virtual environment with one pinned version of ``icechunk`` from PyPI, kept in a cache folder and made at most once,
also when several processes want it at the same time.

Environment variables
---------------------
ICECHUNK_ORACLE_23, ICECHUNK_ORACLE_11
    Path of a python that has the official 2.3.x or 1.1.x already; used as it is.
ICECHUNK_ORACLE_CACHE
    Where to keep the environments (default: ``~/.cache/aioicechunk/oracle``).

From a shell: ``python tools/oracle.py 2.3.0`` prints the path of the python.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "OFFICIAL_CURRENT",
    "OFFICIAL_FORMAT_1",
    "OracleError",
    "OracleUnavailable",
    "Resident",
    "ensure",
    "find",
    "run",
]

OFFICIAL_CURRENT = "2.3.0"
"""The version whose API and format we match."""
OFFICIAL_FORMAT_1 = "1.1.21"
"""The last version that writes format 1 and installs on Python 3.11."""

PROJECT = Path(__file__).resolve().parent.parent


class OracleUnavailable(RuntimeError):
    """The official library cannot be had on this machine; the message says what is missing."""


class OracleError(RuntimeError):
    """A script failed inside the official library's environment; the message ends with its standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """How to make the environment of one version."""

    override: str
    """Environment variable that names a ready python."""
    pythons: tuple[str, ...]
    """Python versions that will do, best first."""
    packages: tuple[str, ...]
    """What to install, besides ``icechunk`` itself."""


_RECIPES = {
    OFFICIAL_CURRENT: _Recipe(
        override="ICECHUNK_ORACLE_23",
        pythons=("3.12", "3.13", "3.14"),
        packages=("zarr==3.4.2", "xarray", "dask", "hypothesis"),
    ),
    OFFICIAL_FORMAT_1: _Recipe(
        override="ICECHUNK_ORACLE_11",
        pythons=("3.11", "3.12", "3.13"),
        packages=("zarr==3.1.6", "xarray"),
    ),
}


def find(version: str = OFFICIAL_CURRENT) -> Path | None:
    """The python of an environment with the official `version` that is there already, or None."""
    given = os.environ.get(_RECIPES[version].override)
    if given:
        return Path(given) if _has(Path(given), version) else None
    home = _home(version)
    python = home / "bin" / "python"
    return python if _is_ready(home, _RECIPES[version]) and python.exists() else None


def _is_ready(home: Path, recipe: _Recipe) -> bool:
    """Whether the environment was made to its end, with all that the recipe asks for today."""
    ready = home / "ready"
    return ready.exists() and ready.read_text() == " ".join(recipe.packages)


def ensure(version: str = OFFICIAL_CURRENT) -> Path:
    """The python of an environment with the official `version`, made now if there is none (about a minute).

    Parameters
    ----------
    version
        ``"2.3.0"`` or ``"1.1.21"``.

    Raises
    ------
    OracleUnavailable
        No interpreter of a fitting version, or the packages cannot be installed.
    """
    recipe = _RECIPES[version]
    given = os.environ.get(recipe.override)
    if given:
        if not _has(Path(given), version):
            raise OracleUnavailable(f"{recipe.override}={given} is no python with icechunk {version}")
        return Path(given)
    home = _home(version)
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_name(f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not find(version):
            if not (home / "ready").exists():
                shutil.rmtree(home, ignore_errors=True)
            _make(home, version, recipe)
            (home / "ready").write_text(" ".join(recipe.packages))
    return home / "bin" / "python"


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
                [str(python), "-m", module, *args],
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
    if done.returncode != 0:
        raise OracleError(f"{what} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    lines = done.stdout.strip().splitlines()
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


def environment() -> dict[str, str]:
    """The environment variables of a process of the official library: nothing of ours on its path, quiet logs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "ICECHUNK_LOG": "error", "PYTHONDONTWRITEBYTECODE": "1"}


def _home(version: str) -> Path:
    cache = os.environ.get("ICECHUNK_ORACLE_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "aioicechunk" / "oracle") / f"icechunk-{version}"


def _make(home: Path, version: str, recipe: _Recipe) -> None:
    interpreter = next(_interpreters(recipe.pythons), None)
    if interpreter is None:
        raise OracleUnavailable(
            f"icechunk {version} needs Python {' or '.join(recipe.pythons)}, and none was found (looked at PATH, "
            f"~/.pyenv/versions and uv); install one, or set {recipe.override} to a python that has the library"
        )
    commands = [
        [str(interpreter), "-m", "venv", str(home)],
        [str(home / "bin" / "python"), "-m", "pip", "install", "-q", f"icechunk=={version}", *recipe.packages],
    ]
    for command in commands:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment(), check=False
        )
        if done.returncode != 0:
            raise OracleUnavailable(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    if not _has(home / "bin" / "python", version):
        raise OracleUnavailable(f"{home} was made, but has no working icechunk {version}")


_SEEN: set[tuple[Path, str]] = set()
"""Pythons that had the version: nobody takes it away while tests run, and asking takes a second."""


def _has(python: Path, version: str) -> bool:
    if (python, version) not in _SEEN and _imports(python, version):
        _SEEN.add((python, version))
    return (python, version) in _SEEN


def _imports(python: Path, version: str) -> bool:
    try:
        done = subprocess.run(
            [str(python), "-c", "import icechunk; print(icechunk.__version__)"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
            env=environment(),
            check=False,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.strip() == version


def _interpreters(versions: Sequence[str]) -> Iterator[Path]:
    """Working interpreters of one of the `versions`, best first."""
    for version in versions:
        for candidate in _candidates(version):
            if _is_python(candidate, version):
                yield candidate


def _candidates(version: str) -> Iterator[Path]:
    if sys.version.startswith(f"{version}."):
        yield Path(sys.executable)
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    yield from sorted(root.glob(f"{version}.*/bin/python"), reverse=True)
    found = shutil.which(f"python{version}")
    if found:
        yield Path(found)
    uv = shutil.which("uv")
    if uv:
        done = subprocess.run(
            [uv, "python", "find", "--no-project", "--offline", version], capture_output=True, text=True, check=False
        )
        if done.returncode == 0 and done.stdout.strip():
            yield Path(done.stdout.strip())


def _is_python(candidate: Path, version: str) -> bool:
    # a pyenv shim exists for versions that are not active, and then fails
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run(
            [str(candidate), "-c", code], capture_output=True, text=True, timeout=30, check=False, env=environment()
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.strip() == version


if __name__ == "__main__":
    try:
        for wanted in sys.argv[1:] or [OFFICIAL_CURRENT]:
            print(ensure(wanted))
    except OracleUnavailable as error:
        sys.exit(f"oracle: {error}")
