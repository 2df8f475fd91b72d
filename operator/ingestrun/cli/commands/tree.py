"""`tree`: runs with the runs below them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ingestrun.cli.arguments import Parser, add_cluster_flags, run_name
from ingestrun.cli.durations import human_duration
from ingestrun.cli.errors import CliError, ExitCode
from ingestrun.cli.follow import Follower
from ingestrun.cli.output import table
from ingestrun.cli.runs import Run
from ingestrun.cli.session import Session
from ingestrun.model.names import RunKey


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        "tree",
        usage="[NAME] [flags]",
        description="Show a run with the runs below it: those that name it in spec.parentRef, and those that it owns.\n"
        "Without a name: all runs that have runs below them.",
        examples="kubectl ingestrun tree nightly",
    )
    made.add_argument("name", nargs="?", metavar="NAME", help="the run at the top")
    add_cluster_flags(made)
    return made


def run(session: Session) -> ExitCode:
    """Print the tree."""
    follower = Follower(session.api, session.namespace)
    runs = sorted(follower.runs.values(), key=lambda found: found.name)
    name = session.options.name
    if name:
        top = follower.runs.get(RunKey(namespace=session.namespace, name=run_name(name)))
        if top is None:
            text = f'Error from server (NotFound): ingestruns.ingestrun.dev "{name}" not found'
            raise CliError(text, ExitCode.NOT_FOUND)
        tops = [top]
    else:
        parents = {parent for found in runs for parent in found.parents}
        tops = [
            found for found in runs if found.key in parents and not any(it in follower.runs for it in found.parents)
        ]
    if not tops:
        session.output.complain(f"No run in {session.namespace} namespace has runs below it.")
        return ExitCode.OK
    now = follower.clock.now()
    rows = [
        [f"{branch}{found.name}", found.phase, found.progress, found.reason, human_duration(found.age(now))]
        for top in tops
        for branch, found in branches(top, runs)
    ]
    session.output.write(table(["NAME", "PHASE", "BATCHES", "REASON", "AGE"], rows))
    return ExitCode.OK


def branches(top: Run, runs: Sequence[Run]) -> Iterator[tuple[str, Run]]:
    """Yield a run and the runs below it, each with the lines that lead to it; in a circle each run comes once."""
    seen: set[RunKey] = set()

    def below(found: Run, lead: str, stem: str) -> Iterator[tuple[str, Run]]:
        seen.add(found.key)
        yield lead, found
        children = [child for child in runs if found.key in child.parents and child.key not in seen]
        for child in children:
            last = child is children[-1]
            yield from below(child, f"{stem}{'└── ' if last else '├── '}", f"{stem}{'    ' if last else '│   '}")

    yield from below(top, "", "")
