"""The cluster: up, down, status, load. All its state is under `.devcluster/`; kind gets no other kubeconfig."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import string
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dev.cluster.firewall import engine_chains_present, remove_engine_chains
from dev.cluster.host import (
    Engine,
    UserError,
    check,
    check_disk,
    check_linux,
    check_port,
    ensure_go,
    find_engine,
    install_packages,
    packages,
    run,
    tail,
    which,
)
from dev.cluster.nodeimage import DISK_RUN, HERE, NodeImage
from dev.cluster.parts import locked
from dev.cluster.progress import Progress
from dev.cluster.simulated import Simulated

REPOSITORY = HERE.parents[1]
CLUSTER = "ingestrun"
NODE = f"{CLUSTER}-control-plane"
NODES = ("real", "simulated", "both")
LIMITS = {
    # Kubernetes' defaults, with which the Job controller makes a few Jobs a second.
    "default": {
        "controller_qps": "20",
        "controller_burst": "30",
        "scheduler_qps": "50",
        "scheduler_burst": "100",
        "job_syncs": "5",
    },
    # As much as two cores can do, so that tests do not wait for the cluster.
    "raised": {
        "controller_qps": "500",
        "controller_burst": "1000",
        "scheduler_qps": "500",
        "scheduler_burst": "1000",
        "job_syncs": "20",
    },
}


@dataclass(frozen=True)
class Options:
    """The options, set by environment variables of the same names."""

    nodes: str = "real"
    simulated_nodes: int = 4
    limits: str = "raised"
    api_port: int = 0

    @classmethod
    def from_environment(cls, env: Mapping[str, str], facts: Mapping[str, object] | None = None) -> Options:
        """Read the options; one that is not set has its value of the running cluster (`facts`), else the default."""
        kept = {name.upper(): str(value) for name, value in (facts or {}).items() if name in cls.__dataclass_fields__}
        env = {**kept, **{name: value for name, value in env.items() if value}}
        nodes = env.get("NODES") or cls.nodes
        if nodes not in NODES:
            raise UserError(f"NODES is {nodes!r}: set it to one of {', '.join(NODES)}.")
        limits = env.get("LIMITS") or cls.limits
        if limits not in LIMITS:
            raise UserError(f"LIMITS is {limits!r}: set it to one of {', '.join(LIMITS)}.")
        numbers = {}
        for name, default, low, high in (
            ("SIMULATED_NODES", cls.simulated_nodes, 1, 100),
            ("API_PORT", cls.api_port, 0, 65535),
        ):
            text = env.get(name) or str(default)
            if not text.isdigit() or not low <= int(text) <= high:
                raise UserError(f"{name} is {text!r}: set it to a number from {low} to {high}.")
            numbers[name] = int(text)
        return cls(nodes, numbers["SIMULATED_NODES"], limits, numbers["API_PORT"])


def render_config(template: str, options: Options, image: str, public: bool, state: Path) -> str:
    """Fill in the placeholders of kind.yaml."""
    values = {
        **LIMITS[options.limits],
        "api_port": str(options.api_port),
        "disable_default_cni": "false" if public else "true",
        "image": image,
        "state": json.dumps(str(state))[1:-1],
    }
    return string.Template(template).substitute(values)


def static_pod_edits(limits: str) -> list[str]:
    """Build the sed commands that set the controllers' limits in the manifests of a running node."""
    values = LIMITS[limits]
    manifests = "/etc/kubernetes/manifests"
    edits = []
    for component, flags in (
        ("kube-controller-manager", {"kube-api-qps": "controller_qps", "kube-api-burst": "controller_burst",
                                     "concurrent-job-syncs": "job_syncs"}),
        ("kube-scheduler", {"kube-api-qps": "scheduler_qps", "kube-api-burst": "scheduler_burst"}),
    ):  # fmt: skip
        script = ";".join(f"s/--{flag}=.*/--{flag}={values[key]}/" for flag, key in flags.items())
        edits.append(f"sed -i '{script}' {manifests}/{component}.yaml")
    return edits


