"""The progress of a run, as `status` and `watch` show it: bars, rows a second, the time that is left, its retries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from ingestrun.cli.durations import human_duration
from ingestrun.cli.explaining import explain
from ingestrun.cli.listing import ended_because, ended_by
from ingestrun.cli.output import Output, clean, count, table
from ingestrun.cli.runs import Json, Run
from ingestrun.model.names import LABEL_ATTEMPT, LABEL_BATCH, LABEL_STAGE
from ingestrun.model.times import parse_time

_MOVING_SECONDS: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The speed of a run: rows and batches a second."""

    rows: float
    batches: float


class PaceMeter:
    """The speed of the last minute, from what a watch has shown; before that, and for one look, since the start."""

    def __init__(self) -> None:
        self._seen: list[tuple[datetime, int, int]] = []

    def add(self, run: Run, now: datetime) -> None:
        """Take in the run as it is now."""
        self._seen.append((now, run.records("published"), run.published))
        while (now - self._seen[0][0]).total_seconds() > _MOVING_SECONDS and len(self._seen) > 2:
            self._seen.pop(0)

    def pace(self) -> Pace | None:
        """Return the speed; None if nothing was published meanwhile."""
        if len(self._seen) < 2:
            return None
        (began, rows, batches), (now, rows_now, batches_now) = self._seen[0], self._seen[-1]
        return _pace(rows_now - rows, batches_now - batches, now - began)


def average_pace(run: Run, now: datetime, before: Run | None = None) -> Pace | None:
    """Return the speed since the start. `before` is the run that this one has resumed: its counts are in this one's.

    Without that run, what a resumed run has done itself is not known.
    """
    resumed = run.status.get("resumedFrom")
    duration = run.duration(now)
    if duration is None or (resumed and before is None):
        return None
    rows = run.records("published") - (before.records("published") if before is not None else 0)
    batches = run.published - (before.published if before is not None else 0)
    return _pace(rows, batches, duration)


def _pace(rows: int, batches: int, duration: timedelta) -> Pace | None:
    seconds = duration.total_seconds()
    if seconds <= 0 or batches <= 0:
        return None
    return Pace(rows=rows / seconds, batches=batches / seconds)


def share_done(run: Run) -> float | None:
    """Return the share of the run that is done, from 0 to 1; None where the end of the source is not known."""
    limit = (run.spec.get("batches") or {}).get("limit")
    if run.total:
        return (run.published + len(run.indexes("failed"))) / run.total
    return run.records("published") / limit if limit else None


def time_left(run: Run, pace: Pace | None) -> timedelta | None:
    """Return the time that is left at this pace; None where it is not known."""
    if run.ended or pace is None:
        return None
    limit = (run.spec.get("batches") or {}).get("limit")
    if run.total and pace.batches:
        return timedelta(seconds=(run.total - run.published - len(run.indexes("failed"))) / pace.batches)
    if limit and pace.rows:
        return timedelta(seconds=max(0, limit - run.records("published")) / pace.rows)
    return None


def status_text(run: Run, now: datetime, output: Output, *, pace: Pace | None, jobs: Iterable[Json] | None) -> str:
    """Return the page about a run; `jobs` are its Jobs, None if this user may not see them."""
    facts = list(_facts(run, now, output, pace))
    width = max(len(name) for name, _ in facts) + 1
    parts = ["\n".join(f"{f'{name}:':<{width}} {value}" for name, value in facts)]
    parts += [part for part in (_in_flight(jobs, now), _retried(run), _failures(run, now)) if part]
    return "\n\n".join(parts)


def _facts(run: Run, now: datetime, output: Output, pace: Pace | None) -> Iterator[tuple[str, str]]:
    yield "Name", run.name
    yield "Namespace", run.namespace
    yield "Phase", output.phase(run.phase)
    duration = run.duration(now)
    if duration is not None:
        yield "Duration", human_duration(duration)
    yield from _progress(run, output, pace)
    if run.ended:
        who = ended_by(run)
        yield "Ended", f"{run.status.get('completionTime')}{f', by {clean(who)}' if who else ''}"
        if ended_because(run):
            yield "Reason", clean(ended_because(run))
        late = run.late("published")
        if late:
            yield "Late", f"batch {late} was published after the cancel"
        message = run.condition("Drained").get("message") or "pods still run"
        yield "Drained", "yes" if run.drained else f"no: {clean(message)}"
        if run.status.get("resumedBy"):
            yield "Resumed by", str(run.status["resumedBy"].get("name"))
    else:
        why = explain(run)
        yield "Now", clean(f"{why.reason}: {why.message}")
    if run.status.get("resumedFrom"):
        yield "Resumes", str(run.status["resumedFrom"].get("name") or "a saved state")


