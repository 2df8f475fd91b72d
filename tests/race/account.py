"""The operator as its own service account: so the audit log tells its calls apart, and its ClusterRole has to do.

The Deployment is not applied: what acts is a process of this checkout, with a token from the TokenRequest API.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import yaml
from kubernetes import client

from tests.api.conftest import REPOSITORY, Cluster
from tests.api.operator_process import OperatorProcess, api_settings

Json = dict[str, Any]

NAMESPACE: Final = "ingestrun-system"
NAME: Final = "ingestrun-operator"
TOKEN_SECONDS: Final = 6 * 3600

_PATHS: Final = {
    "Namespace": "/api/v1/namespaces/{name}",
    "Secret": "/api/v1/namespaces/{namespace}/secrets/{name}",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts/{name}",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles/{name}",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/{name}",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles/{name}",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings/{name}",
}


def service_account_kubeconfig(cluster: Cluster, target: Path) -> Path:
    """Apply the namespace, RBAC and Secret of manifests/base; write a kubeconfig with a token of the account."""
    for name in ("namespace.yaml", "rbac.yaml", "cancellation-check.yaml"):
        for body in yaml.safe_load_all((REPOSITORY / "manifests" / "base" / name).read_text()):
            if body["kind"] in _PATHS:
                _apply(cluster, body)
    wanted: Any = {"spec": {"audiences": [], "expirationSeconds": TOKEN_SECONDS}}
    granted: Any = cluster.core.create_namespaced_service_account_token(NAME, NAMESPACE, wanted)
    given = yaml.safe_load(cluster.kubeconfig.read_text())
    context = next(c["context"] for c in given["contexts"] if c["name"] == cluster.context)
    made = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [c for c in given["clusters"] if c["name"] == context["cluster"]],
        "users": [{"name": NAME, "user": {"token": granted.status.token}}],
        "contexts": [{"name": cluster.context, "context": {"cluster": context["cluster"], "user": NAME}}],
        "current-context": cluster.context,
    }
    target.touch(mode=0o600)
    target.write_text(yaml.safe_dump(made))
    return target


def _apply(cluster: Cluster, body: Json) -> None:
    meta = body["metadata"]
    # Not through the typed methods: they would need a branch for each kind.
    path = _PATHS[body["kind"]].format(name=meta["name"], namespace=meta.get("namespace", ""))
    request = cluster.api.param_serialize(
        "PATCH",
        path,
        query_params=[("fieldManager", "ingestrun-tests"), ("force", "true")],
        header_params={"Content-Type": "application/apply-patch+yaml", "Accept": "application/json"},
        body=body,
        auth_settings=["BearerToken"],
    )
    answer: Any = cluster.api.call_api(*request)
    answer.read()
    if answer.status >= 300:
        raise client.ApiException(status=answer.status, reason=json.loads(answer.data).get("message"))


class Operator(OperatorProcess):
    """The process under the service account, for one or more namespaces."""

    def __init__(
        self,
        *,
        kubeconfig: Path,
        context: str,
        namespaces: list[str],
        log: Path,
        lease: bool = False,
        api_port: int | None = None,
    ) -> None:
        """`api_port`: it serves its HTTP API there, which pools need."""
        settings = api_settings(api_port) if api_port is not None else {}
        super().__init__(
            kubeconfig=kubeconfig, context=context, namespace=",".join(namespaces), log=log, settings=settings
        )
        self.lease = lease
        if lease:
            self._arguments.append("--lease")
        self.kills = 0

    def kill(self) -> None:
        """SIGKILL, counted."""
        super().kill()
        self.kills += 1
