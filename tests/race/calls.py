"""The operator's own calls, counted in the audit log by verb and resource."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.api.conftest import Cluster, WaitFor
from tests.race.generator import run_spec
from tests.race.history import AuditTail, Histories

WRITES: Final = ("create", "update", "patch", "delete", "deletecollection")
WRITES_PER_BATCH: Final = 5
READS_PER_BATCH: Final = 3
"""The budget of a batch of three Jobs."""


def is_event(call: str) -> bool:
    """Events are for people, and shown apart."""
    return call.endswith(" events")


def is_watch(call: str) -> bool:
    """A watch lasts minutes and serves all runs."""
    return call.startswith("watch ")


def writes(calls: Mapping[str, int]) -> int:
    """Without Events."""
    return sum(count for call, count in calls.items() if call.split()[0] in WRITES and not is_event(call))


def reads(calls: Mapping[str, int]) -> int:
    """Without watches."""
    return sum(count for call, count in calls.items() if call.split()[0] in ("get", "list"))


def count_calls(cluster: Cluster, namespace: str, audit: Path, wait_for: WaitFor, *, batches: int) -> Counter[str]:
    """Have one chain with one hook run to its end; the calls that the operator made for it, watches included."""
    tail, histories = AuditTail(audit, namespace), Histories()
    spec = run_spec({"batches": str(batches)}, hooks=1, batches={"cursor": {}, "size": 10})
    name = f"chain-{batches}"
    cluster.create_run(namespace, spec, name=name)

    def succeeded() -> bool:
        return bool((cluster.run(namespace, name).get("status") or {}).get("phase") == "Succeeded")

    def counted() -> Counter[str]:
        for entry in tail.poll():
            histories.add(entry)
        return histories.calls.get(namespace, Counter())

    wait_for(succeeded, 60 + 5 * batches, "Succeeded")
    wait_for(lambda: counted()["create jobs"] == 3 * batches, 10, "the audit log to be written")
    # The last Event follows the end: it is the run's as well.
    wait_for(lambda: counted()["create events"] >= 2, 10, "the Events Started and Succeeded")
    calls = Counter(counted())
    tail.close()
    return calls


def table(calls: Mapping[str, int], batches: int) -> list[str]:
    """The calls of a run of so many batches, in all and per batch."""
    lines = [f"{'call':<28}{'all':>8}{'per batch':>12}"]
    groups = (
        ("writes", lambda call: call.split()[0] in WRITES and not is_event(call)),
        ("reads", lambda call: call.split()[0] in ("get", "list")),
        ("Events", is_event),
        ("watches begun", is_watch),
    )
    for title, belongs in groups:
        here = {call: count for call, count in sorted(calls.items()) if belongs(call)}
        lines += [f"  {call:<26}{count:>8}{count / batches:>12.2f}" for call, count in here.items()]
        total = sum(here.values())
        lines.append(f"{title:<28}{total:>8}{total / batches:>12.2f}")
    return lines
