"""The `icechunk` command.

Exit codes: 0 done, 1 the command failed (one line says why), or the demo's check failed, 2 bad input or, for the demo,
an environment that does not fit, 130 interrupted. A command imports its modules when it runs, so ``--help`` and
``--version`` answer at once. Not here: work that a program may want without a terminal, which is a method of the handle
(`repository`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from icechunk.cli.repositories import add_commands
from icechunk.cli.terminal import CommandError, Failure
from icechunk.storage.aliases import AliasError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv
        The arguments after the program's name; those of the process where None.
    """
    args = _parser().parse_args(argv)
    try:
        if args.version:
            print(_version())
            return 0
        if args.command == "demo":
            from icechunk.cli.demo import run

            return run(args)
        if args.run is not None:
            code: int = args.run(args)
            return code
        _parser().print_help()
        return 2
    except (Failure, AliasError) as error:
        return _refuse(str(error), code=1)
    except BrokenPipeError:
        # The reader of the pipe has closed it; the interpreter shall not complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except CommandError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("\nicechunk: interrupted; commits made so far are kept", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_expected(error):
            raise
        return _refuse(str(error) or type(error).__name__)


def _is_expected(error: Exception) -> bool:
    from icechunk.errors import IcechunkError

    return isinstance(error, IcechunkError | OSError)


def _refuse(message: str, *, code: int = 2) -> int:
    print("icechunk: " + " ".join(message.split()), file=sys.stderr)
    return code


def _version() -> str:
    from icechunk.runtime.about import API_VERSION, DISTRIBUTION, VERSION

    return f"{DISTRIBUTION} {VERSION} (icechunk API {API_VERSION})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="icechunk", description="A transactional storage engine for Zarr on object storage."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="ingest real NetCDF data in several commits, and read every version back",
        description="Ingest real NetCDF data (Met Office, NEMO) in several commits — initial load, append in time, a "
        "correction on a branch, a tag —, read every version back and compare it with the files bit for bit.",
    )
    where = demo.add_mutually_exclusive_group()
    where.add_argument("--path", metavar="DIR", help="make the repository here (default: a new temporary folder)")
    where.add_argument("--s3", action="store_true", help="use an S3 server inside this process (moto)")
    where.add_argument("--storage", metavar="URL", help="make the repository at s3://bucket/prefix")
    demo.add_argument("--endpoint-url", metavar="URL", help="with --storage: the endpoint, e.g. http://127.0.0.1:9000")
    demo.add_argument("--region", metavar="NAME", help="with --storage: the region (default: us-east-1)")
    demo.add_argument("--json", action="store_true", help="print the report as one JSON object")
    add_commands(commands)
    _add_help(commands, parser)
    return parser


def _add_help(commands: Any, parser: argparse.ArgumentParser) -> None:
    def run(args: argparse.Namespace) -> int:
        # Parsing prints the help of the named command and ends the program with code 0, or with 2 if there is no such.
        parser.parse_args([*args.of, "--help"])
        return 0

    asked = commands.add_parser("help", help="print this message or the help of a subcommand")
    asked.add_argument("of", nargs="*", metavar="COMMAND")
    asked.set_defaults(run=run)
