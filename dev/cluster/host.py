"""The host: its system, rights, disk, packages and container engine.

Each error says in one sentence what to do.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dev.cluster.progress import Progress

CAP_SYS_RESOURCE = 24
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


class UserError(Exception):
    """An error that the user can act on; its first sentence says what to do."""


def read_settings(path: Path) -> dict[str, str]:
    """Read the KEY=VALUE lines of `versions.env`."""
    settings = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            key, mark, value = line.partition("=")
            if not mark:
                raise UserError(f"{path.name} line {number} is not KEY=VALUE: put it right.")
            settings[key.strip()] = value.strip()
    return settings


# -- processes ---------------------------------------------------------------------------------------------------------


def _die_with_parent() -> None:
    """Have the kernel kill this child when its parent ends, so that no build outlives `make`, even after kill -9."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    log: Path | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command without raising; capture its output, or append it to a log file."""
    full = {**os.environ, **(env or {})}
    full["PATH"] = f"{full.get('PATH', '/usr/bin:/bin')}:{SBIN}"
    handle = log.open("ab") if log else None
    try:
        return subprocess.run(
            list(command),
            env=full,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            stdout=handle or subprocess.PIPE,
            stderr=subprocess.STDOUT if handle else subprocess.PIPE,
            cwd=cwd,
            timeout=timeout,
            preexec_fn=_die_with_parent,
            check=False,
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(list(command), 127, b"", f"{command[0]}: not found".encode())
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(list(command), 124, b"", f"no answer in {timeout} s".encode())
    finally:
        if handle:
            handle.close()


def tail(data: bytes | Path, lines: int = 15) -> str:
    """Return the last lines of an output or a log file."""
    raw = data.read_bytes() if isinstance(data, Path) else data
    return "\n".join(raw.decode(errors="replace").strip().splitlines()[-lines:])


def check(result: subprocess.CompletedProcess[bytes], sentence: str, log: Path | None = None) -> str:
    """Return the output of a command that must have worked; else raise a UserError that ends with what it printed."""
    if result.returncode != 0:
        printed = tail(log) if log else tail((result.stdout or b"") + b"\n" + (result.stderr or b""))
        raise UserError(f"{sentence}\n{printed}" + (f"\n(the whole log: {log})" if log else ""))
    return (result.stdout or b"").decode(errors="replace").strip()


def which(program: str) -> str | None:
    """Find a program, also in the sbin folders that a plain user's PATH lacks."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SBIN}")


# -- the system --------------------------------------------------------------------------------------------------------


def check_linux() -> None:
    if sys.platform != "linux":
        raise UserError(
            f"The development cluster runs on Linux, not on {platform.system()}: use a Linux machine or a virtual one, "
            "or your own cluster by CLUSTER=current."
        )


def os_release(text: str | None = None) -> dict[str, str]:
    """Parse /etc/os-release."""
    if text is None:
        try:
            text = Path("/etc/os-release").read_text()
        except OSError:
            text = ""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {key: value.strip().strip("\"'") for key, _, value in pairs}


def is_debian_like(release: Mapping[str, str]) -> bool:
    return bool({"debian", "ubuntu"} & {release.get("ID", ""), *release.get("ID_LIKE", "").split()})


def go_arch() -> str:
    """Return the machine's architecture under the name that Go and the image format use."""
    machine = platform.machine()
    try:
        return {"x86_64": "amd64", "aarch64": "arm64"}[machine]
    except KeyError:
        raise UserError(f"The development cluster runs on x86_64 and aarch64, not on {machine}.") from None


def has_capability(number: int, status: str | None = None) -> bool:
    """Return whether this process holds a Linux capability (effective set)."""
    text = Path("/proc/self/status").read_text() if status is None else status
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", text, re.M)
    return bool(found and int(found.group(1), 16) >> number & 1)


def cgroup_v2() -> bool:
    return Path("/sys/fs/cgroup/cgroup.controllers").exists()


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raise a UserError if the disk has too little room, so that work does not fail half-way."""
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed:
        raise UserError(
            f"{what} needs {needed / 2**30:.1f} GiB free on the disk of {probe}, and there are {free / 2**30:.1f} GiB: "
            "free some, or point XDG_CACHE_HOME at a larger disk."
        )


def check_port(port: int) -> None:
    """Raise a UserError if the port that the user asked for is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(
                f"Port {port} on 127.0.0.1 is taken: choose another by API_PORT, or leave that out for a free one."
            ) from None


# -- packages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A package, its purpose, and whether it is installed."""

    name: str
    why: str
    present: bool


def version_tuple(text: str) -> tuple[int, ...]:
    """Parse the numbers of `go1.26.8`, `v1.36.3` or `2:1.19~1`, to compare versions."""
    core = text.split(":")[-1]
    found = re.search(r"(\d+(?:\.\d+)*)", core)
    return tuple(int(n) for n in found.group(1).split(".")) if found else ()


def go_problem(needed: str) -> str | None:
    """Return why this machine's Go cannot build the cluster's parts, or None.

    From 1.21 on Go fetches a newer version itself.
    """
    if which("go") is None:
        return f"Go is not installed; {needed} or newer is needed"
    found = run(["go", "env", "GOVERSION", "GOTOOLCHAIN"]).stdout.decode().split()
    version, toolchain = [*found, "", "auto"][:2]
    if version_tuple(version) >= version_tuple(needed):
        return None
    if version_tuple(version) >= (1, 21) and toolchain != "local":
        return None
    return f"Go is {version or 'of an unknown version'}; {needed} or newer is needed"


def podman_network_present() -> bool:
    plugins = [Path("/usr/lib/cni/bridge"), Path("/opt/cni/bin/bridge"), Path("/usr/libexec/cni/bridge")]
    return any(p.exists() for p in [*plugins, Path("/usr/lib/podman/netavark"), Path("/usr/libexec/podman/netavark")])


def registry_reachable(image: str, timeout: float = 3.0) -> bool:
    """Return whether the registry of the public node image answers; if not, the image must be made here."""
    if os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY"):
        return True
    try:
        with socket.create_connection((image.split("/")[0], 443), timeout=timeout):
            return True
    except OSError:
        return False


def packages(engine_works: bool, image_available: bool) -> list[Package]:
    """List what this machine needs, with reasons; `image_available` means that no node image need be made here."""
    wanted = []
    if not engine_works:
        wanted += [
            Package(
                "podman",
                "runs the cluster's node as a container (no Docker daemon answers here)",
                bool(which("podman")),
            ),
            Package("runc", "the container runtime that works with cgroup v1 and v2 alike", bool(which("runc"))),
            Package("containernetworking-plugins", "podman's network", podman_network_present()),
            Package("iptables", "podman's network rules", bool(which("iptables"))),
            Package("uidmap", "podman's user mapping", bool(which("newuidmap"))),
        ]
    if not image_available:
        wanted.append(
            Package(
                "debootstrap",
                "makes the node's image from packages (no registry can be reached)",
                bool(which("debootstrap")),
            )
        )
    return wanted


def install_packages(missing: Sequence[Package], progress: Progress) -> None:
    """Install packages on Debian and Ubuntu as root, printing the reasons; elsewhere raise an error that lists them."""
    if not missing:
        return
    names = [p.name for p in missing]
    for package in missing:
        progress.say(f"missing: {package.name} - {package.why}")
    if not is_debian_like(os_release()) or which("apt-get") is None:
        raise UserError(
            f"Install these packages by your system's package manager, then run this again: {' '.join(names)}."
        )
    command = f"apt-get install --no-install-recommends {' '.join(names)}"
    if os.geteuid() != 0:
        raise UserError(f"Run this as root, or have root run this once, then run it again: {command}")
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    with progress.step(command):
        result = run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *names], env=env)
        if result.returncode != 0:  # usually because the package lists are missing or old
            check(
                run(["apt-get", "update", "-q"], env=env),
                "apt-get update failed: see to this machine's package sources.",
            )
            result = run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *names], env=env)
        check(result, f"Installing {' '.join(names)} failed: see to this machine's package sources, then run it again.")


