"""The cost of the admission policies: a Job's create and a run's patch, with and without them, beside many runs.

    PYTHONPATH=operator:. python -m dev.bench.fence [runs]

It measures for docs/admission.md and tests nothing. It works in namespaces of its own, binds the policies to them
alone, and removes all of it at the end. The calls with and without policies take turns, so that other load on the
machine slows all of them alike. They are dry runs: a whole request without the write.
"""

from __future__ import annotations

import copy
import signal
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import yaml
from kubernetes import config
from tests.api.conftest import REPOSITORY, Cluster
from tests.api.test_fence import ADMISSION, COMPONENT, PLURALS, component, installed, labelled_namespace, render
from tests.api.test_runs import spec

CALLS: Final = 100
WARM_UP: Final = 5
CANCELLED: Final = 20
SETTLE_SECONDS: Final = 3.0
SELECTS_ALL: Final = "ingestrun.dev/bench-selects-all"


def main() -> None:
    # SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that the clean-up runs.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    path = REPOSITORY / ".devcluster" / "kubeconfig"
    context = str(yaml.safe_load(path.read_text())["current-context"])
    api = config.new_client_from_config(  # type: ignore[no-untyped-call]
        config_file=str(path), context=context, persist_config=False
    )
    cluster = Cluster(kubeconfig=path, context=context, api=api)
    with installed(cluster, component(COMPONENT)) as labels:
        binding = select_all(cluster, labels)
        free, fenced, full = (labelled_namespace(cluster, wanted) for wanted in ({}, labels, {SELECTS_ALL: "true"}))
        try:
            measure(cluster, runs, free=free, fenced=fenced, full=full)
        finally:
            cluster.custom.delete_cluster_custom_object(
                *ADMISSION, PLURALS["ValidatingAdmissionPolicyBinding"], binding
            )
            for namespace in (free, fenced, full):
                cluster.core.delete_namespace(namespace)


def select_all(cluster: Cluster, labels: Mapping[str, str]) -> str:
    """Bind the fence to one namespace without its label selector, and return the binding's name."""
    (suffix,) = labels.values()
    kind = "ValidatingAdmissionPolicyBinding"
    (body,) = (b for b in component(COMPONENT) if b["kind"] == kind and b["metadata"]["name"].endswith("fence"))
    body = copy.deepcopy(body)
    body["metadata"]["name"] += f"-all-{suffix}"
    body["spec"]["policyName"] += f"-{suffix}"
    body["spec"]["paramRef"]["selector"] = {}
    body["spec"]["matchResources"] = {"namespaceSelector": {"matchLabels": {SELECTS_ALL: "true"}}}
    cluster.custom.create_cluster_custom_object(*ADMISSION, PLURALS[kind], body)
    return str(body["metadata"]["name"])


def measure(cluster: Cluster, runs: int, *, free: str, fenced: str, full: str) -> None:
    suspended = spec(suspend=True)

    def fill(namespace: str, number: int) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: cluster.create_run(namespace, suspended, name=f"run-{n}"), range(number)))

    for namespace, number in ((free, 1), (fenced, runs), (full, runs)):
        fill(namespace, number)
    time.sleep(SETTLE_SECONDS)
    batch: Any = cluster.batch

    def create(namespace: str) -> Callable[[], object]:
        job = render(cluster.run(namespace, "run-0"))
        return lambda: batch.create_namespaced_job(namespace, job, dry_run="All", _preload_content=False)

    def patch(namespace: str) -> Callable[[], object]:
        return lambda: cluster.custom.patch_namespaced_custom_object(
            "ingestrun.dev",
            "v1alpha1",
            namespace,
            "ingestruns",
            "run-0",
            {"metadata": {"annotations": {"bench": uuid.uuid4().hex}}},
            dry_run="All",
            _content_type="application/merge-patch+json",
        )

    say(f"{runs} runs in the namespace, {CALLS} calls each, in turns; milliseconds{'':4}p10{'':5}p50")
    compare(
        {
            "create a Job: no policy": create(free),
            "create a Job: the fence, nothing cancelled": create(fenced),
            "create a Job: the fence, were all runs selected": create(full),
        }
    )
    compare({"patch a run: no policy": patch(free), "patch a run: the stamp and the lock": patch(fenced)})
    for number in range(1, min(CANCELLED, runs - 1) + 1):
        cluster.cancel(fenced, f"run-{number}")
    time.sleep(SETTLE_SECONDS)
    compare(
        {
            "create a Job: no policy, again": create(free),
            f"create a Job: the fence, {CANCELLED} cancelled and not yet swept": create(fenced),
        }
    )


def compare(arms: Mapping[str, Callable[[], object]]) -> None:
    """Time the calls in turns and print their percentiles."""
    took: dict[str, list[float]] = {what: [] for what in arms}
    for _ in range(CALLS + WARM_UP):
        for what, call in arms.items():
            started = time.perf_counter()
            call()
            took[what].append(1000 * (time.perf_counter() - started))
    for what, all_times in took.items():
        times = sorted(all_times[WARM_UP:])
        say(f"{what:60}{times[len(times) // 10]:8.1f}{statistics.median(times):8.1f}")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
