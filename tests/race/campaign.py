"""The whole of it: waves of runs against one operator, each judged when all is quiet, then forgotten."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import pytest
from kubernetes import client

from tests.api.conftest import Cluster
from tests.api.operator_process import free_port
from tests.race.account import Operator
from tests.race.checker import (
    Violation,
    check,
    jobs_between,
    landed_batches,
    latency_ms,
    started_after,
    state_at_cancel,
)
from tests.race.generator import QUIET_SECONDS, Signal, Wave
from tests.race.history import AuditTail, Histories, RunHistory, indexes
from tests.race.observer import Observer
from tests.race.pool_rules import repeated_commits
from tests.race.pool_workers import Fleet, Habits, Ledger, bound_claim
from tests.race.traffic import Timers, Traffic

WAVE_SECONDS: Final = 600
"""How long a wave's runs may take to end and drain. No timing is judged here: this only ends a wave that hangs."""
SWEEP_SECONDS: Final = 65
"""An ended run is listed live once more a minute after its end; the last wave is watched until after that."""

POOL: Final = "Pool"
JOB_PER_STAGE: Final = "JobPerStage"
HABITS: Final = Habits(die=0.16, fail=0.06, freeze=0.2, repeat=0.1, straggle=0.1, delay=0.1, zombie=0.06)
"""What the workers of the pools do to the promises; see `Habits`."""

Say = Callable[[str], None]


@dataclass
class Tally:
    """What the summary tells: numbers alone, so that its size does not depend on the number of runs."""

    runs: int = 0
    kills: int = 0
    runs_with_kill: int = 0
    jobs: int = 0
    jobs_after: int = 0
    jobs_between: int = 0
    started_after: int = 0
    in_flight: int = 0
    late: int = 0
    late_accounted: int = 0
    not_published: int = 0
    unknown: int = 0
    published: int = 0
    told: Counter[str] = field(default_factory=Counter)
    commits: int = 0
    repeated_commits: int = 0
    mishaps: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    repeated: int = 0
    taken_back: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    policies: Counter[str] = field(default_factory=Counter)
    latencies: dict[str, list[float]] = field(default_factory=lambda: {POOL: [], JOB_PER_STAGE: []})
    """By the way in which batches are run."""
    audit_lines: int = 0
    relists: int = 0
    violations: list[Violation] = field(default_factory=list)

    def add(self, run: RunHistory) -> None:
        """Count one judged run."""
        self.runs += 1
        end = run.terminal
        self.told.update(told.what for told in run.told)
        self.commits += len(run.commits)
        self.repeated_commits += len(list(repeated_commits(run)))
        self.phases[(end.phase if end else None) or "not ended"] += 1
        self.states[state_at_cancel(run)] += 1
        self.jobs += len({job.name for job in run.creates if job.code == 201} | run.job_versions.keys())
        self.jobs_between += jobs_between(run)
        self.started_after += started_after(run)
        if end is not None:
            self.published += len(indexes(end.counters.published))
        if end is not None and end.phase == "Cancelled":
            last = run.ordered()[-1].cancellation or {}
            self.in_flight += len(end.counters.in_flight)
            self.late += len(landed_batches(run) & end.counters.in_flight)
            self.unknown += len(indexes(last.get("unknown", "")))
            self.late_accounted += len(indexes(last.get("published", "")))
            self.not_published += len(indexes(last.get("notPublished", "")))
        latency = latency_ms(run)
        if latency is not None:
            self.latencies[POOL if run.pooled else JOB_PER_STAGE].append(latency)

    def lines(self) -> list[str]:
        """The summary."""

        def table(title: str, counts: Counter[str]) -> list[str]:
            return [title, *(f"  {number:>6}  {what}" for what, number in counts.most_common())]

        return [
            f"runs {self.runs} ({', '.join(f'{n} {m}' for m, n in sorted(self.modes.items()))}; "
            f"policy {', '.join(f'{n} {m}' for m, n in sorted(self.policies.items()))}), "
            f"ended {', '.join(f'{n} {p}' for p, n in sorted(self.phases.items()))}",
            f"operator killed {self.kills} times; {self.runs_with_kill} runs saw it happen",
            f"cancels repeated in {self.repeated} runs, taken back in {self.taken_back}; "
            f"refused because the run had ended: {self.refused}",
            f"Jobs created {self.jobs}; after the end of their run {self.jobs_after}; "
            f"between the cancel's answer and Cancelled {self.jobs_between}",
            f"pods pending at Cancelled that started before their deletion reached them: {self.started_after}",
            f"batches published before the end {self.published}; in flight at cancel {self.in_flight}, of these "
            f"published after all {self.late} (accounted for {self.late_accounted}), not published "
            f"{self.not_published}, not known {self.unknown}",
            f"pools: claims told {self.told['claim']}, permissions told {self.told['permission']}, batches committed "
            f"{self.commits - self.repeated_commits}, again by a retry after a worker's death {self.repeated_commits}",
            f"workers' mishaps: {', '.join(f'{n} {what}' for what, n in sorted(self.mishaps.items()))}",
            "cancel answered to Cancelled stored, operator kills included:",
            *(f"  {mode}: {_percentiles(seconds)}" for mode, seconds in self.latencies.items() if seconds),
            *table("where they were when they became Cancelled:", self.states),
            *table("when the cancel was sent:", self.moments),
            f"audit entries judged {self.audit_lines}; watches that were begun by a list {self.relists}",
            f"violations {len(self.violations)}",
        ]