def apt_candidate(package: str) -> str:
    found = re.search(rb"Candidate: (\S+)", run(["apt-cache", "policy", package]).stdout or b"")
    return found.group(1).decode() if found else ""


def ensure_go(needed: str, progress: Progress) -> None:
    """Install the distribution's Go if that can fetch a newer one; else raise an error that says where to get it."""
    problem = go_problem(needed)
    if problem is None:
        return
    suitable = version_tuple(apt_candidate("golang-go")) >= (1, 21)
    if which("go") is None and suitable and is_debian_like(os_release()):
        install_packages(
            [Package("golang-go", "builds kind, and the node image where none can be pulled", False)], progress
        )
        problem = go_problem(needed)
    if problem is not None:
        raise UserError(f"{problem}: install it as https://go.dev/doc/install says, then run this again.")


@dataclass(frozen=True)
class AptSource:
    """The package source of this machine, from which the node's packages come too."""

    suite: str
    mirror: str
    components: str
    keyring: str | None


def apt_source(release: Mapping[str, str], texts: Sequence[str] | None = None) -> AptSource:
    """Return the first source of the running release in apt's configuration, in either of its two formats."""
    suite = release.get("VERSION_CODENAME", "")
    if texts is None:
        lists = Path("/etc/apt/sources.list.d")
        paths = [*sorted(lists.glob("*.sources")), *sorted(lists.glob("*.list")), Path("/etc/apt/sources.list")]
        texts = [p.read_text() for p in paths if p.exists()]
    components = "main,universe" if release.get("ID") == "ubuntu" else "main"
    for text in texts:
        for stanza in re.split(r"\n\s*\n", text):
            fields = dict(re.findall(r"^(Types|URIs|Suites|Signed-By):[ \t]*(\S.*)$", stanza, re.M))
            if "deb" in fields.get("Types", "").split() and suite in fields.get("Suites", "").split():
                key = fields.get("Signed-By", "").strip()
                return AptSource(suite, fields["URIs"].split()[0], components, key if key.startswith("/") else None)
        for line in text.splitlines():
            found = re.match(r"deb\s+(?:\[([^\]]*)\]\s*)?(\S+)\s+(\S+)\s", line + " ")
            if found and found.group(3) == suite:
                key_option = re.search(r"signed-by=(/\S+)", found.group(1) or "")
                return AptSource(suite, found.group(2), components, key_option.group(1) if key_option else None)
    raise UserError(
        f"No package source for {suite or 'this system'} is configured in /etc/apt: the node image is made from the "
        "packages of Debian or Ubuntu; configure one, or make the public node image available to podman or docker."
    )


