"""The official library, in an environment of its own: found, or made.

The load test starts workers in it, the repository's interop tests and benchmarks run scripts in it; nothing of it is
ever imported here. An environment is a virtual environment with one pinned version of ``icechunk`` from PyPI, kept in a
cache folder and made at most once, also when several processes want it at the same time. This module needs nothing but
Python.

Environment variables
---------------------
ICECHUNK_ORACLE_23, ICECHUNK_ORACLE_11
    Path of a python that has the official 2.3.x or 1.1.x already; used as it is.
ICECHUNK_ORACLE_CACHE
    Where to keep the environments (default: ``~/.cache/aioicechunk/oracle``).

From a shell: ``python -m icechunk_loadtest.oracle 2.3.0`` prints the path of the python; a checkout has the same as
``python tools/oracle.py 2.3.0``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["OFFICIAL_CURRENT", "OFFICIAL_FORMAT_1", "OracleUnavailable", "ensure", "environment", "find", "main"]

OFFICIAL_CURRENT = "2.3.0"
"""The version whose API and format we match."""
OFFICIAL_FORMAT_1 = "1.1.21"
"""The last version that writes format 1 and installs on Python 3.11."""


class OracleUnavailable(RuntimeError):
    """The official library is not on this machine and cannot be installed; the message names what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """The recipe for the environment of one version."""

    override: str
    """Environment variable that names a ready python."""
    pythons: tuple[str, ...]
    """Python versions that will do, best first."""
    packages: tuple[str, ...]
    """Requirements to install besides ``icechunk`` itself."""


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
    python = _python(home)
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
    with _locked(home.with_name(f"{home.name}.lock")):
        if not find(version):
            if not (home / "ready").exists():
                shutil.rmtree(home, ignore_errors=True)
            _make(home, version, recipe)
            (home / "ready").write_text(" ".join(recipe.packages))
    return _python(home)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; where the system has no ``flock``, two processes may both make an environment."""
    with path.open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def environment() -> dict[str, str]:
    """The environment variables of a process of the official library: nothing of ours on its path, quiet logs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "ICECHUNK_LOG": "error", "PYTHONDONTWRITEBYTECODE": "1"}


def _home(version: str) -> Path:
    cache = os.environ.get("ICECHUNK_ORACLE_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "aioicechunk" / "oracle") / f"icechunk-{version}"


def _python(home: Path) -> Path:
    return home / "Scripts" / "python.exe" if os.name == "nt" else home / "bin" / "python"


def _make(home: Path, version: str, recipe: _Recipe) -> None:
    interpreter = next(_interpreters(recipe.pythons), None)
    if interpreter is None:
        raise OracleUnavailable(
            f"icechunk {version} needs Python {' or '.join(recipe.pythons)}, and none was found (looked at PATH, "
            f"~/.pyenv/versions and uv); install one, or set {recipe.override} to a python that has the library"
        )
    commands = [
        [str(interpreter), "-m", "venv", str(home)],
        [str(_python(home)), "-m", "pip", "install", "-q", f"icechunk=={version}", *recipe.packages],
    ]
    for command in commands:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment(), check=False
        )
        if done.returncode != 0:
            raise OracleUnavailable(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    if not _has(_python(home), version):
        raise OracleUnavailable(f"{home} was made, but has no working icechunk {version}")


_SEEN: set[tuple[Path, str]] = set()
"""Interpreters that had the version. They are not asked again: it takes a second, and the answer stays the same."""


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


def main(versions: Sequence[str]) -> int:
    """Print the python of each of the `versions` (the current one if there are none), made now where it is missing."""
    try:
        for version in versions or [OFFICIAL_CURRENT]:
            print(ensure(version))
    except OracleUnavailable as error:
        print(f"oracle: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
