"""The hold of a run of which this version does not understand all: it starts nothing and counts nothing.

What is not understood may be a newer version's, and may change what the rest means; so unknown is neither progress nor
an end. Jobs that run go on. A cancel is carried out, because it needs none of that: it writes the fields that it is
about, and leaves all others as they are stored (`status.writer.status_patch`). The run goes on by itself under an
operator that understands it.
"""

from __future__ import annotations

from ingestrun.model.run import IngestRun
from ingestrun.planner.actions import Decision, Plan
from ingestrun.planner.snapshot import Snapshot
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.conditions import ConditionUpdate
from ingestrun.planner.status.events import HELD


def hold(snapshot: Snapshot) -> Decision:
    """Decide for an active run that is not understood: say why it is held, and leave everything else as it is."""
    message = hold_message(snapshot.run)
    return Decision(
        plan=Plan(status=snapshot.run.status),
        conditions=[
            ConditionUpdate(type=c.SUCCEEDED, status="Unknown", reason=HELD, message=message),
            ConditionUpdate(type=c.RECONCILING, status="True", reason=HELD, message=message),
        ],
    )


def hold_message(run: IngestRun) -> str:
    """Return why the run is held, and that a cancel helps."""
    return (
        f"{'; '.join(run.unreadable)}. This version of the operator does not understand that, and starts nothing until "
        "a newer one runs, or it is put right. A cancel is carried out"
    )
