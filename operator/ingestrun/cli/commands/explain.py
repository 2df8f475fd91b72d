"""`explain`: why nothing is started for a run now, and what helps."""

from __future__ import annotations

from ingestrun.cli.arguments import Parser, add_cluster_flags, add_output_flag, run_name
from ingestrun.cli.durations import human_duration
from ingestrun.cli.errors import ExitCode
from ingestrun.cli.explaining import explain
from ingestrun.cli.output import clean
from ingestrun.cli.runs import Run
from ingestrun.cli.session import Session


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        "explain",
        usage="NAME [flags]",
        description="Tell why nothing new is started for a run now, by what the operator has written into its status.",
        examples="kubectl ingestrun explain flights",
    )
    made.add_argument("name", metavar="NAME", help="the run")
    add_output_flag(made, "json", "yaml")
    add_cluster_flags(made)
    return made


def run(session: Session) -> ExitCode:
    """Print the explanation."""
    body, now = session.api.run(session.namespace, run_name(session.options.name))
    found = explain(Run(body))
    if session.options.output:
        session.output.data(found.to_json(), session.options.output)
        return ExitCode.OK
    since = f" for {human_duration(now - found.since)}" if found.since is not None else ""
    lines = [f"{found.run} is {found.phase}: {found.reason}{since}", f"  why:   {clean(found.message)}"]
    if found.hint:
        lines.append(f"  helps: {found.hint}")
    session.output.write("\n".join(lines))
    return ExitCode.OK
