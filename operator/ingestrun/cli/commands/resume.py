"""`resume`: a new run that does the rest of an ended one, by spec.resumeFrom."""

from __future__ import annotations

from ingestrun.cli.arguments import Parser, add_cluster_flags, add_dry_run_flag, add_output_flag, run_name
from ingestrun.cli.commands.suspend import dry_run_words
from ingestrun.cli.errors import ExitCode, UsageError
from ingestrun.cli.resuming import checked, next_name, resuming_run
from ingestrun.cli.runs import Json, Run
from ingestrun.cli.session import Session


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        "resume",
        usage="NAME [--name NEW] [flags]",
        description="Create a run that does the rest of an ended one: what is published is not done again.\n"
        "It waits until the last pod of the ended run has ended.",
        examples="kubectl ingestrun resume flights\nkubectl ingestrun resume flights --dry-run=client -o yaml",
    )
    add_resume_flags(made)
    return made


def add_resume_flags(made: Parser) -> None:
    """Add the flags that `resume` and `retry` share."""
    made.add_argument("name", metavar="NAME", help="the ended run")
    made.add_argument("--name", dest="new_name", metavar="NEW", help="the new run's name (default: the next number)")
    made.add_argument("--parallelism", type=int, metavar="NUMBER", help="batches in flight, if not as before")
    made.add_argument("--retries", type=int, metavar="NUMBER", help="retries of a stage, if not as before")
    made.add_argument("--limit", type=int, metavar="ROWS", help="most rows in all, if not as before")
    made.add_argument("--suspend", action="store_true", help="create it suspended")
    add_dry_run_flag(made)
    add_output_flag(made, "name", "json", "yaml")
    add_cluster_flags(made)


def run(session: Session) -> ExitCode:
    """Create the run."""
    return resume(session, failed=False)


def resume(session: Session, *, failed: bool) -> ExitCode:
    """Create a run that resumes the named one. Raises CliError."""
    options, namespace = session.options, session.namespace
    ended = checked(Run(session.api.run(namespace, run_name(options.name))[0]), failed=failed)
    if options.new_name:
        name = run_name(options.new_name)
    else:
        name = next_name(ended.name, {item["metadata"]["name"] for item in session.api.runs(namespace).items})
    body = resuming_run(
        ended,
        name,
        parallelism=options.parallelism,
        limit=options.limit,
        retries=options.retries,
        suspend=options.suspend,
    )
    return create(session, body, f"created, resumes {ended.name}")


def create(session: Session, body: Json, done: str) -> ExitCode:
    """Create a run and print it in the form that is asked for. Raises CliError."""
    options, output = session.options, session.output
    made = body
    namespace = body["metadata"].get("namespace") or session.namespace
    if options.namespace not in (None, namespace):
        text = f'the namespace from the provided object "{namespace}" does not match "{options.namespace}"'
        raise UsageError(f"{text}. You must pass '--namespace={namespace}' to perform this operation.")
    if options.dry_run != "client":
        made = session.api.create(namespace, body, dry_run=options.dry_run == "server")
    if options.output in ("json", "yaml"):
        output.data(made, options.output)
    else:
        name = made["metadata"].get("name") or f"{made['metadata'].get('generateName', '')}<number>"
        reference = f"ingestrun.ingestrun.dev/{name}"
        output.write(reference if options.output == "name" else f"{reference} {done}{dry_run_words(session)}")
    return ExitCode.OK
