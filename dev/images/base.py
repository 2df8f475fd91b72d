"""The base image: the one that BASE names, else the public one, else one made from the distribution's packages."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from dev.cluster.archive import PATH, write_archive
from dev.cluster.host import (
    Engine,
    UserError,
    apt_source,
    check,
    go_arch,
    install_packages,
    os_release,
    packages,
    registry_reachable,
    run,
)
from dev.cluster.parts import Cache, Part
from dev.cluster.progress import Progress
from dev.images.wheels import Target

PUBLIC = "docker.io/library/python:3.13-slim"
LOCAL = "localhost/ingestrun-base"
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
HERE = Path(__file__).resolve().parent
# The Debian release of the public base, used on any Debian host so that the Python is the same.
DEBIAN_SUITE = "trixie"


@dataclass(frozen=True)
class Base:
    """A base image that the engine has."""

    name: str
    identity: str
    size: int
    target: Target


def resolve(engine: Engine, cache: Cache, progress: Progress, wanted: str | None) -> Base:
    """Have the base image in the engine, by the shortest way."""
    if wanted:
        if not present(engine, wanted):
            with progress.step(f"{engine.name} pull {wanted}", 30):
                check(
                    engine.run("pull", wanted),
                    f"The base image {wanted} is not here and cannot be pulled: see to BASE.",
                )
        return describe(engine, wanted)
    if present(engine, PUBLIC):
        return describe(engine, PUBLIC)
    if registry_reachable("registry-1.docker.io/"):
        with progress.step(f"{engine.name} pull {PUBLIC}", 30):
            if engine.run("pull", PUBLIC).returncode == 0:
                return describe(engine, PUBLIC)
    part = local_part(progress)
    name = f"{LOCAL}:{part.key.rpartition('-')[2]}"
    if not present(engine, name):
        archive = cache.get(part) / "image.tar"
        check(engine.run("load", "-i", str(archive)), f"{engine.name} does not load {archive}.")
    return describe(engine, name)


def present(engine: Engine, name: str) -> bool:
    """Return whether the engine has an image."""
    return engine.run("image", "inspect", name).returncode == 0


def describe(engine: Engine, name: str) -> Base:
    """Describe an image; its Python version is PYTHON_VERSION, or what its Python prints."""
    found = json.loads(check(engine.run("image", "inspect", name), f"{engine.name} does not have the image {name}."))[0]
    settings = dict(item.partition("=")[::2] for item in found["Config"].get("Env") or ())
    version = settings.get("PYTHON_VERSION") or check(
        engine.run(
            "run", "--rm", "--entrypoint", "python3", name, "-c", "import platform; print(platform.python_version())"
        ),
        f"The base image {name} has no Python 3.",
    )
    architecture = found["Architecture"]
    if architecture not in MACHINES:
        raise UserError(f"The base image {name} is for {architecture}: take one for {' or '.join(MACHINES)}.")
    return Base(name, found["Id"], int(found["Size"]), Target(version, MACHINES[architecture]))


def local_part(progress: Progress) -> Part:
    """Define the part that is the base image made here."""
    release = os_release()
    script = HERE / "base-root.sh"

    def build(work: Path) -> None:
        if os.geteuid() != 0:
            raise UserError(
                f"No registry can be reached, so the base image is made here: run this as root, or give BASE={PUBLIC}."
            )
        install_packages([p for p in packages(True, False) if not p.present], progress)
        source = apt_source(release)
        suite = DEBIAN_SUITE if release.get("ID") == "debian" else source.suite
        command = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "bash",
        ]
        given = [str(work), suite, source.mirror, source.components, source.keyring or ""]
        log = work.parent / f"{work.name}.log"
        result = run([*command, str(script), *given], log=log, env={"LC_ALL": "C.UTF-8"})
        check(result, f"{script.name} failed: see to this machine's package sources, then run this again.", log)
        version = (work / "python-version").read_text().strip()
        config = {"Env": [f"PATH={PATH}", "LANG=C.UTF-8", f"PYTHON_VERSION={version}"], "Cmd": ["python3"]}
        tag = f"{LOCAL}:{part.key.rpartition('-')[2]}"
        write_archive(work / "root", work / "image.tar", [tag], go_arch(), config)
        shutil.rmtree(work / "root")

    system = f"{release.get('ID')} {release.get('VERSION_CODENAME')} {DEBIAN_SUITE} {go_arch()}"
    part = Part("python-base", (system, script, PATH), build, 70)
    return part
