"""The program `kubectl_complete-ingestrun`, which kubectl asks for completions of `kubectl ingestrun` (cobra's form).

It is given the words so far, the last of them unfinished, and prints a candidate a line, then a colon and a directive.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from ingestrun.cli.arguments import DRY_RUNS, Parser, add_cluster_flags
from ingestrun.cli.errors import CliError
from ingestrun.cli.main import COMMANDS
from ingestrun.cli.runs import Run
from ingestrun.cli.session import Session
from ingestrun.model.phase import Phase

NO_FILES: Final = ":4"
FILES: Final = ":0"
SECONDS: Final = "5s"
"""Time for which the shell waits for the API server at most."""
_NAMED: Final[dict[str, Callable[[Run], bool]]] = {
    "cancel": lambda run: not run.ended,
    "suspend": lambda run: not run.ended and run.phase != Phase.SUSPENDED,
    "unsuspend": lambda run: run.phase == Phase.SUSPENDED,
    "resume": lambda run: run.ended,
    "retry": lambda run: bool(run.ended and run.indexes("failed")),
    **dict.fromkeys(("status", "watch", "explain", "tree", "logs"), lambda run: True),
}
"""The runs whose names make sense, for each command that takes names."""


def main() -> None:
    """Print the completions of the command line."""
    try:
        found = completions(sys.argv[1:])
    except (CliError, SystemExit):
        found = [NO_FILES]
    sys.stdout.write("\n".join(found) + "\n")


def completions(words: Sequence[str]) -> list[str]:
    """Return the candidates and the directive for the words so far. Raises CliError."""
    *before, last = words or [""]
    if not before:
        return [f"{name}\t{text}" for name, (_, text) in COMMANDS.items() if name.startswith(last)] + [NO_FILES]
    if before[0] not in COMMANDS:
        return [NO_FILES]
    return _of_command(before[0], before, last)


def _of_command(command: str, before: Sequence[str], last: str) -> list[str]:
    """Return the candidates behind a command: values of a flag, flags, or names of runs."""
    parser: Parser = importlib.import_module(f"ingestrun.cli.commands.{COMMANDS[command][0]}").parser()
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    value_of = flags.get(before[-1])
    if last.startswith("--") and "=" in last:
        flag, _, begun = last.partition("=")
        return [f"{flag}={value}" for value in _values(flags.get(flag), before) if value.startswith(begun)] + [NO_FILES]
    if value_of is not None and value_of.nargs is None:
        files = value_of.metavar == "FILE"
        return [FILES] if files else [*_beginning(_values(value_of, before), last), NO_FILES]
    if last.startswith("-"):
        return [f"{flag}\t{action.help}" for flag, action in flags.items() if flag.startswith(last)] + [NO_FILES]
    if command in _NAMED:
        return [*_beginning(_names(before, _NAMED[command]), last), NO_FILES]
    return [NO_FILES]


def _beginning(candidates: Iterable[str], last: str) -> list[str]:
    return [candidate for candidate in candidates if candidate.startswith(last)]


def _values(action: argparse.Action | None, before: Sequence[str]) -> Iterable[str]:
    """Return the values that a flag can have, as far as that is known."""
    if action is None:
        return ()
    if action.choices:
        return [str(choice) for choice in action.choices]
    if action.dest == "phase":
        return list(Phase)
    return DRY_RUNS if action.dest == "dry_run" else ()


def _names(before: Sequence[str], wanted: Callable[[Run], bool]) -> list[str]:
    """Return the names of runs that are not in the words yet. Raises CliError."""
    from ingestrun.cli.output import Output

    parser = Parser("complete", usage="", description="")
    add_cluster_flags(parser)
    given = [
        word
        for word, previous in zip(before, ["", *before], strict=False)
        if _is_cluster_flag(word) or ("=" not in previous and _is_cluster_flag(previous))
    ]
    options = parser.read([*given, "--request-timeout", SECONDS])
    session = Session(options, Output())
    runs = map(Run, session.api.runs(session.namespace).items)
    return [run.name for run in runs if wanted(run) and run.name not in before]


def _is_cluster_flag(word: str) -> bool:
    return word.partition("=")[0] in ("-n", "--namespace", "--context", "--kubeconfig", "--as", "--as-group")
