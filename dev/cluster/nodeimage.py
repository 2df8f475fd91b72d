"""The node's image and the programs around the cluster, pulled if possible, else made here.

Parts, each cached by what it is made from:

    kind, kwok                 Go modules, run on the host
    hyperkube                  our Go module over k8s.io/kubernetes: all of Kubernetes and etcd in one binary
    coredns, local-path        Go modules, run in the cluster
    base-root                  the distribution's packages
    node-image                 all of that as one image, with the cluster's own images in containerd's store
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dev.cluster.archive import PATH, write_archive
from dev.cluster.host import (
    Engine,
    UserError,
    apt_source,
    check,
    check_disk,
    ensure_go,
    go_arch,
    is_debian_like,
    os_release,
    read_settings,
    registry_reachable,
    run,
    which,
)
from dev.cluster.parts import Cache, Part
from dev.cluster.progress import Progress

HERE = Path(__file__).resolve().parent
NODE = HERE / "node"
LOCAL_NAME = "localhost/ingestrun-devcluster/node"
GIB = 2**30
# Measured (README.md): the Go module and build caches, the roots and the archive, with a fifth to spare.
DISK_BUILD = 14 * GIB
DISK_RUN = 3 * GIB


class NodeImage:
    """The parts, and the shortest way to have the node image in the engine."""

    def __init__(self, progress: Progress, cache: Cache | None = None) -> None:
        self.versions = read_settings(HERE / "versions.env")
        self.progress = progress
        self.cache = cache or Cache(progress)
        self._go_version: str | None = None
        self._go_lock = threading.Lock()

    # -- parts -------------------------------------------------------------------------------------------------------

    def go_version(self) -> str:
        """Return the version of the Go that builds; it is among the inputs of each Go part."""
        with self._go_lock:
            if self._go_version is None:
                ensure_go(self.versions["GO"], self.progress)
                result = run(["go", "env", "GOVERSION"], cwd=NODE)
                self._go_version = check(result, f"Go cannot be run for {NODE}: Go {self.versions['GO']} is needed.")
        return self._go_version

    def _go(self, work: Path, *args: str) -> None:
        """Run a Go command that builds static binaries, because they must run in any root."""
        env = {"CGO_ENABLED": "0", "GOBIN": str(work)}
        log = work.parent / f"{work.name}.log"
        log.unlink(missing_ok=True)
        cwd = NODE if args[0] == "build" else work
        result = run(["go", *args], env=env, cwd=cwd, log=log)
        check(result, f"Building {work.name} failed: if it says that a module was not found, see to GOPROXY.", log)

    def installed(self, name: str, package: str, version_key: str, expected: float) -> Part:
        """Define a part made by one `go install package@version`."""
        target = f"{package}@{self.versions[version_key]}"

        def build(work: Path) -> None:
            self._go(work, "install", "-trimpath", "-ldflags", "-s -w", target)

        return Part(name, (target, self.go_version(), go_arch(), "static"), build, expected)

    @property
    def kind(self) -> Part:
        return self.installed("kind", "sigs.k8s.io/kind", "KIND", 20)

    @property
    def kwok(self) -> Part:
        return self.installed("kwok", "sigs.k8s.io/kwok/cmd/kwok", "KWOK", 120)

    @property
    def coredns(self) -> Part:
        return self.installed("coredns", "github.com/coredns/coredns", "COREDNS", 160)

    @property
    def local_path(self) -> Part:
        return self.installed(
            "local-path-provisioner", "github.com/rancher/local-path-provisioner", "LOCAL_PATH_PROVISIONER", 80
        )

    @property
    def hyperkube(self) -> Part:
        version = self.versions["KUBERNETES"]
        major, minor = version.lstrip("v").split(".")[:2]
        stamp = "k8s.io/component-base/version"
        flags = f"-s -w -X {stamp}.gitVersion={version} -X {stamp}.gitMajor={major} -X {stamp}.gitMinor={minor}"

        def build(work: Path) -> None:
            self._go(work, "build", "-trimpath", "-ldflags", flags, "-o", f"{work}/", "./hyperkube", "./pause")

        sources = [NODE / "go.mod", NODE / "go.sum", NODE / "hyperkube/main.go", NODE / "pause/main.go"]
        return Part("hyperkube", (flags, self.go_version(), go_arch(), *sources), build, 470)

    @property
    def base_root(self) -> Part:
        """The distribution's root. The kind of machine is among its inputs, because the packages depend on it."""
        release = os_release()

        def build(work: Path) -> None:
            source = apt_source(release)
            self._in_namespace(
                work, NODE / "base-root.sh", str(work / "base-root.tar"), str(work), source.suite, source.mirror,
                source.components, source.keyring or "",
            )  # fmt: skip
            shutil.rmtree(work / "root")

        system = f"{release.get('ID')} {release.get('VERSION_CODENAME')} {go_arch()}"
        return Part("base-root", (system, NODE / "base-root.sh"), build, 75)

    @property
    def node_image(self) -> Part:
        scripts = [NODE / "components-root.sh", NODE / "node-root.sh", HERE / "archive.py"]
        made_of = [self.base_root.key, self.hyperkube.key, self.coredns.key, self.local_path.key, self.versions["KIND"]]
        return Part("node-image", (*made_of, *scripts), self._assemble, 60)

    def local_tag(self) -> str:
        return f"{LOCAL_NAME}:{self.node_image.key.rpartition('-')[2]}"

    def _in_namespace(self, work: Path, script: Path, *args: str) -> None:
        """Run a script that makes a root, in mount and process namespaces that end with it."""
        log = work.parent / f"{work.name}.log"
        command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
        result = run([*command, "bash", str(script), *args], log=log, env={"LC_ALL": "C.UTF-8"})
        check(result, f"{script.name} failed: see to this machine's package sources, then run this again.", log)

    def _kind_source(self) -> Path:
        result = run(["go", "mod", "download", "-json", f"sigs.k8s.io/kind@{self.versions['KIND']}"], cwd=Path("/"))
        found: str = json.loads(check(result, "kind's source cannot be fetched: see to GOPROXY."))["Dir"]
        return Path(found)

    def _assemble(self, work: Path) -> None:
        """Assemble the node's image from the other parts."""
        log = work.parent / f"{work.name}.log"
        log.unlink(missing_ok=True)
        version = self.versions["KUBERNETES"]
        hyperkube, pause = (self.cache.get(self.hyperkube) / n for n in ("hyperkube", "pause"))
        coredns = self.cache.get(self.coredns) / "coredns"
        local_path = self.cache.get(self.local_path) / "local-path-provisioner"
        base = self.cache.get(self.base_root) / "base-root.tar"
        source = self._kind_source()

        listing = [
            "bash",
            "-c",
            f'exec -a kubeadm "$0" config images list --kubernetes-version {version}',
            str(hyperkube),
        ]
        required = check(run(listing), "kubeadm does not name its images.").split()
        pause_name = next(n for n in required if "/pause:" in n)
        names = [n for n in required if n != pause_name] + storage_images(
            (source / "pkg/build/nodeimage/const_storage.go").read_text()
        )

        self._in_namespace(
            work, NODE / "components-root.sh", str(base), str(work), str(hyperkube), str(coredns), str(local_path)
        )
        environment = {"Env": [f"PATH={PATH}"]}
        write_archive(
            work / "components", work / "components.tar", names, go_arch(), {**environment, "Entrypoint": ["/coredns"]}
        )
        (work / "pause").mkdir()
        shutil.copy(pause, work / "pause/pause")
        write_archive(work / "pause", work / "pause.tar", [pause_name], go_arch(), {"Entrypoint": ["/pause"]})
        self._in_namespace(
            work, NODE / "node-root.sh", str(work), str(hyperkube), str(source), version, pause_name,
            str(work / "components.tar"), str(work / "pause.tar"),
        )  # fmt: skip
        config = {
            "Env": [f"PATH={PATH}", "container=docker"],
            "Entrypoint": ["/usr/local/bin/entrypoint", "/sbin/init"],
            "StopSignal": "SIGRTMIN+3",
        }
        write_archive(work / "node", work / "node-image.tar", [self.local_tag()], go_arch(), config)
        for leftover in ("components", "pause", "node"):
            shutil.rmtree(work / leftover)
        for leftover in ("components.tar", "pause.tar"):
            (work / leftover).unlink()

    # -- getting the image -------------------------------------------------------------------------------------------

    def public_tags(self) -> list[str]:
        return [f"{self.versions['NODE_IMAGE']}:{tag}" for tag in self.versions["NODE_IMAGE_TAGS"].split()]

    def obtainable_without_building(self, engine: Engine | None) -> bool:
        """Return whether the node image is in the engine or the cache, or its registry answers."""
        if registry_reachable(self.versions["NODE_IMAGE"]):
            return True
        if engine and any(engine.run("image", "inspect", tag).returncode == 0 for tag in self.public_tags()):
            return True
        return which("go") is not None and self.cache.has(self.node_image)

    def ensure(self, engine: Engine) -> tuple[str, bool]:
        """Have the node image in the engine; return its name, and whether it is the public one (with a network)."""
        wanted = os.environ.get("NODE_IMAGE") or "auto"
        if wanted not in ("auto", "public", "local"):
            raise UserError(f"NODE_IMAGE is {wanted!r}: set it to public or local, or leave it out.")
        if wanted != "local":
            for tag in self.public_tags():
                if engine.run("image", "inspect", tag).returncode == 0:
                    return tag, True
        if wanted == "public" or not self.cache.has(self.node_image):
            if wanted != "local":
                pulled = self._pull(engine)
                if pulled:
                    return pulled, True
            if wanted == "public":
                raise UserError(
                    f"{self.public_tags()[0]} cannot be pulled: see to the network, or leave NODE_IMAGE out."
                )
            self._check_can_build()
            self._build_all()
        tag = self.local_tag()
        if engine.run("image", "inspect", tag).returncode != 0:
            check_disk(self.cache.root, DISK_RUN, "Loading the node image and running the cluster")
            archive = self.cache.get(self.node_image) / "node-image.tar"
            with self.progress.step(f"load the node image into {engine.name}", 10):
                check(
                    engine.run("load", "-q", "-i", str(archive)),
                    f"{engine.name} cannot load {archive}: remove it and run again.",
                )
            for old in engine.out("images", "--format", "{{.Repository}}:{{.Tag}}", LOCAL_NAME).split():
                if old != tag:
                    engine.run("rmi", old)
        return tag, False

    def _pull(self, engine: Engine) -> str | None:
        if not registry_reachable(self.versions["NODE_IMAGE"]):
            self.progress.say("the public node image's registry does not answer: the image is made here")
            return None
        for tag in self.public_tags():
            with self.progress.step(f"pull {tag}", 60):
                if engine.run("pull", "-q", tag, timeout=900).returncode == 0:
                    return tag
        self.progress.say("the public node image cannot be pulled: it is made here")
        return None

    def _check_can_build(self) -> None:
        """Raise a UserError now for what would end the build after minutes."""
        ensure_go(self.versions["GO"], self.progress)
        if not is_debian_like(os_release()):
            raise UserError(
                "The node image can be made on Debian and Ubuntu only, and "
                f"{os_release().get('PRETTY_NAME', platform.platform())} is neither: "
                f"have {self.public_tags()[0]} pulled or loaded into podman or docker."
            )
        if os.geteuid() != 0:
            raise UserError("Making the node image needs root (debootstrap): run `make cluster-up` as root once.")
        for program in ("debootstrap", "unshare", "tar"):
            if which(program) is None:
                raise UserError(f"{program} is not installed: run `make deps`.")
        apt_source(os_release())
        have = [p for p in (self.hyperkube, self.coredns, self.local_path, self.base_root) if self.cache.has(p)]
        check_disk(self.cache.root, DISK_BUILD if len(have) < 4 else 2 * DISK_RUN, "Making the node image")

    def _build_all(self) -> None:
        """Build all parts of the node image, then the image.

        The Go parts are built one by one, because each uses all cores; the packages beside them, as they wait for I/O.
        """
        self.progress.say("making the node image: about 16 minutes the first time on 2 cores, kept for all later times")

        def in_turn() -> None:
            for part in (self.hyperkube, self.kind, self.coredns, self.local_path):
                self.cache.get(part)

        jobs: list[Callable[[], object]] = [in_turn, lambda: self.cache.get(self.base_root)]
        with ThreadPoolExecutor(len(jobs)) as pool:
            for future in [pool.submit(job) for job in jobs]:
                future.result()
        self.cache.get(self.node_image)
        self.cache.prune([self.node_image, self.base_root, self.hyperkube, self.coredns, self.local_path, self.kind])


def storage_images(constants: str) -> list[str]:
    """Find the names of the two images in kind's manifest of the standard StorageClass (`const_storage.go`)."""
    names = re.findall(r'^const storage(?:Provisioner|Helper)Image = "([^"]+)"', constants, re.M)
    if len(names) != 2:
        raise UserError(
            "This version of kind names its storage images elsewhere: adapt storage_images in dev/cluster/nodeimage.py."
        )
    return names
