"""Runs with pods that run until they are let go, cancelled many at once: for the test and for the benches."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from kubernetes import client

from tests.api.conftest import GROUP, PLURAL, VERSION, Cluster
from tests.race.generator import run_spec
from tests.race.history import AuditTail, Histories, RunHistory

Json = dict[str, Any]

LABEL: Final = "team"
HOLD: Final = "simulate.ingestrun.dev/hold"
THREADS: Final = 16


class Bulk:
    """Many runs in one namespace, and what the audit log says of them."""

    def __init__(self, cluster: Cluster, namespace: str, audit: Path) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._tail = AuditTail(audit, namespace)
        self._histories = Histories()

    def histories(self) -> dict[str, RunHistory]:
        """By the run's name; with all that was stored until now."""
        milestone = self._cluster.milestone(self._namespace)

        def reached() -> bool:
            entries = list(self._tail.poll())
            for entry in entries:
                self._histories.add(entry)
            return any(entry["objectRef"].get("name") == milestone for entry in entries)

        self._until(reached, 60, "the audit log to be written")
        return {run.name: run for run in self._histories.runs.values()}

    def calls(self) -> Counter[str]:
        """The operator's calls in this namespace so far, watches apart."""
        self.histories()
        calls = self._histories.calls.get(self._namespace, Counter())
        return Counter({call: count for call, count in calls.items() if not call.startswith("watch ")})

    def start(self, runs: int, *, pods: int, label: str) -> list[str]:
        """Create the runs, each with `pods` pods that run until they are let go; wait until all of them do."""
        spec = run_spec({"hold": "true"}, batches={"partitions": {"count": pods * 10}}, parallelism=pods)
        names = [f"{label}-{number:03}" for number in range(runs)]
        meta = {"labels": {LABEL: label}}
        with ThreadPoolExecutor(THREADS) as pool:
            list(
                pool.map(lambda name: self._cluster.create_run(self._namespace, spec, name=name, metadata=meta), names)
            )
        self._until(lambda: self.pods_running(label) == runs * pods, 600, f"{runs * pods} running pods")
        self.await_idle()
        return names

    def await_idle(self) -> None:
        """Until the operator has made no call for two seconds: what it is busy with is not what is measured."""
        calls, since = self.calls(), time.monotonic()

        def idle() -> bool:
            nonlocal calls, since
            now = self.calls()
            if now != calls:
                calls, since = now, time.monotonic()
            return time.monotonic() - since >= 2

        self._until(idle, 300, "the operator to be idle")

    def pods_running(self, label: str) -> int:
        """How many pods of the runs with that label run."""
        return sum(1 for pod in self._pods() if pod["status"].get("phase") == "Running" and _of(pod, label))

    def cancel(self, names: Sequence[str], *, threads: int = THREADS) -> float:
        """Cancel each with a reason of its own, side by side; how many seconds the patches took."""
        begun = time.monotonic()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda name: self._cluster.cancel(self._namespace, name, f"bulk {name}"), names))
        return time.monotonic() - begun

    def cancel_spaced(self, names: Sequence[str], pause: float) -> float:
        """Cancel one after another, with a pause; how many seconds it took."""
        begun = time.monotonic()
        for name in names:
            self._cluster.cancel(self._namespace, name, f"bulk {name}")
            time.sleep(pause)
        return time.monotonic() - begun

    def runs(self, label: str) -> dict[str, Json]:
        """The runs with that label, by name."""
        found = self._cluster.runs(self._namespace, label_selector=f"{LABEL}={label}")
        return {run["metadata"]["name"]: run for run in found}

    def await_cancelled(self, label: str, runs: int) -> None:
        """Until all of them say Cancelled."""

        def all_cancelled() -> bool:
            phases = [(run.get("status") or {}).get("phase") for run in self.runs(label).values()]
            return phases.count("Cancelled") == runs

        self._until(all_cancelled, 300, f"{runs} runs to be Cancelled")

    def let_go(self, label: str) -> None:
        """Let the pods of these runs end."""
        patch = {"metadata": {"annotations": {HOLD: None}}}

        def release(name: str) -> None:
            try:
                self._cluster.core.patch_namespaced_pod(name, self._namespace, patch)
            except client.ApiException as error:
                if error.status != 404:
                    raise

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(release, [pod["metadata"]["name"] for pod in self._pods() if _of(pod, label)]))

    def await_drained(self, label: str, runs: int) -> None:
        """Until all of them say Drained."""

        def all_drained() -> bool:
            done = [
                run
                for run in self.runs(label).values()
                if any(c["type"] == "Drained" and c["status"] == "True" for c in run["status"]["conditions"])
            ]
            return len(done) == runs

        self._until(all_drained, 300, f"{runs} runs to be Drained")

    def delete(self, label: str) -> None:
        """Delete them, with their Jobs."""
        self._cluster.custom.delete_collection_namespaced_custom_object(
            GROUP, VERSION, self._namespace, PLURAL, label_selector=f"{LABEL}={label}"
        )
        self._until(lambda: not any(_of(pod, label) for pod in self._pods()), 300, "the pods to go")

    def _until(self, predicate: Callable[[], bool], timeout: float, what: str) -> None:
        """Ask seldom: hundreds of pods make a long answer, and the machine is to be the operator's."""
        deadline = time.monotonic() + timeout
        while not predicate():
            assert time.monotonic() < deadline, f"waited {timeout:g} s for {what}"
            time.sleep(0.5)

    def _pods(self) -> list[Json]:
        answer: Any = self._cluster.core.list_namespaced_pod(self._namespace, _preload_content=False)

        items: list[Json] = json.loads(answer.data)["items"]
        return items


def _of(pod: Json, label: str) -> bool:
    return str(pod["metadata"]["labels"].get("ingestrun.dev/run", "")).startswith(f"{label}-")


def percentiles(values: Sequence[float]) -> str:
    """p50, p90, p99 (nearest rank) and the largest."""
    ordered = sorted(values)
    if not ordered:
        return "no values"
    ranks = {f"p{share}": ordered[max(0, -(-len(ordered) * share // 100) - 1)] for share in (50, 90, 99)}
    return ", ".join(f"{name} {value:.0f} ms" for name, value in {**ranks, "max": ordered[-1]}.items())
