"""The logs of a run's pods: which, in which order, and under which name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.unit.cli.support import NOW, FakeApi, Json, call, run_body

from ingestrun.cli.client import Listed
from ingestrun.cli.commands import logs
from ingestrun.cli.commands.logs import selector_of
from ingestrun.cli.errors import ExitCode, ServerError, UsageError
from ingestrun.cli.runs import Run

HOOKED = run_body(spec={"hooks": [{"name": "check"}, {"name": "enrich"}]})


def pod(batch: int, stage: str, step: int, attempt: int = 0, phase: str = "Running") -> Json:
    labels = {"batch": batch, "stage": stage, "step": step, "attempt": attempt}
    name = f"{batch}-{stage}-{step}-{attempt}"
    meta = {"name": name, "uid": name, "labels": {f"ingestrun.dev/{key}": str(it) for key, it in labels.items()}}
    return {"metadata": meta, "status": {"phase": phase}}


def _is_pending(pod: Json) -> bool:
    return bool(pod["status"]["phase"] == "Pending")


class LogApi(FakeApi):
    """With pods, each of which has said its name."""

    def __init__(self, *pods: Json, body: Json = HOOKED) -> None:
        super().__init__(body)
        self.pod_list = list(pods)
        self.asked: list[dict[str, str]] = []

    def pods(self, namespace: str, selector: str) -> Listed:
        return Listed(items=self.pod_list, resource_version="1", at=NOW)

    def log(self, namespace: str, pod: str, **params: str) -> Iterator[bytes]:
        self.asked.append(params)
        if "lost" in pod or any(it["metadata"]["name"] == pod and _is_pending(it) for it in self.pod_list):
            raise ServerError({"reason": "BadRequest", "message": f"{pod} is waiting to start"}, 400)
        yield b"this is " + pod.encode()
        yield b"\x1b[2Jand more"


def test_lines_begin_with_their_batch_and_stage_in_the_order_of_the_work() -> None:
    api = LogApi(pod(1, "fetch", 0), pod(0, "publish", 3), pod(0, "hook", 1, 1), pod(0, "hook", 1))
    code, out, err = call(logs, api, "flights")
    assert (code, err) == (ExitCode.OK, "")
    assert out.splitlines()[::2] == [
        "[batch 0, hook check] this is 0-hook-1-0",
        "[batch 0, hook check, attempt 2] this is 0-hook-1-1",
        "[batch 0, publish] this is 0-publish-3-0",
        "[batch 1, fetch] this is 1-fetch-0-0",
    ]
    assert out.splitlines()[1] == "[batch 0, hook check] ?[2Jand more"
    assert {params["container"] for params in api.asked} == {"hook", "publish", "fetch"}


def test_the_log_of_one_pod_is_as_it_is() -> None:
    api = LogApi(pod(0, "fetch", 0))
    code, out, _ = call(logs, api, "flights", "--tail", "5", "--since", "10m", "--timestamps")
    assert (code, out.splitlines()[0]) == (ExitCode.OK, "this is 0-fetch-0-0")
    assert api.asked == [{"container": "fetch", "timestamps": "true", "tailLines": "5", "sinceSeconds": "600"}]


def test_it_goes_on_after_a_pod_without_a_log() -> None:
    code, out, err = call(logs, LogApi(pod(0, "lost", 0), pod(1, "fetch", 0)), "flights")
    assert (code, out.splitlines()[0]) == (ExitCode.OK, "[batch 1, fetch] this is 1-fetch-0-0")
    assert err == "[batch 0, lost] Error from server (BadRequest): 0-lost-0-0 is waiting to start\n"
    assert call(logs, LogApi(pod(0, "lost", 0)), "flights")[0] is ExitCode.ERROR
    assert call(logs, LogApi(), "flights")[2] == 'No pods found of run "flights".\n'


@pytest.mark.parametrize(
    ("batch", "stage", "more"),
    [
        (None, None, ""),
        (3, None, ",ingestrun.dev/batch=3"),
        (None, "hook", ",ingestrun.dev/stage=hook"),
        (3, "publish", ",ingestrun.dev/batch=3,ingestrun.dev/stage=publish"),
        (None, "enrich", ",ingestrun.dev/step=2"),
    ],
)
def test_the_selector(batch: int | None, stage: str | None, more: str) -> None:
    assert selector_of(Run(HOOKED), batch=batch, stage=stage) == f"ingestrun.dev/run-uid=uid-flights{more}"


def test_a_stage_that_the_run_does_not_have() -> None:
    with pytest.raises(UsageError, match="choose from fetch, hook, publish, on-cancel, check, enrich"):
        call(logs, LogApi(), "flights", "--stage", "clean")


def test_following_goes_on_with_pods_that_start_later_until_the_run_is_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    api = LogApi(pod(0, "fetch", 0), pod(1, "fetch", 0, phase="Pending"))
    drained: dict[str, Any] = {"phase": "Succeeded", "conditions": [{"type": "Drained", "status": "True"}]}

    def later(_: float) -> None:
        if api.pod_list[1]["status"]["phase"] == "Pending":
            api.pod_list[1]["status"]["phase"] = "Running"
        else:
            api.bodies["flights"]["status"] = drained

    monkeypatch.setattr("time.sleep", later)
    code, out, _ = call(logs, api, "flights", "-f")
    assert code is ExitCode.OK
    assert sorted(line for line in out.splitlines() if "this is" in line) == [
        "[batch 0, fetch] this is 0-fetch-0-0",
        "[batch 1, fetch] this is 1-fetch-0-0",
    ]
    assert all(params["follow"] == "true" for params in api.asked)


def test_following_a_run_that_is_deleted_ends() -> None:
    api = LogApi()
    api.bodies["flights"]["status"] = {"phase": "Running"}
    gone = dict(api.bodies)

    def run(namespace: str, name: str) -> Any:
        found = gone.pop(name, None)
        if found is None:
            raise ServerError({"reason": "NotFound", "message": "gone"}, 404)
        return found, NOW

    api.run = run  # type: ignore[method-assign]
    assert call(logs, api, "flights", "-f")[0] is ExitCode.OK
