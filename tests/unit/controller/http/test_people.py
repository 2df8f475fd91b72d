"""People's API in front of the fake API server: what a real one can't be made to do at the moment that matters.

The rest is in tests/api/test_http_api.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest
from tests.fakes.api_document import check_answer
from tests.fakes.cluster import Call, FakeCluster
from tests.fakes.world import KEY, manifest

from ingestrun.controller.http import callers as callers_module
from ingestrun.controller.http.callers import FAILURES, Callers
from ingestrun.controller.http.cancellation_check import CancellationCheck
from ingestrun.controller.http.people import PeopleApi
from ingestrun.controller.http.requests import MOST_RUNS
from ingestrun.controller.http.server import ApiServer
from ingestrun.controller.http.tokens import CheckKey
from ingestrun.kube.errors import Conflict, Denied, Expired, Forbidden, KubeError, Unavailable, Unknown
from ingestrun.kube.protocol import RunKey

Answer = tuple[int, dict[str, Any]]
HERE = "/api/v1/namespaces/default"
RUNS = f"{HERE}/ingestruns"
RUN = f"{RUNS}/{KEY.name}"
NOBODY = "11111111-1111-4111-8111-111111111111"
ALL = {(verb, "default", "") for verb in ("get", "list", "patch")}


class Service:
    """The API over a fake cluster, in which alice may do everything, vera may read and nora nothing."""

    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster
        for name in ("alice", "vera", "nora"):
            cluster.users[name] = {"username": name, "groups": ["people"]}
        cluster.rights = {"alice": set(ALL), "vera": {("get", "default", ""), ("list", "default", "")}}
        self.elapsed = 0.0
        self.now = datetime.now(UTC)
        self.callers = Callers(cluster, clock=lambda: self.elapsed)
        people = PeopleApi(cluster, self.callers, clock=lambda: self.now, wait_seconds=0.4, uid_seconds=0.0)
        key = CheckKey(cluster, namespace="default", alone=True)
        check = CancellationCheck(
            cluster, key, url="http://x", clock=lambda: self.now, callers=self.callers, cache_seconds=0
        )
        self.server = ApiServer(routes=[check, people])
        self.session: aiohttp.ClientSession
        self.url = ""

    async def ask(self, method: str, path: str, body: object = None, *, token: str | None = "alice") -> Answer:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        given = {} if body is None else {"data": body} if isinstance(body, bytes) else {"json": body}
        if isinstance(body, bytes):
            headers["Content-Type"] = "application/json"
        async with self.session.request(method, self.url + path, headers=headers, **given) as answer:
            found = json.loads(await answer.text())
            check_answer(method, path, answer.status, answer.content_type, found)
            return answer.status, found

    def operator_follows(self, *, namespace: str = "default") -> None:
        """The leader's part: each run that asks for it is Cancelled, with its children where it says so."""

        async def follow(call: Call) -> None:
            if call.stage == "after" and call.verb == "patch" and call.resource == "ingestruns":
                cancel(self.cluster, RunKey(namespace=namespace, name=call.name))

        self.cluster.on_call = follow


def cancel(cluster: FakeCluster, key: RunKey, parent: str | None = None) -> None:
    run = cluster.run(key)
    if (run["status"].get("phase") or "Pending") not in ("Pending", "Running") or not (
        parent or run["spec"].get("cancel")
    ):
        return
    asked = run["spec"].get("cancellation") or {}
    cascade = parent is not None or asked.get("cascade") is True
    record = {
        "acceptedAt": "2026-11-28T10:00:00Z",
        "requestedBy": (run["metadata"].get("annotations") or {}).get("ingestrun.dev/cancel-requested-by"),
        "reason": asked.get("reason"),
        "cascade": cascade,
        **({"parent": parent} if parent else {}),
    }
    cluster.user_patch_status(key, {"phase": "Cancelled", "cancellation": record})
    for child in cluster._select("IngestRun", key.namespace) if cascade else ():
        if (child["spec"].get("parentRef") or {}).get("name") == key.name:
            cancel(cluster, RunKey.of(child), key.name)