def _progress(run: Run, output: Output, pace: Pace | None) -> Iterator[tuple[str, str]]:
    share = share_done(run)
    failed = run.indexes("failed")
    active = int(run.batches.get("active") or 0)
    batches = f"{run.progress} published{f', {active} in flight' if active else ''}"
    batches += f", {len(failed)} failed ({failed})" if failed else ""
    yield "Progress", f"{output.bar(share)}{share:.0%}" if share is not None else "the end of the source is not known"
    yield "Batches", batches
    rejected = run.records("rejected")
    rows = f"{count(run.records('published'))} published{f', {count(rejected)} rejected' if rejected else ''}"
    yield "Rows", rows + (f", {pace.rows:,.0f} a second" if pace is not None else "")
    left = time_left(run, pace)
    if left is not None:
        yield "Time left", f"about {human_duration(left)}"


def _in_flight(jobs: Iterable[Json] | None, now: datetime) -> str:
    """Return the stages that run or wait now."""
    rows = []
    for job in jobs or ():
        status, labels = job.get("status") or {}, job["metadata"].get("labels") or {}
        if _is_over(status):
            continue
        state = "Running" if status.get("ready") else "Queued" if job["spec"].get("suspend") else "Starting"
        since = parse_time(status.get("startTime") or job["metadata"]["creationTimestamp"])
        batch, attempt = int(labels.get(LABEL_BATCH) or 0), int(labels.get(LABEL_ATTEMPT) or 0)
        rows.append((batch, labels.get(LABEL_STAGE, ""), attempt + 1, state, human_duration(now - since)))
    cells = [[str(cell) for cell in row] for row in sorted(rows)]
    return table(["IN FLIGHT: BATCH", "STAGE", "ATTEMPT", "STATE", "FOR"], cells) if cells else ""


def _is_over(status: Mapping[str, Any]) -> bool:
    """Tell whether a Job with this status has ended."""
    failed = any(condition.get("type") == "Failed" for condition in status.get("conditions") or ())
    return failed or bool(status.get("completionTime"))


def _retried(run: Run) -> str:
    retries = run.status.get("retries") or ()
    rows = [[str(it.get("stage")), str(it.get("reason")), str(it.get("count"))] for it in retries]
    return table(["RETRIED: STAGE", "REASON", "TIMES"], rows) if rows else ""


def _failures(run: Run, now: datetime) -> str:
    rows = [_failure(failure, now) for failure in run.status.get("failures") or ()]
    return table(["FAILED: BATCH", "STAGE", "ATTEMPT", "AGE", "REASON", "MESSAGE"], rows) if rows else ""


def _failure(failure: Mapping[str, Any], now: datetime) -> list[str]:
    age = human_duration(now - parse_time(failure["time"])) if failure.get("time") else ""
    attempt = str(int(failure.get("attempt") or 0) + 1)
    texts = [str(failure.get(key, "")) for key in ("batch", "stage")]
    return [*texts, attempt, age, str(failure.get("reason", "")), str(failure.get("message", ""))]


def change_line(run: Run, now: datetime) -> str:
    """Return the run's progress in one line, for an output that is no terminal."""
    share = share_done(run)
    parts = [
        f"{run.status.get('lastProgressTime') or run.meta['creationTimestamp']}",
        f"{run.phase}",
        f"batches {run.progress}{f' ({share:.0%})' if share is not None else ''}",
        f"rows {count(run.records('published'))}",
        run.reason,
    ]
    return "   ".join(part for part in parts if part)


def status_data(run: Run, now: datetime, pace: Pace | None) -> dict[str, Any]:
    """Return the progress as data."""
    left, share = time_left(run, pace), share_done(run)
    return {
        "run": run.name,
        "namespace": run.namespace,
        "phase": run.phase,
        "batches": {"published": run.published, "total": run.total, "failed": str(run.indexes("failed"))},
        "rows": {"published": run.records("published"), "rejected": run.records("rejected")},
        "share_done": round(share, 4) if share is not None else None,
        "rows_per_second": round(pace.rows, 1) if pace is not None else None,
        "seconds_left": round(left.total_seconds()) if left is not None else None,
        "reason": run.reason,
        "message": run.message,
        "retries": list(run.status.get("retries") or ()),
        "failures": list(run.status.get("failures") or ()),
    }