# -- the container engine ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A container engine, podman or docker, and the environment that it needs on this host."""

    name: str
    env: Mapping[str, str] = field(default_factory=dict)

    def run(self, *args: str, timeout: float | None = None) -> subprocess.CompletedProcess[bytes]:
        return run([self.name, *args], env=self.env, timeout=timeout)

    def out(self, *args: str) -> str:
        """Return the output of a query, or an empty text if it fails."""
        result = self.run(*args)
        return result.stdout.decode().strip() if result.returncode == 0 else ""


def docker_problem() -> str | None:
    """Return why docker cannot be used, or None.

    The command must reach a Docker daemon, and not be podman's stand-in.
    """
    if which("docker") is None:
        return "docker is not installed"
    asked = run(["docker", "version", "--format", "{{.Server.Version}} {{.Server.Platform.Name}}"], timeout=20)
    answer = asked.stdout.decode().strip()
    if asked.returncode != 0 or not answer:
        return "the Docker daemon does not answer"
    if b"podman" in run(["docker", "--version"]).stdout.lower():
        return "docker is podman's stand-in here"
    return None


def podman_problem() -> str | None:
    """Return why podman cannot be used, or None."""
    if which("podman") is None:
        return "podman is not installed"
    if os.geteuid() != 0 and not cgroup_v2():
        return "podman without root needs cgroup v2"
    answer = run(["podman", "info", "--format", "{{.Version.Version}}"], timeout=60)
    return None if answer.returncode == 0 else f"podman does not work: {tail(answer.stderr, 1)}"


def containers_conf(hard_files: int, hard_processes: int, may_raise: bool, v2: bool, runc: bool, pid_max: int) -> str:
    """Return podman's settings for a host on which its defaults fail, or an empty text if they work.

    podman asks for 1,048,576 files and processes, which root without CAP_SYS_RESOURCE may not set above the hard limits
    (of processes podman first lowers its own to kernel.pid_max); crun refuses hybrid cgroups, runc does not.
    """
    lines = []
    if not may_raise:
        limits = []
        for name, hard, most in (("nofile", hard_files, 1048576), ("nproc", hard_processes, pid_max)):
            limit = most if hard == resource.RLIM_INFINITY else min(hard, most)
            limits.append(f'"{name}={limit}:{limit}"')
        lines += ["[containers]", f"default_ulimits = [{', '.join(limits)}]"]
    if not v2 and runc:
        lines += ["[engine]", 'runtime = "runc"']
    return "\n".join(lines) + "\n" if lines else ""


def podman_env(state: Path) -> dict[str, str]:
    """Return podman's environment for this host. A CONTAINERS_CONF that the user has set is kept."""
    ours = state / "containers.conf"
    theirs = os.environ.get("CONTAINERS_CONF")
    env = {"KIND_EXPERIMENTAL_PROVIDER": "podman"}
    if theirs and Path(theirs) != ours:
        return env
    text = containers_conf(
        resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        resource.getrlimit(resource.RLIMIT_NPROC)[1],
        os.geteuid() != 0 or has_capability(CAP_SYS_RESOURCE),
        cgroup_v2(),
        which("runc") is not None,
        int(Path("/proc/sys/kernel/pid_max").read_text()),
    )
    if text:
        state.mkdir(parents=True, exist_ok=True)
        if not ours.exists() or ours.read_text() != text:
            ours.write_text(text)
        env["CONTAINERS_CONF"] = str(ours)
    return env


def find_engine(state: Path, holder: str = "") -> Engine:
    """Find an engine that works, docker before podman, unless ENGINE in the environment or `holder` names one."""
    wanted = os.environ.get("ENGINE") or holder
    if wanted not in ("", "docker", "podman"):
        raise UserError(f"ENGINE is {wanted!r}: set it to docker or podman, or leave it out.")
    problems = []
    if wanted in ("", "docker"):
        problem = docker_problem()
        if problem is None:
            return Engine("docker", {"KIND_EXPERIMENTAL_PROVIDER": "docker"})
        problems.append(problem)
    if wanted in ("", "podman"):
        problem = podman_problem()
        if problem is None:
            return Engine("podman", podman_env(state))
        problems.append(problem)
    advice = "run `make deps`" if os.geteuid() == 0 else "run `make deps` as root, or ask for the right to use docker"
    raise UserError(f"No container engine works here ({'; '.join(problems)}): {advice}.")
