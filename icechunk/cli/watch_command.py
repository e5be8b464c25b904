"""``icechunk watch``: the feed of a repository on standard output, or handed to a command, event by event."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from typing import Any

from icechunk.cli.terminal import Failure
from icechunk.repository.watch import RepositoryEvent
from icechunk.runtime import json_codec

__all__ = ["add_options", "as_json", "watch"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command, besides the repository."""
    parser.add_argument("--branch", help="only events of this branch")
    parser.add_argument("--since", metavar="TOKEN", help="begin behind this token; '' with the oldest (default: now)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--exec",
        metavar="CMD",
        help="run a shell command for each event, with the JSON on its standard input; a failing one ends the watch",
    )
    parser.add_argument(
        "--changes", action="store_true", help="with --json or --exec: the boxes of chunks that changed"
    )
    parser.add_argument("--idle", metavar="S", type=float, default=5.0, help="longest pause between looks (default: 5)")
    parser.add_argument("--stop-at-end", action="store_true", help="end once all events until now are printed")


def watch(repo: Any, args: argparse.Namespace) -> int:
    """Print events until interrupted, or as far as the arguments say."""
    if args.branch is not None and args.branch not in repo.list_branches():
        print(
            f"icechunk: there is no branch {args.branch!r} now; it may have been deleted, or be created later",
            file=sys.stderr,
        )
    events = repo.watch_sync(
        args.branch, since=args.since, idle_s=args.idle, stop_at_end=args.stop_at_end, with_changes=args.changes
    )
    handled = args.since
    for event in events:
        line = json_codec.dumps(as_json(event)).decode()
        if args.exec:
            done = subprocess.run(args.exec, shell=True, input=f"{line}\n", text=True, check=False)
            if done.returncode:
                raise Failure(
                    f"{args.exec!r} ended with status {done.returncode} for event {event.kind} of {event.at}; "
                    f"{_how_to_go_on(handled)}"
                )
        print(line if args.json else _as_text(event), flush=True)
        handled = event.token
    return 0


def _how_to_go_on(token: str | None) -> str:
    if token is None:
        return "no event before it was handled, so there is no token to go on with: --since '' begins with the oldest"
    return f"the events before it were handled: go on with --since {shlex.quote(token)}"


def as_json(event: RepositoryEvent) -> dict[str, Any]:
    """An event as JSON values."""
    found: dict[str, Any] = {"kind": str(event.kind), "at": event.at.isoformat(), "token": event.token}
    names = ("branch", "tag", "snapshot_id", "previous_snapshot_id")
    found |= {name: value for name in names if (value := getattr(event, name)) is not None}
    if event.snapshot is not None:
        found |= {"message": event.snapshot.message, "metadata": event.snapshot.metadata}
    if event.changes is not None:
        found["changes"] = {
            "arrays": {
                change.path: {
                    "is_new": change.is_new,
                    "metadata_changed": change.metadata_changed,
                    "boxes": [[[side.start, side.stop] for side in box] for box in change.boxes],
                }
                for change in event.changes
            },
            "deleted": event.changes.deleted,
            "moved": event.changes.moved,
        }
    return found


def _as_text(event: RepositoryEvent) -> str:
    message = event.snapshot.message.partition("\n")[0] if event.snapshot is not None else ""
    parts = (
        f"{event.at:%Y-%m-%d %H:%M:%S}",
        f"{event.kind:<14}",
        event.branch or event.tag or "",
        event.snapshot_id or "",
    )
    return " ".join(filter(None, (*parts, message))).rstrip()
