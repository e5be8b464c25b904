"""The official library's own tests, on its wheel and on this package: which pass there and not here.

``python -m tools.official_suite`` downloads the source distribution of the official library from PyPI, of which nothing
is kept here, runs its tests in two environments with MinIO, and prints each test that passes on the wheel and fails on
ours, with the deliberate difference that explains it, or `UNEXPLAINED`; then it ends with status 1. It takes 20 to 40
minutes on two cores, and needs Python 3.12, MinIO (``python -m tools.services install minio``) and PyPI. Environments
and reports are kept in ``~/.cache/aioicechunk/official-suite``; ``--reuse wheel`` compares with the report of the last
run instead of running the wheel again.

The tests need a MinIO at port 4200 with three users, and a bucket. One of their passwords is too short for MinIO, and
is replaced. What needs the network is left out; what needs ``flatc`` fails on both.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from tools import oracle, services

__all__ = ["DELIBERATE", "compare", "reason"]

HOME = Path.home() / ".cache" / "aioicechunk" / "official-suite"
PORT = 4200
BUCKET = "testbucket"
LIBRARIES = ("wheel", "ours")
_PACKAGES = (
    "boto3",
    "boto3-stubs[s3]",
    "pytest==9.0.3",
    "pytest-cov",
    "pytest-asyncio",
    "pytest-xdist",
    "pytest-reportlog",
    "pytest-timeout",
    "dask>=2025.2.0",
    "distributed>=2025.2.0",
    "xarray>=2025.07.1",
    "hypothesis",
    "pandas-stubs",
    "termcolor",
    "rich",
    "flatbuffers",
    "zstandard",
    "scipy",
    "minio",
    "zarr==3.4.2",
)
_BACKEND = """
import os


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = "icechunk-{version}.dist-info"
    os.makedirs(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: icechunk\\nVersion: {version}\\n")
    return name
"""
"""Stands in for the build backend, which needs Rust: pip only downloads."""
_USERS = """
import sys

from minio import MinioAdmin
from minio.credentials import StaticProvider

endpoint, access, secret = sys.argv[1:]
admin = MinioAdmin(endpoint=endpoint, credentials=StaticProvider(access, secret), secure=False)
actions = ["s3:GetObject", "s3:ListBucket", "s3:GetBucketLocation"]
statement = {"Effect": "Allow", "Action": actions, "Resource": ["arn:aws:s3:::*"]}
admin.policy_add("reads", policy={"Version": "2012-10-17", "Statement": [statement]})
for user, password, policy in (
    ("readonly", "basicuser", "reads"),
    ("modify", "modifydata", "readwrite"),
    ("test123", "test12345", "readwrite"),
):
    admin.user_add(user, password)
    admin.policy_set(policy, user=user)
"""

_PLUGIN = """
from icechunk import IcechunkStore
from zarr.core.buffer import cpu, default_buffer_prototype


class Raw:
    def __init__(self, store):
        self.store = store

    async def set(self, key, data):
        await self.store.set(key, cpu.Buffer.from_bytes(data))

    async def get(self, key):
        return (await self.store.get(key, default_buffer_prototype())).to_bytes()


if not hasattr(IcechunkStore, "_store"):
    IcechunkStore._store = property(Raw)
"""
"""A private attribute that the tests use, and that this package does not have."""
_NETWORK = "not public_virtual_refs and not era5"

_LOG_LAYOUT = "the log layout: chunks share objects, a commit writes few manifests, small files are embedded in the log"
DELIBERATE: Mapping[str, str] = {
    r"test_attribution.py::test_attribution_survives_pickle": "a repository in memory refuses to pickle",
    r"test_attribution.py::test_requests_carry_attribution": "its server ignores If-None-Match, which is refused",
    r"test_can_read_old.py::test_icechunk_can_read_old_repo_v": "an endpoint that only the persisted config names",
    r"test_config.py::test_inline_chunks": "folders are made with the repository",
    r"test_config.py::test_no_inline_chunks\[no-spec-version\]": _LOG_LAYOUT,
    r"test_credentials.py::test_refreshable_credentials_errors": "no secrets in messages; types checked at once",
    r"test_display.py::.*test_manifest_config_shows_fields": "another default",
    r"test_error.py::.*manifest_file_altered\[no-spec-version\]": _LOG_LAYOUT,
    r"test_error.py::.*manifest_file_altered": "messages have no trace of spans",
    r"test_error.py::test_error_message_when_snapshot_deleted": "raised already when the session is opened",
    r"test_format_universality.py::test_chunks_are_valid_zstd": _LOG_LAYOUT,
    r"test_gc.py::test_expire_and_gc\[no-spec-version": _LOG_LAYOUT,
    r"test_inspect.py::test_inspect_reports_writing_library_version": "written_by names this package",
    # pytest's, here
    r"test_logs.py::test_(change_log_levels|debug_logs|warn_on_small)": "handlers of the application come first",
    r"test_manifest_splitting.py::.*\[no-spec-version\]": _LOG_LAYOUT,
    r"test_move.py::test_moves_amend": "net changes: moved and back is none, new and moved is new",
    r"test_pickle.py::test_pickle\[": "stores of one snapshot are equal, pickled or not",
    r"test_regressions.py::test_list_missing_array": "list_prefix takes a prefix",
    r"test_store_properties.py::test_list_prefix": "list_prefix takes a prefix",
    r"test_icechunk_store.py::.*test_get_partial_values": "SuffixByteRequest(n) is the last n bytes",
    r"test_timetravel.py::test_long_ops_log\[None\]": "a log needs no copies of `repo`",
}
"""Pattern of test ids to the reason why they fail here, which `docs/coming-from-the-official-library.md` has too."""


def reason(test: str) -> str | None:
    """The deliberate difference that makes a test fail here; None: it should pass."""
    return next((text for pattern, text in DELIBERATE.items() if re.search(pattern, test)), None)


def compare(wheel: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """The tests that pass on the wheel and not on ours, sorted.

    Parameters
    ----------
    wheel, ours
        Outcome (``passed``, ``failed`` or ``skipped``) by test.
    """
    return sorted(test for test, outcome in wheel.items() if outcome == "passed" and ours.get(test) != "passed")


def outcomes(report: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Outcome by test, and the last line of each failure, from a file of pytest-reportlog."""
    found: dict[str, str] = {}
    messages: dict[str, str] = {}
    for line in report.read_text().splitlines():
        record = json.loads(line)
        if record.get("$report_type") != "TestReport":
            continue
        test = record["nodeid"].partition("tests/")[2]
        # pytest counts the parameters that it has no names for; it has names for our enumeration.
        for i, name in enumerate(("VersionSelection.UseOurs", "VersionSelection.UseTheirs")):
            test = test.replace(name, f"on_chunk_conflict{i}")
        if record["outcome"] != "passed":
            found[test] = record["outcome"]
            messages.setdefault(test, _message(record.get("longrepr")))
        elif record["when"] == "call":
            found.setdefault(test, "passed")
    return found, messages


def _message(representation: object) -> str:
    if isinstance(representation, dict):
        crash = representation.get("reprcrash")
        return str(crash["message"] if crash else representation).splitlines()[0][:200]
    return str(representation).strip().splitlines()[-1][:200]


def _run(*command: object, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def _environment(library: str) -> Path:
    """The python of an environment of one of the libraries, made if there is none."""
    home = HOME / library
    python = home / "bin" / "python"
    packages = " ".join(_PACKAGES)
    ready = home / "ready"
    if not ready.exists() or ready.read_text() != packages:
        shutil.rmtree(home, ignore_errors=True)
        # Of the same version as the oracle's.
        _run(oracle.ensure(), "-m", "venv", home)
        what = [f"icechunk=={oracle.OFFICIAL_CURRENT}"] if library == "wheel" else ["-e", oracle.PROJECT]
        _run(python, "-m", "pip", "install", "-q", *_PACKAGES, *what)
        ready.write_text(packages)
    return python


def _sources(python: Path) -> Path:
    """A fresh copy of the tests of the official library."""
    version = oracle.OFFICIAL_CURRENT
    archive = HOME / f"icechunk-{version}.tar.gz"
    if not archive.exists():
        backend = HOME / "backend"
        backend.mkdir(parents=True, exist_ok=True)
        (backend / "maturin.py").write_text(_BACKEND.format(version=version))
        _run(
            *(python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "icechunk", "--no-build-isolation"),
            *("-d", HOME, f"icechunk=={version}"),
            env={**oracle.environment(), "PYTHONPATH": str(backend)},
        )
    folder = HOME / "sources"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (tests,) = folder.glob("*/icechunk-python")
    for path in (tests / "tests" / "conftest.py", tests / "tests" / "test_key_layout.py"):
        path.write_text(path.read_text().replace('"test123", "test123"', '"test123", "test12345"'))
    return tests


def run_suite(library: str, report: Path, *, workers: int, only: str) -> None:
    """Run the tests on one of the libraries; `report` has the outcomes."""
    python = _environment(library)
    tests = _sources(_environment("wheel"))
    with services.minio(port=PORT, buckets=[BUCKET]) as service:
        _run(python, "-c", _USERS, service.address, service.access_key, service.secret_key)
        command = [str(python), "-m", "pytest", "-c", "../pyproject.toml", "--rootdir", "..", "-o", "addopts="]
        command += ["-o", "log_cli=false", "-q", "-n", str(workers), "--timeout", "300", "--hypothesis-seed", "0"]
        command += ["-p", "no:cacheprovider", f"--report-log={report}", "tests"]
        command += ["-k", f"({_NETWORK}) and ({only or 'test'})"]
        if library == "ours":
            (HOME / "official_suite_plugin.py").write_text(_PLUGIN)
            command += ["-p", "official_suite_plugin"]
        environment = {**oracle.environment(), "PYTHONPATH": str(HOME), "DASK_MULTIPROCESSING__CONTEXT": "forkserver"}
        # Without byte code each of dask's many processes would compile all that it imports.
        del environment["PYTHONDONTWRITEBYTECODE"]
        environment.pop("CI", None)
        subprocess.run(command, cwd=tests, env=environment, check=False, stdout=sys.stderr)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.official_suite", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="of pytest-xdist (default 2)")
    parser.add_argument("--only", default="", help="an expression as for pytest's -k")
    parser.add_argument("--reuse", choices=LIBRARIES, nargs="*", default=[], help="take its last report")
    args = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    reports = {library: HOME / f"{library}.jsonl" for library in LIBRARIES}
    for library, report in reports.items():
        if library not in args.reuse:
            report.unlink(missing_ok=True)
            run_suite(library, report, workers=args.workers, only=args.only)
    (wheel, _), (ours, messages) = (outcomes(report) for report in reports.values())
    different = compare(wheel, ours)
    unexplained = 0
    for test in different:
        why = reason(test)
        unexplained += why is None
        print(f"{test}\n    {why or 'UNEXPLAINED: ' + messages.get(test, 'not run')}")
    passed = [test for test, outcome in wheel.items() if outcome == "passed"]
    print(
        f"{len(passed)} tests pass on the wheel, {len(passed) - len(different)} of them here; "
        f"{len(different) - unexplained} fail for a deliberate difference, {unexplained} for none"
    )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
