"""The HTTP API of a real operator in front of a real API server, asked by ServiceAccounts with tokens of their own.

As deployed: by TLS, under the operator's own account with the rights of manifests/base, with the admission policies.
"""

from __future__ import annotations

import base64
import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from kubernetes import client
from schemathesis.checks import negative_data_rejection, positive_data_acceptance
from schemathesis.core.parameters import ParameterLocation

from ingestrun.controller.http import tls
from ingestrun.controller.http.callers import ACCESS_SECONDS
from ingestrun.controller.http.tokens import SECRET_NAME
from ingestrun.model import names
from tests.api.conftest import Cluster, Json, WaitFor, _wait_for
from tests.api.operator_process import OperatorProcess, free_port
from tests.api.test_fence import BASE, COMPONENT, component, installed, labelled_namespace, operators_account
from tests.api.test_runs import in_phase, spec
from tests.api.test_users import POLICIES, RBAC, ROLES
from tests.fakes.api_document import DOCUMENT, check_answer

Answer = tuple[int, Json]
RUNS: Final = (names.GROUP, names.VERSION)


@dataclass(frozen=True, kw_only=True)
class Service:
    """The API of one operator, which watches one namespace."""

    url: str
    ca: str
    ca_file: Path
    namespace: str
    tokens: dict[str, str]

    @property
    def here(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}"

    @property
    def runs(self) -> str:
        return f"{self.here}/ingestruns"

    def ask(self, method: str, path: str, body: Any = None, *, who: str = "alice") -> Answer:
        """Ask as one of the ServiceAccounts; the server is verified by its CA."""
        request = urllib.request.Request(self.url + path, method=method)
        if self.tokens.get(who):
            request.add_header("Authorization", f"Bearer {self.tokens[who]}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        context = ssl.create_default_context(cadata=self.ca)
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        try:
            answer = urllib.request.build_opener(*handlers).open(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            found: Json = json.load(answer)
        check_answer(method, path, answer.status, answer.headers.get_content_type(), found)
        return answer.status, found

    def user(self, who: str) -> str:
        return f"system:serviceaccount:{self.namespace}:{who}"


def rules_of(kind: str) -> list[Json]:
    (role,) = [body for body in yaml.safe_load_all((BASE / "rbac.yaml").read_text()) if body["kind"] == kind]
    rules: list[Json] = role["rules"]
    return rules


def bind(cluster: Cluster, namespace: str, role: Json, name: str, account: str, in_namespace: str) -> None:
    rbac: Any = client.RbacAuthorizationV1Api(cluster.api)
    subjects = [{"kind": "ServiceAccount", "name": account, "namespace": in_namespace}]
    body = {"metadata": {"name": name}, "roleRef": {**role, "apiGroup": RBAC}, "subjects": subjects}
    rbac.create_namespaced_role_binding(namespace, body)


@pytest.fixture(scope="module")
def service(cluster: Cluster, crd: Json, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An operator that serves; alice may edit runs, carol is a canceller, vera may read, nora may nothing."""
    assert crd
    rbac: Any = client.RbacAuthorizationV1Api(cluster.api)
    folder = tmp_path_factory.mktemp("operator")
    suffix = uuid.uuid4().hex[:8]
    roles = {name: f"{name}-{suffix}" for name in ROLES}
    with installed(cluster, [*component(COMPONENT), *POLICIES]) as labels, operators_account(cluster, folder) as config:
        namespace = labelled_namespace(cluster, labels)
        for name, role in ROLES.items():
            # Without the labels by which view, edit and admin take them up: for others' sake.
            rbac.create_cluster_role({"metadata": {"name": roles[name]}, "rules": role["rules"]})
        core: Any = cluster.core
        for name in (SECRET_NAME, tls.SECRET_NAME):
            core.create_namespaced_secret(namespace, {"metadata": {"name": name}, "type": "Opaque"})
        rbac.create_namespaced_role(namespace, {"metadata": {"name": "operator"}, "rules": rules_of("Role")})
        account, system = "ingestrun-operator", "ingestrun-system"
        bind(cluster, namespace, {"kind": "Role", "name": "operator"}, "operator", account, system)
        tokens = {"": "", "forged": "eyJhbGciOiJSUzI1NiJ9.e30.c2lnbmF0dXJl"}
        given = {
            "alice": ("ingestrun-view", "ingestrun-edit"),
            "carol": ("ingestrun-canceller",),
            "vera": ("ingestrun-view",),
            "nora": (),
        }
        for who, rights in given.items():
            core.create_namespaced_service_account(namespace, {"metadata": {"name": who}})
            for role_name in rights:
                role = {"kind": "ClusterRole", "name": roles[role_name]}
                bind(cluster, namespace, role, f"{who}-{role_name}", who, namespace)
            # As `kubectl create token` does.
            made = core.create_namespaced_service_account_token(who, namespace, {"spec": {"expirationSeconds": 3600}})
            tokens[who] = made.status.token
        port = free_port()
        process = OperatorProcess(
            kubeconfig=config,
            context=cluster.context,
            namespace=namespace,
            log=folder / "operator.log",
            settings={
                "INGESTRUN_LEASE_NAMESPACE": namespace,
                "INGESTRUN_API_URL": f"https://127.0.0.1:{port}",
                "INGESTRUN_API_PORT": str(port),
                "INGESTRUN_API_TLS": "own",
                "INGESTRUN_API_RATE": "1000",  # one fuzzer asks as often as a thousand people
            },
        )
        process.start()
        try:
            data = core.read_namespaced_secret(tls.SECRET_NAME, namespace).data
            ca = base64.b64decode(data[tls.CA_CERTIFICATE]).decode()
            (folder / "ca.crt").write_text(ca)
            yield Service(
                url=f"https://127.0.0.1:{port}", ca=ca, ca_file=folder / "ca.crt", namespace=namespace, tokens=tokens
            )
        finally:
            process.stop()
            log = (folder / "operator.log").read_text()
            for who in given:
                assert tokens[who] not in log
            cluster.core.delete_namespace(namespace)
            for name in roles.values():
                rbac.delete_cluster_role(name)


@pytest.fixture
def run(cluster: Cluster, service: Service, wait_for: WaitFor) -> str:
    """A run whose pod goes on until it is told to stop."""
    name = f"run-{uuid.uuid4().hex[:8]}"
    cluster.create_run(service.namespace, spec({"hold": "true"}), name=name)
    wait_for(in_phase(cluster, service.namespace, name, "Running"), 30, "Running")
    return name


@pytest.mark.parametrize("who", ["alice", "carol"])
def test_a_cancel_answers_with_the_cancelled_run_in_the_name_of_the_caller(
    who: str, cluster: Cluster, service: Service, run: str
) -> None:
    """Of who may edit runs, and of who may cancel them and no more."""
    wish = {"reason": "wrong month", "policy": "Terminate"}
    status, body = service.ask("POST", f"{service.runs}/{run}/cancel", wish, who=who)
    assert (status, body["status"], body["cancelled_runs"]) == (200, "cancelled", [run])
    stored = cluster.run(service.namespace, run)
    for seen in (body["run"], stored):
        assert seen["status"]["phase"] == "Cancelled"
        record = seen["status"]["cancellation"]
        assert (record["requestedBy"], record["reason"]) == (service.user(who), "wrong month")
        assert record["policy"] == "Terminate"
    assert stored["metadata"]["annotations"][names.ANNOTATION_REQUESTED_BY] == service.user(who)
    assert cluster.told(service.namespace, "Cancelled", run) == [f"cancelled by {service.user(who)}: wrong month"]

    status, body = service.ask("POST", f"{service.runs}/{run}/cancel", who="alice")
    assert (status, body["phase"], body["cancelled_runs"]) == (409, "Cancelled", [])
    said = f"the run {run} is already Cancelled, by {service.user(who)}, at {record['acceptedAt']}: wrong month"
    assert body["detail"] == said
    assert body["cancellation"]["requestedBy"] == service.user(who)


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_run_that_has_ended_is_409(phase: str, cluster: Cluster, service: Service) -> None:
    name = f"ended-{phase.lower()}"
    cluster.create_run(service.namespace, spec(suspend=True), name=name)
    _wait_for(in_phase(cluster, service.namespace, name, "Suspended"), 30, "Suspended")
    cluster.patch_status(service.namespace, name, {"phase": phase})
    status, body = service.ask("POST", f"{service.runs}/{name}/cancel")
    assert (status, body["title"], body["phase"]) == (409, "Conflict", phase)
    assert body["detail"] == f"the run {name} is already {phase} and cannot be cancelled"
    assert "cancel" not in cluster.run(service.namespace, name)["spec"]


def test_nobody_does_by_http_what_kubectl_refuses_them(cluster: Cluster, service: Service, run: str) -> None:
    by_uid = f"/api/v1/ingest-runs/{cluster.run(service.namespace, run)['metadata']['uid']}"
    one = f"{service.runs}/{run}"
    writes = {
        f"{one}/cancel": {},
        f"{service.here}/cancel": {"names": [run]},
        f"{service.here}/clean-up": {"staleSeconds": 1},
    }
    for who, expected in (("", 401), ("forged", 401), ("nora", 403)):
        for path in (one, service.runs):
            assert service.ask("GET", path, who=who)[0] == expected, (who, path)
        for path, body in writes.items():
            assert service.ask("POST", path, body, who=who)[0] == expected, (who, path)
    assert service.ask("GET", one, who="vera")[0] == 200
    for path, body in list(writes.items())[:2]:
        status, said = service.ask("POST", path, body, who="vera")
        assert status == 403
        assert f'User "{service.user("vera")}" cannot patch resource "ingestruns"' in said["detail"]
    assert service.ask("POST", f"{by_uid}/cancel", who="vera")[0] == 404
    elsewhere = "/api/v1/namespaces/kube-system/ingestruns"
    assert service.ask("GET", elsewhere)[0] == 403
    assert service.ask("POST", f"{service.runs}/gone/cancel")[0] == 404
    assert service.ask("GET", f"{service.runs}/gone")[0] == 404
    assert "cancel" not in cluster.run(service.namespace, run)["spec"]


def test_a_right_that_is_taken_away_is_gone_within_seconds(cluster: Cluster, service: Service, run: str) -> None:
    rbac: Any = client.RbacAuthorizationV1Api(cluster.api)
    cluster.core.create_namespaced_service_account(service.namespace, {"metadata": {"name": "tom"}})  # type: ignore[arg-type]
    made: Any = cluster.core.create_namespaced_service_account_token(
        "tom",
        service.namespace,
        {"spec": {"expirationSeconds": 3600}},  # type: ignore[arg-type]
    )
    service.tokens["tom"] = made.status.token
    rules = [{"apiGroups": [names.GROUP], "resources": [names.PLURAL], "verbs": ["get"]}]
    rbac.create_namespaced_role(service.namespace, {"metadata": {"name": "tom"}, "rules": rules})
    bind(cluster, service.namespace, {"kind": "Role", "name": "tom"}, "tom", "tom", service.namespace)
    path = f"{service.runs}/{run}"
    _wait_for(lambda: service.ask("GET", path, who="tom")[0] == 200, 10, "the right of tom")
    rbac.delete_namespaced_role_binding("tom", service.namespace)
    began = time.monotonic()
    _wait_for(lambda: service.ask("GET", path, who="tom")[0] == 403, 30, "the refusal")
    assert time.monotonic() - began < ACCESS_SECONDS + 10


def test_by_uid(cluster: Cluster, service: Service, run: str) -> None:
    uid = cluster.run(service.namespace, run)["metadata"]["uid"]

    def found() -> object:
        return service.ask("GET", f"/api/v1/ingest-runs/{uid}")[1].get("metadata", {}).get("name") == run

    _wait_for(found, 15, "the run by its UID")
    status, body = service.ask("POST", f"/api/v1/ingest-runs/{uid}/cancel", {"reason": "by UID"})
    assert (status, body["cancelled_runs"]) == (200, [run])
    assert service.ask("POST", f"/api/v1/ingest-runs/{uid}/cancel")[0] == 409
    assert service.ask("GET", f"/api/v1/ingest-runs/{uuid.uuid4()}")[0] == 404


def test_a_list_by_phase_and_label_and_page(cluster: Cluster, service: Service) -> None:
    label = f"list-{uuid.uuid4().hex[:8]}"
    for number in range(5):
        meta = {"labels": {"team": label}}
        cluster.create_run(service.namespace, spec(suspend=True), name=f"{label}-{number}", metadata=meta)
    for number in range(5):
        _wait_for(in_phase(cluster, service.namespace, f"{label}-{number}", "Suspended"), 30, "Suspended")
    assert service.ask("POST", f"{service.runs}/{label}-3/cancel")[0] == 200
    query = f"{service.runs}?labelSelector=team%3D{label}"

    def listed(more: str) -> tuple[list[str], str]:
        status, body = service.ask("GET", query + more, who="vera")
        assert status == 200, body
        return [item["metadata"]["name"].removeprefix(f"{label}-") for item in body["items"]], body.get("continue", "")

    assert listed("&phase=Suspended") == (["0", "1", "2", "4"], "")
    assert listed("&phase=Cancelled") == (["3"], "")
    assert listed("&phase=Pending") == ([], "")
    first, token = listed("&limit=3")
    assert listed(f"&limit=3&continue={urllib.parse.quote(token)}") == (["3", "4"], "")
    assert first == ["0", "1", "2"]
    status, said = service.ask("GET", f"{service.runs}?labelSelector=%21%21")
    assert (status, "parse" in said["detail"]) == (422, True)
    assert service.ask("GET", f"{service.runs}?continue=nonsense")[0] == 422


def test_a_run_that_no_operator_has_seen_yet_is_pending(cluster: Cluster, service: Service) -> None:
    """Where the operator does not watch, a run has no phase, and is listed as Pending all the same."""
    rbac: Any = client.RbacAuthorizationV1Api(cluster.api)
    other = f"ir-test-{uuid.uuid4().hex[:10]}"
    cluster.core.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=other)))
    try:
        rules = [{"apiGroups": [names.GROUP], "resources": [names.PLURAL], "verbs": ["list", "patch"]}]
        rbac.create_namespaced_role(other, {"metadata": {"name": "reads"}, "rules": rules})
        bind(cluster, other, {"kind": "Role", "name": "reads"}, "reads", "alice", service.namespace)
        cluster.create_run(other, spec(suspend=True), name="unseen")
        path = f"/api/v1/namespaces/{other}/ingestruns"
        _wait_for(lambda: service.ask("GET", path)[0] == 200, 10, "the right")
        for phase, found in (("Pending", ["unseen"]), ("Running", []), ("Cancelled", [])):
            items = service.ask("GET", f"{path}?phase={phase}")[1]["items"]
            assert [item["metadata"]["name"] for item in items] == found
        # No operator gets to it: the answer is 202, and the request stands for whoever comes.
        status, body = service.ask("POST", f"{path}/unseen/cancel", {"reason": "later"})
        assert (status, body["pending_runs"], body["run"]["spec"]["cancel"]) == (202, ["unseen"], True)
    finally:
        cluster.core.delete_namespace(other)


def test_many_by_label_with_those_below(cluster: Cluster, service: Service) -> None:
    label = f"bulk-{uuid.uuid4().hex[:8]}"
    for name, parent in (("a", None), ("b", None), ("below", f"{label}-a")):
        more = {"parentRef": {"name": parent}} if parent else {}
        meta = {} if parent else {"labels": {"team": label}}
        cluster.create_run(service.namespace, spec(suspend=True, **more), name=f"{label}-{name}", metadata=meta)
        _wait_for(in_phase(cluster, service.namespace, f"{label}-{name}", "Suspended"), 30, "Suspended")
    wish = {"labelSelector": f"team={label}", "cascade": True, "reason": "all of them"}
    status, body = service.ask("POST", f"{service.here}/cancel", {**wish, "dryRun": True}, who="carol")
    assert (status, body["message"]) == (200, "Would cancel 2 run(s)")
    assert cluster.run(service.namespace, f"{label}-a")["status"]["phase"] == "Suspended"
    status, body = service.ask("POST", f"{service.here}/cancel", wish, who="carol")
    assert (status, body["message"], body["remaining"]) == (200, "Cancelled 3 run(s)", 0)
    cancelled = {result["name"]: result["cancelled_runs"] for result in body["results"]}
    assert cancelled == {f"{label}-a": [f"{label}-a", f"{label}-below"], f"{label}-b": [f"{label}-b"]}
    assert cluster.run(service.namespace, f"{label}-below")["status"]["cancellation"]["parent"] == f"{label}-a"
    status, body = service.ask("POST", f"{service.here}/cancel", {"names": [f"{label}-a", "gone"]}, who="carol")
    assert [result["status"] for result in body["results"]] == ["conflict", "not-found"]


def test_what_stands_still_is_cleaned_up(cluster: Cluster, service: Service, run: str) -> None:
    """By the API server's clock; a run that was created a moment ago is left alone."""
    label = {"labels": {"clean": run}}
    cluster.patch_run(service.namespace, run, {"metadata": label})
    _wait_for(lambda: cluster.jobs(service.namespace, f"ingestrun.dev/run={run}"), 30, "a Job")
    time.sleep(6)  # what stands still for so long is what this is about
    cluster.create_run(service.namespace, spec({"hold": "true"}), name=f"{run}-new", metadata=label)
    wish = {"staleSeconds": 5, "labelSelector": f"clean={run}"}
    status, body = service.ask("POST", f"{service.here}/clean-up", {**wish, "dryRun": True})
    assert (status, [(r["name"], r["status"]) for r in body["results"]]) == (200, [(run, "would-cancel")])
    status, body = service.ask("POST", f"{service.here}/clean-up", wish)
    assert (status, [(r["name"], r["status"]) for r in body["results"]]) == (200, [(run, "cancelled")])
    record = cluster.run(service.namespace, run)["status"]["cancellation"]
    assert (record["reason"], record["requestedBy"]) == ("no progress for 5 s", service.user("alice"))
    assert "cancel" not in cluster.run(service.namespace, f"{run}-new")["spec"]


def test_people_ask_the_check_by_their_own_token(cluster: Cluster, service: Service, run: str) -> None:
    path = f"{service.runs}/{run}/cancellation-check"
    status, body = service.ask("GET", path, who="vera")
    uid = cluster.run(service.namespace, run)["metadata"]["uid"]
    assert (status, body["id"], body["cancelled"], body["status"]) == (200, uid, False, "RUNNING")
    assert service.ask("POST", f"{service.runs}/{run}/cancel")[0] == 200
    status, body = service.ask("GET", f"{path}?wait=20", who="vera")
    assert (body["cancelled"], body["status"], body["event_type"]) == (True, "CANCELLED", "execution.cancelled")


# ------------------------------------------------------------------------------------------------- from its document

SCHEMA: Final = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.fixture(scope="module")
def fuzzed(cluster: Cluster, service: Service) -> str:
    """A run for the fuzzer, Cancelled already, so that no wait for its cancel takes time."""
    name = f"fuzzed-{uuid.uuid4().hex[:8]}"
    cluster.create_run(service.namespace, spec(suspend=True), name=name)
    _wait_for(in_phase(cluster, service.namespace, name, "Suspended"), 30, "Suspended")
    assert service.ask("POST", f"{service.runs}/{name}/cancel")[0] == 200
    return name


@SCHEMA.parametrize()
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_whatever_is_sent_the_answer_is_one_that_the_document_has(
    case: schemathesis.Case[Any], service: Service, fuzzed: str
) -> None:
    """Nothing that fits is refused as malformed, nothing that does not fit is taken, and nothing fails."""
    path, negated = case.path_parameters or {}, negated_parts(case)
    if ParameterLocation.PATH not in negated:
        known = {"namespace": service.namespace, "name": fuzzed}
        case.path_parameters.update({key: value for key, value in known.items() if key in path})
    headers = {"Authorization": f"Bearer {service.tokens['alice']}"}
    excluded = []
    if {"labelSelector", "continue"} & sent(case):
        # Which label selectors and tokens of a list there are, the API server alone knows.
        excluded.append(positive_data_acceptance)
    if ParameterLocation.HEADER in negated:
        # The one header is the token, which is put right here; what other tokens do is `ignored_auth`'s.
        excluded.append(negative_data_rejection)
    case.call_and_validate(base_url=service.url, headers=headers, verify=str(service.ca_file), excluded_checks=excluded)


def negated_parts(case: schemathesis.Case[Any]) -> set[ParameterLocation]:
    """The parts of the request that do not fit the document, on purpose."""
    parts = case.meta.components.items() if case.meta else ()
    return {location for location, part in parts if part.mode is schemathesis.GenerationMode.NEGATIVE}


def sent(case: schemathesis.Case[Any]) -> set[str]:
    """The names of the query's and the body's fields."""
    body = case.body if isinstance(case.body, dict) else {}
    return {*(case.query or {}), *body}
