"""`suspend`: nothing new is started for runs until they are unsuspended."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from ingestrun.cli.arguments import (
    Parser,
    add_cluster_flags,
    add_dry_run_flag,
    add_output_flag,
    add_selection,
    selection_of,
)
from ingestrun.cli.errors import CliError, ConflictError, ExitCode, gravest
from ingestrun.cli.runs import Run
from ingestrun.cli.session import Session, side_by_side
from ingestrun.model.names import RunKey

SUSPEND: Final = {"spec": {"suspend": True}}


def parser() -> Parser:
    """Return the parser."""
    return switch_parser("suspend", "Start nothing new for runs until they are unsuspended; running stages may finish.")


def switch_parser(command: str, description: str) -> Parser:
    """Return the parser of `suspend`, and of `unsuspend`."""
    made = Parser(
        command,
        usage="(NAME... | -l LABELS | --all) [flags]",
        description=description,
        examples=f"kubectl ingestrun {command} flights\nkubectl ingestrun {command} -l team=geo",
    )
    add_selection(made, command)
    add_dry_run_flag(made)
    add_output_flag(made, "name", "json", "yaml")
    add_cluster_flags(made, all_namespaces=True)
    return made


def run(session: Session) -> ExitCode:
    """Suspend the runs."""
    return switch(session, SUSPEND, "suspended")


def switch(session: Session, patch: dict[str, Any], done: str) -> ExitCode:
    """Send the patch to each selected run, tell what has come of it, and return the gravest exit code."""
    options, output = session.options, session.output
    selection = selection_of(options)
    keys = [RunKey(namespace=session.namespace, name=name) for name in selection.names]
    if not keys:
        listed = session.api.runs(session.scope, selector=selection.selector)
        keys = [found.key for found in map(Run, listed.items) if not found.ended]
        if not keys:
            session.complain_of_none("active ")
            return ExitCode.OK
    results = side_by_side(partial(_switched, session, patch), keys)
    bodies = [result.body for result in results if isinstance(result, Run)]
    _tell(session, results, done)
    if options.output in ("json", "yaml"):
        one = selection.one and len(bodies) == 1
        output.data(bodies[0] if one else {"apiVersion": "v1", "kind": "List", "items": bodies}, options.output)
    return gravest(result.code if isinstance(result, CliError) else ExitCode.OK for result in results)


def _tell(session: Session, results: Iterable[Run | CliError], done: str) -> None:
    """Tell the outcome of each run."""
    options, output = session.options, session.output
    for result in results:
        if isinstance(result, CliError):
            output.complain(str(result))
        elif options.output == "name":
            output.write(result.reference)
        elif not options.output:
            output.write(f"{result.reference} {done}{dry_run_words(session)}")


def dry_run_words(session: Session) -> str:
    """Return what kubectl adds to a message of a dry run."""
    return {"server": " (server dry run)", "client": " (dry run)"}.get(session.options.dry_run, "")


def _switched(session: Session, patch: dict[str, Any], key: RunKey) -> Run | CliError:
    """Return the run as it is then, or why it was refused."""
    try:
        found = Run(session.api.run(key.namespace, key.name)[0])
        if found.ended:
            return ConflictError(f'run "{key.name}" is already {found.phase}')
        if session.options.dry_run == "client":
            return found
        return Run(session.api.patch(key.namespace, key.name, patch, dry_run=session.options.dry_run == "server"))
    except CliError as error:
        return error