class DevCluster:
    """The one cluster of a checkout."""

    def __init__(self, progress: Progress | None = None, state: Path | None = None) -> None:
        self.progress = progress or Progress()
        # Resolved, so that checkouts that share the state by a link use equal paths: KWOK is recognized by one.
        self.state = (state or REPOSITORY / ".devcluster").resolve()
        self.image = NodeImage(self.progress)
        self.kubeconfig = self.state / "kubeconfig"
        self.kubectl = self.state / "bin/kubectl"
        self.simulated = Simulated(self.state, self.kubectl, self.kubeconfig, self.progress)

    # -- state -------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, object]:
        try:
            found = json.loads((self.state / "state.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def remember(self, **facts: object) -> None:
        new = self.state / "state.json.new"
        new.write_text(json.dumps({**self.facts(), **facts}, indent=1) + "\n")
        new.rename(self.state / "state.json")

    def engine(self) -> Engine:
        """Find the engine that holds the cluster; if there is no cluster, one that works."""
        return find_engine(self.state, str(self.facts().get("engine", "")))

    def _kind(self, engine: Engine, *args: str, log: Path | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run kind with our kubeconfig and the engine's environment."""
        env = {**engine.env, "KUBECONFIG": str(self.kubeconfig)}
        return run([str(self.image.cache.get(self.image.kind) / "kind"), *args], env=env, log=log)

    def _query(self, *args: str) -> str | None:
        """Return kubectl's answer, or None if it has none."""
        if not (self.kubectl.exists() and self.kubeconfig.exists()):
            return None
        result = run(
            [str(self.kubectl), "--kubeconfig", str(self.kubeconfig), "--request-timeout=5s", *args], timeout=15
        )
        return result.stdout.decode() if result.returncode == 0 else None

    # -- deps --------------------------------------------------------------------------------------------------------

    def deps(self) -> None:
        """Install what is missing; quick if nothing is."""
        check_linux()
        try:
            engine: Engine | None = find_engine(self.state)
        except UserError:
            engine = None
        if engine is not None and engine.name == "podman":
            wanted = packages(False, True)  # podman may be there without its network or runc
        else:
            wanted = packages(engine is not None, True)
        install_packages([p for p in wanted if not p.present], self.progress)
        ensure_go(self.image.versions["GO"], self.progress)
        if not self.image.obtainable_without_building(engine):
            install_packages([p for p in packages(True, False) if not p.present], self.progress)
        self.progress.say("the development cluster has all it needs on this machine")

    # -- up ----------------------------------------------------------------------------------------------------------

    def up(self, env: Mapping[str, str]) -> None:
        """Create the cluster, or adapt the running one to the options that `env` chooses."""
        check_linux()
        self.state.mkdir(parents=True, exist_ok=True)
        with locked(self.state / "lock"):
            options = Options.from_environment(env, self.facts())
            engine = self.engine()
            if not self._healthy(engine):
                self._create(engine, options)
            elif options.limits != self.facts().get("limits", options.limits):
                self._change_limits(engine, options)
            self._adapt_nodes(options)
            self.remember(**asdict(options))
        self.progress.say(f"cluster {CLUSTER} is up ({engine.name}, nodes: {options.nodes}, limits: {options.limits})")

    def _healthy(self, engine: Engine) -> bool:
        if engine.out("container", "inspect", "--format", "{{.State.Running}}", NODE) != "true":
            return False
        if not self.facts().get("created"):
            return False  # an earlier start was killed half-way
        with self.progress.step("check the running cluster", quiet=True):
            for _ in range(10):
                if (self._query("get", "--raw", "/readyz") or "").strip() == "ok":
                    return True
                time.sleep(1)
        return False

    def _create(self, engine: Engine, options: Options) -> None:
        if options.api_port:
            check_port(options.api_port)
        check_disk(self.state, DISK_RUN, "Running the cluster")
        name, public = self.image.ensure(engine)
        self.image.cache.get(self.image.kind)
        if self._leftovers(engine):
            with self.progress.step("remove what an earlier start left"):
                self._delete(engine)
        self._remember_what_was_there(engine)
        self.remember(engine=engine.name, image=name, created=False)

        audit = self.state / "audit"
        shutil.rmtree(audit, ignore_errors=True)
        audit.mkdir(parents=True)
        shutil.copy(HERE / "audit-policy.yaml", audit / "policy.yaml")
        config = self.state / "kind.yaml"
        config.write_text(render_config((HERE / "kind.yaml").read_text(), options, name, public, self.state))
        self.kubeconfig.unlink(missing_ok=True)

        log = self.state / "kind.log"
        log.unlink(missing_ok=True)
        # No --wait, because kind polls by a process in the node; _wait_ready asks the API server.
        with self.progress.step("kind create cluster", 25):
            result = self._kind(
                engine, "create", "cluster", "--name", CLUSTER, "--retain",
                "--config", str(config), "--kubeconfig", str(self.kubeconfig), log=log,
            )  # fmt: skip
            check(
                result,
                "kind could not create the cluster: read below why, put it right, and run `make cluster-up` again.",
                log,
            )
        self._programs(engine, public)
        with self.progress.step("wait for the node, the name service and the volumes"):
            self._wait_ready()
        self.remember(created=True, limits=options.limits)

    def _remember_what_was_there(self, engine: Engine) -> None:
        """Record what `down` must leave in place.

        This is done at the first start only, because a second one would find what the first has made.
        """
        facts = self.facts()
        if "network_was_there" not in facts:
            self.remember(network_was_there=self._network_exists(engine), rules_were_there=engine_chains_present())
        # kind mounts /lib/modules. A machine with a kernel without modules may lack it; an empty folder will do.
        folder = Path("/lib/modules")
        if folder.exists():
            return
        try:
            folder.mkdir()
        except OSError:
            raise UserError(
                "kind mounts /lib/modules, which this machine lacks: as root, run `mkdir /lib/modules` once."
            ) from None
        self.remember(made_modules_folder=True)

    def _programs(self, engine: Engine, public: bool) -> None:
        """Fill .devcluster/bin with kind and with the cluster's own kubectl (the node's, if we did not build it)."""
        folder = self.state / "bin"
        folder.mkdir(exist_ok=True)
        links = {"kind": self.image.cache.get(self.image.kind) / "kind"}
        if public:
            (folder / "kubectl").unlink(missing_ok=True)
            check(
                engine.run("cp", f"{NODE}:/usr/bin/kubectl", str(folder / "kubectl")),
                "kubectl cannot be copied from the node.",
            )
        else:
            links["kubectl"] = self.image.cache.get(self.image.hyperkube) / "hyperkube"
        for name, target in links.items():
            link = folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(target)

    def _wait_ready(self, seconds: float = 180) -> None:
        """Wait until the node, CoreDNS, the volume provisioner and the default service account are ready for tests."""
        until = time.monotonic() + seconds
        steps = [
            ["wait", "node", NODE, "--for=condition=Ready"],
            ["-n", "kube-system", "wait", "deployment/coredns", "--for=condition=Available"],
            ["-n", "local-path-storage", "wait", "deployment/local-path-provisioner", "--for=condition=Available"],
            ["-n", "default", "get", "serviceaccount", "default"],
        ]
        for step in steps:
            while True:
                timeout = [] if "get" in step else ["--timeout=30s"]
                result = run([str(self.kubectl), "--kubeconfig", str(self.kubeconfig), *step, *timeout], timeout=60)
                if result.returncode == 0:
                    break
                if time.monotonic() > until:
                    raise UserError(
                        f"The cluster did not become ready ({shlex.join(step)}): see {self.state}/kind.log\n"
                        f"{tail(result.stderr)}"
                    )
                time.sleep(0.5)

    def _change_limits(self, engine: Engine, options: Options) -> None:
        """Change the controllers' limits in place: the kubelet restarts the pods whose manifests are edited."""
        with self.progress.step(f"set the controllers' limits to {options.limits}", 20):
            for edit in static_pod_edits(options.limits):
                check(
                    engine.run("exec", NODE, "sh", "-c", edit),
                    "The controllers' limits cannot be set: run `make cluster-down` first.",
                )
            until = time.monotonic() + 120
            flag = f"--kube-api-qps={LIMITS[options.limits]['controller_qps']}"
            ready = "jsonpath={.items[*].spec.containers[0].command}|{.items[*].status.containerStatuses[0].ready}"
            while True:
                answer = (
                    self._query(
                        "-n", "kube-system", "get", "pods", "-l", "component=kube-controller-manager", "-o", ready
                    )
                    or ""
                )
                if flag in answer and answer.endswith("|true"):
                    return
                if time.monotonic() > until:
                    raise UserError(
                        "The controllers did not come back with their new limits: run `make cluster-down` and up again."
                    )
                time.sleep(1)

    def _adapt_nodes(self, options: Options) -> None:
        if options.nodes == "real":
            if self.simulated.pid() is not None or self.simulated.nodes():
                with self.progress.step("remove the simulated nodes"):
                    self.simulated.remove()
            return
        kwok = self.image.cache.get(self.image.kwok) / "kwok"
        with self.progress.step(f"{options.simulated_nodes} simulated nodes", quiet=True):
            self.simulated.start(kwok, options.simulated_nodes)

    # -- down --------------------------------------------------------------------------------------------------------

    def down(self) -> None:
        """Remove all processes, containers, volumes, mounts and networks of the cluster, in any state of it."""
        self.state.mkdir(parents=True, exist_ok=True)
        with locked(self.state / "lock"):
            self.simulated.stop_process()
            engine = self.engine()
            with self.progress.step("remove the cluster", quiet=True):
                self._delete(engine)
            left = self._leftovers(engine)
            if left:
                raise UserError(f"Something of the cluster is left: {', '.join(left)}; remove it by {engine.name}.")
            if self.facts().get("made_modules_folder") and not any(Path("/lib/modules").glob("*")):
                Path("/lib/modules").rmdir()
            for name in ("kubeconfig", "state.json", "loaded.json", "kind.yaml"):
                (self.state / name).unlink(missing_ok=True)
            shutil.rmtree(self.state / "bin", ignore_errors=True)
            shutil.rmtree(self.state / "kwok", ignore_errors=True)
        self.progress.say(f"cluster {CLUSTER} is gone")

    def _containers(self, engine: Engine) -> list[str]:
        return engine.out("ps", "-a", "-q", "--filter", f"label=io.x-k8s.kind.cluster={CLUSTER}").split()

    def _volumes(self, engine: Engine) -> list[str]:
        """List the node's volumes.

        kind labels podman's by the node's name; docker removes its own with the container.
        """
        return engine.out("volume", "ls", "-q", "--filter", f"label={NODE}").split()

    def _leftovers(self, engine: Engine) -> list[str]:
        return [f"container {c}" for c in self._containers(engine)] + [f"volume {v}" for v in self._volumes(engine)]

    def _network_exists(self, engine: Engine) -> bool:
        return engine.run("network", "inspect", "kind").returncode == 0

    def _delete(self, engine: Engine) -> None:
        """Delete the cluster by the engine, not by kind, because that works without kind and without a kubeconfig.

        The node is killed, not stopped: nothing in it is worth the 10 s that systemd takes to end its services.
        """
        containers = self._containers(engine)
        if containers:
            engine.run("kill", *containers)
            check(
                engine.run("rm", "-f", "-v", *containers),
                f"{engine.name} cannot remove the node: run `make cluster-down` again.",
            )
        volumes = self._volumes(engine)
        if volumes:
            engine.run("volume", "rm", "-f", *volumes)
        self._delete_network(engine)

    def _delete_network(self, engine: Engine) -> None:
        """Remove kind's network and podman's chains, unless they are older than the cluster or used by others."""
        facts = self.facts()
        if not facts.get("network_was_there", True) and self._network_exists(engine):
            if engine.run("network", "rm", "kind").returncode != 0:
                return  # another kind cluster uses it: `rm` refuses then
            shutil.rmtree("/var/lib/cni/networks/kind", ignore_errors=True)
        if engine.name == "podman" and not facts.get("rules_were_there", True) and not engine.out("ps", "-q"):
            failed = remove_engine_chains()
            if failed:
                self.progress.say(
                    f"podman's empty packet filter chains could not be removed ({', '.join(failed)}): harmless"
                )

    # -- status, env, load -------------------------------------------------------------------------------------------

    def status(self) -> bool:
        """Print the cluster's state; return whether it works."""
        facts = self.facts()
        if not facts.get("created"):
            print(
                "no cluster: `make cluster-up` makes one"
                if not facts
                else "a start that did not end: run `make cluster-up` again"
            )
            return False
        version = (self._query("version", "-o", "json") or "").strip()
        if not version:
            print(f"cluster {CLUSTER}: its API server does not answer: `make cluster-up` makes it anew if need be")
            return False
        server = json.loads(version)["serverVersion"]["gitVersion"]
        print(f"cluster {CLUSTER}: Kubernetes {server}, {facts['engine']}, image {facts['image']}")
        print(f"nodes: {facts.get('nodes')}, limits: {facts.get('limits')}, KWOK: pid {self.simulated.pid() or 'none'}")
        print(f"kubeconfig: {self.kubeconfig}\naudit log: {self.state / 'audit/audit.log'}")
        print((self._query("get", "nodes", "-o", "wide") or "").rstrip())
        unready = self._query(
            "get", "pods", "-A", "--field-selector=status.phase!=Running,status.phase!=Succeeded", "--no-headers"
        )
        print((unready or "").rstrip() or "every pod runs or has succeeded")
        return True

    def environment(self) -> dict[str, str]:
        """Return the variables by which others use the same engine and cluster."""
        engine = self.engine()
        return {
            "ENGINE": engine.name,
            **engine.env,
            "KUBECONFIG": str(self.kubeconfig),
            "INGESTRUN_CONTEXT": f"kind-{CLUSTER}",
            "INGESTRUN_AUDIT_LOG": str(self.state / "audit/audit.log"),
            "KIND_CLUSTER_NAME": CLUSTER,
            "PATH": f"{self.state / 'bin'}:{os.environ.get('PATH', '')}",
        }

    def load(self, images: list[str]) -> None:
        """Load images of the engine into the node, under their own names; skip those that are there."""
        engine = self.engine()
        if engine.out("container", "inspect", "--format", "{{.State.Running}}", NODE) != "true":
            raise UserError("There is no running cluster to load into: run `make cluster-up` first.")
        record = self.state / "loaded.json"
        loaded: dict[str, list[str]] = json.loads(record.read_text()) if record.exists() else {}
        for image in images:
            image_id = engine.out("image", "inspect", "--format", "{{.Id}}", image)
            if not image_id:
                raise UserError(f"{engine.name} has no image {image}: build it first (`make images`).")
            if loaded.get(image) == [image_id, self._digest_in_node(engine, image)]:
                self.progress.say(f"{image} is in the cluster already")
                continue
            with self.progress.step(f"load {image}"):
                self._load_one(engine, image)
            loaded[image] = [image_id, self._digest_in_node(engine, image)]
            record.write_text(json.dumps(loaded, indent=1))

    def _digest_in_node(self, engine: Engine, image: str) -> str:
        """Return the digest under which containerd has an image, or an empty text."""
        for line in engine.out("exec", NODE, "ctr", "--namespace", "k8s.io", "images", "ls").splitlines()[1:]:
            fields = line.split()
            if fields[0] in (image, f"docker.io/library/{image}", f"docker.io/{image}", f"localhost/{image}"):
                return fields[2]
        return ""

    def _load_one(self, engine: Engine, image: str) -> None:
        """Pipe the engine's archive into kind (a docker-archive, because an oci-archive loses the name)."""
        archive_format = ["--format", "docker-archive"] if engine.name == "podman" else []
        kind = str(self.image.cache.get(self.image.kind) / "kind")
        env = {**os.environ, **engine.env}
        with subprocess.Popen([engine.name, "save", *archive_format, image], env=env, stdout=subprocess.PIPE) as save:
            loading = subprocess.run(
                [kind, "load", "image-archive", "/dev/stdin", "--name", CLUSTER],
                env=env, stdin=save.stdout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        if save.returncode or loading.returncode:
            raise UserError(f"Loading {image} failed: is the disk full?\n{tail(loading.stdout)}")


# -- the user's own cluster --------------------------------------------------------------------------------------------


def current_context() -> str:
    """Return the name of the user's current context, after its cluster has answered. Nothing is written."""
    if which("kubectl") is None:
        raise UserError("CLUSTER=current needs kubectl: install it, or leave CLUSTER out for a cluster by kind.")
    name = run(["kubectl", "config", "current-context"]).stdout.decode().strip()
    if not name:
        raise UserError(
            "CLUSTER=current: kubectl has no current context; choose one by `kubectl config use-context NAME`."
        )
    answer = run(["kubectl", "--context", name, "--request-timeout=10s", "get", "--raw", "/readyz"], timeout=20)
    if answer.returncode != 0:
        raise UserError(
            f"CLUSTER=current: the cluster of the context {name} does not answer:\n{tail(answer.stderr, 3)}"
        )
    return name