@asynccontextmanager
async def serving(*runs: dict[str, Any]) -> AsyncIterator[Service]:
    service = Service(FakeCluster())
    for run in runs:
        service.cluster.user_create_run(run)
    port = await service.server.serve(0, "127.0.0.1")
    service.url = f"http://127.0.0.1:{port}"
    async with aiohttp.ClientSession() as service.session:
        try:
            yield service
        finally:
            await service.server.close()


def a_run(name: str = KEY.name, *, labels: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    body = manifest(**spec)
    body["metadata"] = {**body["metadata"], "name": name, **({"labels": labels} if labels else {})}
    return body


def key(name: str) -> RunKey:
    return RunKey(namespace="default", name=name)


# --- cancelling one


async def test_a_cancel_answers_with_the_run_once_it_is_cancelled() -> None:
    async with serving(a_run()) as service:
        service.operator_follows()
        wish = {"reason": "wrong month", "cascade": False, "policy": "Terminate"}
        status, body = await service.ask("POST", f"{RUN}/cancel", wish)
        assert status == 200
        assert body["cancelled_runs"] == [KEY.name]
        assert (body["status"], body["message"], body["pending_runs"]) == ("cancelled", "Cancelled 1 run(s)", [])
        run = body["run"]
        assert run["status"]["phase"] == "Cancelled"
        assert run["status"]["cancellation"]["requestedBy"] == "alice"
        assert run["spec"]["cancellation"] == wish
        assert "managedFields" not in run["metadata"]
        assert service.cluster.calls("patch", "ingestruns/status") == [], "the status is the leader's"


async def test_an_operator_that_does_not_get_to_it_is_202_with_the_run() -> None:
    async with serving(a_run()) as service:
        status, body = await service.ask("POST", f"{RUN}/cancel")
        assert (status, body["status"], body["cancelled_runs"]) == (202, "pending", [])
        assert body["pending_runs"] == [KEY.name]
        assert body["run"]["spec"]["cancel"] is True
        # Asked again, by another: the request stands in the name of who asked first.
        service.cluster.rights["vera"].add(("patch", "default", ""))
        assert (await service.ask("POST", f"{RUN}/cancel", token="vera"))[0] == 202
        run = service.cluster.run(KEY)
        assert run["metadata"]["annotations"]["ingestrun.dev/cancel-requested-by"] == "alice"


async def test_a_run_that_ends_while_the_cancel_is_on_its_way_is_409() -> None:
    async with serving(a_run()) as service:

        async def ends(call: Call) -> None:
            if call.verb == "patch" and call.stage == "before":
                service.cluster.on_call = None
                service.cluster.user_patch_status(KEY, {"phase": "Succeeded"})

        service.cluster.on_call = ends
        status, body = await service.ask("POST", f"{RUN}/cancel")
        assert status == 409
        assert body["detail"] == f"the run {KEY.name} is already Succeeded and cannot be cancelled"
        assert (body["phase"], body["cancelled_runs"]) == ("Succeeded", [])
        assert body["run"]["spec"].get("cancel") is None


async def test_a_run_that_ends_otherwise_while_it_is_awaited_is_409() -> None:
    async with serving(a_run()) as service:

        async def ends(call: Call) -> None:
            if call.verb == "patch" and call.stage == "after":
                service.cluster.user_patch_status(KEY, {"phase": "Failed"})

        service.cluster.on_call = ends
        status, body = await service.ask("POST", f"{RUN}/cancel")
        assert (status, body["phase"]) == (409, "Failed")


@pytest.mark.parametrize("error", [Conflict("changed"), Unknown("no answer")])
async def test_a_write_that_has_no_clear_answer_is_decided_again_from_a_read(error: KubeError) -> None:
    async with serving(a_run()) as service:
        service.operator_follows()
        service.cluster.fail_next("patch", "ingestruns", error, when="before")
        status, body = await service.ask("POST", f"{RUN}/cancel", {"reason": "r"})
        assert (status, body["run"]["status"]["cancellation"]["reason"]) == (200, "r")
        assert len(service.cluster.calls("patch", "ingestruns")) == 2


async def test_the_write_whose_answer_was_lost_counts_in_the_callers_name() -> None:
    async with serving(a_run()) as service:
        service.cluster.fail_next("patch", "ingestruns", when="after")
        status, _ = await service.ask("POST", f"{RUN}/cancel")
        assert status == 202
        run = service.cluster.run(KEY)
        assert run["metadata"]["annotations"]["ingestrun.dev/cancel-requested-by"] == "alice"


async def test_a_read_that_fails_after_the_write_does_not_fail_the_cancel() -> None:
    """The request stands: it would be wrong to say that nothing was done."""
    tree = [a_run("root"), a_run("mid", parentRef={"name": "root"})]
    async with serving(*tree) as service:
        service.operator_follows()
        gone = Unavailable("down")

        def asked(_: Call) -> bool:
            return bool(service.cluster.calls("patch", "ingestruns"))

        service.cluster.fail_next("get", "ingestruns", gone, match=asked)
        service.cluster.fail_next("list", "ingestruns", gone, match=asked)
        status, body = await service.ask("POST", f"{RUNS}/root/cancel", {"cascade": True})
        assert (status, body["cancelled_runs"]) == (200, ["root", "mid"])
        service.cluster.on_call = None
        service.cluster.user_create_run(a_run("late"))

        def asked_again(_: Call) -> bool:
            return len(service.cluster.calls("patch", "ingestruns")) > 1

        service.cluster.fail_next("get", "ingestruns", gone, match=asked_again, times=99)
        status, body = await service.ask("POST", f"{RUNS}/late/cancel")
        assert (status, body["run"]["spec"]["cancel"]) == (202, True)


async def test_a_run_that_never_holds_still_is_503() -> None:
    async with serving(a_run()) as service:
        service.cluster.fail_next("patch", "ingestruns", Conflict("changed"), times=99)
        status, body = await service.ask("POST", f"{RUN}/cancel")
        assert (status, "changes all the time" in body["detail"]) == (503, True)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Denied("ValidatingAdmissionPolicy 'x' denied request: not on Fridays"), 403),
        (Forbidden("the operator may not patch"), 503),
        (Unavailable("down"), 503),
    ],
)
async def test_what_stands_against_the_write_is_told(error: KubeError, status: int) -> None:
    async with serving(a_run()) as service:
        service.cluster.fail_next("patch", "ingestruns", error)
        answered, body = await service.ask("POST", f"{RUN}/cancel")
        assert (answered, str(error) in body["detail"]) == (status, True)


