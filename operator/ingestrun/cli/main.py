"""The command `kubectl ingestrun`: it finds the command's module, runs it, and ends with its exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final, NoReturn, Protocol

from ingestrun.cli.errors import CliError, ExitCode, UsageError

INTERRUPTED: Final = 130
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "list": ("list", "List runs; --phase Cancelled: when, by whom and why"),
    "status": ("status", "Show the progress of a run, and what is retried and why"),
    "watch": ("watch", "Follow the progress of a run until it ends"),
    "explain": ("explain", "Tell why nothing new is started for a run now, and what helps"),
    "history": ("history", "List the ended runs: how, when and why they ended, what they published"),
    "tree": ("tree", "Show a run with the runs below it"),
    "cancel": ("cancel", "Cancel runs: nothing is started for them any more"),
    "suspend": ("suspend", "Start nothing new for runs until they are unsuspended"),
    "unsuspend": ("unsuspend", "Let suspended runs go on"),
    "resume": ("resume", "Create a run that does the rest of an ended one"),
    "retry": ("retry", "Create a run that does the failed batches of an ended one again"),
    "run": ("run", "Create a run, from a file or from flags"),
    "logs": ("logs", "Print the logs of a run's pods"),
    "cleanup": ("cleanup", "Cancel runs that make no progress"),
}
"""The module in `ingestrun.cli.commands` of each command, and its help."""


class CommandModule(Protocol):
    """A module of a command."""

    def parser(self) -> object:
        """Return its parser."""

    def run(self, words: Sequence[str]) -> ExitCode:
        """Run it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # By default the process would end at once, and leave its folder with the user's key behind.
        signal.signal(number, _end)
    try:
        code = int(run(words))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python would complain of it once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = int(ExitCode.OK)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def _end(number: int, _: object) -> NoReturn:
    """End the process as a shell expects it of this signal, but with all that is done at an end."""
    sys.exit(128 + number)


def run(words: Sequence[str]) -> ExitCode:
    """Run the command line, print its errors, and return the exit code."""
    from ingestrun.cli.output import Output

    output = Output()
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "help"):
        output.write(overview())
        return ExitCode.OK
    if command in ("--version", "version"):
        from ingestrun import __version__

        output.write(f"kubectl-ingestrun {__version__}")
        return ExitCode.OK
    try:
        return _run_command(command, words[1:], output)
    except CliError as error:
        output.complain(str(error))
        return error.code


def _run_command(command: str, words: Sequence[str], output: object) -> ExitCode:
    from ingestrun.cli.session import Session

    if command not in COMMANDS:
        what = "unknown flag" if command.startswith("-") else "unknown command"
        raise UsageError(f"{what}: {command}\nSee 'kubectl ingestrun --help' for usage.")
    module = importlib.import_module(f"ingestrun.cli.commands.{COMMANDS[command][0]}")
    options = module.parser().read(words)
    code: ExitCode = module.run(Session(options, output))  # type: ignore[arg-type]
    return code


def overview() -> str:
    """Return the help about all commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "Watch, cancel and resume IngestRuns.",
            "",
            "Usage:",
            "  kubectl ingestrun COMMAND [flags]",
            "",
            "Commands:",
            *lines,
            "",
            "Use 'kubectl ingestrun COMMAND --help' for more about a command.",
        ]
    )