def _percentiles(milliseconds: list[float]) -> str:
    ordered = sorted(milliseconds)
    marks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    places = {mark: min(len(ordered) - 1, int(share * len(ordered))) for mark, share in marks.items()}
    return ", ".join(f"{mark} {ordered[place]:.0f} ms" for mark, place in places.items())


class Campaign:
    """Runs waves one after another. Close it."""

    def __init__(self, cluster: Cluster, *, audit: Path, operator_kubeconfig: Path, folder: Path, say: Say) -> None:
        self.cluster = cluster
        self.prefix = f"ir-race-{uuid.uuid4().hex[:6]}-"
        self.tally = Tally()
        self._kubeconfig = operator_kubeconfig
        self._folder = folder
        self._say = say
        self._tail = AuditTail(audit, self.prefix)
        self._histories = Histories()
        self._traffic: Traffic | None = None
        self._observer = Observer(cluster, self.prefix, self._signal)
        self._observer.start()

    def close(self) -> None:
        """End the watches."""
        self._observer.stop()
        self._tail.close()

    def run(self, wave: Wave, *, sweep: bool) -> None:
        """One wave; its violations and numbers go to the tally. `sweep`: wait for the operator's last look as well."""
        begun = time.monotonic()
        namespaces = [f"{self.prefix}{wave.number}-{slot}" for slot in range(wave.slots)]
        operator = Operator(
            kubeconfig=self._kubeconfig,
            context=self.cluster.context,
            namespaces=namespaces,
            log=self._folder / f"operator-{wave.number}.log",
            lease=wave.lease,
            api_port=free_port(),
        )
        timers, stack = Timers(), contextlib.ExitStack()
        try:
            self._open(namespaces, wave)
            fleet = self._employ(wave, namespaces, stack)
            operator.start()
            self._traffic = traffic = Traffic(self.cluster, operator, timers)
            for plan in wave.runs:
                traffic.submit(plan, namespaces[plan.slot])
            timers.after(wave.lift_quota_at, lambda: self._lift(namespaces, wave))
            self._wait(wave, traffic, timers)
            self._quiet(SWEEP_SECONDS if sweep else QUIET_SECONDS)
            self._judge(wave, namespaces, traffic, operator, fleet.ledger)
        finally:
            timers.close()
            operator.stop()
            self._traffic = None
            stack.close()
            for namespace in namespaces:
                self.cluster.core.delete_namespace(namespace)
            self._observer.forget({run.uid for run in self._histories.runs.values()})
            self._histories.forget(namespaces)
        took = time.monotonic() - begun
        self._say(
            f"wave {wave.number}: {len(wave.runs)} runs in {took:.0f} s, {operator.kills} kills"
            f"{', with the lease' if wave.lease else ''}; {self.tally.runs} runs so far, "
            f"{len(self.tally.violations)} violations"
        )

    def _employ(self, wave: Wave, namespaces: list[str], stack: contextlib.ExitStack) -> Fleet:
        """The workers of the wave's pools, and the claims that their pods mount."""
        pools = [namespaces[slot] for slot in sorted({plan.slot for plan in wave.runs if plan.pooled})]
        for namespace in pools:
            stack.enter_context(bound_claim(self.cluster, namespace))

        def on_step(uid: str, what: str, batch: int) -> None:
            self._signal(uid, Signal(kind=what, batch=batch))

        habits = replace(HABITS, seed=wave.number)
        return stack.enter_context(Fleet(self.cluster, pools, habits, on_step=on_step))

    def _signal(self, uid: str, seen: Signal) -> None:
        traffic = self._traffic
        if traffic is not None:
            traffic.signal(uid, seen)

    def _open(self, namespaces: list[str], wave: Wave) -> None:
        labels = {"ingestrun.dev/test": "true"}
        core = self.cluster.core
        for slot, name in enumerate(namespaces):
            core.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=name, labels=labels)))
            if slot in wave.quota_slots:
                spec = client.V1ResourceQuotaSpec(hard={"count/jobs.batch": str(wave.quota)})
                body = client.V1ResourceQuota(metadata=client.V1ObjectMeta(name="jobs"), spec=spec)
                core.create_namespaced_resource_quota(name, body)

    def _lift(self, namespaces: list[str], wave: Wave) -> None:
        for slot in wave.quota_slots:
            self.cluster.core.delete_namespaced_resource_quota("jobs", namespaces[slot])

    def _wait(self, wave: Wave, traffic: Traffic, timers: Timers) -> None:
        deadline = time.monotonic() + WAVE_SECONDS
        while True:
            self._poll()
            if timers.errors:
                raise timers.errors[0]
            assert self._observer.alive(), "a watch of the observer has ended"
            runs = [self._observer.runs.get(uid) or {} for uid in traffic.uids()]
            done = sum(1 for run in runs if _drained(run))
            if done == len(wave.runs) and not traffic.pending:
                return
            if time.monotonic() > deadline:
                # The checker says of which runs it is true that they have not ended.
                self._say(f"wave {wave.number}: {len(wave.runs) - done} runs not drained after {WAVE_SECONDS} s")
                return
            time.sleep(0.2)

    def _quiet(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._poll()
            time.sleep(0.2)

    def _poll(self) -> None:
        for entry in self._tail.poll():
            self._histories.add(entry)

    def _judge(self, wave: Wave, namespaces: list[str], traffic: Traffic, operator: Operator, ledger: Ledger) -> None:
        self._poll()
        assert not ledger.errors, ledger.errors[:3]
        self.tally.mishaps += ledger.mishaps
        tally, plans = self.tally, traffic.uids()
        actors = set().union(*(self._histories.actors.get(namespace, set()) for namespace in namespaces))
        if len(actors) > 1:
            pytest.fail(f"another operator acted on these runs, from {sorted(actors)}: is one deployed?")
        assert set(plans) == set(self._histories.runs), "the audit log and the created runs differ"
        for uid, plan in plans.items():
            run = self._histories.runs[uid]
            run.moment, run.planned_kill = plan.cancel.moment.value, plan.cancel.kill is not None
            run.pods = self._observer.pods.get(uid, {})
            run.seen = self._observer.versions.get(uid, [])
            run.job_versions = self._observer.job_versions.get(uid, {})
            run.pooled = plan.pooled
            run.told = [told for told in ledger.told if told.uid == uid]
            run.commits = [commit for commit in ledger.commits if commit.uid == uid]
            found = check(run)
            tally.violations += found
            tally.jobs_after += sum(1 for violation in found if violation.rule == "job-after-end")
            tally.add(run)
            tally.modes[f"{POOL if plan.pooled else JOB_PER_STAGE} {plan.mode}"] += 1
            tally.moments[plan.cancel.moment.value] += 1
            tally.policies[plan.cancel.policy or "unset"] += 1
            tally.repeated += bool(plan.cancel.repeats)
            tally.taken_back += plan.cancel.clear_after is not None or plan.cancel.clear_at_once
            for violation in found:
                self._say(f"VIOLATION {violation}")
        tally.kills += operator.kills
        tally.runs_with_kill += len(plans) if operator.kills else 0
        tally.refused += sum(traffic.refused.values())
        tally.audit_lines = self._tail.lines
        tally.relists = self._observer.relists


def _drained(run: dict[str, Any]) -> bool:
    status = run.get("status") or {}
    return any(c["type"] == "Drained" and c["status"] == "True" for c in status.get("conditions") or ())