async def test_a_cascade_names_all_that_it_has_cancelled() -> None:
    tree = [a_run("root"), a_run("mid", parentRef={"name": "root"}), a_run("leaf", parentRef={"name": "mid"})]
    async with serving(*tree, a_run("done", parentRef={"name": "root"}), a_run("other")) as service:
        service.cluster.user_patch_status(key("done"), {"phase": "Succeeded"})
        service.operator_follows()
        status, body = await service.ask("POST", f"{RUNS}/root/cancel", {"cascade": True})
        assert (status, body["cancelled_runs"], body["pending_runs"]) == (200, ["root", "leaf", "mid"], [])
        assert body["message"] == "Cancelled 3 run(s)"
        assert service.cluster.run(key("other"))["status"].get("phase") is None


async def test_a_cascade_that_has_not_come_down_yet_is_202() -> None:
    async with serving(a_run("root"), a_run("mid", parentRef={"name": "root"})) as service:

        async def root_alone(call: Call) -> None:
            if call.stage == "after" and call.verb == "patch" and call.resource == "ingestruns":
                record = {"acceptedAt": "2026-11-28T10:00:00Z", "cascade": True}
                service.cluster.user_patch_status(key("root"), {"phase": "Cancelled", "cancellation": record})

        service.cluster.on_call = root_alone
        status, body = await service.ask("POST", f"{RUNS}/root/cancel", {"cascade": True})
        assert (status, body["cancelled_runs"], body["pending_runs"]) == (202, ["root"], ["mid"])
        assert body["message"] == "Cancelled 1 run(s), 1 more requested"


# --- by UID


async def test_by_uid_another_run_of_the_name_is_never_cancelled() -> None:
    async with serving(a_run()) as service:
        uid = service.cluster.run(KEY)["metadata"]["uid"]
        assert (await service.ask("GET", f"/api/v1/ingest-runs/{uid}"))[1]["metadata"]["uid"] == uid

        async def replaced(call: Call) -> None:
            if (call.verb, call.stage, call.name) == ("get", "before", KEY.name):
                service.cluster.on_call = None
                service.cluster.user_delete_run(KEY)
                service.cluster.user_create_run(a_run())

        service.cluster.on_call = replaced
        status, _ = await service.ask("POST", f"/api/v1/ingest-runs/{uid}/cancel")
        assert status == 404
        assert service.cluster.run(KEY)["spec"].get("cancel") is None


