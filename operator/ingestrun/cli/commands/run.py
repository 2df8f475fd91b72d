"""`run`: create a run, from a file or from flags."""

from __future__ import annotations

from ingestrun.cli.arguments import Parser, add_cluster_flags, add_dry_run_flag, add_output_flag, run_name
from ingestrun.cli.commands.resume import create
from ingestrun.cli.errors import CliError, ExitCode, UsageError, gravest
from ingestrun.cli.manifest import manifest_of_flags, manifests_of_file
from ingestrun.cli.session import Session


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        "run",
        usage="(-f FILE | NAME (--http URL | --files GLOB) --to PATH --claim NAME) [flags]",
        description="Create a run. Flags are for the built-in worker; a manifest can have every field.",
        examples="""
kubectl ingestrun run -f flights.yaml --watch
kubectl ingestrun run flights --http https://example.org/flights --records data --to flights --claim ingest
kubectl ingestrun run flights --files 'in/*.csv' --to flights --claim ingest --dry-run=client -o yaml
""",
    )
    made.add_argument("name", nargs="?", metavar="NAME", help="the run's name")
    made.add_argument("-f", "--filename", metavar="FILE", help="a manifest; - is the standard input")
    made.add_argument("-w", "--watch", action="store_true", help="follow the run until it ends")
    made.add_argument("--http", metavar="URL", help="read JSON records from this address")
    made.add_argument("--records", metavar="PATH", help="path of the records in the response, such as data.items")
    made.add_argument(
        "--pagination",
        metavar="KIND",
        default="page",
        help="page (default), offset, link, or cursor=PATH with the path of the next cursor in the response",
    )
    made.add_argument("--total-path", metavar="PATH", help="path of the number of records in the response")
    made.add_argument("--files", metavar="GLOB", help="read these files of the workspace")
    made.add_argument("--format", choices=("csv", "jsonl", "parquet"), metavar="FORM", help="csv, jsonl or parquet")
    made.add_argument("--to", metavar="PATH", help="the directory of Parquet files to publish to, in the workspace")
    made.add_argument("--claim", metavar="NAME", help="the PersistentVolumeClaim of the workspace")
    made.add_argument("--partitions", metavar="NUMBER|A,B,...", help="partitions, by number or by value")
    made.add_argument("--size", type=int, metavar="ROWS", help="most rows of a batch")
    made.add_argument("--limit", type=int, metavar="ROWS", help="most rows of the run")
    made.add_argument("--parallelism", type=int, metavar="NUMBER", help="most batches in flight")
    made.add_argument("--retries", type=int, metavar="NUMBER", help="retries of a stage")
    made.add_argument("--suspend", action="store_true", help="create it suspended")
    made.add_argument("--parent", metavar="NAME", help="the run above it")
    made.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="a label; can be repeated")
    add_dry_run_flag(made)
    add_output_flag(made, "name", "json", "yaml")
    add_cluster_flags(made)
    return made


def run(session: Session) -> ExitCode:
    """Create the runs; go on after one that is refused."""
    options = session.options
    if options.filename is not None:
        if options.name or options.http or options.files:
            raise UsageError("-f goes without a name and without flags about the source")
        bodies = manifests_of_file(options.filename)
    elif options.name:
        bodies = [manifest_of_flags(options, run_name(options.name), session.namespace)]
    else:
        raise UsageError("give NAME and the flags about the source, or a manifest with -f")
    if options.watch and (len(bodies) > 1 or options.dry_run != "none" or "name" not in bodies[0]["metadata"]):
        raise UsageError("--watch follows one run that has a name and is created")
    codes = [_created(session, body) for body in bodies]
    if options.watch and codes == [ExitCode.OK]:
        from ingestrun.cli.commands.watch import follow

        return follow(session, bodies[0]["metadata"]["name"])
    return gravest(codes)


def _created(session: Session, body: dict[str, object]) -> ExitCode:
    try:
        return create(session, body, "created")
    except CliError as error:
        session.output.complain(str(error))
        return error.code
