"""The columns in which runs are listed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from ingestrun.cli.durations import human_duration
from ingestrun.cli.output import count
from ingestrun.cli.runs import Run
from ingestrun.model.phase import Phase

UNKNOWN: Final = "-"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a list: of active runs and others, or of cancelled ones."""

    cancelled: bool = False
    wide: bool = False
    with_namespace: bool = False

    @property
    def head(self) -> list[str]:
        """The names of the columns."""
        first = ["NAMESPACE", "NAME"] if self.with_namespace else ["NAME"]
        if self.cancelled:
            return [
                *first,
                "CANCELLED",
                "BY",
                "REASON",
                *(["POLICY", "DRAINED", "BATCHES", "ROWS"] if self.wide else []),
            ]
        more = ["ACTIVE", "FAILED", "MESSAGE"] if self.wide else []
        return [*first, "PHASE", "BATCHES", "ROWS", "REJECTED", "REASON", "DURATION", "AGE", *more]

    def row(self, run: Run, now: datetime) -> list[str]:
        """Return the cells of a run."""
        first = [run.namespace, run.name] if self.with_namespace else [run.name]
        if self.cancelled:
            record = run.cancellation
            cells = [str(record.get(key) or "") for key in ("acceptedAt", "requestedBy", "reason")]
            drained = "yes" if run.drained else "no"
            wide = [str(record.get("policy") or ""), drained, run.progress, count(run.records("published"))]
            return [*first, *cells, *(wide if self.wide else [])]
        duration = run.duration(now)
        cells = [
            run.phase,
            run.progress,
            count(run.records("published")),
            count(run.records("rejected")),
            run.reason,
            human_duration(duration) if duration is not None else UNKNOWN,
            human_duration(run.age(now)),
        ]
        wide = [str(run.batches.get("active") or 0), str(run.indexes("failed")) or UNKNOWN, run.message or UNKNOWN]
        return [*first, *cells, *(wide if self.wide else [])]


def newest_end_first(runs: Iterable[Run]) -> list[Run]:
    """Sort ended runs by their end, the newest first."""
    return sorted(runs, key=lambda run: (run.completed or run.created, run.name), reverse=True)


HISTORY_HEAD: Final[Sequence[str]] = ("NAME", "PHASE", "ENDED", "BY", "REASON", "ROWS", "DURATION")


def ended_by(run: Run) -> str:
    """Return who has ended a run: only a cancel has somebody."""
    return str(run.cancellation.get("requestedBy") or "") if run.phase == Phase.CANCELLED else ""


def ended_because(run: Run) -> str:
    """Return why a run has ended: the reason of its cancel, or the sentence that says how it ended."""
    if run.phase == Phase.CANCELLED:
        return str(run.cancellation.get("reason") or "")
    return run.message or run.reason


def history_row(run: Run) -> list[str]:
    """Return the cells of an ended run."""
    ended = str(run.status.get("completionTime") or UNKNOWN)
    duration = run.duration(run.completed or run.created)
    return [
        run.name,
        run.phase,
        ended,
        ended_by(run) or UNKNOWN,
        ended_because(run) or UNKNOWN,
        count(run.records("published")),
        human_duration(duration) if duration is not None else UNKNOWN,
    ]


def history_entry(run: Run) -> dict[str, Any]:
    """Return the same as data."""
    duration = run.duration(run.completed or run.created)
    return {
        "run": run.name,
        "namespace": run.namespace,
        "phase": run.phase,
        "ended": run.status.get("completionTime"),
        "by": ended_by(run) or None,
        "reason": ended_because(run) or None,
        "rows": run.records("published"),
        "rejected": run.records("rejected"),
        "duration_seconds": int(duration.total_seconds()) if duration is not None else None,
    }