async def test_a_uid_that_one_may_not_see_is_like_one_that_is_not() -> None:
    async with serving(a_run()) as service:
        uid = service.cluster.run(KEY)["metadata"]["uid"]
        paths = [f"/api/v1/ingest-runs/{one}" for one in (uid, NOBODY)]
        answers = [await service.ask("GET", path, token="nora") for path in paths]
        answers += [await service.ask("POST", f"{path}/cancel", token="vera") for path in paths]
        assert {status for status, _ in answers} == {404}
        assert len({body["detail"] for _, body in answers}) == 1


async def test_a_list_of_uids_is_shared() -> None:
    async with serving(a_run()) as service:
        service.callers._cluster.rights["nora"] = {("get", "default", "")}  # type: ignore[attr-defined]
        people = PeopleApi(service.cluster, service.callers, clock=lambda: service.now)
        found = await asyncio.gather(*(people._uids.find(NOBODY) for _ in range(20)))
        assert found == [None] * 20
        assert len(service.cluster.calls("list", "ingestruns")) == 1


# --- who may


async def test_nobody_does_what_the_reviews_refuse() -> None:
    async with serving(a_run()) as service:
        for token, status in ((None, 401), ("forged", 401), ("nora", 403)):
            for method, path, body in (
                ("GET", RUNS, None),
                ("GET", RUN, None),
                ("POST", f"{RUN}/cancel", {}),
                ("POST", f"{HERE}/cancel", {"names": [KEY.name]}),
                ("POST", f"{HERE}/clean-up", {"staleSeconds": 60}),
                ("GET", f"{RUN}/cancellation-check", None),
            ):
                assert (await service.ask(method, path, body, token=token))[0] == status, (token, path)
        for path, body in ((f"{RUN}/cancel", {}), (f"{HERE}/cancel", {"names": [KEY.name]})):
            answered, problem = await service.ask("POST", path, body, token="vera")
            assert answered == 403
            assert 'User "vera" cannot patch resource "ingestruns" in API group "ingestrun.dev"' in problem["detail"]
        assert service.cluster.calls("patch") == []


async def test_the_right_to_update_is_enough_and_so_is_one_for_this_run() -> None:
    async with serving(a_run(), a_run("other")) as service:
        service.operator_follows()
        service.cluster.rights["vera"].add(("update", "default", KEY.name))
        assert (await service.ask("POST", f"{RUNS}/other/cancel", token="vera"))[0] == 403
        names = {"names": ["other", KEY.name]}
        status, body = await service.ask("POST", f"{HERE}/cancel", names, token="vera")
        assert status == 200
        assert [result["status"] for result in body["results"]] == ["forbidden", "cancelled"]


async def test_reviews_are_shared_for_some_seconds_and_never_past_a_denial() -> None:
    async with serving(a_run()) as service:
        for _ in range(5):
            assert (await service.ask("GET", RUN))[0] == 200
        assert len(service.cluster.calls("create", "tokenreviews")) == 1
        assert len(service.cluster.calls("create", "subjectaccessreviews")) == 1
        # What was granted holds for some seconds, unless anything else is refused meanwhile.
        service.cluster.rights["alice"] = set()
        assert (await service.ask("GET", RUN))[0] == 200
        assert (await service.ask("GET", RUNS))[0] == 403
        assert (await service.ask("GET", RUN))[0] == 403
        # And what was refused is asked again at once.
        service.cluster.rights["alice"] = set(ALL)
        assert (await service.ask("GET", RUN))[0] == 200
        service.cluster.rights["alice"] = set()
        service.elapsed += callers_module.ACCESS_SECONDS
        assert (await service.ask("GET", RUN))[0] == 403
        service.cluster.users.pop("alice")
        assert (await service.ask("GET", RUN))[0] == 403
        service.elapsed += callers_module.TOKEN_SECONDS
        assert (await service.ask("GET", RUN))[0] == 401


