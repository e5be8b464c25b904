"""The subcommands of the official ``icechunk`` command: aliases, repositories, history, branches and tags."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from icechunk.cli.terminal import Failure, ask, choose
from icechunk.cli.watch_command import add_options, watch
from icechunk.errors import IcechunkError, NotFoundError
from icechunk.runtime.representation import redacted_url
from icechunk.storage.aliases import KINDS, AliasedRepository, AliasError, Aliases, aliases_path, new_entry, shown
from icechunk.storage.url import RepositoryUrl, parse_url

__all__ = ["add_commands"]

_QUESTIONS: Final = {
    "Local": ("path",),
    "S3": ("bucket", "prefix", "region"),
    "Tigris": ("bucket", "prefix", "region", "endpoint_url"),
    "GCS": ("bucket", "prefix"),
    "Azure": ("account", "container", "prefix"),
}


def add_commands(commands: Any) -> None:
    """Add the subcommands to a parser's; each sets ``run``, which takes the parsed arguments."""
    config = _group(commands, "config", "manage the aliases of repositories")
    init = _command(config, "init", "create a new file of aliases, interactively", _init)
    init.add_argument("-f", "--force", action="store_true", help="overwrite an existing one")
    add = _command(config, "add", "add a repository to the file, interactively; the file is created if need be", _add)
    _alias(add)
    _command(config, "list", "print the file", _list_config)

    repo = _group(commands, "repo", "manage repositories")
    _alias(_command(repo, "create", "create a repository", _create_repo))

    ancestry = _command(commands, "ancestry", "show the ancestry of a branch, tag or snapshot", _ancestry)
    _alias(ancestry)
    ancestry.add_argument("reference", nargs="?", help="branch, tag or snapshot id (default: main)")
    ancestry.add_argument("-n", metavar="N", type=_count, default=10, help="number of snapshots (default: 10)")

    watching = _command(commands, "watch", "print the events of a repository, as they happen", _watch)
    _alias(watching)
    add_options(watching)

    sessions = _group(commands, "session", "list, commit or abandon sessions that were persisted with a checkpoint")
    _alias(_command(sessions, "list", "list the sessions that have not ended", _list_sessions))
    for name, help, run in (
        (
            "commit",
            "commit a session as of its last checkpoint; a process that holds it is fenced",
            _commit_session,
        ),
        ("abandon", "end a session without a commit; its changes are dropped", _abandon_session),
    ):
        ending = _command(sessions, name, help, run)
        _alias(ending)
        ending.add_argument("id", help="id of the session, which `icechunk session list` prints")
        if name == "commit":
            ending.add_argument("-m", "--message", required=True, help="commit message")
            ending.add_argument(
                "--rebase", action="store_true", help="rebase if the branch has moved, unless the changes conflict"
            )

    for kind, start in (("branch", "from"), ("tag", "target")):
        group = _group(commands, kind, f"manage {kind}es" if kind == "branch" else "manage tags")
        _alias(_command(group, "list", f"list {'branches' if kind == 'branch' else 'tags'}", _list_refs, kind))
        create = _command(group, "create", f"create a {kind}", _create_ref, kind)
        _alias(create)
        create.add_argument("name", metavar=kind, help=f"name of the new {kind}")
        create.add_argument("target", metavar=start, help="branch, tag or snapshot id that it shall point to")
        for_good = "; its name can never be used again" if kind == "tag" else ""
        delete = _command(group, "delete", f"delete a {kind}{for_good}", _delete_ref, kind)
        _alias(delete)
        delete.add_argument("name", metavar=kind, help=f"name of the {kind}")


def _group(commands: Any, name: str, help: str) -> Any:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    return parser.add_subparsers(dest=f"{name}_command", metavar="COMMAND", required=True)


