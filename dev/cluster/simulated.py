"""Simulated nodes: KWOK, a background process beside the cluster, plays nodes and their pods.

KWOK has its own service account, so that the audit log distinguishes its writes from those of the tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from dev.cluster.host import UserError, check, run, tail
from dev.cluster.parts import content_hash
from dev.cluster.progress import Progress

HERE = Path(__file__).resolve().parent
STAGES = HERE / "kwok/stages.yaml"
LABEL = "ingestrun.dev/simulated"
ACCOUNT = "devcluster-kwok"


def node(number: int) -> dict[str, object]:
    """Build a simulated node. Its taint repels every pod that does not tolerate it."""
    name = f"simulated-{number}"
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": "fake", "node.alpha.kubernetes.io/ttl": "0"},
            "labels": {
                LABEL: "true",
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                "node-role.kubernetes.io/worker": "",
            },
        },
        "spec": {"taints": [{"key": LABEL, "value": "true", "effect": "NoSchedule"}]},
    }


def account() -> list[dict[str, object]]:
    """Build the service account that KWOK works as."""
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT, "namespace": "kube-system"}},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": ACCOUNT},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
            "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": "kube-system"}],
        },
    ]


class Simulated:
    """KWOK's process and its nodes."""

    def __init__(self, state: Path, kubectl: Path, kubeconfig: Path, progress: Progress) -> None:
        self.state = state / "kwok"
        self.kubectl = kubectl
        self.kubeconfig = kubeconfig
        self.progress = progress

    @property
    def log(self) -> Path:
        return self.state / "kwok.log"

    def _kubectl(self, *args: str, stdin: bytes | None = None) -> str:
        result = run([str(self.kubectl), "--kubeconfig", str(self.kubeconfig), *args], stdin=stdin, timeout=90)
        return check(result, f"kubectl {args[0]} failed for the simulated nodes: see `make cluster-status`.")

    def pid(self) -> int | None:
        """Return KWOK's process ID if it runs; the command line is compared, because the ID may have been reused."""
        try:
            pid = int((self.state / "pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if str(self.state / "kubeconfig").encode() in command else None

    def nodes(self) -> list[str]:
        names = self._kubectl("get", "nodes", "-l", f"{LABEL}=true", "-o", "jsonpath={.items[*].metadata.name}").split()
        return sorted(names, key=lambda name: (len(name), name))

    def start(self, kwok: Path, count: int) -> None:
        """Have exactly `count` simulated nodes, played by one KWOK process."""
        wanted = content_hash([STAGES, str(kwok)])
        stamp = self.state / "stages"
        current = stamp.read_text() if stamp.exists() else ""
        if self.pid() is None or current != wanted:
            self.stop_process()
            self.state.mkdir(parents=True, exist_ok=True)
            self._write_kubeconfig()
            self._start_process(kwok)
            stamp.write_text(wanted)
        have = self.nodes()
        target = [f"simulated-{n}" for n in range(count)]
        surplus = [name for name in have if name not in target]
        if surplus:
            self._remove_nodes(surplus)
        missing = [node(n) for n, name in enumerate(target) if name not in have]
        if missing:
            items = json.dumps({"apiVersion": "v1", "kind": "List", "items": missing}).encode()
            self._kubectl("create", "-f", "-", stdin=items)
        self._kubectl("wait", "node", "-l", f"{LABEL}=true", "--for=condition=Ready", "--timeout=60s")

    def remove(self) -> None:
        """Remove the simulated nodes and KWOK from a cluster that goes on."""
        have = self.nodes()
        if have:
            self._remove_nodes(have)
        self.stop_process()

    def stop_process(self) -> None:
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            for _ in range(50):
                if self.pid() is None:
                    break
                time.sleep(0.1)
            else:
                os.kill(pid, signal.SIGKILL)
        (self.state / "pid").unlink(missing_ok=True)

    def _remove_nodes(self, names: list[str]) -> None:
        """Delete nodes and their pods, because no kubelet would end the pods."""
        for name in names:
            self._kubectl(
                "delete",
                "pods",
                "-A",
                "--field-selector",
                f"spec.nodeName={name}",
                "--force",
                "--grace-period=0",
                "--wait=false",
            )
        self._kubectl("delete", "node", *names, "--wait=false")

    def _write_kubeconfig(self) -> None:
        items = json.dumps({"apiVersion": "v1", "kind": "List", "items": account()}).encode()
        self._kubectl("apply", "-f", "-", stdin=items)
        token = self._kubectl("-n", "kube-system", "create", "token", ACCOUNT, "--duration=8760h")
        config = json.loads(self._kubectl("config", "view", "--raw", "-o", "json"))
        config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
        path = self.state / "kubeconfig"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))

    def _start_process(self, kwok: Path) -> None:
        command = [
            str(kwok),
            "--kubeconfig", str(self.state / "kubeconfig"),
            "--config", str(STAGES),
            "--manage-all-nodes=false",
            "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
            "--node-lease-duration-seconds=40",
            "--cidr=10.200.0.0/16",
            "--node-ip=10.201.0.1",
            "--server-address=",
            "--v=WARN",
        ]  # fmt: skip
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd="/"
            )
        (self.state / "pid").write_text(f"{process.pid}\n")
        time.sleep(0.3)
        if process.poll() is not None:
            raise UserError(f"KWOK ended as soon as it was started: see {self.log}\n{tail(self.log)}")