async def test_other_groups_are_another_caller() -> None:
    async with serving(a_run()) as service:
        assert (await service.ask("GET", RUN))[0] == 200
        service.cluster.users["alice2"] = {"username": "alice", "groups": []}
        service.cluster.rights["alice"] = set()
        assert (await service.ask("GET", RUN, token="alice2"))[0] == 403


async def test_bad_tokens_are_bounded_and_good_ones_go_on() -> None:
    async with serving(a_run()) as service:
        assert (await service.ask("GET", RUN))[0] == 200
        answers = [await service.ask("GET", RUN, token=f"bad-{n}") for n in range(FAILURES.burst + 5)]
        assert [status for status, _ in answers] == [401] * FAILURES.burst + [429] * 5
        assert len(service.cluster.calls("create", "tokenreviews")) == FAILURES.burst + 1
        assert (await service.ask("GET", RUN))[0] == 200
        service.elapsed += 2
        assert (await service.ask("GET", RUN, token="bad"))[0] == 401


async def test_reviews_that_can_not_be_made_are_503_and_no_verdict() -> None:
    async with serving(a_run()) as service:
        service.cluster.fail_next("create", "tokenreviews", Unavailable("down"))
        assert (await service.ask("GET", RUN))[0] == 503
        service.cluster.fail_next("create", "subjectaccessreviews", Unavailable("down"))
        assert (await service.ask("GET", RUN))[0] == 503
        service.cluster.fail_next("create", "subjectaccessreviews", Unavailable("down"))
        assert (await service.ask("GET", f"{RUN}/cancellation-check"))[0] == 503
        assert (await service.ask("GET", RUN))[0] == 200


@pytest.mark.parametrize("token", ["ü", "a\tb", "x" * 7000])
async def test_a_strange_token_is_401(token: str) -> None:
    async with serving(a_run()) as service:
        assert (await service.ask("GET", RUN, token=token))[0] == 401


# --- many


async def test_each_run_of_many_has_a_result() -> None:
    runs = [a_run(name) for name in ("a", "b", "done")]
    async with serving(*runs) as service:
        service.cluster.user_patch_status(key("done"), {"phase": "Failed"})
        service.operator_follows()
        service.cluster.fail_next("patch", "ingestruns", Unavailable("down"), match=lambda call: call.name == "b")
        status, body = await service.ask(
            "POST", f"{HERE}/cancel", {"names": ["a", "b", "done", "gone", "a"], "reason": "r"}
        )
        assert status == 200
        found = {result["name"]: result["status"] for result in body["results"]}
        assert found == {"a": "cancelled", "b": "error", "done": "conflict", "gone": "not-found"}
        assert body["message"] == "Cancelled 1 run(s), 3 not"
        assert body["remaining"] == 0


async def test_by_labels_or_all_those_that_have_ended_are_left_out() -> None:
    geo = {"team": "geo"}
    async with serving(a_run("a", labels=geo), a_run("b"), a_run("c", labels=geo)) as service:
        service.cluster.user_patch_status(key("c"), {"phase": "Succeeded"})
        service.operator_follows()
        dry = {"labelSelector": "team=geo", "dryRun": True}
        _, body = await service.ask("POST", f"{HERE}/cancel", dry)
        assert [(r["name"], r["status"]) for r in body["results"]] == [("a", "would-cancel")]
        assert body["message"] == "Would cancel 1 run(s)"
        assert service.cluster.calls("patch") == []
        _, body = await service.ask("POST", f"{HERE}/cancel", {"all": True})
        assert [(r["name"], r["status"]) for r in body["results"]] == [("a", "cancelled"), ("b", "cancelled")]


async def test_a_bulk_cancel_is_bounded_and_says_what_is_left() -> None:
    async with serving(*(a_run(f"run-{n:03}") for n in range(MOST_RUNS + 3))) as service:
        _, body = await service.ask("POST", f"{HERE}/cancel", {"all": True, "dryRun": True})
        assert (len(body["results"]), body["remaining"]) == (MOST_RUNS, 3)


# --- clean-up