def _command(
    commands: Any, name: str, help: str, run: Callable[[argparse.Namespace], int], kind: str | None = None
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(run=run, kind=kind)
    return parser


def _alias(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "alias", help="alias of the repository, see `icechunk config`; or its URL or path, which has a slash in it"
    )


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of snapshots")
    return number


# --- aliases --------------------------------------------------------------------------------------------------


def _init(args: argparse.Namespace) -> int:
    path = aliases_path()
    # With --force a file that cannot be read is replaced.
    if args.force:
        path.unlink(missing_ok=True)
    aliases = Aliases(path)
    if len(aliases):
        raise Failure("Config already exists and contains repositories. Use --force to overwrite.")
    _ask_and_save(aliases, ask("alias"))
    return 0


def _add(args: argparse.Namespace) -> int:
    aliases = Aliases(aliases_path())
    if args.alias in aliases:
        raise Failure(f"Repository {shown(args.alias)} already exists")
    _ask_and_save(aliases, args.alias)
    return 0


def _ask_and_save(aliases: Aliases, alias: str) -> None:
    kind = choose("repository type", KINDS)
    answers = {name: ask(name.replace("_url", " URL"), required=name != "prefix") for name in _QUESTIONS[kind]}
    aliases.add(alias, new_entry(kind, answers))
    aliases.save()
    print(f"Added {shown(alias)} to {aliases.path}", file=sys.stderr)


def _list_config(args: argparse.Namespace) -> int:
    print(Aliases(aliases_path()).text())
    return 0


# --- repositories ---------------------------------------------------------------------------------------------


@contextmanager
def _failing_with(what: str) -> Iterator[None]:
    """Errors of the block end the command with one line: the step, and the reason why it failed."""
    try:
        yield
    except (IcechunkError, OSError, ValueError) as error:
        raise Failure(f"{what}: {' '.join(str(error).split())}") from error


def is_url(alias: str) -> bool:
    """Whether an argument is a URL or a path: aliases have neither slash nor bar nor colon."""
    return any(mark in alias for mark in "/\\|:")


def _named(alias: str) -> str:
    """A repository in a message: an alias as the official command writes it, a URL or path as it was given."""
    return redacted_url(alias) if is_url(alias) else shown(alias)


def _open(alias: str) -> Any:
    import icechunk

    with _failing_with(f"Failed to open repository {_named(alias)}"):
        if is_url(alias):
            url = parse_url(alias)
            if url.names_version or url.path:
                raise Failure(
                    f"{redacted_url(alias)} names a version or a path, and this command takes only the location, "
                    f"{redacted_url(url.place)}: give branches, tags and snapshots as its own arguments or options"
                )
            return icechunk.Repository.open(alias)
        found = _found(alias)
        return icechunk.Repository.open(found.storage, found.config)


def _found(alias: str) -> AliasedRepository:
    aliases = Aliases(aliases_path())
    try:
        return aliases.find(alias)
    except AliasError as error:
        if alias in aliases:
            raise
        raise Failure(f"{error}, or write ./{alias} for a folder") from error


def _at_version(args: argparse.Namespace) -> RepositoryUrl | None:
    """Take the version out of the argument for the repository; None: it is an alias, or a URL without a version."""
    if not is_url(args.alias):
        return None
    with _failing_with(f"Failed to open repository {_named(args.alias)}"):
        url = parse_url(args.alias)
    if not url.names_version or url.path:
        return None
    args.alias = url.place
    return url


def _create_repo(args: argparse.Namespace) -> int:
    import icechunk

    with _failing_with(f"❌ Failed to create repository {_named(args.alias)}"):
        if is_url(args.alias):
            icechunk.Repository.create(args.alias)
        else:
            found = _found(args.alias)
            icechunk.Repository.create(found.storage, found.config)
    print(f"✅ Created repository {_named(args.alias)}")
    return 0


def _watch(args: argparse.Namespace) -> int:
    given, url = args.alias, _at_version(args)
    if url is not None:
        if url.branch is None or args.branch not in (None, url.branch):
            raise Failure(f"cannot watch {redacted_url(given)}: only one branch can be watched; name it with --branch")
        args.branch = url.branch
    return watch(_open(args.alias), args)


def _resolve(repo: Any, reference: str) -> str:
    """The snapshot that a branch, a tag or an id names, tried in this order."""
    for look in (repo.lookup_branch, repo.lookup_tag):
        try:
            found: str = look(reference)
        except NotFoundError:
            continue
        return found
    try:
        found = repo.lookup_snapshot(reference).id
    except (NotFoundError, ValueError) as error:
        raise Failure(f"`{reference}` is not a valid snapshot id, branch, or tag") from error
    return found


def _tip(repo: Any, url: RepositoryUrl) -> str:
    """The snapshot that a URL names."""
    found: str = repo.readonly_session(**url.version).snapshot_id
    return found


def _ancestry(args: argparse.Namespace) -> int:
    given, url = args.alias, _at_version(args)
    if url is not None and args.reference is not None:
        raise Failure(f"{redacted_url(given)} names a version already; leave {args.reference} out")
    repo = _open(args.alias)
    with _failing_with(f"Failed to read the history of {_named(args.alias)}"):
        tip = _resolve(repo, args.reference or "main") if url is None else _tip(repo, url)
        for info in itertools.islice(repo.ancestry(snapshot_id=tip), args.n):
            written_at = info.written_at.astimezone()
            print(f"Snapshot: {info.id}\nDate: {written_at:%B} {written_at.day} {written_at:%Y  %H:%M:%S}\n")
            print("".join(f"  {line}\n" for line in _printable(info.message).split("\n")))
    return 0


def _list_refs(args: argparse.Namespace) -> int:
    repo = _open(args.alias)
    names, look = (
        (repo.list_branches, repo.lookup_branch) if args.kind == "branch" else (repo.list_tags, repo.lookup_tag)
    )
    with _failing_with(f"Failed to list {'branches' if args.kind == 'branch' else 'tags'}"):
        for name in sorted(names()):
            print(f"{look(name)}  {_printable(name)}")
    return 0


def _create_ref(args: argparse.Namespace) -> int:
    repo = _open(args.alias)
    with _failing_with(f'Failed to create {args.kind} "{args.name}" from "{args.target}"'):
        tip = _resolve(repo, args.target)
        if args.kind == "branch":
            repo.create_branch(args.name, tip)
            done = f'✅ Created branch "{args.name}" from "{args.target}"'
        else:
            repo.create_tag(args.name, tip)
            done = f'✅ Created tag "{args.name}" for {tip}'
    print(f"{done} in repository {_named(args.alias)}")
    return 0


def _delete_ref(args: argparse.Namespace) -> int:
    repo = _open(args.alias)
    with _failing_with(f'Failed to delete {args.kind} "{args.name}"'):
        (repo.delete_branch if args.kind == "branch" else repo.delete_tag)(args.name)
    print(f'✅ Deleted {args.kind} "{args.name}" in repository {_named(args.alias)}')
    return 0


def _list_sessions(args: argparse.Namespace) -> int:
    repo = _open(args.alias)
    with _failing_with("Failed to list sessions"):
        for one in repo.sessions():
            until = one.leased_until.astimezone()
            print(f"{one.id}  {_printable(one.branch)}  on {one.snapshot_id}  leased until {until:%Y-%m-%d %H:%M:%S}")
    return 0


def _commit_session(args: argparse.Namespace) -> int:
    from icechunk.conflicts import ConflictDetector

    repo = _open(args.alias)
    with _failing_with(f"Failed to commit session {args.id}"):
        session = repo.resume_session(args.id)
        branch = session.branch
        made = session.commit(args.message, rebase_with=ConflictDetector() if args.rebase else None)
    print(f'✅ Committed session {args.id} to branch "{branch}" as {made} in repository {_named(args.alias)}')
    return 0


def _abandon_session(args: argparse.Namespace) -> int:
    repo = _open(args.alias)
    with _failing_with(f"Failed to abandon session {args.id}"):
        repo.resume_session(args.id).abandon()
    print(f"✅ Abandoned session {args.id} in repository {_named(args.alias)}")
    return 0


def _printable(text: str) -> str:
    """The text without characters that act on the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