def at(service: Service, seconds: float) -> str:
    return (service.now - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


async def test_only_what_stands_still_is_cleaned_up() -> None:
    names = ("pending", "running", "healthy", "suspended", "asked", "resumed", "done")
    async with serving(*(a_run(name) for name in names)) as service:
        service.now += timedelta(hours=2)
        old, new = at(service, 3600), at(service, 10)
        states: dict[str, dict[str, Any]] = {
            "running": {"phase": "Running", "startTime": old, "lastProgressTime": old},
            "healthy": {"phase": "Running", "startTime": old, "lastProgressTime": new},
            "resumed": {
                "phase": "Running",
                "conditions": [{"type": "Suspended", "status": "False", "lastTransitionTime": new}],
            },
            "done": {"phase": "Succeeded", "startTime": old},
        }
        for name, status in states.items():
            service.cluster.user_patch_status(key(name), status)
        service.cluster.user_patch_spec(key("suspended"), {"suspend": True})
        service.cluster.user_patch_spec(key("asked"), {"cancel": True})
        service.operator_follows()
        _, body = await service.ask("POST", f"{HERE}/clean-up", {"staleSeconds": 600, "dryRun": True})
        assert {r["name"]: r["status"] for r in body["results"]} == dict.fromkeys(
            ("pending", "running"), "would-cancel"
        )
        assert service.cluster.calls("patch", "ingestruns") == []
        _, body = await service.ask("POST", f"{HERE}/clean-up", {"staleSeconds": 600})
        assert {r["name"]: r["status"] for r in body["results"]} == dict.fromkeys(("pending", "running"), "cancelled")
        record = service.cluster.run(key("running"))["status"]["cancellation"]
        assert (record["reason"], record["requestedBy"]) == ("no progress for 600 s", "alice")


async def test_a_run_that_makes_progress_meanwhile_is_left_alone() -> None:
    """The write has the resourceVersion that was judged: the progress makes it conflict, and it is judged anew."""
    async with serving(a_run()) as service:
        service.now += timedelta(hours=2)

        async def goes_on(call: Call) -> None:
            if (call.verb, call.stage) == ("patch", "before"):
                service.cluster.on_call = None
                service.cluster.user_patch_status(KEY, {"phase": "Running", "lastProgressTime": at(service, 5)})

        service.cluster.on_call = goes_on
        _, body = await service.ask("POST", f"{HERE}/clean-up", {"staleSeconds": 600})
        (result,) = body["results"]
        assert (result["status"], result["message"]) == ("skipped", "left alone: it made progress 5 s ago")
        assert service.cluster.run(KEY)["spec"].get("cancel") is None


async def test_a_stage_that_began_a_moment_ago_is_progress_and_a_retry_is_none() -> None:
    async with serving(a_run("begins"), a_run("retries")) as service:
        assert (await service.ask("POST", f"{HERE}/clean-up", {"staleSeconds": 60.0}))[1]["results"] == []
        service.now += timedelta(hours=2)
        for name, attempt in (("begins", "0"), ("retries", "1")):
            uid = service.cluster.run(key(name))["metadata"]["uid"]
            labels = {"ingestrun.dev/run-uid": uid, "ingestrun.dev/attempt": attempt}
            job = {"kind": "Job", "metadata": {"name": name, "namespace": "default", "labels": labels, "uid": name}}
            service.cluster._store("Job", {**job, "status": {"startTime": at(service, 30)}}, "ADDED")
        service.operator_follows()
        _, body = await service.ask("POST", f"{HERE}/clean-up", {"staleSeconds": 600})
        assert {r["name"]: r["status"] for r in body["results"]} == {"begins": "skipped", "retries": "cancelled"}


# --- what is refused before anything is asked


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", f"{RUN}/cancel", b"{", 400, "not JSON"),
        ("POST", f"{RUN}/cancel", b"[" * 50_000, 400, "not JSON"),
        ("POST", f"{RUN}/cancel", b"[]", 422, "should be an object"),
        ("POST", f"{RUN}/cancel", {"reson": "x"}, 422, "reson"),
        ("POST", f"{RUN}/cancel", {"cascade": "true"}, 422, "cascade"),
        ("POST", f"{RUN}/cancel", {"policy": "Kill"}, 422, "policy"),
        ("POST", f"{RUN}/cancel", {"reason": ""}, 422, "reason"),
        ("POST", f"{RUN}/cancel", {"reason": "x" * 513}, 422, "reason"),
        ("POST", f"{RUN}/cancel?force=1", {}, 422, "force"),
        ("POST", f"{RUN}/cancel", b'{"reason": "' + b"x" * 70_000 + b'"}', 413, "too large"),
        ("POST", f"{HERE}/cancel", {}, 422, "one of names, labelSelector and all"),
        ("POST", f"{HERE}/cancel", {"all": True, "names": ["a"]}, 422, "one of names, labelSelector and all"),
        ("POST", f"{HERE}/cancel", {"names": ["../a"]}, 422, "name of no run"),
        ("POST", f"{HERE}/clean-up", {}, 422, "staleSeconds"),
        ("POST", f"{HERE}/clean-up", {"staleSeconds": 0}, 422, "staleSeconds"),
        ("POST", f"{HERE}/clean-up", {"staleSeconds": 60.5}, 422, "staleSeconds"),
        ("POST", f"{HERE}/clean-up", {"staleSeconds": "60"}, 422, "staleSeconds"),
        ("GET", f"{RUNS}?phase=Paused", None, 422, "phase"),
        ("GET", f"{RUNS}?limit=0", None, 422, "limit"),
        ("GET", f"{RUNS}?labels=a", None, 422, "labels"),
        ("GET", f"{RUNS}/A", None, 422, "name of no run"),
        ("GET", "/api/v1/namespaces/a%2Fb/ingestruns", None, 422, "namespace"),
        ("GET", "/api/v1/ingest-runs/7", None, 422, "UID"),
        ("GET", f"{RUNS}/gone", None, 404, "gone"),
    ],
)
async def test_what_can_not_be_is_told_where(method: str, path: str, body: object, status: int, words: str) -> None:
    async with serving(a_run()) as service:
        answered, problem = await service.ask(method, path, body)
        assert (answered, words in problem["detail"]) == (status, True), problem
        assert service.cluster.calls("patch") == []


async def test_another_type_of_body_is_415() -> None:
    async with serving(a_run()) as service:
        headers = {"Authorization": "Bearer alice"}
        async with service.session.post(f"{service.url}{RUN}/cancel", data="reason=x", headers=headers) as answer:
            assert answer.status == 415


# --- reading


def names(body: dict[str, Any]) -> Iterable[str]:
    return [run["metadata"]["name"] for run in body["items"]]


async def test_a_list_is_by_phase_and_label_and_page() -> None:
    async with serving(a_run("a"), a_run("b", labels={"team": "geo"}), a_run("c"), a_run("d")) as service:
        for name, phase in (("b", "Pending"), ("c", "Running"), ("d", "Cancelled")):
            service.cluster.user_patch_status(key(name), {"phase": phase})
        assert names((await service.ask("GET", RUNS))[1]) == ["a", "b", "c", "d"]
        assert names((await service.ask("GET", f"{RUNS}?phase=Pending"))[1]) == ["a", "b"]
        assert names((await service.ask("GET", f"{RUNS}?phase=Running"))[1]) == ["c"]
        assert names((await service.ask("GET", f"{RUNS}?labelSelector=team%3Dgeo"))[1]) == ["b"]
        _, first = await service.ask("GET", f"{RUNS}?limit=3")
        _, second = await service.ask("GET", f"{RUNS}?limit=3&continue={first['continue']}")
        assert (names(first), names(second), "continue" in second) == (["a", "b", "c"], ["d"], False)


async def test_a_page_that_comes_too_late_is_410() -> None:
    async with serving(a_run()) as service:
        service.cluster.fail_next("list", "ingestruns", Expired("too old"))
        assert (await service.ask("GET", f"{RUNS}?continue=x"))[0] == 410


async def test_people_ask_the_check_by_their_own_token() -> None:
    async with serving(a_run()) as service:
        status, body = await service.ask("GET", f"{RUN}/cancellation-check", token="vera")
        assert (status, body["cancelled"], body["status"]) == (200, False, "PENDING")
        service.cluster.user_patch_spec(KEY, {"cancel": True})
        status, body = await service.ask("GET", f"{RUN}/cancellation-check?wait=1", token="vera")
        assert (status, body["cancelled"], body["event_type"]) == (200, True, "execution.cancelled")
